// Moving averages of rows and their Gram matrix, slice by slice. Compiled once per instruction set, inside that set's
// namespace: no include guard.

#include "gram_kernels.h"
#include "state_kernels.h"

/// state = keep * state + gain * row
template <class Acc>
inline void blend(Acc* __restrict state, Acc const* __restrict row, Acc keep, Acc gain, int64_t length) {
  for (int64_t i = 0; i < length; ++i) state[i] = keep * state[i] + gain * row[i];
}

template <class Acc>
inline void scale(Acc* state, Acc keep, int64_t length) {
  for (int64_t i = 0; i < length; ++i) state[i] *= keep;
}

/// Updates a chunk of all rows, and multiplies it while it is in the caches.
template <class Acc>
void ema_chunk(EmaJob const& job, Piece const& piece, Piece const& next, Acc* scratch, Tile<float>* tiles, Sums& sums) {
  auto const [k, begin, length] = piece;
  StateRows const& both = job.both;
  Chunk<Acc> chunk;
  chunk.length = length;
  chunk.count = both.rows.num_rows();
  for (int64_t t = 0; t < chunk.count; ++t) {
    Row const& average = both.state.row(t, k);
    Row const& row = both.rows.row(t, k);
    Acc* const state = borrow(average, begin, length, scratch + (t + 1) * length);
    auto const keep = static_cast<Acc>(job.keep[t]);
    if (row.tensor != nullptr) {
      blend(state, as(row.data, row.dtype, begin, length, scratch), keep, static_cast<Acc>(job.gains[t]), length);
    } else {
      scale(state, keep, length);
    }
    give_back(average, begin, length, state);
    chunk.rows[t] = state;
    chunk.task[t] = t;
    if (next.length == 0) continue;
    chunk.next[chunk.num_next++] = span_of(both.state.row(t, next.index), next.begin, next.length);
    Row const& next_row = both.rows.row(t, next.index);
    if (next_row.tensor != nullptr) chunk.next[chunk.num_next++] = span_of(next_row, next.begin, next.length);
  }
  add_products(chunk, sums, tiles);
}

/// Writes the upper triangle of the slice's Gram matrix, row by row.
inline void ema_gram_slice(EmaJob const& job, Slice const& slice, double* upper) {
  int64_t const num_rows = job.both.rows.num_rows();
  auto const scratch = std::make_unique_for_overwrite<double[]>(job.both.converts ? (num_rows + 1) * job.chunk : 0);
  auto const tiles = std::make_unique_for_overwrite<Tile<float>[]>(num_tiles(num_rows));
  Sums sums(num_rows);
  for_each_chunk_ahead(job.both.segments, slice, job.chunk, [&](Piece const& piece, Piece const& next) {
    if (job.both.type(piece.index) == DType::f64) {
      ema_chunk(job, piece, next, scratch.get(), tiles.get(), sums);
    } else {
      ema_chunk(job, piece, next, reinterpret_cast<float*>(scratch.get()), tiles.get(), sums);
    }
  });
  write_upper(sums, upper);
}
