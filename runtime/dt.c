/* The operators of dt.h. The formulas are those of docs/theory.md; sums are in the order of the vectors, so results depend on
 * DT_LANES by rounding. */
#include "dt.h"

#if __STDC_HOSTED__
#include <string.h>
#else /* as every compiler expects them */
void *memcpy(void *to, const void *from, size_t count);
void *memmove(void *to, const void *from, size_t count);
void *memset(void *to, int value, size_t count);
#endif

/* ---- vectors ---- */

#if DT_LANES > 1
typedef float vec __attribute__((vector_size(DT_LANES * 4), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(DT_LANES * 4), aligned(4), may_alias));
#else
typedef float vec;
typedef uint32_t uvec;
#endif
enum { SUMS = DT_LANES == 1 ? 16 : 8, BLOCK = SUMS * DT_LANES }; /* accumulators in registers; their numbers */
enum { WIDEST = 16, LONGEST_BLOCK = 128 };                       /* of any DT_LANES: scratch does not depend on it */
enum { AHEAD = 512 };                                            /* integers of windows that are decoded ahead */

#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#if DT_LANES > 1
#define ZERO {0}
#define EVERY(value) ((vec){0} + (value))
#else
#define ZERO 0.0f
#define EVERY(value) (value)
#endif

static uint32_t divided_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
static size_t rounded_up(size_t a, size_t b) { return (a + b - 1) / b * b; }
static uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static inline float sum_of(const vec *v) {
#if DT_LANES == 1
    return *v;
#else
    float s[DT_LANES];
    memcpy(s, v, sizeof s);
    for (int half = DT_LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
#endif
}

static float dot(const float *a, const float *b, size_t count) {
    vec s[4] = {ZERO, ZERO, ZERO, ZERO};
    size_t i = 0;
    float rest = 0;
    for (; i + 4 * DT_LANES <= count; i += 4 * DT_LANES)
        for (int k = 0; k < 4; k++) s[k] += LOAD(a + i + k * DT_LANES) * LOAD(b + i + k * DT_LANES);
    for (; i + DT_LANES <= count; i += DT_LANES) s[0] += LOAD(a + i) * LOAD(b + i);
    for (; i < count; i++) rest += a[i] * b[i];
    s[0] = (s[0] + s[1]) + (s[2] + s[3]);
    return sum_of(s) + rest;
}

static void add_multiple(float *y, float factor, const float *x, size_t count) {
    size_t i = 0;
    for (; i + DT_LANES <= count; i += DT_LANES) STORE(y + i, LOAD(y + i) + LOAD(x + i) * factor);
    for (; i < count; i++) y[i] += factor * x[i];
}

/* ---- numbers ---- */

/* What a network does not use need not be compiled: masks of kinds of matrices (bits 5 to 7: turned ones, integers,
 * DT_PACKED), and of functions. */
#ifndef DT_KINDS
#define DT_KINDS 0xffffffffu
#endif
#ifndef DT_MAPS
#define DT_MAPS 0xffffffffu
#endif
#define IS(w, of) ((DT_KINDS >> (of) & 1) && (w)->kind == (of))
#define TURNED(w) ((DT_KINDS >> 5 & 1) && (w)->turned)
#define IS_FLOATS(a) (!(DT_KINDS >> 6 & 1) || (a)->bits == 32)
#define PACKS (DT_KINDS >> 7 & 1)

static uint32_t integer(const dt_array *a, size_t i) {
    const uint8_t *p = a->data;
    if (a->bits == 16) return p[2 * i] | (uint32_t)p[2 * i + 1] << 8;
    const size_t at = i * a->bits;
    const uint32_t shift = at & 7, low = p[at >> 3], high = shift + a->bits > 8 ? p[(at >> 3) + 1] : 0;
    return (low | high << 8) >> shift & ((1u << a->bits) - 1);
}

/* Entries i to i + count of the digits of base 3 or 6. */
static void digits(const dt_array *a, size_t i, size_t count, float step, float *to) {
    const uint32_t each = a->bits == DT_BASE3 ? 5 : 3;
    const uint8_t *p = (const uint8_t *)a->data + i / each;
    for (uint32_t skip = i % each; count; skip = 0) {
        uint32_t value = *p++;
        for (uint32_t k = 0; k < each && count; k++) {
            const uint32_t rest = a->bits == DT_BASE3 ? value / 3 : value / 6;
            if (k >= skip) *to++ = step * (float)((int32_t)(value - (a->bits == DT_BASE3 ? 3 : 6) * rest) - a->zero), count--;
            value = rest;
        }
    }
}

/* Entries i to i + count of the stored integers, without the listed numbers. */
static void scaled(const dt_array *a, size_t i, size_t count, float *to) {
    while (count) {
        const size_t row = a->row ? i / a->row : 0, end = a->row ? (row + 1) * a->row - i : count;
        const size_t some = end < count ? end : count;
        if (a->table) {
            const float *table = a->table + (row << a->bits);
            for (size_t k = 0; k < some; k++) to[k] = table[integer(a, i + k)];
        } else {
            const float step = a->step[row], least = a->least ? a->least[row] : 0.0f;
            if (a->bits == 8) {
                const uint8_t *p = (const uint8_t *)a->data + i;
                for (size_t k = 0; k < some; k++) to[k] = step * (float)((int32_t)p[k] - a->zero);
            } else if (a->bits > 32)
                digits(a, i, some, step, to);
            else if (a->bits < 8) { /* bits are taken from a word that bytes fill up */
                const size_t at = i * a->bits;
                const uint8_t *p = (const uint8_t *)a->data + (at >> 3);
                const uint32_t mask = (1u << a->bits) - 1;
                uint32_t have = 8 - (at & 7), word = *p++ >> (at & 7);
                for (size_t k = 0; k < some; k++) {
                    if (have < a->bits) word |= (uint32_t)*p++ << have, have += 8;
                    to[k] = step * (float)((int32_t)(word & mask) - a->zero);
                    word >>= a->bits, have -= a->bits;
                }
            } else
                for (size_t k = 0; k < some; k++) to[k] = step * (float)((int32_t)integer(a, i + k) - a->zero);
            if (a->least)
                for (size_t k = 0; k < some; k++) to[k] += least;
        }
        i += some, to += some, count -= some;
    }
}

/* Entries first to first + count of an array, as floats. */
static void unpack(const dt_array *a, size_t first, size_t count, float *to) {
    const size_t i = first + a->first;
    if (IS_FLOATS(a)) {
        memcpy(to, (const float *)a->data + i, count * sizeof *to);
        return;
    }
    scaled(a, i, count, to);
    uint32_t low = 0, high = a->fixes; /* by halves: the first listed entry that is not before i */
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (a->fix_at[middle] < i)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < a->fixes && a->fix_at[low] < i + count; low++) to[a->fix_at[low] - i] = a->fix[low];
}

