// MoCo's rates, and the step by which it learns its weights.
#pragma once

#include "fastmtl/numbers.h"

namespace fastmtl {

/// Counts the step k; then keep = 1 - r and gains_t = r max(losses_t, 0) / (sqrt(squares_t) + 1e-8), r = beta /
/// k^sigma.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void moco_rates(Team const& team, int n, Vector steps, Numbers losses, Numbers squares,
                                                 double beta, double sigma, double* keep, double* gains) {
  double const step = steps[0] + 1;
  team.barrier();
  double const rate = beta / pow(step, sigma);
  for (int t = team.rank(); t < n; t += team.size()) {
    double const loss = losses[t];
    keep[t] = 1 - rate;
    gains[t] = rate * (loss < 0 ? 0 : loss) / (sqrt(squares[t]) + 1e-8);
  }
  if (team.rank() == 0) steps.set(0, step);
}

/// weights = softmax(weights - gamma / k^sigma (P weights + rho weights)) in place and to `copy`; workspace n doubles.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void moco_step(Team const& team, int n, Vector weights, double const* products,
                                                Vector steps, double gamma, double sigma, double rho, Vector copy,
                                                double* moved) {
  double const rate = gamma / pow(steps[0], sigma);
  for (int t = team.rank(); t < n; t += team.size()) {
    double pull = rho * weights[t];
    for (int s = 0; s < n; ++s) pull += products[int64_t{t} * n + s] * weights[s];
    moved[t] = weights[t] - rate * pull;
  }
  team.barrier();
  double const top = largest(team, n, [&](int t) { return moved[t]; });
  double const sum = total(team, n, [&](int t) { return exp(moved[t] - top); });
  for (int t = team.rank(); t < n; t += team.size()) {
    double const weight = exp(moved[t] - top) / sum;
    weights.set(t, weight);
    copy.set(t, weight);
  }
}

inline int64_t moco_workspace(int n) { return n; }

}  // namespace fastmtl
