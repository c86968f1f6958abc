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

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double* memory) const {
    nonneg_qp(team, n, gram, linear, solution, memory);
  }
};

Tensor nonneg_qp_op(Tensor matrix, Tensor linear) {
  Gram const gram(matrix);
  std::optional<Tensor> const right = dense_vector(gram.on, linear, gram.n, "linear");
  return gram.solve<Program>(nonneg_qp_workspace, data_of(right));
}

FASTMTL_KERNEL(nonneg_qp, nonneg_qp_op);

}  // namespace
}  // namespace fastmtl
