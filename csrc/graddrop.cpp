// graddrop, graddrop_rows: gradient sign dropout on the CPU. A few features of all tasks and the whole batch stay in
// the caches between the sums that decide which sign goes and the pass that drops it, so memory is read once.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "fastmtl/features.h"
#include "fastmtl/parallel.h"
#include "fastmtl/philox.h"
#include "fastmtl/read_vector.h"
#include "fastmtl/row_table.h"
#include "fastmtl/slices.h"
#include "register.h"

namespace fastmtl {
namespace {

using c10::BFloat16;
using c10::Half;

/// Where one result goes.
struct Target {
  void* data = nullptr;
  DType dtype = DType::f32;
};

/// Uniform numbers: a stream, or given ones.
struct Noise {
  uint64_t seed = 0;
  uint64_t offset = 0;
  double const* numbers = nullptr;

  Noise at(int64_t begin) const { return {seed, offset, numbers == nullptr ? nullptr : numbers + begin}; }
};

/// A representation, its gradient or a result: `size` rows of all features, one behind the other.
struct Batch {
  void const* data = nullptr;
  int64_t size = 0;
};

/// All of one dtype.
struct BatchJob {
  std::vector<Batch> reps;
  std::vector<Batch> grads;
  std::vector<Batch> results{};  // One for each of reps.
  DType dtype;
  int64_t features = 0;
  double leak = 0;
  Noise noise{};
  int64_t chunk = 0;        // Features taken at a time,
  int64_t num_chunks = 0;   // so often; the last time also what is left, if that is little.
  bool prefetches = false;  // Whether the next chunk is prefetched.
  bool streams = false;     // Whether results go past the caches.

  int64_t begin_of(int64_t number) const { return number < num_chunks ? number * chunk : features; }
};

struct RowsJob {
  RowTable rows;
  std::vector<double> leaks;      // Of each row.
  std::vector<Noise> noises{};    // Of each parameter.
  std::vector<int64_t> firsts{};  // The number of each parameter's first element in the stream.
  std::vector<Target> targets{};
  std::vector<Segment> segments{};
  int64_t chunk = 0;
  bool streams = false;  // Whether results go past the caches.
};

}  // namespace
}  // namespace fastmtl

#define FASTMTL_KERNELS "graddrop_kernels.h"
#include "fastmtl/for_each_isa.h"

