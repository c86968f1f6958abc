// The dropped gradients of some features, a vector of them at a time. Compiled once per instruction set, inside that
// set's namespace: no include guard.

/// Blocks of four random numbers drawn side by side.
constexpr int64_t kDraws = 16;

/// Writes 2 u - 1 for the words in a vector.
inline void store_centred(VecU64 words, float* centred) {
  using Words __attribute__((vector_size(FASTMTL_VECTOR_BYTES))) = int32_t;
  using Bits __attribute__((vector_size(FASTMTL_VECTOR_BYTES))) = uint32_t;
  // The 24 bits of uniform(), which float holds, and so 2 u - 1.
  Words const numbers = (Words)((Bits)words >> 8);
  store(centred, __builtin_convertvector(numbers, Vec<float>) * 0x1p-23f - 1.0f);
}

/// Writes 2 u - 1 for the 4 * kDraws numbers of the blocks from `block` on. A lane holds a word of its block in its low
/// half; what is in the high half does not matter. Several vectors of blocks go side by side, as each waits for itself.
inline void draw_blocks(Noise const& noise, uint64_t block, float* centred) {
  constexpr int64_t half = kLanes64 / 2;
  constexpr int64_t side = kDraws / kLanes64 < 2 ? 1 : 2;
  for (int64_t first = 0; first < kDraws; first += side * kLanes64) {
    VecU64 const zero{};
    VecU64 c0[side];
    VecU64 c1[side];
    VecU64 c2[side];
    VecU64 c3[side];
#pragma GCC unroll 2
    for (int64_t v = 0; v < side; ++v) {
      // Neighbouring lanes hold blocks that are half a vector apart: so the words lie in order when they are
      // interleaved.
      for (int64_t lane = 0; lane < kLanes64; ++lane) {
        c0[v][lane] = block + first + v * kLanes64 + lane % 2 * half + lane / 2;
      }
      c1[v] = c0[v] >> 32;
      c2[v] = noise.offset - zero;
      c3[v] = (noise.offset >> 32) - zero;
    }
    auto k0 = static_cast<uint32_t>(noise.seed);
    auto k1 = static_cast<uint32_t>(noise.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < side; ++v) {
        VecU64 const p0 = multiply_low(c0[v], uint64_t{kPhiloxMultiplier0} - zero);
        VecU64 const p1 = multiply_low(c2[v], uint64_t{kPhiloxMultiplier1} - zero);
        c0[v] = p1 >> 32 ^ c1[v] ^ uint64_t { k0 };
        c1[v] = p1;
        c2[v] = p0 >> 32 ^ c3[v] ^ uint64_t { k1 };
        c3[v] = p0;
      }
      k0 += kPhiloxKey0;
      k1 += kPhiloxKey1;
    }
#pragma GCC unroll 2
    for (int64_t v = 0; v < side; ++v) {
      VecU64 const one = (c0[v] & 0xFFFFFFFF) | c1[v] << 32;
      VecU64 const other = (c2[v] & 0xFFFFFFFF) | c3[v] << 32;
      float* const to = centred + 4 * (first + v * kLanes64);
      store_centred(interleave_even(one, other), to);
      store_centred(interleave_odd(one, other), to + kLanes<float>);
    }
  }
}

/// Writes 2 u - 1 for `length` numbers, at most 4 * kDraws, from `first` on, a multiple of 4.
template <class Acc>
inline void draw(Noise const& noise, int64_t first, Acc* __restrict centred, int64_t length = 4 * kDraws) {
  if (noise.numbers != nullptr) {
    for (int64_t i = 0; i < length; ++i) centred[i] = static_cast<Acc>(2 * noise.numbers[i] - 1);
    return;
  }
  float numbers[4 * kDraws];
  draw_blocks(noise, first / 4, numbers);
  convert(centred, numbers, 4 * kDraws);
}

/// The sign that stays: with the sum of the s_t and that of their sizes, purity > u exactly where
/// sum > (2 u - 1) sizes. A NaN leaves neither sign.
template <class Acc>
inline Acc sign_that_stays(Acc sum, Acc limit) {
  return sum > limit ? Acc{1} : sum < limit ? Acc{-1} : Acc{0};
}

