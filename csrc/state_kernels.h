// State as the type it is updated in. Compiled once per instruction set, inside that set's namespace: no include guard.

// The elements [begin, begin + length) of a state's row as Acc, to be changed there: its own memory where it has that
// type, else `scratch`, from where give_back() puts them.
template <class Acc>
inline Acc* borrow(const Row& state, int64_t begin, int64_t length, Acc* scratch) {
  return const_cast<Acc*>(as(state.data, state.dtype, begin, length, scratch));
}

// Writes borrowed elements to the state, and makes them what the state now holds.
template <class Acc>
inline void give_back(const Row& state, int64_t begin, int64_t length, Acc* borrowed) {
  void* data = const_cast<void*>(state.data);
  switch (state.dtype) {
    case DType::f32:
      if constexpr (std::is_same_v<Acc, float>) return;
      convert(static_cast<float*>(data) + begin, borrowed, length);
      break;
    case DType::f64:
      if constexpr (std::is_same_v<Acc, double>) return;
      convert(static_cast<double*>(data) + begin, borrowed, length);
      break;
    case DType::bf16:
      convert(static_cast<BFloat16*>(data) + begin, borrowed, length);
      break;
    case DType::f16:
      convert(static_cast<Half*>(data) + begin, borrowed, length);
      break;
  }
  as(data, state.dtype, begin, length, borrowed);
}
