// Where weighted sums of rows are written, and what must be out of the way of the writes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "fastmtl/row_table.h"

namespace fastmtl {

/// Where one result of one parameter goes.
struct Target {
  void* data = nullptr;
  DType dtype = DType::f32;
};

/// Tensors that are not dense, each with the dense one that takes the result first.
using Detours = std::vector<std::pair<Tensor, Tensor>>;

/// Gives parameter k of `rows` the shape and layout of a given tensor and returns where its result goes.
inline Target take_target(RowTable& rows, Tensor const& out, int64_t k, bool accumulate, Detours& detours) {
  Shape const shape(out);
  rows.set_shape(k, shape);
  Tensor target = out;
  if (!shape.dense()) {
    target = empty_strided(rows.parameter(k).sizes, contiguous_strides(shape), dtype_of(out), &out);
    if (accumulate) torch::stable::copy_(target, out);
    detours.emplace_back(out, target);
  }
  rows.set_layout(k, Shape(target).strides);
  return {target.mutable_data_ptr(), dtype_of(target)};
}

struct Block {
  uintptr_t begin;
  uintptr_t end;
  int64_t index;
};

inline Block block_of(Target const& target, int64_t numel, int64_t index) {
  int64_t const item = target.dtype == DType::f64 ? 8 : target.dtype == DType::f32 ? 4 : 2;
  auto const begin = reinterpret_cast<uintptr_t>(target.data);
  return {begin, begin + static_cast<uintptr_t>(numel * item), index};
}

/// Copies the rows, of those for which reads(t, k) holds, that a write to some target would change before they are
/// read. A row may be the very memory of its own target: there every element is read before it is written.
template <class Reads>
void part_rows_from_targets(RowTable& rows, std::vector<Target> const& targets, Reads const& reads) {
  std::vector<Block> outs;
  for (int64_t k = 0; k < rows.width(); ++k) {
    Block const out = block_of(targets[k], rows.parameter(k).numel, k);
    if (out.begin != out.end) outs.push_back(out);
  }
  std::sort(outs.begin(), outs.end(), [](Block const& a, Block const& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < outs.size(); ++i) {
    STD_TORCH_CHECK(outs[i - 1].end <= outs[i].begin, "out[", outs[i - 1].index, "] and out[", outs[i].index,
                    "] must not overlap in memory");
  }
  for (int64_t k = 0; k < rows.width(); ++k) {
    for (int64_t t = 0; t < rows.num_rows(); ++t) {
      Row const& row = rows.row(t, k);
      if (!reads(t, k) || !row.matches) continue;
      Block const read = block_of({const_cast<void*>(row.data), row.dtype}, rows.parameter(k).numel, k);
      auto out = std::upper_bound(outs.begin(), outs.end(), read.begin,
                                  [](uintptr_t begin, Block const& block) { return begin < block.end; });
      if (out == outs.end() || out->begin >= read.end) continue;
      bool const itself = out->index == k && out->begin == read.begin && out->end == read.end;
      if (!itself) rows.copy(t, k);
    }
  }
}

}  // namespace fastmtl