/* As unpack, but floats stay where they are. */
static const float *numbers(const dt_array *a, size_t first, size_t count, float *scratch) {
    if (IS_FLOATS(a)) return (const float *)a->data + a->first + first;
    unpack(a, first, count, scratch);
    return scratch;
}

/* ---- matrices ---- */

/* Sizes of a product with windows: phases n; outputs of a phase; rows of xf that an output reads, and their numbers. */
typedef struct {
    uint32_t n, rank, taps, depth;
    size_t terms, width, sums; /* width: terms in whole vectors */
} sizes;

static sizes sizes_of(const dt_matrix *w) {
    sizes s;
    s.n = w->n, s.rank = w->rank;
    s.taps = divided_up(w->cols + w->n - 1, w->n), s.depth = divided_up(w->rows, w->n);
    s.terms = (size_t)s.taps * s.rank, s.width = rounded_up(s.terms, WIDEST), s.sums = (size_t)s.taps * s.n;
    return s;
}

static size_t floats_of_train(const dt_matrix *w, uint32_t rows) {
    size_t most = 1, row = 0, done = 1, before = 1;
    for (uint32_t k = 0; k < w->count; k++) before *= w->cores[k].cols;
    most = before;
    for (uint32_t k = w->count; k--;) {
        const dt_core *c = w->cores + k;
        before /= c->cols, done *= rows ? c->cols : c->rows;
        most = larger(most, (rows ? 1 : before) * c->before * done);
        if (!IS_FLOATS(&c->values)) row = larger(row, (size_t)c->cols * c->after);
    }
    return 2 * most + row;
}

size_t dt_scratch(const dt_matrix *w, uint32_t use) {
    size_t floats = TURNED(w) && use != DT_ROWS ? w->cols : 0; /* a row */
    if (TURNED(w)) use = DT_ROWS;
    if (IS(w, DT_DENSE)) {
        if (use == DT_PACKED && !IS_FLOATS(&w->a)) floats += (size_t)w->rows * w->cols;
        if (use == DT_ONCE && !IS_FLOATS(&w->a)) floats += w->cols;
    } else if (IS(w, DT_WINDOWS)) {
        const sizes s = sizes_of(w);
        if (!IS_FLOATS(&w->b)) floats += (size_t)s.rank * s.n;
        if (use == DT_ROWS) return floats + s.rank;
        floats += rounded_up(s.sums, LONGEST_BLOCK) + s.n + LONGEST_BLOCK + s.n * s.width; /* inputs and their sums */
        floats += use == DT_PACKED ? s.n * s.terms * rounded_up(s.depth, WIDEST) : s.width + (IS_FLOATS(&w->a) ? 0 : AHEAD);
    } else if (IS(w, DT_TRAIN))
        floats += floats_of_train(w, use == DT_ROWS);
    else if (IS(w, DT_SPARSE))
        floats += 64;
    else if (!IS_FLOATS(&w->a))
        floats += w->n;
    return floats;
}

/* A matrix, with what its products have in common. */
typedef struct {
    const dt_matrix *w;
    uint32_t use;
    const float *wf, *dense, *pack;
    float *row, *scratch; /* row: of a turned matrix */
} factor;

static void pack_windows(const dt_matrix *w, const sizes *s, float *to, float *row) {
    const size_t length = (size_t)w->m * w->rank, lanes = rounded_up(s->depth, DT_LANES);
    uint32_t base = w->offset / w->n, at = w->offset % w->n;
    memset(to, 0, s->n * s->terms * lanes * sizeof *to);
    for (uint32_t p = 0; p < s->n && p < w->rows; p++, to += s->terms * lanes) {
        for (uint32_t k = 0; p + (size_t)k * s->n < w->rows; k++) {
            const size_t first = ((size_t)base + (size_t)k * w->cols) * w->rank;
            const size_t count = first >= length ? 0 : length - first < s->terms ? length - first : s->terms;
            const float *from = numbers(&w->a, first, count, row);
            for (size_t c = 0; c < count; c++) to[c * lanes + k] = from[c];
        }
        base += w->cols / w->n, at += w->cols % w->n;
        if (at >= w->n) at -= w->n, base++;
    }
}

