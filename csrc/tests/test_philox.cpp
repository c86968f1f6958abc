// Philox against the known answers its authors publish, and the map from words to numbers.
#include <cstdint>

#include "check.h"
#include "fastmtl/philox.h"

namespace {

void check_words(uint64_t seed, uint64_t offset, uint64_t block, uint32_t const (&want)[4], char const* what) {
  uint32_t got[4];
  fastmtl::philox_block(seed, offset, block, got);
  for (int word = 0; word < 4; ++word) check(got[word] == want[word], what);
}

}  // namespace

int main() {
  check_words(0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}, "all zero");
  check_words(~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}, "all ones");
  check_words(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88,
              {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}, "digits of pi");
  check(fastmtl::uniform(0) == 0.0f, "the smallest number is 0");
  check(fastmtl::uniform(~uint32_t{0}) == 1.0f - 0x1p-24f, "the largest number is below 1");
  check(2 * fastmtl::uniform(0x80000000) - 1 == 0.0f, "half of the words lie below one half");
  return finish("philox");
}
