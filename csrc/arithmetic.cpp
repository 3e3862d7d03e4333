// One template serves both directions: `coder.bit(context, bit)` codes `bit` and returns it, or ignores it and returns what
// it decodes. Everything is inlined into one loop for each binarisation, so that the coder's state stays in registers.
#include "arithmetic.h"

#include <algorithm>
#include <array>
#include <utility>

#define DEEPTHIN_ALWAYS inline __attribute__((always_inline))

namespace deepthin {
namespace {

constexpr int LIMIT = 510, INHERITED = 4, UNARY = 14, LONGEST = 40;

constexpr auto RATES = [] {
    std::array<uint16_t, LIMIT + 1> rates{};
    for (int n = 0; n <= LIMIT; n++) rates[n] = uint16_t(65536 / (n + 2));
    return rates;
}();

// The probability of a one is p / 2^32; n counts the bits that were seen, up to LIMIT.
struct Context {
    uint32_t p = uint32_t(1) << 31, n = 0;

    DEEPTHIN_ALWAYS void update(bool bit) {
        const uint32_t rate = RATES[n];
        p = bit ? p + (~p >> 16) * rate : p - ((p >> 16) - 1) * rate;
        n += n < LIMIT;
    }
    DEEPTHIN_ALWAYS void inherit(const Context& from) {
        if (n == 0) *this = {from.p, from.n < INHERITED ? from.n : INHERITED};
    }
};

class Encoder {
public:
    static constexpr bool decodes = false;

    DEEPTHIN_ALWAYS bool bit(Context& context, bool bit) {
        const uint32_t bound = range - (range >> 16) * (context.p >> 16);
        if (bit) {
            add(bound);
            range -= bound;
        } else {
            range = bound;
        }
        context.update(bit);
        normalise();
        return bit;
    }
    DEEPTHIN_ALWAYS bool even(bool bit) {
        range >>= 1;
        if (bit) add(range);
        normalise();
        return bit;
    }
    // Some numbers will be coded: most take less than a byte, and memory that is not written to is not taken.
    void expect(int64_t numbers) { out.reserve(std::size_t(numbers) + 16); }
    // The shortest number within the interval.
    std::vector<uint8_t> finish() {
        if (low) {
            if (uint64_t(low) + range > uint64_t(1) << 32)
                carry();
            else
                out.push_back(uint8_t((uint64_t(low) + 0xFFFFFF) >> 24));
        }
        while (!out.empty() && !out.back()) out.pop_back();
        return std::move(out);
    }

private:
    DEEPTHIN_ALWAYS void add(uint32_t bound) {
        low += bound;
        if (low < bound) carry();
    }
    DEEPTHIN_ALWAYS void normalise() {
        while (range < uint32_t(1) << 24) {
            out.push_back(uint8_t(low >> 24));
            low <<= 8;
            range <<= 8;
        }
    }
    void carry() {
        std::size_t i = out.size();
        while (++out[--i] == 0) {
        }
    }

    std::vector<uint8_t> out;
    uint32_t low = 0, range = 0xFFFFFFFF;
};

class Decoder {
public:
    static constexpr bool decodes = true;

    Decoder(const uint8_t* data, int64_t bytes) : data(data), next(data), stop(data + bytes), bytes(bytes) {
        for (int i = 0; i < 4; i++) take();
    }
    DEEPTHIN_ALWAYS bool bit(Context& context, bool) {
        const uint32_t bound = range - (range >> 16) * (context.p >> 16);
        const bool bit = code >= bound;
        if (bit) {
            code -= bound;
            range -= bound;
        } else {
            range = bound;
        }
        context.update(bit);
        normalise();
        return bit;
    }
    DEEPTHIN_ALWAYS bool even(bool) {
        range >>= 1;
        const bool bit = code >= range;
        if (bit) code -= range;
        normalise();
        return bit;
    }
    bool starts() const { return code < range; }
    // Whether the bytes are the shortest number within the interval, and the least one that is as short.
    bool canonical() const {
        if (bytes == 0) return true;
        const int64_t beyond = (next - data) + zeros - bytes;
        if (!data[bytes - 1] || beyond < 3) return false;
        return beyond > 3 || (code < uint32_t(1) << 24 && code + (uint32_t(256 - data[bytes - 1]) << 24) >= range);
    }

private:
    DEEPTHIN_ALWAYS void take() {
        code <<= 8;
        if (next < stop)
            code |= *next++;
        else
            zeros++;
    }
    DEEPTHIN_ALWAYS void normalise() {
        while (range < uint32_t(1) << 24) {
            take();
            range <<= 8;
        }
    }

    const uint8_t *data, *next, *stop;
    int64_t bytes, zeros = 0;
    uint32_t code = 0, range = 0xFFFFFFFF;
};

// The class of the average magnitude in a column or before in the stream; a magnitude counts 3 at most, in 4096ths.
DEEPTHIN_ALWAYS int column_class(int average) { return (average >= 1) + (average >= 128) + (average >= 512) + (average >= 2048); }
DEEPTHIN_ALWAYS int recent_class(int average) { return (average >= 1) + (average >= 256); }
constexpr int COLUMN_CLASSES = 5, RECENT_CLASSES = 3, CONTEXTS = COLUMN_CLASSES * RECENT_CLASSES * 4;

// Non-negative integers: one more than the value, as its bits after the leading one, and how many those are.
struct Numbers {
    Context longer[LONGEST + 1], first[LONGEST + 1], second[LONGEST + 1][2];

