// The weighted sum of one piece of one parameter. Compiled once per instruction set, inside that set's namespace: no
// include guard.

// Rows walked side by side; more would be more streams than the processor follows well.
constexpr int64_t kGroup = 16;
// Vectors of one row taken in a step, and how far ahead rows are called into the second-level cache, in elements.
constexpr int64_t kStep = 4;
constexpr int64_t kAhead = 512;

template <class Acc>
struct Term {
  const Acc* row;
  Acc weight;
};

// out = start + the sum of `count` terms, for `vectors` whole vectors; a null start is zero.
template <class Acc, int count, int64_t vectors, bool streams>
inline __attribute__((always_inline)) void sum_vectors(const Acc* const* rows, const Vec<Acc>* weights,
                                                       const Acc* start, Acc* out, int64_t at) {
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

template <class Acc>
inline void sum_scalars(const Term<Acc>* terms, int64_t count, const Acc* start, Acc* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    Acc sum = start != nullptr ? start[i] : Acc{0};
    for (int64_t t = 0; t < count; ++t) sum += terms[t].weight * terms[t].row[i];
    out[i] = sum;
  }
}

template <class Acc, int count, bool streams>
void sum_group(const Term<Acc>* terms, const Acc* start, Acc* out, int64_t length) {
  constexpr int64_t width = kLanes<Acc>;
  const Acc* rows[kGroup];
  Vec<Acc> weights[kGroup];
  for (int t = 0; t < count; ++t) {
    rows[t] = terms[t].row;
    weights[t] = terms[t].weight - Vec<Acc>{};
  }
  int64_t at = 0;
  if (streams) {
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(Acc));
    at = std::min(length, past == 0 ? 0 : width - past);
    sum_scalars(terms, count, start, out, 0, at);
  }
  for (; at + kStep * width <= length; at += kStep * width) {
#pragma GCC unroll 16
    for (int t = 0; t < count; ++t) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kStep; ++v) __builtin_prefetch(rows[t] + at + kAhead + v * width, 0, 2);
    }
    sum_vectors<Acc, count, kStep, streams>(rows, weights, start, out, at);
  }
  for (; at + width <= length; at += width) sum_vectors<Acc, count, 1, streams>(rows, weights, start, out, at);
  sum_scalars(terms, count, start, out, at, length);
}

template <class Acc, bool streams, int count = kGroup>
void sum_any_group(const Term<Acc>* terms, int64_t given, const Acc* start, Acc* out, int64_t length) {
  if constexpr (count > 0) {
    if (given < count) return sum_any_group<Acc, streams, count - 1>(terms, given, start, out, length);
  }
  sum_group<Acc, count, streams>(terms, start, out, length);
}

// out = start + the sum of the terms, group by group.
template <class Acc, bool streams>
void sum_terms(const Term<Acc>* terms, int64_t count, const Acc* start, Acc* out, int64_t length) {
  alignas(kVectorBytes) Acc partial[kMaxChunk];
  for (; count > kGroup; terms += kGroup, count -= kGroup) {
    sum_group<Acc, kGroup, false>(terms, start, partial, length);
    start = partial;
  }
  sum_any_group<Acc, streams>(terms, count, start, out, length);
}

// One output's piece. Where `out` has another type than the sum, the sum is taken in `scratch`.
template <class Acc>
void combine_piece(const CombineJob& job, const Target& target, const Term<Acc>* terms, int64_t count, int64_t begin,
                   int64_t length, Acc* scratch) {
  const bool direct = target.dtype == (std::is_same_v<Acc, double> ? DType::f64 : DType::f32);
  Acc* out = direct ? static_cast<Acc*>(target.data) + begin : scratch;
  if (job.accumulate) {
    sum_terms<Acc, false>(terms, count, as(target.data, target.dtype, begin, length, scratch), out, length);
  } else if (job.streams && direct) {
    sum_terms<Acc, true>(terms, count, nullptr, out, length);
  } else {
    sum_terms<Acc, false>(terms, count, nullptr, out, length);
  }
  if (direct) return;
  switch (target.dtype) {
    case DType::f32:
      return convert(static_cast<float*>(target.data) + begin, scratch, length);
    case DType::f64:
      return convert(static_cast<double*>(target.data) + begin, scratch, length);
    case DType::bf16:
      return convert(static_cast<BFloat16*>(target.data) + begin, scratch, length);
    case DType::f16:
      return convert(static_cast<Half*>(target.data) + begin, scratch, length);
  }
}

template <class Acc>
void combine_chunk(const CombineJob& job, int64_t k, int64_t begin, int64_t length, Acc* scratch) {
  const int64_t num_rows = job.rows.num_rows();
  Acc* row_scratch = scratch + length;
  const Acc* converted[kMaxRows] = {};
  Term<Acc> terms[kMaxRows];
  for (int64_t m = 0; m < job.num_results; ++m) {
    const double* weights = job.weights_of(m, k);
    int64_t count = 0;
    for (int64_t t = 0; t < num_rows; ++t) {
      const Row& row = job.rows.row(t, k);
      if (row.tensor == nullptr || weights[t] == 0) continue;
      if (converted[t] == nullptr) converted[t] = as(row.data, row.dtype, begin, length, row_scratch + t * length);
      terms[count++] = {converted[t], static_cast<Acc>(weights[t])};
    }
    combine_piece(job, job.target(m, k), terms, count, begin, length, scratch);
  }
}

inline void combine_slice(const CombineJob& job, const Slice& slice) {
  const auto scratch =
      std::make_unique_for_overwrite<double[]>(job.converts ? (job.rows.num_rows() + 1) * job.chunk : 0);
  for_each_chunk(job.segments, slice, job.chunk, [&](int64_t k, int64_t begin, int64_t length) {
    if (job.sums_in_double[k]) {
      combine_chunk(job, k, begin, length, scratch.get());
    } else {
      combine_chunk(job, k, begin, length, reinterpret_cast<float*>(scratch.get()));
    }
  });
  if (job.streams) stream_fence();
}