/// Tasks whose sums stay in registers, and vectors of features beside each other.
constexpr int64_t kTaskGroup = 4;
constexpr int64_t kSide = FASTMTL_ISA_LEVEL == 2 ? 4 : 2;

namespace {

/// The features [begin, begin + length) of the whole batch, and memory for their factors.
template <class Acc, class Storage>
struct Block {
  BatchJob const& job;
  int64_t begin;
  int64_t length;
  Acc* factors;  // (T, length): signed sums, later what the gradients are multiplied by.
  Prefetch prefetch;

  Storage const* at(Batch const& batch, int64_t b, int64_t i) const {
    return static_cast<Storage const*>(batch.data) + b * job.features + begin + i;
  }
};

}  // namespace

/// Writes sum over b of grad[b] sign(rep[b]) of `count` tasks from task `first` on, `side` vectors from feature i on.
template <int count, int64_t side, class Acc, class Storage>
void sum_signed(Block<Acc, Storage>& block, Batch const& rep, int64_t first, int64_t i) {
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t const stride = block.job.features;
  Storage const* of_rep = block.at(rep, 0, i);
  Storage const* grads[count];
  for (int t = 0; t < count; ++t) grads[t] = block.at(block.job.grads[first + t], 0, i);
  Prefetch prefetch = block.prefetch;
  Vec<Acc> sum[count][side] = {};
  Vec<Acc> const one = Acc{1} - Vec<Acc>{};
  for (int64_t b = 0; b < rep.size; ++b, of_rep += stride) {
    prefetch();
    Vec<Acc> sign[side];
#pragma GCC unroll 4
    for (int64_t v = 0; v < side; ++v) {
      Vec<Acc> const value = load<Acc>(of_rep + v * lanes);
      sign[v] = value > 0 ? one : value < 0 ? -one : value;
    }
#pragma GCC unroll 4
    for (int t = 0; t < count; ++t) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < side; ++v) sum[t][v] = fma(sign[v], load<Acc>(grads[t] + v * lanes), sum[t][v]);
      grads[t] += stride;
    }
  }
  block.prefetch = prefetch;
#pragma GCC unroll 4
  for (int t = 0; t < count; ++t) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < side; ++v) store(block.factors + (first + t) * block.length + i + v * lanes, sum[t][v]);
  }
}

/// The same for `left` features, fewer than a vector has.
template <class Acc, class Storage>
void sum_signed_of_few(Block<Acc, Storage>& block, Batch const& rep, int64_t first, int64_t count, int64_t i,
                       int64_t left) {
  for (int64_t t = first; t < first + count; ++t) {
    Acc sum[kLanes<Acc>] = {};
    for (int64_t b = 0; b < rep.size; ++b) {
      Storage const* const of_rep = block.at(rep, b, i);
      Storage const* const grad = block.at(block.job.grads[t], b, i);
      for (int64_t j = 0; j < left; ++j) {
        auto const value = static_cast<Acc>(of_rep[j]);
        Acc const sign = value > 0 ? Acc{1} : value < 0 ? Acc{-1} : value;
        sum[j] += sign * static_cast<Acc>(grad[j]);
      }
    }
    std::copy_n(sum, left, block.factors + t * block.length + i);
  }
}

/// Turns signed sums into factors: 1 where the sum has the sign that stays, else the leak.
template <class Acc, class Storage>
void choose(Block<Acc, Storage>& block) {
  BatchJob const& job = block.job;
  auto const leak = static_cast<Acc>(job.leak);
  auto const tasks = static_cast<int64_t>(job.grads.size());
  for (int64_t begin = 0; begin < block.length; begin += 4 * kDraws) {
    int64_t const length = std::min(4 * kDraws, block.length - begin);
    int64_t const first = block.begin + begin;
    Acc noise[4 * kDraws];
    Acc sum[4 * kDraws] = {};
    Acc size[4 * kDraws] = {};
    draw(job.noise.at(first), first, noise, length);
    for (int64_t t = 0; t < tasks; ++t) {
      Acc const* __restrict of_task = block.factors + t * block.length + begin;
      for (int64_t i = 0; i < length; ++i) {
        sum[i] += of_task[i];
        size[i] += of_task[i] < 0 ? -of_task[i] : of_task[i];
      }
    }
    for (int64_t i = 0; i < length; ++i) sum[i] = sign_that_stays(sum[i], noise[i] * size[i]);
    for (int64_t t = 0; t < tasks; ++t) {
      Acc* __restrict factor = block.factors + t * block.length + begin;
      for (int64_t i = 0; i < length; ++i) factor[i] = factor[i] * sum[i] > 0 ? Acc{1} : leak;
    }
  }
}

