// excess_risk_: sums of squared gradients, updated in place, and each task's risk by them, in one pass on the CPU.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "fastmtl/parallel.h"
#include "fastmtl/row_table.h"
#include "fastmtl/slices.h"
#include "register.h"
#include "state_rows.h"

namespace fastmtl {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kRiskChunk = 4096;

struct RiskJob {
  StateRows both;
  double epsilon;
};

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "excess_risk_kernels.h"
#include "fastmtl/for_each_isa.h"

namespace fastmtl {
namespace {

Tensor excess_risk(std::vector<Tensor> const& sums, TensorList const& flat, int64_t num_rows, double epsilon) {
  STD_TORCH_CHECK(epsilon > 0, "epsilon must be above 0");
  TensorList const state = as_rows(sums);
  RiskJob const job{{state, flat, num_rows}, epsilon};
  std::vector<Slice> const slices = job.both.slices();
  std::vector<double> risks(slices.size() * num_rows, 0.0);
  run_parallel(static_cast<int64_t>(slices.size()),
               [&](int64_t s) { FASTMTL_DISPATCH(risk_slice, job, slices[s], risks.data() + s * num_rows); });
  Tensor result = empty_strided({num_rows}, {1}, DType::f64);
  auto* const total = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(total, num_rows, 0.0);
  for (size_t i = 0; i < risks.size(); ++i) total[i % num_rows] += risks[i];
  return result;
}

FASTMTL_KERNEL(excess_risk_, excess_risk);

}  // namespace
}  // namespace fastmtl
