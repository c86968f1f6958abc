// The Gram matrix of one slice. Compiled once per instruction set, inside that set's namespace: no include guard.

#include "gram_kernels.h"

template <class Acc>
void add_chunk(RowTable const& rows, Piece const& piece, Piece const& next, Acc* scratch, Tile<float>* tiles,
               Sums& sums) {
  Chunk<Acc> chunk;
  chunk.length = piece.length;
  for (int64_t t = 0; t < rows.num_rows(); ++t) {
    Row const& row = rows.row(t, piece.index);
    if (row.tensor != nullptr) {
      chunk.rows[chunk.count] =
          as(row.data, row.dtype, piece.begin, piece.length, scratch + chunk.count * piece.length);
      chunk.task[chunk.count++] = t;
    }
    Row const& next_row = rows.row(t, next.index);
    if (next.length > 0 && next_row.tensor != nullptr) {
      chunk.next[chunk.num_next++] = span_of(next_row, next.begin, next.length);
    }
  }
  add_products(chunk, sums, tiles);
}

/// Writes the upper triangle of the slice's Gram matrix, row by row.
inline void gram_slice(GramJob const& job, Slice const& slice, double* upper) {
  int64_t const num_rows = job.rows.num_rows();
  auto const scratch = std::make_unique_for_overwrite<double[]>(job.converts ? num_rows * job.chunk : 0);
  auto const tiles = std::make_unique_for_overwrite<Tile<float>[]>(num_tiles(num_rows));
  Sums sums(num_rows);
  for_each_chunk_ahead(job.segments, slice, job.chunk, [&](Piece const& piece, Piece const& next) {
    if (job.rows.parameter(piece.index).dtype == DType::f64) {
      add_chunk(job.rows, piece, next, scratch.get(), tiles.get(), sums);
    } else {
      add_chunk(job.rows, piece, next, reinterpret_cast<float*>(scratch.get()), tiles.get(), sums);
    }
  });
  write_upper(sums, upper);
}
