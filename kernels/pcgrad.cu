// PCGrad's weights on a GPU: one launch of one block, whose warps take a task each.
#include "fastmtl/pcgrad.h"
#include "orders.cuh"
#include "register.h"
#include "solver.cuh"

namespace fastmtl {
namespace {

struct Pcgrad {
  int n;
  int64_t steps;
  double const* gram;
  int64_t const* orders;
  double* weights;

  template <class Team>
  __device__ void solve(Team const& team, int, double* memory) const {
    pcgrad(team, n, steps, gram, orders, weights, memory);
  }
};

Tensor pcgrad_cuda(Tensor gram, Tensor orders) {
  OnDevice const on(gram);
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  orders = dense_orders(on, orders, n);
  Tensor weights = on.empty({n});
  Pcgrad const problem{n, orders.size(1), data_of(gram), static_cast<int64_t const*>(orders.const_data_ptr()),
                       mutable_data_of(weights)};
  launch_surgery(on, problem, n, pcgrad_workspace(n, surgery_groups(n)));
  return weights;
}

FASTMTL_CUDA_KERNEL(pcgrad, pcgrad_cuda);

}  // namespace
}  // namespace fastmtl
