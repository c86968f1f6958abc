// The CUDA kernels of gram and combine, run on the CPU thread by thread: launch tables, heads and tails of strips,
// missing rows, all dtypes and ranges, against sums in float64.
#include "cuda_emulation.h"
// The emulation comes first: it says what the kernels' words mean here.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../kernels/combine_kernels.cuh"
#include "../../kernels/gram_matrix.cuh"
#include "cuda_rows.h"

namespace {

using fastmtl::Bf16;
using fastmtl::Cut;
using fastmtl::F16;
using fastmtl::GroupRuns;
using fastmtl::LaunchTable;
using fastmtl::StripPlan;
using rows_test::check_fault_free;
using rows_test::Rows;
using rows_test::value_of;

using Kernel = void (*)(LaunchTable const, int, double*);

template <class Storage>
Kernel kernel_for(int rows) {
  using namespace fastmtl;
  if (rows <= 2) return gram_tile_kernel<Storage, 2>;
  if (rows <= 3) return gram_tile_kernel<Storage, 3>;
  if (rows <= 4) return gram_tile_kernel<Storage, 4>;
  if (rows <= 6) return gram_tile_kernel<Storage, 6>;
  if (rows <= 8) return gram_tile_kernel<Storage, 8>;
  if (rows <= 16) return gram_matrix_kernel<Storage, 1>;
  if (rows <= 32) return gram_matrix_kernel<Storage, 2>;
  if (rows <= 48) return gram_matrix_kernel<Storage, 3>;
  if (rows <= 64) return gram_matrix_kernel<Storage, 4>;
  return gram_matrix_kernel<Storage, 8>;
}

template <class Storage>
std::vector<double> run_gram(Rows<Storage> const& rows, std::vector<int32_t> const& group, int groups, int64_t blocks) {
  int const n = rows.rows;
  int64_t const pairs = int64_t{n} * (n + 1) / 2;
  std::vector<double> result(groups * n * n, 0.0);
  int64_t const piece = n <= 8 ? fastmtl::kGramPiece : n <= 64 ? fastmtl::kMatrixPiece : fastmtl::kSharedMatrixPiece;
  Cut const cut{piece, blocks, true};
  fastmtl::plan_launches(
      rows.plans(group), n, sizeof(Storage), cut,
      [&](LaunchTable const& table, GroupRuns const& runs, int64_t launched) {
        std::vector<double> partial(pairs * launched, std::nan(""));
        emulation::launch(launched, 128, pairs, [&] { kernel_for<Storage>(n)(table, n, partial.data()); });
        emulation::launch((runs.count * pairs + 7) / 8, 256, 0,
                          [&] { fastmtl::gram_reduce(runs, n, launched, partial.data(), true, result.data()); });
      });
  return result;
}

template <class Storage>
void test_gram(Rows<Storage> const& rows, std::vector<int32_t> const& group, int groups, int64_t blocks, double allowed,
               std::string const& what) {
  int const n = rows.rows;
  std::vector<double> const got = run_gram(rows, group, groups, blocks);
  std::vector<double> want(got.size(), 0.0);
  for (size_t k = 0; k < rows.lengths.size(); ++k) {
    double* const matrix = want.data() + (group.empty() ? 0 : group[k]) * n * n;
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) matrix[i * n + j] += rows.product(i, j, k);
    }
  }
  double worst = 0;
  for (int g = 0; g < groups; ++g) {
    double const* const exact = want.data() + g * n * n;
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        double const scale = std::sqrt(exact[i * n + i]) * std::sqrt(exact[j * n + j]);
        double const error = std::fabs(got[g * n * n + i * n + j] - exact[i * n + j]);
        worst = std::fmax(worst, scale > 0 ? error / scale : error);
        if (!(error == error)) worst = INFINITY;
      }
    }
  }
  check(worst <= allowed, what + ": error " + std::to_string(worst / allowed) + " of what is allowed");
  check_fault_free(what);
}

constexpr double kFloatError = 4 * 0x1p-23;