static factor prepared(const dt_matrix *w, uint32_t use, float *scratch) {
    factor f = {w, use, NULL, NULL, NULL, scratch, scratch};
    if (TURNED(w)) f.scratch += w->cols;
    if (IS(w, DT_WINDOWS)) {
        const size_t count = (size_t)w->rank * w->n;
        f.wf = numbers(&w->b, 0, count, f.scratch);
        if (!IS_FLOATS(&w->b)) f.scratch += count;
        if (PACKS && use == DT_PACKED && !TURNED(w)) {
            const sizes s = sizes_of(w);
            pack_windows(w, &s, f.scratch, f.scratch + s.n * s.terms * rounded_up(s.depth, WIDEST));
            f.pack = f.scratch, f.scratch += s.n * s.terms * rounded_up(s.depth, WIDEST);
        }
    } else if (IS(w, DT_DENSE) && !TURNED(w)) {
        if (IS_FLOATS(&w->a) || use == DT_PACKED) f.dense = numbers(&w->a, 0, (size_t)w->rows * w->cols, f.scratch);
    } else if (IS(w, DT_HASHED))
        f.dense = numbers(&w->a, 0, w->n, f.scratch);
    return f;
}

/* sum_t x[u + t] wf[t] for u = s n + o, kept by o: a row of `width` numbers for each phase. */
static void correlate(const dt_matrix *w, const sizes *s, const float *wf, const float *x, float *padded, float *sums) {
    const uint32_t n = s->n, count = w->cols + n - 1;
    const size_t length = rounded_up(s->sums, LONGEST_BLOCK) + n + LONGEST_BLOCK;
    memset(padded, 0, (n - 1) * sizeof *padded);
    memmove(padded + n - 1, x, w->cols * sizeof *x);
    memset(padded + count, 0, (length - count) * sizeof *padded);
    if (s->width > s->terms)
        for (uint32_t o = 0; o < n; o++) memset(sums + o * s->width + s->terms, 0, (s->width - s->terms) * sizeof *sums);
    for (uint32_t k = 0; k < s->rank; k++, wf += n) {
        float *to = sums + k;
        uint32_t o = 0;
        for (uint32_t u = 0; u < s->sums; u += BLOCK) {
            const uint32_t from = u + BLOCK < n ? n - u - BLOCK : 0, end = u < count ? smaller(n, count - u) : 0;
            const float *at = padded + u + from;
            vec sum[SUMS] = {ZERO};
            for (uint32_t t = from; t < end; t++, at++)
#pragma GCC unroll 16
                for (int i = 0; i < SUMS; i++) sum[i] += LOAD(at + i * DT_LANES) * wf[t];
            const float *one = (const float *)sum;
            for (uint32_t i = 0; i < BLOCK && u + i < s->sums; i++) {
                *to = one[i];
                to += s->width;
                if (++o == n) o = 0, to -= n * s->width - s->rank;
            }
        }
    }
}

static void windows(const factor *f, const float *x, float *y) {
    const dt_matrix *w = f->w;
    const sizes s = sizes_of(w);
    float *padded = f->scratch, *sums = padded + rounded_up(s.sums, LONGEST_BLOCK) + s.n + LONGEST_BLOCK;
    float *row = sums + s.n * s.width;
    const uint32_t whole = w->cols / w->n, rest = w->cols % w->n;
    const size_t length = (size_t)w->m * w->rank;
    uint32_t base = w->offset / w->n, at = w->offset % w->n;
    correlate(w, &s, f->wf, x, padded, sums);
    if (PACKS && f->pack) { /* a vector holds outputs of one phase */
        const size_t lanes = rounded_up(s.depth, DT_LANES);
        const float *pack = f->pack;
        for (uint32_t p = 0; p < s.n && p < w->rows; p++, pack += s.terms * lanes) {
            const float *term = sums + (s.n - 1 - at) * s.width;
            float *to = y + p;
            uint32_t left = divided_up(w->rows - p, s.n);
            size_t v = 0;
            for (; v + 2 * DT_LANES <= lanes; v += 2 * DT_LANES) {
                vec sum[2] = {ZERO, ZERO};
                for (size_t c = 0; c < s.terms; c++) {
                    sum[0] += LOAD(pack + c * lanes + v) * term[c];
                    sum[1] += LOAD(pack + c * lanes + v + DT_LANES) * term[c];
                }
                const float *one = (const float *)sum;
                for (int i = 0; i < 2 * DT_LANES && left; i++, left--, to += s.n) *to = one[i];
            }
            if (v < lanes) {
                vec sum = ZERO;
                for (size_t c = 0; c < s.terms; c++) sum += LOAD(pack + c * lanes + v) * term[c];
                const float *one = (const float *)&sum;
                for (int i = 0; i < DT_LANES && left; i++, left--, to += s.n) *to = one[i];
            }
            at += rest;
            if (at >= w->n) at -= w->n;
        }
        return;
    }
    size_t begin = 0, end = 0; /* of what `row` holds */
    for (uint32_t j = 0; j < w->rows; j++) {
        const float *term = sums + (s.n - 1 - at) * s.width, *from = row;
        const size_t first = (size_t)base * w->rank;
        if (IS_FLOATS(&w->a) && first + s.width <= length)
            from = (const float *)w->a.data + w->a.first + first;
        else if (first + s.width > end) {
            const size_t most = s.width + (IS_FLOATS(&w->a) ? 0 : AHEAD), count = length - first < most ? length - first : most;
            unpack(&w->a, first, count, row);
            memset(row + count, 0, (most - count) * sizeof *row);
            begin = first, end = first + most;
        } else
            from += first - begin;
        vec sum = ZERO;
        for (size_t c = 0; c < s.width; c += DT_LANES) sum += LOAD(from + c) * LOAD(term + c);
        y[j] = sum_of(&sum);
        base += whole, at += rest;
        if (at >= w->n) at -= w->n, base++;
    }
}

