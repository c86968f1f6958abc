// Small quadratic programs over the nonnegative orthant, by a primal active-set method and a team of lanes.
//
//   minimise  1/2 y'Ay - b'y  over y >= 0,   A = diag(c) G diag(c) + rank_one b b' + ridge I
//
// The support (where y may be positive) is kept with the Cholesky factor of A on it. A variable outside it whose
// gradient promises descent enters along the curve on which the support stays stationary; a variable that reaches zero
// on the way leaves. Every step lowers the objective, so the last iterate is the best one, whenever the method stops.
// A need not be positive semidefinite: where the curve bends down (rounding in G), it is followed to the boundary.
#pragma once

#include <cfloat>
#include <cmath>

#include "fastmtl/cholesky.h"
#include "fastmtl/finite.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// One program. `scale` (c) makes the diagonal of diag(c) G diag(c) one; the ridge is far above the rounding of such a
/// matrix's factor and as far below what the caller's accuracy needs.
struct NonnegQp {
  int size;
  double const* gram;
  double const* scale;
  double const* linear;
  double rank_one;
  double ridge;

  FASTMTL_HD double entry(int i, int j) const {
    double const scaled = scale[i] * gram[int64_t{i} * size + j] * scale[j];
    return scaled + rank_one * linear[i] * linear[j] + (i == j ? ridge : 0.0);
  }
  /// Pivots at or below it are rounding: no curvature.
  FASTMTL_HD double floor() const { return 0.5 * ridge; }
};

/// Memory of the method; all vectors have `size` entries.
struct NonnegQpWork {
  PackedLower factor;
  double* point;     // y, by variable
  double* scaled;    // c y, by variable
  double* gradient;  // b - Ay, by variable
  double* step;      // by position in the support
  double* row;       // by position in the support
  int* support;      // the variables of the support, in the factor's order
  int* member;       // by variable: 1 in the support, else 0

  static constexpr int kVectors = 6;  // two int vectors count as one

  FASTMTL_HD static int64_t storage(int size) { return PackedLower::storage(size) + int64_t{kVectors} * size; }

  FASTMTL_HD NonnegQpWork(double* memory, int size) : factor{memory, size} {
    point = memory + PackedLower::storage(size);
    scaled = point + size;
    gradient = scaled + size;
    step = gradient + size;
    row = step + size;
    support = reinterpret_cast<int*>(row + size);
    member = support + size;
  }
};

namespace detail {

/// Sum of x_j y_j in four chains, which a CPU overlaps.
FASTMTL_HD inline double dot(int size, double const* x, double const* y) {
  double chain[4] = {0, 0, 0, 0};
  int j = 0;
  for (; j + 4 <= size; j += 4) {
    for (int lane = 0; lane < 4; ++lane) chain[lane] += x[j + lane] * y[j + lane];
  }
  for (; j < size; ++j) chain[0] += x[j] * y[j];
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

/// Chooses the first point: solves on the given support, leaving out what turns out negative until nothing does.
/// Returns the size of the support.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD int start(Team const& team, NonnegQp const& qp, NonnegQpWork const& work, int count) {
  for (;;) {
    for (int c = team.group(); c < count; c += team.groups()) {
      double* const column = work.factor.column(c);
      for (int r = c + team.lane(); r < count; r += team.lanes()) {
        column[r] = qp.entry(work.support[r], work.support[c]);
      }
    }
    for (int p = team.rank(); p < count; p += team.size()) work.step[p] = qp.linear[work.support[p]];
    team.barrier();
    count = factor(team, work.factor, count, qp.floor());
    solve_lower(team, work.factor, count, work.step);
    solve_upper(team, work.factor, count, work.step);
    double kept = 0;
    for (int p = team.rank(); p < count; p += team.size()) kept += work.step[p] > 0;
    kept = team.sum(kept);
    if (kept == count) break;
    if (team.rank() == 0) {
      for (int p = 0, next = 0; p < count; ++p) {
        if (work.step[p] > 0) work.support[next++] = work.support[p];
      }
    }
    team.barrier();
    count = static_cast<int>(kept);
  }
  for (int i = team.rank(); i < qp.size; i += team.size()) {
    work.point[i] = 0;
    work.member[i] = 0;
  }
  team.barrier();
  for (int p = team.rank(); p < count; p += team.size()) {
    work.point[work.support[p]] = work.step[p];
    work.member[work.support[p]] = 1;
  }
  team.barrier();
  return count;
}

/// gradient <- b - Ay; returns the sum of y, the scale of its rounding.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD double residual(Team const& team, NonnegQp const& qp, NonnegQpWork const& work) {
  double mass = 0;
  double share = 0;
  for (int i = team.rank(); i < qp.size; i += team.size()) {
    work.scaled[i] = qp.scale[i] * work.point[i];
    mass += work.point[i];
    share += qp.linear[i] * work.point[i];
  }
  mass = team.sum(mass);
  share = team.sum(share);
  team.barrier();
  for (int i = team.rank(); i < qp.size; i += team.size()) {
    double const image = qp.scale[i] * dot(qp.size, qp.gram + int64_t{i} * qp.size, work.scaled);
    work.gradient[i] = qp.linear[i] * (1 - qp.rank_one * share) - qp.ridge * work.point[i] - image;
  }
  team.barrier();
  return mass;
}

