// The Gram matrix of one slice. Compiled once per instruction set, inside that set's namespace: no include guard.

// Rows are taken four at a time: 16 sums and 8 operands stay in registers.
constexpr int64_t kBlock = 4;
constexpr int64_t kSumLanes = kLanes<double>;

// The present rows of a piece of one parameter, and where their sums go.
template <class Storage>
struct Piece {
  const Storage* rows[kMaxRows];
  int64_t task[kMaxRows];          // Of each row.
  double* sums[kMaxRows];          // Of each row with task 0, of which only those with its own and later tasks exist.
  bool narrow[kMaxRows / kBlock];  // Of each block of rows: whether float32 sums are good enough.
  int64_t count = 0;
  int64_t length;
  int64_t ahead = 0;  // Rows whose next piece has been asked for.

  double* sum(int64_t i, int64_t j) const { return sums[i] + task[j] * kSumLanes; }
};

// Lane sums of the products of R rows with C rows, in memory.
template <class Acc, int R, int C>
struct Products {
  alignas(kVectorBytes) Acc lanes[R][C][kLanes<Acc>];
};

template <class Acc, class Storage>
inline void pad(const Storage* from, int64_t length, Storage (&to)[kLanes<Acc>]) {
  for (int64_t i = 0; i < kLanes<Acc>; ++i) to[i] = i < length ? from[i] : Storage{};
}

// result[r][c] = a[r] * b[c] summed over the piece; on the diagonal (a = b) only c >= r is taken. Meanwhile the next piece of a
// few rows is called into the second-level cache, so that memory works while the arithmetic does.
template <class Acc, int R, int C, bool diagonal, class Storage>
inline __attribute__((always_inline)) void multiply(Piece<Storage>& piece, int64_t i, int64_t j,
                                                    Products<Acc, R, C>& result) {
  constexpr int64_t width = kLanes<Acc>;
  constexpr int slots = diagonal ? R : 2;
  const int64_t blocks = (piece.count + kBlock - 1) / kBlock;
  const int64_t tiles = blocks * (blocks + 1) / 2;
  static const int64_t pf = getenv("PF") ? atol(getenv("PF")) : 1;
  const int64_t wanted = pf ? (piece.count + tiles - 1) / tiles : 0;
  const Storage* ahead[slots];
  for (int slot = 0; slot < slots; ++slot) {
    const bool useful = slot < wanted && piece.ahead < piece.count;
    ahead[slot] = useful ? piece.rows[piece.ahead++] + piece.length : piece.rows[i];
  }

  const Storage* a[R];
  const Storage* b[C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) a[r] = piece.rows[i + r];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) b[c] = piece.rows[j + c];

  Vec<Acc> sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = Vec<Acc>{};
  }
  int64_t at = 0;
  int64_t left = piece.length;
  Storage padded_a[R][width];
  Storage padded_b[C][width];
  while (left > 0) {
    if (left < width) {
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
      at = 0;
      left = width;
    }
    do {
#pragma GCC unroll 4
      for (int slot = 0; slot < slots; ++slot) __builtin_prefetch(ahead[slot] + at, 0, 2);
      Vec<Acc> x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load<Acc>(a[r] + at);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const Vec<Acc> y = diagonal ? x[c] : load<Acc>(b[c] + at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          if (!diagonal || c >= r) sum[r][c] = fma(x[r], y, sum[r][c]);
        }
      }
      at += width;
      left -= width;
    } while (left >= width);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(result.lanes[r][c], sum[r][c]);
  }
}

// Adds the lanes of one sum to kSumLanes running sums in float64.
template <class Acc>
inline void add_lanes(double* to, const Acc* lanes) {
  Vec<double> total = load<double>(to);
  for (int64_t part = 0; part < kLanes<Acc>; part += kSumLanes) total += load<double>(lanes + part);
  store(to, total);
}

// Whether float32 sums of this row's squares can be trusted: not near overflow, and not so small that its products went
// below the smallest normal number.
inline bool trusted(const float* squares, const float* row, int64_t length) {
  constexpr float smallest = 1e-27f;
  constexpr float largest = 1e37f;
  float total = 0;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) total += squares[lane];
  if (total >= smallest && total <= largest) return true;
  return total == 0 && std::all_of(row, row + length, [](float value) { return value == 0; });
}

