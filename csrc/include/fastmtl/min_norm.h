// The min-norm element of the convex hull of T gradients (MGDA), from their Gram matrix alone.
//
// With d_i = sqrt(G_ii), C = G / (d d') and b = min(d) / d, the weights are w = b y / b'y for the y that solves
//   minimise  1/2 y'(C + b b')y - b'y  over y >= 0:
// along a ray y = t v the minimum over t depends on the norm alone and grows with it. All entries of C, b lie in [-1,
// 1], whatever the scales of the gradients. A ridge on C costs ridge s_i in the optimality condition of task i, where
// the specification grants 1e-12 s_i (see fastmtl/ops/min_norm.py); it makes C definite up to its rounding and, as it
// lowers w'Gw below the solved value by ridge sum((w d)^2), it also pays for the rounding of the solve.
#pragma once

#include <cfloat>
#include <cmath>

#include "fastmtl/nonneg_qp.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// A quarter of what the specification grants, and a thousand times the rounding of C's entries.
constexpr double kMinNormRidge = 0x1p-42;

/// Doubles of workspace that min_norm needs for n tasks.
FASTMTL_HD inline int64_t min_norm_workspace(int n) { return NonnegQpWork::storage(n) + 2 * int64_t{n}; }

/// Writes the n weights for the row-major n x n matrix `gram`, NaN if it has a non-finite entry. `warm` (n weights to
/// start near, or null) changes the time taken, not the accuracy. Gradients of length zero share the weight equally.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void min_norm(Team const& team, int n, double const* gram, double const* warm,
                                               double* weights, double* workspace) {
  double faults = 0;
  double zeros = 0;
  Choice shortest{INFINITY, 0};
  for (int i = team.group(); i < n; i += team.groups()) {
    for (int j = team.lane(); j < n; j += team.lanes()) {
      double const value = gram[int64_t{i} * n + j];
      faults += !(fabs(value) <= DBL_MAX);
      if (i == j) {
        zeros += value <= 0;
        shortest = lower(shortest, {value, i});
      }
    }
  }
  faults = team.sum(faults);
  zeros = team.sum(zeros);
  shortest = team.lowest(shortest);
  if (faults > 0 || zeros > 0) {
    for (int i = team.rank(); i < n; i += team.size()) {
      weights[i] = faults > 0 ? NAN : gram[int64_t{i} * n + i] <= 0 ? 1 / zeros : 0.0;
    }
    return;
  }

  NonnegQpWork const work(workspace, n);
  double* const scale = workspace + NonnegQpWork::storage(n);
  double* const linear = scale + n;
  double const unit = sqrt(shortest.value);
  double warmed = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    scale[i] = 1 / sqrt(gram[int64_t{i} * n + i]);
    linear[i] = unit * scale[i];
    warmed += warm != nullptr && warm[i] > 0;
  }
  warmed = team.sum(warmed);
  int const count = warmed > 0 ? static_cast<int>(warmed) : n;

  for (double rank_one = 1;; rank_one *= 4096) {
    if (team.rank() == 0) {
      for (int i = 0, next = 0; i < n; ++i) {
        if (warmed == 0 || warm[i] > 0) work.support[next++] = i;
      }
    }
    team.barrier();
    NonnegQp const qp{n, gram, scale, linear, rank_one, kMinNormRidge};
    // A Gram matrix with coarse rounding can make C + b b' indefinite; a larger multiple of b b' outweighs that.
    if (solve_nonneg_qp(team, qp, work, count) || rank_one > 1e12) break;
    team.barrier();
  }

  double total = 0;
  for (int i = team.rank(); i < n; i += team.size()) total += work.point[i] * linear[i];
  total = team.sum(total);
  for (int i = team.rank(); i < n; i += team.size()) weights[i] = work.point[i] * linear[i] / total;
}

}  // namespace fastmtl
