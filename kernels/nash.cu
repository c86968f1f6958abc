// Nash-MTL's weights on a GPU: one launch of one warp, or of one block where the matrix is larger than a warp.
#include "fair.cuh"
#include "register.h"

namespace fastmtl {
namespace {

Tensor nash_cuda(Tensor gram, std::optional<Tensor> warm_start) { return fair_cuda(gram, 1.0, warm_start); }

FASTMTL_CUDA_KERNEL(nash, nash_cuda);

}  // namespace
}  // namespace fastmtl