template <class Storage>
void test_gram_of(std::string const& name, double allowed) {
  for (int const n : {1, 2, 3, 4, 5, 8, 9, 17, 40, 64, 65, 128}) {
    std::vector<int64_t> const lengths =
        n <= 8 ? std::vector<int64_t>{1, 4099, 0, 63, 517} : std::vector<int64_t>{1, 133, 0, 63, 130};
    std::string const what = name + " gram of " + std::to_string(n);
    test_gram(Rows<Storage>(n, lengths, 0, true, n), {}, 1, 3, allowed, what);
    if (n > 17) continue;
    test_gram(Rows<Storage>(n, lengths, 1, true, n), {}, 1, 100, allowed, what + ", offset");
    test_gram(Rows<Storage>(n, lengths, 0, false, n), {0, 2, 2, 3, 3}, 4, 2, allowed, what + ", not alike, groups");
    Rows<Storage> gaps(n, lengths, 3, true, n);
    gaps.at(0, 1) = gaps.at(n - 1, 3) = nullptr;
    test_gram(gaps, {}, 1, 5, allowed, what + ", gaps");
  }
}

void test_ranges() {
  for (int const n : {3, 8, 12, 70}) {
    for (double const scale : {1e-19, 1e-8, 1e15, 1e19}) {
      Rows<float> rows(n, {603}, 0, true, n);
      for (int t = 0; t < n; ++t) {
        double const factor = t % 4 == 0 ? scale : t % 4 == 1 ? 1 : t % 4 == 2 ? 1 / scale : 0;
        for (int64_t e = 0; e < 603; ++e) rows.at(t, 0)[e] = static_cast<float>(rows.at(t, 0)[e] * factor);
      }
      test_gram(rows, {}, 1, 2, kFloatError, "range " + std::to_string(scale) + " of " + std::to_string(n));
    }
    Rows<float> rows(n, {303}, 0, true, n);
    rows.at(1, 0)[77] = std::numeric_limits<float>::infinity();
    rows.at(2, 0)[303 - 1] = std::nanf("");
    std::vector<double> const got = run_gram(rows, {}, 1, 2);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        bool const touched = i == 1 || j == 1 || i == 2 || j == 2;
        check(std::isfinite(got[i * n + j]) != touched, "non-finite rows of " + std::to_string(n));
      }
    }
  }
}

/// Equal entries make every rounding alike, so more is allowed; the error must not grow with the length.
void test_equal_entries() {
  for (int const n : {2, 10, 70}) {
    int64_t const length = n < 70 ? 4099 : 515;
    Rows<float> rows(n, {length}, 0, true, 1);
    for (int t = 0; t < n; ++t) std::fill_n(rows.at(t, 0), length, 0.1f + t);
    test_gram(rows, {}, 1, 1, 2 * kFloatError, "equal entries of " + std::to_string(n));
  }
}

/// More tensors than one table holds.
void test_many_launches() {
  int const n = 5;
  size_t const count = 2 * LaunchTable::capacity(n) + 3;
  std::vector<int64_t> lengths(count, 3);
  std::vector<int32_t> group(count);
  for (size_t k = 0; k < count; ++k) group[k] = static_cast<int32_t>(k / 100);
  test_gram(Rows<double>(n, lengths, 0, true, 1), group, static_cast<int>((count + 99) / 100), 64, 1e-14,
            "many launches");
}

