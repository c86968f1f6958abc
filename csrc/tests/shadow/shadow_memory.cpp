#include "../shadow_memory.h"

#include <link.h>

#include <cstring>

namespace emulation {

ShadowMemory shadow;

/// The program's thread-local variables: in tests of kernels, shared memory and nothing else.
ShadowMemory::Range ShadowMemory::shared_memory() {
  Range range;
  dl_iterate_phdr(
      [](dl_phdr_info* program, size_t, void* data) {
        for (int h = 0; h < program->dlpi_phnum; ++h) {
          if (program->dlpi_phdr[h].p_type != PT_TLS) continue;
          *static_cast<Range*>(data) = {reinterpret_cast<uintptr_t>(program->dlpi_tls_data),
                                        program->dlpi_phdr[h].p_memsz};
        }
        // The program itself comes first; libraries are left alone.
        return 1;
      },
      &range);
  return range;
}

void ShadowMemory::begin(void* dynamic, size_t asked, size_t reserved) {
  static Range const all = shared_memory();
  auto const first = reinterpret_cast<uintptr_t>(dynamic);
  beyond_ = {first + asked, reserved - asked};
  uintptr_t const after = beyond_.begin + beyond_.bytes;
  std::memset(reinterpret_cast<void*>(all.begin), 0xff, beyond_.begin - all.begin);
  std::memset(reinterpret_cast<void*>(after), 0xff, all.begin + all.bytes - after);
  cells_.resize(all.bytes);
  ++block_epoch_;
  watched_ = all;
}

void ShadowMemory::report(std::string const& what) {
  if (fault.empty()) fault = "lane " + std::to_string(lane) + " " + what;
}

/// Whether others had such access with no barrier between it and now.
bool ShadowMemory::meets(Accesses const& others) const {
  if (others.block_epoch != block_epoch_) return false;
  if (others.warp != lane / 32) return true;
  return others.warp_epoch == warp_epoch && others.lane != lane;
}

void ShadowMemory::add(Accesses& known) const {
  Accesses const mine{block_epoch_, warp_epoch, lane / 32, lane};
  if (known.block_epoch != block_epoch_ || (known.warp == mine.warp && known.warp_epoch != warp_epoch)) {
    known = mine;
  } else if (known.warp != mine.warp) {
    known.warp = kMany;
  } else if (known.lane != lane) {
    known.lane = kMany;
  }
}

void ShadowMemory::check(Cell& cell, bool writes) {
  bool const after_write = meets(cell.writes);
  if (after_write || (writes && meets(cell.reads))) {
    report(std::string(writes ? "writes" : "reads") + " what another one has " + (after_write ? "written" : "read") +
           " since the last barrier");
  }
  add(writes ? cell.writes : cell.reads);
}

void ShadowMemory::touch(size_t offset, size_t bytes, bool writes) {
  if (watched_.begin + offset - beyond_.begin < beyond_.bytes) {
    report(std::string(writes ? "writes" : "reads") + " dynamic shared memory that the block has not asked for");
  }
  for (size_t b = offset; b < offset + bytes; ++b) check(cells_[b], writes);
}

}  // namespace emulation

// What the compiler calls; the names are the sanitizer's.
#define FASTMTL_SHADOW(name, bytes, writes) \
  extern "C" void name(void* address) { emulation::shadow.access(address, bytes, writes); }
FASTMTL_SHADOW(__tsan_read1, 1, false)
FASTMTL_SHADOW(__tsan_read2, 2, false)
FASTMTL_SHADOW(__tsan_read4, 4, false)
FASTMTL_SHADOW(__tsan_read8, 8, false)
FASTMTL_SHADOW(__tsan_read16, 16, false)
FASTMTL_SHADOW(__tsan_write1, 1, true)
FASTMTL_SHADOW(__tsan_write2, 2, true)
FASTMTL_SHADOW(__tsan_write4, 4, true)
FASTMTL_SHADOW(__tsan_write8, 8, true)
FASTMTL_SHADOW(__tsan_write16, 16, true)

extern "C" {
void __tsan_read_range(void* address, long bytes) {
  emulation::shadow.access(address, static_cast<size_t>(bytes), false);
}
void __tsan_write_range(void* address, long bytes) {
  emulation::shadow.access(address, static_cast<size_t>(bytes), true);
}
/// Of the guards of variables that are initialised when they are met.
char __tsan_atomic8_load(char const volatile* address, int) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
