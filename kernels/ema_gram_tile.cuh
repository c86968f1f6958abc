// Moving averages of a few rows and their Gram matrix in one pass: every lane updates its elements of all rows and
// multiplies them while they are in registers.
#pragma once

#include "gram_tile.cuh"

namespace fastmtl {

/// Rows it is made for.
constexpr int kEmaTileRows = 8;

/// Blocks of a processor: as many as there are registers for, with the gradients beside the averages.
constexpr int ema_tile_blocks(int rows) { return rows <= 2 ? 10 : rows <= 3 ? 7 : rows <= 4 ? 5 : rows <= 6 ? 3 : 2; }

/// state = keep * state + gain * row at one vector of a lane; sum += all products of the new states.
template <bool whole, int rows, int pairs>
__device__ inline void blend_vector(LaunchTable const& table, int s, float* const (&state)[rows],
                                    float const (&factors)[2][rows], int64_t at, int64_t length, float (&sum)[pairs]) {
  // All loads come first: none is moved past a store, which may be to the same memory as far as the compiler knows.
  Vector<float> average[rows];
  Vector<float> grad[rows];
  bool present[rows];
  FASTMTL_UNROLL
  for (int t = 0; t < rows; ++t) {
    average[t] = Vector<float>{};
    grad[t] = Vector<float>{};
    present[t] = false;
    if (state[t] == nullptr) continue;
    average[t] = load_vector<whole>(static_cast<float const*>(state[t]), at, length);
    auto const* const row = static_cast<float const*>(table.pointer(s, table.pointers / 2 + t));
    present[t] = row != nullptr;
    if (present[t]) grad[t] = load_vector<whole>(row, at, length);
  }
  FASTMTL_UNROLL
  for (int t = 0; t < rows; ++t) {
    if (state[t] == nullptr) continue;
    float const keep = factors[0][t];
    // A missing row adds nothing, whatever its gain is.
    float const gain = present[t] ? factors[1][t] : 0.0f;
    FASTMTL_UNROLL
    for (int e = 0; e < kLanesOf<float>; ++e) {
      average[t].value[e] = keep * average[t].value[e] + gain * grad[t].value[e];
    }
    store_vector<whole>(state[t], at, length, average[t]);
  }
  multiply_loaded(average, sum);
}

/// The sums of `num_rows` rows; a strip's pointers are those of its states, then those of its rows.
template <int rows>
__global__ void __launch_bounds__(kGramThreads, ema_tile_blocks(rows))
    ema_gram_tile_kernel(__grid_constant__ LaunchTable const table, int num_rows, double const* keep,
                         double const* gains, double* partial) {
  constexpr int pairs = rows * (rows + 1) / 2;
  [[maybe_unused]] __shared__ float factors[2][rows];
  if (static_cast<int>(threadIdx.x) < num_rows) {
    factors[0][threadIdx.x] = static_cast<float>(keep[threadIdx.x]);
    factors[1][threadIdx.x] = static_cast<float>(gains[threadIdx.x]);
  }
  __syncthreads();
  double total[pairs] = {};
  for_each_range(table, blockIdx.x, [&](int s, int64_t first, int64_t last) {
    Strip const strip = table.strip(s);
    float* state[rows];
    float const* row[rows];
    FASTMTL_UNROLL
    for (int t = 0; t < rows; ++t) {
      state[t] = t < num_rows ? static_cast<float*>(const_cast<void*>(table.pointer(s, t))) : nullptr;
      row[t] = state[t];
    }
    FASTMTL_NO_UNROLL
    for (int64_t piece = first; piece < last; piece += table.piece) {
      int64_t const end = piece + table.piece < last ? piece + table.piece : last;
      float sum[pairs] = {};
      for_each_vector<float>(strip, piece, end, [&](auto whole, int64_t at) {
        blend_vector<decltype(whole)::value>(table, s, state, factors, at, strip.length, sum);
      });
      add_sums(table, s, row, strip, piece, end, sum, total);
    }
  });
  write_sums<rows>(total, num_rows, partial);
}

}  // namespace fastmtl