/// Takes the variable at `position` out of the support.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void leave(Team const& team, NonnegQpWork const& work, int& count, int position) {
  remove_row(team, work.factor, count, position);
  if (team.rank() == 0) {
    work.point[work.support[position]] = 0;
    work.member[work.support[position]] = 0;
    for (int p = position; p + 1 < count; ++p) work.support[p] = work.support[p + 1];
  }
  --count;
  team.barrier();
}

/// Brings the gradient on the support down to rounding by iterative refinement; what would turn negative leaves.
/// Returns the sum of y.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD double polish(Team const& team, NonnegQp const& qp, NonnegQpWork const& work,
                                               int& count) {
  int attempts = 3;
  for (;;) {
    double const mass = residual(team, qp, work);
    Choice steepest{0, 0};
    for (int p = team.rank(); p < count; p += team.size()) {
      work.step[p] = work.gradient[work.support[p]];
      steepest = lower(steepest, {-fabs(work.step[p]), p});
    }
    steepest = team.lowest(steepest);
    team.barrier();
    if (attempts == 0 || -steepest.value <= 4 * DBL_EPSILON * mass) return mass;
    --attempts;

    solve_lower(team, work.factor, count, work.step);
    solve_upper(team, work.factor, count, work.step);
    Choice blocking{1, count};
    for (int p = team.rank(); p < count; p += team.size()) {
      if (work.step[p] < 0) blocking = lower(blocking, {work.point[work.support[p]] / -work.step[p], p});
    }
    blocking = team.lowest(blocking);
    for (int p = team.rank(); p < count; p += team.size()) {
      double& value = work.point[work.support[p]];
      value = fmax(value + blocking.value * work.step[p], 0.0);
    }
    team.barrier();
    if (blocking.index < count) {
      leave(team, work, count, blocking.index);
      attempts = 3;
    }
  }
}

/// Moves variable `entering` into the support. Returns false where the objective falls without bound on the way.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD bool enter(Team const& team, NonnegQp const& qp, NonnegQpWork const& work, int& count,
                                            int entering, double slope) {
  for (;;) {
    for (int p = team.rank(); p < count; p += team.size()) work.row[p] = qp.entry(work.support[p], entering);
    team.barrier();
    solve_lower(team, work.factor, count, work.row);
    double square = 0;
    for (int p = team.rank(); p < count; p += team.size()) {
      work.step[p] = work.row[p];
      square += work.row[p] * work.row[p];
    }
    double const pivot = qp.entry(entering, entering) - team.sum(square);
    team.barrier();
    solve_upper(team, work.factor, count, work.step);

    double const full = pivot > qp.floor() ? slope / pivot : INFINITY;
    Choice blocking{full, count};
    for (int p = team.rank(); p < count; p += team.size()) {
      if (work.step[p] > 0) blocking = lower(blocking, {work.point[work.support[p]] / work.step[p], p});
    }
    blocking = team.lowest(blocking);
    double const length = blocking.value;
    if (!(length < INFINITY)) return false;
    for (int p = team.rank(); p < count; p += team.size()) {
      double& value = work.point[work.support[p]];
      value = fmax(value - length * work.step[p], 0.0);
    }
    if (team.rank() == 0) work.point[entering] += length;
    team.barrier();
    if (blocking.index == count) {
      append_row(team, work.factor, count, work.row, pivot);
      if (team.rank() == 0) {
        work.support[count] = entering;
        work.member[entering] = 1;
      }
      team.barrier();
      ++count;
      return true;
    }
    leave(team, work, count, blocking.index);
    slope -= length * pivot;
  }
}

}  // namespace detail

