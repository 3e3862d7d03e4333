// Gradients of a block of items, one item per SIMD lane: from those of the outputs to those of the inputs and of both factors.
#pragma once
#include "lanes.h"

namespace {

// P[c] = sum_k A[k, c] y[k], y's vectors `y_jump` apart: the gradient of P from that of the outputs.
template <int W, int C>
DEEPTHIN_INLINE void spread_tile(const float* a, int64_t stride, int64_t rows, const float* y, int64_t y_jump, Columns c,
                                 int64_t column, float* p) {
    Vec<W> sum[C] = {};
    for (int64_t k = 0; k < rows; k++, a += stride, y += y_jump) {
        const Vec<W> value = load<W>(y);
        DEEPTHIN_UNROLL
        for (int i = 0; i < C; i++) sum[i] += value * a[i];
    }
    int64_t s = column / c.rank, r = column % c.rank;
    DEEPTHIN_UNROLL
    for (int i = 0; i < C; i++) {
        store<W>(p + s * c.jump + r * W, sum[i]);
        if (++r == c.rank) {
            r = 0;
            s++;
        }
    }
}

template <int W>
void spread(const float* a, int64_t stride, int64_t rows, const float* y, int64_t y_jump, Columns c, float* p) {
    in_even_tiles<12>(c.blocks * c.rank, [&]<int C>(int64_t i) DEEPTHIN_INLINED {
        spread_tile<W, C>(a + i, stride, rows, y, y_jump, c, i, p);
    });
}

// The columns of P, item after item: W rows of `width` columns, a multiple of W, padded with zeros.
template <int W>
void lay_out(Columns c, const float* p, float* panel, int64_t width) {
    const int64_t columns = c.blocks * c.rank;
    for (int64_t i = 0; i < width; i += W) {
        Vec<W> block[W];
        int64_t s = i / c.rank, r = i % c.rank;
        DEEPTHIN_UNROLL
        for (int l = 0; l < W; l++) {
            block[l] = i + l < columns ? load<W>(p + s * c.jump + r * W) : Vec<W>{};
            if (++r == c.rank) {
                r = 0;
                s++;
            }
        }
        transpose<W>(block);
        DEEPTHIN_UNROLL
        for (int b = 0; b < W; b++) store<W>(panel + b * width + i, block[b]);
    }
}

// Outputs of several blocks of items: row k of block g begins at `rows + g * block + k * jump`.
struct Outputs {
    const float* rows;
    int64_t jump, blocks, block;
};

// ROWS rows of A's gradient, VECTORS * W columns: A[k, c] += sum over the items of y[k] P[c].
template <int W, int ROWS, int VECTORS>
DEEPTHIN_INLINE void outer_tile(Outputs y, const float* panel, int64_t width, float* a, const float* end,
                                int64_t stride, int64_t columns) {
    Vec<W> sum[ROWS][VECTORS] = {};
    for (int64_t g = 0; g < y.blocks; g++, y.rows += y.block)
        for (int b = 0; b < W; b++, panel += width) {
            Vec<W> value[VECTORS];
            DEEPTHIN_UNROLL
            for (int v = 0; v < VECTORS; v++) value[v] = load<W>(panel + v * W);
            DEEPTHIN_UNROLL
            for (int k = 0; k < ROWS; k++) {
                const float factor = y.rows[k * y.jump + b];
                DEEPTHIN_UNROLL
                for (int v = 0; v < VECTORS; v++) sum[k][v] += value[v] * factor;
            }
        }
    DEEPTHIN_UNROLL
    for (int k = 0; k < ROWS; k++) {
        DEEPTHIN_UNROLL
        for (int v = 0; v < VECTORS; v++) {
            float* at = a + k * stride + v * W;
            if ((v + 1) * W <= columns) {
                store<W>(at, load<W>(at) + sum[k][v]);
            } else if (at + W <= end) {  // entries after the columns belong to another output and stay unchanged
                store<W>(at, load<W>(at) + first_lanes<W>(sum[k][v], columns - v * W));
            } else {
                for (int64_t i = 0; i < columns - v * W; i++) at[i] += sum[k][v][i];
            }
        }
    }
}

// The same for all columns and `rows` rows. A's memory reaches to `end`.
template <int W>
void outer(Outputs y, int64_t rows, const float* panel, int64_t width, int64_t columns, float* a, const float* end,
           int64_t stride) {
    for (int64_t i = 0; i < columns; i += 3 * W) {
        const int64_t rest = columns - i;
        const auto rows_of = [&]<int VECTORS>() DEEPTHIN_INLINED {
            Outputs at = y;
            int64_t k = 0;
            for (; k + 4 <= rows; k += 4, at.rows += 4 * y.jump)
                outer_tile<W, 4, VECTORS>(at, panel + i, width, a + k * stride + i, end, stride, rest);
            for (; k < rows; k++, at.rows += y.jump)
                outer_tile<W, 1, VECTORS>(at, panel + i, width, a + k * stride + i, end, stride, rest);
        };
        if (rest > 2 * W)
            rows_of.template operator()<3>();
        else if (rest > W)
            rows_of.template operator()<2>();
        else
            rows_of.template operator()<1>();
    }
}

// grad[t] += sum_v p[v] x[v - (n - 1) + t], lane by lane.
template <int W>
void correlate_gradient(const float* x, int64_t length, const float* p, int64_t p_jump, int64_t n, float* grad) {
    const int64_t count = length + n - 1;
    for (int64_t t = 0; t < n; t += TILE) {
        const int64_t from = larger(0, n - 1 - t - (TILE - 1)), to = smaller(count, length + n - 1 - t);
        const float* at = x + (t - (n - 1)) * W;
        Vec<W> sum[TILE] = {};
        for (int64_t v = from; v < to; v++) {
            const Vec<W> value = load<W>(p + v * p_jump);
            DEEPTHIN_UNROLL
            for (int k = 0; k < TILE; k++) sum[k] += load<W>(at + (v + k) * W) * value;
        }
        const int64_t valid = smaller(TILE, n - t);
        DEEPTHIN_UNROLL
        for (int k = 0; k < TILE; k++)
            if (k < valid) store<W>(grad + (t + k) * W, load<W>(grad + (t + k) * W) + sum[k]);
    }
}

// A piece of one block of a bundle: computes the gradients of x and wf, and fills the panels from which `outer` computes that of xf.
template <int W>
void backward_block(const Job& job, Space<W>& space, int64_t column, int64_t first, int64_t items, const float* y,
                    float* panels, int64_t panel_jump) {
    const Plan& plan = job.plan;
    const int64_t rank = plan.rank, n = plan.n, width = plan.width;
    if (job.grad_xf || job.grad_wf) take_items<W>(job, space, column, first, items);
    if (job.grad_xf) {
        correlations<W>(job, space);
    } else if (job.grad_wf && space.fft) {
        forward_spectrum<W>(job.lanes, space.x, W, width, space.z);
    }
    const int64_t phases = smaller(plan.phases, plan.rows);
    Phase phase(plan);
    for (int64_t i = 0; job.grad_xf && i < phases; i++, phase.next())
        lay_out<W>(space.columns(phase), space.p + space.place(phase), panels + i * panel_jump, space.width);
    if (!job.grad_x && !job.grad_wf) return;
    float* const dp = space.p;  // the gradient takes the correlation's place
    if (is_plain_rank(plan)) {
        // only one position matters
    } else if (plan.common == 1 && plan.rows >= n) {  // every position is read by some output: only the edges are left
        __builtin_memset(dp - TILE * rank * W, 0, sizeof(float) * TILE * rank * W);
        __builtin_memset(dp + space.count * rank * W, 0, sizeof(float) * TILE * rank * W);
    } else {
        __builtin_memset(dp - TILE * rank * W, 0, sizeof(float) * (space.count + 2 * TILE) * rank * W);
    }
    phase = Phase(plan);
    for (int64_t i = 0; i < phases; i++, phase.next())
        spread<W>(job.xf + phase.row * rank, plan.step * rank, space.outputs(i), y + i * W, plan.phases * W,
                  space.columns(phase), dp + space.place(phase));
    if (is_plain_rank(plan)) {
        const float* reads = dp + (n - 1) * rank * W;
        const Columns columns{1, n, 0};
        if (job.grad_wf) {
            const int64_t padded = round_up(n, W);
            lay_out<W>(columns, space.x, space.c, padded);
            outer<W>({reads, W, 1, 0}, rank, space.c, padded, n, job.grad_wf, job.grad_wf + rank * n, n);
        }
        if (job.grad_x) spread<W>(job.wf, n, rank, reads, W, columns, space.dx);
    } else if (!space.fft) {
        for (int64_t a = 0; a < rank; a++) {
            const float* gradient = dp + a * W;
            if (job.grad_wf) correlate_gradient<W>(space.x, width, gradient, rank * W, n, job.grad_wf + a * n * W);
            if (job.grad_x) {
                float* reversed = space.c;
                for (int64_t t = 0; t < n; t++) reversed[t] = job.wf[a * n + n - 1 - t];
                if (a == 0)
                    correlate<W, false>(gradient, space.count, reversed, n, 0, space.dx, W, rank * W, width);
                else
                    correlate<W, true>(gradient, space.count, reversed, n, 0, space.dx, W, rank * W, width);
            }
        }
    } else {
        const int64_t points = job.lanes.points;
        for (int64_t a = 0; a < rank; a++) {
            forward_spectrum<W>(job.lanes, dp + a * W, rank * W, space.count, space.c);
            const float* h = job.spectra + a * points * 2;
            float* sums = job.grad_wf ? job.grad_wf + a * points * 2 * W : nullptr;
            for (int64_t f = 0; f < points; f++) {
                const auto c = load_point<W>(space.c + f * 2 * W);
                if (sums) {
                    const auto z = load_point<W>(space.z + f * 2 * W), sum = load_point<W>(sums + f * 2 * W);
                    store_point<W>(sums + f * 2 * W,
                                   {sum.re + (c.re * z.re + c.im * z.im), sum.im + (c.im * z.re - c.re * z.im)});
                }
                if (job.grad_x) {
                    auto back = times<W>(c, h[2 * f], -h[2 * f + 1]);
                    if (a > 0) back = back + load_point<W>(space.d + f * 2 * W);
                    store_point<W>((a + 1 < rank ? space.d : space.c) + f * 2 * W, back);
                }
            }
        }
        if (job.grad_x) inverse_spectrum<W>(job.lanes, InPlace{}, space.c, space.dx, W, width);
    }
    if (!job.grad_x) return;
    if (job.patches)
        add_windows<W>(*job.patches, first, items, column, width, space.dx);
    else
        lanes_to_rows<W>(space.dx, plan.cols, items, width, job.grad_x + first * plan.cols + column);
}

template <int W>
void backward_bundle(const Job& job, int64_t first, int64_t items, float* scratch) {
    const int64_t rows = job.plan.rows, cols = job.plan.cols, blocks = divide_up(items, W);
    Job part = job;
    for (int64_t column = 0; column < cols; column += job.plan.piece) {
        part.plan = piece_of(job.plan, column);
        const Plan& plan = part.plan;
        Space<W> space(part, scratch, true);
        const int64_t panel = W * space.width;
        for (int64_t g = 0; g < blocks; g++) {
            const int64_t item = first + g * W, some = smaller(W, items - g * W);
            float* const y = space.y + g * rows * W;
            if (column == 0 && job.patches)
                take_outputs<W>(*job.patches, job.grad, item, some, rows, y);
            else if (column == 0)
                rows_to_lanes<W>(job.grad + item * rows, rows, some, rows, y);
            backward_block<W>(part, space, column, item, some, y, space.panel + g * panel, blocks * panel);
        }
        Phase phase(plan);
        for (int64_t i = 0; job.grad_xf && i < smaller(plan.phases, rows); i++, phase.next()) {
            const Columns columns = space.columns(phase);
            outer<W>({space.y + i * W, plan.phases * W, blocks, rows * W}, space.outputs(i),
                     space.panel + i * blocks * panel, space.width, columns.blocks * columns.rank,
                     job.grad_xf + phase.row * plan.rank, job.grad_xf + plan.m * plan.rank, plan.step * plan.rank);
        }
    }
}

// `lanes` holds what backward_block has added up: one vector of W partial sums for each number of the result.
template <int W>
void finish_gradient(const Job& job, float* lanes, float* grad_wf) {
    const Plan& plan = job.plan;
    const int64_t n = plan.n, points = job.lanes.points;
    if (is_plain_rank(plan)) {
        for (int64_t i = 0; i < plan.rank * n; i++) grad_wf[i] = lanes[i];
    } else if (points == 0) {
        for (int64_t i = 0; i < plan.rank * n; i++) grad_wf[i] = sum_lanes<W>(load<W>(lanes + i * W));
    } else {
        for (int64_t a = 0; a < plan.rank; a += W) {  // one filter per lane
            const int64_t filters = smaller(W, plan.rank - a);
            for (int64_t i = 0; i < points * 2; i++) {
                Vec<W> sums = {};
                for (int64_t l = 0; l < filters; l++) sums[l] = sum_lanes<W>(load<W>(lanes + ((a + l) * points * 2 + i) * W));
                store<W>(lanes + (a * points * 2 + i) * W, sums);  // the first filter's place has been read
            }
            float* data = lanes + a * points * 2 * W;
            inverse_levels<W>(job.lanes, InPlace{}, data, points, 0, 1, 0);
            for (int64_t l = 0; l < filters; l++)
                for (int64_t t = 0; t < n; t++) {
                    const float* point = data + (t % points) * 2 * W + t / points * W;
                    grad_wf[(a + l) * n + n - 1 - t] = point[l] / float(points);
                }
        }
    }
}

}  // namespace
