// Gradient Vaccine's weights, on every device, all groups of parameters in one launch.
#include "fastmtl/gradvac.h"

#include <tuple>

#include "orders.h"
#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Gradvac {
  int n;
  int64_t steps;
  double const* gram;
  int64_t const* orders;
  double beta;
  double* rho;
  double* weights;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    int64_t const at = int64_t{group} * n;
    gradvac(team, n, steps, gram + at * n, orders, beta, rho + at * n, weights + at, memory);
  }
};

std::tuple<Tensor, Tensor> gradvac_op(Tensor gram, Tensor orders, Tensor rho, double beta) {
  Place const on(gram);
  int64_t const dims = gram.dim();
  bool const single = dims == 2;
  STD_TORCH_CHECK(
      (single || dims == 3) && gram.size(dims - 1) == gram.size(dims - 2) && gram.numel() > 0 && is_real_float(gram),
      "gram must be (T, T) or (L, T, T) floats");
  STD_TORCH_CHECK(on.holds(rho) && is_real_float(rho) && rho.sizes().equals(gram.sizes()),
                  "rho must hold one float per entry of gram, on its device");
  STD_TORCH_CHECK(beta >= 0 && beta <= 1, "beta must be in [0, 1]");
  gram = dense(on, gram);
  int const n = static_cast<int>(gram.size(dims - 1));
  Orders const visits = dense_orders(on, orders, n);
  int64_t const groups = single ? 1 : gram.size(0);
  Tensor new_rho = on.empty(gram.sizes());
  torch::stable::copy_(new_rho, rho);
  Tensor weights = single ? on.empty({n}) : on.empty({groups, n});
  Gradvac const problem{
      n, visits.steps, data_of(gram), visits.data, beta, mutable_data_of(new_rho), mutable_data_of(weights)};
  launch_surgery(on, problem, n, gradvac_workspace(n, surgery_groups(on, n)), groups);
  return {weights, new_rho};
}

FASTMTL_KERNEL(gradvac, gradvac_op);

}  // namespace
}  // namespace fastmtl