namespace fastmtl {
namespace {

constexpr int64_t kMinSliceElements = 32768;
/// From this many elements on, results are written by non-temporal stores, past the caches.
constexpr int64_t kStreamedElements = int64_t{2} << 20;
constexpr int64_t kLineFeatures = 64;
constexpr int64_t kMostLanes = 16;
/// Elements of all tensors taken at a time: they stay in the second-level cache with most of those that come next.
constexpr int64_t kBatchFloats = 147456;
constexpr int64_t kRowsFloats = 98304;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

Noise read_stream(Tensor const& random) {
  Shape const shape(random);
  STD_TORCH_CHECK(random.is_cpu() && random.scalar_type() == torch::headeronly::ScalarType::Long && shape.dim == 1 &&
                      shape.sizes[0] == 2,
                  "random must be (2,) int64");
  auto const* values = static_cast<int64_t const*>(random.const_data_ptr());
  return {static_cast<uint64_t>(values[0]), static_cast<uint64_t>(values[shape.strides[0]])};
}

/// The batch where it lies, or a copy that is kept where its layout or dtype is another one.
Batch batch_of(Tensor const& tensor, std::vector<int64_t> const& strides, DType dtype, std::vector<Tensor>& kept) {
  Shape const shape(tensor);
  bool const matches = shape.same_strides(strides.data()) && dtype_of(tensor) == dtype;
  if (!matches) kept.push_back(twin_of(tensor, strides, dtype));
  return {(matches ? tensor : kept.back()).const_data_ptr(), shape.sizes[0]};
}

/// Features taken at a time: a chunk of all tensors stays in the second-level cache, and every thread gets some.
int64_t features_at_a_time(int64_t features, int64_t height) {
  int64_t const even = features / (4 * std::max<int64_t>(torch::stable::get_num_threads(), 1));
  int64_t const wanted = std::min(kBatchFloats / height, std::max(even, kMinSliceElements / height));
  return round_up(std::max<int64_t>(wanted - kLineFeatures / 2, 1), kLineFeatures);
}

std::vector<Tensor> graddrop(std::vector<Tensor> const& reps, std::vector<Tensor> const& grads, double leak,
                             Tensor const& random, std::optional<Tensor> const& noise) {
  size_t const tasks = grads.size();
  STD_TORCH_CHECK(tasks >= 1 && (reps.size() == 1 || reps.size() == tasks), "there must be one rep or one per task");
  std::vector<Shape> shapes;
  DType dtype = dtype_of(grads.front());
  for (auto const* list : {&reps, &grads}) {
    for (Tensor const& tensor : *list) {
      shapes.emplace_back(tensor);
      STD_TORCH_CHECK(tensor.is_cpu() && shapes.back().dim >= 1, "reps and grads must have a batch dimension");
      dtype = promote(dtype, dtype_of(tensor));
    }
  }
  Shape const& first = shapes.front();
  int64_t const features = std::accumulate(first.sizes + 1, first.sizes + first.dim, int64_t{1}, std::multiplies<>());
  std::vector<int64_t> strides = feature_strides(shapes, features);
  std::vector<int64_t> const inner = strides;
  strides.insert(strides.begin(), std::max<int64_t>(features, 1));

  BatchJob job{{}, {}, {}, dtype, features, leak, read_stream(random)};
  std::vector<Tensor> kept;
  kept.reserve(shapes.size() + 1);
  int64_t height = 0;
  for (Tensor const& rep : reps) {
    job.reps.push_back(batch_of(rep, strides, dtype, kept));
    height += job.reps.back().size;
  }
  for (size_t t = 0; t < tasks; ++t) {
    job.grads.push_back(batch_of(grads[t], strides, dtype, kept));
    height += job.grads.back().size;
    STD_TORCH_CHECK(job.grads[t].size == job.reps[reps.size() == 1 ? 0 : t].size, "reps and grads must have one batch");
  }
  std::vector<Tensor> results;
  bool aligned = features * bytes_of(dtype) % kLineBytes == 0;
  for (size_t r = 0; r < reps.size(); ++r) {
    results.push_back(empty_strided({shapes[r].sizes, shapes[r].sizes + shapes[r].dim}, strides, dtype));
    job.results.push_back({results.back().mutable_data_ptr(), shapes[r].sizes[0]});
    aligned &= reinterpret_cast<uintptr_t>(job.results.back().data) % kLineBytes == 0;
  }
  if (noise.has_value()) {
    Shape const shape(*noise);
    STD_TORCH_CHECK(shape.dim == first.dim - 1 && std::equal(shape.sizes, shape.sizes + shape.dim, first.sizes + 1),
                    "noise must have the shape of the features");
    kept.push_back(twin_of(*noise, inner, DType::f64));
    job.noise.numbers = static_cast<double const*>(kept.back().const_data_ptr());
  }

  job.chunk = features_at_a_time(features, std::max<int64_t>(height, 1));
  job.num_chunks = (features + job.chunk - 1) / job.chunk;
  if (job.num_chunks > 1 && features - (job.num_chunks - 1) * job.chunk < kMostLanes) --job.num_chunks;
  job.prefetches = height * job.chunk <= kBatchFloats;
  job.streams = aligned && height * features >= kStreamedElements;
  run_parallel_ahead(job.num_chunks,
                     [&](int64_t chunk, int64_t next) { FASTMTL_DISPATCH(graddrop_chunk, job, chunk, next); });
  for (size_t r = 0; r < reps.size(); ++r) {
    DType wanted = dtype_of(grads[r]);
    for (size_t t = 0; reps.size() == 1 && t < tasks; ++t) wanted = promote(wanted, dtype_of(grads[t]));
    if (wanted != dtype) results[r] = twin_of(results[r], strides, wanted);
  }
  return results;
}

std::vector<Tensor> graddrop_rows(TensorList const& flat, int64_t num_rows, Tensor const& leak, Tensor const& random,
                                  std::vector<Tensor> const& noise) {
  RowTable table(flat, num_rows);
  RowsJob job{std::move(table), read_vector(leak, num_rows, "leak")};
  STD_TORCH_CHECK(noise.empty() || static_cast<int64_t>(noise.size()) == job.rows.width(),
                  "noise must hold one tensor for each tensor of a row");
  Noise const stream = read_stream(random);
  std::vector<Tensor> results;
  std::vector<Tensor> kept;
  int64_t next = 0;
  for (int64_t k = 0; k < job.rows.width(); ++k) {
    Parameter const& parameter = job.rows.parameter(k);
    job.firsts.push_back(next);
    job.noises.push_back(stream);
    job.targets.emplace_back();
    if (!parameter.present) continue;
    next += round_up(parameter.numel, 4);
    for (int64_t t = 0; t < num_rows; ++t) job.rows.match(t, k);
    results.push_back(empty_strided(parameter.sizes, parameter.strides, parameter.dtype));
    job.targets.back() = {results.back().mutable_data_ptr(), parameter.dtype};
    job.segments.push_back({k, parameter.numel, 0});
    if (noise.empty()) continue;
    STD_TORCH_CHECK(Shape(noise[k]).same_sizes(parameter.shape), "noise must have the shapes of the rows");
    kept.push_back(twin_of(noise[k], parameter.strides, DType::f64));
    job.noises.back().numbers = static_cast<double const*>(kept.back().const_data_ptr());
  }
  job.chunk = std::clamp<int64_t>(kRowsFloats / num_rows / 512 * 512, 512, 4096);
  job.streams = next >= kStreamedElements;
  std::vector<Slice> const slices = cut(job.segments, kMinSliceElements / num_rows);
  run_parallel(static_cast<int64_t>(slices.size()),
               [&](int64_t s) { FASTMTL_DISPATCH(graddrop_rows_slice, job, slices[s]); });
  return results;
}

FASTMTL_KERNEL(graddrop, graddrop);
FASTMTL_KERNEL(graddrop_rows, graddrop_rows);

}  // namespace
}  // namespace fastmtl
