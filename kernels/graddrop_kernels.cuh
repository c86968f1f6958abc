// Gradient sign dropout. Of representations, a block takes a few features of all tasks and the whole batch, which stay
// in the caches between the sums that decide and the pass that drops; of rows, each element is taken by itself.
#pragma once

#include <type_traits>

#include "random.cuh"

namespace fastmtl {

constexpr int kDropThreads = 256;
constexpr int kDropMaxTasks = 128;
/// Vectors side by side, a sector's neighbours: with few of them many blocks share out the features.
constexpr int kDropVectors = 8;
constexpr int kDropLanes = kDropThreads / kDropVectors;
constexpr int kDropWarps = kDropThreads / 32;

template <class Storage>
constexpr int kDropFeaturesOf = kDropVectors * kLanesOf<Storage>;

template <class Storage>
using DropAcc = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

/// Representations, gradients and results, each (batch, features) and dense.
struct DropArguments {
  int64_t features;
  int64_t const* random;
  int64_t random_stride;
  double const* noise;  // (features,), or null to draw.
  double leak;
  int32_t tasks;
  bool shares;   // One representation for all tasks.
  bool aligned;  // All vectors are whole.
  int64_t batch[kDropMaxTasks];
  void const* rep[kDropMaxTasks];
  void const* grad[kDropMaxTasks];
  void* out[kDropMaxTasks];

  FASTMTL_HOST_DEVICE int rep_of(int task) const { return shares ? 0 : task; }
};

/// Elements as they were loaded: 16-bit ones taken apart at once would be waited for where nothing needs them yet.
using DropWords = Vector<uint32_t>;

template <class Storage>
__device__ inline DropWords words_of(Vector<Storage> const& vector) {
  return *reinterpret_cast<DropWords const*>(&vector);
}

template <class Acc, class Storage>
__device__ inline Acc element_of(DropWords const& words, int i) {
  return widen<Acc>(reinterpret_cast<Vector<Storage> const*>(&words)->value[i]);
}

template <class Storage>
__device__ inline DropWords load_features(DropArguments const& arguments, void const* data, int64_t b, int64_t at) {
  auto const* const row = static_cast<Storage const*>(data) + b * arguments.features;
  return arguments.aligned && at < arguments.features ? load_whole(reinterpret_cast<uint32_t const*>(row + at))
                                                      : words_of(load_vector_guarded(row, at, arguments.features));
}

/// signed_sums[feature] = sum over the batch of grad sign(rep), for one task.
template <class Storage, class Acc>
__device__ inline void sum_batch(DropArguments const& arguments, int t, int64_t at, Acc* of_warp, Acc* signed_sums) {
  constexpr int lanes = kLanesOf<Storage>;
  constexpr int features = kDropFeaturesOf<Storage>;
  auto const vector = static_cast<int>(threadIdx.x % kDropVectors);
  auto const warp = static_cast<int>(threadIdx.x / 32);
  int const r = arguments.rep_of(t);
  Acc sum[lanes] = {};
  FASTMTL_UNROLL_BY_2
  for (int64_t b = threadIdx.x / kDropVectors; b < arguments.batch[r]; b += kDropLanes) {
    DropWords const rep = load_features<Storage>(arguments, arguments.rep[r], b, at);
    DropWords const grad = load_features<Storage>(arguments, arguments.grad[t], b, at);
    FASTMTL_UNROLL
    for (int i = 0; i < lanes; ++i) {
      Acc const value = element_of<Acc, Storage>(rep, i);
      // A NaN is its own sign.
      Acc const sign = value > 0 ? Acc(1) : value < 0 ? Acc(-1) : value;
      sum[i] += sign * element_of<Acc, Storage>(grad, i);
    }
  }
  __syncwarp();
  FASTMTL_UNROLL
  for (int i = 0; i < lanes; ++i) {
    FASTMTL_UNROLL
    for (int distance = kDropVectors; distance < 32; distance *= 2) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], distance);
    }
    if (threadIdx.x % 32 < kDropVectors) of_warp[warp * features + vector * lanes + i] = sum[i];
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < features) {
    Acc total = 0;
    for (int w = 0; w < kDropWarps; ++w) total += of_warp[w * features + threadIdx.x];
    signed_sums[threadIdx.x] = total;
  }
  __syncthreads();
}

