// State as the type it is updated in. Compiled once per instruction set, inside that set's namespace: no include guard.

/// Whether elements of a type are Acc as they are.
template <class Acc>
constexpr bool is_type(DType dtype) {
  return dtype == (std::is_same_v<Acc, double> ? DType::f64 : DType::f32);
}

/// The elements [begin, begin + length) of a state's row as Acc, to be changed there: its own memory where it has that
/// type, else `scratch`, from where give_back() puts them.
template <class Acc>
inline Acc* borrow(Row const& state, int64_t begin, int64_t length, Acc* scratch) {
  return const_cast<Acc*>(as(state.data, state.dtype, begin, length, scratch));
}

/// Writes borrowed elements to the state, and makes them what the state now holds.
template <class Acc>
inline void give_back(Row const& state, int64_t begin, int64_t length, Acc* borrowed) {
  void* data = const_cast<void*>(state.data);
  if (is_type<Acc>(state.dtype)) return;
  save(borrowed, data, state.dtype, begin, length);
  as(data, state.dtype, begin, length, borrowed);
}
