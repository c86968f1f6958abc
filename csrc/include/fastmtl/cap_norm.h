// Weights of an update whose norm is limited.
#pragma once

#include "fastmtl/numbers.h"

namespace fastmtl {

/// capped = weights min(1, most / (sqrt(sum_l w_l^T G_l w_l) + 1e-6)), for `count` matrices G_l and vectors w_l.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void cap_norm(Team const& team, int n, int count, double const* gram,
                                               double const* weights, double most, double* capped) {
  double const square = total(team, n * count, [&](int t) {
    double const* const others = weights + t / n * n;
    double image = 0;
    for (int s = 0; s < n; ++s) image += gram[int64_t{t} * n + s] * others[s];
    return weights[t] * image;
  });
  double const scale = most / (sqrt(square > 0 ? square : (square <= 0 ? 0.0 : square)) + 1e-6);
  for (int t = team.rank(); t < n * count; t += team.size()) capped[t] = weights[t] * (scale > 1 ? 1.0 : scale);
}

}  // namespace fastmtl