/* From the last core to the first: before x cols x after x done -> before x before x rows x done. */
static void train(const factor *f, const float *x, float *y) {
    const dt_matrix *w = f->w;
    const size_t floats = floats_of_train(w, 0);
    size_t row = 0, before = 1, done = 1;
    for (uint32_t k = 0; k < w->count; k++) {
        before *= w->cores[k].cols;
        if (!IS_FLOATS(&w->cores[k].values)) row = larger(row, (size_t)w->cores[k].cols * w->cores[k].after);
    }
    float *from = f->scratch, *to = from + (floats - row) / 2, *numbers_of_row = to + (floats - row) / 2;
    memmove(from, x, w->cols * sizeof *x);
    memset(from + w->cols, 0, (before - w->cols) * sizeof *x);
    for (uint32_t k = w->count; k--;) {
        const dt_core *c = w->cores + k;
        const size_t each = (size_t)c->cols * c->after;
        before /= c->cols;
        for (size_t a = 0; a < c->before; a++)
            for (size_t i = 0; i < c->rows; i++) {
                const float *value = numbers(&c->values, (a * c->rows + i) * each, each, numbers_of_row);
                for (size_t p = 0; p < before; p++) {
                    const float *in = from + p * each * done;
                    float *out = to + ((p * c->before + a) * c->rows + i) * done;
                    if (done == 1)
                        *out = dot(value, in, each);
                    else {
                        memset(out, 0, done * sizeof *out);
                        for (size_t e = 0; e < each; e++) add_multiple(out, value[e], in + e * done, done);
                    }
                }
            }
        done *= c->rows;
        float *swap = from;
        from = to, to = swap;
    }
    memmove(y, from, w->rows * sizeof *y);
}

static void row_of_train(const factor *f, uint32_t index, float *y) {
    const dt_matrix *w = f->w;
    const size_t floats = floats_of_train(w, 1);
    size_t row = 0, done = 1;
    for (uint32_t k = 0; k < w->count; k++)
        if (!IS_FLOATS(&w->cores[k].values)) row = larger(row, (size_t)w->cores[k].cols * w->cores[k].after);
    float *from = f->scratch, *to = from + (floats - row) / 2, *numbers_of_row = to + (floats - row) / 2;
    from[0] = 1.0f;
    for (uint32_t k = w->count; k--;) {
        const dt_core *c = w->cores + k;
        const size_t each = (size_t)c->cols * c->after;
        const uint32_t i = index % c->rows;
        index /= c->rows;
        for (size_t a = 0; a < c->before; a++) {
            const float *value = numbers(&c->values, (a * c->rows + i) * each, each, numbers_of_row);
            for (size_t q = 0; q < c->cols; q++) {
                float *out = to + (a * c->cols + q) * done;
                memset(out, 0, done * sizeof *out);
                for (size_t b = 0; b < c->after; b++) add_multiple(out, value[q * c->after + b], from + b * done, done);
            }
        }
        done *= c->cols;
        float *swap = from;
        from = to, to = swap;
    }
    memmove(y, from, w->cols * sizeof *y);
}

/* All entries of a sparse matrix in turn; row `only`, or all rows times x. */
static void sparse(const factor *f, const float *x, float *y, uint32_t only) {
    const dt_matrix *w = f->w;
    uint32_t row = 0, col = 0, used = 0, known = 0, value = 0;
    for (uint32_t i = 0; i < w->n; i++) {
        const uint32_t gap = w->gaps[i];
        col += gap;
        if (gap < 255) {
            while (col >= w->cols) col -= w->cols, row++;
            if (row >= w->rows) return;
            if (used == known) {
                known = smaller(64, w->m - value), used = 0;
                if (!known) return;
                unpack(&w->a, value, known, f->scratch), value += known;
            }
            const float one = f->scratch[used++];
            if (x)
                y[row] += one * x[col];
            else if (row == only)
                y[col] = one;
            else if (row > only)
                return;
            col++;
        }
    }
}

static float hashed(const factor *f, uint64_t index) {
    uint64_t word = (index + f->w->offset + 1) * 0x9E3779B97F4A7C15u + f->w->seed;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9u;
    word = (word ^ word >> 27) * 0x94D049BB133111EBu;
    word ^= word >> 31;
    const float value = f->dense[(word >> 32) * f->w->n >> 32];
    return word & 1 ? -value : value;
}

/* Row `index`, without the scale. */
static void row_of(const factor *f, uint32_t index, float *y) {
    const dt_matrix *w = f->w;
    if (IS(w, DT_DENSE))
        unpack(&w->a, (size_t)index * w->cols, w->cols, y);
    else if (IS(w, DT_WINDOWS)) {
        const size_t entry = (size_t)index * w->cols + w->offset;
        size_t row = entry / w->n, at = entry % w->n;
        const float *xf = numbers(&w->a, row * w->rank, w->rank, f->scratch);
        for (uint32_t q = 0; q < w->cols; q++) {
            float sum = 0;
            for (uint32_t k = 0; k < w->rank; k++) sum += xf[k] * f->wf[(size_t)k * w->n + at];
            y[q] = sum;
            if (++at == w->n && q + 1 < w->cols) at = 0, row++, xf = numbers(&w->a, row * w->rank, w->rank, f->scratch);
        }
    } else if (IS(w, DT_TRAIN))
        row_of_train(f, index, y);
    else if (IS(w, DT_SPARSE)) {
        memset(y, 0, w->cols * sizeof *y);
        sparse(f, NULL, y, index);
    } else
        for (uint32_t q = 0; q < w->cols; q++) y[q] = hashed(f, (uint64_t)index * w->cols + q);
}

