// PCGrad from the Gram matrix alone: where a task's gradient conflicts with another one, it is projected onto the plane
// that is normal to the other.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastmtl/surgery.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Doubles of workspace that pcgrad needs for n tasks and a team of `groups` groups.
FASTMTL_HD inline int64_t pcgrad_workspace(int n, int groups) { return SurgeryWork::storage(n, groups); }

/// Writes the n weights for the symmetric n x n matrix `gram`, NaN if it has a non-finite entry. Row i of `orders`
/// (n x steps) names the tasks that gradient i is projected against, first to last; what is no task is passed over.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void pcgrad(Team const& team, int n, int64_t steps, double const* gram,
                                             int64_t const* orders, double* weights, double* workspace) {
  if (surgery::count_faults(team, n, gram) > 0) {
    for (int i = team.rank(); i < n; i += team.size()) weights[i] = NAN;
    return;
  }
  SurgeryWork const work(workspace, n, team.group(), team.groups());
  surgery::clear(team, n, work);
  // A group without a task in the last round keeps the others company at the barriers.
  for (int first = 0; first < n; first += team.groups()) {
    int const i = first + team.group();
    if (i < n) surgery::begin(team, n, gram, i, work);
    team.barrier();
    for (int64_t step = 0; step < steps; ++step) {
      int64_t const j = i < n ? orders[i * steps + step] : -1;
      double amount = 0;
      if (j >= 0 && j < n && work.image[j] < 0) {
        double const square = gram[j * n + j];
        if (square > 0) amount = -work.image[j] / square;
      }
      team.barrier();
      if (amount > 0) surgery::add(team, n, gram, static_cast<int>(j), amount, work);
      team.barrier();
    }
  }
  surgery::finish(team, n, work, weights);
}

}  // namespace fastmtl
