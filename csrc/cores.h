// The product with a chain of small cores (a tensor train; a sum of Kronecker products is one of two cores), core by core,
// without computing the matrix. Novikov et al., 2015, "Tensorizing neural networks".
//
// Before step k an item is an array of Q_k x places x r_(k-1), where a place is one of the inputs of later cores and one of the
// outputs of earlier ones. The step is one product of matrices: places x (Q_k r_(k-1)) times (Q_k r_(k-1)) x (R_k r_k), whose
// result is the array of the next step as it lies. So nothing is moved between steps. Docs/performance.md counts.
#pragma once
#include "kernels.h"
#include "phase.h"
#include "vector.h"

namespace {

using deepthin::Cores;

constexpr int TALL = 6, WIDE = DEEPTHIN_TILE / TALL;  // a tile of accumulators: rows, and vectors in a row
constexpr int64_t DEPTH = 96;                         // of a block of products: its part of B stays in the nearest cache

// Positions outer * outer_step + inner * inner_step, inner first.
struct Walk {
    int64_t outers, outer_step, inners, inner_step;
};

// One tile of C (+)= A B: rows of A begin at `a`, those of B and C lie so far apart.
template <int M, int N>
void tile(const float* const* a, const Walk& walk, const float* b, int64_t b_stride, float* c, int64_t c_stride, bool add) {
    constexpr int W = DEEPTHIN_WIDTH;
    Vec<W> sum[M][N];
    const float* row[M];
    DEEPTHIN_UNROLL
    for (int m = 0; m < M; m++) {
        row[m] = a[m];
        DEEPTHIN_UNROLL
        for (int n = 0; n < N; n++) sum[m][n] = add ? load<W>(c + m * c_stride + n * W) : Vec<W>{};
    }
    for (int64_t outer = 0; outer < walk.outers; outer++) {
        int64_t at = outer * walk.outer_step;
        for (int64_t inner = 0; inner < walk.inners; inner++, at += walk.inner_step, b += b_stride) {
            Vec<W> value[N];
            DEEPTHIN_UNROLL
            for (int n = 0; n < N; n++) value[n] = load<W>(b + n * W);
            DEEPTHIN_UNROLL
            for (int m = 0; m < M; m++) {
                const float each = row[m][at];
                DEEPTHIN_UNROLL
                for (int n = 0; n < N; n++) sum[m][n] += value[n] * each;
            }
        }
    }
    DEEPTHIN_UNROLL
    for (int m = 0; m < M; m++) {
        DEEPTHIN_UNROLL
        for (int n = 0; n < N; n++) store<W>(c + m * c_stride + n * W, sum[m][n]);
    }
}

template <int M>
void tile_of(int vectors, const float* const* a, const Walk& walk, const float* b, int64_t b_stride, float* c,
             int64_t c_stride, bool add) {
    switch (vectors) {
        case 1: return tile<M, 1>(a, walk, b, b_stride, c, c_stride, add);
        case 2: return tile<M, 2>(a, walk, b, b_stride, c, c_stride, add);
        default:
            if constexpr (WIDE > 2) {
                if (vectors == 3) return tile<M, 3>(a, walk, b, b_stride, c, c_stride, add);
                return tile<M, 4>(a, walk, b, b_stride, c, c_stride, add);
            }
    }
}
static_assert(WIDE == 2 || WIDE == 4);

// C (+)= A B, where A[i, k] is at the sum of both walks' positions. Of B and C whole vectors are read and written: after
// their last row there must be memory for one more vector. What is written behind a row of C is written again by the next,
// or is the same as before: so the last vectors come first.
void multiply(const float* a, const Walk& rows, const Walk& depth, const float* b, int64_t b_stride, int64_t width, float* c,
              int64_t c_stride, bool add) {
    constexpr int W = DEEPTHIN_WIDTH;
    const int64_t vectors = divide_up(width, W), parts = divide_up(vectors, WIDE), count = rows.outers * rows.inners;
    const int64_t strips = divide_up(count, TALL);
    // Blocks of the depth are some inner positions of one outer, or some outers.
    const bool within = depth.inners > DEPTH || depth.outers == 1;
    const int64_t outers = within ? 1 : larger(1, DEPTH / depth.inners);
    const int64_t inner_blocks = within ? divide_up(depth.inners, DEPTH) : 1, blocks = divide_up(depth.outers, outers) * inner_blocks;
    for (int64_t part = parts - 1; part >= 0; part--) {
        const int64_t v = vectors * part / parts;
        const int across = int(vectors * (part + 1) / parts - v);
        const float* from = b + v * W;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t outer = block / inner_blocks * outers, piece = block % inner_blocks;
            const int64_t inner = depth.inners * piece / inner_blocks, stop = depth.inners * (piece + 1) / inner_blocks;
            const Walk walk{smaller(outers, depth.outers - outer), depth.outer_step, stop - inner, depth.inner_step};
            const float* at = a + outer * depth.outer_step + inner * depth.inner_step;
            const bool adds = add || block > 0;
            int64_t row_outer = 0, row_inner = 0;
            for (int64_t strip = 0; strip < strips; strip++) {
                const int64_t first = count * strip / strips, tall = count * (strip + 1) / strips - first;
                const float* row[TALL];
                for (int64_t m = 0; m < tall; m++) {
                    row[m] = at + row_outer * rows.outer_step + row_inner * rows.inner_step;
                    if (++row_inner == rows.inners) row_inner = 0, row_outer++;
                }
                float* to = c + first * c_stride + v * W;
                switch (tall) {
                    case 1: tile_of<1>(across, row, walk, from, b_stride, to, c_stride, adds); break;
                    case 2: tile_of<2>(across, row, walk, from, b_stride, to, c_stride, adds); break;
                    case 3: tile_of<3>(across, row, walk, from, b_stride, to, c_stride, adds); break;
                    case 4: tile_of<4>(across, row, walk, from, b_stride, to, c_stride, adds); break;
                    case 5: tile_of<5>(across, row, walk, from, b_stride, to, c_stride, adds); break;
                    default: tile_of<TALL>(across, row, walk, from, b_stride, to, c_stride, adds);
                }
            }
            from += walk.outers * walk.inners * b_stride;
        }
    }
}

