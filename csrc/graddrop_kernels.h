// The dropped gradients of some features. Compiled once per instruction set, inside that set's namespace: no include
// guard. Plain loops over features, which compilers vectorise.

// Blocks of four random numbers drawn side by side.
constexpr int64_t kDraws = 16;
// Elements of a cache line.
constexpr int64_t kLine = 16;

// Writes 2 u - 1 for the numbers first .. first + length - 1; `first` is a multiple of 4. meanwhile(at) is called for
// every 4 * kDraws numbers, for memory to work while the arithmetic does.
template <class Acc, class Meanwhile>
inline void draw(const Noise& noise, int64_t first, int64_t length, Acc* __restrict centred, Meanwhile meanwhile) {
  if (noise.given != nullptr) {
    for (int64_t i = 0; i < length; ++i) centred[i] = static_cast<Acc>(2 * noise.given[i] - 1);
    return;
  }
  Acc numbers[4 * kDraws];
  for (int64_t at = 0; at < length; at += 4 * kDraws) {
    const int64_t block = (first + at) / 4;
    meanwhile(at);
    for (int64_t i = 0; i < kDraws; ++i) {
      uint32_t words[4];
      philox_block(noise.seed, noise.offset, block + i, words);
      for (int64_t word = 0; word < 4; ++word) {
        numbers[4 * i + word] = 2 * static_cast<Acc>(uniform(words[word])) - 1;
      }
    }
    std::copy_n(numbers, std::min(4 * kDraws, length - at), centred + at);
  }
}

// Turns 2 u - 1 into the sign that stays: with the sum of the s_t and that of their sizes, purity > u exactly where
// sum > (2 u - 1) sizes. A NaN leaves neither sign.
template <class Acc>
inline void choose(const Acc* __restrict sum, const Acc* __restrict size, Acc* __restrict sign, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    const Acc limit = sign[i] * size[i];
    sign[i] = sum[i] > limit ? Acc{1} : sum[i] < limit ? Acc{-1} : Acc{0};
  }
}

template <class Acc>
inline void add_size(const Acc* __restrict from, Acc* __restrict sum, Acc* __restrict size, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    sum[i] += from[i];
    size[i] += from[i] < 0 ? -from[i] : from[i];
  }
}

template <class Acc>
inline void add_signed(const Acc* __restrict rep, const Acc* __restrict grad, Acc* __restrict sum, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    const Acc sign = rep[i] > 0 ? Acc{1} : rep[i] < 0 ? Acc{-1} : rep[i];
    sum[i] += sign * grad[i];
  }
}

template <class Acc>
inline void save(const Target& target, int64_t begin, const Acc* from, int64_t length) {
  switch (target.dtype) {
    case DType::f32:
      return convert(static_cast<float*>(target.data) + begin, from, length);
    case DType::f64:
      return convert(static_cast<double*>(target.data) + begin, from, length);
    case DType::bf16:
      return convert(static_cast<BFloat16*>(target.data) + begin, from, length);
    case DType::f16:
      return convert(static_cast<Half*>(target.data) + begin, from, length);
  }
}

// The whole batch of the features [begin, begin + length).
template <class Acc>
void drop_features(const BatchJob& job, int64_t begin, int64_t length, Acc* memory) {
  const auto tasks = static_cast<int64_t>(job.grads.size());
  Acc* const sign = memory;
  Acc* const sum = sign + length;
  Acc* const size = sum + length;
  Acc* const scratch = size + length;
  Acc* const other = scratch + length;
  Acc* const signed_sums = other + length;
  const auto at = [&](const Batch& batch, int64_t b, Acc* to) {
    return as(batch.data, batch.dtype, b * job.features + begin, length, to);
  };

  std::fill_n(sum, 2 * length, Acc{0});
  std::fill_n(signed_sums, tasks * length, Acc{0});
  for (size_t r = 0; r < job.reps.size(); ++r) {
    const int64_t first = job.shares() ? 0 : static_cast<int64_t>(r);
    const int64_t last = job.shares() ? tasks : first + 1;
    for (int64_t b = 0; b < job.reps[r].size; ++b) {
      const Acc* rep = at(job.reps[r], b, scratch);
      for (int64_t t = first; t < last; ++t) {
        add_signed(rep, at(job.grads[t], b, other), signed_sums + t * length, length);
      }
    }
  }
  for (int64_t t = 0; t < tasks; ++t) add_size(signed_sums + t * length, sum, size, length);
  draw(job.noise.at(begin), begin, length, sign, [](int64_t) {});
  choose(sum, size, sign, length);
  const auto leak = static_cast<Acc>(job.leak);
  for (int64_t t = 0; t < tasks; ++t) {
    Acc* __restrict factor = signed_sums + t * length;
    for (int64_t i = 0; i < length; ++i) factor[i] = factor[i] * sign[i] > 0 ? Acc{1} : leak;
  }

  for (size_t r = 0; r < job.reps.size(); ++r) {
    const int64_t first = job.shares() ? 0 : static_cast<int64_t>(r);
    const int64_t last = job.shares() ? tasks : first + 1;
    for (int64_t b = 0; b < job.reps[r].size; ++b) {
      const Target& target = job.targets[r];
      const int64_t place = b * job.features + begin;
      const bool direct = target.dtype == (std::is_same_v<Acc, double> ? DType::f64 : DType::f32);
      Acc* __restrict out = direct ? static_cast<Acc*>(target.data) + place : scratch;
      for (int64_t t = first; t < last; ++t) {
        const Acc* __restrict grad = at(job.grads[t], b, other);
        const Acc* __restrict factor = signed_sums + t * length;
        if (t == first) {
          for (int64_t i = 0; i < length; ++i) out[i] = grad[i] * factor[i];
        } else {
          for (int64_t i = 0; i < length; ++i) out[i] += grad[i] * factor[i];
        }
      }
      if (!direct) save(target, place, out, length);
    }
  }
}