/// Writes the sum of the dropped gradients of `num_tasks` tasks from task `first` on, `side` vectors from feature i on;
/// with `count`, which is then `num_tasks`, their factors stay in registers.
template <int count, int64_t side, bool streams, class Acc, class Storage>
void drop_vectors(Block<Acc, Storage>& block, Batch const& out, int64_t first, int64_t num_tasks, int64_t i) {
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t const tasks = count == 0 ? num_tasks : count;
  int64_t const stride = block.job.features;
  Acc const* const of_first = block.factors + first * block.length + i;
  Batch const* const grads = block.job.grads.data() + first;
  Vec<Acc> factors[count == 0 ? 1 : count][side];
#pragma GCC unroll 4
  for (int t = 0; t < count; ++t) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < side; ++v) factors[t][v] = load<Acc>(of_first + t * block.length + v * lanes);
  }
  auto* to = const_cast<Storage*>(block.at(out, 0, i));
  Prefetch prefetch = block.prefetch;
  for (int64_t b = 0; b < out.size; ++b, to += stride) {
    prefetch();
    Vec<Acc> total[side] = {};
#pragma GCC unroll 4
    for (int64_t t = 0; t < tasks; ++t) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < side; ++v) {
        Vec<Acc> const factor = count > 0 ? factors[t][v] : load<Acc>(of_first + t * block.length + v * lanes);
        total[v] = fma(load<Acc>(block.at(grads[t], b, i) + v * lanes), factor, total[v]);
      }
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < side; ++v) {
      if constexpr (streams) {
        stream(to + v * lanes, total[v]);
      } else {
        store(to + v * lanes, total[v]);
      }
    }
  }
  block.prefetch = prefetch;
}

template <class Acc, class Storage>
void drop_few(Block<Acc, Storage>& block, Batch const& out, int64_t first, int64_t count, int64_t i, int64_t left) {
  for (int64_t b = 0; b < out.size; ++b) {
    Acc total[kLanes<Acc>] = {};
    for (int64_t t = first; t < first + count; ++t) {
      Storage const* const grad = block.at(block.job.grads[t], b, i);
      Acc const* const factor = block.factors + t * block.length + i;
      for (int64_t j = 0; j < left; ++j) total[j] += static_cast<Acc>(grad[j]) * factor[j];
    }
    auto* const to = const_cast<Storage*>(block.at(out, b, i));
    for (int64_t j = 0; j < left; ++j) to[j] = static_cast<Storage>(total[j]);
  }
}

/// Calls visit(count) with the number, at most kTaskGroup, as a constant.
template <class Visit>
void with_count(int64_t count, Visit visit) {
  switch (count) {
    case 1:
      return visit(std::integral_constant<int, 1>{});
    case 2:
      return visit(std::integral_constant<int, 2>{});
    case 3:
      return visit(std::integral_constant<int, 3>{});
    default:
      return visit(std::integral_constant<int, 4>{});
  }
}

/// Calls visit(vectors, i) for the features of a block, kSide vectors or one at a time, and, where there is no
/// whole vector, rest(i, left).
template <class Acc, class Visit, class Rest>
void for_each_feature(int64_t length, Visit visit, Rest rest) {
  int64_t i = 0;
  for (; i + kSide * kLanes<Acc> <= length; i += kSide * kLanes<Acc>) {
    visit(std::integral_constant<int64_t, kSide>{}, i);
  }
  for (; i + kLanes<Acc> <= length; i += kLanes<Acc>) visit(std::integral_constant<int64_t, 1>{}, i);
  if (i == length) return;
  // The last vector overlaps the one before it: features in both are computed twice, with the same result.
  if (length >= kLanes<Acc>) return visit(std::integral_constant<int64_t, 1>{}, length - kLanes<Acc>);
  rest(i, length - i);
}

