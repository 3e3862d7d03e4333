/* Flat files: a network that is not compiled in (docs/runtime.md describes every word). A file may come from anywhere: dt_open
 * checks each call's reach, so that dt_run reads and writes nothing outside the file, the inputs, the outputs and the arena. */
#include "dt.h"

#if __STDC_HOSTED__
#include <string.h>
#else /* as every compiler expects them */
void *memcpy(void *to, const void *from, size_t count);
void *memmove(void *to, const void *from, size_t count);
void *memset(void *to, int value, size_t count);
#endif

enum {
    MAGIC = 0x316d7464, /* "dtm1" */
    VERSION = 1,
    HEADER = 16, /* words */
    ARRAY = 12,
    CORE = 6,
    MATRIX = 18,
    WINDOW = sizeof(dt_window) / 4
};
#define NONE 0xffffffffu
#define LIMIT ((uint64_t)1 << 28) /* of any number of floats or entries */

/* Words of the header. */
enum { W_MAGIC, W_VERSION, W_BYTES, W_ARENA, W_KEPT, W_INPUTS, W_OUTPUTS, W_ARRAYS, W_CORES, W_MATRICES, W_CALLS, W_DATA };
enum { ARENA, INPUT, OUTPUT, CONSTANT }; /* spaces of a place */
enum {
    LINEAR, EMBEDDING, CONV, RECURRENT, MAP, PAIR, AFFINE, SOFTMAX, NORMALIZE, COPY, FILL, POOL, REDUCE, MATMUL, OPERATORS
};

/* The words of a call after its number: m matrix, v vector or none, p place (two words), u integer, f float, w a window, and
 * 3, 4, 6: so many integers. A vector is a place, or NONE twice. */
static const char *const arguments[OPERATORS] = {
    "mvuuppp", "muuppp", "wmvuuppp", "ummvvuuupupuppp", "uuffpp", "u444ppp", "uuuvvpp", "uuuupp", "uufvvpp", "666pp", "ufp", "wuupp",
    "uuuupp", "433fppp",
};

#ifndef DT_OPERATORS /* those that a file may have, as a mask: what it does not use need not be compiled */
#define DT_OPERATORS 0xffffffffu
#endif
#define IF(one) case one: if (!(DT_OPERATORS >> one & 1)) break;

static const uint32_t *words(const dt_model *m) { return (const uint32_t *)(const void *)m->file; }
static const uint32_t *inputs_of(const dt_model *m) { return words(m) + HEADER; }
static const uint32_t *outputs_of(const dt_model *m) { return inputs_of(m) + words(m)[W_INPUTS]; }
static const uint32_t *arrays_of(const dt_model *m) { return outputs_of(m) + words(m)[W_OUTPUTS]; }
static const uint32_t *cores_of(const dt_model *m) { return arrays_of(m) + (size_t)ARRAY * words(m)[W_ARRAYS]; }
static const uint32_t *matrices_of(const dt_model *m) { return cores_of(m) + (size_t)CORE * words(m)[W_CORES]; }
static const uint32_t *calls_of(const dt_model *m) { return matrices_of(m) + (size_t)MATRIX * words(m)[W_MATRICES]; }
static const float *data_of(const dt_model *m) { return (const float *)(const void *)(m->file + words(m)[W_DATA]); }
static uint64_t data_floats(const dt_model *m) { return (m->length - 4 - words(m)[W_DATA]) / 4; }

static uint32_t length_of(uint32_t operator_) {
    uint32_t length = 1;
    for (const char *a = arguments[operator_]; *a; a++)
        length += *a == 'p' || *a == 'v' ? 2 : *a == 'w' ? WINDOW : *a >= '3' && *a <= '6' ? (uint32_t)(*a - '0') : 1;
    return length;
}

/* ---- from words to structures ---- */

static const float *floats_at(const dt_model *m, uint32_t offset) { return offset == NONE ? NULL : data_of(m) + offset; }

static dt_array array_at(const dt_model *m, uint32_t index, uint32_t first) {
    const uint32_t *w = arrays_of(m) + (size_t)ARRAY * index;
    dt_array a;
    a.data = floats_at(m, w[0]), a.step = floats_at(m, w[1]), a.least = floats_at(m, w[2]), a.table = floats_at(m, w[3]);
    a.fix = floats_at(m, w[4]), a.fix_at = (const uint32_t *)(const void *)floats_at(m, w[5]), a.fixes = w[6];
    a.zero = (int32_t)w[7], a.row = w[8], a.bits = w[9], a.first = first;
    return a;
}

