// The products of all pairs of rows of a chunk. Compiled once per instruction set, inside that set's namespace: no
// include guard.
//
// A slice is taken in chunks of some thousand elements of every row, for which float32 sums last before they are added
// up in float64. While all pairs of rows of a chunk are multiplied, the next one is prefetched. Rows are
// multiplied four by four, so that 16 sums and 8 operands stay in registers.

constexpr int64_t kBlock = 4;
constexpr int64_t kMaxBlocks = kMaxRows / kBlock;
constexpr int64_t kSumLanes = kLanes<double>;
/// Products a lane adds up one by one before the sum is put aside. Short runs keep the error of equal entries, such as
/// those of an expanded gradient, near that of pairwise summation.
constexpr int64_t kRun = 32;
/// Vectors of each row between two prefetches.
constexpr int64_t kVectorsPerPrefetch = 4;
/// Elements of each row for which all pairs are taken in turn, so that the rows of a tile stay in the first-level
/// cache.
constexpr int64_t kPiece = 512;

/// The present rows of a chunk of one parameter.
template <class Storage>
struct Chunk {
  Storage const* rows[kMaxRows];
  int64_t task[kMaxRows];  // Of each row.
  int64_t count = 0;
  int64_t length;
  Span next[2 * kMaxRows];  // What will be read after it.
  int64_t num_next = 0;
};

/// Lane sums of the products of four rows with four rows.
template <class Acc>
struct alignas(kVectorBytes) Tile {
  Acc lanes[kBlock][kBlock][kLanes<Acc>];
};

template <class Acc, class Storage>
inline void pad(Storage const* from, int64_t length, Storage (&to)[kLanes<Acc>]) {
  for (int64_t i = 0; i < kLanes<Acc>; ++i) to[i] = i < length ? from[i] : Storage{};
}

/// Tiles of the upper triangle of so many rows.
inline int64_t num_tiles(int64_t rows) {
  int64_t const blocks = (rows + kBlock - 1) / kBlock;
  return blocks * (blocks + 1) / 2;
}

/// Prefetches what follows a chunk while all its pairs are multiplied.
template <class Acc, class Storage>
Prefetch prefetch_of(Chunk<Storage> const& chunk) {
  return {chunk.next, chunk.num_next, num_tiles(chunk.count) * chunk.length / (kVectorsPerPrefetch * kLanes<Acc>)};
}

/// tile[r][c] += a[r] * b[c] over elements [begin, end); on the diagonal (a = b) only c >= r is taken. The next chunk
/// is prefetched in the meantime.
template <class Acc, int R, int C, bool diagonal, class Storage>
void multiply(Storage const* const* rows_a, Storage const* const* rows_b, int64_t begin, int64_t end, Tile<Acc>& tile,
              Prefetch& caller_prefetch) {
  constexpr int64_t width = kLanes<Acc>;
  Storage const* a[R];
  Storage const* b[C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) a[r] = rows_a[r];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) b[c] = rows_b[c];
  Prefetch prefetch = caller_prefetch;  // Of its own, for compilers to keep in registers.

  Vec<Acc> sum[R][C];
  auto const step = [&](int64_t at) {
    Vec<Acc> x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = load<Acc>(a[r] + at);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      Vec<Acc> const y = diagonal ? x[c] : load<Acc>(b[c] + at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (!diagonal || c >= r) sum[r][c] = fma(x[r], y, sum[r][c]);
      }
    }
  };
  auto const clear = [&] {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = diagonal ? r : 0; c < C; ++c) sum[r][c] = Vec<Acc>{};
    }
  };
  auto const put_aside = [&] {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = diagonal ? r : 0; c < C; ++c) {
        Acc* lanes = tile.lanes[r][c];
        store(lanes, load<Acc>(lanes) + sum[r][c]);
      }
    }
  };

  int64_t at = begin;
  for (int64_t vectors = (end - begin) / width; vectors > 0; vectors -= kRun) {
    clear();
    int64_t const run = std::min(vectors, kRun);
    for (int64_t calls = run / kVectorsPerPrefetch; calls > 0; --calls) {
      prefetch();
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectorsPerPrefetch; ++v, at += width) step(at);
    }
    for (int64_t left = run % kVectorsPerPrefetch; left > 0; --left, at += width) step(at);
    put_aside();
  }
  caller_prefetch = prefetch;
  int64_t const left = end - at;
  if (left == 0) return;
  Storage padded_a[R][width];
  Storage padded_b[C][width];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    pad<Acc>(a[r] + at, left, padded_a[r]);
    a[r] = padded_a[r];
  }
#pragma GCC unroll 4
  for (int c = 0; c < C && !diagonal; ++c) {
    pad<Acc>(b[c] + at, left, padded_b[c]);
    b[c] = padded_b[c];
  }
  clear();
  step(0);
  put_aside();
}

