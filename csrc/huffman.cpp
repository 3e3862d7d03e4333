// A 64-bit buffer is refilled before it runs low; a symbol costs a look-up and a shift.
#include "huffman.h"

#include <bit>
#include <cstring>

namespace deepthin {

int64_t huffman_walk(const uint8_t* data, int64_t bytes, int64_t start, const uint32_t* lookup, int width, uint16_t* out,
                     int64_t most, int64_t count, int64_t skip, int64_t* end) {
    const uint8_t *next = data + start / 8, *const stop = data + bytes;
    const uint32_t mask = (uint32_t(1) << width) - 1;
    uint64_t buffer = 0;
    int bits = 0;  // valid bits of `buffer`; those above are zeros, or belong to the next byte, which is read again
    const auto refill = [&] {
        if (std::endian::native == std::endian::little && stop - next >= 8) {
            uint64_t word;
            std::memcpy(&word, next, 8);
            buffer |= word << bits;
            next += (63 - bits) >> 3;
            bits |= 56;
            return;
        }
        while (bits <= 56 && next < stop) {
            buffer = (buffer & ~(~uint64_t(0) << bits)) | uint64_t(*next++) << bits;
            bits += 8;
        }
    };
    refill();
    buffer >>= start % 8;
    bits -= int(start % 8);
    int64_t read = 0, counted = 0;
    while (counted < count) {
        if (read == most) return -1;
        if (bits < width) refill();
        const uint32_t entry = lookup[buffer & mask];
        const int length = int(entry & 15);
        if (length > bits) return -1;
        buffer >>= length;
        bits -= length;
        const uint16_t symbol = uint16_t(entry >> 4);
        out[read++] = symbol;
        counted += symbol != skip;
    }
    *end = 8 * (next - data) - bits;
    return read;
}

}  // namespace deepthin
