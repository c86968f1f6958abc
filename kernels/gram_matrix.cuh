// Gram matrices of up to 128 rows on tensor cores. A warp multiplies all its pairs of rows at its own columns, from
// registers that it loads straight from the rows: the triangle of up to 64 rows, or, beyond, a share of the square.
#pragma once

#include "gram_tile.cuh"
#include "matrix_unit.cuh"

namespace fastmtl {

constexpr int kMatrixWarps = 4;
constexpr int kMatrixThreads = 32 * kMatrixWarps;
/// Elements over which float32 sums run, of which each warp sees a quarter, or all where warps share out the pairs: 32
/// steps of eight columns. Longer runs add up roundings that are alike, as those of equal entries are.
constexpr int64_t kMatrixPiece = 1024;
constexpr int64_t kSharedMatrixPiece = 256;

/// The products of all pairs of rows over [first, last) in float64: slow, and right whatever the rows hold.
template <class Storage>
__device__ inline void multiply_wide(LaunchTable const& table, int s, int rows, int64_t first, int64_t last,
                                     double* sums) {
  int64_t const begin = first > 0 ? first : 0;
  int64_t const end = last < table.strip(s).length ? last : table.strip(s).length;
  auto const lane = static_cast<int>(threadIdx.x % 32);
  int pair = 0;
  for (int i = 0; i < rows; ++i) {
    auto const* const left = static_cast<Storage const*>(table.pointer(s, i));
    for (int j = i; j < rows; ++j, ++pair) {
      auto const* const right = static_cast<Storage const*>(table.pointer(s, j));
      if (pair % kMatrixWarps != static_cast<int>(threadIdx.x / 32) || left == nullptr || right == nullptr) continue;
      double sum = 0;
      for (int64_t at = begin + lane; at < end; at += 32) sum += widen<double>(left[at]) * widen<double>(right[at]);
      sum = warp_sum(sum);
      if (lane == 0) sums[pair] += sum;
    }
  }
}

/// A warp's pairs: blocks of eight rows from `left_block` on with blocks from `right_block` on, or, on the diagonal,
/// the upper triangle of the first.
template <class Storage, int left_blocks, int right_blocks, bool diagonal>
struct PairsOfRows {
  using Unit = MatrixUnit<Storage>;
  static constexpr int kTilesDown = left_blocks / Unit::kHeight;
  static constexpr int kLoadedBlocks = diagonal ? left_blocks : left_blocks + right_blocks;
  static constexpr int kLanes = kLanesOf<Storage>;
  static constexpr int kColumns = 4 * kLanes;  // That a warp takes at a time.
  /// Steps that are loaded ahead, as registers allow: with few rows, one step alone has too few bytes under way.
  static constexpr int kAhead = kLoadedBlocks <= 2 ? 2 : kLoadedBlocks <= 6 && !std::is_same_v<Storage, double> ? 1 : 0;

  Storage const** row;  // All of a strip's, in shared memory: as registers they would be missing elsewhere.
  typename Unit::Sum sum[kTilesDown][right_blocks][Unit::kEntries];
  int left_block;
  int right_block;

  __device__ static constexpr bool has(int i, int j) { return !diagonal || j >= i * Unit::kHeight; }
  __device__ static int group() { return static_cast<int>(threadIdx.x % 32 / 4); }
  __device__ static int place() { return static_cast<int>(threadIdx.x % 4); }

  __device__ PairsOfRows(Storage const** row, int left, int right) : row(row), left_block(left), right_block(right) {}

  __device__ int block_of(int b) const { return b < left_blocks ? left_block + b : right_block + b - left_blocks; }

  /// The lane's row of a block, or null.
  __device__ Storage const* row_of(int b) const { return row[8 * block_of(b) + group()]; }

  __device__ void clear() {
    FASTMTL_UNROLL
    for (int i = 0; i < kTilesDown; ++i) {
      FASTMTL_UNROLL
      for (int j = 0; j < right_blocks; ++j) {
        FASTMTL_UNROLL
        for (int c = 0; c < Unit::kEntries; ++c) sum[i][j][c] = 0;
      }
    }
  }

  /// Loads the lane's elements of the columns from `at` on, all of which are whole vectors.
  __device__ void load(int64_t at, Words (&loaded)[kLoadedBlocks]) const {
    FASTMTL_UNROLL
    for (int b = 0; b < kLoadedBlocks; ++b) {
      Storage const* const elements = row_of(b);
      loaded[b] = elements != nullptr ? load_words(elements + at + place() * kLanes) : Words{};
    }
    __syncwarp();
  }

  /// Loads them where they need not be whole, by way of the lane's own `slots`: registers for so many single elements
  /// would be missing elsewhere.
  __device__ void load_guarded(Strip const& strip, int64_t at, Vector<Storage>* slots,
                               Words (&loaded)[kLoadedBlocks]) const {
    FASTMTL_UNROLL_BY_2
    for (int b = 0; b < kLoadedBlocks; ++b) {
      Storage const* const elements = row_of(b);
      int64_t const length = elements != nullptr ? strip.length : 0;
      slots[b * kMatrixThreads] = load_vector_guarded(elements, at + place() * kLanes, length);
    }
    FASTMTL_UNROLL
    for (int b = 0; b < kLoadedBlocks; ++b) loaded[b] = load_words(slots[b * kMatrixThreads].value);
    __syncwarp();
  }

