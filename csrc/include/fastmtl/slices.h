// Cuts K tensors, seen as one long vector per group, into slices of about equal length. A slice is what one thread
// takes at a time; where the cuts fall depends on the sizes alone, never on the number of threads, and so do all
// rounding errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastmtl {

/// One tensor of the vector.
struct Segment {
  int64_t index;   // Which of the K tensors.
  int64_t length;  // Elements.
  int64_t group;
};

/// `length` elements from element `offset` of segment number `segment` on, running through as many segments as needed.
struct Slice {
  int64_t segment;
  int64_t offset;
  int64_t length;
  int64_t group;
};

/// Cuts inside a segment fall on multiples of this many elements, so that slices start on whole cache lines.
constexpr int64_t kSliceAlignment = 1024;
constexpr int64_t kMaxSlices = 128;

/// `segments` must be sorted by group. A group gives at least one slice if it has an element; all groups together give
/// at most kMaxSlices plus their number, and no slice but the last of a group is shorter than `min_length`.
inline std::vector<Slice> cut(std::vector<Segment> const& segments, int64_t min_length) {
  int64_t total = 0;
  for (Segment const& segment : segments) total += segment.length;
  int64_t const even = (total + kMaxSlices - 1) / kMaxSlices;
  int64_t const target = std::max<int64_t>({min_length, even, 1});
  int64_t const aligned = (target + kSliceAlignment - 1) / kSliceAlignment * kSliceAlignment;

  std::vector<Slice> slices;
  auto const count = static_cast<int64_t>(segments.size());
  for (int64_t s = 0; s < count; ++s) {
    int64_t offset = 0;
    while (offset < segments[s].length) {
      bool const open = !slices.empty() && slices.back().group == segments[s].group && slices.back().length < aligned;
      if (!open) slices.push_back({s, offset, 0, segments[s].group});
      Slice& slice = slices.back();
      int64_t const left = segments[s].length - offset;
      int64_t const room = (aligned - slice.length + kSliceAlignment - 1) / kSliceAlignment * kSliceAlignment;
      int64_t const taken = std::min(left, room);
      slice.length += taken;
      offset += taken;
    }
  }
  return slices;
}

/// A part of tensor `index`.
struct Piece {
  int64_t index = 0;
  int64_t begin = 0;
  int64_t length = 0;
};

/// Calls visit(piece) for each piece of a slice, in order; none crosses a tensor or exceeds `max_length`.
template <class Visit>
void for_each_chunk(std::vector<Segment> const& segments, Slice const& slice, int64_t max_length, Visit visit) {
  int64_t segment = slice.segment;
  int64_t offset = slice.offset;
  int64_t left = slice.length;
  while (left > 0) {
    int64_t const length = std::min({left, max_length, segments[segment].length - offset});
    if (length > 0) visit(Piece{segments[segment].index, offset, length});
    left -= length;
    offset += length;
    if (offset == segments[segment].length) {
      ++segment;
      offset = 0;
    }
  }
}

/// Calls visit(piece, next) for each piece of a slice, in order; the last one is followed by one of length 0.
template <class Visit>
void for_each_chunk_ahead(std::vector<Segment> const& segments, Slice const& slice, int64_t max_length, Visit visit) {
  Piece piece;
  for_each_chunk(segments, slice, max_length, [&](Piece const& next) {
    if (piece.length > 0) visit(piece, next);
    piece = next;
  });
  if (piece.length > 0) visit(piece, Piece{});
}

}  // namespace fastmtl
