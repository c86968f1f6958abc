// The dropped gradients of some features. Compiled once per instruction set, inside that set's namespace: no include
// guard. Plain loops over features, which compilers vectorise.

// Blocks of four random numbers drawn side by side.
constexpr int64_t kDraws = 16;
constexpr int64_t kLineBytes = 64;

// Writes 2 u - 1 for the words in a vector.
inline void store_centred(VecU64 words, float* centred) {
  typedef int32_t Words __attribute__((vector_size(FASTMTL_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(FASTMTL_VECTOR_BYTES)));
  // The 24 bits of uniform(), which float holds, and so 2 u - 1.
  const Words numbers = (Words)((Bits)words >> 8);
  store(centred, __builtin_convertvector(numbers, Vec<float>) * 0x1p-23f - 1.0f);
}

// Writes 2 u - 1 for the 4 * kLanes64 numbers of as many blocks as a vector has 64-bit lanes, from `block` on. A lane
// holds a word of its block in its low half; what is in the high half does not matter.
inline void draw_blocks(const Noise& noise, uint64_t block, float* centred) {
  constexpr int64_t half = kLanes64 / 2;
  VecU64 index{};
  // Neighbouring lanes hold blocks that are half a vector apart: so the words lie in order when they are interleaved.
  for (int64_t lane = 0; lane < kLanes64; ++lane) index[lane] = block + lane % 2 * half + lane / 2;
  const VecU64 zero{};
  VecU64 c0 = index;
  VecU64 c1 = index >> 32;
  VecU64 c2 = noise.offset - zero;
  VecU64 c3 = (noise.offset >> 32) - zero;
  auto k0 = static_cast<uint32_t>(noise.seed);
  auto k1 = static_cast<uint32_t>(noise.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const VecU64 p0 = multiply_low(c0, uint64_t{kPhiloxMultiplier0} - zero);
    const VecU64 p1 = multiply_low(c2, uint64_t{kPhiloxMultiplier1} - zero);
    c0 = p1 >> 32 ^ c1 ^ uint64_t{k0};
    c1 = p1;
    c2 = p0 >> 32 ^ c3 ^ uint64_t{k1};
    c3 = p0;
    k0 += kPhiloxKey0;
    k1 += kPhiloxKey1;
  }
  const VecU64 first = (c0 & 0xFFFFFFFF) | c1 << 32;
  const VecU64 second = (c2 & 0xFFFFFFFF) | c3 << 32;
  store_centred(interleave_even(first, second), centred);
  store_centred(interleave_odd(first, second), centred + kLanes<float>);
}

// Writes 2 u - 1 for `length` numbers, at most 4 * kDraws, from `first` on, a multiple of 4.
template <class Acc>
inline void draw(const Noise& noise, int64_t first, Acc* __restrict centred, int64_t length = 4 * kDraws) {
  if (noise.given != nullptr) {
    for (int64_t i = 0; i < length; ++i) centred[i] = static_cast<Acc>(2 * noise.given[i] - 1);
    return;
  }
  float numbers[4 * kDraws];
  for (int64_t i = 0; i < kDraws; i += kLanes64) draw_blocks(noise, first / 4 + i, numbers + 4 * i);
  convert(centred, numbers, 4 * kDraws);
}

// The sign that stays: with the sum of the s_t and that of their sizes, purity > u exactly where
// sum > (2 u - 1) sizes. A NaN leaves neither sign.
template <class Acc>
inline Acc sign_that_stays(Acc sum, Acc limit) {
  return sum > limit ? Acc{1} : sum < limit ? Acc{-1} : Acc{0};
}

// Turns 2 u - 1 into the sign that stays.
template <class Acc>
inline void choose(const Acc* __restrict sum, const Acc* __restrict size, Acc* __restrict sign, int64_t length) {
  for (int64_t i = 0; i < length; ++i) sign[i] = sign_that_stays(sum[i], sign[i] * size[i]);
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
  // The next row is elsewhere in memory, where the processor does not look by itself.
  const auto call_in = [&](const Batch& batch, int64_t b) {
    if (b == batch.size) return;
    const int64_t bytes = bytes_of(batch.dtype);
    const char* from = static_cast<const char*>(batch.data) + (b * job.features + begin) * bytes;
    for (int64_t i = 0; i < length * bytes; i += kLineBytes) __builtin_prefetch(from + i, 0, 2);
  };

  std::fill_n(sum, 2 * length, Acc{0});
  std::fill_n(signed_sums, tasks * length, Acc{0});
  for (size_t r = 0; r < job.reps.size(); ++r) {
    const int64_t first = job.shares() ? 0 : static_cast<int64_t>(r);
    const int64_t last = job.shares() ? tasks : first + 1;
    for (int64_t b = 0; b < job.reps[r].size; ++b) {
      const Acc* rep = at(job.reps[r], b, scratch);
      call_in(job.reps[r], b + 1);
      for (int64_t t = first; t < last; ++t) {
        call_in(job.grads[t], b + 1);
        add_signed(rep, at(job.grads[t], b, other), signed_sums + t * length, length);
      }
    }
  }
  for (int64_t t = 0; t < tasks; ++t) add_size(signed_sums + t * length, sum, size, length);
  for (int64_t i = 0; i < length; i += 4 * kDraws) {
    Acc numbers[4 * kDraws];
    const int64_t drawn = std::min(4 * kDraws, length - i);
    draw(job.noise.at(begin + i), begin + i, numbers, drawn);
    std::copy_n(numbers, drawn, sign + i);
  }
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
      if (!direct) save(out, target.data, target.dtype, place, length);
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

// Elements of a row taken in a step: as many as there are numbers drawn side by side.
constexpr int64_t kTile = 4 * kDraws;
// How far ahead rows are called into the second-level cache, in elements.
constexpr int64_t kAhead = 512;

// A tile whose rows lie in memory as Acc. The sums stay in registers; `noise` is 2 u - 1.
template <class Acc, bool streams>
inline void drop_tile(const Acc* const* rows, const Acc* leaks, int64_t count, const Acc* noise, Acc* out, int64_t at) {
  // Vectors side by side: no more than the registers of all instruction sets hold with what is computed of them.
  constexpr int64_t width = 4;
  constexpr int64_t lanes = kLanes<Acc>;
  static_assert(kTile % (width * lanes) == 0);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < kTile; i += kLineBytes / static_cast<int64_t>(sizeof(Acc))) {
      __builtin_prefetch(rows[r] + at + kAhead + i, 0, 2);
    }
  }
  for (int64_t begin = 0; begin < kTile; begin += width * lanes) {
    Vec<Acc> sum[width] = {};
    Vec<Acc> size[width] = {};
    for (int64_t r = 0; r < count; ++r) {
      const Acc* row = rows[r] + at + begin;
#pragma GCC unroll 4
      for (int64_t v = 0; v < width; ++v) {
        const Vec<Acc> value = load<Acc>(row + v * lanes);
        sum[v] += value;
        size[v] += value < 0 ? -value : value;
      }
    }
    Vec<Acc> sign[width];
    Vec<Acc> total[width] = {};
    const Vec<Acc> one = Acc{1} - Vec<Acc>{};
#pragma GCC unroll 4
    for (int64_t v = 0; v < width; ++v) {
      const Vec<Acc> limit = load<Acc>(noise + begin + v * lanes) * size[v];
      sign[v] = sum[v] > limit ? one : sum[v] < limit ? -one : Vec<Acc>{};
    }
    for (int64_t r = 0; r < count; ++r) {
      const Acc* row = rows[r] + at + begin;
      const Vec<Acc> leak = leaks[r] - Vec<Acc>{};
#pragma GCC unroll 4
      for (int64_t v = 0; v < width; ++v) {
        const Vec<Acc> value = load<Acc>(row + v * lanes);
        total[v] += value * (value * sign[v] > 0 ? one : leak);
      }
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < width; ++v) {
      Acc* const to = out + at + begin + v * lanes;
      if constexpr (streams) {
        stream(to, total[v]);
      } else {
        store(to, total[v]);
      }
    }
  }
}

