// Fast Fourier transforms of W independent sequences, one per SIMD lane: a complex point is W real, then W imaginary parts.
// A polynomial of M points modulo z^M - j is split, level by level, into ones modulo z^part - c, a root c for each part; back,
// the mirror image. Spectra stay in the transform's own order.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace {

using deepthin::Transform;

template <int W>
struct Complex {
    Vec<W> re, im;
};

template <int W>
DEEPTHIN_INLINE Complex<W> operator+(Complex<W> a, Complex<W> b) {
    return {a.re + b.re, a.im + b.im};
}
template <int W>
DEEPTHIN_INLINE Complex<W> operator-(Complex<W> a, Complex<W> b) {
    return {a.re - b.re, a.im - b.im};
}
template <int W>
DEEPTHIN_INLINE Complex<W> turn(Complex<W> a) {  // times -i
    return {a.im, -a.re};
}
template <int W>
DEEPTHIN_INLINE Complex<W> times(Complex<W> a, float re, float im) {
    return {a.re * re - a.im * im, a.re * im + a.im * re};
}
template <int W>
DEEPTHIN_INLINE Complex<W> load_point(const float* from) {
    return {load<W>(from), load<W>(from + W)};
}
template <int W>
DEEPTHIN_INLINE void store_point(float* to, Complex<W> value) {
    store<W>(to, value.re);
    store<W>(to + W, value.im);
}
// A conjugate inverse is a forward transform with real and imaginary parts exchanged.
template <int W>
DEEPTHIN_INLINE Complex<W> swap(Complex<W> a) {
    return {a.im, a.re};
}

// The number below A * B that is i modulo A and j modulo B.
template <int A, int B>
constexpr int first_of(int i, int j) {
    while (i % B != j) i += A;
    return i;
}

template <int W, int RADIX>
DEEPTHIN_INLINE void butterfly(Complex<W>* z) {
    if constexpr (RADIX == 2) {
        auto a = z[0], b = z[1];
        z[0] = a + b;
        z[1] = a - b;
    } else if constexpr (RADIX == 3) {
        const float c = -0.5f, s = 0.86602540378443864676f;
        auto sum = z[1] + z[2], difference = z[1] - z[2];
        Complex<W> mid{z[0].re + c * sum.re, z[0].im + c * sum.im};
        z[0] = z[0] + sum;
        z[1] = {mid.re + s * difference.im, mid.im - s * difference.re};
        z[2] = {mid.re - s * difference.im, mid.im + s * difference.re};
    } else if constexpr (RADIX == 4) {
        auto a = z[0] + z[2], b = z[0] - z[2], c = z[1] + z[3], d = turn(z[1] - z[3]);
        z[0] = a + c;
        z[1] = b + d;
        z[2] = a - c;
        z[3] = b - d;
    } else if constexpr (RADIX == 5) {
        const float c1 = 0.30901699437494742410f, c2 = -0.80901699437494742410f;
        const float s1 = 0.95105651629515357212f, s2 = 0.58778525229247312917f;
        auto a = z[1] + z[4], b = z[1] - z[4], c = z[2] + z[3], d = z[2] - z[3], first = z[0];
        z[0] = first + a + c;
        Complex<W> p{first.re + c1 * a.re + c2 * c.re, first.im + c1 * a.im + c2 * c.im};
        Complex<W> q{first.re + c2 * a.re + c1 * c.re, first.im + c2 * a.im + c1 * c.im};
        Complex<W> u{s1 * b.im + s2 * d.im, -(s1 * b.re + s2 * d.re)};
        Complex<W> w{s2 * b.im - s1 * d.im, s1 * d.re - s2 * b.re};
        z[1] = p + u;
        z[4] = p - u;
        z[2] = q + w;
        z[3] = q - w;
    } else if constexpr (RADIX == 8) {
        const float h = 0.70710678118654752440f;
        Complex<W> even[4] = {z[0], z[2], z[4], z[6]}, odd[4] = {z[1], z[3], z[5], z[7]};
        butterfly<W, 4>(even);
        butterfly<W, 4>(odd);
        odd[1] = {h * (odd[1].re + odd[1].im), h * (odd[1].im - odd[1].re)};
        odd[2] = turn(odd[2]);
        odd[3] = {h * (odd[3].im - odd[3].re), -(h * (odd[3].re + odd[3].im))};
        DEEPTHIN_UNROLL
        for (int k = 0; k < 4; k++) {
            z[k] = even[k] + odd[k];
            z[k + 4] = even[k] - odd[k];
        }
    } else {  // of coprime factors: no factors in between (Good 1958)
        constexpr int OTHER = RADIX % 5 ? 3 : 5, MAIN = RADIX / OTHER;
        static_assert(MAIN * OTHER == RADIX && MAIN % OTHER && (MAIN == 2 || MAIN == 4));
        Complex<W> rows[OTHER][MAIN];
        DEEPTHIN_UNROLL
        for (int i = 0; i < MAIN; i++) {
            Complex<W> column[OTHER];
            DEEPTHIN_UNROLL
            for (int j = 0; j < OTHER; j++) column[j] = z[(i * OTHER + j * MAIN) % RADIX];
            butterfly<W, OTHER>(column);
            DEEPTHIN_UNROLL
            for (int j = 0; j < OTHER; j++) rows[j][i] = column[j];
        }
        DEEPTHIN_UNROLL
        for (int j = 0; j < OTHER; j++) {
            butterfly<W, MAIN>(rows[j]);
            DEEPTHIN_UNROLL
            for (int i = 0; i < MAIN; i++) z[first_of<MAIN, OTHER>(i, j)] = rows[j][i];
        }
    }
}

