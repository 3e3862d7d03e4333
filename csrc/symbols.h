// Products with weights of one byte each, read in place: a symbol times a step, or one of a few shared values.
//
// Inputs are laid out as [positions / W][item][lane]: one position per SIMD lane. The last lanes may be padding, which is zero.
#pragma once
#include "kernels.h"
#include "vector.h"

#if defined(__AVX2__)
#include <immintrin.h>  // for look-ups in registers, which the vector extension lacks: a fifth of the time
#endif

namespace {

using deepthin::Symbols;

template <int W, class Byte>
DEEPTHIN_INLINE typename Integers<W>::type load_bytes(const uint8_t* from, uint8_t flipped) {
    int32_t wide[W];
    for (int i = 0; i < W; i++) wide[i] = Byte(from[i] ^ flipped);
    typename Integers<W>::type value;
    __builtin_memcpy(&value, wide, sizeof value);
    return value;
}

// Symbols as signed numbers; unsigned ones minus 128, by flipping their highest bit.
struct Numbers {
    uint8_t flipped;

    template <int W>
    DEEPTHIN_INLINE Vec<W> load(const uint8_t* from) const {
        return __builtin_convertvector((load_bytes<W, int8_t>(from, flipped)), Vec<W>);
    }
};

// Shared values: a symbol indexes 1 << BITS of them, held in registers. MOST_BITS: more are slower than a dense product.
#if DEEPTHIN_WIDTH == 16
constexpr int FEW_BITS = 5, MOST_BITS = 6;
#elif defined(__AVX2__)
constexpr int FEW_BITS = 3, MOST_BITS = 4;
#else
constexpr int FEW_BITS = 0, MOST_BITS = 0;
#endif

template <int BITS>
struct Shared {
    const float* table;

    template <int W>
    DEEPTHIN_INLINE Vec<W> load(const uint8_t* from) const {
        [[maybe_unused]] const auto place = load_bytes<W, uint8_t>(from, 0);
#if DEEPTHIN_WIDTH == 16 && defined(__AVX512F__)
        const auto part = [this](int i) DEEPTHIN_INLINED { return _mm512_loadu_ps(table + 16 * i); };
        const __m512i at = (__m512i)place;
        const __m512 low = _mm512_permutex2var_ps(part(0), at, part(1));
        if constexpr (BITS == 5) return (Vec<W>)low;
        const __m512 high = _mm512_permutex2var_ps(part(2), at, part(3));
        return (Vec<W>)_mm512_mask_blend_ps(_mm512_test_epi32_mask(at, _mm512_set1_epi32(32)), low, high);
#elif DEEPTHIN_WIDTH == 8 && defined(__AVX2__)
        const __m256i at = (__m256i)place;
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
        if constexpr (BITS == 3) return (Vec<W>)low;
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at);
        return (Vec<W>)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
#else
        Vec<W> value;
        for (int i = 0; i < W; i++) value[i] = table[place[i] & ((1 << BITS) - 1)];
        return value;
#endif
    }
};

// Rows and items at a time: as many sums as fit in registers beside their operands.
template <int B>
constexpr int SYMBOL_ROWS = DEEPTHIN_TILE * 2 / 3 / B < 4 ? DEEPTHIN_TILE * 2 / 3 / B : 4;

template <int W, int B>
void symbol_items(const float* x, int64_t cols, int64_t items, float* lanes) {
    for (int64_t i = 0; i < cols; i += W)
        for (int b = 0; b < B; b++, lanes += W) {
            const float* from = x + b * cols + i;
            store<W>(lanes, b >= items ? Vec<W>{} : i + W <= cols ? load<W>(from) : load_some<W>(from, cols - i));
        }
}

template <int W>
DEEPTHIN_INLINE float sum_halves(Vec<W> value) {
    if constexpr (W == 1) {
        return value[0];
    } else {
        Vec<W / 2> half[2];
        __builtin_memcpy(half, &value, sizeof value);
        return sum_halves<W / 2>(half[0] + half[1]);
    }
}

// The sums over R rows for B items; `finish(row, item, sum)`.
template <int W, int B, int R, class Weight, class Finish>
DEEPTHIN_INLINE void symbol_tile(const uint8_t* at, int64_t cols, Weight weight, const float* lanes, Finish finish) {
    Vec<W> sum[R][B] = {};
    const auto add = [&](const uint8_t* from, int64_t stride) DEEPTHIN_INLINED {
        DEEPTHIN_UNROLL
        for (int r = 0; r < R; r++) {
            const Vec<W> value = weight.template load<W>(from + r * stride);
            DEEPTHIN_UNROLL
            for (int b = 0; b < B; b++) sum[r][b] += value * load<W>(lanes + b * W);
        }
    };
    int64_t i = 0;
    for (; i + W <= cols; i += W, lanes += B * W) add(at + i, cols);
    if (i < cols) {
        uint8_t last[R][W] = {};
        for (int r = 0; r < R; r++)
            for (int64_t k = i; k < cols; k++) last[r][k - i] = at[r * cols + k];
        add(last[0], W);
    }
    DEEPTHIN_UNROLL
    for (int r = 0; r < R; r++) {
        DEEPTHIN_UNROLL
        for (int b = 0; b < B; b++) finish(r, b, sum_halves<W>(sum[r][b]));
    }
}

template <int W, int B, class Weight>
uint32_t symbol_rows(const Symbols& s, Weight weight, const float* x, float* y, int64_t items, int64_t first, int64_t stop,
                     float* lanes) {
    symbol_items<W, B>(x, s.cols, items, lanes);
    float totals[B] = {};
    if (s.least)
        for (int b = 0; b < B; b++) {
            Vec<W> total = {};
            for (int64_t i = 0; i < divide_up(s.cols, W); i++) total += load<W>(lanes + (i * B + b) * W);
            totals[b] = sum_halves<W>(total);
        }
    float odd[B] = {};  // NaN instead of 0 once an output is not finite
    const auto tile = [&]<int R>(int64_t j) DEEPTHIN_INLINED {
        symbol_tile<W, B, R>(s.symbols + j * s.cols, s.cols, weight, lanes, [&](int r, int b, float sum) DEEPTHIN_INLINED {
            if (b >= items) return;
            const int64_t row = j + r, at = s.by_row ? row : 0;
            double value = sum;
            if (s.step) value *= s.step[at];
            if (s.least) value += (s.least[at] + 128.0 * s.step[at]) * totals[b];
            const float output = float(value) + (s.bias ? s.bias[row] : 0.0f);
            y[b * s.rows + row] = output;
            odd[b] += output * 0.0f;
        });
    };
    constexpr int R = SYMBOL_ROWS<B>;
    for (; first + R <= stop; first += R) tile.template operator()<R>(first);
    for (; first < stop; first++) tile.template operator()<1>(first);
    uint32_t marked = 0;
    for (int b = 0; b < B; b++) marked |= uint32_t(odd[b] != odd[b]) << b;
    return marked;
}

template <int W, class Weight>
uint32_t symbol_block(const Symbols& s, Weight weight, const float* x, float* y, int64_t items, int64_t first, int64_t stop,
                      float* lanes) {
    if (items == 1) return symbol_rows<W, 1>(s, weight, x, y, items, first, stop, lanes);
    if (items == 2) return symbol_rows<W, 2>(s, weight, x, y, items, first, stop, lanes);
    if (items <= 4) return symbol_rows<W, 4>(s, weight, x, y, items, first, stop, lanes);
    return symbol_rows<W, 8>(s, weight, x, y, items, first, stop, lanes);
}

}  // namespace
