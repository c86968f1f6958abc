// group_rows, sum_rows: the rows of a table that a batch touches, and sums over all that touches each, on the CPU.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastmtl/features.h"
#include "fastmtl/parallel.h"
#include "fastmtl/row_table.h"
#include "register.h"

namespace fastmtl {
namespace {

using c10::BFloat16;
using c10::Half;

/// Entries of a row that are summed at a time, in memory that stays in the first-level cache.
constexpr int64_t kSumEntries = 256;

struct SumJob {
  std::vector<void const*> values;  // (m, d) of each task.
  std::vector<void*> sums;          // (U, d)
  DType dtype = DType::f32;
  int64_t width = 0;
  int64_t const* order = nullptr;
  int64_t const* starts = nullptr;
  int64_t const* source = nullptr;  // By position; null for the position itself.
  void const* scale = nullptr;      // By position; null for 1. Float64 where values are, else float32.
};

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "tables_kernels.h"
#include "fastmtl/for_each_isa.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;

int64_t const* indices_of(Tensor const& tensor, char const* fault) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1, fault);
  return static_cast<int64_t const*>(tensor.const_data_ptr());
}

Tensor empty_indices(int64_t size) {
  return torch::stable::empty({size}, ScalarType::Long, std::nullopt, std::nullopt);
}

/// One id and where it stands.
struct Place {
  int64_t id;
  int64_t position;
};

/// Sorts by the ids, of which equal ones keep their order, by counting digits, the lowest ones first.
void sort_places(std::vector<Place>& places, int64_t greatest) {
  constexpr int digit_bits = 11;
  constexpr int64_t digits = int64_t{1} << digit_bits;
  std::vector<Place> other(places.size());
  std::array<int64_t, digits> begins{};
  for (int shift = 0; shift < 63 && (greatest >> shift) > 0; shift += digit_bits) {
    begins.fill(0);
    for (Place const& place : places) ++begins[(place.id >> shift) & (digits - 1)];
    int64_t begin = 0;
    for (int64_t& count : begins) begin += std::exchange(count, begin);
    for (Place const& place : places) other[begins[(place.id >> shift) & (digits - 1)]++] = place;
    places.swap(other);
  }
}

std::tuple<Tensor, Tensor, Tensor> group_rows(Tensor const& ids) {
  STD_TORCH_CHECK(ids.is_cpu() && ids.scalar_type() == ScalarType::Long && ids.dim() == 1, "ids must be (n,) int64");
  Tensor const kept = torch::stable::contiguous(ids);
  int64_t const count = kept.size(0);
  auto const* const numbers = static_cast<int64_t const*>(kept.const_data_ptr());
  std::vector<Place> places(count);
  int64_t greatest = 0;
  int64_t least = 0;
  for (int64_t i = 0; i < count; ++i) {
    places[i] = {numbers[i], i};
    greatest = std::max(greatest, numbers[i]);
    least = std::min(least, numbers[i]);
  }
  STD_TORCH_CHECK(least >= 0, "ids must be at least 0");
  sort_places(places, greatest);
  int64_t groups = count > 0 ? 1 : 0;
  for (int64_t i = 1; i < count; ++i) groups += places[i].id != places[i - 1].id;
  Tensor rows = empty_indices(groups);
  Tensor order = empty_indices(count);
  Tensor starts = empty_indices(groups + 1);
  auto* const row = static_cast<int64_t*>(rows.mutable_data_ptr());
  auto* const position = static_cast<int64_t*>(order.mutable_data_ptr());
  auto* const start = static_cast<int64_t*>(starts.mutable_data_ptr());
  int64_t group = 0;
  for (int64_t i = 0; i < count; ++i) {
    position[i] = places[i].position;
    if (i == 0 || places[i].id != places[i - 1].id) {
      row[group] = places[i].id;
      start[group++] = i;
    }
  }
  start[groups] = count;
  return {rows, order, starts};
}

/// Refuses numbers outside [0, end).
void check_range(int64_t const* numbers, int64_t count, int64_t end, char const* fault) {
  int64_t least = 0;
  int64_t greatest = -1;
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, numbers[i]);
    greatest = std::max(greatest, numbers[i]);
  }
  STD_TORCH_CHECK(least >= 0 && greatest < end, fault);
}

std::vector<Tensor> sum_rows(std::vector<Tensor> const& values, Tensor const& order, Tensor const& starts,
                             std::optional<Tensor> const& source, std::optional<Tensor> const& scale) {
  STD_TORCH_CHECK(!values.empty() && values[0].is_cpu() && values[0].dim() == 2, "values must be (m, d) on the CPU");
  SumJob job;
  job.dtype = dtype_of(values[0]);
  job.width = values[0].size(1);
  int64_t const height = values[0].size(0);
  std::vector<Tensor> kept;
  kept.reserve(values.size() + 4);
  for (Tensor const& value : values) {
    STD_TORCH_CHECK(value.is_cpu() && value.dim() == 2 && value.size(0) == height && value.size(1) == job.width &&
                        dtype_of(value) == job.dtype,
                    "values must have one shape and dtype");
    kept.push_back(torch::stable::contiguous(value));
    job.values.push_back(kept.back().const_data_ptr());
  }
  kept.push_back(torch::stable::contiguous(order));
  job.order = indices_of(kept.back(), "order must be (n,) int64");
  int64_t const count = order.size(0);
  kept.push_back(torch::stable::contiguous(starts));
  job.starts = indices_of(kept.back(), "starts must be (U + 1,) int64");
  STD_TORCH_CHECK(starts.size(0) > 0, "starts must hold a number");
  int64_t const groups = starts.size(0) - 1;
  check_range(job.order, count, count, "order must be positions");
  check_range(job.starts, groups + 1, count + 1, "starts must be positions");
  STD_TORCH_CHECK(std::is_sorted(job.starts, job.starts + groups + 1), "starts must not fall");
  if (source.has_value()) {
    STD_TORCH_CHECK(source->dim() == 1 && source->size(0) == count, "source must have the shape of order");
    kept.push_back(torch::stable::contiguous(*source));
    job.source = indices_of(kept.back(), "source must be (n,) int64");
    check_range(job.source, count, height, "source must be rows of values");
  } else {
    STD_TORCH_CHECK(count <= height, "order must have at most the rows of values");
  }
  if (scale.has_value()) {
    STD_TORCH_CHECK(scale->is_cpu() && scale->dim() == 1 && scale->size(0) == count,
                    "scale must have the shape of order");
    kept.push_back(twin_of(*scale, {1}, job.dtype == DType::f64 ? DType::f64 : DType::f32));
    job.scale = kept.back().const_data_ptr();
  }
  std::vector<Tensor> sums;
  for (size_t t = 0; t < values.size(); ++t) {
    sums.push_back(empty_strided({groups, job.width}, {std::max<int64_t>(job.width, 1), 1}, job.dtype));
    job.sums.push_back(sums.back().mutable_data_ptr());
  }
  constexpr int64_t min_slice_entries = 32768;
  int64_t const entries = std::max(groups, count) * job.width * static_cast<int64_t>(values.size());
  int64_t const slices = std::clamp<int64_t>(entries / min_slice_entries, 1, std::max<int64_t>(groups, 1));
  run_parallel(slices,
               [&](int64_t s) { FASTMTL_DISPATCH(sum_groups, job, s * groups / slices, (s + 1) * groups / slices); });
  return sums;
}

FASTMTL_KERNEL(group_rows, group_rows);
FASTMTL_KERNEL(sum_rows, sum_rows);

}  // namespace
}  // namespace fastmtl
