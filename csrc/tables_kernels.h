// Sums over what touches each row of a table. Compiled once per instruction set, inside that set's namespace: no
// include guard.

/// Sums `length` entries, from entry `begin` on, of the rows of one group, into `total`.
template <class Storage, class Acc>
void sum_group(SumJob const& job, Storage const* values, int64_t group, int64_t begin, int64_t length, Acc* total) {
  auto const* const scale = static_cast<Acc const*>(job.scale);
  std::fill_n(total, length, Acc{0});
  for (int64_t i = job.starts[group]; i < job.starts[group + 1]; ++i) {
    int64_t const position = job.order[i];
    Storage const* const row = values + (job.source == nullptr ? position : job.source[position]) * job.width + begin;
    Acc const factor = scale == nullptr ? Acc{1} : scale[position];
    for (int64_t d = 0; d < length; ++d) total[d] += factor * static_cast<Acc>(row[d]);
  }
}

template <class Storage, class Acc>
void sum_groups_of(SumJob const& job, int64_t first, int64_t last) {
  Acc total[kSumEntries];
  for (size_t t = 0; t < job.values.size(); ++t) {
    auto const* const values = static_cast<Storage const*>(job.values[t]);
    auto* const sums = static_cast<Storage*>(job.sums[t]);
    for (int64_t group = first; group < last; ++group) {
      for (int64_t begin = 0; begin < job.width; begin += kSumEntries) {
        int64_t const length = std::min(kSumEntries, job.width - begin);
        sum_group(job, values, group, begin, length, total);
        convert(sums + group * job.width + begin, total, length);
      }
    }
  }
}

inline void sum_groups(SumJob const& job, int64_t first, int64_t last) {
  switch (job.dtype) {
    case DType::f32:
      return sum_groups_of<float, float>(job, first, last);
    case DType::f64:
      return sum_groups_of<double, double>(job, first, last);
    case DType::bf16:
      return sum_groups_of<BFloat16, float>(job, first, last);
    case DType::f16:
      return sum_groups_of<Half, float>(job, first, last);
  }
}
