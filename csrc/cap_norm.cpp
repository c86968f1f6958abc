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
  double const* weights;
  double most;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double*) const {
    cap_norm(team, n, gram, weights, most, capped);
  }
};

int64_t no_workspace(int) { return 0; }

Tensor cap_norm_op(Tensor matrix, Tensor weights, double most) {
  Gram const gram(matrix);
  STD_TORCH_CHECK(most > 0, "max_norm must be above 0");
  std::optional<Tensor> const dense_weights = dense_vector(gram.on, weights, gram.n, "weights");
  return gram.solve<CapNorm>(no_workspace, data_of(dense_weights), most);
}

FASTMTL_KERNEL(cap_norm, cap_norm_op);

}  // namespace
}  // namespace fastmtl
