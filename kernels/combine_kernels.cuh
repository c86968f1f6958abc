// Weighted sums of rows, each element of each row read once. A block takes pieces of strips; rows whose weight is zero
// are found on the device and not read.
#pragma once

#include <type_traits>

#include "vector.cuh"

namespace fastmtl {

constexpr int kCombineThreads = 256;
/// Blocks that a processor has registers for.
constexpr int kCombineBlocks = 2;
constexpr int64_t kCombinePiece = 4096;
constexpr int kCombineMaxRows = 128;
/// Loads of one lane that are under way together.
constexpr int kCombineLoads = 8;

enum class OutType : int32_t { f32, f64, bf16, f16 };

struct CombineArguments {
  double const* weights;  // (M, T) or (L, T)
  int32_t rows;
  int32_t results;  // M; 1 where weights go by group.
  bool by_group;
  bool accumulate;
  OutType out;
};

/// The rows of one strip that count, packed.
template <class Storage, class Acc>
struct Terms {
  Storage const* row[kCombineMaxRows];
  Acc weight[kCombineMaxRows];
  int count;

  __device__ void gather(LaunchTable const& table, int s, CombineArguments const& arguments, int result) {
    if (threadIdx.x >= 32) return;
    auto const lane = static_cast<int>(threadIdx.x);
    int64_t const which = arguments.by_group ? table.strip(s).group : result;
    double const* const weights = arguments.weights + which * arguments.rows;
    int kept_before = 0;
    for (int first = 0; first < arguments.rows; first += 32) {
      int const t = first + lane;
      void const* const pointer = t < arguments.rows ? table.pointer(s, t) : nullptr;
      double const factor = pointer != nullptr ? weights[t] : 0;
      unsigned const kept = __ballot_sync(0xffffffffu, factor != 0);
      if (factor != 0) {
        int const place = kept_before + __popc(kept & ((1u << lane) - 1));
        row[place] = static_cast<Storage const*>(pointer);
        weight[place] = static_cast<Acc>(factor);
      }
      kept_before += __popc(kept);
    }
    if (lane == 0) count = kept_before;
  }
};

/// sums += the terms at `vectors` vectors, a block's width apart; `depth` rows are loaded at a time.
template <bool whole, int depth, int vectors, class Storage, class Acc>
__device__ inline void add_terms(Terms<Storage, Acc> const& terms, int64_t at, int64_t length,
                                 Acc (&sums)[vectors][kLanesOf<Storage>]) {
  constexpr int lanes = kLanesOf<Storage>;
  FASTMTL_NO_UNROLL
  for (int t = 0; t < terms.count; t += depth) {
    Vector<Storage> loaded[depth][vectors];
    FASTMTL_UNROLL
    for (int d = 0; d < depth; ++d) {
      if (t + d < terms.count) {
        FASTMTL_UNROLL
        for (int v = 0; v < vectors; ++v) {
          loaded[d][v] = load_vector<whole>(terms.row[t + d], at + v * kCombineThreads * lanes, length);
        }
      }
    }
    FASTMTL_UNROLL
    for (int d = 0; d < depth; ++d) {
      if (t + d < terms.count) {
        Acc const weight = terms.weight[t + d];
        FASTMTL_UNROLL
        for (int v = 0; v < vectors; ++v) {
          FASTMTL_UNROLL
          for (int i = 0; i < lanes; ++i) sums[v][i] += weight * widen<Acc>(loaded[d][v].value[i]);
        }
      }
    }
  }
}

/// Writes into a tensor of the rows' own type.
template <bool whole, class Storage, class Acc>
__device__ inline void write_same(void* out, int64_t at, int64_t length, bool accumulate,
                                  Acc (&sums)[kLanesOf<Storage>]) {
  auto* const target = static_cast<Storage*>(out);
  if (accumulate) {
    Vector<Storage> const before = load_vector<whole>(target, at, length);
    FASTMTL_UNROLL
    for (int i = 0; i < kLanesOf<Storage>; ++i) sums[i] += widen<Acc>(before.value[i]);
  }
  Vector<Storage> result;
  FASTMTL_UNROLL
  for (int i = 0; i < kLanesOf<Storage>; ++i) narrow(result.value[i], sums[i]);
  store_vector<whole>(target, at, length, result);
}

/// Writes into a tensor of any type.
template <class Out, int lanes>
__device__ inline void write_elements(void* out, int64_t at, int64_t length, bool accumulate, double (&sums)[lanes]) {
  auto* const target = static_cast<Out*>(out);
  FASTMTL_UNROLL
  for (int i = 0; i < lanes; ++i) {
    if (at + i < 0 || at + i >= length) continue;
    if (accumulate) sums[i] += widen<double>(target[at + i]);
    narrow(target[at + i], sums[i]);
  }
}

template <bool same, bool whole, class Storage, class Acc>
__device__ inline void write_sums(void* out, CombineArguments const& arguments, int64_t at, int64_t length,
                                  Acc (&sums)[kLanesOf<Storage>]) {
  if constexpr (same) {
    write_same<whole, Storage>(out, at, length, arguments.accumulate, sums);
  } else {
    switch (arguments.out) {
      case OutType::f32:
        return write_elements<float>(out, at, length, arguments.accumulate, sums);
      case OutType::f64:
        return write_elements<double>(out, at, length, arguments.accumulate, sums);
      case OutType::bf16:
        return write_elements<Bf16>(out, at, length, arguments.accumulate, sums);
      case OutType::f16:
        return write_elements<F16>(out, at, length, arguments.accumulate, sums);
    }
  }
}

/// `vectors` vectors of each lane, the first of which is at `at`.
template <bool same, bool whole, int depth, int vectors, class Storage, class Acc>
__device__ inline void combine_vectors(Terms<Storage, Acc> const& terms, void* out, CombineArguments const& arguments,
                                       int64_t at, int64_t length) {
  constexpr int lanes = kLanesOf<Storage>;
  Acc sums[vectors][lanes] = {};
  add_terms<whole, depth>(terms, at, length, sums);
  FASTMTL_UNROLL
  for (int v = 0; v < vectors; ++v) {
    write_sums<same, whole, Storage>(out, arguments, at + v * kCombineThreads * lanes, length, sums[v]);
  }
}

/// Elements [first, last) of one strip, `vectors` vectors of a lane at a time.
template <bool same, int depth, int vectors, class Storage, class Acc>
__device__ inline void combine_range(Terms<Storage, Acc> const& terms, void* out, CombineArguments const& arguments,
                                     Strip const& strip, int64_t first, int64_t last) {
  constexpr int lanes = kLanesOf<Storage>;
  constexpr int64_t step = int64_t{kCombineThreads} * lanes;
  constexpr int64_t reach = (vectors - 1) * step + lanes;
  int64_t at = first + int64_t{threadIdx.x} * lanes;
  // A strip's first vector may stick out of it.
  if (at < 0) {
    combine_vectors<same, false, 1, 1>(terms, out, arguments, at, strip.length);
    at += step;
  }
  FASTMTL_NO_UNROLL
  for (; at + reach <= last && is_whole(strip, at, reach); at += vectors * step) {
    combine_vectors<same, true, depth, vectors>(terms, out, arguments, at, strip.length);
  }
  // Its end, and strips whose rows do not lie alike.
  FASTMTL_NO_UNROLL
  for (; at < last; at += step) combine_vectors<same, false, 1, 1>(terms, out, arguments, at, strip.length);
}

/// Results of the rows' own type are summed in float32, or float64 for float64 rows; all others in float64.
template <class Storage, bool same>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocks)
    combine_kernel(__grid_constant__ LaunchTable const table, CombineArguments const arguments) {
  using Acc = std::conditional_t<same && !std::is_same_v<Storage, double>, float, double>;
  __shared__ Terms<Storage, Acc> terms;
  // Blocks side by side read the same pieces, so that all results but one find them in the cache.
  auto const result = static_cast<int>(blockIdx.x % arguments.results);
  int64_t const block = blockIdx.x / arguments.results;
  for_each_range(table, block, [&](int s, int64_t first, int64_t last) {
    __syncthreads();
    terms.gather(table, s, arguments, result);
    __syncthreads();
    Strip const strip = table.strip(s);
    auto* const out = const_cast<void*>(table.pointer(s, arguments.rows + result));
    constexpr int few = kCombineLoads / 2;
    // Float64 sums of two vectors of 16-bit elements would not fit the registers.
    constexpr int vectors = same || sizeof(Storage) > 2 ? 2 : 1;
    if (terms.count <= few) {
      combine_range<same, few, vectors>(terms, out, arguments, strip, first, last);
    } else {
      combine_range<same, kCombineLoads, 1>(terms, out, arguments, strip, first, last);
    }
  });
}

}  // namespace fastmtl
