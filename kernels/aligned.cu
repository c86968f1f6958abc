// Aligned-MTL's weights on a GPU: one launch of one warp, or of one block where the matrix is larger than a warp.
#include "fastmtl/aligned.h"
#include "register.h"
#include "solver.cuh"

namespace fastmtl {
namespace {

struct Aligned {
  int n;
  double const* gram;
  double* weights;

  template <class Team>
  __device__ void solve(Team const& team, int, double* memory) const {
    aligned(team, n, gram, weights, memory);
  }
};

Tensor aligned_cuda(Tensor gram) { return solve_gram<Aligned>(gram, aligned_workspace); }

FASTMTL_CUDA_KERNEL(aligned, aligned_cuda);

}  // namespace
}  // namespace fastmtl