inline void graddrop_slice(const BatchJob& job, int64_t begin, int64_t end) {
  const auto vectors = static_cast<int64_t>(job.grads.size()) + 5;
  const auto memory = std::make_unique_for_overwrite<double[]>(vectors * job.chunk);
  for (; begin < end; begin += job.chunk) {
    const int64_t length = std::min(job.chunk, end - begin);
    if (job.sums_in_double) {
      drop_features(job, begin, length, memory.get());
    } else {
      drop_features(job, begin, length, reinterpret_cast<float*>(memory.get()));
    }
  }
}

// Elements [begin, begin + length) of one parameter, each a feature of its own.
template <class Acc>
void drop_elements(const RowsJob& job, int64_t k, int64_t begin, int64_t length, Acc* memory) {
  Acc* const sign = memory;
  Acc* const sum = sign + length;
  Acc* const size = sum + length;
  Acc* const scratch = size + length;
  const Acc* rows[kMaxRows];
  Acc leaks[kMaxRows];
  int64_t count = 0;
  std::fill_n(sum, 2 * length, Acc{0});
  for (int64_t t = 0; t < job.rows.num_rows(); ++t) {
    const Row& row = job.rows.row(t, k);
    if (row.tensor == nullptr) continue;
    rows[count] = as(row.data, row.dtype, begin, length, scratch + (count + 1) * length);
    leaks[count++] = static_cast<Acc>(job.leaks[t]);
  }
  draw(job.noises[k].at(begin), job.firsts[k] + begin, length, sign, [&](int64_t at) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < 4 * kDraws; i += kLine) __builtin_prefetch(rows[r] + length + at + i, 0, 2);
    }
  });
  for (int64_t r = 0; r < count; ++r) add_size(rows[r], sum, size, length);
  choose(sum, size, sign, length);
  const Target& target = job.targets[k];
  const bool direct = target.dtype == (std::is_same_v<Acc, double> ? DType::f64 : DType::f32);
  Acc* __restrict out = direct ? static_cast<Acc*>(target.data) + begin : scratch;
  for (int64_t r = 0; r < count; ++r) {
    const Acc* __restrict grad = rows[r];
    const Acc leak = leaks[r];
    if (r == 0) {
      for (int64_t i = 0; i < length; ++i) out[i] = grad[i] * (grad[i] * sign[i] > 0 ? Acc{1} : leak);
    } else {
      for (int64_t i = 0; i < length; ++i) out[i] += grad[i] * (grad[i] * sign[i] > 0 ? Acc{1} : leak);
    }
  }
  if (!direct) save(target, begin, out, length);
}

inline void graddrop_rows_slice(const RowsJob& job, const Slice& slice) {
  const auto memory = std::make_unique_for_overwrite<double[]>((job.rows.num_rows() + 4) * job.chunk);
  for_each_chunk(job.segments, slice, job.chunk, [&](int64_t k, int64_t begin, int64_t length) {
    if (job.targets[k].dtype == DType::f64) {
      drop_elements(job, k, begin, length, memory.get());
    } else {
      drop_elements(job, k, begin, length, reinterpret_cast<float*>(memory.get()));
    }
  });
}
