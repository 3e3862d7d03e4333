// Products of a block of items, one item per SIMD lane: the layout is [position][lane].
#pragma once
#include "fft.h"
#include "patches.h"
#include "phase.h"

namespace {

// ---- The product with a matrix A whose rows lie `stride` apart ----------------------------------------------------------
// A column c = s * rank + a of A belongs to vector s * jump + a * W of P.

struct Columns {
    int64_t blocks, rank, jump;
};

// Cuts `count` into the fewest tiles of at most MOST, of nearly equal size: small tiles leave arithmetic
// units idle. `work<size>(first)`.
template <int MOST, class Work>
DEEPTHIN_INLINE void in_even_tiles(int64_t count, Work work) {
    for (int64_t first = 0, tiles = divide_up(count, MOST); tiles > 0; tiles--) {
        const int64_t size = divide_up(count - first, tiles);
        switch (size) {
            case 1: work.template operator()<1>(first); break;
            case 2: work.template operator()<2>(first); break;
            case 3: work.template operator()<3>(first); break;
            case 4: work.template operator()<4>(first); break;
            case 5: work.template operator()<5>(first); break;
            case 6: work.template operator()<6>(first); break;
            case 7: work.template operator()<7>(first); break;
            case 8: work.template operator()<8>(first); break;
            default:
                if constexpr (MOST > 8) {
                    switch (size) {
                        case 9: work.template operator()<9>(first); break;
                        case 10: work.template operator()<10>(first); break;
                        case 11: work.template operator()<11>(first); break;
                        default: work.template operator()<12>(first);
                    }
                }
        }
        first += size;
    }
}

// y[k] = sum_c A[k, c] P[c] for K rows; the sums go to `finish(k, sum)`.
template <int W, int K, class Finish>
DEEPTHIN_INLINE void multiply_tile(const float* a, int64_t stride, Columns c, const float* p, Finish finish) {
    Vec<W> sum[K] = {};
    if (c.rank == 1) {
        for (int64_t s = 0; s < c.blocks; s++, a++, p += c.jump) {
            const Vec<W> value = load<W>(p);
            DEEPTHIN_UNROLL
            for (int k = 0; k < K; k++) sum[k] += value * a[k * stride];
        }
    } else {
        for (int64_t s = 0; s < c.blocks; s++, p += c.jump)
            for (int64_t i = 0; i < c.rank; i++, a++) {
                const Vec<W> value = load<W>(p + i * W);
                DEEPTHIN_UNROLL
                for (int k = 0; k < K; k++) sum[k] += value * a[k * stride];
            }
    }
    DEEPTHIN_UNROLL
    for (int k = 0; k < K; k++) finish(k, sum[k]);
}

// Rows of A at a time: as many as give enough independent sums, and no more, since each is a separate stream from memory.
constexpr int STREAMS = 8;

template <int W, class Finish>
DEEPTHIN_INLINE void multiply(const float* a, int64_t stride, int64_t rows, Columns c, const float* p, Finish finish) {
    in_even_tiles<STREAMS>(rows, [&]<int K>(int64_t k) DEEPTHIN_INLINED {
        multiply_tile<W, K>(a + k * stride, stride, c, p,
                            [=](int64_t i, Vec<W> sum) DEEPTHIN_INLINED { finish(k + i, sum); });
    });
}

// ---- The correlation ----------------------------------------------------------------------------------------------------

// p[v] += or = sum_t x[v - lead + t] w[t] for v < count; x has `length` vectors and TILE more that may be read at both ends.
template <int W, bool ADD>
void correlate(const float* x, int64_t length, const float* w, int64_t n, int64_t lead, float* p, int64_t p_jump,
               int64_t x_jump, int64_t count) {
    for (int64_t v = 0; v < count; v += TILE) {
        const int64_t from = larger(0, lead - v - (TILE - 1)), to = smaller(n, length + lead - v);
        const float* at = x + (v - lead) * x_jump;
        Vec<W> sum[TILE] = {};
        for (int64_t t = from; t < to; t++) {
            DEEPTHIN_UNROLL
            for (int k = 0; k < TILE; k++) sum[k] += load<W>(at + (t + k) * x_jump) * w[t];
        }
        const int64_t valid = smaller(TILE, count - v);
        DEEPTHIN_UNROLL
        for (int k = 0; k < TILE; k++) {
            if (k < valid) {
                float* out = p + (v + k) * p_jump;
                store<W>(out, ADD ? load<W>(out) + sum[k] : sum[k]);
            }
        }
    }
}

// Blocks of items whose gradients of xf are summed in registers: each sum is loaded and stored once.
constexpr int BUNDLE = 4;

template <int W>
struct Space {  // scratch memory of a piece of a block of items, or of a bundle of them; y serves all pieces
    const Plan& plan;
    int64_t count;                         // positions of the correlation
    int64_t least_outputs, more_outputs;  // outputs of each phase; the first `more_outputs` phases have one more
    bool fft;
    int64_t width;  // columns of a panel
    float *x, *p, *y, *z, *c, *d, *dx, *panel;
    int64_t floats;

