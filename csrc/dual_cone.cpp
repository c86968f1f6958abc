// Projections onto the dual cone of the gradients, on every device, all targets in one launch.
#include "fastmtl/dual_cone.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct DualCone {
  int n;
  double const* gram;
  double const* targets;
  double* weights;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int index, double* memory) const {
    dual_cone(team, n, gram, targets + int64_t{index} * n, weights + int64_t{index} * n, memory);
  }
};

Tensor dual_cone_op(Tensor matrix, Tensor targets) {
  Gram const gram(matrix);
  int const n = gram.n;
  int64_t const dims = targets.dim();
  STD_TORCH_CHECK(
      is_real_float(targets) && gram.on.holds(targets) && (dims == 1 || dims == 2) && targets.size(dims - 1) == n,
      "targets must hold one float per row of gram, on its device");
  targets = dense(gram.on, targets);
  Tensor weights = gram.on.empty(targets.sizes());
  launch_solver(gram.on, DualCone{n, gram.data(), data_of(targets), mutable_data_of(weights)}, n,
                dual_cone_workspace(n), targets.numel() / n);
  return weights;
}

FASTMTL_KERNEL(dual_cone, dual_cone_op);

}  // namespace
}  // namespace fastmtl
