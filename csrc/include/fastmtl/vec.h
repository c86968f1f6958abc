// One vector register of float or double, in compiler vector extensions. Included by for_each_isa.h inside a namespace,
// once per instruction set: no include guard.

constexpr int64_t kVectorBytes = FASTMTL_VECTOR_BYTES;

template <class Scalar>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FASTMTL_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(FASTMTL_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FASTMTL_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(FASTMTL_VECTOR_BYTES), aligned(8), may_alias));
};

template <class Scalar>
using Vec = typename VecOf<Scalar>::type;

template <class Scalar>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(Scalar));

// 64-bit lanes of unsigned integers.
typedef uint64_t VecU64 __attribute__((vector_size(FASTMTL_VECTOR_BYTES)));
constexpr int64_t kLanes64 = kVectorBytes / 8;

// The products of the low 32 bits of each lane.
inline VecU64 multiply_low(VecU64 a, VecU64 b) {
#if FASTMTL_ISA_LEVEL == 2
  return (VecU64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif FASTMTL_ISA_LEVEL == 1
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// a0, b0, a2, b2, ...
inline VecU64 interleave_even(VecU64 a, VecU64 b) {
#if FASTMTL_ISA_LEVEL == 2
  return (VecU64)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif FASTMTL_ISA_LEVEL == 1
  return (VecU64)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#else
  return VecU64{a[0], b[0]};
#endif
}

// a1, b1, a3, b3, ...
inline VecU64 interleave_odd(VecU64 a, VecU64 b) {
#if FASTMTL_ISA_LEVEL == 2
  return (VecU64)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif FASTMTL_ISA_LEVEL == 1
  return (VecU64)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  return VecU64{a[1], b[1]};
#endif
}

// Loads kLanes<Acc> elements from any address, widened to Acc.
template <class Acc, class Storage>
inline Vec<Acc> load(const Storage* from) {
  if constexpr (std::is_same_v<Acc, Storage>) {
    return *reinterpret_cast<const typename VecOf<Acc>::loose*>(from);
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
  *reinterpret_cast<typename VecOf<Scalar>::loose*>(to) = value;
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

// Stores past the caches; `to` must be aligned to the vector. Needs stream_fence() before other threads read.
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

inline void stream_fence() {
#if FASTMTL_ISA_LEVEL > 0
  _mm_sfence();
#endif
}
