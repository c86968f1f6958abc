// The Gram matrix of one slice. Compiled once per instruction set, inside that set's namespace: no include guard.

#include "gram_kernels.h"

template <class Acc>
void add_chunk(const RowTable& rows, const Piece& piece, const Piece& next, Acc* scratch, Tile<float>* tiles,
               Sums& sums) {
  Chunk<Acc> chunk;
  chunk.length = piece.length;
  for (int64_t t = 0; t < rows.num_rows(); ++t) {
    const Row& row = rows.row(t, piece.index);
    if (row.tensor != nullptr) {
      chunk.rows[chunk.count] =
          as(row.data, row.dtype, piece.begin, piece.length, scratch + chunk.count * piece.length);
      chunk.task[chunk.count++] = t;
    }
    const Row& ahead = rows.row(t, next.index);
    if (next.length > 0 && ahead.tensor != nullptr) {
      chunk.next[chunk.num_next++] = span_of(ahead, next.begin, next.length);
    }
  }
  add_products(chunk, sums, tiles);
}

// Writes the upper triangle of the slice's Gram matrix, row by row.
inline void gram_slice(const GramJob& job, const Slice& slice, double* upper) {
  const int64_t num_rows = job.rows.num_rows();
  const auto scratch = std::make_unique_for_overwrite<double[]>(job.converts ? num_rows * job.chunk : 0);
  const auto tiles = std::make_unique_for_overwrite<Tile<float>[]>(num_tiles(num_rows));
  Sums sums(num_rows);
  for_each_chunk_ahead(job.segments, slice, job.chunk, [&](const Piece& piece, const Piece& next) {
    if (job.rows.parameter(piece.index).dtype == DType::f64) {
      add_chunk(job.rows, piece, next, scratch.get(), tiles.get(), sums);
    } else {
      add_chunk(job.rows, piece, next, reinterpret_cast<float*>(scratch.get()), tiles.get(), sums);
    }
  });
  write_upper(sums, upper);
}
