// What Nash-MTL and FairGrad share on a GPU: fair weights, warm or cold.
#pragma once

#include "fastmtl/fair.h"
#include "solver.cuh"

namespace fastmtl {

struct Fair {
  int n;
  double power;
  double const* gram;
  double const* warm;
  double* weights;

  template <class Team>
  __device__ void solve(Team const& team, int, double* memory) const {
    fair(team, n, power, gram, warm, weights, memory);
  }
};

inline Tensor fair_cuda(Tensor gram, double power, std::optional<Tensor> warm_start) {
  OnDevice const on(gram);
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  warm_start = dense_vector(on, warm_start, n, "warm_start");
  Tensor weights = on.empty({n});
  launch_solver(on, Fair{n, power, data_of(gram), data_of(warm_start), mutable_data_of(weights)}, n, fair_workspace(n));
  return weights;
}

}  // namespace fastmtl
