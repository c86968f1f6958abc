// The CUDA kernels of graddrop, graddrop_rows, ema_gram_ and excess_risk_, run on the CPU thread by thread, against
// their definitions in float64. Whole numbers keep all sums exact: no rounding decides which sign stays.
#include "cuda_emulation.h"
// The emulation comes first: it says what the kernels' words mean here.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../../kernels/ema_gram_tile.cuh"
#include "../../kernels/graddrop_kernels.cuh"
#include "../../kernels/state_kernels.cuh"
#include "cuda_rows.h"

namespace {

using fastmtl::Bf16;
using fastmtl::F16;
using fastmtl::GroupRuns;
using fastmtl::LaunchTable;
using fastmtl::StripPlan;
using rows_test::check_fault_free;
using rows_test::Rows;
using rows_test::value_of;

constexpr int64_t kRandomWords[] = {0x0123456789abcdef, -1, (int64_t{1} << 40) + 3};

double uniform_number(int64_t index) {
  uint32_t words[4];
  fastmtl::philox_block(static_cast<uint64_t>(kRandomWords[0]), static_cast<uint64_t>(kRandomWords[2]),
                        static_cast<uint64_t>(index / 4), words);
  return fastmtl::uniform(words[index % 4]);
}

template <class Storage>
void make_whole(Rows<Storage>& rows, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (size_t d = 0; d < rows.data.size(); ++d) {
    int64_t const length = rows.lengths[d / rows.rows];
    for (int64_t e = 0; e < length; ++e) fastmtl::narrow(rows.data[d][e], static_cast<float>(random() % 9) - 4);
  }
}

/// Whether a signed sum stays, by the purity of all of them.
std::vector<bool> kept(std::vector<double> const& signed_sums, double noise) {
  double sum = 0;
  double size = 0;
  for (double const signed_sum : signed_sums) {
    sum += signed_sum;
    size += std::fabs(signed_sum);
  }
  double const purity = size > 0 ? (1 + sum / size) / 2 : 0.5;
  std::vector<bool> result;
  for (double const signed_sum : signed_sums)
    result.push_back((purity > noise && signed_sum > 0) || (purity < noise && signed_sum < 0));
  return result;
}

template <class Out>
double spacing_of(double scale) {
  double const eps = sizeof(Out) == 8            ? 0x1p-50
                     : sizeof(Out) == 4          ? 0x1p-21
                     : std::is_same_v<Out, Bf16> ? 0x1p-7
                                                 : 0x1p-10;
  return eps * scale;
}

/// Whether nothing beside the tensors themselves, whose surroundings are NaN, was written.
template <class Storage>
bool surroundings_kept(Rows<Storage> const& rows) {
  bool all = true;
  for (size_t d = 0; d < rows.memory.size(); ++d) {
    auto const begin = rows.data[d] - rows.memory[d].data();
    auto const end = begin + rows.lengths[d / rows.rows];
    for (int64_t e = 0; e < static_cast<int64_t>(rows.memory[d].size()); ++e) {
      if (e < begin || e >= end) all = all && std::isnan(value_of(rows.memory[d][e]));
    }
  }
  return all;
}

template <class Storage>
void test_graddrop(int tasks, int64_t batch, int64_t features, bool shares, bool given_noise) {
  int const reps = shares ? 1 : tasks;
  Rows<Storage> rep(reps, {batch * features}, 0, true, 1);
  Rows<Storage> grad(tasks, {batch * features}, 0, true, 2);
  Rows<Storage> out(reps, {batch * features}, 0, true, 3);
  make_whole(rep, 4);
  make_whole(grad, 5);
  std::vector<double> noise(features);
  for (int64_t f = 0; f < features; ++f) noise[f] = given_noise ? static_cast<double>(f % 8) / 8 : uniform_number(f);
  fastmtl::DropArguments arguments{};
  arguments.features = features;
  arguments.random = kRandomWords;
  arguments.random_stride = 2;
  arguments.noise = given_noise ? noise.data() : nullptr;
  arguments.leak = 0.25;
  arguments.tasks = tasks;
  arguments.shares = shares;
  arguments.aligned = features * sizeof(Storage) % 16 == 0;
  for (int r = 0; r < reps; ++r) {
    arguments.batch[r] = batch;
    arguments.rep[r] = rep.at(r, 0);
    arguments.out[r] = out.at(r, 0);
  }
  for (int t = 0; t < tasks; ++t) arguments.grad[t] = grad.at(t, 0);
  constexpr int per_block = fastmtl::kDropFeaturesOf<Storage>;
  emulation::launch((features + per_block - 1) / per_block, fastmtl::kDropThreads,
                    (tasks + fastmtl::kDropWarps) * per_block, [&] { fastmtl::graddrop_kernel<Storage>(arguments); });
  bool near = true;
  for (int64_t f = 0; f < features; ++f) {
    std::vector<double> signed_sums(tasks, 0.0);
    for (int t = 0; t < tasks; ++t) {
      for (int64_t b = 0; b < batch; ++b) {
        double const rep_value = value_of(rep.at(arguments.rep_of(t), 0)[b * features + f]);
        signed_sums[t] += (rep_value > 0 ? 1 : rep_value < 0 ? -1 : 0) * value_of(grad.at(t, 0)[b * features + f]);
      }
    }
    std::vector<bool> const stays = kept(signed_sums, noise[f]);
    for (int64_t b = 0; b < batch; ++b) {
      for (int r = 0; r < reps; ++r) {
        double want = 0;
        double scale = 0;
        for (int t = r; t < (shares ? tasks : r + 1); ++t) {
          double const term = value_of(grad.at(t, 0)[b * features + f]) * (stays[t] ? 1 : 0.25);
          want += term;
          scale += std::fabs(term);
        }
        double const got = value_of(out.at(r, 0)[b * features + f]);
        near = near && std::fabs(got - want) <= spacing_of<Storage>(scale);
      }
    }
  }
  std::string const what = "graddrop of " + std::to_string(tasks) + " tasks, batch " + std::to_string(batch) + ", " +
                           std::to_string(features) + " features of " + std::to_string(sizeof(Storage)) + " bytes";
  check(near, what);
  check(surroundings_kept(out), what + ": wrote beside its results");
  check_fault_free(what);
}

template <class Storage>
void test_graddrop_rows(int n, int64_t offset, bool alike, bool given_noise) {
  std::vector<int64_t> const lengths{1, 5003, 0, 63, 4600};
  Rows<Storage> rows(n, lengths, offset, alike, n);
  Rows<Storage> outs(1, lengths, offset, alike, n + 1);
  make_whole(rows, n);
  if (n > 1) rows.at(n - 1, 1) = nullptr;
  std::vector<double> leaks(n);
  for (int t = 0; t < n; ++t) leaks[t] = 0.25 * (t % 3);
  std::vector<std::vector<double>> noise;
  std::vector<StripPlan> plans;
  uintptr_t number = 0;
  for (size_t k = 0; k < lengths.size(); ++k) {
    noise.emplace_back(lengths[k]);
    for (int64_t e = 0; e < lengths[k]; ++e) {
      noise[k][e] = given_noise ? static_cast<double>(e % 16) / 16 : uniform_number(static_cast<int64_t>(number) + e);
    }
    std::vector<void const*> pointers(rows.data.begin() + k * n, rows.data.begin() + (k + 1) * n);
    pointers.push_back(outs.at(0, k));
    pointers.push_back(given_noise ? noise[k].data() : nullptr);
    pointers.push_back(reinterpret_cast<void const*>(number));
    plans.push_back({pointers, lengths[k], 0});
    number += static_cast<uintptr_t>((lengths[k] + 3) / 4 * 4);
  }
  fastmtl::DropRowsArguments const arguments{leaks.data(), kRandomWords, 2, n};
  fastmtl::plan_launches(plans, n + 1, sizeof(Storage), {fastmtl::kDropPiece, 2, false},
                         [&](LaunchTable const& table, GroupRuns const&, int64_t blocks) {
                           emulation::launch(blocks, fastmtl::kDropThreads, 0,
                                             [&] { fastmtl::graddrop_rows_kernel<Storage>(table, arguments); });
                         });
  std::string const what = "graddrop_rows of " + std::to_string(n) + " rows of " + std::to_string(sizeof(Storage)) +
                           " bytes, offset " + std::to_string(offset);
  for (size_t k = 0; k < lengths.size(); ++k) {
    bool near = true;
    for (int64_t e = 0; e < lengths[k]; ++e) {
      std::vector<double> values;
      for (int t = 0; t < n; ++t) values.push_back(rows.at(t, k) == nullptr ? 0 : value_of(rows.at(t, k)[e]));
      std::vector<bool> const stays = kept(values, noise[k][e]);
      double want = 0;
      double scale = 0;
      for (int t = 0; t < n; ++t) {
        want += values[t] * (stays[t] ? 1 : leaks[t]);
        scale += std::fabs(values[t]);
      }
      near = near && std::fabs(value_of(outs.at(0, k)[e]) - want) <= spacing_of<Storage>(scale);
    }
    check(near, what + ": tensor " + std::to_string(k));
  }
  check(surroundings_kept(outs), what + ": wrote beside its results");
  check_fault_free(what);
}

/// Plans of state beside rows, row by row, as the launches sort them.
template <class State, class Storage>
std::vector<StripPlan> state_plans(Rows<State>& state, Rows<Storage>& rows, bool present_only) {
  std::vector<StripPlan> plans;
  for (int t = 0; t < rows.rows; ++t) {
    for (size_t k = 0; k < rows.lengths.size(); ++k) {
      if (present_only && rows.at(t, k) == nullptr) continue;
      plans.push_back({{state.at(t, k), rows.at(t, k)}, rows.lengths[k], t});
    }
  }
  return plans;
}

template <class State, class Storage>
void test_state(int n, int64_t offset, bool alike, int64_t wanted_blocks) {
  std::vector<int64_t> const lengths{1, 5003, 0, 63, 4600};
  Rows<State> state(n, lengths, offset, true, 1);
  Rows<Storage> rows(n, lengths, alike ? offset : offset + 1, true, 2);
  rows.at(0, 1) = nullptr;
  std::vector<double> keep(n);
  std::vector<double> gains(n);
  for (int t = 0; t < n; ++t) {
    keep[t] = 0.5 + 0.125 * (t % 3);
    // What a missing row's gain is must not matter.
    gains[t] = 1 - 0.25 * t;
  }
  Rows<State> const before = state;
  auto const old = [&](int t, size_t k, int64_t e) {
    auto const d = k * n + t;
    return value_of(before.memory[d][state.data[d] - state.memory[d].data() + e]);
  };
  int64_t const same = std::is_same_v<State, Storage> ? 2 : 1;
  fastmtl::Cut const cut{fastmtl::kStatePiece, wanted_blocks, true};
  fastmtl::plan_launches(state_plans(state, rows, false), same, sizeof(State), cut,
                         [&](LaunchTable const& table, GroupRuns const&, int64_t blocks) {
                           emulation::launch(blocks, fastmtl::kStateThreads, 0, [&] {
                             fastmtl::ema_kernel<State, Storage>(table, keep.data(), gains.data());
                           });
                         });
  std::string const what = "state of " + std::to_string(n) + ", " + std::to_string(sizeof(State)) + " and " +
                           std::to_string(sizeof(Storage)) + " bytes, offset " + std::to_string(offset);
  double const tiny = sizeof(State) == 2 ? 0x1p-24 : 0;
  // Rounded to float32 on the way where both are narrower than float64.
  bool near = true;
  for (int t = 0; t < n; ++t) {
    for (size_t k = 0; k < lengths.size(); ++k) {
      for (int64_t e = 0; e < lengths[k]; ++e) {
        double const term = rows.at(t, k) == nullptr ? 0 : gains[t] * value_of(rows.at(t, k)[e]);
        double const want = keep[t] * old(t, k, e) + term;
        double const scale = std::fabs(keep[t] * old(t, k, e)) + std::fabs(term);
        near = near && std::fabs(value_of(state.at(t, k)[e]) - want) <= spacing_of<State>(scale) + tiny;
      }
    }
  }
  check(near, what + ": averages");
  check(surroundings_kept(state), what + ": averages wrote beside their state");

  for (size_t d = 0; d < state.data.size(); ++d) {
    for (int64_t e = 0; e < lengths[d / n]; ++e)
      fastmtl::narrow(state.data[d][e], std::fabs(value_of(state.data[d][e])));
  }
  Rows<State> const sums = state;
  double const epsilon = 1e-7;
  std::vector<double> risks(n, 0.0);
  fastmtl::plan_launches(state_plans(state, rows, true), same, sizeof(State), cut,
                         [&](LaunchTable const& table, GroupRuns const& runs, int64_t blocks) {
                           std::vector<double> partial(blocks, std::nan(""));
                           emulation::launch(blocks, fastmtl::kStateThreads, 0, [&] {
                             fastmtl::excess_risk_kernel<State, Storage>(table, epsilon, partial.data());
                           });
                           emulation::launch((runs.count + 7) / 8, 256, 0, [&] {
                             fastmtl::gram_reduce(runs, 1, blocks, partial.data(), true, risks.data());
                           });
                         });
  near = true;
  for (int t = 0; t < n; ++t) {
    double risk = 0;
    for (size_t k = 0; k < lengths.size(); ++k) {
      for (int64_t e = 0; e < lengths[k]; ++e) {
        auto const d = k * n + t;
        double const added = rows.at(t, k) == nullptr ? 0 : std::pow(value_of(rows.at(t, k)[e]), 2);
        double const want = value_of(sums.memory[d][state.data[d] - state.memory[d].data() + e]) + added;
        double const got = value_of(state.at(t, k)[e]);
        near = near && std::fabs(got - want) <= spacing_of<State>(want) + tiny;
        risk += added / std::sqrt(got + epsilon);
      }
    }
    check(std::fabs(risks[t] - risk) <= 0x1p-20 * risk, what + ": risk " + std::to_string(t));
  }
  check(near, what + ": sums of squares");
  check(surroundings_kept(state), what + ": sums wrote beside their state");
  check_fault_free(what);
}

/// Averages and Gram matrix in one pass: the averages of the pass that updates alone, and their products.
template <int rows>
void test_ema_gram(int num_rows, int64_t offset, bool alike, int64_t wanted_blocks, double scale) {
  std::vector<int64_t> const lengths{1, 5003, 0, 63, 4600};
  Rows<float> state(num_rows, lengths, offset, true, 1);
  Rows<float> grads(num_rows, lengths, alike ? offset : offset + 1, true, 2);
  Rows<float> apart = state;
  for (size_t d = 0; d < state.data.size(); ++d) {
    apart.data[d] = apart.memory[d].data() + (state.data[d] - state.memory[d].data());
    for (int64_t e = 0; e < lengths[d / num_rows]; ++e) {
      // Every other row leaves the range in which float32 holds its squares.
      auto const factor = static_cast<float>(d % num_rows % 2 == 0 ? scale : 1);
      state.data[d][e] *= factor;
      apart.data[d][e] *= factor;
      grads.data[d][e] *= factor;
    }
  }
  std::vector<double> keep(num_rows);
  std::vector<double> gains(num_rows);
  for (int t = 0; t < num_rows; ++t) {
    keep[t] = 0.5 + 0.125 * (t % 3);
    gains[t] = 1 - 0.25 * t;
  }
  // What the gain of a row that is nowhere is must not matter.
  for (size_t k = 0; k < lengths.size(); ++k) grads.at(0, k) = nullptr;
  gains[0] = std::nan("");
  std::string const what = "averages and products of " + std::to_string(num_rows) + ", offset " +
                           std::to_string(offset) + ", scale " + std::to_string(scale);
  fastmtl::plan_launches(state_plans(apart, grads, false), 2, sizeof(float), {fastmtl::kStatePiece, 3, true},
                         [&](LaunchTable const& table, GroupRuns const&, int64_t blocks) {
                           emulation::launch(blocks, fastmtl::kStateThreads, 0, [&] {
                             fastmtl::ema_kernel<float, float>(table, keep.data(), gains.data());
                           });
                         });
  std::vector<StripPlan> plans;
  for (size_t k = 0; k < lengths.size(); ++k) {
    StripPlan plan{{}, lengths[k], 0};
    for (int t = 0; t < num_rows; ++t) plan.pointers.push_back(state.at(t, k));
    for (int t = 0; t < num_rows; ++t) plan.pointers.push_back(grads.at(t, k));
    plans.push_back(plan);
  }
  int const pairs = num_rows * (num_rows + 1) / 2;
  std::vector<double> matrix(num_rows * num_rows, 0.0);
  fastmtl::plan_launches(
      plans, 2 * num_rows, sizeof(float), {fastmtl::kGramPiece, wanted_blocks, true},
      [&](LaunchTable const& table, GroupRuns const& runs, int64_t blocks) {
        std::vector<double> partial(pairs * blocks, std::nan(""));
        emulation::launch(blocks, fastmtl::kGramThreads, 0, [&] {
          fastmtl::ema_gram_tile_kernel<rows>(table, num_rows, keep.data(), gains.data(), partial.data());
        });
        emulation::launch((runs.count * pairs + 7) / 8, 256, 0,
                          [&] { fastmtl::gram_reduce(runs, num_rows, blocks, partial.data(), true, matrix.data()); });
      });
  bool same = true;
  for (size_t d = 0; d < state.data.size(); ++d) {
    for (int64_t e = 0; e < lengths[d / num_rows]; ++e) same = same && state.data[d][e] == apart.data[d][e];
  }
  check(same, what + ": averages");
  check(surroundings_kept(state), what + ": wrote beside its state");
  double worst = 0;
  std::vector<double> want(num_rows * num_rows, 0.0);
  for (int i = 0; i < num_rows; ++i) {
    for (int j = 0; j < num_rows; ++j) {
      for (size_t k = 0; k < lengths.size(); ++k) want[i * num_rows + j] += state.product(i, j, k);
    }
  }
  for (int i = 0; i < num_rows; ++i) {
    for (int j = 0; j < num_rows; ++j) {
      double const size = std::sqrt(want[i * num_rows + i]) * std::sqrt(want[j * num_rows + j]);
      double const error = std::fabs(matrix[i * num_rows + j] - want[i * num_rows + j]) / size;
      worst = std::fmax(worst, error);
      if (!(error == error)) worst = INFINITY;
    }
  }
  check(worst <= 4 * 0x1p-23, what + ": products, error " + std::to_string(worst));
  check_fault_free(what);
}

template <int rows>
void test_ema_grams() {
  for (int const num_rows : {rows, rows - 1}) {
    test_ema_gram<rows>(num_rows, 0, true, 3, 1);
    test_ema_gram<rows>(num_rows, 1, true, 100, 1);
    test_ema_gram<rows>(num_rows, 3, false, 2, 1);
    test_ema_gram<rows>(num_rows, 0, true, 2, 1e-17);
    test_ema_gram<rows>(num_rows, 0, true, 2, 1e18);
  }
}

template <class Storage>
void test_drops() {
  for (bool const shares : {false, true}) {
    for (int const tasks : {1, 2, 3, 40}) {
      test_graddrop<Storage>(tasks, 3, 129, shares, false);
      test_graddrop<Storage>(tasks, 70, 64, shares, tasks == 2);
    }
    test_graddrop<Storage>(3, 1, 1, shares, false);
    test_graddrop<Storage>(128, 2, 72, shares, false);
  }
  for (int const n : {1, 2, 3, 8, 9, 40}) {
    test_graddrop_rows<Storage>(n, 0, true, false);
    test_graddrop_rows<Storage>(n, 1, true, n == 3);
    test_graddrop_rows<Storage>(n, 3, false, n == 9);
  }
}

template <class State, class Storage>
void test_states() {
  test_state<State, Storage>(1, 0, true, 4);
  test_state<State, Storage>(3, 1, true, 100);
  test_state<State, Storage>(5, 3, false, 2);
}

}  // namespace

int main() {
  test_drops<float>();
  test_drops<double>();
  test_drops<Bf16>();
  test_drops<F16>();
  test_states<float, float>();
  test_states<double, double>();
  test_states<Bf16, Bf16>();
  test_states<F16, F16>();
  test_states<Bf16, float>();
  test_states<F16, float>();
  test_states<float, double>();
  test_states<Bf16, double>();
  test_ema_grams<2>();
  test_ema_grams<3>();
  test_ema_grams<8>();
  return finish("cuda_passes");
}
