// The projection of a combination J'u of T gradients onto the dual cone of the gradients (UPGrad, DualProj), from their
// Gram matrix alone: the v that minimises v'Gv over v >= u (elementwise).
//
// With d_i = sqrt(G_ii), C = G / (d d') and m = sum(|u| d), it is v = u + m z / d for the z that solves
//   minimise  1/2 z'Cz - b'z  over z >= 0,   b = -C (d u) / m,
// where all entries of C and b lie in [-1, 1], whatever the scales of gradients and u. A ridge on C and a shift of b
// leave (Gv)_i below zero by at most ridge d_i (m z_i + m / 4), where the specification grants 1e-12 d_i m (1 + sum(z))
// (see fastmtl/ops/dual_cone.py). The ridge makes C definite up to its rounding, the shift keeps out of the support
// what only the rounding of b would let in.
#pragma once

#include <cmath>

#include "fastmtl/finite.h"
#include "fastmtl/nonneg_qp.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Doubles of workspace that dual_cone needs for n tasks.
FASTMTL_HD inline int64_t dual_cone_workspace(int n) { return NonnegQpWork::storage(n) + 2 * int64_t{n}; }

/// Writes the n weights v for the row-major n x n matrix `gram` and the n numbers u of `target`; NaN if either has a
/// non-finite entry. A gradient of length zero keeps v_i = u_i.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void dual_cone(Team const& team, int n, double const* gram, double const* target,
                                                double* weights, double* workspace) {
  bool const finite = all_finite(team, int64_t{n} * n, gram) && all_finite(team, n, target);
  if (!finite) {
    for (int i = team.rank(); i < n; i += team.size()) weights[i] = NAN;
    return;
  }

  NonnegQpWork const work(workspace, n);
  double* const scale = workspace + NonnegQpWork::storage(n);
  double* const linear = scale + n;
  Choice largest{0, 0};
  for (int i = team.rank(); i < n; i += team.size()) largest = lower(largest, {-fabs(target[i]), i});
  double const unit = -team.lowest(largest).value;
  double mass = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    double const square = gram[int64_t{i} * n + i];
    scale[i] = square > 0 ? 1 / sqrt(square) : 0;
    work.scaled[i] = unit > 0 ? target[i] / unit : 0;
    if (square > 0) mass += sqrt(square) * fabs(work.scaled[i]);
  }
  mass = team.sum(mass);
  team.barrier();
  if (!(mass > 0)) {
    for (int i = team.rank(); i < n; i += team.size()) weights[i] = target[i];
    return;
  }
  for (int i = team.rank(); i < n; i += team.size()) {
    double const image = detail::dot(n, gram + int64_t{i} * n, work.scaled);
    linear[i] = -scale[i] * image / mass - 0.25 * kCosineRidge;
  }
  team.barrier();
  solve_cosines(team, n, gram, scale, linear, work);
  for (int i = team.rank(); i < n; i += team.size()) {
    weights[i] = target[i] + work.point[i] * scale[i] * mass * unit;
  }
}

}  // namespace fastmtl
