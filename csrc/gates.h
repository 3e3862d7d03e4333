// The elementwise part of a recurrent layer's step, and its gradients.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace {

// Within some 2e-7 of the value, relative; below -87 as at -87, above 88 as at 88. NaN stays.
template <int W>
DEEPTHIN_INLINE Vec<W> exponential(Vec<W> x) {
    const Vec<W> low = Vec<W>{} - 87.0f, high = Vec<W>{} + 88.0f;
    x = x < low ? low : x > high ? high : x;
    const float rounding = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction, and its last bits are the integer
    const Vec<W> shifted = x * 1.44269504088896341f + rounding, whole = shifted - rounding;
    const Vec<W> r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    const Vec<W> square = r * r;  // shortens the dependency chain
    Vec<W> sum = (r * (1.0f / 5040) + 1.0f / 720) * square + (r * (1.0f / 120) + 1.0f / 24);
    sum = sum * square + (r * (1.0f / 6) + 0.5f);
    sum = sum * square + (r + 1.0f);
    typedef typename Integers<W>::type Bits;
    const Bits scale = ((Bits)shifted << 23) + 0x3f800000;
    return sum * (Vec<W>)scale;
}

template <int W>
DEEPTHIN_INLINE Vec<W> sigmoid(Vec<W> x) {
    return 1.0f / (1.0f + exponential<W>(-x));
}

// tanh(x) with a relative error of some 3e-7, within -1 and 1; |x| is clamped to 9, where it rounds to 1. NaN stays NaN.
// x times a quotient of polynomials of x^2, fitted by Lawson's weights: exact arithmetic would be off by 2.1e-8 at most.
template <int W>
DEEPTHIN_INLINE Vec<W> tangent(Vec<W> x) {
    const Vec<W> one = Vec<W>{} + 1.0f, end = Vec<W>{} + 9.0f;
    x = x < -end ? -end : x > end ? end : x;
    const Vec<W> square = x * x;
    Vec<W> above = square * 1.335489182e-8f + 2.060926887e-5f;
    above = above * square + 3.495600391e-3f;
    above = above * square + 1.338103629e-1f;
    above = above * square + 1.0f;
    Vec<W> below = square * 7.776658503e-7f + 3.285654212e-4f;
    below = below * square + 2.587702986e-2f;
    below = below * square + 4.671435191e-1f;
    below = below * square + 1.0f;
    const Vec<W> value = x * above / below;
    return value < -one ? -one : value > one ? one : value;
}

// Calls `work(at, count)` for all numbers: W at a time, then the remainder.
template <int W, class Work>
DEEPTHIN_INLINE void by_lanes(int64_t length, Work work) {
    int64_t at = 0;
    for (; at + W <= length; at += W) work(at, int64_t(W));
    if (at < length) work(at, length - at);
}

template <int W>
DEEPTHIN_INLINE Vec<W> load_up_to(const float* from, int64_t count) {
    return count == W ? load<W>(from) : load_some<W>(from, count);
}

template <int W>
DEEPTHIN_INLINE void store_up_to(float* to, Vec<W> value, int64_t count) {
    if (count == W)
        store<W>(to, value);
    else
        for (int64_t i = 0; i < count; i++) to[i] = value[i];
}

