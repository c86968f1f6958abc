// ConFIG's weights on a GPU: one launch of one warp, or of one block where the matrix is larger than a warp.
#include "fastmtl/config.h"
#include "register.h"
#include "solver.cuh"

namespace fastmtl {
namespace {

struct Config {
  int n;
  double const* gram;
  double* weights;

  template <class Team>
  __device__ void solve(Team const& team, int, double* memory) const {
    config(team, n, gram, weights, memory);
  }
};

Tensor config_cuda(Tensor gram) { return solve_gram<Config>(gram, config_workspace); }

FASTMTL_CUDA_KERNEL(config, config_cuda);

}  // namespace
}  // namespace fastmtl