/* y = W x, without the scale. */
static void product(const factor *f, const float *x, float *y) {
    const dt_matrix *w = f->w;
    if (TURNED(w)) {
        memset(y, 0, w->cols * sizeof *y);
        for (uint32_t i = 0; i < w->rows; i++) {
            row_of(f, i, f->row);
            add_multiple(y, x[i], f->row, w->cols);
        }
    } else if (IS(w, DT_DENSE))
        for (uint32_t j = 0; j < w->rows; j++) {
            const float *row = f->dense ? f->dense + (size_t)j * w->cols : numbers(&w->a, (size_t)j * w->cols, w->cols, f->scratch);
            y[j] = dot(row, x, w->cols);
        }
    else if (IS(w, DT_WINDOWS))
        windows(f, x, y);
    else if (IS(w, DT_TRAIN))
        train(f, x, y);
    else if (IS(w, DT_SPARSE)) {
        memset(y, 0, w->rows * sizeof *y);
        sparse(f, x, y, 0);
    } else {
        uint64_t i = 0;
        for (uint32_t j = 0; j < w->rows; j++) {
            float sum = 0;
            for (uint32_t q = 0; q < w->cols; q++, i++) sum += hashed(f, i) * x[q];
            y[j] = sum;
        }
    }
}

static void scale_and_add(float *y, uint32_t count, float scale, const float *bias) {
    if (scale != 1.0f)
        for (uint32_t i = 0; i < count; i++) y[i] *= scale;
    if (bias)
        for (uint32_t i = 0; i < count; i++) y[i] += bias[i];
}

/* ---- layers ---- */

void dt_linear(const dt_matrix *w, const float *bias, uint32_t items, uint32_t use, const float *x, float *y, float *scratch) {
    const factor f = prepared(w, use, scratch);
    const uint32_t in = TURNED(w) ? w->rows : w->cols, out = TURNED(w) ? w->cols : w->rows;
    for (uint32_t i = 0; i < items; i++, x += in, y += out) {
        product(&f, x, y);
        scale_and_add(y, out, w->scale, bias);
    }
}

void dt_embedding(const dt_matrix *w, uint32_t items, uint32_t zero_row, const int32_t *ids, float *y, float *scratch) {
    const factor f = prepared(w, DT_ROWS, scratch);
    for (uint32_t i = 0; i < items; i++, y += w->cols) {
        const uint32_t id = (uint32_t)ids[i];
        if (id >= w->rows || id == zero_row)
            memset(y, 0, w->cols * sizeof *y);
        else {
            row_of(&f, id, y);
            scale_and_add(y, w->cols, w->scale, NULL);
        }
    }
}

/* Place of kernel element k in the input, or of none: size. */
static uint32_t place(const dt_window *s, int axis, uint32_t output, uint32_t k, uint32_t size) {
    const uint32_t padded = output * s->stride[axis] + k * s->dilation[axis];
    return padded < s->pad[axis] || padded - s->pad[axis] >= size ? size : padded - s->pad[axis];
}

void dt_conv(const dt_window *s, const dt_matrix *w, const float *bias, uint32_t items, uint32_t use, const float *x, float *y,
             float *scratch) {
    const uint32_t groups = s->groups, inputs = s->channels / groups, outputs = s->outputs / groups;
    const uint32_t area = s->out_height * s->out_width, kh = s->kernel[0], kw = s->kernel[1];
    float *patch = scratch + dt_scratch(w, groups > 1 ? DT_ROWS : use), *made = patch + w->cols;
    const factor f = prepared(w, groups > 1 ? DT_ROWS : use, scratch);
    for (uint32_t item = 0; item < items; item++, x += (size_t)s->channels * s->height * s->width, y += (size_t)s->outputs * area) {
        if (groups == 1) {
            for (uint32_t i = 0, at = 0; i < s->out_height; i++)
                for (uint32_t j = 0; j < s->out_width; j++, at++) {
                    float *to = patch;
                    for (uint32_t c = 0; c < inputs; c++)
                        for (uint32_t a = 0; a < kh; a++) {
                            const uint32_t row = place(s, 0, i, a, s->height);
                            const float *from = x + ((size_t)c * s->height + row) * s->width;
                            for (uint32_t b = 0; b < kw; b++) {
                                const uint32_t col = place(s, 1, j, b, s->width);
                                *to++ = row == s->height || col == s->width ? 0.0f : from[col];
                            }
                        }
                    product(&f, patch, made);
                    scale_and_add(made, s->outputs, w->scale, bias);
                    for (uint32_t o = 0; o < s->outputs; o++) y[(size_t)o * area + at] = made[o];
                }
            continue;
        }
        for (uint32_t o = 0; o < s->outputs; o++) {
            row_of(&f, o, patch);
            scale_and_add(patch, w->cols, w->scale, NULL);
            const float *first = x + (size_t)(o / outputs) * inputs * s->height * s->width;
            for (uint32_t i = 0; i < s->out_height; i++)
                for (uint32_t j = 0; j < s->out_width; j++) {
                    float sum = bias ? bias[o] : 0.0f;
                    const float *value = patch;
                    for (uint32_t c = 0; c < inputs; c++)
                        for (uint32_t a = 0; a < kh; a++, value += kw) {
                            const uint32_t row = place(s, 0, i, a, s->height);
                            if (row == s->height) continue;
                            const float *from = first + ((size_t)c * s->height + row) * s->width;
                            for (uint32_t b = 0; b < kw; b++) {
                                const uint32_t col = place(s, 1, j, b, s->width);
                                if (col < s->width) sum += value[b] * from[col];
                            }
                        }
                    y[((size_t)o * s->out_height + i) * s->out_width + j] = sum;
                }
        }
    }
}