template <int W>
void step(const deepthin::Step& s) {
    using deepthin::Cell;
    const int64_t n = s.hidden;
    for (int64_t b = 0; b < s.items; b++) {
        float *gates = s.gates + b * s.gates_step, *h = s.h + b * s.h_step, *y = s.y + b * s.y_step;
        const float* products = s.products + b * s.products_step;
        float* saved = s.saved ? s.saved + b * s.saved_step : nullptr;
        float* c = s.c ? s.c + b * s.h_step : nullptr;
        by_lanes<W>(n, [=](int64_t at, int64_t count) DEEPTHIN_INLINED {
            const auto sum = [=](int64_t gate) DEEPTHIN_INLINED {
                return load_up_to<W>(gates + gate * n + at, count) + load_up_to<W>(products + gate * n + at, count);
            };
            const auto keep = [=](int64_t gate, Vec<W> value) DEEPTHIN_INLINED {
                if (saved) store_up_to<W>(gates + gate * n + at, value, count);
            };
            Vec<W> out;
            if (s.cell == Cell::lstm) {
                const Vec<W> i = sigmoid<W>(sum(0)), f = sigmoid<W>(sum(1)), g = tangent<W>(sum(2)), o = sigmoid<W>(sum(3));
                const Vec<W> state = f * load_up_to<W>(c + at, count) + i * g;
                store_up_to<W>(c + at, state, count);
                out = o * tangent<W>(state);
                keep(0, i), keep(1, f), keep(2, g), keep(3, o);
                if (saved) store_up_to<W>(saved + at, state, count);
            } else if (s.cell == Cell::gru) {
                const Vec<W> r = sigmoid<W>(sum(0)), z = sigmoid<W>(sum(1));
                const Vec<W> product = load_up_to<W>(products + 2 * n + at, count);
                const Vec<W> candidate = tangent<W>(load_up_to<W>(gates + 2 * n + at, count) + r * product);
                out = candidate + z * (load_up_to<W>(h + at, count) - candidate);
                keep(0, r), keep(1, z), keep(2, candidate);
                if (saved) store_up_to<W>(saved + at, product, count);
            } else {
                out = sum(0);
                out = s.cell == Cell::tanh ? tangent<W>(out) : out < 0.0f ? Vec<W>{} : out;
            }
            store_up_to<W>(h + at, out, count);
            store_up_to<W>(y + at, out, count);
        });
    }
}

template <int W>
void step_gradient(const deepthin::StepGradient& s) {
    using deepthin::Cell;
    const int64_t n = s.hidden;
    for (int64_t b = 0; b < s.items; b++) {
        const float *gates = s.gates + b * s.gates_step, *grad_y = s.grad_y + b * s.grad_y_step;
        const float* saved = s.saved ? s.saved + b * s.saved_step : nullptr;
        const float *h = s.h + b * s.h_step, *y = s.y + b * s.y_step, *c = s.c ? s.c + b * s.c_step : nullptr;
        float *grad_h = s.grad_h + b * n, *grad_c = s.grad_c ? s.grad_c + b * n : nullptr;
        float *grad_gates = s.grad_gates + b * s.grad_step, *grad_products = s.grad_products + b * s.grad_step;
        by_lanes<W>(n, [=](int64_t at, int64_t count) DEEPTHIN_INLINED {
            const auto gate = [=](int64_t k) DEEPTHIN_INLINED { return load_up_to<W>(gates + k * n + at, count); };
            const auto give = [=](int64_t k, Vec<W> value) DEEPTHIN_INLINED {
                store_up_to<W>(grad_gates + k * n + at, value, count);
            };
            const Vec<W> grad = load_up_to<W>(grad_h + at, count) + load_up_to<W>(grad_y + at, count);
            Vec<W> passed = {};
            if (s.cell == Cell::lstm) {
                const Vec<W> i = gate(0), f = gate(1), g = gate(2), o = gate(3);
                const Vec<W> state = tangent<W>(load_up_to<W>(saved + at, count));
                const Vec<W> grad_state = load_up_to<W>(grad_c + at, count) + grad * o * (1.0f - state * state);
                give(0, grad_state * g * i * (1.0f - i));
                give(1, grad_state * load_up_to<W>(c + at, count) * f * (1.0f - f));
                give(2, grad_state * i * (1.0f - g * g));
                give(3, grad * state * o * (1.0f - o));
                store_up_to<W>(grad_c + at, grad_state * f, count);
            } else if (s.cell == Cell::gru) {
                const Vec<W> r = gate(0), z = gate(1), candidate = gate(2), before = load_up_to<W>(h + at, count);
                const Vec<W> inner = grad * (1.0f - z) * (1.0f - candidate * candidate);
                const Vec<W> of_r = inner * load_up_to<W>(saved + at, count) * r * (1.0f - r);
                const Vec<W> of_z = grad * (before - candidate) * z * (1.0f - z);
                give(0, of_r), give(1, of_z), give(2, inner);
                store_up_to<W>(grad_products + at, of_r, count);
                store_up_to<W>(grad_products + n + at, of_z, count);
                store_up_to<W>(grad_products + 2 * n + at, inner * r, count);
                passed = grad * z;
            } else {
                const Vec<W> out = load_up_to<W>(y + at, count);
                give(0, s.cell == Cell::tanh ? grad * (1.0f - out * out) : out > 0.0f ? grad : Vec<W>{});
            }
            store_up_to<W>(grad_h + at, passed, count);
        });
    }
}

}  // namespace
