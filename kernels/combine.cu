// combine, combine_: weighted sums of the rows on a GPU, from where autograd left them, with weights read on the
// device.
#include <cstdint>
#include <vector>

#include "combine_kernels.cuh"
#include "fastmtl/targets.h"
#include "register.h"
#include "rows.cuh"
#include "solver.h"

namespace fastmtl {
namespace {

struct CombineJob {
  OnDevice const& on;
  RowTable rows;
  std::vector<int64_t> group;
  Tensor weights;  // Dense float64, (M, T) or (L, T).
  int64_t num_results;
  bool by_group;
  bool accumulate = false;
  std::vector<Target> targets{};  // (M, K)

  Target& target(int64_t m, int64_t k) { return targets[m * rows.width() + k]; }
};

CombineJob make_job(OnDevice const& on, TensorList const& flat, int64_t num_rows, Tensor const& weights,
                    std::optional<std::vector<int64_t>> const& groups) {
  check_device(on, flat);
  RowTable rows(flat, num_rows);
  int64_t num_groups = 0;
  std::vector<int64_t> group = group_of_each(groups, rows.width(), &num_groups);
  Shape const shape(weights);
  bool const fits = shape.dim >= 1 && shape.dim <= 2 && shape.sizes[shape.dim - 1] == num_rows;
  STD_TORCH_CHECK(fits && (!groups.has_value() || (shape.dim == 2 && shape.sizes[0] == num_groups)),
                  "weights must have the shape (T,), (M, T) or, with groups, (L, T)");
  STD_TORCH_CHECK(is_real_float(weights), "weights must be floats");
  int64_t const num_results = groups.has_value() || shape.dim == 1 ? 1 : shape.sizes[0];
  return {on, std::move(rows), std::move(group), dense(on, weights), num_results, groups.has_value()};
}

template <class Storage, bool same>
void launch(CombineJob const& job, std::vector<StripPlan> const& plans, DType out) {
  constexpr int64_t waves = 8;
  CombineArguments const arguments{static_cast<double const*>(job.weights.const_data_ptr()),
                                   static_cast<int32_t>(job.rows.num_rows()),
                                   static_cast<int32_t>(job.num_results),
                                   job.by_group,
                                   job.accumulate,
                                   static_cast<OutType>(out)};
  int64_t const processors = job.on.attribute(cudaDevAttrMultiProcessorCount);
  Cut const cut{kCombinePiece, waves * kCombineBlocks * processors, false};
  int64_t const same_items = job.rows.num_rows() + (same ? job.num_results : 0);
  plan_launches(plans, same_items, sizeof(Storage), cut,
                [&](LaunchTable const& table, GroupRuns const&, int64_t blocks) {
                  combine_kernel<Storage, same>
                      <<<static_cast<unsigned>(blocks * job.num_results), kCombineThreads, 0, job.on.stream()>>>(
                          table, arguments);
                  STD_CUDA_KERNEL_LAUNCH_CHECK();
                });
}

/// Fills all targets, whose memory has the layout of their parameter.
void run(CombineJob& job) {
  static_assert(static_cast<int>(OutType::f16) == static_cast<int>(DType::f16));
  if (job.num_results == 0) return;
  STD_TORCH_CHECK(job.rows.num_rows() + job.num_results <= LaunchTable::kWords / 2, "weights has too many rows");
  std::vector<StripPlan> plans[4][4];
  for (int64_t k = 0; k < job.rows.width(); ++k) {
    if (job.target(0, k).data == nullptr || job.rows.parameter(k).numel == 0) continue;
    std::vector<void const*> pointers = pointers_of(job.rows, k);
    for (int64_t m = 0; m < job.num_results; ++m) pointers.push_back(job.target(m, k).data);
    DType const out = job.target(0, k).dtype;
    DType const in = job.rows.parameter(k).present ? job.rows.parameter(k).dtype : out;
    plans[static_cast<int>(in)][static_cast<int>(out)].push_back(
        {std::move(pointers), job.rows.parameter(k).numel, static_cast<int32_t>(job.by_group ? job.group[k] : 0)});
  }
  for (DType const in : kAllDTypes) {
    for (DType const out : kAllDTypes) {
      std::vector<StripPlan> const& some = plans[static_cast<int>(in)][static_cast<int>(out)];
      if (some.empty()) continue;
      with_storage(in, [&](auto storage) {
        using Storage = decltype(storage);
        if (in == out) {
          launch<Storage, true>(job, some, out);
        } else {
          launch<Storage, false>(job, some, out);
        }
      });
    }
  }
}

std::vector<Tensor> combine(TensorList const& flat, int64_t num_rows, Tensor const& weights,
                            std::optional<std::vector<int64_t>> const& groups) {
  Tensor const& first = first_tensor(flat);
  OnDevice const on(first);
  CombineJob job = make_job(on, flat, num_rows, weights, groups);
  std::vector<Tensor> results;
  job.targets.resize(job.num_results * job.rows.width());
  for (int64_t m = 0; m < job.num_results; ++m) {
    for (int64_t k = 0; k < job.rows.width(); ++k) {
      Parameter const& parameter = job.rows.parameter(k);
      if (!parameter.present) continue;
      results.push_back(empty_strided(parameter.sizes, parameter.strides, parameter.dtype, &first));
      job.target(m, k) = {results.back().mutable_data_ptr(), parameter.dtype};
    }
  }
  run(job);
  return results;
}

void combine_(std::vector<Tensor> const& out, TensorList const& flat, int64_t num_rows, Tensor const& weights,
              std::optional<std::vector<int64_t>> const& groups, bool accumulate) {
  if (out.empty()) return;
  OnDevice const on(out[0]);
  CombineJob job = make_job(on, flat, num_rows, weights, groups);
  STD_TORCH_CHECK(static_cast<int64_t>(out.size()) == job.rows.width(), "out must hold one tensor for each of a row's");
  STD_TORCH_CHECK((Shape(weights).dim == 2) == groups.has_value(), "weights must be (T,) or, with groups, (L, T)");
  job.accumulate = accumulate;
  job.targets.resize(out.size());
  Detours detours;
  for (int64_t k = 0; k < job.rows.width(); ++k) {
    STD_TORCH_CHECK(on.holds(out[k]), "out must be on the device of the rows");
    job.target(0, k) = take_target(job.rows, out[k], k, accumulate, detours);
  }
  part_rows_from_targets(job.rows, job.targets,
                         [&](int64_t t, int64_t k) { return job.rows.row(t, k).tensor != nullptr; });
  run(job);
  for (auto& [target, sum] : detours) torch::stable::copy_(target, sum);
}

FASTMTL_KERNEL(combine, combine);
FASTMTL_KERNEL(combine_, combine_);

}  // namespace
}  // namespace fastmtl
