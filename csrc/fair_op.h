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

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double* memory) const {
    fair(team, n, power, gram, warm, weights, memory);
  }
};

/// The weights w with G w = w^-power.
inline Tensor fair_op(Tensor const& matrix, double power, std::optional<Tensor> const& warm_start) {
  Gram const gram(matrix);
  std::optional<Tensor> const warm = dense_vector(gram.on, warm_start, gram.n, "warm_start");
  return gram.solve<Fair>(fair_workspace, power, data_of(warm));
}

}  // namespace fastmtl