template <class Acc, class Storage>
void drop_block(Block<Acc, Storage>& block) {
  BatchJob const& job = block.job;
  auto const for_each_rep = [&](auto visit) {
    auto const tasks = static_cast<int64_t>(job.grads.size());
    if (job.reps.size() == 1) return visit(0, 0, tasks);
    for (int64_t r = 0; r < tasks; ++r) visit(r, r, 1);
  };
  for_each_rep([&](int64_t r, int64_t first, int64_t tasks) {
    for (int64_t done = 0; done < tasks; done += kTaskGroup) {
      int64_t const count = std::min(kTaskGroup, tasks - done);
      with_count(count, [&]<int n>(std::integral_constant<int, n>) {
        for_each_feature<Acc>(
            block.length,
            [&]<int64_t side>(std::integral_constant<int64_t, side>, int64_t i) {
              sum_signed<n, side>(block, job.reps[r], first + done, i);
            },
            [&](int64_t i, int64_t left) { sum_signed_of_few(block, job.reps[r], first + done, count, i, left); });
      });
    }
  });
  choose(block);
  for_each_rep([&](int64_t r, int64_t first, int64_t tasks) {
    auto const drop = [&]<int n>(std::integral_constant<int, n>) {
      for_each_feature<Acc>(
          block.length,
          [&]<int64_t side>(std::integral_constant<int64_t, side>, int64_t i) {
            if (job.streams) {
              drop_vectors<n, side, true>(block, job.results[r], first, tasks, i);
            } else {
              drop_vectors<n, side, false>(block, job.results[r], first, tasks, i);
            }
          },
          [&](int64_t i, int64_t left) { drop_few(block, job.results[r], first, tasks, i, left); });
    };
    if (tasks <= kTaskGroup) {
      with_count(tasks, drop);
    } else {
      drop(std::integral_constant<int, 0>{});
    }
  });
}

/// The features of one chunk; those of the next one are prefetched in the meantime.
template <class Acc, class Storage>
void drop_chunk(BatchJob const& job, int64_t chunk, int64_t next) {
  auto const tasks = static_cast<int64_t>(job.grads.size());
  int64_t const begin = job.begin_of(chunk);
  int64_t const length = job.begin_of(chunk + 1) - begin;
  int64_t const next_begin = job.begin_of(next);
  int64_t const next_bytes = (job.begin_of(next + 1) - next_begin) * int64_t{sizeof(Storage)};
  std::vector<Span> spans;
  if (job.prefetches && next_bytes > 0) {
    for (auto const* list : {&job.reps, &job.grads}) {
      for (Batch const& batch : *list) {
        Storage const* from = static_cast<Storage const*>(batch.data) + next_begin;
        for (int64_t b = 0; b < batch.size; ++b, from += job.features) {
          spans.push_back({reinterpret_cast<char const*>(from), next_bytes});
        }
      }
    }
  }
  auto const factors = std::make_unique_for_overwrite<Acc[]>(tasks * length);
  int64_t const passes = (tasks / std::ssize(job.reps) + kTaskGroup - 1) / kTaskGroup + 1;
  int64_t height = 0;
  for (Batch const& rep : job.reps) height += rep.size;
  int64_t const calls = passes * height * length / (kSide * kLanes<Acc>);
  Block<Acc, Storage> block{job, begin, length, factors.get(), Prefetch(spans.data(), std::ssize(spans), calls)};
  drop_block(block);
  if (job.streams) stream_fence();
}

inline void graddrop_chunk(BatchJob const& job, int64_t chunk, int64_t next) {
  switch (job.dtype) {
    case DType::f32:
      return drop_chunk<float, float>(job, chunk, next);
    case DType::f64:
      return drop_chunk<double, double>(job, chunk, next);
    case DType::bf16:
      return drop_chunk<float, BFloat16>(job, chunk, next);
    case DType::f16:
      return drop_chunk<float, Half>(job, chunk, next);
  }
}

/// Elements of a row taken in a step: as many as there are numbers drawn side by side.
constexpr int64_t kTile = 4 * kDraws;

