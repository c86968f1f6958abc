// IMTL-G's weights, on every device.
#include "fastmtl/imtl.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Imtl {
  int n;
  double const* gram;
  double* weights;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    int64_t const at = int64_t{group} * n;
    imtl(team, n, gram + at * n, weights + at, memory);
  }
};

Tensor imtl_op(Tensor gram) { return Gram(gram).solve<Imtl>(imtl_workspace); }

FASTMTL_KERNEL(imtl, imtl_op);

}  // namespace
}  // namespace fastmtl
