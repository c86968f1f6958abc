// UPGrad's weights on the CPU: one thread, one call.
#include "fastmtl/upgrad.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor upgrad_cpu(Tensor gram, double norm_eps, double reg_eps) {
  STD_TORCH_CHECK(norm_eps >= 0 && reg_eps >= 0, "norm_eps and reg_eps must be at least 0");
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  Tensor weights = empty_double({n});
  upgrad(HostTeam{}, n, norm_eps, reg_eps, data_of(gram), mutable_data_of(weights), workspace(upgrad_workspace(n)));
  return weights;
}

FASTMTL_CPU_KERNEL(upgrad, upgrad_cpu);

}  // namespace
}  // namespace fastmtl
