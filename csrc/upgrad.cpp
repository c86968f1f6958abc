// UPGrad's weights on the CPU; on a GPU every gradient is projected by a team of its own.
#include "fastmtl/upgrad.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Upgrad {
  int n;
  double const* gram;
  double* weights;
  double norm_eps;
  double reg_eps;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    int64_t const at = int64_t{group} * n;
    upgrad(team, n, norm_eps, reg_eps, gram + at * n, weights + at, memory);
  }
};

Tensor upgrad_op(Tensor gram, double norm_eps, double reg_eps) {
  STD_TORCH_CHECK(norm_eps >= 0 && reg_eps >= 0, "norm_eps and reg_eps must be at least 0");
  return Gram(gram).solve<Upgrad>(upgrad_workspace, norm_eps, reg_eps);
}

FASTMTL_KERNEL(upgrad, upgrad_op);

}  // namespace
}  // namespace fastmtl
