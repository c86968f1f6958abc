// Whether there is anything to solve: one NaN or infinity among the inputs makes every weight NaN.
#pragma once

#include <cfloat>
#include <cmath>

#include "fastmtl/team.h"

namespace fastmtl {

/// Whether none of `count` numbers is NaN or infinite.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD bool all_finite(Team const& team, int64_t count, double const* values) {
  double faults = 0;
  for (int64_t k = team.rank(); k < count; k += team.size()) faults += !(fabs(values[k]) <= DBL_MAX);
  return team.sum(faults) == 0;
}

}  // namespace fastmtl
