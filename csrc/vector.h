// A few lanes of float, by the compiler's vector extension: every target lowers them to the width that it has.
// Everything here is in an unnamed namespace, because this file is compiled once for every instruction set.
#pragma once
#include <cstdint>
#include <utility>

// What the build says for each instruction set: lanes, and accumulators that its registers hold.
#ifndef DEEPTHIN_WIDTH
#define DEEPTHIN_WIDTH 8
#endif
#ifndef DEEPTHIN_TILE
#define DEEPTHIN_TILE 12
#endif

#define DEEPTHIN_INLINE inline __attribute__((always_inline))
#define DEEPTHIN_INLINED __attribute__((always_inline))  // of a lambda
#define DEEPTHIN_UNROLL _Pragma("GCC unroll 32")

namespace {

template <int W>
struct Lanes {
    typedef float type __attribute__((vector_size(W * sizeof(float))));
};
template <int W>
using Vec = typename Lanes<W>::type;

template <int W>
struct Integers {
    typedef int32_t type __attribute__((vector_size(W * sizeof(float))));
};

template <int W>
DEEPTHIN_INLINE Vec<W> load(const float* from) {
    Vec<W> value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <int W>
DEEPTHIN_INLINE void store(float* to, Vec<W> value) {
    __builtin_memcpy(to, &value, sizeof value);
}

// The first `count` < W lanes; the others are zero.
template <int W>
DEEPTHIN_INLINE Vec<W> load_some(const float* from, int64_t count) {
    Vec<W> value{};
    for (int64_t i = 0; i < count; i++) value[i] = from[i];
    return value;
}

// All lanes but the first `count` become zero.
template <int W>
DEEPTHIN_INLINE Vec<W> first_lanes(Vec<W> value, int64_t count) {
    Vec<W> number;
    DEEPTHIN_UNROLL
    for (int i = 0; i < W; i++) number[i] = float(i);
    return number < float(count) ? value : Vec<W>{};
}

DEEPTHIN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DEEPTHIN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
DEEPTHIN_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
DEEPTHIN_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Lane l of `first`: a[l] where bit H of l is clear, else b[l - H]; of `second`: a[l + H], else b[l].
template <int W, int H, std::size_t... I>
DEEPTHIN_INLINE void exchange(Vec<W> a, Vec<W> b, Vec<W>& first, Vec<W>& second, std::index_sequence<I...>) {
    first = __builtin_shufflevector(a, b, (int(I) & H ? W + int(I) - H : int(I))...);
    second = __builtin_shufflevector(a, b, (int(I) & H ? W + int(I) : int(I) + H)...);
}

template <int W, int H = W / 2>
DEEPTHIN_INLINE void transpose(Vec<W>* row) {
    if constexpr (H > 0) {
        DEEPTHIN_UNROLL
        for (int i = 0; i < W; i++)
            if (!(i & H)) exchange<W, H>(row[i], row[i + H], row[i], row[i + H], std::make_index_sequence<W>());
        transpose<W, H / 2>(row);
    }
}

// Lane l becomes the sum over the lanes of row l. Overwrites the rows.
template <int W, int H = W / 2>
DEEPTHIN_INLINE Vec<W> sum_rows(Vec<W>* row) {
    if constexpr (H == 0) {
        return row[0];
    } else {
        DEEPTHIN_UNROLL
        for (int i = 0; i < H; i++) {
            Vec<W> first, second;
            exchange<W, H>(row[i], row[i + H], first, second, std::make_index_sequence<W>());
            row[i] = first + second;
        }
        return sum_rows<W, H / 2>(row);
    }
}

template <int W>
DEEPTHIN_INLINE float sum_lanes(Vec<W> value) {
    float sum = 0;
    DEEPTHIN_UNROLL
    for (int i = 0; i < W; i++) sum += value[i];
    return sum;
}

// `items` <= W rows of `length` floats, `stride` apart -> length x W; lanes without an item are zero.
template <int W>
void rows_to_lanes(const float* rows, int64_t stride, int64_t items, int64_t length, float* lanes) {
    int64_t i = 0;
    for (; i + W <= length; i += W) {
        Vec<W> block[W];
        if (items == W) {
            DEEPTHIN_UNROLL
            for (int b = 0; b < W; b++) block[b] = load<W>(rows + b * stride + i);
        } else {
            DEEPTHIN_UNROLL
            for (int b = 0; b < W; b++) block[b] = b < items ? load<W>(rows + b * stride + i) : Vec<W>{};
        }
        transpose<W>(block);
        DEEPTHIN_UNROLL
        for (int b = 0; b < W; b++) store<W>(lanes + (i + b) * W, block[b]);
    }
    for (; i < length; i++)
        for (int64_t b = 0; b < W; b++) lanes[i * W + b] = b < items ? rows[b * stride + i] : 0.0f;
}

template <int W>
void lanes_to_rows(const float* lanes, int64_t stride, int64_t items, int64_t length, float* rows) {
    int64_t i = 0;
    for (; i + W <= length; i += W) {
        Vec<W> block[W];
        DEEPTHIN_UNROLL
        for (int b = 0; b < W; b++) block[b] = load<W>(lanes + (i + b) * W);
        transpose<W>(block);
        if (items == W) {
            DEEPTHIN_UNROLL
            for (int b = 0; b < W; b++) store<W>(rows + b * stride + i, block[b]);
        } else {
            DEEPTHIN_UNROLL
            for (int b = 0; b < W; b++)
                if (b < items) store<W>(rows + b * stride + i, block[b]);
        }
    }
    for (; i < length; i++)
        for (int64_t b = 0; b < items; b++) rows[b * stride + i] = lanes[i * W + b];
}

}  // namespace