/// results = grad (leak + (1 - leak) M), summed over the tasks where they share a representation.
template <class Storage>
__global__ void __launch_bounds__(kDropThreads) graddrop_kernel(__grid_constant__ DropArguments const arguments) {
  using Acc = DropAcc<Storage>;
  constexpr int lanes = kLanesOf<Storage>;
  constexpr int features = kDropFeaturesOf<Storage>;
  FASTMTL_DYNAMIC_SHARED(double, memory);
  // (tasks, features) signed sums, of which factors are made, then what the warps have summed.
  auto* const factors = reinterpret_cast<Acc*>(memory);
  Acc* const of_warp = factors + arguments.tasks * features;

  int64_t const first = int64_t{blockIdx.x} * features;
  int64_t const at = first + int64_t{threadIdx.x % kDropVectors} * lanes;
  FASTMTL_NO_UNROLL
  for (int t = 0; t < arguments.tasks; ++t) sum_batch<Storage>(arguments, t, at, of_warp, factors + t * features);

  int64_t const feature = first + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < features && feature < arguments.features) {
    Acc sum = 0;
    Acc size = 0;
    FASTMTL_NO_UNROLL
    for (int t = 0; t < arguments.tasks; ++t) {
      Acc const value = factors[t * features + threadIdx.x];
      sum += value;
      size += value < 0 ? -value : value;
    }
    Acc const centred = arguments.noise != nullptr ? static_cast<Acc>(2 * arguments.noise[feature] - 1)
                                                   : Stream(arguments.random, arguments.random_stride).centred(feature);
    Acc const sign = sign_that_stays(sum, size, centred);
    FASTMTL_NO_UNROLL
    for (int t = 0; t < arguments.tasks; ++t) {
      Acc& factor = factors[t * features + threadIdx.x];
      factor = factor * sign > 0 ? Acc(1) : static_cast<Acc>(arguments.leak);
    }
  }
  __syncthreads();

  if (at >= arguments.features) return;
  int const place = static_cast<int>(threadIdx.x % kDropVectors) * lanes;
  int const results = arguments.shares ? 1 : arguments.tasks;
  FASTMTL_NO_UNROLL
  for (int r = 0; r < results; ++r) {
    int const end = arguments.shares ? arguments.tasks : r + 1;
    FASTMTL_NO_UNROLL
    for (int64_t b = threadIdx.x / kDropVectors; b < arguments.batch[r]; b += kDropLanes) {
      Acc sum[lanes] = {};
      FASTMTL_UNROLL_BY_2
      for (int t = r; t < end; ++t) {
        DropWords const grad = load_features<Storage>(arguments, arguments.grad[t], b, at);
        FASTMTL_UNROLL
        for (int i = 0; i < lanes; ++i) sum[i] += element_of<Acc, Storage>(grad, i) * factors[t * features + place + i];
      }
      Vector<Storage> result;
      FASTMTL_UNROLL
      for (int i = 0; i < lanes; ++i) narrow(result.value[i], sum[i]);
      Storage* const row = static_cast<Storage*>(arguments.out[r]) + b * arguments.features;
      if (arguments.aligned) {
        store_vector<true>(row, at, arguments.features, result);
      } else {
        store_vector<false>(row, at, arguments.features, result);
      }
    }
  }
}

constexpr int64_t kDropPiece = 4096;
/// Rows that are kept in registers between the sums and the pass that drops; more are read again, from the caches.
template <class Storage>
constexpr int kDropRowsOf = sizeof(Storage) == 2 ? 4 : 8;

struct DropRowsArguments {
  double const* leaks;  // (T,)
  int64_t const* random;
  int64_t random_stride;
  int32_t rows;
};

