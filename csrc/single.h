// The product with a single item. A SIMD lane holds one position of it; or, where one weight multiplies many items in turn,
// one output, so that no horizontal sum is needed.
#pragma once
#include "fft.h"
#include "phase.h"

namespace {

// At most 8 lanes: with 16 the product of spectra takes as many instructions, and all else more (measured: up to 1.4 times
// the time).
constexpr int SINGLE = DEEPTHIN_WIDTH < 8 ? DEEPTHIN_WIDTH : 8;

struct SingleSpace {  // scratch memory of one item
    int64_t count, padded, width, panels;
    float *x, *p, *z, *c, *panel, *tail;  // p: rank correlations of `padded` positions
    int64_t floats;

    SingleSpace(const Job& job, float* memory) {
        constexpr int W = SINGLE;
        const Plan& plan = job.plan;
        Arena arena{memory};
        count = plan.cols + plan.n - 1;
        padded = larger(round_up(count, W) + TILE * W, plan.blocks * plan.n + W);
        width = round_up(plan.blocks * plan.rank, W);
        panels = plan.n / plan.common;
        const int64_t points = job.single.points * 2 * W;
        x = arena.take(round_up(plan.cols, W) + 2 * TILE * W) + (memory ? TILE * W : 0);
        p = arena.take(padded * plan.rank);
        z = arena.take(points);
        c = arena.take(points);
        panel = arena.take(larger(panels * width, round_up(panels, W) * plan.blocks * plan.rank));
        tail = arena.take(2 * width);
        floats = arena.used;
    }
};

// sum_i a[i] b[i], i < length, a multiple of W
template <int W>
DEEPTHIN_INLINE Vec<W> dot(const float* a, const float* b, int64_t length) {
    Vec<W> sum = {};
    for (int64_t i = 0; i < length; i += W) sum += load<W>(a + i) * load<W>(b + i);
    return sum;
}

// Row after row of a dense matrix times x: y[j] = sum_q a[j, q] x[q], length any.
template <int W, int K>
DEEPTHIN_INLINE void dots(const float* a, int64_t stride, int64_t length, const float* x, float* y) {
    Vec<W> sum[K] = {};
    int64_t i = 0;
    for (; i + W <= length; i += W) {
        const Vec<W> value = load<W>(x + i);
        DEEPTHIN_UNROLL
        for (int k = 0; k < K; k++) sum[k] += load<W>(a + k * stride + i) * value;
    }
    DEEPTHIN_UNROLL
    for (int k = 0; k < K; k++) {
        y[k] = sum_lanes<W>(sum[k]);
        for (int64_t j = i; j < length; j++) y[k] += a[k * stride + j] * x[j];
    }
}

void correlate_single(const SingleSpace& space, const Plan& plan, const float* w, float* p) {
    constexpr int W = SINGLE;
    const int64_t n = plan.n;
    for (int64_t v = 0; v < space.count; v += TILE * W) {
        const int64_t from = larger(0, n - 1 - v - (TILE * W - 1)), to = smaller(n, plan.cols + n - 1 - v);
        const float* at = space.x + v - (n - 1);
        Vec<W> sum[TILE] = {};
        for (int64_t t = from; t < to; t++) {
            DEEPTHIN_UNROLL
            for (int k = 0; k < TILE; k++) sum[k] += load<W>(at + t + k * W) * w[t];
        }
        DEEPTHIN_UNROLL
        for (int k = 0; k < TILE; k++)
            if (v + k * W < space.padded) store<W>(p + v + k * W, sum[k]);
    }
}

// Lane l holds the positions l modulo W: a product of spectra becomes one with a W x W Toeplitz matrix of spectra.
void correlations_by_fft(const Job& job, const SingleSpace& space) {
    constexpr int W = SINGLE;
    const Transform& transform = job.single;
    forward_spectrum<W>(transform, space.x, W, divide_up(job.plan.cols, W), space.z);
    const float* z = space.z;
    for (int64_t a = 0; a < job.plan.rank; a++) {
        const float* spectra = job.spectra1 + a * transform.points * 4 * W;
        inverse_spectrum<W>(
            transform,
            [=](int64_t f) DEEPTHIN_INLINED {
                const float *value = z + f * 2 * W, *h = spectra + f * 4 * W + W - 1;
                Vec<W> rr = {}, ii = {}, ri = {}, ir = {};
                DEEPTHIN_UNROLL
                for (int l = 0; l < W; l++) {
                    const Vec<W> re = load<W>(h - l), im = load<W>(h + 2 * W - l);
                    rr += re * value[l];
                    ii += im * value[W + l];
                    ri += im * value[l];
                    ir += re * value[W + l];
                }
                return Complex<W>{rr - ii, ri + ir};
            },
            space.c, space.p + a * space.padded, W, divide_up(space.count, W));
    }
}

// Each phase's terms, of all filters, contiguous, in rows of `width` that are padded with zeros.
void lay_side_by_side(const SingleSpace& space, const Plan& plan) {
    constexpr int W = SINGLE;
    const int64_t n = plan.n, rank = plan.rank, width = space.width, used = plan.blocks * rank;
    const int64_t common = plan.common, begin = (n - 1 - plan.offset) % common;
    const int64_t whole = common == 1 ? n / W * W : 0;
    for (int64_t c = 0, s = 0, a = 0; c < width; c += W) {
        const float* from[W];  // of each column; null: zeros
        for (int i = 0; i < W; i++) {
            from[i] = c + i < used ? space.p + a * space.padded + s * n : nullptr;
            if (++a == rank) a = 0, s++;
        }
        float* to = space.panel + c;
        for (int64_t at = 0; at < whole; at += W, to += W * width) {
            Vec<W> block[W];
            DEEPTHIN_UNROLL
            for (int i = 0; i < W; i++) block[i] = from[i] ? load<W>(from[i] + at) : Vec<W>{};
            transpose<W>(block);
            DEEPTHIN_UNROLL
            for (int i = 0; i < W; i++) store<W>(to + i * width, block[i]);
        }
        for (int64_t at = whole ? whole : begin; at < n; at += common, to += width)
            for (int i = 0; i < W; i++) to[i] = from[i] ? from[i][at] : 0.0f;
    }
}

// One output of a phase per lane: for each column, the k-th W outputs fill one vector. W phases make a tile; where W does not
// divide their number, the last tile begins earlier, and some outputs are computed twice.
// `work(first, phase)` is to go on by W phases.
template <class Work>
DEEPTHIN_INLINE void by_tiles(const Plan& plan, Work work) {
    constexpr int W = SINGLE;
    Phase phase(plan);
    for (int64_t first = 0; first + W <= plan.phases; first += W) work(first, phase);
    if (plan.phases % W) {
        Phase last(plan, plan.phases - W);
        work(plan.phases - W, last);
    }
}

int64_t vectors_of(const Plan& plan) { return divide_up(plan.rows, plan.phases * SINGLE); }

// 0 where packing would not pay: too few phases for a tile, or too many unused lanes. Apart from its products
// `single_item` has to locate and sum each output, which doubles its time.
int64_t packed_floats(const Plan& plan) {
    constexpr int W = SINGLE;
    const int64_t columns = plan.blocks * plan.rank, vectors = vectors_of(plan);
    if (plan.phases < W || plan.phases * vectors * columns > 2 * plan.rows * divide_up(columns, W)) return 0;
    return round_up(plan.phases, W) * vectors * columns * W;
}

// Tile after tile, then vector after vector, column after column, phase after phase.
void pack(const Plan& plan, const float* xf, float* to) {
    constexpr int W = SINGLE;
    const int64_t columns = plan.blocks * plan.rank, length = plan.m * plan.rank, vectors = vectors_of(plan);
    by_tiles(plan, [&](int64_t first, Phase& phase) {
        int64_t begin[W];
        for (int i = 0; i < W; i++, phase.next()) begin[i] = phase.row * plan.rank;
        for (int64_t v = 0; v < vectors; v++, to += columns * W * W)
            for (int64_t c = 0; c < columns; c += W)
                for (int i = 0; i < W; i++) {
                    Vec<W> block[W];
                    for (int l = 0; l < W; l++) {
                        const int64_t k = v * W + l, at = begin[i] + k * plan.step * plan.rank + c;
                        if (first + i + k * plan.phases >= plan.rows)
                            block[l] = Vec<W>{};
                        else
                            block[l] = at + W <= length ? load<W>(xf + at) : load_some<W>(xf + at, length - at);
                    }
                    transpose<W>(block);
                    for (int64_t b = 0; b < smaller(W, columns - c); b++) store<W>(to + ((c + b) * W + i) * W, block[b]);
                }
    });
}

// The terms as `multiply_packed` reads them: by tile, column and phase.
void lay_in_tiles(const SingleSpace& space, const Plan& plan) {
    constexpr int W = SINGLE;
    for (int64_t a = 0; a < plan.rank; a++) {
        float* to = space.panel + a * W;
        const float* p = space.p + a * space.padded;
        by_tiles(plan, [&](int64_t, Phase& phase) {
            for (int i = 0; i < W; i++, phase.next()) {
                const float* from = p + phase.first();
                for (int64_t s = 0; s < plan.blocks; s++) to[s * plan.rank * W + i] = from[s * plan.n];
            }
            to += plan.blocks * plan.rank * W;
        });
    }
}

// `finish(j, values, count)`: outputs from j on. Something that is not finite makes the result so.
template <class Finish>
DEEPTHIN_INLINE Vec<SINGLE> multiply_packed(const SingleSpace& space, const Plan& plan, const float* packed, Finish finish) {
    constexpr int W = SINGLE;
    const int64_t columns = plan.blocks * plan.rank, vectors = vectors_of(plan);
    const float* terms = space.panel;
    Vec<W> all = {};
    by_tiles(plan, [&](int64_t first, Phase&) DEEPTHIN_INLINED {
        for (int64_t v = 0; v < vectors; v++) {
            Vec<W> sum[W] = {};
            for (int64_t c = 0; c < columns; c++, packed += W * W) {
                DEEPTHIN_UNROLL
                for (int i = 0; i < W; i++) sum[i] += load<W>(packed + i * W) * terms[c * W + i];
            }
            transpose<W>(sum);
            int64_t j = first + v * W * plan.phases;
            if (j + W * plan.phases <= plan.rows) {
                DEEPTHIN_UNROLL
                for (int l = 0; l < W; l++, j += plan.phases) all += finish(j, sum[l], int64_t(W)) * 0.0f;
            } else {
                for (int l = 0; l < W && j < plan.rows; l++, j += plan.phases)
                    all += finish(j, sum[l], smaller(W, plan.rows - j)) * 0.0f;
            }
        }
        terms += columns * W;
    });
    return all;
}

bool single_item(const Job& job, int64_t item, float* scratch) {
    constexpr int W = SINGLE;
    const Plan& plan = job.plan;
    const int64_t rank = plan.rank, n = plan.n, cols = plan.cols;
    SingleSpace space(job, scratch);
    const float* x = job.x + item * cols;
    if (is_plain_rank(plan)) {
        __builtin_memset(space.panel, 0, sizeof(float) * space.width);
        int64_t a = 0;
        for (; a + 4 <= rank; a += 4) dots<W, 4>(job.wf + a * n, n, n, x, space.panel + a);
        for (; a < rank; a++) dots<W, 1>(job.wf + a * n, n, n, x, space.panel + a);
    } else {
        __builtin_memset(space.x - TILE * W, 0, sizeof(float) * TILE * W);
        __builtin_memcpy(space.x, x, sizeof(float) * cols);
        __builtin_memset(space.x + cols, 0, sizeof(float) * (round_up(cols, W) - cols + TILE * W));
        if (job.single.points)
            correlations_by_fft(job, space);
        else
            for (int64_t a = 0; a < rank; a++) correlate_single(space, plan, job.wf + a * n, space.p + a * space.padded);
        for (int64_t a = 0; a < rank; a++)  // positions after the last
            __builtin_memset(space.p + a * space.padded + space.count, 0, sizeof(float) * (space.padded - space.count));
        if (job.packed)
            lay_in_tiles(space, plan);
        else
            lay_side_by_side(space, plan);
    }
    float* y = job.y + item * plan.rows;
    const auto finish = [&](int64_t j, Vec<W> value, int64_t outputs) DEEPTHIN_INLINED {
        value *= job.scale;
        if (job.bias) value += outputs == W ? load<W>(job.bias + j) : load_some<W>(job.bias + j, outputs);
        if (outputs == W)
            store<W>(y + j, job.relu ? rectify<W>(value) : value);
        else
            for (int64_t i = 0; i < outputs; i++) y[j + i] = job.relu ? rectify<W>(value)[i] : value[i];
        return value;
    };
    const auto finite = [](Vec<W> odd) DEEPTHIN_INLINED {
        const float total = sum_lanes<W>(odd);
        return total == total;
    };
    if (job.packed) return finite(multiply_packed(space, plan, job.packed, finish));
    // Outputs in order, so that xf is read from its beginning to its end. The last ones read a copy that has an edge.
    const int64_t width = space.width, length = plan.m * rank, cut = larger(0, length - width);
    for (int64_t i = 0; i < 2 * width; i++) space.tail[i] = cut + i < length ? job.xf[cut + i] : 0.0f;
    Phase phase(plan);
    const int64_t down = phase.at_step / plan.common * width, up = space.panels * width;
    const float* panel = space.panel + phase.first() / plan.common * width;
    const auto next = [&]() DEEPTHIN_INLINED { panel += (up & -int64_t(phase.next())) - down; };
    int64_t j = 0;
    Vec<W> odd = {};
    const auto inner = [&]<int VECTORS>() DEEPTHIN_INLINED {  // `width` as a constant, or 0
        for (; j + W <= plan.rows && (phase.row + W * (phase.row_step + 1)) * rank + width <= length; j += W) {
            Vec<W> sum[W];
            DEEPTHIN_UNROLL
            for (int i = 0; i < W; i++, next())
                sum[i] = dot<W>(job.xf + phase.row * rank, panel, VECTORS ? VECTORS * W : width);
            odd += finish(j, sum_rows<W>(sum), W) * 0.0f;
        }
    };
    switch (width / W) {
        case 1: inner.template operator()<1>(); break;
        case 2: inner.template operator()<2>(); break;
        case 3: inner.template operator()<3>(); break;
        case 4: inner.template operator()<4>(); break;
        case 5: inner.template operator()<5>(); break;
        case 6: inner.template operator()<6>(); break;
        case 7: inner.template operator()<7>(); break;
        case 8: inner.template operator()<8>(); break;
        case 9: inner.template operator()<9>(); break;
        case 10: inner.template operator()<10>(); break;
        case 11: inner.template operator()<11>(); break;
        case 12: inner.template operator()<12>(); break;
        default: inner.template operator()<0>();
    }
    for (; j < plan.rows; j += W) {
        const int64_t outputs = smaller(W, plan.rows - j);
        Vec<W> sum[W] = {};
        for (int i = 0; i < outputs; i++, next()) {
            const int64_t at = phase.row * rank;
            sum[i] = dot<W>(at + width <= length ? job.xf + at : space.tail + at - cut, panel, width);
        }
        odd += finish(j, sum_rows<W>(sum), outputs) * 0.0f;
    }
    return finite(odd);
}

}  // namespace
