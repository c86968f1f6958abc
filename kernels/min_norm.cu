// The min-norm solver on a GPU: one launch of one warp, or of one block where the matrix is larger than a warp.
#include "fastmtl/min_norm.h"
#include "register.h"
#include "solver.cuh"

namespace fastmtl {
namespace {

struct MinNorm {
  int n;
  double const* gram;
  double const* warm;
  double* weights;

  template <class Team>
  __device__ void solve(Team const& team, int, double* memory) const {
    min_norm(team, n, gram, warm, weights, memory);
  }
};

Tensor min_norm_cuda(Tensor gram, std::optional<Tensor> warm_start) {
  OnDevice const on(gram);
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  warm_start = dense_vector(on, warm_start, n, "warm_start");
  Tensor weights = on.empty({n});
  launch_solver(on, MinNorm{n, data_of(gram), data_of(warm_start), mutable_data_of(weights)}, n, min_norm_workspace(n));
  return weights;
}

FASTMTL_CUDA_KERNEL(min_norm, min_norm_cuda);

}  // namespace
}  // namespace fastmtl
