// One case of the fuzzer: what was drawn, how solvers are run on it, and how a failure is told.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "fuzz_zoo.h"
#include "thread_team.h"

namespace fuzz {

struct Shape {
  int groups = 1;
  int lanes = 1;
  int size() const { return groups * lanes; }
};

/// Memory full of NaN between two rows of guards that nobody may write to.
class Guarded {
 public:
  explicit Guarded(int64_t size) : memory_(static_cast<size_t>(size) + 2 * kMargin, NAN) {
    for (size_t k = 0; k < kMargin; ++k) memory_[k] = memory_[memory_.size() - 1 - k] = guard();
  }

  double* data() { return memory_.data() + kMargin; }
  Vector values() const { return {memory_.begin() + kMargin, memory_.end() - kMargin}; }

  bool intact() const {
    for (size_t k = 0; k < kMargin; ++k) {
      if (!same(memory_[k]) || !same(memory_[memory_.size() - 1 - k])) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kMargin = 16;
  static constexpr uint64_t kMark = 0x7ff85afec0ded00d;
  static double guard() { return std::bit_cast<double>(kMark); }
  static bool same(double value) { return std::bit_cast<uint64_t>(value) == kMark; }

  std::vector<double> memory_;
};

struct Trial {
  uint64_t seed;
  int64_t index;
  Gram gram;
  Shape shape;  // of the team that solves it after one lane did; 1 x 1 for none
  Draw draw;
  std::string_view solver;
  std::ostringstream parameters{};
  int64_t failures = 0;

  void check(bool holds, std::string const& what) {
    if (holds) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s: %s; T=%d, %s, case %lld of seed %llu;%s\n", std::string(solver).c_str(),
                 what.c_str(), gram.n, std::string(gram.kind).c_str(), static_cast<long long>(index),
                 static_cast<unsigned long long>(seed), parameters.str().c_str());
  }

  /// Checks that `worst`, in units of what is granted, is at most one; NaN is not.
  void within(Wide worst, std::string const& what) {
    if (!(worst <= 1)) check(false, what + " off by " + std::to_string(static_cast<double>(worst)) + " of the bound");
  }

  /// The n numbers that body(team, result, workspace) writes on a team of `shape`, its memory poisoned and guarded.
  template <class Body>
  Vector solve(Shape on, int64_t workspace, Body const& body, int64_t count = 0) {
    Guarded result(count == 0 ? gram.n : count);
    Guarded memory(workspace);
    auto run = [&](auto const& team) { body(team, result.data(), memory.data()); };
    if (on.size() == 1) {
      run(fastmtl::HostTeam{});
    } else {
      fastmtl::ThreadTeam::run(on.groups, on.lanes, run);
    }
    check(result.intact() && memory.intact(), "writes outside its memory");
    return result.values();
  }

  /// Whether the numbers are what G promises in any case: all NaN if it has a non-finite entry, else all finite.
  bool sane(Vector const& values, bool expect_nan) {
    bool holds = true;
    for (double value : values) holds = holds && (expect_nan ? std::isnan(value) : std::isfinite(value));
    check(holds, expect_nan ? "not all NaN" : "not all finite");
    return holds && !expect_nan;
  }

  bool not_finite() const { return gram.promise == Promise::none; }
  bool exact() const { return gram.promise == Promise::bound; }
  bool teams() const { return shape.size() > 1; }
};

/// Calls solve(shape) on one lane and, where the trial has a team, on that; check(result, name of the team) on each and
/// agree(one, many) on both.
template <class Solve, class Check, class Agree>
void on_one_and_many(Trial& trial, Solve const& solve, Check const& check, Agree const& agree) {
  auto const one = solve(Shape{});
  check(one, "one lane");
  if (!trial.teams()) return;
  auto const many = solve(trial.shape);
  check(many, std::to_string(trial.shape.groups) + " x " + std::to_string(trial.shape.lanes) + " lanes");
  if (trial.exact()) agree(one, many);
}

/// Weights to start near: none, a guess, or what no solver should trust.
inline Vector draw_warm(Trial& trial) {
  Draw& draw = trial.draw;
  int const which = draw.below(4);
  trial.parameters << " warm start " << which;
  Vector warm(which == 0 ? 0 : trial.gram.n);
  double const scale = which == 2 ? draw.power(-10, 10) : 1;
  for (double& w : warm) w = scale * (draw.chance(0.3) ? 0.0 : draw.uniform(0, 1));
  if (which == 3) warm[draw.below(trial.gram.n)] = draw.among(std::array<double, 4>{NAN, INFINITY, -1, 1e300});
  return warm;
}

inline double const* data_or_null(Vector const& vector) { return vector.empty() ? nullptr : vector.data(); }

}  // namespace fuzz
