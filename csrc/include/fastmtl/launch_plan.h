// How GPU kernels over gradients are launched: what one launch is told of the memory, and which block takes what.
//
// Every tensor is a strip of elements with one pointer per row, cut into pieces of equal length. A launch gets a table
// of strips as its argument, so that nothing is copied to the device and a CUDA graph can capture it; where the strips
// do not fit one argument, more launches follow. Which block takes which pieces depends on the sizes and the device's
// number of processors alone, and so do all rounding errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__CUDACC__)
#define FASTMTL_HOST_DEVICE __host__ __device__
#else
#define FASTMTL_HOST_DEVICE
#endif

namespace fastmtl {

/// Bytes that kernels load and store at once.
constexpr int64_t kLoadBytes = 16;

/// One tensor of each row, as kernels see it. `base` (not above 0) is the element at which the first vector begins;
/// vectors can be loaded whole if `aligned`, except where they stick out of the strip.
struct Strip {
  int64_t start;   // Position of the first piece in the launch.
  int64_t length;  // Elements.
  int32_t group;
  int16_t base;
  int16_t aligned;
};

/// The argument of a launch. The words after the strips are pointers, strip by strip.
struct LaunchTable {
  // Arguments of 32764 bytes are allowed; some are left for the others.
  static constexpr int kWords = 4000;

  int32_t strips;
  int32_t pointers;  // Of each strip.
  int64_t pieces;
  int64_t pieces_per_block;
  int64_t piece;  // Elements.
  uint64_t words[kWords];

  static constexpr int kStripWords = sizeof(Strip) / sizeof(uint64_t);

  FASTMTL_HOST_DEVICE static int capacity(int pointers) { return kWords / (kStripWords + pointers); }

  FASTMTL_HOST_DEVICE Strip const& strip(int s) const { return reinterpret_cast<Strip const*>(words)[s]; }

  FASTMTL_HOST_DEVICE void const* pointer(int s, int p) const {
    return reinterpret_cast<void const*>(words[strips * kStripWords + s * pointers + p]);
  }

  /// The strip that has the piece at `position`, or the last one before it where none has.
  FASTMTL_HOST_DEVICE int find(int64_t position) const {
    int low = 0;
    int high = strips;
    while (high - low > 1) {
      int const middle = (low + high) / 2;
      (strip(middle).start <= position ? low : high) = middle;
    }
    return low;
  }

  /// Elements [first, last) of strip s that lie in the pieces from `position` to `end`; a multiple of the vector.
  struct Range {
    int64_t first;
    int64_t last;
  };
  FASTMTL_HOST_DEVICE Range range(int s, int64_t position, int64_t end) const {
    Strip const& taken = strip(s);
    int64_t const whole = taken.base + pieces_of(taken.length, taken.base, piece) * piece;
    int64_t const wanted = taken.base + (end - taken.start) * piece;
    return {taken.base + (position - taken.start) * piece, wanted < whole ? wanted : whole};
  }

  FASTMTL_HOST_DEVICE static int64_t pieces_of(int64_t length, int64_t base, int64_t piece) {
    return (length - base + piece - 1) / piece;
  }
};
static_assert(sizeof(LaunchTable) <= 32764 - 512);

/// A tensor to launch over: a pointer per row (null for none), then one per result.
struct StripPlan {
  std::vector<void const*> pointers;
  int64_t length;
  int32_t group;
};

/// How the vectors of a strip lie: all of `count` pointers that are there must have one phase for whole loads.
inline Strip lay(void const* const* pointers, int64_t count, int64_t item, int64_t length, int32_t group) {
  Strip strip{0, length, group, 0, 1};
  bool first = true;
  for (int64_t p = 0; p < count; ++p) {
    if (pointers[p] == nullptr) continue;
    auto const phase = static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointers[p]) % kLoadBytes);
    auto const base = static_cast<int16_t>(-(phase / item));
    if (phase % item != 0 || (!first && base != strip.base)) return {0, length, group, 0, 0};
    strip.base = base;
    first = false;
  }
  return strip;
}