// Floats from one row of B to the next: whole vectors, and of more than a tile such that rows use all sets of a cache.
DEEPTHIN_INLINE int64_t stride_of(int64_t width) {
    constexpr int64_t TILES = DEEPTHIN_WIDTH * WIDE;
    return width <= TILES ? round_up(width, DEEPTHIN_WIDTH) : (divide_up(width, TILES) | 1) * TILES;
}

// Step k of an item: places x depth times depth x width.
struct CoreStep {
    int64_t places, inner, outer;  // the rank r_(k-1), and Q_k
    int64_t depth, width;
    int64_t rank, side;  // r_k, and R_k

    CoreStep(const Cores& cores, int k) {
        places = 1;
        for (int i = 0; i < cores.count; i++)
            if (i != k) places *= i < k ? cores.core[i].rows : cores.core[i].cols;
        const deepthin::Core& core = cores.core[k];
        inner = core.rank, outer = core.cols, rank = core.next, side = core.rows;
        depth = inner * outer, width = side * rank;
    }
    Walk of_places() const { return {1, 0, places, inner}; }
    Walk of_depth() const {  // of a place's input
        if (inner == 1) return {1, 0, outer, places};
        return {outer, places * inner, inner, 1};
    }
    int64_t input() const { return places * depth; }
    int64_t output() const { return places * width; }
};

