// Element conversions between the dtypes of rows and the type sums are taken in. Included by a kernel header inside a
// namespace, once per instruction set: no include guard.

template <class To, class From>
inline void convert(To* to, From const* from, int64_t length) {
  int64_t i = 0;
  // Compilers do not vectorise these by themselves.
  if constexpr ((std::is_same_v<To, float> && sizeof(From) == 2) || (sizeof(To) == 2 && std::is_same_v<From, float>)) {
    for (; i + kLanes<float> <= length; i += kLanes<float>) store(to + i, load<float>(from + i));
  }
  for (; i < length; ++i) to[i] = static_cast<To>(from[i]);
}

/// The elements [begin, begin + length) of a row as Acc: the row's own memory where it has that type, else `scratch`.
template <class Acc>
inline Acc const* as(void const* data, DType dtype, int64_t begin, int64_t length, Acc* scratch) {
  switch (dtype) {
    case DType::f32:
      if constexpr (std::is_same_v<Acc, float>) return static_cast<float const*>(data) + begin;
      convert(scratch, static_cast<float const*>(data) + begin, length);
      break;
    case DType::f64:
      if constexpr (std::is_same_v<Acc, double>) return static_cast<double const*>(data) + begin;
      convert(scratch, static_cast<double const*>(data) + begin, length);
      break;
    case DType::bf16:
      convert(scratch, static_cast<BFloat16 const*>(data) + begin, length);
      break;
    case DType::f16:
      convert(scratch, static_cast<Half const*>(data) + begin, length);
      break;
  }
  return scratch;
}

/// Writes elements [begin, begin + length) of `data`, which has the given dtype.
template <class Acc>
inline void save(Acc const* from, void* data, DType dtype, int64_t begin, int64_t length) {
  switch (dtype) {
    case DType::f32:
      return convert(static_cast<float*>(data) + begin, from, length);
    case DType::f64:
      return convert(static_cast<double*>(data) + begin, from, length);
    case DType::bf16:
      return convert(static_cast<BFloat16*>(data) + begin, from, length);
    case DType::f16:
      return convert(static_cast<Half*>(data) + begin, from, length);
  }
}