/* ---- functions ---- */

typedef union {
    vec f;
    uvec i;
} both;

static inline vec select(uvec mask, vec yes, vec no) { /* by the mask's bits: all or none */
    both a, b;
    a.f = yes, b.f = no;
    a.i = (mask & a.i) | (~mask & b.i);
    return a.f;
}
#if DT_LANES == 1
#define LESS(a, b) (-(uvec)((a) < (b)))
#else
#define LESS(a, b) ((uvec)((a) < (b)))
#endif

static inline vec least_of(vec a, vec b) { return select(LESS(b, a), b, a); } /* NaN in a stays */
static inline vec largest_of(vec a, vec b) { return select(LESS(a, b), b, a); }

/* Within 2e-7 of the value, relative; below -87 as at -87, above 88 as at 88. */
static inline vec exponential(vec x) {
    both shifted, power;
    x = least_of(largest_of(x, EVERY(-87.0f)), EVERY(88.0f));
    shifted.f = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the last bits are the integer */
    const vec whole = shifted.f - 12582912.0f, r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f, square = r * r;
    vec sum = (r * (1.0f / 5040) + 1.0f / 720) * square + (r * (1.0f / 120) + 1.0f / 24);
    sum = sum * square + (r * (1.0f / 6) + 0.5f);
    sum = sum * square + (r + 1.0f);
    power.i = (shifted.i << 23) + 0x3f800000;
    return sum * power.f;
}

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

/* A quotient of polynomials, within 3e-7, relative (csrc/gates.h). */
static inline vec tangent(vec x) {
    x = least_of(largest_of(x, EVERY(-9.0f)), EVERY(9.0f));
    const vec square = x * x;
    vec above = square * 1.335489182e-8f + 2.060926887e-5f;
    above = above * square + 3.495600391e-3f;
    above = above * square + 1.338103629e-1f;
    above = above * square + 1.0f;
    vec below = square * 7.776658503e-7f + 3.285654212e-4f;
    below = below * square + 2.587702986e-2f;
    below = below * square + 4.671435191e-1f;
    below = below * square + 1.0f;
    return least_of(largest_of(x * above / below, EVERY(-1.0f)), EVERY(1.0f));
}

/* Natural logarithm: x = 2^e (1 + r) with sqrt(1/2) <= 1 + r < sqrt(2), then the series of 2 artanh(r / (2 + r)). */
static float logarithm(float x) {
    union {
        float f;
        uint32_t i;
    } bits;
    if (!(x > 0)) return x < 0 || x != x ? (x - x) / (x - x) : -1.0f / (x * x);
    int32_t e = 0;
    if (x < 1.17549435e-38f) x *= 16777216.0f, e = -24;
    bits.f = x;
    if (bits.i >= 0x7f800000u) return x;
    e += (int32_t)(bits.i >> 23) - 127;
    bits.i = (bits.i & 0x7fffffu) | 0x3f800000u;
    if (bits.f > 1.41421356f) bits.f *= 0.5f, e++;
    const float r = bits.f - 1.0f, s = r / (2.0f + r), q = s * s;
    const float series = s * (2.0f + q * (0.66666667f + q * (0.4f + q * (0.28571429f + q * 0.22222222f))));
    return series + (float)e * -2.12194440e-4f + (float)e * 0.693359375f;
}

/* erf by Abramowitz and Stegun, 7.1.26: within 1.5e-7. */
static inline vec error_function(vec x) {
    const vec size = select(LESS(x, EVERY(0.0f)), -x, x), t = 1.0f / (1.0f + 0.3275911f * size);
    const vec sum = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const vec value = 1.0f - sum * exponential(-size * size);
    return select(LESS(x, EVERY(0.0f)), -value, value);
}

#define HAS(one) ((DT_MAPS >> DT_##one & 1) && function == DT_##one)
static inline vec function_of(uint32_t function, vec x, float a, float b) {
    const vec zero = ZERO;
    const uvec negative = LESS(x, zero);
    if (HAS(RELU)) return select(negative, zero, x);
    if (HAS(SIGMOID)) return sigmoid(x);
    if (HAS(TANH)) return tangent(x);
    if (HAS(SILU)) return x * sigmoid(x);
    if (HAS(GELU)) return 0.5f * x * (1.0f + error_function(x * 0.707106781f));
    if (HAS(GELU_TANH)) return 0.5f * x * (1.0f + tangent(0.797884561f * (x + 0.044715f * x * x * x)));
    if (HAS(EXP)) return exponential(x);
    if (HAS(ABS)) return select(negative, -x, x);
    if (HAS(SQUARE)) return x * x;
    if (HAS(RECIPROCAL)) return 1.0f / x;
    if (HAS(LINE)) return x * a + b;
    if (HAS(CLAMP)) return least_of(largest_of(x, EVERY(a)), EVERY(b));
    if (HAS(LEAKY)) return select(negative, x * a, x);
    if (HAS(ELU)) return select(negative, a * (exponential(x) - 1.0f), x);
    if (HAS(HARDSIGMOID)) return least_of(largest_of(x * (1.0f / 6) + 0.5f, zero), EVERY(1.0f));
    if (HAS(HARDSWISH)) return x * least_of(largest_of(x * (1.0f / 6) + 0.5f, zero), EVERY(1.0f));
    return x;
}

