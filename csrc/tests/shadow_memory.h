// Shadow of the shared memory of an emulated block: for each byte, which lanes have read and written it since the last
// barriers. Two lanes at one byte, one of them writing, with no barrier between, are a race, whatever order they ran
// in.
//
// Tests of kernels are compiled, but not linked, with -fsanitize=thread: the compiler then calls a function at every
// access to memory, and shadow/shadow_memory.cpp has these functions in place of the sanitizer's library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

class ShadowMemory {
 public:
  /// A block begins: its shared memory is filled with what is no number, and watched. It has asked for `asked` bytes of
  /// the `reserved` ones from `dynamic` on.
  void begin(void* dynamic, size_t asked, size_t reserved);
  void end() { watched_ = {}; }

  /// All lanes of the block have met at a barrier.
  void order_block() { ++block_epoch_; }

  void access(void const* address, size_t bytes, bool writes) {
    size_t const offset = reinterpret_cast<uintptr_t>(address) - watched_.begin;
    if (offset < watched_.bytes) touch(offset, bytes, writes);
  }

  /// Notes what the lane that runs has done wrong.
  void report(std::string const& what);

  /// The lane that runs, and how many barriers its warp has met at.
  int lane = 0;
  int64_t warp_epoch = 0;

  /// The first that was wrong.
  std::string fault;

 private:
  struct Range {
    uintptr_t begin = 0;
    size_t bytes = 0;
  };

  static constexpr int kMany = -1;

  /// Accesses of one kind in one epoch of the block: by which warp, in which of its epochs, and by which lane.
  struct Accesses {
    int64_t block_epoch = 0;
    int64_t warp_epoch = 0;
    int warp = kMany;
    int lane = kMany;
  };
  struct Cell {
    Accesses reads;
    Accesses writes;
  };

  static Range shared_memory();
  bool meets(Accesses const& others) const;
  void add(Accesses& known) const;
  void check(Cell& cell, bool writes);
  void touch(size_t offset, size_t bytes, bool writes);

  Range watched_;
  Range beyond_;  // Dynamic shared memory that the block has not asked for.
  std::vector<Cell> cells_;
  int64_t block_epoch_ = 0;
};

extern ShadowMemory shadow;

}  // namespace emulation