// B[(i, j), (k, l)] = from[i, j, k, l], the axes so many floats apart; rows of B are padded with zeros to whole vectors.
struct Axis {
    int64_t count, step;
};
void lay_out(const float* from, Axis i, Axis j, Axis k, Axis l, float* to, int64_t stride) {
    constexpr int W = DEEPTHIN_WIDTH;
    const int64_t width = k.count * l.count, padded = round_up(width, W);
    if (l.count == 1 || k.step == l.count * l.step) l = {width, l.count == 1 ? k.step : l.step}, k = {1, 0};
    if (l.step == 1) {  // runs
        for (int64_t a = 0; a < i.count; a++)
            for (int64_t b = 0; b < j.count; b++, to += stride) {
                float* at = to;
                for (int64_t c = 0; c < k.count; c++, at += l.count) {
                    const float* run = from + a * i.step + b * j.step + c * k.step;
                    int64_t e = 0;
                    for (; e + W <= l.count; e += W) store<W>(at + e, load<W>(run + e));
                    for (; e + 4 <= l.count; e += 4) store<4>(at + e, load<4>(run + e));
                    for (; e < l.count; e++) at[e] = run[e];
                }
                for (int64_t e = width; e < padded; e++) to[e] = 0;
            }
        return;
    }
    const bool by_j = j.step == 1 && j.count > 1, contiguous = by_j || i.step == 1;
    const Axis fast = by_j ? j : i, slow = by_j ? i : j;
    const int64_t fast_row = by_j ? stride : j.count * stride, slow_row = by_j ? j.count * stride : stride;
    for (int64_t s = 0; s < slow.count; s++)
        for (int64_t first = 0; first < padded; first += W) {
            int64_t place[W], f = 0;
            const int64_t used = smaller(W, width - first);
            for (int64_t w = 0; w < used; w++)
                place[w] = s * slow.step + (first + w) / l.count * k.step + (first + w) % l.count * l.step;
            float* at = to + s * slow_row + first;
            for (; contiguous && f + W <= fast.count; f += W) {
                Vec<W> block[W];
                DEEPTHIN_UNROLL
                for (int w = 0; w < W; w++) block[w] = w < used ? load<W>(from + place[w] + f) : Vec<W>{};
                transpose<W>(block);
                DEEPTHIN_UNROLL
                for (int w = 0; w < W; w++) store<W>(at + (f + w) * fast_row, block[w]);
            }
            for (; f < fast.count; f++)
                for (int64_t w = 0; w < W; w++) at[f * fast_row + w] = w < used ? from[place[w] + f * fast.step] : 0.0f;
        }
}

// Layout of the packed cores: of each step B, then, for gradients, of each step its transpose.
struct PackedCores {
    int64_t forward[deepthin::MOST_CORES], backward[deepthin::MOST_CORES], floats = 0;

    PackedCores(const Cores& cores, bool gradients) {
        for (int k = 0; k < cores.count; k++) {
            const CoreStep step(cores, k);
            forward[k] = floats, floats += step.depth * stride_of(step.width);
        }
        for (int k = 0; gradients && k < cores.count; k++) {
            const CoreStep step(cores, k);
            backward[k] = floats, floats += step.width * stride_of(step.depth);
        }
    }
};

int64_t cores_floats(const Cores& cores, bool gradients) { return PackedCores(cores, gradients).floats; }

void pack_cores(const Cores& cores, const float* const* from, bool gradients, float* to) {
    const PackedCores packed(cores, gradients);
    for (int k = 0; k < cores.count; k++) {
        const deepthin::Core& core = cores.core[k];
        const Axis rank{core.rank, core.step[0]}, row{core.rows, core.step[1]}, col{core.cols, core.step[2]},
            next{core.next, core.step[3]};
        const float* entries = from[cores.place(k)];
        lay_out(entries, col, rank, row, next, to + packed.forward[k], stride_of(core.rows * core.next));
        if (gradients) lay_out(entries, row, next, col, rank, to + packed.backward[k], stride_of(core.cols * core.rank));
    }
}

constexpr int64_t BEHIND = DEEPTHIN_WIDTH * WIDE;  // floats that `multiply` may touch behind a matrix

struct CoresSpace {  // scratch memory of one item
    float* state[deepthin::MOST_CORES + 1];  // the input, and the result of each step; without gradients two take turns
    float *grad, *temporary;
    int64_t floats, inputs, outputs;  // of the chain, which may have more than the matrix