    template <class Coder>
    DEEPTHIN_ALWAYS bool code(Coder& coder, int64_t& value) {
        const uint64_t given = uint64_t(value) + 1;
        int length = 0;
        for (;; length++) {
            if (length > LONGEST) return false;
            if (length) longer[length].inherit(longer[length - 1]);
            if (!coder.bit(longer[length], given >> length > 1)) break;
        }
        uint64_t number = 1;
        for (int i = length - 1; i >= 0; i--) {
            const bool bit = given >> i & 1;
            const bool coded = i == length - 1   ? coder.bit(first[length], bit)
                               : i == length - 2 ? coder.bit(second[length][number & 1], bit)
                                                 : coder.even(bit);
            number = number << 1 | uint64_t(coded);
        }
        value = int64_t(number - 1);
        return true;
    }
};

template <class Coder, class Integer>
bool code_levels(Coder& coder, Integer* values, int64_t count, int64_t stride, int64_t most) {
    Context zero[CONTEXTS], negative, more[COLUMN_CLASSES][2], further[UNARY + 1];
    Numbers rest;
    std::vector<uint16_t> columns(std::size_t(stride ? std::min(stride, count) : 0));
    int recent = 0, last = 0;
    int64_t column = 0;
    for (int64_t i = 0; i < count; i++) {
        const int active = stride ? column_class(columns[std::size_t(column)]) : 0;
        const int context = stride ? (RECENT_CLASSES * active + recent_class(recent)) * 4 + last : 0;
        const int64_t value = values[i];
        const uint64_t given = uint64_t(value < 0 ? -value : value);
        int64_t magnitude = 0;
        if (context) zero[context].inherit(zero[context - 1]);
        if (coder.bit(zero[context], given != 0)) {
            const bool below = coder.bit(negative, value < 0);
            const Context* before = active ? &more[active - 1][0] : nullptr;
            for (magnitude = 1; magnitude <= UNARY; magnitude++) {
                Context& own = magnitude <= 2 ? more[active][magnitude - 1] : further[magnitude];
                if (before) own.inherit(*before);
                if (!coder.bit(own, given > uint64_t(magnitude))) break;
                before = &own;
            }
            if (magnitude > UNARY) {
                int64_t beyond = int64_t(given) - magnitude;
                if (!rest.code(coder, beyond)) return false;
                magnitude += beyond;
            }
            if (Coder::decodes && magnitude > most) return false;
            if (Coder::decodes) values[i] = Integer(below ? -magnitude : magnitude);
        } else if (Coder::decodes) {
            values[i] = 0;
        }
        if (stride) {
            const int seen = 4096 * int(std::min<int64_t>(magnitude, 3));
            uint16_t& average = columns[std::size_t(column)];
            average = uint16_t((31 * average + seen) >> 5);
            recent = (63 * recent + seen) >> 6;
            last = (2 * last + (magnitude > 0)) & 3;
            if (++column == stride) column = 0;
        }
    }
    return true;
}

template <class Coder, class Integer>
bool code_tree(Coder& coder, Integer* values, int64_t count, int64_t width, int64_t most) {
    std::vector<Context> nodes(std::size_t(1) << width);
    for (int64_t i = 0; i < count; i++) {
        uint32_t node = 1;
        for (int64_t j = width - 1; j >= 0; j--)
            node = node << 1 | uint32_t(coder.bit(nodes[node], values[i] >> j & 1));
        if (Coder::decodes) {
            values[i] = Integer(int64_t(node) - (int64_t(1) << width));
            if (values[i] > most) return false;
        }
    }
    return true;
}

template <class Coder, class Integer>
bool code_numbers(Coder& coder, Integer* values, int64_t count, int64_t most) {
    Numbers numbers;
    for (int64_t i = 0; i < count; i++) {
        int64_t value = Coder::decodes ? 0 : values[i];
        if (!numbers.code(coder, value)) return false;
        if (Coder::decodes) {
            if (value > most) return false;
            values[i] = Integer(value);
        }
    }
    return true;
}

template <class Coder, class Integer>
bool code(Coder& coder, Binarisation kind, Integer* values, int64_t count, int64_t parameter, int64_t most) {
    if (kind == Binarisation::levels) return code_levels(coder, values, count, parameter, most);
    if (kind == Binarisation::tree) return code_tree(coder, values, count, parameter, most);
    return code_numbers(coder, values, count, most);
}

}  // namespace

template <class Integer>
std::vector<uint8_t> arithmetic_encode(Binarisation kind, const Integer* values, int64_t count, int64_t parameter) {
    Encoder coder;
    coder.expect(count);
    code(coder, kind, const_cast<Integer*>(values), count, parameter, 0);  // an encoder only reads
    return coder.finish();
}
template std::vector<uint8_t> arithmetic_encode(Binarisation, const int32_t*, int64_t, int64_t);
template std::vector<uint8_t> arithmetic_encode(Binarisation, const int64_t*, int64_t, int64_t);

bool arithmetic_decode(Binarisation kind, const uint8_t* data, int64_t bytes, int64_t* out, int64_t count, int64_t parameter,
                       int64_t most) {
    Decoder coder(data, bytes);
    return coder.starts() && code(coder, kind, out, count, parameter, most) && coder.canonical();
}

}  // namespace deepthin
