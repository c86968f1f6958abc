// Sums of squares and excess risks, slice by slice. Compiled once per instruction set, inside that set's namespace: no
// include guard.

#include "state_kernels.h"

/// Vectors whose risks are added up one by one before the sum goes to float64.
constexpr int64_t kRiskRun = 32;

/// sums += grad^2; returns the sum of grad^2 / sqrt(sums + epsilon).
template <class Acc>
double add_squares(Acc* sums, Acc const* grad, Acc epsilon, int64_t length) {
  constexpr int64_t width = kLanes<Acc>;
  double risk = 0;
  int64_t at = 0;
  while (at + width <= length) {
    Vec<Acc> part{};
    int64_t const stop = at + std::min((length - at) / width, kRiskRun) * width;
    for (; at < stop; at += width) {
      Vec<Acc> const value = load<Acc>(grad + at);
      Vec<Acc> const square = value * value;
      Vec<Acc> const total = load<Acc>(sums + at) + square;
      store(sums + at, total);
      part += square / sqrt(total + epsilon);
    }
    for (int64_t lane = 0; lane < width; ++lane) risk += part[lane];
  }
  for (; at < length; ++at) {
    Acc const square = grad[at] * grad[at];
    sums[at] += square;
    risk += square / std::sqrt(sums[at] + epsilon);
  }
  return risk;
}

/// The same where the state has another type: what counts is what it then holds.
template <class Acc>
double add_squares_to(Row const& state, Acc const* grad, Acc epsilon, int64_t begin, int64_t length, Acc* scratch) {
  Acc* const sums = borrow(state, begin, length, scratch);
  if (is_type<Acc>(state.dtype)) return add_squares(sums, grad, epsilon, length);
  for (int64_t i = 0; i < length; ++i) sums[i] += grad[i] * grad[i];
  give_back(state, begin, length, sums);
  double risk = 0;
  for (int64_t i = 0; i < length; ++i) risk += grad[i] * grad[i] / std::sqrt(sums[i] + epsilon);
  return risk;
}

template <class Acc>
void risk_chunk(RiskJob const& job, Piece const& piece, Acc* scratch, double* risks) {
  auto const [k, begin, length] = piece;
  for (int64_t t = 0; t < job.both.rows.num_rows(); ++t) {
    Row const& row = job.both.rows.row(t, k);
    if (row.tensor == nullptr) continue;
    Acc const* const grad = as(row.data, row.dtype, begin, length, scratch);
    auto const epsilon = static_cast<Acc>(job.epsilon);
    risks[t] += add_squares_to(job.both.state.row(t, k), grad, epsilon, begin, length, scratch + length);
  }
}

inline void risk_slice(RiskJob const& job, Slice const& slice, double* risks) {
  auto const scratch = std::make_unique_for_overwrite<double[]>(job.both.converts ? 2 * kRiskChunk : 0);
  for_each_chunk(job.both.segments, slice, kRiskChunk, [&](Piece const& piece) {
    if (job.both.type(piece.index) == DType::f64) {
      risk_chunk(job, piece, scratch.get(), risks);
    } else {
      risk_chunk(job, piece, reinterpret_cast<float*>(scratch.get()), risks);
    }
  });
}
