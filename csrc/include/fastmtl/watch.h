// What a training step must not go on with, remembered by one team: losses, gradients and weights that are not finite,
// and losses that a strategy refuses.
#pragma once

#include <cstdint>

#include "fastmtl/numbers.h"

namespace fastmtl {

/// The numbers of a step, n of each.
struct StepNumbers {
  Numbers losses;
  Numbers squares;
  Numbers weights;
  bool const* refused;
};

/// Sets found_inf, a flag, if anything is bad. What was bad of the first such step is kept in first_bad (5, n): whether
/// loss, its refusal, gradient and weight were, and the losses. steps are the number of this step, which is counted,
/// and of the first bad one.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void watch(Team const& team, int n, StepNumbers const& step, float* found_inf,
                                            int64_t* steps, double* first_bad) {
  double count = 0;
  for (int t = team.rank(); t < n; t += team.size()) {
    bool const bad = !is_finite(step.losses[t]) || (step.refused != nullptr && step.refused[t]) ||
                     (step.squares.data != nullptr && !is_finite(step.squares[t])) ||
                     (step.weights.data != nullptr && !is_finite(step.weights[t]));
    count += bad ? 1 : 0;
  }
  count = team.sum(count);
  bool const fresh = count > 0 && *found_inf == 0;
  for (int t = team.rank(); fresh && t < n; t += team.size()) {
    first_bad[t] = is_finite(step.losses[t]) ? 0 : 1;
    first_bad[n + t] = step.refused != nullptr && step.refused[t] ? 1 : 0;
    first_bad[2 * n + t] = step.squares.data == nullptr || is_finite(step.squares[t]) ? 0 : 1;
    first_bad[3 * n + t] = step.weights.data == nullptr || is_finite(step.weights[t]) ? 0 : 1;
    first_bad[4 * n + t] = step.losses[t];
  }
  team.barrier();
  if (team.rank() == 0) {
    if (fresh) {
      steps[1] = steps[0];
      *found_inf = 1;
    }
    ++steps[0];
  }
}

}  // namespace fastmtl
