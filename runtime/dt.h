/* libdeepthin: networks of small weights (DeepThin and its rivals) in C99, without a heap and without global state.
 *
 * A network is a list of calls of the operators below, which `deepthin export --to c` writes, or a flat file, which
 * dt_open checks and dt_run runs (dt_file.c). Tensors are contiguous, row by row; every operator that needs memory of
 * its own is given it as `scratch`. Docs: docs/runtime.md.
 */
#ifndef DT_H
#define DT_H

#include <stddef.h>
#include <stdint.h>

#ifndef DT_LANES /* floats in a SIMD vector: 1, 4, 8 or 16 */
#if defined(__AVX512F__)
#define DT_LANES 16
#elif defined(__AVX__)
#define DT_LANES 8
#elif defined(__SSE2__) || defined(__ARM_NEON) || defined(__wasm_simd128__)
#define DT_LANES 4
#else
#define DT_LANES 1
#endif
#endif

/* ---- numbers and matrices ---- */

/* Numbers in constant memory. Entry e of an array is, with i = first + e,
 *   data[i]                                          floats, where bits is 32;
 *   table[(i / row) << bits | q]                     q = unsigned integer i of `bits` bits, lowest bits of a byte first;
 *   step[i / row] * (q - zero) (+ least[i / row])    where there is no table.
 * With row = 0 there is one table, step and least for all entries. Numbers that the integers cannot express are listed: entry
 * fix_at[k] is fix[k]; fix_at rises. */
typedef struct {
    const void *data;
    const float *step, *least, *table, *fix;
    const uint32_t *fix_at;
    uint32_t fixes, first, row;
    int32_t zero;
    uint32_t bits; /* 1 to 8, 16, 32, or one of these: */
} dt_array;

enum { DT_BASE3 = 103, DT_BASE6 = 106 }; /* five digits of base 3, three of base 6, in a byte: the lowest first; no tables */

/* One core of a tensor train: an array of before x rows x cols x after. */
typedef struct {
    uint32_t before, rows, cols, after;
    dt_array values;
} dt_core;

enum {
    DT_DENSE = 0,   /* a: rows x cols */
    DT_WINDOWS = 1, /* a = xf, m x rank; b = wf, rank x n: flat(xf wf), from entry `offset` on (docs/theory.md) */
    DT_TRAIN = 2,   /* cores of a tensor train, of a sum of Kronecker products or of a low-rank product */
    DT_SPARSE = 3,  /* a: values; gaps: n bytes, entries between a value and the one before it; 255: 255 and no value */
    DT_HASHED = 4   /* a: n values; entry i is chosen, with its sign, by word offset + i of SplitMix64 from `seed` */
};
enum { DT_CORES = 4 }; /* at most */

typedef struct {
    uint32_t kind, rows, cols;
    uint32_t turned; /* 1: outputs are x W, of cols numbers, instead of W x, of rows */
    float scale;     /* of all entries */
    dt_array a, b;
    uint32_t n, rank, offset, m;
    const dt_core *cores;
    uint32_t count; /* of cores */
    const uint8_t *gaps;
    uint64_t seed;
} dt_matrix;

/* How a matrix is used, which decides on the memory that it needs. */
enum {
    DT_ONCE = 0,   /* a few products: constants are read where they are */
    DT_PACKED = 1, /* many products: constants are first laid out in scratch for the vectors */
    DT_ROWS = 2    /* single rows */
};
/* Floats of scratch; outputs of a product and inputs included in neither. 0 for all that a table shows to be invalid. */
size_t dt_scratch(const dt_matrix *w, uint32_t use);

/* ---- operators ---- */

/* y = W x (+ bias) for each of `items` vectors. */
void dt_linear(const dt_matrix *w, const float *bias, uint32_t items, uint32_t use, const float *x, float *y, float *scratch);

/* y = row ids[i] of W; zeros for row `zero_row`, and for an id that is out of range. scratch: DT_ROWS. */
void dt_embedding(const dt_matrix *w, uint32_t items, uint32_t zero_row, const int32_t *ids, float *y, float *scratch);

typedef struct { /* of one item: channels x height x width -> outputs x out_height x out_width */
    uint32_t channels, height, width, outputs, out_height, out_width;
    uint32_t kernel[2], stride[2], pad[2], dilation[2], groups;
} dt_window;
/* scratch: that of the matrix (DT_ROWS with groups, else `use`), then cols + outputs floats. */
void dt_conv(const dt_window *s, const dt_matrix *w, const float *bias, uint32_t items, uint32_t use, const float *x, float *y,
             float *scratch);

