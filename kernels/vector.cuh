// Vectors of 16 bytes of a row: how they are loaded, guarded where they stick out, and what numbers are in them.
#pragma once

#include <cstdint>

#include "fastmtl/launch_plan.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define FASTMTL_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define FASTMTL_NO_INLINE __noinline__
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
constexpr int lanes_of = static_cast<int>(kVectorBytes / sizeof(Storage));

template <class Storage>
struct alignas(kVectorBytes) Vector {
  Storage value[lanes_of<Storage>];
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

__device__ inline void narrow(float& to, double value) { to = static_cast<float>(value); }
__device__ inline void narrow(double& to, double value) { to = value; }
__device__ inline void narrow(Bf16& to, double value) {
  // Rounding to float32 first to odd keeps the second rounding, to nearest even, exact.
  float near = static_cast<float>(value);
  uint32_t bits = __float_as_uint(near);
  if (static_cast<double>(near) != value && value == value) {
    bool const away = fabs(static_cast<double>(near)) > fabs(value);
    bits = (away ? bits - 1 : bits) | 1u;
  }
  bool const nan = value != value;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
__device__ inline void narrow(F16& to, double value) { to.bits = __half_as_ushort(__double2half(value)); }
__device__ inline void narrow(F16& to, float value) { to.bits = __half_as_ushort(__float2half_rn(value)); }

/// Elements [at, at + lanes) of a row, zero outside of [0, length).
template <class Storage>
__device__ inline Vector<Storage> load_vector(Storage const* row, int64_t at, Strip const& strip) {
  Vector<Storage> vector;
  if (strip.aligned && at >= 0 && at + lanes_of<Storage> <= strip.length) {
    *reinterpret_cast<uint4*>(&vector) = *reinterpret_cast<uint4 const*>(row + at);
    return vector;
  }
  for (int i = 0; i < lanes_of<Storage>; ++i) {
    vector.value[i] = at + i >= 0 && at + i < strip.length ? row[at + i] : Storage{};
  }
  return vector;
}

/// Writes those elements of a vector that lie in [0, length).
template <class Storage>
__device__ inline void store_vector(Storage* row, int64_t at, Strip const& strip, Vector<Storage> const& vector) {
  if (strip.aligned && at >= 0 && at + lanes_of<Storage> <= strip.length) {
    *reinterpret_cast<uint4*>(row + at) = *reinterpret_cast<uint4 const*>(&vector);
    return;
  }
  for (int i = 0; i < lanes_of<Storage>; ++i) {
    if (at + i >= 0 && at + i < strip.length) row[at + i] = vector.value[i];
  }
}

}  // namespace fastmtl
