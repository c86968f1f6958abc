// Projections onto the dual cone of the gradients on a GPU: one launch, a warp or a block for each target.
#include "fastmtl/dual_cone.h"
#include "register.h"
#include "solver.cuh"

namespace fastmtl {
namespace {

struct DualCone {
  int n;
  double const* gram;
  double const* targets;
  double* weights;

  template <class Team>
  __device__ void solve(Team const& team, int index, double* memory) const {
    dual_cone(team, n, gram, targets + int64_t{index} * n, weights + int64_t{index} * n, memory);
  }
};

Tensor dual_cone_cuda(Tensor gram, Tensor targets) {
  OnDevice const on(gram);
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  int64_t const dims = targets.dim();
  STD_TORCH_CHECK(
      is_real_float(targets) && on.holds(targets) && (dims == 1 || dims == 2) && targets.size(dims - 1) == n,
      "targets must hold one float per row of gram, on its device");
  targets = dense_double(targets);
  Tensor weights = on.empty(targets.sizes());
  launch_solver(on, DualCone{n, data_of(gram), data_of(targets), mutable_data_of(weights)}, n, dual_cone_workspace(n),
                targets.numel() / n);
  return weights;
}

FASTMTL_CUDA_KERNEL(dual_cone, dual_cone_cuda);

}  // namespace
}  // namespace fastmtl
