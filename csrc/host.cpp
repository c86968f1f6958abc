// fastmtl._host: facts about this machine that need no tensor, for `fastmtl doctor` and the benchmarks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fastmtl/cpu_features.h"

#if FASTMTL_X86
#include <immintrin.h>
#endif

#ifndef FASTMTL_BUILD_FLAGS
#define FASTMTL_BUILD_FLAGS ""
#endif

namespace py = pybind11;

namespace {

using fastmtl::Isa;

constexpr size_t kLine = 64;
constexpr size_t kFloatsPerLine = kLine / sizeof(float);
/// A core has only so many outstanding misses per stream its prefetcher follows; several streams come closer to the
/// memory's own rate on some machines and less close on others, so both counts are measured.
constexpr size_t kManyStreams = 4;

float volatile sink = 0.5f;

struct AlignedFree {
  void operator()(float* pointer) const { ::operator delete[](pointer, std::align_val_t{kLine}); }
};
using Buffer = std::unique_ptr<float[], AlignedFree>;

/// Plain pages, as torch allocates tensors: the ceiling measured is the one the kernels can reach.
Buffer allocate(size_t lines) {
  return Buffer(static_cast<float*>(::operator new[](lines * kLine, std::align_val_t{kLine})));
}

using Sum = float (*)(float const*, size_t);

float sum_portable(float const* data, size_t lines) {
  float total[kFloatsPerLine] = {};
  for (size_t i = 0; i < lines; ++i) {
    for (size_t j = 0; j < kFloatsPerLine; ++j) total[j] += data[i * kFloatsPerLine + j];
  }
  float all = 0;
  for (float const value : total) all += value;
  return all;
}

using Copy = void (*)(float*, float const*, size_t);

void copy_memcpy(float* out, float const* in, size_t lines) { std::memcpy(out, in, lines * kLine); }

#if FASTMTL_X86

template <size_t streams>
FASTMTL_TARGET_AVX2 float sum_avx2(float const* data, size_t lines) {
  constexpr size_t width = 8;
  size_t const stride = lines / streams * kFloatsPerLine;
  __m256 total[2 * streams];
  for (auto& value : total) value = _mm256_setzero_ps();
  for (size_t i = 0; i < stride; i += 2 * width) {
#pragma GCC unroll 8
    for (size_t s = 0; s < streams; ++s) {
      float const* at = data + s * stride + i;
      total[2 * s] = _mm256_add_ps(total[2 * s], _mm256_load_ps(at));
      total[2 * s + 1] = _mm256_add_ps(total[2 * s + 1], _mm256_load_ps(at + width));
    }
  }
  for (size_t s = 1; s < 2 * streams; ++s) total[0] = _mm256_add_ps(total[0], total[s]);
  alignas(32) float all[width];
  _mm256_store_ps(all, total[0]);
  return std::accumulate(all, all + width, 0.0f);
}

template <size_t streams>
FASTMTL_TARGET_AVX512 float sum_avx512(float const* data, size_t lines) {
  constexpr size_t width = 16;
  size_t const stride = lines / streams * kFloatsPerLine;
  __m512 total[2 * streams];
  for (auto& value : total) value = _mm512_setzero_ps();
  for (size_t i = 0; i < stride; i += 2 * width) {
#pragma GCC unroll 8
    for (size_t s = 0; s < streams; ++s) {
      float const* at = data + s * stride + i;
      total[2 * s] = _mm512_add_ps(total[2 * s], _mm512_load_ps(at));
      total[2 * s + 1] = _mm512_add_ps(total[2 * s + 1], _mm512_load_ps(at + width));
    }
  }
  for (size_t s = 1; s < 2 * streams; ++s) total[0] = _mm512_add_ps(total[0], total[s]);
  alignas(64) float all[width];
  _mm512_store_ps(all, total[0]);
  return std::accumulate(all, all + width, 0.0f);
}

FASTMTL_TARGET_AVX2 void copy_streaming_avx2(float* out, float const* in, size_t lines) {
  for (size_t i = 0; i < lines * kFloatsPerLine; i += kFloatsPerLine) {
    _mm256_stream_ps(out + i, _mm256_load_ps(in + i));
    _mm256_stream_ps(out + i + 8, _mm256_load_ps(in + i + 8));
  }
  _mm_sfence();
}

FASTMTL_TARGET_AVX512 void copy_streaming_avx512(float* out, float const* in, size_t lines) {
  for (size_t i = 0; i < lines * kFloatsPerLine; i += kFloatsPerLine) {
    _mm512_stream_ps(out + i, _mm512_load_ps(in + i));
  }
  _mm_sfence();
}

#endif

/// How a thread multiplies and adds in float32: `rounds` times in kChains vectors of `lanes`, of which none waits for
/// another one.
struct MultiplyAdd {
  float (*run)(size_t rounds);
  size_t lanes;
};
constexpr int kChains = 12;

float multiply_add_portable(size_t rounds) {
  float chain[kChains];
  std::iota(chain, chain + kChains, 0.0f);
  float const factor = sink;
  for (size_t i = 0; i < rounds; ++i) {
    for (float& value : chain) value = value * factor + 1.0f;
  }
  return std::accumulate(chain, chain + kChains, 0.0f);
}

#if FASTMTL_X86

FASTMTL_TARGET_AVX2 float multiply_add_avx2(size_t rounds) {
  __m256 chain[kChains];
  for (int k = 0; k < kChains; ++k) chain[k] = _mm256_set1_ps(static_cast<float>(k));
  __m256 const factor = _mm256_set1_ps(sink);
  __m256 const term = _mm256_set1_ps(1.0f);
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kChains; ++k) chain[k] = _mm256_fmadd_ps(chain[k], factor, term);
  }
  for (int k = 1; k < kChains; ++k) chain[0] = _mm256_add_ps(chain[0], chain[k]);
  return _mm256_cvtss_f32(chain[0]);
}

