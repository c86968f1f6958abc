// cap_norm, on every device.
#include "fastmtl/cap_norm.h"

#include <optional>

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct CapNorm {
  int n;
  double const* gram;
  double* capped;
  int count;
  double const* weights;
  double most;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double*) const {
    cap_norm(team, n, count, gram, weights, most, capped);
  }
};

Tensor cap_norm_op(Tensor matrix, Tensor weights, double most) {
  Gram const gram(matrix);
  STD_TORCH_CHECK(most > 0, "max_norm must be above 0");
  std::optional<Tensor> const dense_weights = gram.vectors(weights, "weights");
  Tensor capped = gram.room();
  CapNorm const problem{
      gram.n, gram.data(), mutable_data_of(capped), static_cast<int>(gram.count), data_of(dense_weights), most};
  launch_solver(gram.on, problem, gram.n, 0);
  return capped;
}

FASTMTL_KERNEL(cap_norm, cap_norm_op);

}  // namespace
}  // namespace fastmtl
