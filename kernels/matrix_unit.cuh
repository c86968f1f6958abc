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

/// d += a b for 8 x 4 and 4 x 8 operands of float64.
__device__ inline void multiply_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

#endif

/// Products of float32 or 16-bit rows. A float is the sum of two tf32 numbers to 22 bits; of their four products the
/// one of the two low parts is below float32's rounding. 16-bit numbers are tf32 numbers. Tensor cores round sums
/// towards zero, so that none is longer than one step of eight columns; the steps are added to float32 sums by rounding
/// to nearest.
template <class Storage>
struct Tf32 {
  using Sum = float;
  static constexpr bool exact = sizeof(Storage) == 2;
  static constexpr int height = 2;    // Blocks of eight rows of the left operand.
  static constexpr int elements = 2;  // Of a lane in one step.
  static constexpr int entries = 4;   // Of a lane in one tile.

  struct Operand {
    uint32_t high[elements];
    uint32_t low[elements];  // Zero where exact.
  };

  __device__ static Operand prepare(Storage const* value) {
    Operand operand;
    FASTMTL_UNROLL
    for (int e = 0; e < elements; ++e) {
      auto const whole = widen<float>(value[e]);
      if constexpr (exact) {
        operand.high[e] = __float_as_uint(whole);
        operand.low[e] = 0;
      } else {
        operand.high[e] = to_tf32(whole);
        operand.low[e] = to_tf32(whole - __uint_as_float(operand.high[e]));
      }
    }
    return operand;
  }

  __device__ static void multiply(Sum (&sum)[entries], Operand const* left, Operand const& right) {
    uint32_t const high[4] = {left[0].high[0], left[1].high[0], left[0].high[1], left[1].high[1]};
    float step[4] = {0, 0, 0, 0};
    if constexpr (!exact) {
      uint32_t const low[4] = {left[0].low[0], left[1].low[0], left[0].low[1], left[1].low[1]};
      multiply_tf32(step, low, right.high);
      multiply_tf32(step, high, right.low);
    }
    multiply_tf32(step, high, right.high);
    FASTMTL_UNROLL
    for (int c = 0; c < entries; ++c) sum[c] += step[c];
  }
};

/// Products of float64 rows.
struct F64 {
  using Sum = double;
  static constexpr int height = 1;
  static constexpr int elements = 1;
  static constexpr int entries = 2;
  using Operand = double;

  __device__ static Operand prepare(double const* value) { return *value; }
  __device__ static void multiply(Sum (&sum)[entries], Operand const* left, Operand const& right) {
    multiply_f64(sum, *left, right);
  }
};

template <class Storage>
using MatrixUnit = std::conditional_t<std::is_same_v<Storage, double>, F64, Tf32<Storage>>;

}  // namespace fastmtl