FASTMTL_TARGET_AVX512 float multiply_add_avx512(size_t rounds) {
  __m512 chain[kChains];
  for (int k = 0; k < kChains; ++k) chain[k] = _mm512_set1_ps(static_cast<float>(k));
  __m512 const factor = _mm512_set1_ps(sink);
  __m512 const term = _mm512_set1_ps(1.0f);
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kChains; ++k) chain[k] = _mm512_fmadd_ps(chain[k], factor, term);
  }
  for (int k = 1; k < kChains; ++k) chain[0] = _mm512_add_ps(chain[0], chain[k]);
  return _mm512_cvtss_f32(chain[0]);
}

#endif

MultiplyAdd multiply_add(Isa isa) {
#if FASTMTL_X86
  if (isa == Isa::avx512) return {multiply_add_avx512, 16};
  if (isa == Isa::avx2) return {multiply_add_avx2, 8};
#endif
  (void)isa;
  return {multiply_add_portable, 1};
}

std::vector<Sum> sums(Isa isa) {
#if FASTMTL_X86
  if (isa == Isa::avx512) return {sum_avx512<1>, sum_avx512<kManyStreams>, sum_avx2<1>, sum_avx2<kManyStreams>};
  if (isa == Isa::avx2) return {sum_avx2<1>, sum_avx2<kManyStreams>};
#endif
  (void)isa;
  return {sum_portable};
}

std::vector<Copy> copies(Isa isa) {
#if FASTMTL_X86
  if (isa == Isa::avx512) return {copy_memcpy, copy_streaming_avx512, copy_streaming_avx2};
  if (isa == Isa::avx2) return {copy_memcpy, copy_streaming_avx2};
#endif
  (void)isa;
  return {copy_memcpy};
}

/// Size in bytes of the file's number with its K or M suffix, as the kernel writes cache sizes; 0 if there is none.
int64_t read_size(std::string const& path) {
  std::ifstream file(path);
  int64_t number = 0;
  char suffix = ' ';
  if (!(file >> number)) return 0;
  file >> suffix;
  return number * (suffix == 'K' ? 1024 : suffix == 'M' ? 1024 * 1024 : 1);
}

/// Last-level cache of the whole machine, over all its instances; 0 where the system does not say.
int64_t last_level_cache() {
  int const cpus = static_cast<int>(std::thread::hardware_concurrency());
  std::set<std::string> seen;
  int64_t total = 0;
  for (int cpu = 0; cpu < cpus; ++cpu) {
    std::string const base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cache/index";
    for (int index = 9; index >= 0; --index) {
      std::string const folder = base + std::to_string(index);
      int64_t const size = read_size(folder + "/size");
      if (size == 0) continue;
      std::string sharers;
      std::ifstream(folder + "/shared_cpu_list") >> sharers;
      if (seen.insert(sharers).second) total += size;
      break;
    }
  }
  return total;
}

constexpr int64_t kAssumedCache = int64_t{32} << 20;