/// A tile whose rows lie in memory as Acc. The sums stay in registers; `noise` is 2 u - 1.
template <class Acc, bool streams>
inline void drop_tile(Acc const* const* rows, Acc const* leaks, int64_t count, Acc const* noise, Acc* out, int64_t at) {
  // Vectors side by side: no more than the registers of all instruction sets hold with what is computed of them.
  constexpr int64_t width = 4;
  constexpr int64_t lanes = kLanes<Acc>;
  static_assert(kTile % (width * lanes) == 0);
  for (int64_t begin = 0; begin < kTile; begin += width * lanes) {
    Vec<Acc> sum[width] = {};
    Vec<Acc> size[width] = {};
    for (int64_t r = 0; r < count; ++r) {
      Acc const* row = rows[r] + at + begin;
#pragma GCC unroll 4
      for (int64_t v = 0; v < width; ++v) {
        Vec<Acc> const value = load<Acc>(row + v * lanes);
        sum[v] += value;
        size[v] += abs(value);
      }
    }
    Vec<Acc> sign[width];
    Vec<Acc> total[width] = {};
    Vec<Acc> const one = Acc{1} - Vec<Acc>{};
#pragma GCC unroll 4
    for (int64_t v = 0; v < width; ++v) {
      Vec<Acc> const limit = load<Acc>(noise + begin + v * lanes) * size[v];
      sign[v] = sum[v] > limit ? one : sum[v] < limit ? -one : Vec<Acc>{};
    }
    for (int64_t r = 0; r < count; ++r) {
      Acc const* row = rows[r] + at + begin;
      Vec<Acc> const leak = leaks[r] - Vec<Acc>{};
#pragma GCC unroll 4
      for (int64_t v = 0; v < width; ++v) {
        Vec<Acc> const value = load<Acc>(row + v * lanes);
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

/// A piece of one parameter, each element a feature of its own. The next piece is prefetched in the meantime.
template <class Acc>
void drop_elements(RowsJob const& job, Piece const& piece, Piece const& next, Acc* memory) {
  auto const [k, begin, length] = piece;
  Acc* const scratch = memory;
  Span spans[kMaxRows];
  int64_t num_spans = 0;
  Acc const* rows[kMaxRows];
  Acc leaks[kMaxRows];
  int64_t count = 0;
  for (int64_t t = 0; t < job.rows.num_rows(); ++t) {
    Row const& later = job.rows.row(t, next.index);
    if (next.length > 0 && later.tensor != nullptr) spans[num_spans++] = span_of(later, next.begin, next.length);
    Row const& row = job.rows.row(t, k);
    if (row.tensor == nullptr) continue;
    rows[count] = as(row.data, row.dtype, begin, length, scratch + (count + 1) * length);
    leaks[count++] = static_cast<Acc>(job.leaks[t]);
  }
  Target const& target = job.targets[k];
  bool const direct = target.dtype == (std::is_same_v<Acc, double> ? DType::f64 : DType::f32);
  Acc* out = direct ? static_cast<Acc*>(target.data) + begin : scratch;
  bool const streams = job.streams && direct && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  alignas(kVectorBytes) Acc noise[kTile];
  Prefetch prefetch(spans, num_spans, length / kTile);
  int64_t at = 0;
  for (; at + kTile <= length; at += kTile) {
    prefetch();
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
      Acc const sign = sign_that_stays(sum, noise[i - at] * size);
      Acc total = 0;
      for (int64_t r = 0; r < count; ++r) total += rows[r][i] * (rows[r][i] * sign > 0 ? Acc{1} : leaks[r]);
      out[i] = total;
    }
  }
  if (!direct) save(out, target.data, target.dtype, begin, length);
}

inline void graddrop_rows_slice(RowsJob const& job, Slice const& slice) {
  auto const memory = std::make_unique_for_overwrite<double[]>((job.rows.num_rows() + 1) * job.chunk);
  for_each_chunk_ahead(job.segments, slice, job.chunk, [&](Piece const& piece, Piece const& next) {
    if (job.targets[piece.index].dtype == DType::f64) {
      drop_elements(job, piece, next, memory.get());
    } else {
      drop_elements(job, piece, next, reinterpret_cast<float*>(memory.get()));
    }
  });
  if (job.streams) stream_fence();
}
