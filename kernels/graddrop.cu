// graddrop, graddrop_rows: gradient sign dropout on a GPU, with random numbers drawn where they are needed.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "fastmtl/features.h"
#include "graddrop_kernels.cuh"
#include "register.h"
#include "rows.cuh"
#include "solver.h"

namespace fastmtl {
namespace {

/// The (2,) int64 seed and offset where they lie.
int64_t const* stream_of(OnDevice const& on, Tensor const& random) {
  STD_TORCH_CHECK(
      on.holds(random) && random.scalar_type() == ScalarType::Long && random.dim() == 1 && random.size(0) == 2,
      "random must be (2,) int64 on the device of the gradients");
  return static_cast<int64_t const*>(random.const_data_ptr());
}

/// The tensor where it lies, or a copy in another layout or dtype, which is kept.
Tensor const& brought_to(std::vector<int64_t> const& strides, DType dtype, Tensor const& tensor,
                         std::vector<Tensor>& kept) {
  if (dtype_of(tensor) == dtype && Shape(tensor).same_strides(strides.data())) return tensor;
  kept.push_back(twin_of(tensor, strides, dtype));
  return kept.back();
}

template <class Storage>
void launch(OnDevice const& on, DropArguments const& arguments) {
  constexpr int features = kDropFeaturesOf<Storage>;
  auto const shared = static_cast<size_t>(arguments.tasks + kDropWarps) * features * sizeof(DropAcc<Storage>);
  STD_TORCH_CHECK(on.grant_shared(graddrop_kernel<Storage>, shared), "this GPU has too little shared memory");
  int64_t const blocks = (arguments.features + features - 1) / features;
  graddrop_kernel<Storage><<<static_cast<unsigned>(blocks), kDropThreads, shared, on.stream()>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::vector<Tensor> graddrop(std::vector<Tensor> const& reps, std::vector<Tensor> const& grads, double leak,
                             Tensor const& random, std::optional<Tensor> const& noise) {
  size_t const tasks = grads.size();
  STD_TORCH_CHECK(tasks >= 1 && tasks <= kDropMaxTasks && (reps.size() == 1 || reps.size() == tasks),
                  "there must be 1 to 128 tasks, and one rep or one per task");
  OnDevice const on(grads[0]);
  std::vector<Shape> shapes;
  DType dtype = dtype_of(grads[0]);
  for (auto const* list : {&reps, &grads}) {
    for (Tensor const& tensor : *list) {
      shapes.emplace_back(tensor);
      STD_TORCH_CHECK(on.holds(tensor) && shapes.back().dim >= 1, "reps and grads must have a batch, on one device");
      dtype = promote(dtype, dtype_of(tensor));
    }
  }
  Shape const& first = shapes.front();
  DropArguments arguments{};
  arguments.features = std::accumulate(first.sizes + 1, first.sizes + first.dim, int64_t{1}, std::multiplies<>());
  arguments.random = stream_of(on, random);
  arguments.random_stride = Shape(random).strides[0];
  arguments.leak = leak;
  arguments.tasks = static_cast<int32_t>(tasks);
  arguments.shares = reps.size() == 1;
  std::vector<int64_t> const inner = feature_strides(shapes, arguments.features);
  std::vector<int64_t> strides = inner;
  strides.insert(strides.begin(), std::max<int64_t>(arguments.features, 1));

  std::vector<Tensor> kept;
  kept.reserve(2 * shapes.size() + 1);
  std::vector<Tensor> results;
  // Results of another type than that in which everything is taken, each with the tensor that is written first.
  std::vector<std::pair<Tensor, Tensor>> detours;
  arguments.aligned = arguments.features * item_bytes(dtype) % kLoadBytes == 0;
  auto const align = [&](void const* data) {
    arguments.aligned &= reinterpret_cast<uintptr_t>(data) % kLoadBytes == 0;
    return data;
  };
  for (size_t r = 0; r < reps.size(); ++r) {
    arguments.batch[r] = shapes[r].sizes[0];
    arguments.rep[r] = align(brought_to(strides, dtype, reps[r], kept).const_data_ptr());
    DType result_dtype = dtype_of(grads[r]);
    for (size_t t = 0; arguments.shares && t < tasks; ++t) result_dtype = promote(result_dtype, dtype_of(grads[t]));
    std::vector<int64_t> const sizes(shapes[r].sizes, shapes[r].sizes + shapes[r].dim);
    results.push_back(empty_strided(sizes, strides, result_dtype, &grads[0]));
    Tensor target = results.back();
    if (result_dtype != dtype) {
      target = empty_strided(sizes, strides, dtype, &grads[0]);
      detours.emplace_back(results.back(), target);
    }
    arguments.out[r] = target.mutable_data_ptr();
    align(arguments.out[r]);
  }
  for (size_t t = 0; t < tasks; ++t) {
    STD_TORCH_CHECK(Shape(grads[t]).sizes[0] == arguments.batch[arguments.rep_of(static_cast<int>(t))],
                    "reps and grads must have one batch");
    arguments.grad[t] = align(brought_to(strides, dtype, grads[t], kept).const_data_ptr());
  }
  if (noise.has_value()) {
    Shape const shape(*noise);
    STD_TORCH_CHECK(shape.dim == first.dim - 1 && std::equal(shape.sizes, shape.sizes + shape.dim, first.sizes + 1),
                    "noise must have the shape of the features");
    kept.push_back(empty_strided({shape.sizes, shape.sizes + shape.dim}, inner, DType::f64, &grads[0]));
    torch::stable::copy_(kept.back(), *noise);
    arguments.noise = static_cast<double const*>(kept.back().const_data_ptr());
  }
  if (arguments.features > 0) {
    with_storage(dtype, [&](auto storage) { launch<decltype(storage)>(on, arguments); });
  }
  for (auto& [result, written] : detours) torch::stable::copy_(result, written);
  return results;
}

std::vector<Tensor> graddrop_rows(TensorList const& flat, int64_t num_rows, Tensor const& leak, Tensor const& random,
                                  std::vector<Tensor> const& noise) {
  Tensor const& first = first_tensor(flat);
  OnDevice const on(first);
  check_device(on, flat);
  RowTable rows(flat, num_rows);
  STD_TORCH_CHECK(noise.empty() || static_cast<int64_t>(noise.size()) == rows.width(),
                  "noise must hold one tensor for each tensor of a row");
  Tensor const leaks = *dense_vector(on, leak, num_rows, "leak");
  DropRowsArguments const arguments{static_cast<double const*>(leaks.const_data_ptr()), stream_of(on, random),
                                    Shape(random).strides[0], static_cast<int32_t>(num_rows)};
  std::vector<Tensor> results;
  std::vector<Tensor> kept;
  std::vector<StripPlan> plans[4];
  uintptr_t next = 0;
  for (int64_t k = 0; k < rows.width(); ++k) {
    Parameter const& parameter = rows.parameter(k);
    if (!parameter.present) continue;
    std::vector<void const*> pointers = pointers_of(rows, k);
    results.push_back(empty_strided(parameter.sizes, parameter.strides, parameter.dtype, &first));
    pointers.push_back(results.back().mutable_data_ptr());
    pointers.push_back(nullptr);
    if (!noise.empty()) {
      STD_TORCH_CHECK(Shape(noise[k]).same_sizes(parameter.shape), "noise must have the shapes of the rows");
      kept.push_back(empty_strided(parameter.sizes, parameter.strides, DType::f64, &first));
      torch::stable::copy_(kept.back(), noise[k]);
      pointers.back() = kept.back().const_data_ptr();
    }
    pointers.push_back(reinterpret_cast<void const*>(next));
    next += static_cast<uintptr_t>((parameter.numel + 3) / 4 * 4);
    plans[static_cast<int>(parameter.dtype)].push_back({std::move(pointers), parameter.numel, 0});
  }
  constexpr int64_t waves = 8;
  Cut const cut{kDropPiece, waves * on.attribute(cudaDevAttrMultiProcessorCount), false};
  for (DType const dtype : kAllDTypes) {
    with_storage(dtype, [&](auto storage) {
      using Storage = decltype(storage);
      plan_launches(plans[static_cast<int>(dtype)], num_rows + 1, sizeof(Storage), cut,
                    [&](LaunchTable const& table, GroupRuns const&, int64_t blocks) {
                      graddrop_rows_kernel<Storage>
                          <<<static_cast<unsigned>(blocks), kDropThreads, 0, on.stream()>>>(table, arguments);
                      STD_CUDA_KERNEL_LAUNCH_CHECK();
                    });
    });
  }
  return results;
}

FASTMTL_KERNEL(graddrop, graddrop);
FASTMTL_KERNEL(graddrop_rows, graddrop_rows);

}  // namespace
}  // namespace fastmtl
