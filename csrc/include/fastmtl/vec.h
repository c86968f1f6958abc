// One vector register of float or double, in compiler vector extensions. Included by for_each_isa.h inside a namespace,
// once per instruction set: no include guard.

constexpr int64_t kVectorBytes = FASTMTL_VECTOR_BYTES;

template <class Scalar>
struct VecOf;
template <>
struct VecOf<float> {
  using type __attribute__((vector_size(FASTMTL_VECTOR_BYTES))) = float;
  using Loose __attribute__((vector_size(FASTMTL_VECTOR_BYTES), aligned(4), may_alias)) = float;
};
template <>
struct VecOf<double> {
  using type __attribute__((vector_size(FASTMTL_VECTOR_BYTES))) = double;
  using Loose __attribute__((vector_size(FASTMTL_VECTOR_BYTES), aligned(8), may_alias)) = double;
};

template <class Scalar>
using Vec = typename VecOf<Scalar>::type;

template <class Scalar>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(Scalar));

/// 64-bit lanes of unsigned integers.
using VecU64 __attribute__((vector_size(FASTMTL_VECTOR_BYTES))) = uint64_t;
constexpr int64_t kLanes64 = kVectorBytes / 8;

/// The products of the low 32 bits of each lane.
inline VecU64 multiply_low(VecU64 a, VecU64 b) {
#if FASTMTL_ISA_LEVEL == 2
  return (VecU64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif FASTMTL_ISA_LEVEL == 1
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

/// a0, b0, a2, b2, ...
inline VecU64 interleave_even(VecU64 a, VecU64 b) {
#if FASTMTL_ISA_LEVEL == 2
  return (VecU64)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif FASTMTL_ISA_LEVEL == 1
  return (VecU64)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#else
  return VecU64{a[0], b[0]};
#endif
}

/// a1, b1, a3, b3, ...
inline VecU64 interleave_odd(VecU64 a, VecU64 b) {
#if FASTMTL_ISA_LEVEL == 2
  return (VecU64)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif FASTMTL_ISA_LEVEL == 1
  return (VecU64)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  return VecU64{a[1], b[1]};
#endif
}

/// Floats in 16 bits, as many as a vector has floats: half a register.
using Halves __attribute__((vector_size(FASTMTL_VECTOR_BYTES / 2))) = uint16_t;
using LooseHalves __attribute__((vector_size(FASTMTL_VECTOR_BYTES / 2), aligned(2), may_alias)) = uint16_t;
using FloatBits __attribute__((vector_size(FASTMTL_VECTOR_BYTES))) = uint32_t;

inline Vec<float> load_wide(BFloat16 const* from) {
  Halves const halves = *reinterpret_cast<LooseHalves const*>(from);
#if FASTMTL_ISA_LEVEL == 2
  return (Vec<float>)((FloatBits)_mm512_cvtepu16_epi32((__m256i)halves) << 16);
#elif FASTMTL_ISA_LEVEL == 1
  return (Vec<float>)((FloatBits)_mm256_cvtepu16_epi32((__m128i)halves) << 16);
#else
  return (Vec<float>)(__builtin_convertvector(halves, FloatBits) << 16);
#endif
}

inline Vec<float> load_wide(Half const* from) {
#if FASTMTL_ISA_LEVEL == 2
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(from)));
#elif FASTMTL_ISA_LEVEL == 1
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(from)));
#else
  Vec<float> wide;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) wide[lane] = from[lane];
  return wide;
#endif
}

/// Loads kLanes<Acc> elements from any address, widened to Acc.
template <class Acc, class Storage>
inline Vec<Acc> load(Storage const* from) {
  if constexpr (std::is_same_v<Acc, Storage>) {
    return *reinterpret_cast<typename VecOf<Acc>::Loose const*>(from);
  } else if constexpr (std::is_same_v<Acc, float>) {
    return load_wide(from);
  } else {
#if FASTMTL_ISA_LEVEL == 2
    return _mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif FASTMTL_ISA_LEVEL == 1
    return _mm256_cvtps_pd(_mm_loadu_ps(from));
#else
    Vec<Acc> wide;
    for (int64_t lane = 0; lane < kLanes<Acc>; ++lane) wide[lane] = from[lane];
    return wide;
#endif
  }
}

template <class Scalar>
inline void store(Scalar* to, Vec<Scalar> value) {
  *reinterpret_cast<typename VecOf<Scalar>::Loose*>(to) = value;
}

/// Rounded to the nearest, to even where two are as near.
inline Halves narrow(Vec<float> value, BFloat16) {
  FloatBits const bits = (FloatBits)value;
  FloatBits const rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  FloatBits const quiet_nan = FloatBits{} + 0x7FC0;
  return __builtin_convertvector(value == value ? rounded : quiet_nan, Halves);
}

inline Halves narrow(Vec<float> value, Half) {
#if FASTMTL_ISA_LEVEL == 2
  return (Halves)_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
#elif FASTMTL_ISA_LEVEL == 1
  return (Halves)_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
#else
  Halves halves;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) halves[lane] = Half(value[lane]).x;
  return halves;
#endif
}

template <class Scalar>
  requires(sizeof(Scalar) == 2)
inline void store(Scalar* to, Vec<float> value) {
  *reinterpret_cast<LooseHalves*>(to) = narrow(value, Scalar{});
}

inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if FASTMTL_ISA_LEVEL == 2
  return _mm512_fmadd_ps(a, b, c);
#elif FASTMTL_ISA_LEVEL == 1
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if FASTMTL_ISA_LEVEL == 2
  return _mm512_fmadd_pd(a, b, c);
#elif FASTMTL_ISA_LEVEL == 1
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

/// Without the sign; one operation, which compilers do not find in a comparison.
inline Vec<float> abs(Vec<float> value) { return (Vec<float>)((FloatBits)value & 0x7FFFFFFF); }

inline Vec<double> abs(Vec<double> value) { return (Vec<double>)((VecU64)value & 0x7FFFFFFFFFFFFFFF); }

inline Vec<float> sqrt(Vec<float> value) {
#if FASTMTL_ISA_LEVEL == 2
  return _mm512_sqrt_ps(value);
#elif FASTMTL_ISA_LEVEL == 1
  return _mm256_sqrt_ps(value);
#else
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) value[lane] = std::sqrt(value[lane]);
  return value;
#endif
}

inline Vec<double> sqrt(Vec<double> value) {
#if FASTMTL_ISA_LEVEL == 2
  return _mm512_sqrt_pd(value);
#elif FASTMTL_ISA_LEVEL == 1
  return _mm256_sqrt_pd(value);
#else
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) value[lane] = std::sqrt(value[lane]);
  return value;
#endif
}

/// Stores past the caches; `to` must be aligned to what is stored. Needs stream_fence() before other threads read.
template <class Scalar>
inline void stream(Scalar* to, Vec<Scalar> value) {
#if FASTMTL_ISA_LEVEL == 2
  _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)value);
#elif FASTMTL_ISA_LEVEL == 1
  _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)value);
#else
  store(to, value);
#endif
}

template <class Scalar>
  requires(sizeof(Scalar) == 2)
inline void stream(Scalar* to, Vec<float> value) {
#if FASTMTL_ISA_LEVEL == 2
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)narrow(value, Scalar{}));
#elif FASTMTL_ISA_LEVEL == 1
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)narrow(value, Scalar{}));
#else
  store(to, value);
#endif
}

inline void stream_fence() {
#if FASTMTL_ISA_LEVEL > 0
  _mm_sfence();
#endif
}