    CoresSpace(const Cores& cores, bool gradients, float* memory) {
        Arena arena{memory};
        inputs = CoreStep(cores, 0).input(), outputs = CoreStep(cores, cores.count - 1).output();
        int64_t widest = inputs;
        for (int k = 0; k < cores.count; k++) {
            const CoreStep step(cores, k);
            widest = larger(widest, step.output());
        }
        widest += BEHIND;
        state[0] = arena.take(inputs + BEHIND);
        for (int k = 1; k <= cores.count; k++) {
            const int64_t own = CoreStep(cores, k - 1).output() + BEHIND;
            state[k] = !gradients && k > 2 ? state[k - 2] : arena.take(gradients ? own : widest);
        }
        grad = gradients ? arena.take(widest) : nullptr;
        temporary = gradients || cores.mirrored ? arena.take(widest) : nullptr;
        floats = arena.used;
    }
};

int64_t cores_scratch(const Cores& cores, bool gradients) { return CoresSpace(cores, gradients, nullptr).floats; }

// The first `count` floats, each times `scale`, and zeros up to `length`.
void copy_padded(const float* from, int64_t count, int64_t length, float scale, float* to) {
    for (int64_t i = 0; i < count; i++) to[i] = scale * from[i];
    for (int64_t i = count; i < length; i++) to[i] = 0;
}

// rows x cols -> cols x rows
void transpose_matrix(const float* from, int64_t rows, int64_t cols, float* to) {
    constexpr int W = DEEPTHIN_WIDTH;
    int64_t i = 0;
    for (; i + W <= rows; i += W) {
        int64_t j = 0;
        for (; j + W <= cols; j += W) {
            Vec<W> block[W];
            DEEPTHIN_UNROLL
            for (int w = 0; w < W; w++) block[w] = load<W>(from + (i + w) * cols + j);
            transpose<W>(block);
            DEEPTHIN_UNROLL
            for (int w = 0; w < W; w++) store<W>(to + (j + w) * rows + i, block[w]);
        }
        for (; j < cols; j++)
            for (int64_t w = i; w < i + W; w++) to[j * rows + w] = from[w * cols + j];
    }
    for (; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) to[j * rows + i] = from[i * cols + j];
}

// An array of the chain's outputs or inputs with its axes in reverse order. The cores' order is that of `from` if so said.
template <bool OUTPUTS>
void reverse_axes(const Cores& cores, const float* from, float* to, bool by_cores = true) {
    const auto size = [&](int k) {
        const deepthin::Core& core = cores.core[by_cores ? k : cores.count - 1 - k];
        return OUTPUTS ? core.rows : core.cols;
    };
    if (cores.count == 2) return transpose_matrix(from, size(0), size(1), to);
    int64_t step[deepthin::MOST_CORES], index[deepthin::MOST_CORES] = {}, total = 1, at = 0;
    for (int k = 0; k < cores.count; k++) step[k] = total, total *= size(k);
    for (int64_t i = 0; i < total; i++) {
        to[at] = from[i];
        for (int k = cores.count - 1; k >= 0; k--) {
            at += step[k];
            if (++index[k] < size(k)) break;
            at -= step[k] * index[k], index[k] = 0;
        }
    }
}

// The input as the first step takes it.
const float* input_of(const Cores& cores, const CoresSpace& space, const float* x) {
    const float* from = x;
    float* const first = cores.mirrored ? space.temporary : space.state[0];
    if (space.inputs > cores.cols) {
        copy_padded(x, cores.cols, space.inputs, 1, first);
        from = first;
    }
    if (!cores.mirrored) return from;
    reverse_axes<false>(cores, from, space.state[0], false);
    return space.state[0];
}

// One item; returns whether all its outputs are finite.
bool cores_item(const Cores& cores, const float* packed, const float* x, const float* bias, float scale, bool relu, float* y,
                float* scratch) {
    constexpr int W = DEEPTHIN_WIDTH;
    const PackedCores layout(cores, false);
    const CoresSpace space(cores, false, scratch);
    const float* from = input_of(cores, space, x);
    for (int k = 0; k < cores.count; k++) {
        const CoreStep step(cores, k);
        multiply(from, step.of_places(), step.of_depth(), packed + layout.forward[k], stride_of(step.width), step.width,
                 space.state[k + 1], step.width, false);
        from = space.state[k + 1];
    }
    if (cores.mirrored) {
        reverse_axes<true>(cores, from, space.temporary);
        from = space.temporary;
    }
    Vec<W> odd = {};
    for (int64_t j = 0; j < cores.rows; j += W) {
        const int64_t count = smaller(W, cores.rows - j);
        Vec<W> value = scale * (count == W ? load<W>(from + j) : load_some<W>(from + j, count));
        if (bias) value += count == W ? load<W>(bias + j) : load_some<W>(bias + j, count);
        odd += value * 0.0f;
        if (relu) value = rectify<W>(value);
        if (count == W)
            store<W>(y + j, value);
        else
            for (int64_t i = 0; i < count; i++) y[j + i] = value[i];
    }
    const float total = sum_lanes<W>(odd);
    return total == total;
}

