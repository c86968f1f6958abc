// FairGrad's weights, on every device.
#include <cfloat>

#include "fair_op.h"
#include "register.h"

namespace fastmtl {
namespace {

Tensor fairgrad_op(Tensor gram, double alpha, std::optional<Tensor> warm_start) {
  STD_TORCH_CHECK(alpha > 0 && alpha <= DBL_MAX, "alpha must be positive and finite");
  return fair_op(gram, 1 / alpha, warm_start);
}

FASTMTL_KERNEL(fairgrad, fairgrad_op);

}  // namespace
}  // namespace fastmtl
