// State beside the rows, updated in place. A strip is one row of one parameter: its state, its gradient (or null), and
// as group the number of the row.
#pragma once

#include <type_traits>

#include "gram_tile.cuh"

namespace fastmtl {

constexpr int kStateThreads = 256;
/// Elements over which a lane sums in float32: 16 of each row, or 32 of 16 bits.
constexpr int64_t kStatePiece = 4096;

/// The type in which a state is updated.
template <class State, class Storage>
using StateAcc = std::conditional_t<std::is_same_v<State, double> || std::is_same_v<Storage, double>, double, float>;

/// Calls update(state element, gradient element) for a lane's elements of [first, last), and stores the state.
template <class State, class Storage, class Update>
__device__ inline void update_range(LaunchTable const& table, int s, int64_t first, int64_t last,
                                    Update const& update) {
  using Acc = StateAcc<State, Storage>;
  constexpr int lanes = kLanesOf<State>;
  Strip const strip = table.strip(s);
  auto* const state = static_cast<State*>(const_cast<void*>(table.pointer(s, 0)));
  auto const* const row = static_cast<Storage const*>(table.pointer(s, 1));
  FASTMTL_NO_UNROLL
  for (int64_t at = first + int64_t{threadIdx.x} * lanes; at < last; at += int64_t{kStateThreads} * lanes) {
    bool const whole = is_whole(strip, at, lanes);
    Vector<State> updated = whole ? load_whole(state + at) : load_vector_guarded(state, at, strip.length);
    Acc grad[lanes] = {};
    if constexpr (std::is_same_v<State, Storage>) {
      if (row != nullptr) {
        Vector<Storage> const loaded = whole ? load_whole(row + at) : load_vector_guarded(row, at, strip.length);
        FASTMTL_UNROLL
        for (int i = 0; i < lanes; ++i) grad[i] = widen<Acc>(loaded.value[i]);
      }
    } else {
      FASTMTL_UNROLL
      for (int i = 0; i < lanes; ++i) {
        if (row != nullptr && at + i >= 0 && at + i < strip.length) grad[i] = widen<Acc>(row[at + i]);
      }
    }
    FASTMTL_UNROLL
    for (int i = 0; i < lanes; ++i) update(updated.value[i], grad[i]);
    if (whole) {
      store_vector<true>(state, at, strip.length, updated);
    } else {
      store_vector<false>(state, at, strip.length, updated);
    }
  }
}

/// state = keep * state + gain * row
template <class State, class Storage>
__global__ void __launch_bounds__(kStateThreads)
    ema_kernel(__grid_constant__ LaunchTable const table, double const* keep, double const* gains) {
  using Acc = StateAcc<State, Storage>;
  for_each_range(table, blockIdx.x, [&](int s, int64_t first, int64_t last) {
    int32_t const t = table.strip(s).group;
    auto const kept = static_cast<Acc>(keep[t]);
    // A missing row adds nothing, whatever its gain is.
    auto const gain = table.pointer(s, 1) != nullptr ? static_cast<Acc>(gains[t]) : Acc(0);
    update_range<State, Storage>(table, s, first, last, [&](State& element, Acc grad) {
      narrow(element, kept * widen<Acc>(element) + gain * grad);
    });
  });
}

/// sums += row^2; partial[block] = the sum of row^2 / sqrt(sums + epsilon) over the block's elements.
template <class State, class Storage>
__global__ void __launch_bounds__(kStateThreads)
    excess_risk_kernel(__grid_constant__ LaunchTable const table, double epsilon, double* partial) {
  using Acc = StateAcc<State, Storage>;
  double total = 0;
  for_each_range(table, blockIdx.x, [&](int s, int64_t first, int64_t last) {
    FASTMTL_NO_UNROLL
    for (int64_t piece = first; piece < last; piece += table.piece) {
      Acc risk = 0;
      int64_t const end = piece + table.piece < last ? piece + table.piece : last;
      update_range<State, Storage>(table, s, piece, end, [&](State& element, Acc grad) {
        Acc const square = grad * grad;
        narrow(element, widen<Acc>(element) + square);
        risk += square / sqrt(widen<Acc>(element) + static_cast<Acc>(epsilon));
      });
      total += static_cast<double>(risk);
    }
  });
  __syncwarp();
  __shared__ double of_warp[kStateThreads / 32];
  double const sum = warp_sum(total);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double all = 0;
  for (int w = 0; w < kStateThreads / 32; ++w) all += of_warp[w];
  partial[blockIdx.x] = all;
}

}  // namespace fastmtl
