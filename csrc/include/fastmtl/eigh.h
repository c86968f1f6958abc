// Eigenvalues and eigenvectors of a small positive semidefinite matrix, by a team of lanes in float64.
//
// A Cholesky factorisation with pivoting writes the matrix as W'W, W with one row per pivot. Rotations of two rows at a
// time leave W'W as it is; one-sided Jacobi chooses them until all rows are orthogonal (Hestenes), after which row k is
// sqrt(lambda_k) times the k-th eigenvector. Every round rotates disjoint pairs of rows, which meet as in a round-robin
// tournament. The pivoting leaves W nearly sorted and nearly orthogonal, so that a few sweeps do (Veselic and Hari).
#pragma once

#include <cfloat>
#include <cmath>

#include "fastmtl/team.h"

namespace fastmtl {

/// The decomposition diag(c) G diag(c) = sum_k row(k)' row(k) with orthogonal rows, and the memory it is made in.
struct Eigh {
  int size;
  int rank;          // number of rows
  double* rows;      // row k: sqrt(lambda_k) v_k
  double* value;     // lambda_k, in no particular order
  double* diagonal;  // by variable: what the pivots so far leave of the diagonal
  double* rotation;  // by pair: cosine and sine
  double* partial;   // by pair and lane: a part of |p|^2, |q|^2 and p q

  /// Groups have at most that many lanes.
  static constexpr int kMaxLanes = 32;

  FASTMTL_HD static int64_t storage(int size) {
    int64_t const pairs = (int64_t{size} + 1) / 2;
    return int64_t{size} * size + 2 * int64_t{size} + 2 * pairs + 3 * kMaxLanes * pairs;
  }

  FASTMTL_HD Eigh(double* memory, int size) : size(size), rank(0), rows(memory) {
    int const pairs = (size + 1) / 2;
    value = rows + int64_t{size} * size;
    diagonal = value + size;
    rotation = diagonal + size;
    partial = rotation + 2 * pairs;
  }

  FASTMTL_HD double* row(int k) const { return rows + int64_t{k} * size; }
};

namespace detail {

/// Two rows that meet, p < q; q is out of range where p has a bye.
struct Pair {
  int p;
  int q;
};

/// The pair at table `table` in round `round` of a tournament of `players` (even): the last player keeps its seat.
FASTMTL_HD inline Pair meeting(int players, int round, int table) {
  int const circle = players - 1;
  int const one = (round + table) % circle;
  int const other = table == 0 ? circle : (round + circle - table) % circle;
  return one < other ? Pair{one, other} : Pair{other, one};
}

/// Writes the rows of the pivoted Cholesky factor; stops where what is left of the diagonal is rounding.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void pivoted_factor(Team const& team, Eigh& eigh, double const* gram,
                                                     double const* scale) {
  int const n = eigh.size;
  double floor = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    eigh.diagonal[i] = fmax(scale[i] * gram[int64_t{i} * n + i] * scale[i], 0.0);
  }
  for (; eigh.rank < n; ++eigh.rank) {
    Choice pivot{0, n};
    for (int i = team.rank(); i < n; i += team.size()) pivot = lower(pivot, {-eigh.diagonal[i], i});
    pivot = team.lowest(pivot);
    if (eigh.rank == 0) floor = n * DBL_EPSILON * -pivot.value;
    if (!(-pivot.value > floor)) break;
    team.barrier();

    int const chosen = pivot.index;
    double const inverse = 1 / sqrt(-pivot.value);
    double* const row = eigh.row(eigh.rank);
    for (int i = team.rank(); i < n; i += team.size()) {
      row[i] = scale[chosen] * gram[int64_t{chosen} * n + i] * scale[i];
    }
    for (int k = 0; k < eigh.rank; ++k) {
      double const* const earlier = eigh.row(k);
      double const multiplier = earlier[chosen];
      for (int i = team.rank(); i < n; i += team.size()) row[i] -= multiplier * earlier[i];
    }
    for (int i = team.rank(); i < n; i += team.size()) {
      // No row of a semidefinite matrix exceeds the bound; where rounding does, it would grow from pivot to pivot.
      double const bound = sqrt(eigh.diagonal[i]);
      row[i] = i == chosen ? bound : fmax(fmin(row[i] * inverse, bound), -bound);
      eigh.diagonal[i] = i == chosen ? 0 : fmax(eigh.diagonal[i] - row[i] * row[i], 0.0);
    }
    team.barrier();
  }
}