void dt_map(uint32_t function, uint32_t count, float a, float b, const float *x, float *y) {
    uint32_t i = 0;
    if (HAS(LOG) || HAS(SQRT) || HAS(SOFTPLUS)) {
        for (; i < count; i++) {
            vec e = EVERY(-(x[i] < 0 ? -x[i] : x[i]));
            e = exponential(e);
            y[i] = HAS(LOG)    ? logarithm(x[i])
                   : HAS(SQRT) ? __builtin_sqrtf(x[i])
                               : (x[i] > 0 ? x[i] : 0.0f) + logarithm(1.0f + *(const float *)&e);
        }
        return;
    }
    for (; i + DT_LANES <= count; i += DT_LANES) STORE(y + i, function_of(function, LOAD(x + i), a, b));
    if (i < count) {
        vec rest = ZERO;
        memcpy(&rest, x + i, (count - i) * sizeof *x);
        rest = function_of(function, rest, a, b);
        memcpy(y + i, &rest, (count - i) * sizeof *y);
    }
}

static inline float pair_of(uint32_t function, float a, float b) {
    switch (function) {
        case DT_ADD: return a + b;
        case DT_SUBTRACT: return a - b;
        case DT_MULTIPLY: return a * b;
        case DT_DIVIDE: return a / b;
        case DT_LARGER: return a < b ? b : a;
        default: return b < a ? b : a;
    }
}

void dt_pair(uint32_t function, const uint32_t *size, const uint32_t *a_stride, const uint32_t *b_stride, const float *a,
             const float *b, float *y) {
    for (size_t i = 0; i < size[0]; i++)
        for (size_t j = 0; j < size[1]; j++)
            for (size_t k = 0; k < size[2]; k++) {
                const float *from = a + i * a_stride[0] + j * a_stride[1] + k * a_stride[2];
                const float *with = b + i * b_stride[0] + j * b_stride[1] + k * b_stride[2];
                for (size_t l = 0; l < size[3]; l++) *y++ = pair_of(function, from[l * a_stride[3]], with[l * b_stride[3]]);
            }
}

void dt_affine(uint32_t outer, uint32_t channels, uint32_t inner, const float *scale, const float *shift, const float *x, float *y) {
    for (uint32_t o = 0; o < outer; o++)
        for (uint32_t c = 0; c < channels; c++)
            for (uint32_t i = 0; i < inner; i++, x++, y++) *y = *x * scale[c] + shift[c];
}

void dt_softmax(uint32_t logarithmic, uint32_t outer, uint32_t count, uint32_t inner, const float *x, float *y) {
    for (uint32_t o = 0; o < outer; o++, x += (size_t)count * inner, y += (size_t)count * inner)
        for (uint32_t i = 0; i < inner; i++) {
            float most = x[i], sum = 0;
            for (uint32_t k = 1; k < count; k++)
                if (x[i + (size_t)k * inner] > most) most = x[i + (size_t)k * inner];
            for (uint32_t k = 0; k < count; k += DT_LANES) {
                float some[DT_LANES] = {0};
                const uint32_t known = smaller(DT_LANES, count - k);
                for (uint32_t l = 0; l < known; l++) some[l] = x[i + (size_t)(k + l) * inner] - most;
                const vec value = exponential(LOAD(some));
                const float *one = (const float *)&value;
                for (uint32_t l = 0; l < known; l++) {
                    sum += one[l];
                    y[i + (size_t)(k + l) * inner] = logarithmic ? some[l] : one[l];
                }
            }
            const float less = logarithmic ? logarithm(sum) : 0.0f, factor = logarithmic ? 1.0f : 1.0f / sum;
            for (uint32_t k = 0; k < count; k++) y[i + (size_t)k * inner] = y[i + (size_t)k * inner] * factor - less;
        }
}

void dt_normalize(uint32_t outer, uint32_t count, float epsilon, const float *weight, const float *bias, const float *x, float *y) {
    for (uint32_t o = 0; o < outer; o++, x += count, y += count) {
        float sum[8] = {0}, square[8] = {0}, mean = 0, spread = 0;
        for (uint32_t i = 0; i < count; i++) sum[i % 8] += x[i];
        for (int k = 0; k < 8; k++) mean += sum[k];
        mean /= (float)count;
        for (uint32_t i = 0; i < count; i++) square[i % 8] += (x[i] - mean) * (x[i] - mean);
        for (int k = 0; k < 8; k++) spread += square[k];
        const float factor = 1.0f / __builtin_sqrtf(spread / (float)count + epsilon);
        for (uint32_t i = 0; i < count; i++)
            y[i] = (x[i] - mean) * factor * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
    }
}

void dt_copy(const uint32_t *size, const uint32_t *from, const uint32_t *to, const float *x, float *y) {
    for (size_t a = 0; a < size[0]; a++)
        for (size_t b = 0; b < size[1]; b++)
            for (size_t c = 0; c < size[2]; c++)
                for (size_t d = 0; d < size[3]; d++)
                    for (size_t e = 0; e < size[4]; e++) {
                        const float *in = x + a * from[0] + b * from[1] + c * from[2] + d * from[3] + e * from[4];
                        float *out = y + a * to[0] + b * to[1] + c * to[2] + d * to[3] + e * to[4];
                        for (size_t f = 0; f < size[5]; f++) out[f * to[5]] = in[f * from[5]];
                    }
}

void dt_fill(uint32_t count, float value, float *y) {
    for (uint32_t i = 0; i < count; i++) y[i] = value;
}