// One level of `blocks` blocks, each of `RADIX` parts; `source(i)` gives point i.
template <int W, int RADIX, class Source>
DEEPTHIN_INLINE void forward_pass(Source source, float* to, int64_t part, int64_t blocks, const float* twiddle) {
    for (int64_t first = 0; blocks > 0; blocks--, first += RADIX * part, twiddle += 2 * (RADIX - 1))
        for (int64_t i = first; i < first + part; i++) {
            Complex<W> z[RADIX];
            z[0] = source(i);
            DEEPTHIN_UNROLL
            for (int k = 1; k < RADIX; k++) z[k] = times<W>(source(i + k * part), twiddle[2 * k - 2], twiddle[2 * k - 1]);
            butterfly<W, RADIX>(z);
            DEEPTHIN_UNROLL
            for (int k = 0; k < RADIX; k++) store_point<W>(to + (i + k * part) * 2 * W, z[k]);
        }
}

// `sink(i, value)` takes point i.
template <int W, int RADIX, class Source, class Sink>
DEEPTHIN_INLINE void inverse_pass(Source source, Sink sink, int64_t part, int64_t blocks, const float* twiddle) {
    for (int64_t first = 0; blocks > 0; blocks--, first += RADIX * part, twiddle += 2 * (RADIX - 1))
        for (int64_t i = first; i < first + part; i++) {
            Complex<W> z[RADIX];
            DEEPTHIN_UNROLL
            for (int k = 0; k < RADIX; k++) z[k] = swap(source(i + k * part));
            butterfly<W, RADIX>(z);
            sink(i, swap(z[0]));
            DEEPTHIN_UNROLL
            for (int k = 1; k < RADIX; k++)
                sink(i + k * part, times<W>(swap(z[k]), twiddle[2 * k - 2], -twiddle[2 * k - 1]));
        }
}

#define DEEPTHIN_RADICES(call) \
    switch (radix) {           \
        case 2: call(2);       \
        case 3: call(3);       \
        case 4: call(4);       \
        case 5: call(5);       \
        case 6: call(6);       \
        case 8: call(8);       \
        case 10: call(10);     \
        default: call(12);     \
    }

// One level, in place.
template <int W>
void forward_level(float* data, int64_t part, int64_t blocks, int radix, const float* twiddle) {
    const auto source = [=](int64_t i) DEEPTHIN_INLINED { return load_point<W>(data + i * 2 * W); };
#define DEEPTHIN_CALL(R) return forward_pass<W, R>(source, data, part, blocks, twiddle)
    DEEPTHIN_RADICES(DEEPTHIN_CALL)
#undef DEEPTHIN_CALL
}

template <int W>
void inverse_level(float* data, int64_t part, int64_t blocks, int radix, const float* twiddle) {
    const auto source = [=](int64_t i) DEEPTHIN_INLINED { return load_point<W>(data + i * 2 * W); };
    const auto sink = [=](int64_t i, Complex<W> value) DEEPTHIN_INLINED { store_point<W>(data + i * 2 * W, value); };
#define DEEPTHIN_CALL(R) return inverse_pass<W, R>(source, sink, part, blocks, twiddle)
    DEEPTHIN_RADICES(DEEPTHIN_CALL)
#undef DEEPTHIN_CALL
}

