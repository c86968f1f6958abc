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
  double* update;  // Or null.

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double* memory) const {
    cagrad(team, n, c, gram, weights, memory);
    if (update != nullptr) cagrad_step(team, n, c, gram, weights, update);
  }
};

Tensor solve(Gram const& gram, double c, bool updates) {
  STD_TORCH_CHECK(c >= 0 && c <= DBL_MAX, "c must be finite and at least 0");
  int const n = gram.n;
  Tensor result = updates ? gram.on.empty({2, n}) : gram.on.empty({n});
  double* const weights = mutable_data_of(result);
  launch_solver(gram.on, Cagrad{n, c, gram.data(), weights, updates ? weights + n : nullptr}, n, cagrad_workspace(n));
  return result;
}

Tensor cagrad_op(Tensor gram, double c) { return solve(Gram(gram), c, false); }

Tensor cagrad_update_op(Tensor gram, double c) { return solve(Gram(gram), c, true); }

FASTMTL_KERNEL(cagrad, cagrad_op);
FASTMTL_KERNEL(cagrad_update, cagrad_update_op);

}  // namespace
}  // namespace fastmtl
