// Weights of an update whose norm is limited.
#pragma once

#include "fastmtl/numbers.h"

namespace fastmtl {

/// capped = weights min(1, most / (sqrt(w^T G w) + 1e-6)).
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void cap_norm(Team const& team, int n, double const* gram, double const* weights,
                                               double most, double* capped) {
  double const square = total(team, n, [&](int t) {
    double image = 0;
    for (int s = 0; s < n; ++s) image += gram[int64_t{t} * n + s] * weights[s];
    return weights[t] * image;
  });
  double const scale = most / (sqrt(square > 0 ? square : (square <= 0 ? 0.0 : square)) + 1e-6);
  for (int t = team.rank(); t < n; t += team.size()) capped[t] = weights[t] * (scale > 1 ? 1.0 : scale);
}

}  // namespace fastmtl
