// The weighted sum of one piece of one parameter. Compiled once per instruction set, inside that set's namespace: no
// include guard.

/// Rows walked side by side; more would be more streams than the processor follows well.
constexpr int64_t kGroup = 16;
/// Vectors of one row taken in a step, and how far ahead of it rows are prefetched into the second-level cache, in
/// bytes.
constexpr int64_t kStep = 4;
constexpr int64_t kPrefetchBytes = 2048;

template <class Acc, class Storage>
struct Term {
  Storage const* row;
  Acc weight;
};

/// out = start + the sum of `count` terms, for `vectors` whole vectors; a null start is zero.
template <class Acc, int count, int64_t vectors, bool streams, class Storage, class Out>
inline __attribute__((always_inline)) void sum_vectors(Storage const* const* rows, Vec<Acc> const* weights,
                                                       Acc const* start, Out* out, int64_t at) {
#pragma GCC unroll 4
  for (int64_t v = 0; v < vectors; ++v, at += kLanes<Acc>) {
    Vec<Acc> sum = start != nullptr ? load<Acc>(start + at) : Vec<Acc>{};
#pragma GCC unroll 16
    for (int t = 0; t < count; ++t) sum = fma(weights[t], load<Acc>(rows[t] + at), sum);
    if constexpr (streams) {
      stream(out + at, sum);
    } else {
      store(out + at, sum);
    }
  }
}

/// Few elements, at the ends of a piece; inlined, each number of terms would be compiled anew.
template <class Acc, class Storage, class Out>
__attribute__((noinline)) void sum_scalars(Term<Acc, Storage> const* terms, int64_t count, Acc const* start, Out* out,
                                           int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    Acc sum = start != nullptr ? start[i] : Acc{0};
    for (int64_t t = 0; t < count; ++t) sum += terms[t].weight * static_cast<Acc>(terms[t].row[i]);
    out[i] = static_cast<Out>(sum);
  }
}

template <class Acc, int count, bool streams, class Storage, class Out>
void sum_group(Term<Acc, Storage> const* terms, Acc const* start, Out* out, int64_t length) {
  constexpr int64_t width = kLanes<Acc>;
  Storage const* rows[kGroup];
  Vec<Acc> weights[kGroup];
  for (int t = 0; t < count; ++t) {
    rows[t] = terms[t].row;
    weights[t] = terms[t].weight - Vec<Acc>{};
  }
  int64_t at = 0;
  if (streams) {
    uintptr_t const past = reinterpret_cast<uintptr_t>(out) % kVectorBytes;
    at = std::min(length, static_cast<int64_t>((kVectorBytes - past) % kVectorBytes / sizeof(Out)));
    sum_scalars(terms, count, start, out, 0, at);
  }
  for (; at + kStep * width <= length; at += kStep * width) {
#pragma GCC unroll 16
    for (int t = 0; t < count; ++t) {
      char const* const next = reinterpret_cast<char const*>(rows[t] + at) + kPrefetchBytes;
#pragma GCC unroll 4
      for (int64_t line = 0; line < kStep * width * static_cast<int64_t>(sizeof(Storage)); line += kLineBytes) {
        __builtin_prefetch(next + line, 0, 2);
      }
    }
    sum_vectors<Acc, count, kStep, streams>(rows, weights, start, out, at);
  }
  for (; at + width <= length; at += width) sum_vectors<Acc, count, 1, streams>(rows, weights, start, out, at);
  sum_scalars(terms, count, start, out, at, length);
}

template <class Acc, bool streams, int count = kGroup, class Storage, class Out>
void sum_any_group(Term<Acc, Storage> const* terms, int64_t num_terms, Acc const* start, Out* out, int64_t length) {
  if constexpr (count > 0) {
    if (num_terms < count) return sum_any_group<Acc, streams, count - 1>(terms, num_terms, start, out, length);
  }
  sum_group<Acc, count, streams>(terms, start, out, length);
}

/// out = start + the sum of the terms, group by group.
template <bool streams, class Acc, class Storage>
void sum_terms(Term<Acc, Storage> const* terms, int64_t count, Acc const* start, Storage* out, int64_t length) {
  alignas(kVectorBytes) Acc partial[kMaxChunk];
  for (; count > kGroup; terms += kGroup, count -= kGroup) {
    sum_group<Acc, kGroup, false>(terms, start, partial, length);
    start = partial;
  }
  sum_any_group<Acc, streams>(terms, count, start, out, length);
}

/// A piece of one parameter. Rows and results are Storage, or, where that is Acc, converted in `scratch` if they are
/// not.
template <class Acc, class Storage>
void combine_chunk(CombineJob const& job, Piece const& piece, Acc* scratch) {
  auto const [k, begin, length] = piece;
  int64_t const num_rows = job.rows.num_rows();
  constexpr DType acc_dtype = std::is_same_v<Acc, double> ? DType::f64 : DType::f32;
  bool const direct = !std::is_same_v<Storage, Acc> || job.target(0, k).dtype == acc_dtype;
  Storage const* rows[kMaxRows] = {};
  Term<Acc, Storage> terms[kMaxRows];
  for (int64_t m = 0; m < job.num_results; ++m) {
    double const* weights = job.weights_of(m, k);
    int64_t count = 0;
    for (int64_t t = 0; t < num_rows; ++t) {
      Row const& row = job.rows.row(t, k);
      if (row.tensor == nullptr || weights[t] == 0) continue;
      if (rows[t] == nullptr) {
        if constexpr (std::is_same_v<Storage, Acc>) {
          rows[t] = as(row.data, row.dtype, begin, length, scratch + (t + 1) * length);
        } else {
          rows[t] = static_cast<Storage const*>(row.data) + begin;
        }
      }
      terms[count++] = {rows[t], static_cast<Acc>(weights[t])};
    }
    Target const& target = job.target(m, k);
    Storage* out = static_cast<Storage*>(target.data) + begin;
    if constexpr (std::is_same_v<Storage, Acc>) {
      if (!direct) out = scratch;
    }
    Acc const* start = job.accumulate ? as(target.data, target.dtype, begin, length, scratch) : nullptr;
    if constexpr (FASTMTL_ISA_LEVEL > 0) {
      if (job.streams && direct && !job.accumulate) {
        sum_terms<true>(terms, count, start, out, length);
        continue;
      }
    }
    sum_terms<false>(terms, count, start, out, length);
    if (!direct) save(scratch, target.data, target.dtype, begin, length);
  }
}

template <class Acc>
void combine_any(CombineJob const& job, Piece const& piece, Acc* scratch) {
  if constexpr (std::is_same_v<Acc, float> && FASTMTL_ISA_LEVEL > 0) {
    if (job.in_16_bits[piece.index]) {
      if (job.target(0, piece.index).dtype == DType::bf16) return combine_chunk<Acc, BFloat16>(job, piece, scratch);
      return combine_chunk<Acc, Half>(job, piece, scratch);
    }
  }
  combine_chunk<Acc, Acc>(job, piece, scratch);
}

inline void combine_slice(CombineJob const& job, Slice const& slice) {
  auto const scratch =
      std::make_unique_for_overwrite<double[]>(job.converts ? (job.rows.num_rows() + 1) * job.chunk : 0);
  for_each_chunk(job.segments, slice, job.chunk, [&](Piece const& piece) {
    if (job.sums_in_double[piece.index]) {
      combine_any(job, piece, scratch.get());
    } else {
      combine_any(job, piece, reinterpret_cast<float*>(scratch.get()));
    }
  });
  if (job.streams) stream_fence();
}
