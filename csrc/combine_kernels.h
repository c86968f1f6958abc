// The weighted sum of one piece of one parameter. Compiled once per instruction set, inside that set's namespace: no include
// guard.

// Vectors whose sums stay in registers while the rows are walked.
constexpr int64_t kUnroll = 8;

template <class Acc>
struct Term {
  const Acc* row;
  Acc weight;
};

// out[at ...] = (accumulate ? out : 0) + sum of the terms, for `vectors` whole vectors.
template <class Acc, int64_t vectors, bool accumulate, bool streams>
inline void sum_vectors(const Term<Acc>* terms, int64_t count, Acc* out, int64_t at) {
  constexpr int64_t width = kLanes<Acc>;
  Vec<Acc> sum[vectors];
#pragma GCC unroll 8
  for (int64_t v = 0; v < vectors; ++v) sum[v] = accumulate ? load<Acc>(out + at + v * width) : Vec<Acc>{};
  for (int64_t t = 0; t < count; ++t) {
    const Vec<Acc> weight = terms[t].weight - Vec<Acc>{};
    const Acc* row = terms[t].row + at;
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) sum[v] = fma(weight, load<Acc>(row + v * width), sum[v]);
  }
#pragma GCC unroll 8
  for (int64_t v = 0; v < vectors; ++v) {
    if constexpr (streams) {
      stream(out + at + v * width, sum[v]);
    } else {
      store(out + at + v * width, sum[v]);
    }
  }
}

template <class Acc, bool accumulate>
inline void sum_scalars(const Term<Acc>* terms, int64_t count, Acc* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    Acc sum = accumulate ? out[i] : Acc{0};
    for (int64_t t = 0; t < count; ++t) sum += terms[t].weight * terms[t].row[i];
    out[i] = sum;
  }
}

template <class Acc, bool accumulate, bool streams>
void sum_piece(const Term<Acc>* terms, int64_t count, Acc* out, int64_t length) {
  constexpr int64_t width = kLanes<Acc>;
  int64_t at = 0;
  if (streams) {
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(Acc));
    at = std::min(length, past == 0 ? 0 : width - past);
    sum_scalars<Acc, accumulate>(terms, count, out, 0, at);
  }
  for (; at + kUnroll * width <= length; at += kUnroll * width) {
    sum_vectors<Acc, kUnroll, accumulate, streams>(terms, count, out, at);
  }
  for (; at + width <= length; at += width) sum_vectors<Acc, 1, accumulate, streams>(terms, count, out, at);
  sum_scalars<Acc, accumulate>(terms, count, out, at, length);
}

// One output's piece. Where `out` has another type than the sum, the sum is taken in `scratch`.
template <class Acc>
void combine_piece(const CombineJob& job, const Target& target, const Term<Acc>* terms, int64_t count, int64_t begin,
                   int64_t length, Acc* scratch) {
  const bool direct = target.dtype == (std::is_same_v<Acc, double> ? DType::f64 : DType::f32);
  Acc* out = direct ? static_cast<Acc*>(target.data) + begin : scratch;
  if (job.accumulate) {
    if (!direct) as(target.data, target.dtype, begin, length, scratch);
    sum_piece<Acc, true, false>(terms, count, out, length);
  } else if (job.streams && direct) {
    sum_piece<Acc, false, true>(terms, count, out, length);
  } else {
    sum_piece<Acc, false, false>(terms, count, out, length);
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
  const auto scratch = std::make_unique_for_overwrite<double[]>(job.converts ? (job.rows.num_rows() + 1) * job.chunk : 0);
  for_each_chunk(job.segments, slice, job.chunk, [&](int64_t k, int64_t begin, int64_t length) {
    if (job.sums_in_double[k]) {
      combine_chunk(job, k, begin, length, scratch.get());
    } else {
      combine_chunk(job, k, begin, length, reinterpret_cast<float*>(scratch.get()));
    }
  });
  if (job.streams) stream_fence();
}