// Elements [begin, begin + length) of one parameter, each a feature of its own.
template <class Acc>
void drop_elements(const RowsJob& job, int64_t k, int64_t begin, int64_t length, Acc* memory) {
  Acc* const scratch = memory;
  const Acc* rows[kMaxRows];
  Acc leaks[kMaxRows];
  int64_t count = 0;
  for (int64_t t = 0; t < job.rows.num_rows(); ++t) {
    const Row& row = job.rows.row(t, k);
    if (row.tensor == nullptr) continue;
    rows[count] = as(row.data, row.dtype, begin, length, scratch + (count + 1) * length);
    leaks[count++] = static_cast<Acc>(job.leaks[t]);
  }
  const Target& target = job.targets[k];
  const bool direct = target.dtype == (std::is_same_v<Acc, double> ? DType::f64 : DType::f32);
  Acc* out = direct ? static_cast<Acc*>(target.data) + begin : scratch;
  const bool streams = job.streams && direct && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  alignas(kVectorBytes) Acc noise[kTile];
  int64_t at = 0;
  for (; at + kTile <= length; at += kTile) {
    draw(job.noises[k].at(begin + at), job.firsts[k] + begin + at, noise);
    if (streams) {
      drop_tile<Acc, true>(rows, leaks, count, noise, out, at);
    } else {
      drop_tile<Acc, false>(rows, leaks, count, noise, out, at);
    }
  }
  if (at < length) {
    draw(job.noises[k].at(begin + at), job.firsts[k] + begin + at, noise, length - at);
    for (int64_t i = at; i < length; ++i) {
      Acc sum = 0;
      Acc size = 0;
      for (int64_t r = 0; r < count; ++r) {
        sum += rows[r][i];
        size += rows[r][i] < 0 ? -rows[r][i] : rows[r][i];
      }
      const Acc sign = sign_that_stays(sum, noise[i - at] * size);
      Acc total = 0;
      for (int64_t r = 0; r < count; ++r) total += rows[r][i] * (rows[r][i] * sign > 0 ? Acc{1} : leaks[r]);
      out[i] = total;
    }
  }
  if (!direct) save(out, target.data, target.dtype, begin, length);
}

inline void graddrop_rows_slice(const RowsJob& job, const Slice& slice) {
  const auto memory = std::make_unique_for_overwrite<double[]>((job.rows.num_rows() + 1) * job.chunk);
  for_each_chunk(job.segments, slice, job.chunk, [&](int64_t k, int64_t begin, int64_t length) {
    if (job.targets[k].dtype == DType::f64) {
      drop_elements(job, k, begin, length, memory.get());
    } else {
      drop_elements(job, k, begin, length, reinterpret_cast<float*>(memory.get()));
    }
  });
  if (job.streams) stream_fence();
}
