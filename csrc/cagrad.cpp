// CAGrad's weights, and the weights of its update, on every device.
#include "fastmtl/cagrad.h"

#include <cfloat>

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Cagrad {
  int n;
  double c;
  double const* gram;
  double* weights;
  bool updates;  // Whether the update's coefficients follow the weights.

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    double const* const matrix = gram + int64_t{group} * n * n;
    double* const result = weights + int64_t{group} * n * (updates ? 2 : 1);
    cagrad(team, n, c, matrix, result, memory);
    if (updates) cagrad_step(team, n, c, matrix, result, result + n);
  }
};

Tensor solve(Gram const& gram, double c, bool updates) {
  STD_TORCH_CHECK(c >= 0 && c <= DBL_MAX, "c must be finite and at least 0");
  int const n = gram.n;
  Tensor result = !updates ? gram.room() : gram.grouped ? gram.on.empty({gram.count, 2, n}) : gram.on.empty({2, n});
  launch_solver(gram.on, Cagrad{n, c, gram.data(), mutable_data_of(result), updates}, n, cagrad_workspace(n),
                gram.count);
  return result;
}

Tensor cagrad_op(Tensor gram, double c) { return solve(Gram(gram), c, false); }

Tensor cagrad_update_op(Tensor gram, double c) { return solve(Gram(gram), c, true); }

FASTMTL_KERNEL(cagrad, cagrad_op);
FASTMTL_KERNEL(cagrad_update, cagrad_update_op);

}  // namespace
}  // namespace fastmtl
