// PCGrad's weights, on every device, all groups of parameters in one launch.
#include "fastmtl/pcgrad.h"

#include "orders.h"
#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Pcgrad {
  int n;
  int64_t steps;
  double const* gram;
  int64_t const* orders;
  double* weights;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    int64_t const at = int64_t{group} * n;
    pcgrad(team, n, steps, gram + at * n, orders, weights + at, memory);
  }
};

Tensor pcgrad_op(Tensor matrix, Tensor orders) {
  Gram const gram(matrix);
  int const n = gram.n;
  Orders const visits = dense_orders(gram.on, orders, n);
  Tensor weights = gram.room();
  launch_surgery(gram.on, Pcgrad{n, visits.steps, gram.data(), visits.data, mutable_data_of(weights)}, n,
                 pcgrad_workspace(n, surgery_groups(gram.on, n)), gram.count);
  return weights;
}

FASTMTL_KERNEL(pcgrad, pcgrad_op);

}  // namespace
}  // namespace fastmtl
