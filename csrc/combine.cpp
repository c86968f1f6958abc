// combine, combine_: weighted sums of the rows on the CPU, each row read at most once per pass and never concatenated.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "fastmtl/parallel.h"
#include "fastmtl/read_vector.h"
#include "fastmtl/row_table.h"
#include "fastmtl/slices.h"
#include "fastmtl/targets.h"
#include "register.h"

namespace fastmtl {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kMaxChunk = 4096;

struct CombineJob {
  RowTable rows;
  std::vector<int64_t> group;
  std::vector<double> weights;  // (M, T) or (L, T).
  int64_t num_results;          // M; 1 with groups.
  bool accumulate = false;
  std::vector<Target> targets{};  // (M, K)
  std::vector<Segment> segments{};
  std::vector<bool> sums_in_double{};  // Of each parameter.
  std::vector<bool> in_16_bits{};      // Whether each parameter's are of one 16-bit type and taken as they lie.
  int64_t chunk = 0;
  bool converts = false;  // Whether some piece needs memory beside its rows and results.
  bool streams = false;   // Whether results go past the caches.

  double const* weights_of(int64_t m, int64_t k) const {
    return weights.data() + (num_results > 1 ? m : group[k]) * rows.num_rows();
  }
  Target& target(int64_t m, int64_t k) { return targets[m * rows.width() + k]; }
  Target const& target(int64_t m, int64_t k) const { return targets[m * rows.width() + k]; }
  bool reads(int64_t t, int64_t k) const {
    if (rows.row(t, k).tensor == nullptr) return false;
    for (int64_t m = 0; m < num_results; ++m) {
      if (weights_of(m, k)[t] != 0) return true;
    }
    return false;
  }
};

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "combine_kernels.h"
#include "fastmtl/for_each_isa.h"

namespace fastmtl {
namespace {

CombineJob make_job(TensorList const& flat, int64_t num_rows, Tensor const& weights,
                    std::optional<std::vector<int64_t>> const& groups) {
  RowTable rows(flat, num_rows);
  int64_t num_groups = 0;
  std::vector<int64_t> group = group_of_each(groups, rows.width(), &num_groups);
  Shape const shape(weights);
  bool const fits = shape.dim >= 1 && shape.dim <= 2 && shape.sizes[shape.dim - 1] == num_rows;
  STD_TORCH_CHECK(fits && (!groups.has_value() || (shape.dim == 2 && shape.sizes[0] == num_groups)),
                  "weights must have the shape (T,), (M, T) or, with groups, (L, T)");
  int64_t const num_results = groups.has_value() || shape.dim == 1 ? 1 : shape.sizes[0];
  return {std::move(rows), std::move(group), read_numbers(weights), num_results};
}

/// Fills all targets, whose memory has the layout of their parameter.
void run(CombineJob& job) {
  constexpr int64_t cache_floats = 65536;
  constexpr int64_t min_slice_elements = 32768;
  constexpr int64_t streamed_bytes = int64_t{8} << 20;
  int64_t const num_rows = job.rows.num_rows();
  int64_t bytes = 0;
  for (int64_t k = 0; k < job.rows.width(); ++k) {
    DType widest = job.target(0, k).dtype;
    bool mixed = false;
    for (int64_t t = 0; t < num_rows; ++t) {
      if (!job.reads(t, k)) continue;
      job.rows.match(t, k);
      mixed |= job.rows.row(t, k).dtype != widest;
      widest = promote(widest, job.rows.row(t, k).dtype);
    }
    job.sums_in_double.push_back(widest == DType::f64);
    bool const halves = widest == DType::bf16 || widest == DType::f16;
    // Without instructions that convert them, vectors of 16-bit numbers gain nothing.
    job.in_16_bits.push_back(halves && !mixed && isa() != Isa::portable);
    job.converts |= mixed || (halves && (job.accumulate || !job.in_16_bits[k]));
    if (job.target(0, k).data != nullptr) job.segments.push_back({k, job.rows.parameter(k).numel, 0});
    bytes += job.rows.parameter(k).numel * 4 * job.num_results;
  }
  job.chunk = std::clamp<int64_t>(cache_floats / num_rows / 64 * 64, 512, kMaxChunk);
  job.streams = bytes >= streamed_bytes;
  std::vector<Slice> const slices = cut(job.segments, min_slice_elements / num_rows);
  run_parallel(static_cast<int64_t>(slices.size()),
               [&](int64_t s) { FASTMTL_DISPATCH(combine_slice, job, slices[s]); });
}

std::vector<Tensor> combine(TensorList const& flat, int64_t num_rows, Tensor const& weights,
                            std::optional<std::vector<int64_t>> const& groups) {
  CombineJob job = make_job(flat, num_rows, weights, groups);
  std::vector<Tensor> results;
  job.targets.resize(job.num_results * job.rows.width());
  for (int64_t m = 0; m < job.num_results; ++m) {
    for (int64_t k = 0; k < job.rows.width(); ++k) {
      Parameter const& parameter = job.rows.parameter(k);
      if (!parameter.present) continue;
      results.push_back(empty_strided(parameter.sizes, parameter.strides, parameter.dtype));
      job.target(m, k) = {results.back().mutable_data_ptr(), parameter.dtype};
    }
  }
  run(job);
  return results;
}

void combine_(std::vector<Tensor> const& out, TensorList const& flat, int64_t num_rows, Tensor const& weights,
              std::optional<std::vector<int64_t>> const& groups, bool accumulate) {
  CombineJob job = make_job(flat, num_rows, weights, groups);
  STD_TORCH_CHECK(static_cast<int64_t>(out.size()) == job.rows.width(), "out must hold one tensor for each of a row's");
  STD_TORCH_CHECK((Shape(weights).dim == 2) == groups.has_value(), "weights must be (T,) or, with groups, (L, T)");
  job.accumulate = accumulate;
  job.targets.resize(out.size());
  Detours detours;
  for (int64_t k = 0; k < job.rows.width(); ++k)
    job.target(0, k) = take_target(job.rows, out[k], k, accumulate, detours);
  part_rows_from_targets(job.rows, job.targets, [&](int64_t t, int64_t k) { return job.reads(t, k); });
  run(job);
  for (auto& [target, sum] : detours) torch::stable::copy_(target, sum);
}

FASTMTL_KERNEL(combine, combine);
FASTMTL_KERNEL(combine_, combine_);

}  // namespace
}  // namespace fastmtl
