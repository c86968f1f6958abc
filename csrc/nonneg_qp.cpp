// Nonnegative quadratic programs, on every device.
#include "fastmtl/nonneg_qp.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Program {
  int n;
  double const* gram;
  double* solution;
  double const* linear;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    int64_t const at = int64_t{group} * n;
    nonneg_qp(team, n, gram + at * n, linear + at, solution + at, memory);
  }
};

Tensor nonneg_qp_op(Tensor matrix, Tensor linear) {
  Gram const gram(matrix);
  std::optional<Tensor> const right = gram.vectors(linear, "linear");
  return gram.solve<Program>(nonneg_qp_workspace, data_of(right));
}

FASTMTL_KERNEL(nonneg_qp, nonneg_qp_op);

}  // namespace
}  // namespace fastmtl
