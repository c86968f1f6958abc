// IMTL-G: the weights, summing to one, of the combination of T gradients that projects equally onto all of them, from
// their Gram matrix alone.
#pragma once

#include <cmath>

#include "fastmtl/equal_projection.h"
#include "fastmtl/finite.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Doubles of workspace that imtl needs for n tasks.
FASTMTL_HD inline int64_t imtl_workspace(int n) { return EqualProjection::storage(n); }

/// Writes the n weights for the row-major n x n matrix `gram`, NaN if it has a non-finite entry. Where the closed form
/// has no finite sum to divide by, the weights are those of the mean of the unit gradients.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void imtl(Team const& team, int n, double const* gram, double* weights,
                                           double* workspace) {
  if (!all_finite(team, int64_t{n} * n, gram)) {
    for (int i = team.rank(); i < n; i += team.size()) weights[i] = NAN;
    return;
  }
  EqualProjection const projection(workspace, n);
  solve_equal_projection(team, n, gram, projection);
  double sum = 0;
  double mass = 0;
  double even = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    double const weight = projection.weight[i] * projection.inverse[i];
    sum += weight;
    mass += fabs(weight);
    even += projection.inverse[i];
  }
  sum = team.sum(sum);
  mass = team.sum(mass);
  even = team.sum(even);
  bool const solved = fabs(sum) > n * kCosineTolerance * mass;
  for (int i = team.rank(); i < n; i += team.size()) {
    double const fallback = even > 0 ? projection.inverse[i] / even : 1.0 / n;
    weights[i] = solved ? projection.weight[i] * projection.inverse[i] / sum : fallback;
  }
}

}  // namespace fastmtl
