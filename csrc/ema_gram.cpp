// ema_gram_: moving averages of the rows, updated in place, and their Gram matrix, in one pass over both on the CPU.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "fastmtl/parallel.h"
#include "fastmtl/read_vector.h"
#include "fastmtl/row_table.h"
#include "fastmtl/slices.h"
#include "gram_result.h"
#include "register.h"
#include "state_rows.h"

namespace fastmtl {
namespace {

using c10::BFloat16;
using c10::Half;

struct EmaJob {
  StateRows both;
  std::vector<double> keep;
  std::vector<double> gains;
  int64_t chunk = 0;  // Elements of each row taken at a time.
};

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "ema_gram_kernels.h"
#include "fastmtl/for_each_isa.h"

namespace fastmtl {
namespace {

Tensor ema_gram(std::vector<Tensor> const& state, TensorList const& flat, int64_t num_rows, Tensor const& keep,
                Tensor const& gains) {
  TensorList const averages = as_rows(state);
  EmaJob job{{averages, flat, num_rows}, read_vector(keep, num_rows, "keep"), read_vector(gains, num_rows, "gains")};
  job.chunk = chunk_length(num_rows, job.both.converts);
  std::vector<Slice> const slices = job.both.slices();
  int64_t const pairs = num_rows * (num_rows + 1) / 2;
  std::vector<double> upper(slices.size() * pairs);
  run_parallel(static_cast<int64_t>(slices.size()),
               [&](int64_t s) { FASTMTL_DISPATCH(ema_gram_slice, job, slices[s], upper.data() + s * pairs); });
  return gram_of(upper, slices, num_rows, std::nullopt);
}

FASTMTL_KERNEL(ema_gram_, ema_gram);

}  // namespace
}  // namespace fastmtl