/// Consecutive blocks of a launch that work for one group.
struct GroupRuns {
  static constexpr int kMax = LaunchTable::kWords / (LaunchTable::kStripWords + 1);
  int32_t count;
  int32_t group[kMax];
  int32_t first[kMax + 1];  // Block.
};

/// One way to cut: elements of a piece, blocks wanted, and whether a block may work for one group only.
struct Cut {
  int64_t piece;
  int64_t blocks;
  bool by_group;
};

/// Calls launch(table, runs, blocks) for each launch that `plans` need, in order. Where blocks are cut by group,
/// `plans` must be sorted by group. `same_items` of each plan's pointers have elements of `item` bytes and must be
/// alike in phase. Plans without elements are left out.
template <class Launch>
void plan_launches(std::vector<StripPlan> const& plans, int64_t same_items, int64_t item, Cut const& cut,
                   Launch const& launch) {
  LaunchTable table;
  GroupRuns runs;
  size_t next = 0;
  while (next < plans.size()) {
    std::vector<StripPlan const*> chosen;
    std::vector<Strip> strips;
    int64_t total = 0;
    auto const pointers = static_cast<int>(plans[next].pointers.size());
    auto const capacity = static_cast<size_t>(LaunchTable::capacity(pointers));
    for (; next < plans.size() && chosen.size() < capacity; ++next) {
      StripPlan const& plan = plans[next];
      if (plan.length == 0) continue;
      chosen.push_back(&plan);
      strips.push_back(lay(plan.pointers.data(), same_items, item, plan.length, plan.group));
      total += LaunchTable::pieces_of(plan.length, strips.back().base, cut.piece);
    }
    if (chosen.empty()) return;

    int64_t const per_block = std::max<int64_t>(1, (total + cut.blocks - 1) / cut.blocks);
    int64_t position = 0;
    runs.count = 0;
    for (size_t s = 0; s < strips.size(); ++s) {
      bool const opens = s == 0 || (cut.by_group && strips[s].group != strips[s - 1].group);
      if (opens) {
        position = (position + per_block - 1) / per_block * per_block;
        runs.group[runs.count] = strips[s].group;
        runs.first[runs.count++] = static_cast<int32_t>(position / per_block);
      }
      strips[s].start = position;
      position += LaunchTable::pieces_of(strips[s].length, strips[s].base, cut.piece);
    }
    int64_t const blocks = (position + per_block - 1) / per_block;
    runs.first[runs.count] = static_cast<int32_t>(blocks);

    table.strips = static_cast<int32_t>(strips.size());
    table.pointers = pointers;
    table.pieces = position;
    table.pieces_per_block = per_block;
    table.piece = cut.piece;
    std::memcpy(table.words, strips.data(), strips.size() * sizeof(Strip));
    uint64_t* word = table.words + strips.size() * LaunchTable::kStripWords;
    for (StripPlan const* plan : chosen) {
      for (void const* pointer : plan->pointers) *word++ = reinterpret_cast<uintptr_t>(pointer);
    }
    launch(table, runs, blocks);
  }
}

/// Calls visit(strip, first, last) for the elements that block number `block` takes.
template <class Visit>
FASTMTL_HOST_DEVICE void for_each_range(LaunchTable const& table, int64_t block, Visit const& visit) {
  int64_t position = block * table.pieces_per_block;
  int64_t const end =
      position + table.pieces_per_block < table.pieces ? position + table.pieces_per_block : table.pieces;
  for (int s = table.find(position); s < table.strips && position < end; ++s) {
    int64_t const next = s + 1 < table.strips ? table.strip(s + 1).start : table.pieces;
    int64_t const stop = next < end ? next : end;
    LaunchTable::Range const range = table.range(s, position, stop);
    if (range.first < range.last) visit(s, range.first, range.last);
    position = stop;
  }
}

}  // namespace fastmtl
