// CAGrad's weights on a GPU: one launch of one warp, or of one block where the matrix is larger than a warp.
#include <cfloat>

#include "fastmtl/cagrad.h"
#include "register.h"
#include "solver.cuh"

namespace fastmtl {
namespace {

struct Cagrad {
  int n;
  double c;
  double const* gram;
  double* weights;
  double* update;  // Or null.

  template <class Team>
  __device__ void solve(Team const& team, int, double* memory) const {
    cagrad(team, n, c, gram, weights, memory);
    if (update != nullptr) cagrad_step(team, n, c, gram, weights, update);
  }
};

Tensor solve(Tensor gram, double c, bool updates) {
  STD_TORCH_CHECK(c >= 0 && c <= DBL_MAX, "c must be finite and at least 0");
  OnDevice const on(gram);
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  Tensor result = updates ? on.empty({2, n}) : on.empty({n});
  double* const weights = mutable_data_of(result);
  launch_solver(on, Cagrad{n, c, data_of(gram), weights, updates ? weights + n : nullptr}, n, cagrad_workspace(n));
  return result;
}

Tensor cagrad_cuda(Tensor gram, double c) { return solve(gram, c, false); }

Tensor cagrad_update_cuda(Tensor gram, double c) { return solve(gram, c, true); }

FASTMTL_CUDA_KERNEL(cagrad, cagrad_cuda);
FASTMTL_CUDA_KERNEL(cagrad_update, cagrad_update_cuda);

}  // namespace
}  // namespace fastmtl
