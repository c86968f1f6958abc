// gram: G = J J^T on the CPU, read once from the tensors where autograd left them.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "fastmtl/parallel.h"
#include "fastmtl/row_table.h"
#include "fastmtl/slices.h"
#include "gram_result.h"
#include "register.h"

namespace fastmtl {
namespace {

using c10::BFloat16;
using c10::Half;

struct GramJob {
  RowTable const& rows;
  std::vector<Segment> segments;
  int64_t chunk;  // Elements of each row taken at a time.
  bool converts;  // Whether some row is not of the type its sums are taken in.
};

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "gram_slice.h"
#include "fastmtl/for_each_isa.h"

namespace fastmtl {
namespace {

Tensor gram(TensorList const& flat, int64_t num_rows, std::optional<std::vector<int64_t>> const& groups) {
  RowTable rows(flat, num_rows);
  int64_t num_groups = 0;
  std::vector<int64_t> const group = group_of_each(groups, rows.width(), &num_groups);

  GramJob job{rows, {}, 0, false};
  for (int64_t k = 0; k < rows.width(); ++k) {
    if (!rows.parameter(k).present) continue;
    DType const sum_dtype = rows.parameter(k).dtype == DType::f64 ? DType::f64 : DType::f32;
    for (int64_t t = 0; t < num_rows; ++t) {
      rows.match(t, k);
      job.converts |= rows.row(t, k).tensor != nullptr && rows.row(t, k).dtype != sum_dtype;
    }
    job.segments.push_back({k, rows.parameter(k).numel, group[k]});
  }
  job.chunk = chunk_length(num_rows, job.converts);
  std::stable_sort(job.segments.begin(), job.segments.end(),
                   [](Segment const& a, Segment const& b) { return a.group < b.group; });

  constexpr int64_t min_slice_elements = 32768;
  std::vector<Slice> const slices = cut(job.segments, min_slice_elements / num_rows);
  int64_t const pairs = num_rows * (num_rows + 1) / 2;
  std::vector<double> upper(slices.size() * pairs);
  run_parallel(static_cast<int64_t>(slices.size()),
               [&](int64_t s) { FASTMTL_DISPATCH(gram_slice, job, slices[s], upper.data() + s * pairs); });

  return gram_of(upper, slices, num_rows, groups.has_value() ? std::optional(num_groups) : std::nullopt);
}

FASTMTL_KERNEL(gram, gram);

}  // namespace
}  // namespace fastmtl
