// gram: G = J J^T on a GPU, read once from the tensors where autograd left them.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "gram.h"
#include "gram_matrix.cuh"
#include "register.h"
#include "rows.cuh"

namespace fastmtl {
namespace {

constexpr int kReduceThreads = 256;

__global__ void __launch_bounds__(kReduceThreads)
    gram_reduce_kernel(__grid_constant__ GroupRuns const runs, int rows, int64_t blocks, double const* partial,
                       bool add, double* result) {
  gram_reduce(runs, rows, blocks, partial, add, result);
}

using GramKernel = void (*)(LaunchTable, int, double*);

/// The kernel for a number of rows, and how it is launched.
struct GramVariant {
  GramKernel kernel;
  int64_t blocks;  // Of a processor.
  int64_t piece;
  bool sums_in_shared;
};

template <class Storage, int rows>
GramVariant tile() {
  return {gram_tile_kernel<Storage, rows>, gram_tile_blocks<Storage>(rows), kGramPiece, false};
}

template <class Storage, int blocks16>
GramVariant matrix() {
  return {gram_matrix_kernel<Storage, blocks16>, gram_matrix_blocks(blocks16),
          blocks16 <= 4 ? kMatrixPiece : kSharedMatrixPiece, true};
}

template <class Storage>
GramVariant choose(int64_t rows) {
  if (rows <= 2) return tile<Storage, 2>();
  if (rows <= 3) return tile<Storage, 3>();
  if (rows <= 4) return tile<Storage, 4>();
  if (rows <= 6) return tile<Storage, 6>();
  if (rows <= 8) return tile<Storage, 8>();
  if (rows <= 16) return matrix<Storage, 1>();
  if (rows <= 32) return matrix<Storage, 2>();
  if (rows <= 48) return matrix<Storage, 3>();
  if (rows <= 64) return matrix<Storage, 4>();
  return matrix<Storage, 8>();
}

/// result (+)= the Gram matrices of tensors of one dtype.
template <class Storage>
void launch(OnDevice const& on, std::vector<StripPlan> const& plans, int rows, bool add, Tensor& result) {
  GramVariant const variant = choose<Storage>(rows);
  int64_t const pairs = int64_t{rows} * (rows + 1) / 2;
  size_t const shared = variant.sums_in_shared ? static_cast<size_t>(pairs) * sizeof(double) : 0;
  STD_TORCH_CHECK(on.grant_shared(variant.kernel, shared), "this GPU has too little shared memory for as many rows");
  Cut const cut{variant.piece, variant.blocks * on.attribute(cudaDevAttrMultiProcessorCount), true};
  plan_launches(
      plans, rows, sizeof(Storage), cut, [&](LaunchTable const& table, GroupRuns const& runs, int64_t blocks) {
        Tensor partial = on.empty({pairs * blocks});
        auto* const sums = static_cast<double*>(partial.mutable_data_ptr());
        variant.kernel<<<static_cast<unsigned>(blocks), kGramThreads, shared, on.stream()>>>(table, rows, sums);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        reduce_gram(on, runs, rows, blocks, sums, add, result);
      });
}

/// Whether one launch writes every matrix, so that none must be cleared before.
bool one_launch_fills(std::vector<StripPlan> const& plans, int64_t all_plans, int64_t rows, int64_t num_groups) {
  if (plans.empty() || static_cast<int64_t>(plans.size()) != all_plans) return false;
  if (all_plans > LaunchTable::capacity(static_cast<int>(rows))) return false;
  int64_t groups = 1;
  for (size_t p = 1; p < plans.size(); ++p) groups += plans[p].group != plans[p - 1].group;
  return groups == num_groups;
}

}  // namespace

void reduce_gram(OnDevice const& on, GroupRuns const& runs, int rows, int64_t blocks, double const* partial, bool add,
                 Tensor& result) {
  int64_t const warps = runs.count * (int64_t{rows} * (rows + 1) / 2);
  constexpr int64_t warps_per_block = kReduceThreads / kWarpSize;
  gram_reduce_kernel<<<static_cast<unsigned>((warps + warps_per_block - 1) / warps_per_block), kReduceThreads, 0,
                       on.stream()>>>(runs, rows, blocks, partial, add,
                                      static_cast<double*>(result.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor gram_of_rows(TensorList const& flat, int64_t num_rows, std::optional<std::vector<int64_t>> const& groups) {
  static_assert(kGramThreads == kMatrixThreads);
  OnDevice const on(first_tensor(flat));
  check_device(on, flat);
  RowTable rows(flat, num_rows);
  int64_t num_groups = 0;
  std::vector<int64_t> const group = group_of_each(groups, rows.width(), &num_groups);
  std::vector<int64_t> order(rows.width());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return group[a] < group[b]; });

  std::vector<StripPlan> plans[4];
  int64_t all_plans = 0;
  for (int64_t const k : order) {
    Parameter const& parameter = rows.parameter(k);
    if (!parameter.present || parameter.numel == 0) continue;
    plans[static_cast<int>(parameter.dtype)].push_back(
        {pointers_of(rows, k), parameter.numel, static_cast<int32_t>(group[k])});
    ++all_plans;
  }
  Tensor result = groups.has_value() ? on.empty({num_groups, num_rows, num_rows}) : on.empty({num_rows, num_rows});
  bool const filled = std::any_of(std::begin(plans), std::end(plans), [&](std::vector<StripPlan> const& some) {
    return one_launch_fills(some, all_plans, num_rows, num_groups);
  });
  if (!filled) torch::stable::zero_(result);
  for (DType const dtype : kAllDTypes) {
    std::vector<StripPlan> const& some = plans[static_cast<int>(dtype)];
    if (some.empty()) continue;
    with_storage(
        dtype, [&](auto storage) { launch<decltype(storage)>(on, some, static_cast<int>(num_rows), !filled, result); });
  }
  return result;
}

FASTMTL_KERNEL(gram, gram_of_rows);

}  // namespace fastmtl
