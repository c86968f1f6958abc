// ConFIG's weights, on every device.
#include "fastmtl/config.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Config {
  int n;
  double const* gram;
  double* weights;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int group, double* memory) const {
    int64_t const at = int64_t{group} * n;
    config(team, n, gram + at * n, weights + at, memory);
  }
};

Tensor config_op(Tensor gram) { return Gram(gram).solve<Config>(config_workspace); }

FASTMTL_KERNEL(config, config_op);

}  // namespace
}  // namespace fastmtl
