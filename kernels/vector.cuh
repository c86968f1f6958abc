// Vectors of 16 bytes of a row: how they are loaded, guarded where they stick out, and what numbers are in them.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastmtl/launch_plan.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define FASTMTL_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define FASTMTL_UNROLL _Pragma("unroll")
#define FASTMTL_UNROLL_BY_2 _Pragma("unroll 2")
#define FASTMTL_NO_UNROLL _Pragma("unroll 1")
#define FASTMTL_OPAQUE(value) asm volatile("" : "+r"(value))
// Pointers that came through memory are otherwise taken for generic ones, whose loads are slower.
#define FASTMTL_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
// Written as an assignment, the compiler makes four stores of it where the words come out of separate computations.
#define FASTMTL_STORE_WORDS(to, words)                                                                         \
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"((words).x), \
               "r"((words).y), "r"((words).z), "r"((words).w)                                                  \
               : "memory")
#endif

namespace fastmtl {

/// The 16-bit formats by their bits; the toolkit's own types would bring its headers to the host.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class Storage>
constexpr int kLanesOf = static_cast<int>(kLoadBytes / sizeof(Storage));

template <class Storage>
struct alignas(kLoadBytes) Vector {
  Storage value[kLanesOf<Storage>];
};

template <class To>
__device__ inline To widen(float value) {
  return static_cast<To>(value);
}
template <class To>
__device__ inline To widen(double value) {
  return static_cast<To>(value);
}
template <class To>
__device__ inline To widen(Bf16 value) {
  return static_cast<To>(__uint_as_float(static_cast<uint32_t>(value.bits) << 16));
}
template <class To>
__device__ inline To widen(F16 value) {
  return static_cast<To>(__half2float(__ushort_as_half(value.bits)));
}

/// The upper half of a float's bits, rounded to nearest even.
__device__ inline Bf16 upper_half(uint32_t bits, bool nan) {
  return {static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

__device__ inline void narrow(float& to, float value) { to = value; }
__device__ inline void narrow(Bf16& to, float value) { to = upper_half(__float_as_uint(value), value != value); }
__device__ inline void narrow(F16& to, float value) { to.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ inline void narrow(float& to, double value) { to = static_cast<float>(value); }
__device__ inline void narrow(double& to, double value) { to = value; }
__device__ inline void narrow(F16& to, double value) { to.bits = __half_as_ushort(__double2half(value)); }
__device__ inline void narrow(Bf16& to, double value) {
  // Rounding to odd first keeps the second rounding, to nearest even, exact.
  auto const near = static_cast<float>(value);
  uint32_t bits = __float_as_uint(near);
  if (static_cast<double>(near) != value) bits = (fabs(static_cast<double>(near)) > fabs(value) ? bits - 1 : bits) | 1u;
  to = upper_half(bits, value != value);
}

/// Whether elements [at, at + count) are whole vectors of memory.
__device__ inline bool is_whole(Strip const& strip, int64_t at, int64_t count) {
  return strip.aligned && at >= 0 && at + count <= strip.length;
}

template <class Storage>
__device__ inline Vector<Storage> load_whole(Storage const* from) {
  FASTMTL_GLOBAL(from);
  Vector<Storage> vector;
  *reinterpret_cast<uint4*>(&vector) = *reinterpret_cast<uint4 const*>(from);
  return vector;
}

/// Elements [at, at + lanes) of a row, zero outside of [0, length).
template <class Storage>
__device__ inline Vector<Storage> load_vector_guarded(Storage const* row, int64_t at, int64_t length) {
  Vector<Storage> vector;
  FASTMTL_UNROLL
  for (int i = 0; i < kLanesOf<Storage>; ++i) {
    vector.value[i] = Storage{};
    if (at + i >= 0 && at + i < length) {
      FASTMTL_GLOBAL(row);
      vector.value[i] = row[at + i];
    }
  }
  return vector;
}

/// Either of them.
template <bool whole, class Storage>
__device__ inline Vector<Storage> load_vector(Storage const* row, int64_t at, int64_t length) {
  if constexpr (whole) {
    return load_whole(row + at);
  } else {
    return load_vector_guarded(row, at, length);
  }
}

/// Writes the vector, or those of its elements that lie in [0, length).
template <bool whole, class Storage>
__device__ inline void store_vector(Storage* row, int64_t at, int64_t length, Vector<Storage> const& vector) {
  if constexpr (whole) {
    uint4 const words = *reinterpret_cast<uint4 const*>(&vector);
    FASTMTL_STORE_WORDS(reinterpret_cast<uint4*>(row + at), words);
  } else {
    FASTMTL_GLOBAL(row);
    FASTMTL_UNROLL
    for (int i = 0; i < kLanesOf<Storage>; ++i) {
      if (at + i >= 0 && at + i < length) row[at + i] = vector.value[i];
    }
  }
}

}  // namespace fastmtl
