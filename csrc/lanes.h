// Products and gradients of a block of items, one item per SIMD lane: the layout is [position][lane].
#pragma once
#include "fft.h"
#include "patches.h"
#include "phase.h"

namespace {

// ---- Three products with a matrix A whose rows lie `stride` apart -------------------------------------------------------
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
