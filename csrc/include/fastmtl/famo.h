// FAMO's weights, and the step of Adam by which it learns their logits.
#pragma once

#include "fastmtl/numbers.h"

namespace fastmtl {

constexpr double kFamoTiny = 1e-8;

/// weights_t = z_t / (D_t + 1e-8) over their sum, with z = softmax(logits) and D = losses - least. A task whose D is
/// below `smallest` has weight 0 and no part in the sum.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void famo_weights(Team const& team, int n, Numbers logits, Numbers losses,
                                                   Numbers least, double smallest, Vector weights) {
  double const top = largest(team, n, [&](int t) { return logits[t]; });
  auto const share = [&](int t) {
    double const excess = losses[t] - least[t];
    return excess >= smallest ? exp(logits[t] - top) / (excess + kFamoTiny) : 0.0;
  };
  double const sum = total(team, n, share);
  for (int t = team.rank(); t < n; t += team.size()) weights.set(t, share(t) / (sum > 0 ? sum : 1));
}

struct FamoState {
  Vector logits;
  Vector first;
  Vector second;
  Vector steps;
};

/// One step of Adam on the logits, against the gradient z_t (f_t - sum_s z_s f_s) + decay logits_t, where
/// f = log(before - least + 1e-8) - log(max(after - least, 0) + 1e-8). Tasks whose D was below `smallest` before take
/// no part: z leaves them out, and their logits and moments stay.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void famo_step(Team const& team, int n, FamoState const& state, Numbers before,
                                                Numbers after, Numbers least, double smallest, double lr,
                                                double decay) {
  constexpr double beta1 = 0.9;
  constexpr double beta2 = 0.999;
  auto const known = [&](int t) { return before[t] - least[t] >= smallest; };
  double const top = largest(team, n, [&](int t) { return known(t) ? state.logits[t] : -INFINITY; });
  auto const size = [&](int t) { return known(t) ? exp(state.logits[t] - top) : 0.0; };
  auto const fall = [&](int t) {
    double const excess = after[t] - least[t];
    // NaN stays NaN.
    return log(before[t] - least[t] + kFamoTiny) - log((excess < 0 ? 0 : excess) + kFamoTiny);
  };
  double const sum = total(team, n, size);
  double const mean = total(team, n, [&](int t) { return known(t) ? size(t) * fall(t) : 0.0; }) / (sum > 0 ? sum : 1);
  double const steps = state.steps[0] + 1;
  team.barrier();
  double const grown1 = 1 - pow(beta1, steps);
  double const grown2 = 1 - pow(beta2, steps);
  for (int t = team.rank(); t < n; t += team.size()) {
    if (!known(t)) continue;
    double const logit = state.logits[t];
    double const grad = size(t) / sum * (fall(t) - mean) + decay * logit;
    double const first = state.first[t] + (1 - beta1) * (grad - state.first[t]);
    double const second = state.second[t] + (1 - beta2) * (grad * grad - state.second[t]);
    state.first.set(t, first);
    state.second.set(t, second);
    state.logits.set(t, logit - lr * first / grown1 / (sqrt(second / grown2) + 1e-8));
  }
  if (team.rank() == 0) state.steps.set(0, steps);
}

}  // namespace fastmtl