  /// sum += the products of one step's elements, from `e` on.
  __device__ void multiply_step(Words const (&loaded)[kLoadedBlocks], int e) {
    typename Unit::Operand operand[kLoadedBlocks];
    FASTMTL_UNROLL
    for (int b = 0; b < kLoadedBlocks; ++b) operand[b] = Unit::prepare(loaded[b], e);
    FASTMTL_UNROLL
    for (int i = 0; i < kTilesDown; ++i) {
      FASTMTL_UNROLL
      for (int j = 0; j < right_blocks; ++j) {
        if (has(i, j)) Unit::multiply(sum[i][j], operand + i * Unit::kHeight, operand[diagonal ? j : left_blocks + j]);
      }
    }
  }

  /// sum += the products of what was loaded, which is used up.
  __device__ void multiply(Words (&loaded)[kLoadedBlocks]) {
    if constexpr (kLoadedBlocks > 6 && std::is_same_v<Storage, float>) {
      // Unrolled, the operands of both steps would be prepared at once, and spill.
      FASTMTL_NO_UNROLL
      for (int e = 0; e < kLanes; e += Unit::kElements) {
        multiply_step(loaded, 0);
        FASTMTL_UNROLL
        for (int b = 0; b < kLoadedBlocks; ++b) {
          FASTMTL_UNROLL
          for (int i = Unit::kElements; i < kLanes; ++i) loaded[b].value[i - Unit::kElements] = loaded[b].value[i];
        }
      }
    } else {
      FASTMTL_UNROLL
      for (int e = 0; e < kLanes; e += Unit::kElements) multiply_step(loaded, e);
    }
  }

  /// The products over the columns from `at` to `last`, `stride` apart. All lanes take the same branches.
  __device__ void run(Strip const& strip, int64_t at, int64_t last, int64_t stride, Vector<Storage>* slots) {
    FASTMTL_NO_UNROLL
    while (at < last) {
      if (is_whole(strip, at, kColumns)) {
        at = run_whole(strip, at, last, stride);
      } else {
        // A strip's ends, and strips whose rows do not lie alike.
        Words loaded[kLoadedBlocks];
        load_guarded(strip, at, slots, loaded);
        multiply(loaded);
        at += stride;
      }
    }
  }

  /// The same as far as vectors are whole; returns how far. `kAhead` steps are loaded while one is multiplied, each
  /// into registers of its own: to copy what is being loaded would be to wait for it.
  __device__ int64_t run_whole(Strip const& strip, int64_t at, int64_t last, int64_t stride) {
    constexpr int stages = kAhead + 1;
    static_assert(stages <= 3);
    auto const there = [&](int64_t step) { return step < last && is_whole(strip, step, kColumns); };
    Words loaded[stages][kLoadedBlocks];
    FASTMTL_UNROLL
    for (int a = 0; a < kAhead; ++a) load(there(at + a * stride) ? at + a * stride : at, loaded[a]);
    // One turn for each stage, in code of its own, since registers have no index. Returns whether there are more.
    auto const turn = [&](auto stage) {
      // What lies beyond the end is not used; instead of it, something is loaded that is there.
      int64_t const ahead = at + kAhead * stride;
      load(there(ahead) ? ahead : at, loaded[(stage + kAhead) % stages]);
      multiply(loaded[stage]);
      at += stride;
      return there(at);
    };
    bool more = true;
    FASTMTL_NO_UNROLL
    while (more) {
      more = turn(std::integral_constant<int, 0>{});
      if constexpr (stages > 1) more = more && turn(std::integral_constant<int, 1>{});
      if constexpr (stages > 2) more = more && turn(std::integral_constant<int, 2>{});
    }
    return at;
  }

  /// Whether a float32 sum of squares of the lane's rows cannot be trusted.
  __device__ bool exceeds(Strip const& strip, int64_t first, int64_t last, int64_t stride) const {
    if constexpr (!diagonal || std::is_same_v<Storage, double>) {
      return false;
    } else {
      bool nonzero = false;
      unsigned zeros = 0;
      FASTMTL_UNROLL
      for (int b = 0; b < left_blocks; ++b) {
        // Row r of a block meets itself in the lane that has columns r and its neighbour.
        float const* const tile = sum[b / 2][b];
        float const diagonal_entry = group() % 2 == 0 ? tile[b % 2 * 2] : tile[b % 2 * 2 + 1];
        float const square = __shfl_sync(0xffffffffu, diagonal_entry, 4 * group() + group() / 2);
        if (row_of(b) != nullptr && !trusted(square)) {
          nonzero |= square != 0;
          zeros |= 1u << b;
        }
      }
      FASTMTL_NO_UNROLL
      for (int b = 0; zeros >> b != 0 && !nonzero; ++b) {
        if ((zeros >> b & 1) == 0) continue;
        nonzero = any_nonzero<Storage>(row_of(b), first + place() * kLanes, last, stride, kLanes, strip.length);
      }
      __syncwarp();
      return nonzero;
    }
  }

