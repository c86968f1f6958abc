// PCGrad's weights on the CPU: one thread, one call.
#include "fastmtl/pcgrad.h"

#include "orders.h"
#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor pcgrad_cpu(Tensor gram, Tensor orders) {
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  Orders const visits = dense_orders(orders, n);
  Tensor weights = empty_double({n});
  pcgrad(HostTeam{}, n, visits.steps, data_of(gram), visits.data, mutable_data_of(weights),
         workspace(pcgrad_workspace(n, HostTeam::groups())));
  return weights;
}

FASTMTL_CPU_KERNEL(pcgrad, pcgrad_cpu);

}  // namespace
}  // namespace fastmtl