/// Rotates the pairs of one round; returns the number of pairs, as far as this lane saw them, that were not orthogonal.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD double rotate_round(Team const& team, Eigh const& eigh, int round) {
  int const n = eigh.size;
  int const players = eigh.rank + eigh.rank % 2;
  int const pairs = players / 2;
  for (int table = team.group(); table < pairs; table += team.groups()) {
    Pair const pair = meeting(players, round, table);
    if (pair.q >= eigh.rank) continue;
    double const* const p = eigh.row(pair.p);
    double const* const q = eigh.row(pair.q);
    // Two chains of each sum, which a CPU overlaps.
    double pp[2] = {0, 0};
    double qq[2] = {0, 0};
    double pq[2] = {0, 0};
    int i = team.lane();
    for (; i + team.lanes() < n; i += 2 * team.lanes()) {
      for (int chain = 0; chain < 2; ++chain) {
        double const x = p[i + chain * team.lanes()];
        double const y = q[i + chain * team.lanes()];
        pp[chain] += x * x;
        qq[chain] += y * y;
        pq[chain] += x * y;
      }
    }
    if (i < n) {
      pp[0] += p[i] * p[i];
      qq[0] += q[i] * q[i];
      pq[0] += p[i] * q[i];
    }
    double* const part = eigh.partial + 3 * (int64_t{table} * team.lanes() + team.lane());
    part[0] = pp[0] + pp[1];
    part[1] = qq[0] + qq[1];
    part[2] = pq[0] + pq[1];
  }
  team.barrier();

  // Lanes from the size on have nothing.
  int const parts = team.lanes() < n ? team.lanes() : n;
  double rotated = 0;
  for (int table = team.rank(); table < pairs; table += team.size()) {
    if (meeting(players, round, table).q >= eigh.rank) continue;
    double sum[3] = {0, 0, 0};
    for (int lane = 0; lane < parts; ++lane) {
      double const* const part = eigh.partial + 3 * (int64_t{table} * team.lanes() + lane);
      for (int k = 0; k < 3; ++k) sum[k] += part[k];
    }
    double cosine = 1;
    double sine = 0;
    if (fabs(sum[2]) > (n + 8) * DBL_EPSILON * sqrt(sum[0]) * sqrt(sum[1])) {
      double const cotangent = (sum[1] - sum[0]) / (2 * sum[2]);  // of twice the angle
      double const tangent = copysign(1 / (fabs(cotangent) + sqrt(1 + cotangent * cotangent)), cotangent);
      cosine = 1 / sqrt(1 + tangent * tangent);
      sine = cosine * tangent;
      ++rotated;
    }
    eigh.rotation[2 * table] = cosine;
    eigh.rotation[2 * table + 1] = sine;
  }
  team.barrier();

  for (int table = team.group(); table < pairs; table += team.groups()) {
    Pair const pair = meeting(players, round, table);
    double const cosine = eigh.rotation[2 * table];
    double const sine = eigh.rotation[2 * table + 1];
    if (pair.q >= eigh.rank || sine == 0) continue;
    double* const p = eigh.row(pair.p);
    double* const q = eigh.row(pair.q);
    for (int i = team.lane(); i < n; i += team.lanes()) {
      double const x = p[i];
      double const y = q[i];
      p[i] = cosine * x - sine * y;
      q[i] = sine * x + cosine * y;
    }
  }
  team.barrier();
  return rotated;
}

}  // namespace detail

/// Decomposes diag(scale) gram diag(scale), whose entries must be finite. Ends after a bounded number of sweeps.
/// Eigenvalues below the matrix's rounding are left out; a matrix with negative ones is taken as the positive
/// semidefinite one near it that the factorisation finds.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD Eigh solve_eigh(Team const& team, int n, double const* gram, double const* scale,
                                                 double* workspace) {
  Eigh eigh(workspace, n);
  detail::pivoted_factor(team, eigh, gram, scale);
  for (int sweep = 0; sweep < 40; ++sweep) {
    double rotated = 0;
    for (int round = 0; round + 1 < eigh.rank + eigh.rank % 2; ++round) {
      rotated += detail::rotate_round(team, eigh, round);
    }
    if (team.sum(rotated) == 0) break;
  }
  for (int k = team.rank(); k < eigh.rank; k += team.size()) {
    double square = 0;
    for (int i = 0; i < n; ++i) square += eigh.row(k)[i] * eigh.row(k)[i];
    eigh.value[k] = square;
  }
  team.barrier();
  return eigh;
}

}  // namespace fastmtl
