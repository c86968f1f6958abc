// Gram matrices of a few rows: every lane multiplies all pairs of rows at its own elements, in registers.
//
// A launch has two stages: each block leaves the sums of its pieces in `partial`, by pair and block, and a second
// kernel adds the blocks up in their order. No sum depends on which block ran first.
#pragma once

#include <type_traits>

#include "vector.cuh"

namespace fastmtl {

constexpr int kGramThreads = 128;
/// Elements over which a lane sums in float32: 32 of each row.
constexpr int64_t kGramPiece = 4096;

/// Squares of float32 rows that can be trusted: not near overflow, and no product of weight lost to underflow.
template <class Acc>
__device__ inline bool trusted(Acc square) {
  return square >= Acc(1e-27) && square <= Acc(1e37);
}

__device__ constexpr int pair_of(int rows, int i, int j) { return i * (2 * rows - i - 1) / 2 + j; }

__device__ inline double warp_sum(double value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

/// Whether a row has an element that is not zero among the `count` elements at `at`, `at` + `stride`, ...
template <class Storage>
__device__ inline bool any_nonzero(void const* row, int64_t at, int64_t last, int64_t stride, int count,
                                   int64_t length) {
  auto const* const elements = static_cast<Storage const*>(row);
  bool nonzero = false;
  FASTMTL_NO_UNROLL
  for (; at < last; at += stride) {
    FASTMTL_NO_UNROLL
    for (int e = 0; e < count; ++e) {
      if (at + e >= 0 && at + e < length) nonzero |= !(widen<float>(elements[at + e]) == 0);
    }
  }
  return nonzero;
}

/// sum += all products of one vector of each row.
template <class Storage, class Acc, int rows, int pairs>
__device__ inline void multiply_loaded(Vector<Storage> const (&loaded)[rows], Acc (&sum)[pairs]) {
  FASTMTL_UNROLL
  for (int e = 0; e < kLanesOf<Storage>; ++e) {
    Acc value[rows];
    FASTMTL_UNROLL
    for (int t = 0; t < rows; ++t) value[t] = widen<Acc>(loaded[t].value[e]);
    FASTMTL_UNROLL
    for (int i = 0; i < rows; ++i) {
      FASTMTL_UNROLL
      for (int j = i; j < rows; ++j) sum[pair_of(rows, i, j)] += value[i] * value[j];
    }
  }
}

template <bool whole, class Storage, class Acc, int rows, int pairs>
__device__ inline void multiply_vector(Storage const* const (&row)[rows], int64_t at, int64_t length,
                                       Acc (&sum)[pairs]) {
  Vector<Storage> loaded[rows];
  FASTMTL_UNROLL
  for (int t = 0; t < rows; ++t) {
    loaded[t] = row[t] != nullptr ? load_vector<whole>(row[t], at, length) : Vector<Storage>{};
  }
  multiply_loaded(loaded, sum);
}

/// Calls visit(whole, at) for a lane's vectors of [first, last), with a constant for whether they are whole.
template <class Storage, class Visit>
__device__ inline void for_each_vector(Strip const& strip, int64_t first, int64_t last, Visit const& visit) {
  constexpr int lanes = kLanesOf<Storage>;
  constexpr int64_t stride = int64_t{kGramThreads} * lanes;
  int64_t at = first + int64_t{threadIdx.x} * lanes;
  FASTMTL_NO_UNROLL
  while (at < last) {
    FASTMTL_NO_UNROLL
    for (; at < last && is_whole(strip, at, lanes); at += stride) visit(std::true_type{}, at);
    // A strip's ends, and strips whose rows do not lie alike.
    if (at < last) visit(std::false_type{}, at);
    at += stride;
  }
}

/// sum += all products of the rows at a lane's elements of [first, last).
template <class Storage, class Acc, int rows, int pairs>
__device__ inline void multiply_rows(Storage const* const (&row)[rows], Strip const& strip, int64_t first, int64_t last,
                                     Acc (&sum)[pairs]) {
  for_each_vector<Storage>(strip, first, last, [&](auto whole, int64_t at) {
    multiply_vector<decltype(whole)::value>(row, at, strip.length, sum);
  });
}

/// total += sum, the products of a lane's elements of [first, last) of strip s, or these products anew in float64 where
/// those of some row left float32's range.
template <class Storage, int rows, int pairs>
__device__ inline void add_sums(LaunchTable const& table, int s, Storage const* const (&row)[rows], Strip const& strip,
                                int64_t first, int64_t last, float const (&sum)[pairs], double (&total)[pairs]) {
  bool exceeds = false;
  unsigned zeros = 0;
  FASTMTL_UNROLL
  for (int t = 0; t < rows; ++t) {
    float const square = sum[pair_of(rows, t, t)];
    if (row[t] != nullptr && !trusted(square)) {
      exceeds |= square != 0;
      zeros |= 1u << t;
    }
  }
  constexpr int lanes = kLanesOf<Storage>;
  FASTMTL_NO_UNROLL
  for (int t = 0; zeros >> t != 0 && !exceeds; ++t) {
    if ((zeros >> t & 1) == 0) continue;
    exceeds = any_nonzero<Storage>(table.pointer(s, t), first + int64_t{threadIdx.x} * lanes, last,
                                   int64_t{kGramThreads} * lanes, lanes, strip.length);
  }
  if (exceeds) {
    multiply_rows(row, strip, first, last, total);
  } else {
    FASTMTL_UNROLL
    for (int p = 0; p < pairs; ++p) total[p] += static_cast<double>(sum[p]);
  }
}

/// Leaves the sums of a block's lanes in `partial`, for the pairs of the rows that are given.
template <int rows, int pairs>
__device__ inline void write_sums(double const (&total)[pairs], int num_rows, double* partial) {
  __shared__ double of_warp[kGramThreads / 32][pairs];
  auto const warp = static_cast<int>(threadIdx.x / 32);
  FASTMTL_UNROLL
  for (int p = 0; p < pairs; ++p) {
    double const sum = warp_sum(total[p]);
    if (threadIdx.x % 32 == 0) of_warp[warp][p] = sum;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= pairs) return;
  double sum = 0;
  for (int w = 0; w < kGramThreads / 32; ++w) sum += of_warp[w][threadIdx.x];
  int p = static_cast<int>(threadIdx.x);
  int i = 0;
  for (; p >= rows - i; ++i) p -= rows - i;
  int const j = i + p;
  if (j < num_rows) partial[int64_t{pair_of(num_rows, i, j)} * gridDim.x + blockIdx.x] = sum;
}

/// Blocks of a processor: as many as there are registers for.
template <class Storage>
constexpr int gram_tile_blocks(int rows) {
  if (rows == 8 && sizeof(Storage) == 2) return 2;
  return rows <= 2 ? 12 : rows <= 3 ? 8 : rows <= 4 ? 6 : rows <= 6 ? 4 : 3;
}

template <class Storage, int rows>
__global__ void __launch_bounds__(kGramThreads, gram_tile_blocks<Storage>(rows))
    gram_tile_kernel(__grid_constant__ LaunchTable const table, int num_rows, double* partial) {
  constexpr int pairs = rows * (rows + 1) / 2;
  constexpr bool wide = std::is_same_v<Storage, double>;
  double total[pairs] = {};
  for_each_range(table, blockIdx.x, [&](int s, int64_t first, int64_t last) {
    Strip const strip = table.strip(s);
    Storage const* row[rows];
    FASTMTL_UNROLL
    for (int t = 0; t < rows; ++t) {
      row[t] = t < num_rows ? static_cast<Storage const*>(table.pointer(s, t)) : nullptr;
    }
    FASTMTL_NO_UNROLL
    for (int64_t piece = first; piece < last; piece += table.piece) {
      int64_t const end = piece + table.piece < last ? piece + table.piece : last;
      if constexpr (wide) {
        multiply_rows(row, strip, piece, end, total);
      } else {
        float sum[pairs] = {};
        multiply_rows(row, strip, piece, end, sum);
        add_sums(table, s, row, strip, piece, end, sum, total);
      }
    }
  });
  write_sums<rows>(total, num_rows, partial);
}

/// result[group] (+)= the sums of the group's blocks; a warp per run and pair.
__device__ inline void gram_reduce(GroupRuns const& runs, int rows, int64_t blocks, double const* partial, bool add,
                                   double* result) {
  int const pairs = rows * (rows + 1) / 2;
  int64_t const number = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (number >= int64_t{runs.count} * pairs) return;
  auto const run = static_cast<int>(number / pairs);
  auto const pair = static_cast<int>(number % pairs);
  double sum = 0;
  auto const lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t b = runs.first[run] + lane; b < runs.first[run + 1]; b += 32) sum += partial[pair * blocks + b];
  sum = warp_sum(sum);
  if (lane != 0) return;
  int p = pair;
  int i = 0;
  for (; p >= rows - i; ++i) p -= rows - i;
  int const j = i + p;
  double* const matrix = result + int64_t{runs.group[run]} * rows * rows;
  if (add) sum += matrix[i * rows + j];
  matrix[i * rows + j] = sum;
  matrix[j * rows + i] = sum;
}

}  // namespace fastmtl
