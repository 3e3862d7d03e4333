// Shared by all products with two factors: the position of an output's terms, scratch memory, a rectifier.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace {

using deepthin::Job;
using deepthin::Plan;

constexpr int TILE = DEEPTHIN_TILE;  // accumulators in registers

template <int W>
DEEPTHIN_INLINE Vec<W> rectify(Vec<W> value) {
    return value < 0.0f ? Vec<W>{} : value;  // NaN stays NaN
}

// Lays out scratch memory; without memory it only counts.
struct Arena {
    float* base;
    int64_t used = 0;

    float* take(int64_t floats) {
        float* at = base ? base + used : nullptr;
        used += round_up(floats, 16);
        return at;
    }
};

// Iterates over outputs from `output` on: where each starts in xf and in wf.
struct Phase {
    int64_t row, at;  // in xf; in wf
    int64_t row_step, at_step, n;
    int64_t whole, rest;  // the width is whole * n + rest

    explicit Phase(const Plan& plan, int64_t output = 0)
        : row((plan.offset + output * plan.cols) / plan.n),
          at((plan.offset + output * plan.cols) % plan.n),
          row_step(plan.cols / plan.n),
          at_step(plan.cols % plan.n),
          n(plan.n),
          whole(plan.width / plan.n),
          rest(plan.width % plan.n) {}

    bool next() {  // returns whether it begins another row of the factors' product
        at += at_step;
        const int64_t wrap = at >= n;  // branch-free: a branch would be mispredicted
        at -= n & -wrap;
        row += row_step + wrap;
        return wrap;
    }
    // ceil((at + width) / n), without a division
    int64_t blocks() const { return whole + (at + rest > 0) + (at + rest > n); }
    int64_t first() const { return n - 1 - at; }  // the position in the correlation of its first term
};

// The product of the inputs from `column` on, at most `piece` of them.
DEEPTHIN_INLINE Plan piece_of(const Plan& whole, int64_t column) {
    Plan plan = whole;
    plan.width = smaller(whole.piece, whole.cols - column);
    plan.offset += column;
    plan.blocks = (plan.common == plan.n ? plan.offset % plan.n + plan.width - 1 : plan.n + plan.width - 2) / plan.n + 1;
    return plan;
}

bool is_plain_rank(const Plan& plan) { return plan.n == plan.cols && plan.offset == 0; }

}  // namespace
