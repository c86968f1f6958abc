// What the ops of Nash-MTL and FairGrad share: fair weights, from a warm or a cold start.
#pragma once

#include <optional>

#include "fastmtl/fair.h"
#include "solver.h"

namespace fastmtl {

struct Fair {
  int n;
  double const* gram;
  double* weights;
  double power;
  double const* warm;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    int64_t const at = int64_t{group} * n;
    fair(team, n, power, gram + at * n, warm == nullptr ? nullptr : warm + at, weights + at, memory);
  }
};

/// The weights w with G w = w^-power.
inline Tensor fair_op(Tensor const& matrix, double power, std::optional<Tensor> const& warm_start) {
  Gram const gram(matrix);
  std::optional<Tensor> const warm = gram.vectors(warm_start, "warm_start");
  return gram.solve<Fair>(fair_workspace, power, data_of(warm));
}

}  // namespace fastmtl
