// Aligned-MTL's weights, on every device.
#include "fastmtl/aligned.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Aligned {
  int n;
  double const* gram;
  double* weights;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    int64_t const at = int64_t{group} * n;
    aligned(team, n, gram + at * n, weights + at, memory);
  }
};

Tensor aligned_op(Tensor gram) { return Gram(gram).solve<Aligned>(aligned_workspace); }

FASTMTL_KERNEL(aligned, aligned_op);

}  // namespace
}  // namespace fastmtl