struct Plan {
  size_t lines;  // per thread
  int threads;
};

Plan plan(int64_t bytes, int threads) {
  if (bytes < 0) throw std::invalid_argument("bytes must be 0 (8 times the last-level cache) or more.");
  if (threads < 0) throw std::invalid_argument("threads must be 0 (one per core) or more.");
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  if (bytes == 0) {
    int64_t const cache = last_level_cache();
    bytes = 8 * (cache > 0 ? cache : kAssumedCache);
  }
  constexpr size_t block = 2 * kManyStreams;  // every variant then walks all lines of its part
  size_t const share = static_cast<size_t>(bytes) / kLine / threads;
  return {std::max(block, share / block * block), threads};
}

/// Seconds in which all threads together, each of which is told its number, do the work.
double seconds_of(int threads, std::function<void(int thread)> const& work) {
  using Clock = std::chrono::steady_clock;
  std::barrier gate(threads);
  double taken = 0;
  auto const body = [&](int thread) {
    gate.arrive_and_wait();
    auto const before = Clock::now();
    work(thread);
    gate.arrive_and_wait();
    if (thread == 0) taken = std::chrono::duration<double>(Clock::now() - before).count();
  };
  std::vector<std::jthread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  others.clear();
  return taken;
}

/// Float32 multiply-adds per second of all threads together.
double multiply_add_rate(int threads) {
  constexpr size_t rounds = size_t{1} << 20;
  threads = plan(1, threads).threads;
  MultiplyAdd const way = multiply_add(fastmtl::isa());
  double const seconds = seconds_of(threads, [&](int) { sink = way.run(rounds) > 0 ? 0.5f : 0.25f; });
  return static_cast<double>(threads * rounds * kChains * way.lanes) / seconds;
}

/// Memory from an address on.
using Region = std::pair<uintptr_t, int64_t>;

/// Seconds to read all sources, one after the other, and to write what is read of the first ones to the targets. Every
/// thread takes its share of each. Whole pairs of lines only: what little is left at the ends is not walked.
double plain_pass(std::vector<Region> const& sources, std::vector<Region> const& targets, int threads) {
  if (targets.size() > sources.size()) throw std::invalid_argument("there must be a source for each target.");
  threads = plan(1, threads).threads;
  Sum const sum = sums(fastmtl::isa()).front();
  Copy const copy = copies(fastmtl::isa()).at(copies(fastmtl::isa()).size() > 1 ? 1 : 0);
  auto const first_line = [](uintptr_t address) { return (address + kLine - 1) / kLine * kLine; };
  return seconds_of(threads, [&](int thread) {
    float total = 0;
    for (size_t i = 0; i < sources.size(); ++i) {
      bool const writes = i < targets.size();
      int64_t const bytes = writes ? std::min(sources[i].second, targets[i].second) : sources[i].second;
      // Not to be overrun where the first line begins behind the address.
      size_t const pairs = bytes < static_cast<int64_t>(kLine) ? 0 : (bytes - (kLine - 1)) / (2 * kLine);
      size_t const begin = pairs * thread / threads * 2 * kLine;
      size_t const lines = pairs * (thread + 1) / threads * 2 - begin / kLine;
      auto const* const from = reinterpret_cast<float const*>(first_line(sources[i].first) + begin);
      if (writes) {
        copy(reinterpret_cast<float*>(first_line(targets[i].first) + begin), from, lines);
      } else {
        total += sum(from, lines);
      }
    }
    sink = total;
  });
}

/// Buffers that no cache holds, and how fast memory moves them.
class Memory {
 public:
  Memory(int64_t bytes, int threads)
      : plan_(plan(bytes, threads)),
        in_(allocate(plan_.lines * plan_.threads)),
        out_(allocate(plan_.lines * plan_.threads)) {
    // Each thread touches its own part first, so that its pages are near it.
    pass([&](size_t first, size_t count) {
      std::fill_n(in_.get() + first, count, 1.0f);
      std::fill_n(out_.get() + first, count, 0.0f);
    });
  }

  /// Bytes read per second in one pass of one of the ways to read.
  double read(size_t way) {
    Sum const sum = sums(fastmtl::isa()).at(way);
    return bytes() / pass([&](size_t first, size_t) { sink = sum(in_.get() + first, plan_.lines); });
  }