static float float_at(const uint32_t *w) {
    float value;
    memcpy(&value, w, sizeof value);
    return value;
}

/* `cores` has room for DT_CORES. */
static dt_matrix matrix_at(const dt_model *m, uint32_t index, dt_core *cores) {
    const uint32_t *w = matrices_of(m) + (size_t)MATRIX * index;
    dt_matrix x;
    memset(&x, 0, sizeof x);
    x.kind = w[0], x.rows = w[1], x.cols = w[2], x.turned = w[3], x.scale = float_at(w + 4);
    if (w[5] != NONE) x.a = array_at(m, w[5], w[6]);
    if (w[7] != NONE) x.b = array_at(m, w[7], w[8]);
    x.n = w[9], x.rank = w[10], x.offset = w[11], x.m = w[12];
    x.cores = cores, x.count = w[14];
    for (uint32_t k = 0; k < x.count; k++) {
        const uint32_t *c = cores_of(m) + (size_t)CORE * (w[13] + k);
        cores[k].before = c[0], cores[k].rows = c[1], cores[k].cols = c[2], cores[k].after = c[3];
        cores[k].values = array_at(m, c[4], c[5]);
    }
    x.gaps = (const uint8_t *)(const void *)floats_at(m, w[15]);
    x.seed = w[16] | (uint64_t)w[17] << 32;
    return x;
}

/* ---- checks ---- */

#ifndef DT_SANDBOX /* where memory is a sandbox, as in WebAssembly, a checksum is enough */

static uint64_t times(uint64_t a, uint64_t b) { return b && a > LIMIT / b ? LIMIT + 1 : a * b; }

static int has_floats(const dt_model *m, uint32_t offset, uint64_t count) {
    return offset != NONE && offset + count <= data_floats(m) && count <= LIMIT;
}

static int array_is_fine(const dt_model *m, const uint32_t *w) {
    const uint32_t bits = w[9], row = w[8], count = w[10], fixes = w[6];
    const int32_t zero = (int32_t)w[7];
    const uint32_t each = bits == DT_BASE3 ? 5 : bits == DT_BASE6 ? 3 : 0; /* digits in a byte */
    if (!(each || (bits >= 1 && (bits <= 8 || bits == 16 || bits == 32))) || count > LIMIT) return 0;
    if (zero < -(1 << 17) || zero > 1 << 17) return 0;
    if (!has_floats(m, w[0], each ? ((uint64_t)count + 4 * each - 1) / (4 * each) : ((uint64_t)count * bits + 31) / 32)) return 0;
    if (bits == 32) return 1;
    const uint64_t rows = row ? ((uint64_t)count + row - 1) / row : 1;
    if (w[3] != NONE) {
        if (bits > 8 || !has_floats(m, w[3], times(rows, 1u << bits))) return 0;
    } else if (!has_floats(m, w[1], rows))
        return 0;
    if (w[2] != NONE && !has_floats(m, w[2], rows)) return 0;
    if (!fixes) return 1;
    if (!has_floats(m, w[4], fixes) || !has_floats(m, w[5], fixes)) return 0;
    const uint32_t *at = (const uint32_t *)(const void *)floats_at(m, w[5]);
    for (uint32_t k = 0; k < fixes; k++)
        if (at[k] >= count || (k && at[k] <= at[k - 1])) return 0;
    return 1;
}

static int holds(const dt_model *m, uint32_t index, uint32_t first, uint64_t entries) {
    return index < words(m)[W_ARRAYS] && first + entries <= (arrays_of(m) + (size_t)ARRAY * index)[10] && entries <= LIMIT;
}

