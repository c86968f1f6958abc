// Aligned-MTL's weights on the CPU: one thread, one call.
#include "fastmtl/aligned.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor aligned_cpu(Tensor gram) {
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  Tensor weights = empty_double({n});
  aligned(HostTeam{}, n, data_of(gram), mutable_data_of(weights), workspace(aligned_workspace(n)));
  return weights;
}

FASTMTL_CPU_KERNEL(aligned, aligned_cpu);

}  // namespace
}  // namespace fastmtl