enum { DT_TANH_CELL = 0, DT_RELU_CELL = 1, DT_GRU = 2, DT_LSTM = 3 };
/* One direction of one layer. x and y of step t begin at t x_stride and t y_stride; h (and c of an LSTM) hold the state
 * before and after. Gates in torch's order. scratch: those of both matrices, then 2 gates hidden floats. */
void dt_recurrent(uint32_t cell, const dt_matrix *input, const dt_matrix *state, const float *input_bias, const float *state_bias,
                  uint32_t steps, uint32_t reverse, uint32_t use, const float *x, uint32_t x_stride, float *y, uint32_t y_stride,
                  float *h, float *c, float *scratch);

enum {
    DT_RELU, DT_SIGMOID, DT_TANH, DT_SILU, DT_GELU, DT_GELU_TANH, DT_EXP, DT_LOG, DT_SQRT, DT_ABS, DT_SQUARE, DT_RECIPROCAL,
    DT_LINE,       /* a x + b */
    DT_CLAMP,      /* between a and b */
    DT_LEAKY,      /* a x where x < 0 */
    DT_ELU,        /* a (exp x - 1) where x < 0 */
    DT_HARDSIGMOID, DT_HARDSWISH, DT_SOFTPLUS,
    DT_FUNCTIONS
};
void dt_map(uint32_t function, uint32_t count, float a, float b, const float *x, float *y);

enum { DT_ADD, DT_SUBTRACT, DT_MULTIPLY, DT_DIVIDE, DT_LARGER, DT_SMALLER, DT_PAIRS };
/* y, contiguous, of 4 dimensions; a and b with strides, 0 where they are broadcast. */
void dt_pair(uint32_t function, const uint32_t *size, const uint32_t *a_stride, const uint32_t *b_stride, const float *a,
             const float *b, float *y);

/* y = x scale[c] + shift[c]; x: outer x channels x inner. */
void dt_affine(uint32_t outer, uint32_t channels, uint32_t inner, const float *scale, const float *shift, const float *x, float *y);

/* x: outer x count x inner; over `count`. */
void dt_softmax(uint32_t logarithm, uint32_t outer, uint32_t count, uint32_t inner, const float *x, float *y);

/* Mean 0 and variance 1 (plus epsilon) over the last `count` numbers; then weight and bias, of `count`, or NULL. */
void dt_normalize(uint32_t outer, uint32_t count, float epsilon, const float *weight, const float *bias, const float *x, float *y);

enum { DT_DIMENSIONS = 6 };
/* Copy of up to six dimensions by strides: permutations, slices, concatenations, padding, broadcasts. */
void dt_copy(const uint32_t *size, const uint32_t *x_stride, const uint32_t *y_stride, const float *x, float *y);
void dt_fill(uint32_t count, float value, float *y);

/* channels (= outputs) planes; largest != 0: maxima; else means over the kernel (whole != 0: zeros of the padding count). */
void dt_pool(const dt_window *s, uint32_t largest, uint32_t whole, const float *x, float *y);

enum { DT_SUM, DT_MEAN, DT_MAXIMUM, DT_MINIMUM, DT_REDUCTIONS };
/* x: outer x count x inner; over `count`. */
void dt_reduce(uint32_t function, uint32_t outer, uint32_t count, uint32_t inner, const float *x, float *y);

/* y[b, i, j] = scale sum_k a[b, i, k] b[b, k, j]; size: batches, rows, inner, columns; strides of (batch, row, column). */
void dt_matmul(const uint32_t *size, const uint32_t *a_stride, const uint32_t *b_stride, float scale, const float *a, const float *b,
               float *y);

/* ---- flat files (dt_file.c) ---- */

enum { DT_OK = 0, DT_E_FORMAT = 1, DT_E_VERSION = 2, DT_E_CHECKSUM = 3, DT_E_ALIGNMENT = 4 };
typedef struct { /* a view of the file, which stays where it is */
    const uint8_t *file;
    uint32_t length;
} dt_model;
int dt_open(dt_model *model, const void *file, size_t length); /* 16-byte aligned; checks everything that a run relies on */
size_t dt_arena_bytes(const dt_model *model);                  /* of a run; the states of recurrent layers lie there, too */
uint32_t dt_inputs(const dt_model *model);
uint32_t dt_outputs(const dt_model *model);
uint32_t dt_input_floats(const dt_model *model, uint32_t index); /* ids are int32_t in their place */
uint32_t dt_output_floats(const dt_model *model, uint32_t index);
void dt_reset(const dt_model *model, void *arena); /* zeros the states; before the first run */
int dt_run(const dt_model *model, const void *const *inputs, float *const *outputs, void *arena); /* arena: 16-byte aligned */

#endif