  /// Bytes read plus bytes written per second in one pass of one of the ways to copy.
  double copy(size_t way) {
    Copy const copy = copies(fastmtl::isa()).at(way);
    return 2 * bytes() / pass([&](size_t first, size_t) { copy(out_.get() + first, in_.get() + first, plan_.lines); });
  }

 private:
  double bytes() const { return static_cast<double>(plan_.lines * plan_.threads * kLine); }

  double pass(std::function<void(size_t first, size_t count)> const& work) {
    size_t const part = plan_.lines * kFloatsPerLine;
    return seconds_of(plan_.threads, [&](int thread) { work(thread * part, part); });
  }

  Plan plan_;
  Buffer in_;
  Buffer out_;
};

/// The fastest way's median over passes that take `seconds` in all.
double bandwidth(double (Memory::*measure)(size_t), size_t ways, int64_t bytes, int threads, double seconds) {
  if (!(seconds >= 0)) throw std::invalid_argument("seconds must be 0 or more.");
  using Clock = std::chrono::steady_clock;
  constexpr size_t min_passes = 5;
  Memory memory(bytes, threads);
  auto const start = Clock::now();
  std::vector<std::vector<double>> rates(ways);
  while (rates[0].size() < min_passes || std::chrono::duration<double>(Clock::now() - start).count() < seconds) {
    for (size_t way = 0; way < ways; ++way) rates[way].push_back((memory.*measure)(way));
  }
  double best = 0;
  for (auto& of_way : rates) {
    std::nth_element(of_way.begin(), of_way.begin() + of_way.size() / 2, of_way.end());
    best = std::max(best, of_way[of_way.size() / 2]);
  }
  return best;
}

double read_bandwidth(int64_t bytes, int threads, double seconds) {
  return bandwidth(&Memory::read, sums(fastmtl::isa()).size(), bytes, threads, seconds);
}

double copy_bandwidth(int64_t bytes, int threads, double seconds) {
  return bandwidth(&Memory::copy, copies(fastmtl::isa()).size(), bytes, threads, seconds);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about this machine: memory bandwidth, caches, instruction set, and how fastmtl was compiled.";
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes") = 0, py::arg("threads") = 0, py::arg("seconds") = 0.25,
        py::call_guard<py::gil_scoped_release>(),
        "Bytes read per second by all threads together; bytes=0 takes 8 times the last-level cache, threads=0 all.");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("bytes") = 0, py::arg("threads") = 0, py::arg("seconds") = 0.25,
        py::call_guard<py::gil_scoped_release>(),
        "Bytes read plus bytes written per second, copying `bytes` with all threads together.");
  m.def("multiply_add_rate", &multiply_add_rate, py::arg("threads") = 0, py::call_guard<py::gil_scoped_release>(),
        "Float32 multiply-adds per second by all threads together, in some milliseconds of them; threads=0 takes all.");
  m.def("plain_pass", &plain_pass, py::arg("sources"), py::arg("targets"), py::arg("threads") = 0,
        py::call_guard<py::gil_scoped_release>(),
        "Seconds all threads together take to read the sources, each an address and a number of bytes, and to copy the "
        "first of them to the targets; threads=0 takes all.");
  py::class_<Memory>(m, "Memory",
                     "Buffers of 8 times the last-level cache (bytes=0), to time memory between other work.")
      .def(py::init<int64_t, int>(), py::arg("bytes") = 0, py::arg("threads") = 0)
      .def("read", &Memory::read, py::arg("way"), py::call_guard<py::gil_scoped_release>(),
           "Bytes read per second in one pass of one of the `read_ways`.")
      .def("copy", &Memory::copy, py::arg("way"), py::call_guard<py::gil_scoped_release>(),
           "Bytes read plus bytes written per second in one pass of one of the `copy_ways`.")
      .def_property_readonly_static("read_ways", [](py::object const&) { return sums(fastmtl::isa()).size(); })
      .def_property_readonly_static("copy_ways", [](py::object const&) { return copies(fastmtl::isa()).size(); });
  m.def("isa", [] { return fastmtl::isa_name(fastmtl::isa()); }, "Instruction set the CPU kernels use.");
  m.def(
      "supported_isa", [] { return fastmtl::isa_name(fastmtl::supported_isa()); },
      "Best instruction set this CPU supports.");
  m.def("last_level_cache", &last_level_cache, "Bytes of last-level cache in the machine; 0 if unknown.");
  m.def("build_flags", [] { return FASTMTL_BUILD_FLAGS; }, "Compiler flags the extensions were built with.");
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "gcc " __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}
