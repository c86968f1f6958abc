// FairGrad's weights on a GPU: one launch of one warp, or of one block where the matrix is larger than a warp.
#include <cfloat>

#include "fair.cuh"
#include "register.h"

namespace fastmtl {
namespace {

Tensor fairgrad_cuda(Tensor gram, double alpha, std::optional<Tensor> warm_start) {
  STD_TORCH_CHECK(alpha > 0 && alpha <= DBL_MAX, "alpha must be positive and finite");
  return fair_cuda(gram, 1 / alpha, warm_start);
}

FASTMTL_CUDA_KERNEL(fairgrad, fairgrad_cuda);

}  // namespace
}  // namespace fastmtl
