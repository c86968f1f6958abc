// IMTL-G's weights on a GPU: one launch of one warp, or of one block where the matrix is larger than a warp.
#include "fastmtl/imtl.h"
#include "register.h"
#include "solver.cuh"

namespace fastmtl {
namespace {

struct Imtl {
  int n;
  double const* gram;
  double* weights;

  template <class Team>
  __device__ void solve(Team const& team, int, double* memory) const {
    imtl(team, n, gram, weights, memory);
  }
};

Tensor imtl_cuda(Tensor gram) { return solve_gram<Imtl>(gram, imtl_workspace); }

FASTMTL_CUDA_KERNEL(imtl, imtl_cuda);

}  // namespace
}  // namespace fastmtl