void dt_pool(const dt_window *s, uint32_t largest, uint32_t whole, const float *x, float *y) {
    for (uint32_t c = 0; c < s->channels; c++, x += (size_t)s->height * s->width)
        for (uint32_t i = 0; i < s->out_height; i++)
            for (uint32_t j = 0; j < s->out_width; j++) {
                float most = -3.40282347e38f, sum = 0;
                uint32_t known = 0, counted = 0;
                for (uint32_t a = 0; a < s->kernel[0]; a++)
                    for (uint32_t b = 0; b < s->kernel[1]; b++) {
                        const uint32_t row = place(s, 0, i, a, s->height), col = place(s, 1, j, b, s->width);
                        /* a place beyond the padded input, as rounding up makes it, never counts */
                        counted += i * s->stride[0] + a < s->height + 2 * s->pad[0] && j * s->stride[1] + b < s->width + 2 * s->pad[1];
                        if (row == s->height || col == s->width) continue;
                        const float value = x[(size_t)row * s->width + col];
                        if (!(value <= most)) most = value;
                        sum += value, known++;
                    }
                const uint32_t by = whole ? counted : known;
                *y++ = largest ? most : sum / (float)(by ? by : 1);
            }
}

void dt_reduce(uint32_t function, uint32_t outer, uint32_t count, uint32_t inner, const float *x, float *y) {
    for (uint32_t o = 0; o < outer; o++, x += (size_t)count * inner, y += inner) {
        memmove(y, x, inner * sizeof *y);
        for (uint32_t k = 1; k < count; k++) {
            const float *row = x + (size_t)k * inner;
            for (uint32_t i = 0; i < inner; i++)
                y[i] = function == DT_MAXIMUM   ? (y[i] < row[i] ? row[i] : y[i])
                       : function == DT_MINIMUM ? (row[i] < y[i] ? row[i] : y[i])
                                                : y[i] + row[i];
        }
        if (function == DT_MEAN)
            for (uint32_t i = 0; i < inner; i++) y[i] /= (float)count;
    }
}

void dt_matmul(const uint32_t *size, const uint32_t *a_stride, const uint32_t *b_stride, float scale, const float *a, const float *b,
               float *y) {
    for (size_t n = 0; n < size[0]; n++)
        for (size_t i = 0; i < size[1]; i++, y += size[3]) {
            const float *row = a + n * a_stride[0] + i * a_stride[1], *with = b + n * b_stride[0];
            for (size_t j = 0; j < size[3]; j++) {
                if (a_stride[2] == 1 && b_stride[1] == 1)
                    y[j] = dot(row, with + j * b_stride[2], size[2]);
                else {
                    float sum = 0;
                    for (size_t k = 0; k < size[2]; k++) sum += row[k * a_stride[2]] * with[k * b_stride[1] + j * b_stride[2]];
                    y[j] = sum;
                }
                y[j] *= scale;
            }
        }
}

/* ---- recurrent layers ---- */

/* One step: a = gates of the input, b = gates of the state, both with their biases. */
static void step(uint32_t cell, uint32_t hidden, const float *a, const float *b, float *h, float *c) {
    for (uint32_t k = 0; k < hidden; k += DT_LANES) {
        vec gate[4] = {ZERO}, other[4] = {ZERO}, state = ZERO, memory = ZERO;
        const uint32_t count = smaller(DT_LANES, hidden - k), gates = cell == DT_LSTM ? 4 : cell == DT_GRU ? 3 : 1;
        if (count == DT_LANES) {
            for (uint32_t g = 0; g < gates; g++) gate[g] = LOAD(a + g * hidden + k), other[g] = LOAD(b + g * hidden + k);
            state = LOAD(h + k);
            if (c) memory = LOAD(c + k);
        } else {
            for (uint32_t g = 0; g < gates; g++) {
                memcpy(&gate[g], a + g * hidden + k, count * sizeof *a);
                memcpy(&other[g], b + g * hidden + k, count * sizeof *b);
            }
            memcpy(&state, h + k, count * sizeof *h);
            if (c) memcpy(&memory, c + k, count * sizeof *c);
        }
        if (cell == DT_LSTM) {
            memory = sigmoid(gate[1] + other[1]) * memory + sigmoid(gate[0] + other[0]) * tangent(gate[2] + other[2]);
            state = sigmoid(gate[3] + other[3]) * tangent(memory);
        } else if (cell == DT_GRU) {
            const vec reset = sigmoid(gate[0] + other[0]), update = sigmoid(gate[1] + other[1]);
            const vec fresh = tangent(gate[2] + reset * other[2]);
            state = fresh + update * (state - fresh);
        } else
            state = cell == DT_TANH_CELL ? tangent(gate[0] + other[0]) : largest_of(gate[0] + other[0], state * 0.0f);
        memcpy(h + k, &state, count * sizeof *h);
        if (c) memcpy(c + k, &memory, count * sizeof *c);
    }
}

void dt_recurrent(uint32_t cell, const dt_matrix *input, const dt_matrix *state, const float *input_bias, const float *state_bias,
                  uint32_t steps, uint32_t reverse, uint32_t use, const float *x, uint32_t x_stride, float *y, uint32_t y_stride,
                  float *h, float *c, float *scratch) {
    const uint32_t width = TURNED(state) ? state->cols : state->rows, hidden = TURNED(state) ? state->rows : state->cols;
    const factor of_input = prepared(input, use, scratch);
    scratch += dt_scratch(input, use);
    const factor of_state = prepared(state, use, scratch);
    float *a = scratch + dt_scratch(state, use), *b = a + width;
    for (uint32_t t = 0; t < steps; t++) {
        const uint32_t i = reverse ? steps - 1 - t : t;
        product(&of_input, x + (size_t)i * x_stride, a);
        scale_and_add(a, width, input->scale, input_bias);
        product(&of_state, h, b);
        scale_and_add(b, width, state->scale, state_bias);
        step(cell, hidden, a, b, h, cell == DT_LSTM ? c : NULL);
        memmove(y + (size_t)i * y_stride, h, hidden * sizeof *h);
    }
}
