// The small matrix products that tensor cores take, over 8 x 8 blocks of a Gram matrix.
//
// In all of them a lane of a warp holds elements of row lane / 4 of a block of eight rows. Which columns these are does
// not matter to a Gram matrix, so the same registers serve as left and as right operand.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vector.cuh"

namespace fastmtl {

#if defined(__CUDACC__)

__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

/// d += a b for 16 x 8 and 8 x 8 operands of tf32.
__device__ inline void multiply_tf32(float (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// d += a b for 16 x 8 and 8 x 8 operands of bfloat16 or float16, two neighbouring columns in a word.
template <class Storage>
__device__ inline void multiply_words(float (&d)[4], uint32_t const (&a)[2], uint32_t b) {
  if constexpr (std::is_same_v<Storage, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

/// d += a b for 8 x 4 and 4 x 8 operands of float64.
__device__ inline void multiply_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

#endif

/// Elements as they were loaded. Taken apart at once they would be waited for where nothing needs them yet.
using Words = Vector<uint32_t>;

__device__ inline Words load_words(void const* from) { return load_whole(static_cast<uint32_t const*>(from)); }

/// Products of float32 rows. A float is the sum of two tf32 numbers to 22 bits; of their four products the one of the
/// two low parts is below float32's rounding. Tensor cores round sums towards zero, so that none is longer than one
/// step of eight columns; the steps are added to float32 sums by rounding to nearest.
struct F32 {
  using Sum = float;
  static constexpr int kHeight = 2;    // Blocks of eight rows of the left operand.
  static constexpr int kElements = 2;  // Of a lane in one step.
  static constexpr int kEntries = 4;   // Of a lane in one tile.

  struct Operand {
    uint32_t high[kElements];
    uint32_t low[kElements];
  };

  __device__ static Operand prepare(Words const& words, int first) {
    Operand operand;
    FASTMTL_UNROLL
    for (int e = 0; e < kElements; ++e) {
      float const value = __uint_as_float(words.value[first + e]);
      operand.high[e] = to_tf32(value);
      operand.low[e] = to_tf32(value - __uint_as_float(operand.high[e]));
    }
    return operand;
  }

  __device__ static void multiply(Sum (&sum)[kEntries], Operand const* left, Operand const& right) {
    uint32_t const high[4] = {left[0].high[0], left[1].high[0], left[0].high[1], left[1].high[1]};
    uint32_t const low[4] = {left[0].low[0], left[1].low[0], left[0].low[1], left[1].low[1]};
    float step[kEntries] = {};
    multiply_tf32(step, low, right.high);
    multiply_tf32(step, high, right.low);
    multiply_tf32(step, high, right.high);
    FASTMTL_UNROLL
    for (int c = 0; c < kEntries; ++c) sum[c] += step[c];
  }
};

/// Products of 16-bit rows, exact in float32; the words are multiplied as they were loaded, with sums as of float32.
template <class Storage>
struct F32OfWords {
  using Sum = float;
  static constexpr int kHeight = 2;
  static constexpr int kElements = 2;
  static constexpr int kEntries = 4;
  using Operand = uint32_t;

  __device__ static Operand prepare(Words const& words, int first) { return words.value[first / 2]; }

  __device__ static void multiply(Sum (&sum)[kEntries], Operand const* left, Operand const& right) {
    uint32_t const words[2] = {left[0], left[1]};
    float step[kEntries] = {};
    multiply_words<Storage>(step, words, right);
    FASTMTL_UNROLL
    for (int c = 0; c < kEntries; ++c) sum[c] += step[c];
  }
};

/// Products of float64 rows.
struct F64 {
  using Sum = double;
  static constexpr int kHeight = 1;
  static constexpr int kElements = 1;
  static constexpr int kEntries = 2;
  using Operand = double;

  __device__ static Operand prepare(Words const& words, int first) {
    return __hiloint2double(static_cast<int>(words.value[2 * first + 1]), static_cast<int>(words.value[2 * first]));
  }
  __device__ static void multiply(Sum (&sum)[kEntries], Operand const* left, Operand const& right) {
    multiply_f64(sum, *left, right);
  }
};

template <class Storage>
struct MatrixUnitOf {
  using Type = F32OfWords<Storage>;
};
template <>
struct MatrixUnitOf<float> {
  using Type = F32;
};
template <>
struct MatrixUnitOf<double> {
  using Type = F64;
};
template <class Storage>
using MatrixUnit = typename MatrixUnitOf<Storage>::Type;

}  // namespace fastmtl
