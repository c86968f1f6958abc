// UPGrad: the mean of the T gradients, each projected onto their dual cone, from the Gram matrix alone.
#pragma once

#include "fastmtl/dual_cone.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Doubles of workspace that upgrad needs for n tasks.
FASTMTL_HD inline int64_t upgrad_workspace(int n) { return int64_t{n} * n + 2 * int64_t{n} + dual_cone_workspace(n); }

/// Writes the n weights for the row-major n x n matrix `gram`, which is divided by its trace, or dropped where that is
/// below `norm_eps`, and gets `reg_eps` added to its diagonal; NaN if it has a non-finite entry.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void upgrad(Team const& team, int n, double norm_eps, double reg_eps,
                                             double const* gram, double* weights, double* workspace) {
  double* const matrix = workspace;
  double* const target = matrix + int64_t{n} * n;
  double* const projected = target + n;
  double* const rest = projected + n;

  double trace = 0;
  for (int i = team.rank(); i < n; i += team.size()) trace += gram[int64_t{i} * n + i];
  trace = team.sum(trace);
  bool const dropped = trace < norm_eps || trace == 0;
  for (int i = team.group(); i < n; i += team.groups()) {
    for (int j = team.lane(); j < n; j += team.lanes()) {
      int64_t const at = int64_t{i} * n + j;
      // A NaN must not be dropped with the rest: 0 times it keeps it.
      matrix[at] = gram[at] * (dropped ? 0 : 1 / trace) + (i == j ? reg_eps : 0);
    }
  }
  for (int i = team.rank(); i < n; i += team.size()) {
    target[i] = 0;
    weights[i] = 0;
  }
  team.barrier();
  for (int t = 0; t < n; ++t) {
    if (team.rank() == 0) target[t] = 1.0 / n;
    team.barrier();
    dual_cone(team, n, matrix, target, projected, rest);
    team.barrier();
    for (int i = team.rank(); i < n; i += team.size()) weights[i] += projected[i];
    if (team.rank() == 0) target[t] = 0;
    team.barrier();
  }
}

}  // namespace fastmtl
