// Fast Fourier transforms of W independent sequences, one per SIMD lane: a complex point is W real, then W imaginary parts.
// Decimation in frequency forward, its mirror image backward: spectra stay in the transform's own order.
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
    } else {
        static_assert(RADIX == 8);
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
    }
}

// One level on `RADIX * part` points; `source(i)` gives point i.
template <int W, int RADIX, class Source>
DEEPTHIN_INLINE void forward_pass(Source source, float* to, int64_t part, const float* twiddle) {
    for (int64_t j = 0; j < part; j++, twiddle += 2 * (RADIX - 1)) {
        Complex<W> z[RADIX];
        DEEPTHIN_UNROLL
        for (int k = 0; k < RADIX; k++) z[k] = source(j + k * part);
        butterfly<W, RADIX>(z);
        store_point<W>(to + j * 2 * W, z[0]);
        DEEPTHIN_UNROLL
        for (int k = 1; k < RADIX; k++)
            store_point<W>(to + (j + k * part) * 2 * W,
                           part == 1 ? z[k] : times<W>(z[k], twiddle[2 * k - 2], twiddle[2 * k - 1]));
    }
}

// `sink(i, value)` takes the exchanged point i.
template <int W, int RADIX, class Source, class Sink>
DEEPTHIN_INLINE void inverse_pass(Source source, Sink sink, int64_t part, const float* twiddle) {
    for (int64_t j = 0; j < part; j++, twiddle += 2 * (RADIX - 1)) {
        Complex<W> z[RADIX];
        z[0] = swap(source(j));
        DEEPTHIN_UNROLL
        for (int k = 1; k < RADIX; k++) {
            z[k] = swap(source(j + k * part));
            if (part > 1) z[k] = times<W>(z[k], twiddle[2 * k - 2], twiddle[2 * k - 1]);
        }
        butterfly<W, RADIX>(z);
        DEEPTHIN_UNROLL
        for (int k = 0; k < RADIX; k++) sink(j + k * part, swap(z[k]));
    }
}

#define DEEPTHIN_RADICES(call) \
    switch (radix) {           \
        case 2: call(2);       \
        case 3: call(3);       \
        case 4: call(4);       \
        case 5: call(5);       \
        default: call(8);      \
    }

// Forward: level 0 from `source` into `data`, then each part separately, depth first.
template <int W>
void forward_parts(const Transform& plan, float* data, int64_t length, int level) {
    if (level == plan.levels) return;
    const int radix = plan.radix[level];
    const int64_t part = length / radix;
    auto source = [=](int64_t i) DEEPTHIN_INLINED { return load_point<W>(data + i * 2 * W); };
#define DEEPTHIN_CALL(R)                                                       \
    {                                                                          \
        forward_pass<W, R>(source, data, part, plan.twiddles[level]);          \
        break;                                                                 \
    }
    DEEPTHIN_RADICES(DEEPTHIN_CALL)
#undef DEEPTHIN_CALL
    if (part > 1)
        for (int k = 0; k < radix; k++) forward_parts<W>(plan, data + k * part * 2 * W, part, level + 1);
}

template <int W, class Source>
void forward_transform(const Transform& plan, Source source, float* data) {
    const int radix = plan.radix[0];
    const int64_t part = plan.points / radix;
#define DEEPTHIN_CALL(R)                                                   \
    {                                                                      \
        forward_pass<W, R>(source, data, part, plan.twiddles[0]);          \
        break;                                                             \
    }
    DEEPTHIN_RADICES(DEEPTHIN_CALL)
#undef DEEPTHIN_CALL
    for (int k = 0; k < radix; k++) forward_parts<W>(plan, data + k * part * 2 * W, part, 1);
}

// Backward: `spectrum(f)` gives frequency f (in the transform's own order), `data` takes the points, unscaled.
template <int W, class Spectrum>
void inverse_parts(const Transform& plan, Spectrum spectrum, float* data, int64_t first, int64_t length, int level) {
    const int radix = plan.radix[level];
    const int64_t part = length / radix;
    float* block = data + first * 2 * W;
    auto sink = [=](int64_t i, Complex<W> value) DEEPTHIN_INLINED { store_point<W>(block + i * 2 * W, value); };
    if (part > 1) {
        for (int k = 0; k < radix; k++) inverse_parts<W>(plan, spectrum, data, first + k * part, part, level + 1);
        auto source = [=](int64_t i) DEEPTHIN_INLINED { return load_point<W>(block + i * 2 * W); };
#define DEEPTHIN_CALL(R)                                                        \
    {                                                                           \
        inverse_pass<W, R>(source, sink, part, plan.twiddles[level]);           \
        break;                                                                  \
    }
        DEEPTHIN_RADICES(DEEPTHIN_CALL)
#undef DEEPTHIN_CALL
    } else {
        auto source = [=](int64_t i) DEEPTHIN_INLINED { return spectrum(first + i); };
#define DEEPTHIN_CALL(R)                                                        \
    {                                                                           \
        inverse_pass<W, R>(source, sink, part, plan.twiddles[level]);           \
        break;                                                                  \
    }
        DEEPTHIN_RADICES(DEEPTHIN_CALL)
#undef DEEPTHIN_CALL
    }
}

template <int W, class Spectrum>
void inverse_transform(const Transform& plan, Spectrum spectrum, float* data) {
    inverse_parts<W>(plan, spectrum, data, 0, plan.points, 0);
}

}  // namespace
