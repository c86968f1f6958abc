// IMTL-G's weights on the CPU: one thread, one call.
#include "fastmtl/imtl.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor imtl_cpu(Tensor gram) {
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  Tensor weights = empty_double({n});
  imtl(HostTeam{}, n, data_of(gram), mutable_data_of(weights), workspace(imtl_workspace(n)));
  return weights;
}

FASTMTL_CPU_KERNEL(imtl, imtl_cpu);

}  // namespace
}  // namespace fastmtl
