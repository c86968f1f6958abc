// Nonnegative quadratic programs on the CPU: one thread, one call.
#include "fastmtl/nonneg_qp.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor nonneg_qp_cpu(Tensor gram, Tensor linear) {
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  linear = *dense_vector(linear, n, "linear");
  Tensor solution = empty_double({n});
  nonneg_qp(HostTeam{}, n, data_of(gram), data_of(linear), mutable_data_of(solution),
            workspace(nonneg_qp_workspace(n)));
  return solution;
}

FASTMTL_CPU_KERNEL(nonneg_qp, nonneg_qp_cpu);

}  // namespace
}  // namespace fastmtl
