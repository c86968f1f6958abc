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

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double* memory) const {
    imtl(team, n, gram, weights, memory);
  }
};

Tensor imtl_op(Tensor gram) { return Gram(gram).solve<Imtl>(imtl_workspace); }

FASTMTL_KERNEL(imtl, imtl_op);

}  // namespace
}  // namespace fastmtl