// In place, from `level` on: `blocks` blocks of `length` points, the first of them being block `first` of its level. Depth
// first, so that small blocks stay in the cache; the last level of all blocks at once.
template <int W>
void forward_levels(const Transform& plan, float* data, int64_t length, int64_t first, int64_t blocks, int level) {
    const int radix = plan.radix[level];
    const int64_t part = length / radix, together = part == 1 ? blocks : 1;
    for (int64_t b = first; b < first + blocks; b += together) {
        forward_level<W>(data + b * length * 2 * W, part, together, radix, plan.twiddles[level] + b * 2 * (radix - 1));
        if (part > 1) forward_levels<W>(plan, data, part, b * radix, radix, level + 1);
    }
}

struct InPlace {};  // a spectrum that lies where its transform is to be

template <class Spectrum>
constexpr bool is_in_place = false;
template <>
constexpr bool is_in_place<InPlace> = true;

// Back: `spectrum(f)` gives frequency f (in the transform's own order), `data` takes the points, unscaled.
template <int W, class Spectrum>
void inverse_levels(const Transform& plan, Spectrum spectrum, float* data, int64_t length, int64_t first, int64_t blocks, int level) {
    const int radix = plan.radix[level];
    const int64_t part = length / radix, together = part == 1 ? blocks : 1;
    for (int64_t b = first; b < first + blocks; b += together) {
        float* block = data + b * length * 2 * W;
        const float* twiddle = plan.twiddles[level] + b * 2 * (radix - 1);
        if constexpr (!is_in_place<Spectrum>) {
            if (part == 1) {
                const auto source = [=](int64_t i) DEEPTHIN_INLINED { return spectrum(b * radix + i); };
                const auto sink = [=](int64_t i, Complex<W> value) DEEPTHIN_INLINED { store_point<W>(block + i * 2 * W, value); };
#define DEEPTHIN_CALL(R) return inverse_pass<W, R>(source, sink, part, together, twiddle)
                DEEPTHIN_RADICES(DEEPTHIN_CALL)
#undef DEEPTHIN_CALL
            }
        }
        if (part > 1) inverse_levels<W>(plan, spectrum, data, part, b * radix, radix, level + 1);
        inverse_level<W>(block, part, together, radix, twiddle);
    }
}

// ---- Real sequences of up to 2 M positions as M complex points ----------------------------------------------------------
// Point i is x[i] + j x[i + M], j^2 = -1: since z^M = j, a complex polynomial in z is a real one with z^(2 M) = -1, and the
// product of two is their convolution where that fits into 2 M positions.

// The first level of the transform of `length` positions, `jump` floats apart.
template <int W>
void forward_positions(const Transform& plan, const float* x, int64_t jump, int64_t length, float* data) {
    const int radix = plan.radix[0];
    const int64_t points = plan.points, part = points / radix;
    const auto source = [=](int64_t i) DEEPTHIN_INLINED {
        return Complex<W>{i < length ? load<W>(x + i * jump) : Vec<W>{},
                          i + points < length ? load<W>(x + (i + points) * jump) : Vec<W>{}};
    };
#define DEEPTHIN_CALL(R) return forward_pass<W, R>(source, data, part, 1, plan.twiddles[0])
    DEEPTHIN_RADICES(DEEPTHIN_CALL)
#undef DEEPTHIN_CALL
}

template <int W>
void forward_spectrum(const Transform& plan, const float* x, int64_t jump, int64_t length, float* data) {
    forward_positions<W>(plan, x, jump, length, data);
    forward_levels<W>(plan, data, plan.points / plan.radix[0], 0, plan.radix[0], 1);
}

// The last level of a transform back: the first `length` positions, `jump` floats apart, unscaled.
template <int W>
void inverse_positions(const Transform& plan, const float* data, float* x, int64_t jump, int64_t length) {
    const int radix = plan.radix[0];
    const int64_t points = plan.points, part = points / radix;
    const auto source = [=](int64_t i) DEEPTHIN_INLINED { return load_point<W>(data + i * 2 * W); };
    const auto sink = [=](int64_t i, Complex<W> value) DEEPTHIN_INLINED {
        if (i < length) store<W>(x + i * jump, value.re);
        if (i + points < length) store<W>(x + (i + points) * jump, value.im);
    };
#define DEEPTHIN_CALL(R) return inverse_pass<W, R>(source, sink, part, 1, plan.twiddles[0])
    DEEPTHIN_RADICES(DEEPTHIN_CALL)
#undef DEEPTHIN_CALL
}

// The first `length` positions of the sequence with this spectrum, unscaled; `data` is scratch memory.
template <int W, class Spectrum>
void inverse_spectrum(const Transform& plan, Spectrum spectrum, float* data, float* x, int64_t jump, int64_t length) {
    inverse_levels<W>(plan, spectrum, data, plan.points / plan.radix[0], 0, plan.radix[0], 1);
    inverse_positions<W>(plan, data, x, jump, length);
}

}  // namespace