    Space(const Job& job, float* memory, bool backward) : plan(job.plan), count(plan.width + plan.n - 1) {
        Arena arena{memory};
        y = arena.take(plan.rows * W * (backward ? BUNDLE : 1));
        least_outputs = plan.rows / plan.phases;
        more_outputs = plan.rows % plan.phases;
        fft = job.lanes.points > 0;
        width = round_up(plan.blocks * plan.rank, W);
        const int64_t points = job.lanes.points * 2 * W, edge = TILE * W;
        const int64_t positions = (count + 2 * TILE) * plan.rank * W;
        x = arena.take((plan.width + 2 * TILE) * W) + (memory ? edge : 0);
        p = arena.take(positions) + (memory ? edge * plan.rank : 0);
        z = arena.take(points);
        // Without FFT it holds a reversed filter or, for plain rank, the items one after the other.
        c = arena.take(larger(points, backward ? round_up(plan.n, W) * (is_plain_rank(plan) ? W : 1) : 0));
        d = dx = panel = nullptr;
        if (backward) {
            d = plan.rank > 1 ? arena.take(points) : nullptr;
            dx = arena.take(plan.width * W);
            const int64_t panels = smaller(plan.phases, plan.rows) * BUNDLE * W * width;
            panel = arena.take(panels);
        }
        floats = arena.used;
    }

    Columns columns(const Phase& phase) const { return {phase.blocks(), plan.rank, plan.n * plan.rank * W}; }
    int64_t outputs(int64_t phase) const { return least_outputs + (phase < more_outputs); }
    int64_t place(const Phase& phase) const { return phase.first() * plan.rank * W; }
};

template <int W>
void take_items(const Job& job, Space<W>& space, int64_t column, int64_t first, int64_t items) {
    const int64_t cols = job.plan.cols, width = job.plan.width;
    __builtin_memset(space.x - TILE * W, 0, sizeof(float) * TILE * W);
    if (job.patches)
        take_windows<W>(*job.patches, first, items, column, width, space.x);
    else
        rows_to_lanes<W>(job.x + first * cols + column, cols, items, width, space.x);
    __builtin_memset(space.x + width * W, 0, sizeof(float) * TILE * W);
}

// Fills p, and by FFT z with the spectrum of x.
template <int W>
void correlations(const Job& job, Space<W>& space) {
    const Plan& plan = job.plan;
    const int64_t rank = plan.rank;
    if (is_plain_rank(plan)) {  // one position is read: a product with wf itself
        float* p = space.p + (plan.n - 1) * rank * W;
        multiply<W>(job.wf, plan.n, rank, {1, plan.n, 0}, space.x,
                    [=](int64_t k, Vec<W> sum) DEEPTHIN_INLINED { store<W>(p + k * W, sum); });
        return;
    }
    if (!space.fft) {
        for (int64_t a = 0; a < rank; a++)
            correlate<W, false>(space.x, plan.width, job.wf + a * plan.n, plan.n, plan.n - 1, space.p + a * W, rank * W,
                                W, space.count);
        return;
    }
    forward_spectrum<W>(job.lanes, space.x, W, plan.width, space.z);
    const float* z = space.z;
    for (int64_t a = 0; a < rank; a++) {
        const float* h = job.spectra + a * job.lanes.points * 2;
        inverse_spectrum<W>(
            job.lanes,
            [=](int64_t f) DEEPTHIN_INLINED { return times<W>(load_point<W>(z + f * 2 * W), h[2 * f], h[2 * f + 1]); },
            space.c, space.p + a * W, rank * W, space.count);
    }
}

template <int W>
uint32_t forward_block(const Job& job, int64_t first, int64_t items, float* scratch) {
    const int64_t rows = job.plan.rows, cols = job.plan.cols;
    Job part = job;
    Vec<W> odd = {};  // NaN in the lane of each item with an output that is not finite
    Vec<W>* const marked = &odd;
    const float* lanes = nullptr;
    for (int64_t column = 0; column < cols; column += job.plan.piece) {
        part.plan = piece_of(job.plan, column);
        const Plan& plan = part.plan;
        Space<W> space(part, scratch, false);
        lanes = space.y;
        take_items<W>(part, space, column, first, items);
        correlations<W>(part, space);
        const bool begins = column == 0, ends = column + plan.width == cols;
        Phase phase(plan);
        for (int64_t i = 0; i < smaller(plan.phases, rows); i++, phase.next()) {
            float* const y = space.y + i * W;
            const float* const bias = job.bias ? job.bias + i : nullptr;
            const int64_t apart = plan.phases;
            const bool relu = job.relu;
            const float scale = job.scale;
            multiply<W>(job.xf + phase.row * plan.rank, plan.step * plan.rank, space.outputs(i), space.columns(phase),
                        space.p + space.place(phase), [=](int64_t k, Vec<W> sum) DEEPTHIN_INLINED {
                            float* const at = y + k * apart * W;
                            if (!begins) sum += load<W>(at);
                            if (ends) {
                                sum *= scale;
                                if (bias) sum += bias[k * apart];
                                *marked += sum - sum;
                                if (relu) sum = rectify<W>(sum);
                            }
                            store<W>(at, sum);
                        });
        }
    }
    if (job.patches)
        put_outputs<W>(*job.patches, lanes, first, items, rows, job.y);
    else
        lanes_to_rows<W>(lanes, rows, items, rows, job.y + first * rows);
    uint32_t mask = 0;
    for (int64_t b = 0; b < items; b++) mask |= uint32_t(odd[b] != odd[b]) << b;
    return mask;
}

}  // namespace