/// Leaves the minimiser in work.point. The first `count` entries of work.support are the variables to start with.
/// Ends after a bounded number of steps; at the end, up to rounding, b - Ay is zero where y > 0 and elsewhere at most
/// ridge/4 sum(y). Returns false where A is so far from positive semidefinite that the objective has no minimum.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD bool solve_nonneg_qp(Team const& team, NonnegQp const& qp, NonnegQpWork const& work,
                                                      int count) {
  count = detail::start(team, qp, work, count);
  for (int left = 8 * qp.size + 32;; --left) {
    double const mass = detail::polish(team, qp, work, count);
    Choice entering{-0.25 * qp.ridge * mass, qp.size};
    for (int i = team.rank(); i < qp.size; i += team.size()) {
      if (!work.member[i]) entering = lower(entering, {-work.gradient[i], i});
    }
    entering = team.lowest(entering);
    if (entering.index == qp.size || left == 0) return true;
    if (!detail::enter(team, qp, work, count, entering.index, -entering.value)) return false;
  }
}

/// The ridge of programs over cosines with a right side in [-1, 1]: a quarter of what their specifications grant, and a
/// thousand times the rounding of the matrix's entries.
constexpr double kCosineRidge = 0x1p-42;

/// Leaves the minimiser for the cosines of G and `linear` in work.point, starting where `linear` is positive.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve_cosines(Team const& team, int n, double const* gram, double const* scale,
                                                    double const* linear, NonnegQpWork const& work) {
  double rising = 0;
  for (int i = team.rank(); i < n; i += team.size()) rising += linear[i] > 0;
  int const count = static_cast<int>(team.sum(rising));
  // A Gram matrix with coarse rounding can make the cosines indefinite; a larger ridge outweighs that.
  for (double ridge = kCosineRidge;; ridge *= 64) {
    if (team.rank() == 0) {
      for (int i = 0, next = 0; i < n; ++i) {
        if (linear[i] > 0) work.support[next++] = i;
      }
    }
    team.barrier();
    NonnegQp const qp{n, gram, scale, linear, 0, ridge};
    if (solve_nonneg_qp(team, qp, work, count) || ridge > n) return;
    team.barrier();
  }
}

/// Doubles of workspace that nonneg_qp needs for n variables.
FASTMTL_HD inline int64_t nonneg_qp_workspace(int n) { return NonnegQpWork::storage(n) + 2 * int64_t{n}; }

/// Writes the n numbers y >= 0 that minimise 1/2 y'Gy - b'y for the row-major n x n matrix `gram` and the n numbers b
/// of `linear`; NaN if either has a non-finite entry. A variable whose diagonal entry is zero stays zero.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void nonneg_qp(Team const& team, int n, double const* gram, double const* linear,
                                                double* solution, double* workspace) {
  bool const finite = all_finite(team, int64_t{n} * n, gram) && all_finite(team, n, linear);
  if (!finite) {
    for (int i = team.rank(); i < n; i += team.size()) solution[i] = NAN;
    return;
  }

  NonnegQpWork const work(workspace, n);
  double* const scale = workspace + NonnegQpWork::storage(n);
  double* const scaled = scale + n;
  Choice largest{0, 0};
  for (int i = team.rank(); i < n; i += team.size()) {
    double const square = gram[int64_t{i} * n + i];
    scale[i] = square > 0 ? 1 / sqrt(square) : 0;
    largest = lower(largest, {-fabs(linear[i] * scale[i]), i});
  }
  double const unit = -team.lowest(largest).value;
  for (int i = team.rank(); i < n; i += team.size()) scaled[i] = unit > 0 ? linear[i] * scale[i] / unit : 0;
  team.barrier();
  solve_cosines(team, n, gram, scale, scaled, work);
  for (int i = team.rank(); i < n; i += team.size()) solution[i] = work.point[i] * scale[i] * unit;
}

}  // namespace fastmtl