static int matrix_is_fine(const dt_model *m, const uint32_t *w) {
    const uint32_t kind = w[0], rows = w[1], cols = w[2], n = w[9], rank = w[10], offset = w[11], count = w[14];
    if (!rows || !cols || rows > LIMIT || cols > LIMIT || w[3] > 1 || count > DT_CORES) return 0;
    if ((w[5] != NONE && !holds(m, w[5], w[6], 0)) || (w[7] != NONE && !holds(m, w[7], w[8], 0))) return 0;
    if (count && (uint64_t)w[13] + count > words(m)[W_CORES]) return 0;
    const uint64_t area = times(rows, cols);
    if (kind == DT_DENSE) return holds(m, w[5], w[6], area);
    if (kind == DT_WINDOWS) {
        if (!n || !rank || n > LIMIT || rank > LIMIT || offset >= n || area > LIMIT) return 0;
        const uint64_t terms = times(((uint64_t)cols + n - 1 + n - 1) / n, rank), depth = ((uint64_t)rows + n - 1) / n;
        if (times(n, times(terms + 16, depth + 16)) > LIMIT || (offset + area - 1) / n >= w[12]) return 0;
        return holds(m, w[5], w[6], times(w[12], rank)) && holds(m, w[7], w[8], times(rank, n));
    }
    if (kind == DT_TRAIN) {
        uint64_t all = 1, high = 1, wide = 1, after = 1;
        if (!count) return 0;
        for (uint32_t k = 0; k < count; k++) {
            const uint32_t *c = cores_of(m) + (size_t)CORE * (w[13] + k);
            if (c[0] != after || !c[1] || !c[2] || !c[3]) return 0;
            after = c[3], high = times(high, c[1]), wide = times(wide, c[2]);
            all = times(all, times(c[1], times(c[2], c[3]))); /* more than any state of the product */
            if (all > LIMIT || !holds(m, c[4], c[5], times(c[0], times(c[1], times(c[2], c[3]))))) return 0;
        }
        return after == 1 && high >= rows && wide >= cols;
    }
    if (kind == DT_SPARSE) return holds(m, w[5], w[6], w[12]) && has_floats(m, w[15], ((uint64_t)n + 3) / 4);
    return kind == DT_HASHED && n && area <= LIMIT && holds(m, w[5], w[6], n);
}

/* Whether a call may read, or write, so many floats from a place on. */
static int reaches(const dt_model *m, const uint32_t *place, uint64_t floats, int writes) {
    const uint32_t space = place[0] & 3, index = place[0] >> 2;
    const uint32_t many[] = {1, words(m)[W_INPUTS], words(m)[W_OUTPUTS], 1};
    if (index >= many[space] || (writes && (space == INPUT || space == CONSTANT))) return 0; /* even of no floats */
    const uint64_t size = space == ARENA    ? words(m)[W_ARENA]
                          : space == INPUT  ? inputs_of(m)[index]
                          : space == OUTPUT ? outputs_of(m)[index]
                                            : data_floats(m);
    return floats <= LIMIT && place[1] + floats <= size;
}

static int vector_is_fine(const dt_model *m, const uint32_t *place, uint64_t floats) {
    return (place[0] == NONE && place[1] == NONE) || reaches(m, place, floats, 0);
}

static int matrix_exists(const dt_model *m, uint32_t index) { return index < words(m)[W_MATRICES]; }

/* More than LIMIT for no entries: loops that do nothing could take for ever. */
static uint64_t volume(const uint32_t *size, int count) {
    uint64_t all = 1;
    for (int i = 0; i < count; i++) all = size[i] ? times(all, size[i]) : LIMIT + 1;
    return all;
}

/* Floats between the first and the last entry, both included; more than LIMIT for no entries. */
static uint64_t span(const uint32_t *size, const uint32_t *stride, int count) {
    uint64_t last = 0;
    for (int i = 0; i < count; i++) {
        if (!size[i]) return LIMIT + 1;
        last += times(size[i] - 1, stride[i]);
    }
    return last + 1;
}

static int window_is_fine(const dt_window *s) {
    const uint32_t *w = (const uint32_t *)(const void *)s;
    for (int i = 0; i < WINDOW; i++)
        if (w[i] > 1 << 20 || (!w[i] && i != 10 && i != 11)) return 0; /* all but the padding are at least 1 */
    return !(s->channels % s->groups) && !(s->outputs % s->groups);
}