template <class Storage, class Out>
void test_combine(int n, int64_t offset, bool alike, bool accumulate, int results, bool by_group) {
  constexpr bool same = std::is_same_v<Storage, Out>;
  std::vector<int64_t> const lengths{1, 5003, 0, 63, 4600};
  std::vector<int32_t> const group{1, 0, 0, 1, 1};
  Rows<Storage> rows(n, lengths, offset, alike, n);
  Rows<Out> outs(results, lengths, offset, alike, n + 1);
  Rows<Out> const before = outs;
  rows.at(n - 1, 1) = nullptr;
  std::vector<double> weights((by_group ? 2 : results) * n);
  for (size_t w = 0; w < weights.size(); ++w) weights[w] = w % 4 == 2 ? 0 : 0.5 - 0.25 * static_cast<double>(w);
  std::vector<void*> targets(results * lengths.size());
  for (int m = 0; m < results; ++m) {
    for (size_t k = 0; k < lengths.size(); ++k) targets[m * lengths.size() + k] = outs.at(m, k);
  }
  std::vector<std::vector<double>> want;
  std::vector<std::vector<double>> scale;
  for (int m = 0; m < results; ++m) {
    for (size_t k = 0; k < lengths.size(); ++k) {
      want.emplace_back(lengths[k], 0.0);
      scale.emplace_back(lengths[k], 0.0);
      for (int64_t e = 0; e < lengths[k]; ++e) {
        for (int t = 0; t < n; ++t) {
          double const weight = weights[(by_group ? group[k] : m) * n + t];
          double const term = weight == 0 || rows.at(t, k) == nullptr ? 0 : weight * value_of(rows.at(t, k)[e]);
          want.back()[e] += term;
          scale.back()[e] += std::fabs(term);
        }
        if (accumulate) want.back()[e] += value_of(outs.at(m, k)[e]);
        if (accumulate) scale.back()[e] += std::fabs(value_of(outs.at(m, k)[e]));
      }
    }
  }
  // Rows without weight are not read.
  for (int t = 0; t < n; ++t) {
    bool unread = true;
    for (size_t w = t; w < weights.size(); w += n) unread = unread && weights[w] == 0;
    for (size_t k = 0; unread && k < lengths.size(); ++k) rows.at(t, k) = reinterpret_cast<Storage*>(sizeof(Storage));
  }
  fastmtl::OutType const type = sizeof(Out) == 8            ? fastmtl::OutType::f64
                                : sizeof(Out) == 4          ? fastmtl::OutType::f32
                                : std::is_same_v<Out, Bf16> ? fastmtl::OutType::bf16
                                                            : fastmtl::OutType::f16;
  fastmtl::CombineArguments const arguments{weights.data(), n, results, by_group, accumulate, type};
  fastmtl::plan_launches(rows.plans(group, targets), n + (same ? results : 0), sizeof(Storage),
                         {fastmtl::kCombinePiece, 2, false},
                         [&](LaunchTable const& table, GroupRuns const&, int64_t blocks) {
                           emulation::launch(blocks * results, fastmtl::kCombineThreads, 0,
                                             [&] { fastmtl::combine_kernel<Storage, same>(table, arguments); });
                         });
  double const eps = sizeof(Out) == 8            ? 0x1p-52
                     : sizeof(Out) == 4          ? 0x1p-23
                     : std::is_same_v<Out, Bf16> ? 0x1p-7
                                                 : 0x1p-10;
  // Below the smallest normal number the spacing no longer shrinks.
  double const spacing = std::is_same_v<Out, F16> ? 0x1p-24 : 0;
  std::string const what = "combine of " + std::to_string(n) + ", " + std::to_string(sizeof(Storage)) + " to " +
                           std::to_string(sizeof(Out)) + " bytes, offset " + std::to_string(offset);
  for (size_t r = 0; r < want.size(); ++r) {
    Out const* const got = static_cast<Out const*>(targets[r]);
    bool near = true;
    for (size_t e = 0; e < want[r].size(); ++e) {
      near = near && std::fabs(value_of(got[e]) - want[r][e]) <= 4 * eps * scale[r][e] + spacing;
    }
    check(near, what + ": result " + std::to_string(r));
  }
  for (size_t b = 0; b < outs.memory.size(); ++b) {
    auto const past = outs.data[b] - outs.memory[b].data();
    auto const end = past + lengths[b / results];
    bool kept = true;
    for (int64_t e = 0; e < static_cast<int64_t>(outs.memory[b].size()); ++e) {
      if (e < past || e >= end) kept = kept && std::isnan(value_of(outs.memory[b][e]));
    }
    check(kept, what + ": wrote beside its results");
  }
  check_fault_free(what);
}