template <class Acc, int R, class Storage>
bool diagonal_tile(Piece<Storage>& piece, int64_t i) {
  Products<Acc, R, R> products;
  multiply<Acc, R, R, true>(piece, i, i, products);
  if constexpr (std::is_same_v<Acc, float>) {
    for (int r = 0; r < R; ++r) {
      if (!trusted(products.lanes[r][r], piece.rows[i + r], piece.length)) return false;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = r; c < R; ++c) add_lanes(piece.sum(i + r, i + c), products.lanes[r][c]);
  }
  return true;
}

template <class Acc, int R, int C, class Storage>
void tile(Piece<Storage>& piece, int64_t i, int64_t j) {
  Products<Acc, R, C> products;
  multiply<Acc, R, C, false>(piece, i, j, products);
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) add_lanes(piece.sum(i + r, j + c), products.lanes[r][c]);
  }
}

template <class Acc, class Storage>
bool diagonal_block(Piece<Storage>& piece, int64_t i) {
  switch (std::min(kBlock, piece.count - i)) {
    case 1:
      return diagonal_tile<Acc, 1>(piece, i);
    case 2:
      return diagonal_tile<Acc, 2>(piece, i);
    case 3:
      return diagonal_tile<Acc, 3>(piece, i);
    default:
      return diagonal_tile<Acc, 4>(piece, i);
  }
}

template <class Acc, class Storage>
void block(Piece<Storage>& piece, int64_t i, int64_t j) {
  switch (std::min(kBlock, piece.count - j)) {
    case 1:
      return tile<Acc, 4, 1>(piece, i, j);
    case 2:
      return tile<Acc, 4, 2>(piece, i, j);
    case 3:
      return tile<Acc, 4, 3>(piece, i, j);
    default:
      return tile<Acc, 4, 4>(piece, i, j);
  }
}

template <class Storage>
void add_products(Piece<Storage>& piece) {
  for (int64_t i = 0; i < piece.count; i += kBlock) {
    bool& narrow = piece.narrow[i / kBlock];
    narrow = std::is_same_v<Storage, float> && diagonal_block<Storage>(piece, i);
    if (!narrow) diagonal_block<double>(piece, i);
    for (int64_t j = 0; j < i; j += kBlock) {
      if (narrow && piece.narrow[j / kBlock]) {
        block<Storage>(piece, j, i);
      } else {
        block<double>(piece, j, i);
      }
    }
  }
}

template <class Acc>
void add_chunk(const RowTable& rows, int64_t k, int64_t begin, int64_t length, double* sums, Acc* scratch) {
  Piece<Acc> piece;
  piece.length = length;
  for (int64_t t = 0; t < rows.num_rows(); ++t) {
    const Row& row = rows.row(t, k);
    if (row.tensor == nullptr) continue;
    piece.rows[piece.count] = as(row.data, row.dtype, begin, length, scratch + piece.count * length);
    piece.sums[piece.count] = sums + t * (2 * rows.num_rows() - t - 1) / 2 * kSumLanes;
    piece.task[piece.count++] = t;
  }
  add_products(piece);
}

// Writes the upper triangle of the slice's Gram matrix, row by row.
inline void gram_slice(const GramJob& job, const Slice& slice, double* upper) {
  const int64_t num_rows = job.rows.num_rows();
  const int64_t pairs = num_rows * (num_rows + 1) / 2;
  std::vector<double> sums(pairs * kSumLanes, 0.0);
  std::vector<double> scratch(job.converts ? num_rows * job.chunk : 0);
  for_each_chunk(job.segments, slice, job.chunk, [&](int64_t k, int64_t begin, int64_t length) {
    if (job.rows.parameter(k).dtype == DType::f64) {
      add_chunk(job.rows, k, begin, length, sums.data(), scratch.data());
    } else {
      add_chunk(job.rows, k, begin, length, sums.data(), reinterpret_cast<float*>(scratch.data()));
    }
  });
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double total = 0;
    for (int64_t lane = 0; lane < kSumLanes; ++lane) total += sums[pair * kSumLanes + lane];
    upper[pair] = total;
  }
}
