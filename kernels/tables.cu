// sum_rows on a GPU: a warp for each touched row of a table, whose lanes take its entries. Which rows are touched is
// found by torch's sort.
#include <cstdint>
#include <optional>
#include <vector>

#include "register.h"
#include "rows.cuh"

namespace fastmtl {
namespace {

constexpr int kTableThreads = 128;
constexpr int kGroupsPerBlock = kTableThreads / kWarpSize;

/// sums[u] = sum over the group's positions of scale x values[source].
template <class Storage, class Acc>
__global__ void __launch_bounds__(kTableThreads)
    sum_rows_kernel(Storage const* values, Storage* sums, int64_t groups, int64_t width, int64_t const* order,
                    int64_t const* starts, int64_t const* source, Acc const* scale) {
  int64_t const group = int64_t{blockIdx.x} * kGroupsPerBlock + threadIdx.x / kWarpSize;
  if (group >= groups) return;
  int64_t const begin = starts[group];
  int64_t const end = starts[group + 1];
  for (int64_t d = threadIdx.x % kWarpSize; d < width; d += kWarpSize) {
    Acc total = 0;
    for (int64_t i = begin; i < end; ++i) {
      int64_t const position = order[i];
      int64_t const row = source == nullptr ? position : source[position];
      Acc const factor = scale == nullptr ? Acc(1) : scale[position];
      total += factor * widen<Acc>(values[row * width + d]);
    }
    narrow(sums[group * width + d], total);
  }
}

int64_t const* indices_of(OnDevice const& on, Tensor const& tensor) {
  STD_TORCH_CHECK(on.holds(tensor) && tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1,
                  "order, starts and source must be one-dimensional int64 on the device of values");
  return static_cast<int64_t const*>(tensor.const_data_ptr());
}

std::vector<Tensor> sum_rows(std::vector<Tensor> const& values, Tensor const& order, Tensor const& starts,
                             std::optional<Tensor> const& source, std::optional<Tensor> const& scale) {
  STD_TORCH_CHECK(!values.empty() && values[0].dim() == 2 && starts.dim() == 1 && starts.size(0) > 0,
                  "values must be (m, d), and starts must hold a number");
  OnDevice const on(values[0]);
  DType const dtype = dtype_of(values[0]);
  int64_t const height = values[0].size(0);
  int64_t const width = values[0].size(1);
  int64_t const groups = starts.size(0) - 1;
  int64_t const count = order.size(0);
  Tensor const kept_order = torch::stable::contiguous(order);
  Tensor const kept_starts = torch::stable::contiguous(starts);
  std::optional<Tensor> kept_source;
  std::optional<Tensor> kept_scale;
  if (source.has_value()) kept_source = torch::stable::contiguous(*source);
  STD_TORCH_CHECK(kept_source ? kept_source->dim() == 1 && kept_source->size(0) == count : count <= height,
                  "source must have the shape of order, which has at most the rows of values without it");
  if (scale.has_value()) {
    STD_TORCH_CHECK(on.holds(*scale) && scale->dim() == 1 && scale->size(0) == count,
                    "scale must have the shape of order");
    kept_scale = on.empty({count}, dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
    torch::stable::copy_(*kept_scale, *scale);
  }
  int64_t const* const of_order = indices_of(on, kept_order);
  int64_t const* const of_starts = indices_of(on, kept_starts);
  int64_t const* const of_source = kept_source ? indices_of(on, *kept_source) : nullptr;
  void const* const of_scale = kept_scale ? kept_scale->const_data_ptr() : nullptr;
  std::vector<Tensor> sums;
  for (Tensor const& value : values) {
    STD_TORCH_CHECK(on.holds(value) && value.dim() == 2 && value.size(0) == height && value.size(1) == width &&
                        dtype_of(value) == dtype,
                    "values must have one shape, dtype and device");
    Tensor const kept = torch::stable::contiguous(value);
    sums.push_back(on.empty({groups, width}, value.scalar_type()));
    if (groups == 0 || width == 0) continue;
    auto const blocks = static_cast<unsigned>((groups + kGroupsPerBlock - 1) / kGroupsPerBlock);
    with_storage(dtype, [&](auto element) {
      using Storage = decltype(element);
      using Acc = std::conditional_t<std::is_same_v<Storage, double>, double, float>;
      sum_rows_kernel<Storage, Acc><<<blocks, kTableThreads, 0, on.stream()>>>(
          static_cast<Storage const*>(kept.const_data_ptr()), static_cast<Storage*>(sums.back().mutable_data_ptr()),
          groups, width, of_order, of_starts, of_source, static_cast<Acc const*>(of_scale));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return sums;
}

FASTMTL_KERNEL(sum_rows, sum_rows);

}  // namespace
}  // namespace fastmtl