void test_combines() {
  for (int const n : {1, 2, 4, 5, 9, 40}) {
    for (bool const accumulate : {false, true}) {
      test_combine<float, float>(n, 0, true, accumulate, 1, false);
      test_combine<float, float>(n, 3, true, accumulate, 2, false);
      test_combine<Bf16, Bf16>(n, 5, true, accumulate, 1, true);
    }
    test_combine<float, float>(n, 0, false, true, 1, true);
    test_combine<double, double>(n, 1, true, false, 3, false);
    test_combine<F16, F16>(n, 0, true, true, 1, false);
    test_combine<float, Bf16>(n, 1, true, true, 1, false);
    test_combine<Bf16, float>(n, 0, true, true, 1, true);
    test_combine<F16, double>(n, 0, false, false, 1, false);
    test_combine<double, F16>(n, 0, true, false, 1, false);
  }
}

/// Every piece of every strip belongs to one block, and blocks to one group where that is asked for.
void test_plans() {
  std::mt19937_64 random(0);
  for (int trial = 0; trial < 300; ++trial) {
    bool const by_group = random() % 2 == 0;
    std::vector<StripPlan> plans(random() % 40);
    int32_t group = 0;
    for (StripPlan& plan : plans) {
      group += random() % 3 == 0;
      plan = {{reinterpret_cast<void*>(64 + 4 * (random() % 4))}, static_cast<int64_t>(random() % 5000), group};
    }
    std::vector<std::vector<int>> taken;
    for (StripPlan const& plan : plans) taken.emplace_back(plan.length, 0);
    Cut const cut{static_cast<int64_t>(4 << random() % 9), 1 + static_cast<int64_t>(random() % 50), by_group};
    fastmtl::plan_launches(plans, 1, 4, cut, [&](LaunchTable const& table, GroupRuns const& runs, int64_t blocks) {
      std::vector<size_t> index;
      for (size_t p = 0; p < plans.size(); ++p) {
        if (plans[p].length > 0) index.push_back(p);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        int run = 0;
        while (runs.first[run + 1] <= block) ++run;
        bool some = false;
        fastmtl::for_each_range(table, block, [&](int s, int64_t first, int64_t last) {
          some = true;
          check((first - table.strip(s).base) % 4 == 0 && (last - table.strip(s).base) % 4 == 0, "whole vectors");
          check(!by_group || table.strip(s).group == runs.group[run], "one group for a block");
          for (int64_t e = std::max<int64_t>(first, 0); e < std::min(last, table.strip(s).length); ++e) {
            ++taken[index[s]][e];
          }
        });
        check(some, "no block without work");
      }
      check(runs.first[runs.count] == blocks, "runs hold all blocks");
      check(blocks <= cut.blocks + runs.count, "not many more blocks than asked for");
    });
    for (auto const& strip : taken) {
      check(std::all_of(strip.begin(), strip.end(), [](int times) { return times == 1; }), "each element once");
    }
  }
}

void test_rounding() {
  std::mt19937_64 random(0);
  for (int trial = 0; trial < 20000; ++trial) {
    double const value =
        std::ldexp(static_cast<double>(static_cast<int64_t>(random())), static_cast<int>(random() % 180) - 150);
    Bf16 near;
    fastmtl::narrow(near, value);
    double const got = value_of(near);
    Bf16 const up{static_cast<uint16_t>(near.bits + 1)};
    Bf16 const down{static_cast<uint16_t>(near.bits - 1)};
    check(std::fabs(got - value) <= std::fabs(value_of(up) - value) &&
              std::fabs(got - value) <= std::fabs(value_of(down) - value),
          "bfloat16 nearest to " + std::to_string(value));
  }
}

}  // namespace

int main() {
  test_plans();
  test_rounding();
  test_combines();
  test_gram_of<float>("float32", kFloatError);
  test_gram_of<double>("float64", 64 * 0x1p-52);
  test_gram_of<Bf16>("bfloat16", kFloatError);
  test_gram_of<F16>("float16", kFloatError);
  test_ranges();
  test_equal_entries();
  test_many_launches();
  return finish("cuda_rows");
}