/// Multiplies the blocks of rows that start at i and j >= i; only the last block of a chunk has fewer than four rows.
template <class Acc, class Storage>
void multiply_blocks(Chunk<Storage> const& chunk, int64_t i, int64_t j, int64_t begin, int64_t end, Tile<Acc>& tile,
                     Prefetch& prefetch) {
  Storage const* const* a = chunk.rows + i;
  Storage const* const* b = chunk.rows + j;
  auto const with = [&]<int C>(std::integral_constant<int, C>) {
    return i == j ? multiply<Acc, C, C, true>(a, b, begin, end, tile, prefetch)
                  : multiply<Acc, 4, C, false>(a, b, begin, end, tile, prefetch);
  };
  switch (std::min(kBlock, chunk.count - j)) {
    case 1:
      return with(std::integral_constant<int, 1>{});
    case 2:
      return with(std::integral_constant<int, 2>{});
    case 3:
      return with(std::integral_constant<int, 3>{});
    default:
      return with(std::integral_constant<int, 4>{});
  }
}

/// Calls visit(i, j, number) for all pairs of blocks with i <= j, in one fixed order.
template <class Visit>
inline void for_each_tile(int64_t count, Visit visit) {
  int64_t number = 0;
  for (int64_t j = 0; j < count; j += kBlock) {
    for (int64_t i = j; i >= 0; i -= kBlock) visit(i, j, number++);
  }
}

/// The running sums of a slice: for each pair of tasks a few lanes in float64.
struct Sums {
  explicit Sums(int64_t num_tasks) : num_tasks(num_tasks), lanes(num_tasks * (num_tasks + 1) / 2 * kSumLanes, 0.0) {}

  /// Of tasks i <= j; pairs are in the order of the upper triangle's rows.
  double* of(int64_t i, int64_t j) { return lanes.data() + (i * (2 * num_tasks - i - 1) / 2 + j) * kSumLanes; }

  int64_t num_tasks;
  std::vector<double> lanes;
};

template <class Acc, class Storage>
void add_tile(Tile<Acc> const& tile, Chunk<Storage> const& chunk, int64_t i, int64_t j, Sums& sums) {
  int64_t const height = std::min(kBlock, chunk.count - i);
  int64_t const width = std::min(kBlock, chunk.count - j);
  for (int64_t r = 0; r < height; ++r) {
    double* first = sums.of(chunk.task[i + r], 0);
    for (int64_t c = i == j ? r : 0; c < width; ++c) {
      double* to = first + chunk.task[j + c] * kSumLanes;
      Vec<double> total = load<double>(to);
      Acc const* lanes = tile.lanes[r][c];
      for (int64_t part = 0; part < kLanes<Acc>; part += kSumLanes) total += load<double>(lanes + part);
      store(to, total);
    }
  }
}

/// The products of two blocks over the whole chunk, summed in float64.
template <class Storage>
void add_wide(Chunk<Storage> const& chunk, int64_t i, int64_t j, Sums& sums, Prefetch& prefetch) {
  Tile<double> tile{};
  multiply_blocks(chunk, i, j, 0, chunk.length, tile, prefetch);
  add_tile(tile, chunk, i, j, sums);
}

/// Whether float32 sums of this row's squares can be trusted: not near overflow, and not so small that its products
/// went below the smallest normal number.
inline bool trusted(float const* squares, float const* row, int64_t length) {
  constexpr float smallest = 1e-27f;
  constexpr float largest = 1e37f;
  float total = 0;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) total += squares[lane];
  if (total >= smallest && total <= largest) return true;
  return total == 0 && std::all_of(row, row + length, [](float value) { return value == 0; });
}

inline void add_products(Chunk<double> const& chunk, Sums& sums, Tile<float>*) {
  Prefetch prefetch = prefetch_of<double>(chunk);
  for_each_tile(chunk.count, [&](int64_t i, int64_t j, int64_t) { add_wide(chunk, i, j, sums, prefetch); });
}

/// Sums the products in float32, and again in float64 those of rows whose squares leave float32's range.
inline void add_products(Chunk<float> const& chunk, Sums& sums, Tile<float>* tiles) {
  for_each_tile(chunk.count, [&](int64_t, int64_t, int64_t number) { tiles[number] = {}; });
  Prefetch prefetch = prefetch_of<float>(chunk);
  for (int64_t begin = 0; begin < chunk.length; begin += kPiece) {
    for_each_tile(chunk.count, [&](int64_t i, int64_t j, int64_t number) {
      multiply_blocks(chunk, i, j, begin, std::min(begin + kPiece, chunk.length), tiles[number], prefetch);
    });
  }
  bool narrow[kMaxBlocks];
  for_each_tile(chunk.count, [&](int64_t i, int64_t j, int64_t number) {
    if (i == j) {
      narrow[i / kBlock] = true;
      for (int64_t r = 0; r < std::min(kBlock, chunk.count - i); ++r) {
        narrow[i / kBlock] &= trusted(tiles[number].lanes[r][r], chunk.rows[i + r], chunk.length);
      }
    }
    if (narrow[i / kBlock] && narrow[j / kBlock]) {
      add_tile(tiles[number], chunk, i, j, sums);
    } else {
      add_wide(chunk, i, j, sums, prefetch);
    }
  });
}

/// Writes the sum of each pair's lanes: the upper triangle of the slice's Gram matrix, row by row.
inline void write_upper(Sums const& sums, double* upper) {
  for (size_t pair = 0; pair < sums.lanes.size() / kSumLanes; ++pair) {
    double const* lanes = sums.lanes.data() + pair * kSumLanes;
    upper[pair] = std::accumulate(lanes, lanes + kSumLanes, 0.0);
  }
}