static int call_is_fine(const dt_model *m, const uint32_t *w) {
    const uint32_t *a = w + 1;
    dt_core cores[2][DT_CORES];
    dt_matrix x;
    switch (w[0]) {
        IF(LINEAR)
            if (!matrix_exists(m, a[0]) || a[4] > DT_PACKED) return 0;
            x = matrix_at(m, a[0], cores[0]);
            return vector_is_fine(m, a + 1, x.turned ? x.cols : x.rows) && reaches(m, a + 5, times(a[3], x.turned ? x.rows : x.cols), 0) &&
                   reaches(m, a + 7, times(a[3], x.turned ? x.cols : x.rows), 1) && reaches(m, a + 9, dt_scratch(&x, a[4]), 1);
        IF(EMBEDDING)
            if (!matrix_exists(m, a[0])) return 0;
            x = matrix_at(m, a[0], cores[0]);
            return !x.turned && reaches(m, a + 3, a[1], 0) && reaches(m, a + 5, times(a[1], x.cols), 1) &&
                   reaches(m, a + 7, dt_scratch(&x, DT_ROWS), 1);
        IF(CONV) {
            const dt_window *s = (const dt_window *)(const void *)a;
            a += WINDOW;
            if (!window_is_fine(s) || !matrix_exists(m, a[0]) || a[4] > DT_ROWS) return 0;
            x = matrix_at(m, a[0], cores[0]);
            const uint64_t cols = times(s->channels / s->groups, times(s->kernel[0], s->kernel[1]));
            const uint64_t in = times(s->channels, times(s->height, s->width));
            const uint64_t out = times(s->outputs, times(s->out_height, s->out_width));
            if (x.turned || x.rows != s->outputs || x.cols != cols || (s->groups == 1 && a[4] == DT_ROWS)) return 0;
            return vector_is_fine(m, a + 1, s->outputs) && reaches(m, a + 5, times(a[3], in), 0) &&
                   reaches(m, a + 7, times(a[3], out), 1) &&
                   reaches(m, a + 9, dt_scratch(&x, s->groups > 1 ? DT_ROWS : a[4]) + (uint64_t)x.cols + x.rows, 1);
        }
        IF(RECURRENT) {
            if (a[0] > DT_LSTM || !matrix_exists(m, a[1]) || !matrix_exists(m, a[2]) || !a[7] || a[8] > 1 || a[9] > DT_PACKED) return 0;
            x = matrix_at(m, a[1], cores[0]);
            const dt_matrix state = matrix_at(m, a[2], cores[1]);
            const uint32_t in = x.turned ? x.rows : x.cols, width = x.turned ? x.cols : x.rows;
            const uint32_t hidden = state.turned ? state.rows : state.cols, gates = a[0] == DT_LSTM ? 4 : a[0] == DT_GRU ? 3 : 1;
            if ((state.turned ? state.cols : state.rows) != width || times(gates, hidden) != width) return 0;
            return vector_is_fine(m, a + 3, width) && vector_is_fine(m, a + 5, width) &&
                   reaches(m, a + 10, times(a[7] - 1, a[12]) + in, 0) && reaches(m, a + 13, times(a[7] - 1, a[15]) + hidden, 1) &&
                   reaches(m, a + 16, hidden, 1) && (a[0] != DT_LSTM || reaches(m, a + 18, hidden, 1)) &&
                   reaches(m, a + 20, (uint64_t)dt_scratch(&x, a[9]) + dt_scratch(&state, a[9]) + 2 * (uint64_t)width, 1);
        }
        IF(MAP) return a[0] < DT_FUNCTIONS && reaches(m, a + 4, a[1], 0) && reaches(m, a + 6, a[1], 1);
        IF(PAIR)
            return a[0] < DT_PAIRS && reaches(m, a + 13, span(a + 1, a + 5, 4), 0) && reaches(m, a + 15, span(a + 1, a + 9, 4), 0) &&
                   reaches(m, a + 17, volume(a + 1, 4), 1);
        IF(AFFINE)
            return vector_is_fine(m, a + 3, a[1]) && a[3] != NONE && vector_is_fine(m, a + 5, a[1]) && a[5] != NONE &&
                   reaches(m, a + 7, volume(a, 3), 0) && reaches(m, a + 9, volume(a, 3), 1);
        IF(SOFTMAX) return a[0] <= 1 && a[2] && reaches(m, a + 4, volume(a + 1, 3), 0) && reaches(m, a + 6, volume(a + 1, 3), 1);
        IF(NORMALIZE)
            return a[1] && vector_is_fine(m, a + 3, a[1]) && vector_is_fine(m, a + 5, a[1]) && reaches(m, a + 7, volume(a, 2), 0) &&
                   reaches(m, a + 9, volume(a, 2), 1);
        IF(COPY) return reaches(m, a + 18, span(a, a + 6, 6), 0) && reaches(m, a + 20, span(a, a + 12, 6), 1);
        IF(FILL) return reaches(m, a + 2, a[0], 1);
        IF(POOL) {
            const dt_window *s = (const dt_window *)(const void *)a;
            a += WINDOW;
            return window_is_fine(s) && s->outputs == s->channels &&
                   reaches(m, a + 2, times(s->channels, times(s->height, s->width)), 0) &&
                   reaches(m, a + 4, times(s->channels, times(s->out_height, s->out_width)), 1);
        }
        IF(REDUCE)
            return a[0] < DT_REDUCTIONS && a[2] && reaches(m, a + 4, volume(a + 1, 3), 0) && reaches(m, a + 6, times(a[1], a[3]), 1);
        IF(MATMUL) {
            const uint32_t left[3] = {a[0], a[1], a[2]}, right[3] = {a[0], a[2], a[3]};
            return reaches(m, a + 11, span(left, a + 4, 3), 0) && reaches(m, a + 13, span(right, a + 7, 3), 0) &&
                   reaches(m, a + 15, times(a[0], times(a[1], a[3])), 1);
        }
        default: break;
    }
    return 0;
}

