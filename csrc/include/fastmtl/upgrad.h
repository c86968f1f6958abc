// UPGrad: the mean of the T gradients, each projected onto their dual cone, from the Gram matrix alone.
#pragma once

#include "fastmtl/dual_cone.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Doubles of workspace that upgrad_project needs for n tasks.
FASTMTL_HD inline int64_t upgrad_project_workspace(int n) { return n + dual_cone_workspace(n); }

/// Doubles of workspace that upgrad needs for n tasks.
FASTMTL_HD inline int64_t upgrad_workspace(int n) { return int64_t{n} * n + n + upgrad_project_workspace(n); }

/// Writes the row-major n x n matrix in whose dual cone UPGrad projects: `gram` divided by its trace, or dropped where
/// that is below `norm_eps`, with `reg_eps` added to the diagonal.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void upgrad_matrix(Team const& team, int n, double norm_eps, double reg_eps,
                                                    double const* gram, double* matrix) {
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
  team.barrier();
}

/// Writes the n weights of the projection of gradient `task`, over n.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void upgrad_project(Team const& team, int n, int task, double const* matrix,
                                                     double* projected, double* workspace) {
  double* const target = workspace;
  for (int i = team.rank(); i < n; i += team.size()) target[i] = i == task ? 1.0 / n : 0;
  team.barrier();
  dual_cone(team, n, matrix, target, projected, target + n);
  team.barrier();
}

/// Writes the n weights for the row-major n x n matrix `gram`, NaN if it has a non-finite entry; see upgrad_matrix.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void upgrad(Team const& team, int n, double norm_eps, double reg_eps,
                                             double const* gram, double* weights, double* workspace) {
  double* const matrix = workspace;
  double* const projected = matrix + int64_t{n} * n;
  upgrad_matrix(team, n, norm_eps, reg_eps, gram, matrix);
  for (int task = 0; task < n; ++task) {
    upgrad_project(team, n, task, matrix, projected, projected + n);
    // Each lane reads back only what it wrote.
    for (int i = team.rank(); i < n; i += team.size()) weights[i] = (task == 0 ? 0 : weights[i]) + projected[i];
  }
}

}  // namespace fastmtl