// Sums of the gradients of the packed cores: of each step depth x width, in rows of `stride_of(width)`.
int64_t cores_sums(const Cores& cores) { return cores_floats(cores, false); }

// The gradients of one item: `grad_x` is written, `sums` added to; either may be null.
void cores_gradient(const Cores& cores, const float* packed, const float* x, const float* grad, float scale, float* grad_x,
                    float* sums, float* scratch) {
    constexpr int W = DEEPTHIN_WIDTH;
    const PackedCores layout(cores, true);
    const CoresSpace space(cores, true, scratch);
    const float* state[deepthin::MOST_CORES] = {x};
    if (sums) {
        state[0] = input_of(cores, space, x);
        for (int k = 0; k + 1 < cores.count; k++) {
            const CoreStep step(cores, k);
            multiply(state[k], step.of_places(), step.of_depth(), packed + layout.forward[k], stride_of(step.width), step.width,
                     space.state[k + 1], step.width, false);
            state[k + 1] = space.state[k + 1];
        }
    }
    copy_padded(grad, cores.rows, space.outputs, scale, cores.mirrored ? space.temporary : space.grad);
    if (cores.mirrored) reverse_axes<true>(cores, space.temporary, space.grad, false);
    for (int k = cores.count - 1; k >= 0; k--) {
        const CoreStep step(cores, k);
        if (sums)  // rows are those of B, the depth is that of the places
            multiply(state[k], {step.outer, step.places * step.inner, step.inner, 1}, step.of_places(), space.grad, step.width,
                     step.width, sums + layout.forward[k], stride_of(step.width), true);
        if (k == 0 && !grad_x) break;
        multiply(space.grad, {1, 0, step.places, step.width}, {1, 0, step.width, 1}, packed + layout.backward[k],
                 stride_of(step.depth), step.depth, space.temporary, step.depth, false);
        if (step.inner == 1) {
            transpose_matrix(space.temporary, step.places, step.outer, space.grad);
            continue;
        }
        float* to = space.grad;  // places x Q x rank -> Q x places x rank
        for (int64_t q = 0; q < step.outer; q++)
            for (int64_t p = 0; p < step.places; p++, to += step.inner) {
                const float* run = space.temporary + p * step.depth + q * step.inner;
                for (int64_t i = 0; i < step.inner; i += W) store<W>(to + i, load<W>(run + i));  // overwritten by the next
            }
    }
    if (!grad_x) return;
    if (cores.mirrored) reverse_axes<false>(cores, space.grad, space.temporary);
    __builtin_memcpy(grad_x, cores.mirrored ? space.temporary : space.grad, sizeof(float) * cores.cols);
}

void finish_cores(const Cores& cores, const float* sums, float* const* grads) {
    const PackedCores layout(cores, false);
    for (int k = 0; k < cores.count; k++) {
        const deepthin::Core& core = cores.core[k];
        float* const whole = grads[cores.place(k)];
        if (!whole) continue;
        const int64_t stride = stride_of(core.rows * core.next);
        for (int64_t a = 0; a < core.rank; a++)
            for (int64_t j = 0; j < core.rows; j++)
                for (int64_t q = 0; q < core.cols; q++) {
                    const float* from = sums + layout.forward[k] + (q * core.rank + a) * stride + j * core.next;
                    float* to = whole + a * core.step[0] + j * core.step[1] + q * core.step[2];
                    for (int64_t b = 0; b < core.next; b++) to[b * core.step[3]] = from[b];
                }
    }
}

}  // namespace