  /// sums += the products.
  __device__ void flush(int rows, double* sums) const {
    // Or the compiler keeps the places of all sums in registers while the rows are multiplied.
    int group = this->group();
    int place = this->place();
    FASTMTL_OPAQUE(rows);
    FASTMTL_OPAQUE(group);
    FASTMTL_OPAQUE(place);
    FASTMTL_UNROLL
    for (int i = 0; i < kTilesDown; ++i) {
      FASTMTL_UNROLL
      for (int j = 0; j < right_blocks; ++j) {
        if (has(i, j)) {
          FASTMTL_UNROLL
          for (int c = 0; c < Unit::kEntries; ++c) {
            int const r = 8 * (left_block + i * Unit::kHeight + c / 2) + group;
            int const t = 8 * (right_block + j) + 2 * place + c % 2;
            if (r <= t && t < rows) sums[pair_of(rows, r, t)] += static_cast<double>(sum[i][j][c]);
          }
        }
      }
    }
  }
};

/// All pieces of a block, by a warp that has `pairs`; `sharers` warps have the same pairs at other columns, of which
/// this is number `number`. Every warp of the block is in some instance of this function, at the same barrier.
template <class Storage, class Pairs>
__device__ inline void multiply_pieces(LaunchTable const& table, int rows, Pairs pairs, int number, int sharers,
                                       Vector<Storage>* slots, double* sums) {
  int64_t const stride = int64_t{sharers} * Pairs::kColumns;
  for_each_range(table, blockIdx.x, [&](int s, int64_t first, int64_t last) {
    Strip const strip = table.strip(s);
    auto const t = static_cast<int>(threadIdx.x);
    pairs.row[t] = t < rows ? static_cast<Storage const*>(table.pointer(s, t)) : nullptr;
    __syncthreads();
    FASTMTL_NO_UNROLL
    for (int64_t piece = first; piece < last; piece += table.piece) {
      int64_t const end = piece + table.piece < last ? piece + table.piece : last;
      int64_t const begin = piece + int64_t{number} * Pairs::kColumns;
      pairs.clear();
      pairs.run(strip, begin, end, stride, slots);
      if (__syncthreads_or(pairs.exceeds(strip, begin, end, stride))) {
        multiply_wide<Storage>(table, s, rows, piece, end, sums);
      } else {
        for (int turn = 0; turn < sharers; ++turn) {
          if (turn == number) pairs.flush(rows, sums);
          __syncthreads();
        }
      }
    }
  });
}

/// Blocks of a processor, as registers allow.
constexpr int gram_matrix_blocks(int blocks16) { return blocks16 == 1 ? 4 : blocks16 == 2 ? 3 : 2; }

/// Up to 16 `blocks16` rows, or up to 128 where it is 8.
template <class Storage, int blocks16>
__global__ void __launch_bounds__(kMatrixThreads, gram_matrix_blocks(blocks16))
    gram_matrix_kernel(__grid_constant__ LaunchTable const table, int rows, double* partial) {
  FASTMTL_DYNAMIC_SHARED(double, sums);
  int const pairs = rows * (rows + 1) / 2;
  for (int p = static_cast<int>(threadIdx.x); p < pairs; p += kMatrixThreads) sums[p] = 0;
  __syncthreads();
  constexpr int loaded_blocks = blocks16 <= 4 ? 2 * blocks16 : 12;
  __shared__ Vector<Storage> slots[loaded_blocks * kMatrixThreads];
  Vector<Storage>* const lane_slots = slots + threadIdx.x;
  __shared__ Storage const* row[kMatrixThreads];
  auto const warp = static_cast<int>(threadIdx.x / 32);
  if constexpr (blocks16 <= 4) {
    constexpr int blocks = 2 * blocks16;
    multiply_pieces<Storage>(table, rows, PairsOfRows<Storage, blocks, blocks, true>(row, 0, 0), warp, kMatrixWarps,
                             lane_slots, sums);
  } else if (warp < 2) {
    multiply_pieces<Storage>(table, rows, PairsOfRows<Storage, 8, 8, true>(row, 8 * warp, 8 * warp), 0, 1, lane_slots,
                             sums);
  } else {
    multiply_pieces<Storage>(table, rows, PairsOfRows<Storage, 4, 8, false>(row, 4 * (warp - 2), 8), 0, 1, lane_slots,
                             sums);
  }
  __syncthreads();
  for (int p = static_cast<int>(threadIdx.x); p < pairs; p += kMatrixThreads) {
    partial[int64_t{p} * gridDim.x + blockIdx.x] = sums[p];
  }
}

}  // namespace fastmtl