/// The elements of one vector. A strip's pointers are its rows, its result, its noise (or null) and, as a word, the
/// number of its first element.
template <bool whole, class Storage>
__device__ inline void drop_vector(LaunchTable const& table, int s, DropRowsArguments const& arguments,
                                   Stream const& stream, int64_t at, int64_t length) {
  using Acc = DropAcc<Storage>;
  constexpr int lanes = kLanesOf<Storage>;
  // Guarded loads of several rows would take more registers than there are.
  constexpr int depth = whole ? kDropRowsOf<Storage> : 1;
  Acc sum[lanes] = {};
  Acc size[lanes] = {};
  DropWords loaded[depth];
  auto const load = [&](int first) {
    FASTMTL_UNROLL
    for (int d = 0; d < depth; ++d) {
      loaded[d] = {};
      if (first + d >= arguments.rows) continue;
      auto const* const row = static_cast<Storage const*>(table.pointer(s, first + d));
      if (row == nullptr) continue;
      if constexpr (whole) {
        loaded[d] = load_whole(reinterpret_cast<uint32_t const*>(row + at));
      } else {
        loaded[d] = words_of(load_vector_guarded(row, at, length));
      }
    }
  };
  FASTMTL_NO_UNROLL
  for (int first = 0; first < arguments.rows; first += depth) {
    load(first);
    FASTMTL_UNROLL
    for (int d = 0; d < depth; ++d) {
      FASTMTL_UNROLL
      for (int i = 0; i < lanes; ++i) {
        Acc const value = element_of<Acc, Storage>(loaded[d], i);
        sum[i] += value;
        size[i] += value < 0 ? -value : value;
      }
    }
  }

  Acc sign[lanes];
  auto const* const noise = static_cast<double const*>(table.pointer(s, arguments.rows + 1));
  if (noise != nullptr) {
    FASTMTL_UNROLL
    for (int i = 0; i < lanes; ++i) {
      sign[i] = whole || (at + i >= 0 && at + i < length) ? static_cast<Acc>(2 * noise[at + i] - 1) : Acc(0);
    }
  } else {
    stream.draw(static_cast<int64_t>(reinterpret_cast<uintptr_t>(table.pointer(s, arguments.rows + 2))) + at, sign);
  }
  FASTMTL_UNROLL
  for (int i = 0; i < lanes; ++i) {
    sign[i] = sign_that_stays(sum[i], size[i], sign[i]);
    sum[i] = 0;
  }

  FASTMTL_NO_UNROLL
  for (int first = 0; first < arguments.rows; first += depth) {
    if (arguments.rows > depth) load(first);
    FASTMTL_UNROLL
    for (int d = 0; d < depth; ++d) {
      if (first + d < arguments.rows) {
        auto const leak = static_cast<Acc>(arguments.leaks[first + d]);
        FASTMTL_UNROLL
        for (int i = 0; i < lanes; ++i) {
          Acc const value = element_of<Acc, Storage>(loaded[d], i);
          sum[i] += value * (value * sign[i] > 0 ? Acc(1) : leak);
        }
      }
    }
  }
  Vector<Storage> result;
  FASTMTL_UNROLL
  for (int i = 0; i < lanes; ++i) narrow(result.value[i], sum[i]);
  auto* const out = static_cast<Storage*>(const_cast<void*>(table.pointer(s, arguments.rows)));
  store_vector<whole>(out, at, length, result);
}

template <class Storage>
__global__ void __launch_bounds__(kDropThreads, 2)
    graddrop_rows_kernel(__grid_constant__ LaunchTable const table, DropRowsArguments const arguments) {
  constexpr int lanes = kLanesOf<Storage>;
  Stream const stream(arguments.random, arguments.random_stride);
  for_each_range(table, blockIdx.x, [&](int s, int64_t first, int64_t last) {
    Strip const strip = table.strip(s);
    FASTMTL_NO_UNROLL
    for (int64_t at = first + int64_t{threadIdx.x} * lanes; at < last; at += int64_t{kDropThreads} * lanes) {
      if (is_whole(strip, at, lanes)) {
        drop_vector<true, Storage>(table, s, arguments, stream, at, strip.length);
      } else {
        drop_vector<false, Storage>(table, s, arguments, stream, at, strip.length);
      }
    }
  });
}

}  // namespace fastmtl
