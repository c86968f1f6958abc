// Projections onto the dual cone of the gradients, on every device, all targets in one launch.
#include "fastmtl/dual_cone.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct DualCone {
  int n;
  int64_t each;  // Targets of each group.
  double const* gram;
  double const* targets;
  double* weights;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int index, double* memory) const {
    int64_t const at = int64_t{index} * n;
    dual_cone(team, n, gram + index / each * n * n, targets + at, weights + at, memory);
  }
};

Tensor dual_cone_op(Tensor matrix, Tensor targets) {
  Gram const gram(matrix);
  int const n = gram.n;
  int64_t const dims = targets.dim() - (gram.grouped ? 1 : 0);
  STD_TORCH_CHECK((dims == 1 || dims == 2) && targets.size(targets.dim() - 1) == n &&
                      (!gram.grouped || targets.size(0) == gram.count),
                  "targets must hold one float per row of gram");
  STD_TORCH_CHECK(is_real_float(targets) && gram.on.holds(targets), "targets must be floats on gram's device");
  targets = dense(gram.on, targets);
  Tensor weights = gram.on.empty(targets.sizes());
  int64_t const count = targets.numel() / n;
  launch_solver(gram.on, DualCone{n, count / gram.count, gram.data(), data_of(targets), mutable_data_of(weights)}, n,
                dual_cone_workspace(n), count);
  return weights;
}

FASTMTL_KERNEL(dual_cone, dual_cone_op);

}  // namespace
}  // namespace fastmtl
