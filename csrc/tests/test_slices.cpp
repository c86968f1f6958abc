// Slices cover every element once, in order, whatever the sizes; with sizes no machine could allocate.
#include <cstdint>
#include <vector>

#include "check.h"
#include "fastmtl/slices.h"

namespace {

using fastmtl::Segment;
using fastmtl::Slice;

/// Walks all slices in chunks and checks that they run through the segments without a gap.
void check_cover(std::vector<Segment> const& segments, int64_t min_length, int64_t chunk) {
  std::vector<Slice> const slices = fastmtl::cut(segments, min_length);
  size_t segment = 0;
  int64_t offset = 0;
  auto const skip_finished = [&] {
    while (segment < segments.size() && segments[segment].length == offset) {
      ++segment;
      offset = 0;
    }
  };
  for (Slice const& slice : slices) {
    check(slice.length > 0, "no slice is empty");
    int64_t walked = 0;
    fastmtl::for_each_chunk(segments, slice, chunk, [&](fastmtl::Piece const& piece) {
      auto const [index, begin, length] = piece;
      skip_finished();
      check(segment < segments.size() && segments[segment].index == index, "chunks follow the order of the segments");
      check(begin == offset, "chunks leave no gap");
      check(length > 0 && length <= chunk && begin + length <= segments[segment].length,
            "chunks stay in their segment");
      check(segments[segment].group == slice.group, "a slice belongs to one group");
      offset += length;
      walked += length;
    });
    check(walked == slice.length, "a slice is walked whole");
  }
  skip_finished();
  check(segment == segments.size(), "all segments are covered");
}

void test_small() {
  check_cover({}, 1, 16);
  check_cover({{0, 0, 0}}, 1, 16);
  check_cover({{0, 1, 0}, {1, 0, 0}, {2, 63, 0}, {3, 129, 1}, {4, 4099, 1}, {5, 0, 2}, {6, 7, 3}}, 1, 100);
  check_cover({{0, 1'000'003, 0}, {1, 5, 0}, {2, 77'777, 0}}, 2048, 512);
}

void test_beyond_32_bits() {
  constexpr int64_t huge = (int64_t{1} << 40) + 12345;
  check_cover({{0, huge, 0}, {1, 3, 0}, {2, huge - 7, 0}, {3, huge, 1}}, 1, int64_t{1} << 35);
  std::vector<Slice> const slices = fastmtl::cut({{0, huge, 0}}, 1);
  check(slices.size() <= fastmtl::kMaxSlices, "the number of slices is bounded");
  check(slices.back().offset > int64_t{1} << 39, "offsets exceed 32 bits");
}

void test_counts() {
  check(fastmtl::cut({{0, 2000, 0}}, 4096).size() == 1, "short input is one slice");
  check(fastmtl::cut({{0, 10, 0}, {1, 10, 1}, {2, 10, 2}}, 4096).size() == 3, "each group has a slice");
  std::vector<Slice> const slices = fastmtl::cut({{0, 11'000'000, 0}}, 1);
  for (Slice const& slice : slices) check(slice.offset % fastmtl::kSliceAlignment == 0, "slices are aligned");
}

}  // namespace

int main() {
  test_small();
  test_beyond_32_bits();
  test_counts();
  return finish("slices");
}
