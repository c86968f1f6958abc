// The min-norm solver, on every device.
#include "fastmtl/min_norm.h"

#include <optional>

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct MinNorm {
  int n;
  double const* gram;
  double* weights;
  double const* warm;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    int64_t const at = int64_t{group} * n;
    min_norm(team, n, gram + at * n, warm == nullptr ? nullptr : warm + at, weights + at, memory);
  }
};

Tensor min_norm_op(Tensor matrix, std::optional<Tensor> warm_start) {
  Gram const gram(matrix);
  std::optional<Tensor> const warm = gram.vectors(warm_start, "warm_start");
  return gram.solve<MinNorm>(min_norm_workspace, data_of(warm));
}

FASTMTL_KERNEL(min_norm, min_norm_op);

}  // namespace
}  // namespace fastmtl
