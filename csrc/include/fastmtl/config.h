// ConFIG: the weights of the update that has the same cosine with all T gradients and the length of the sum of their
// projections onto it, from their Gram matrix alone.
#pragma once

#include <cmath>

#include "fastmtl/equal_projection.h"
#include "fastmtl/finite.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Doubles of workspace that config needs for n tasks.
FASTMTL_HD inline int64_t config_workspace(int n) { return EqualProjection::storage(n); }

/// Writes the n weights for the row-major n x n matrix `gram`, NaN if it has a non-finite entry, zero where no
/// direction has equal cosines with all gradients.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void config(Team const& team, int n, double const* gram, double* weights,
                                             double* workspace) {
  if (!all_finite(team, int64_t{n} * n, gram)) {
    for (int i = team.rank(); i < n; i += team.size()) weights[i] = NAN;
    return;
  }
  EqualProjection const projection(workspace, n);
  solve_equal_projection(team, n, gram, projection);
  double projected = 0;
  double square = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    if (projection.inverse[i] > 0) projected += sqrt(gram[int64_t{i} * n + i]) * projection.image[i];
    square += projection.weight[i] * projection.image[i];
  }
  projected = team.sum(projected);
  square = team.sum(square);
  for (int i = team.rank(); i < n; i += team.size()) {
    weights[i] = square > 0 ? projection.weight[i] * projection.inverse[i] * (projected / square) : 0;
  }
}

}  // namespace fastmtl
