// CAGrad's weights on the CPU: one thread, one call.
#include "fastmtl/cagrad.h"

#include <cfloat>

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor cagrad_cpu(Tensor gram, double c) {
  STD_TORCH_CHECK(c >= 0 && c <= DBL_MAX, "c must be finite and at least 0");
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  Tensor weights = empty_double({n});
  cagrad(HostTeam{}, n, c, data_of(gram), mutable_data_of(weights), workspace(cagrad_workspace(n)));
  return weights;
}

Tensor cagrad_update_cpu(Tensor gram, double c) {
  STD_TORCH_CHECK(c >= 0 && c <= DBL_MAX, "c must be finite and at least 0");
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  Tensor result = empty_double({2, n});
  double* const weights = mutable_data_of(result);
  cagrad(HostTeam{}, n, c, data_of(gram), weights, workspace(cagrad_workspace(n)));
  cagrad_step(HostTeam{}, n, c, data_of(gram), weights, weights + n);
  return result;
}

FASTMTL_CPU_KERNEL(cagrad, cagrad_cpu);
FASTMTL_CPU_KERNEL(cagrad_update, cagrad_update_cpu);

}  // namespace
}  // namespace fastmtl
