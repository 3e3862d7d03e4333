// Decodes a canonical Huffman code: deepthin/coding/huffman.py builds the table and is the definition.
#pragma once
#include <cstdint>

namespace deepthin {

// Reads symbols from bit `start` of `data` on, lowest bits first, until `count` of them are not `skip`, or `most` are read.
// `lookup` has 2^width entries, 16 * symbol + bits of its code, 1 to `width` each. Returns how many symbols there are in `out`,
// which has room for `most`, and sets `end` to where the last code ends; -1 where the bits end or `most` are too few.
int64_t huffman_walk(const uint8_t* data, int64_t bytes, int64_t start, const uint32_t* lookup, int width, uint16_t* out,
                     int64_t most, int64_t count, int64_t skip, int64_t* end);

}  // namespace deepthin
