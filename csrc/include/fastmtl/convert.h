// Element conversions between the dtypes of rows and the type sums are taken in. Included by a kernel header inside a
// namespace, once per instruction set: no include guard.

template <class To, class From>
inline void convert(To* to, const From* from, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = static_cast<To>(from[i]);
}

// The elements [begin, begin + length) of a row as Acc: the row's own memory where it has that type, else `scratch`.
template <class Acc>
inline const Acc* as(const void* data, DType dtype, int64_t begin, int64_t length, Acc* scratch) {
  switch (dtype) {
    case DType::f32:
      if constexpr (std::is_same_v<Acc, float>) return static_cast<const float*>(data) + begin;
      convert(scratch, static_cast<const float*>(data) + begin, length);
      break;
    case DType::f64:
      if constexpr (std::is_same_v<Acc, double>) return static_cast<const double*>(data) + begin;
      convert(scratch, static_cast<const double*>(data) + begin, length);
      break;
    case DType::bf16:
      convert(scratch, static_cast<const BFloat16*>(data) + begin, length);
      break;
    case DType::f16:
      convert(scratch, static_cast<const Half*>(data) + begin, length);
      break;
  }
  return scratch;
}