#endif

static uint32_t crc32_of(const uint8_t *p, size_t count) {
    static const uint32_t table[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
                                       0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    uint32_t c = 0xffffffffu;
    for (; count--; p++) {
        c = table[(c ^ *p) & 15] ^ c >> 4;
        c = table[(c ^ *p >> 4) & 15] ^ c >> 4;
    }
    return ~c;
}

int dt_open(dt_model *model, const void *file, size_t length) {
    dt_model m;
    if ((uintptr_t)file & 15) return DT_E_ALIGNMENT;
    if (length < 4 * HEADER + 4 || length % 4 || length > 4 * LIMIT) return DT_E_FORMAT;
    m.file = file, m.length = (uint32_t)length;
    const uint32_t *w = words(&m);
    if (w[W_MAGIC] != MAGIC) return DT_E_FORMAT;
    if (w[W_VERSION] != VERSION) return DT_E_VERSION;
    if (w[W_BYTES] != length) return DT_E_FORMAT;
    if (w[length / 4 - 1] != crc32_of(file, length - 4)) return DT_E_CHECKSUM;
    const uint64_t tables = HEADER + (uint64_t)w[W_INPUTS] + w[W_OUTPUTS] + ARRAY * (uint64_t)w[W_ARRAYS] + CORE * (uint64_t)w[W_CORES] +
                            MATRIX * (uint64_t)w[W_MATRICES] + w[W_CALLS];
    if (w[W_DATA] % 16 || w[W_DATA] > length - 4 || 4 * tables > w[W_DATA]) return DT_E_FORMAT;
    if (w[W_ARENA] > LIMIT || w[W_KEPT] > w[W_ARENA]) return DT_E_FORMAT;
#ifndef DT_SANDBOX
    for (uint32_t i = 0; i < w[W_INPUTS] + w[W_OUTPUTS]; i++)
        if (inputs_of(&m)[i] > LIMIT) return DT_E_FORMAT;
    for (uint32_t i = 0; i < w[W_ARRAYS]; i++)
        if (!array_is_fine(&m, arrays_of(&m) + (size_t)ARRAY * i)) return DT_E_FORMAT;
    for (uint32_t i = 0; i < w[W_MATRICES]; i++)
        if (!matrix_is_fine(&m, matrices_of(&m) + (size_t)MATRIX * i)) return DT_E_FORMAT;
    const uint32_t *call = calls_of(&m), *end = call + w[W_CALLS];
    while (call < end) {
        if (*call >= OPERATORS || !(DT_OPERATORS >> *call & 1) || length_of(*call) > (size_t)(end - call) || !call_is_fine(&m, call)) return DT_E_FORMAT;
        call += length_of(*call);
    }
#endif
    *model = m;
    return DT_OK;
}

/* ---- running ---- */

size_t dt_arena_bytes(const dt_model *m) { return (size_t)words(m)[W_ARENA] * sizeof(float); }
uint32_t dt_inputs(const dt_model *m) { return words(m)[W_INPUTS]; }
uint32_t dt_outputs(const dt_model *m) { return words(m)[W_OUTPUTS]; }
uint32_t dt_input_floats(const dt_model *m, uint32_t index) { return index < dt_inputs(m) ? inputs_of(m)[index] : 0; }
uint32_t dt_output_floats(const dt_model *m, uint32_t index) { return index < dt_outputs(m) ? outputs_of(m)[index] : 0; }
void dt_reset(const dt_model *m, void *arena) { memset(arena, 0, (size_t)words(m)[W_KEPT] * sizeof(float)); }

typedef struct {
    const dt_model *model;
    const void *const *inputs;
    float *const *outputs;
    float *arena;
} memory;

static const float *from(const memory *at, const uint32_t *place) {
    const uint32_t space = place[0] & 3, index = place[0] >> 2;
    if (place[0] == NONE && place[1] == NONE) return NULL;
    const float *base = space == ARENA    ? at->arena
                        : space == INPUT  ? (const float *)at->inputs[index]
                        : space == OUTPUT ? at->outputs[index]
                                          : data_of(at->model);
    return base + place[1];
}

static float *to(const memory *at, const uint32_t *place) {
    return ((place[0] & 3) == OUTPUT ? at->outputs[place[0] >> 2] : at->arena) + place[1];
}

int dt_run(const dt_model *m, const void *const *inputs, float *const *outputs, void *arena) {
    const memory at = {m, inputs, outputs, arena};
    const uint32_t *call = calls_of(m), *end = call + words(m)[W_CALLS];
    for (; call < end; call += length_of(*call)) {
        const uint32_t *a = call + 1;
        dt_core cores[2][DT_CORES];
        dt_matrix x, state;
        const dt_window *s = (const dt_window *)(const void *)a;
        switch (*call) {
            IF(LINEAR)
                x = matrix_at(m, a[0], cores[0]);
                dt_linear(&x, from(&at, a + 1), a[3], a[4], from(&at, a + 5), to(&at, a + 7), to(&at, a + 9));
                break;
            IF(EMBEDDING)
                x = matrix_at(m, a[0], cores[0]);
                dt_embedding(&x, a[1], a[2], (const int32_t *)(const void *)from(&at, a + 3), to(&at, a + 5), to(&at, a + 7));
                break;
            IF(CONV)
                a += WINDOW, x = matrix_at(m, a[0], cores[0]);
                dt_conv(s, &x, from(&at, a + 1), a[3], a[4], from(&at, a + 5), to(&at, a + 7), to(&at, a + 9));
                break;
            IF(RECURRENT)
                x = matrix_at(m, a[1], cores[0]), state = matrix_at(m, a[2], cores[1]);
                dt_recurrent(a[0], &x, &state, from(&at, a + 3), from(&at, a + 5), a[7], a[8], a[9], from(&at, a + 10), a[12],
                             to(&at, a + 13), a[15], to(&at, a + 16), a[0] == DT_LSTM ? to(&at, a + 18) : NULL, to(&at, a + 20));
                break;
            IF(MAP) dt_map(a[0], a[1], float_at(a + 2), float_at(a + 3), from(&at, a + 4), to(&at, a + 6)); break;
            IF(PAIR) dt_pair(a[0], a + 1, a + 5, a + 9, from(&at, a + 13), from(&at, a + 15), to(&at, a + 17)); break;
            IF(AFFINE) dt_affine(a[0], a[1], a[2], from(&at, a + 3), from(&at, a + 5), from(&at, a + 7), to(&at, a + 9)); break;
            IF(SOFTMAX) dt_softmax(a[0], a[1], a[2], a[3], from(&at, a + 4), to(&at, a + 6)); break;
            IF(NORMALIZE)
                dt_normalize(a[0], a[1], float_at(a + 2), from(&at, a + 3), from(&at, a + 5), from(&at, a + 7), to(&at, a + 9));
                break;
            IF(COPY) dt_copy(a, a + 6, a + 12, from(&at, a + 18), to(&at, a + 20)); break;
            IF(FILL) dt_fill(a[0], float_at(a + 1), to(&at, a + 2)); break;
            IF(POOL) a += WINDOW, dt_pool(s, a[0], a[1], from(&at, a + 2), to(&at, a + 4)); break;
            IF(REDUCE) dt_reduce(a[0], a[1], a[2], a[3], from(&at, a + 4), to(&at, a + 6)); break;
            default: if (DT_OPERATORS >> MATMUL & 1) dt_matmul(a, a + 4, a + 7, float_at(a + 10), from(&at, a + 11), from(&at, a + 13), to(&at, a + 15)); break;
        }
    }
    return DT_OK;
}
