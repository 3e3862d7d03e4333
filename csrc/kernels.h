// The interface of the kernels: plain pointers and lengths, no Python, no torch.
//
// The algebra is that of Sotoudeh and Baghsorkhi (2018, arXiv:1802.06944), section 3; docs/performance.md derives it.
// A weight W of rows x cols has the entries W[j, q] = sum_a xf[e / n, a] * wf[a, e % n], e = offset + j * cols + q.
// Then y[j] = sum_{s, a} xf[e_j / n + s, a] * P_a[s * n + n - 1 - e_j % n], e_j = offset + j * cols, where P_a is the full
// correlation of x with row a of wf: P_a[v] = sum_t x[v - (n - 1) + t] * wf[a, t], 0 <= v < cols + n - 1.
#pragma once
#include <cstdint>

namespace deepthin {

struct Plan {
    int64_t rows, cols;  // outputs, inputs
    int64_t n, rank;     // wf is rank x n, row-major
    int64_t m;           // xf is m x rank, row-major: m = ceil((offset + rows * cols) / n)
    int64_t offset;      // entry of the factors' product at which W begins, below n
    // Derived from these (see `complete`):
    int64_t common;  // g = gcd(n, cols): only positions v that agree modulo g are ever read
    int64_t phases;  // n / g: outputs this far apart start at the same entry of wf
    int64_t step;    // cols / g: rows of xf between two such outputs
    int64_t blocks;  // rows of xf that an output reads, at most
    int64_t width;   // inputs that a product takes: cols, or those of a piece
    int64_t piece;   // inputs at a time of several items: so few that a piece's scratch memory stays in the caches
};

// Transform of `points` complex numbers; radix by radix, no bit reversal: the inverse undoes the forward order.
struct Transform {
    static constexpr int MAX_LEVELS = 24;
    int64_t points = 0;
    int levels = 0;
    int radix[MAX_LEVELS] = {};
    const float* twiddles[MAX_LEVELS] = {};  // for each block of the level, the powers 1 .. radix - 1 of a root: see fft.h
};

// Items that are windows of padded images: item p is position p % positions of image p / positions. Images have
// `PATCH_EDGE` floats before and after them that may be read, and, of a gradient, written as they were.
constexpr int64_t PATCH_EDGE = 16;
struct Patches {
    const float* images;
    float* grad_images;      // laid out alike; added to
    int64_t image, channel;  // floats from one image to the next, and from one channel to the next
    int64_t taps;            // of the kernel
    const int64_t* tap;      // floats from the beginning of a window to each tap
    int64_t row_outputs, positions;  // outputs in a row, and of an image
    const int64_t* row;      // floats from the beginning of an image to the first window of each row of outputs
    int64_t outputs;         // floats from one image of outputs to the next; an output channel takes `positions`
};

// One product or gradient, shared by all threads that work on it.
struct Job {
    Plan plan;
    const float *xf, *wf, *bias, *x;  // x is batch x cols; bias may be null
    float* y;                         // batch x rows
    float scale;
    bool relu;
    // By FFT when `lanes.points` is set. Spectra are those of the reversed wf, over points, in the transform's order.
    Transform lanes;        // of one item per SIMD lane
    const float* spectra;   // rank x points x {re, im}
    Transform single;       // of a single item: lane l holds its positions l modulo W
    const float* spectra1;  // rank x points x {re, im} x 2 V: of all 2 V - 1 shifts, V = Kernels::single_width
    const float* packed;    // of one item: xf as `Kernels::pack` lays it out; or null
    const Patches* patches;  // of a convolution: where items come from, instead of x and grad_x; y and grad are images
    // Gradients of one slice of the batch; any may be null.
    const float* grad;       // batch x rows
    float *grad_x, *grad_xf;  // batch x cols; m x rank, added to
    float* grad_wf;          // partial sums, see `gradient_floats`: added to
};

enum class Cell { tanh, relu, lstm, gru };  // torch's RNN with either nonlinearity, and its gated layers

inline int64_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// One step of several sequences with `hidden` units; arrays of successive sequences are `..._step` apart. Gates are in
// torch's order: i f g o, or r z n.
struct Step {
    Cell cell;
    int64_t items, hidden;
    float *gates, *products;  // of the inputs, with their bias, and of the states: gates x hidden
    int64_t gates_step, products_step;
    float *h, *c;  // states, updated in place; c for an LSTM only
    int64_t h_step;
    float* y;  // copy of h
    int64_t y_step;
    float* saved;  // for the gradient: an LSTM's new c, a GRU's product for n; `gates` then takes the gates' values. Or null
    int64_t saved_step;
};

// The gradient of a step. Gates and `saved` were stored by the step; `h` and `c` are the states before it.
struct StepGradient {
    Cell cell;
    int64_t items, hidden;
    const float *gates, *saved, *h, *c, *y;
    int64_t gates_step, saved_step, h_step, c_step, y_step;
    const float* grad_y;
    int64_t grad_y_step;
    float *grad_h, *grad_c;  // of the states after the step; then, for those before, the part without products
    float *grad_gates, *grad_products;  // the same memory, but for a GRU
    int64_t grad_step;
};

// A matrix of one byte per weight, read in place, and the operands of its products. Without `table` a weight is
// step * symbol (signed), or least + step * symbol (unsigned) with `least`; with `table` it is table[symbol].
struct Symbols {
    int64_t rows, cols;
    const uint8_t* symbols;
    const float *step, *least;  // one value, or one per row; `least` may be null
    bool by_row;
    const float* table;  // or null
    int levels;          // length of `table`
    const float* bias;   // may be null
};
constexpr int SYMBOL_LEVELS = 64;  // allocated length of a table for the kernels, whatever `levels` is
constexpr int SYMBOL_ITEMS = 8;    // upper bound on the items of one call

// A chain of cores: W[(i1..id), (j1..jd)] = g1[:, i1, j1, :] .. gd[:, id, jd, :], cut to rows x cols.
constexpr int MOST_CORES = 8;
struct Core {
    int64_t rank, rows, cols, next;  // r_(k-1) x R_k x Q_k x r_k; ranks are 1 at both ends
    int64_t step[4];                 // floats from one entry to the next, of each axis
};
struct Cores {
    int64_t rows, cols;  // outputs, inputs
    int count;
    Core core[MOST_CORES];
    // Whether `core` holds the mirrored chain, from the last core to the first, of less work: its inputs and outputs are
    // arrays with the axes in reverse order. Arrays of pointers are in the order of the chain in any case.
    bool mirrored;
    int place(int k) const { return mirrored ? count - 1 - k : k; }  // of core k in such an array
};

// The kernels of one instruction set. `width` is the number of lanes, one item per lane: widths[0], or widths[1]
// where it is not 0.
struct Kernels {
    const char* name;
    int widths[2];
    int single_width;  // lanes for a single item, one position per lane
    int bundle;  // upper bound on the blocks of items of one call of `backward`
    int64_t (*forward_scratch)(const Job&, int width);  // floats
    int64_t (*backward_scratch)(const Job&, int width);
    // Returns a bit mask of the items with outputs that are not finite: the caller computes these again, exactly.
    uint32_t (*forward)(const Job&, int width, int64_t first, int64_t items, float* scratch);
    void (*backward)(const Job&, int width, int64_t first, int64_t items, float* scratch);
    int64_t (*single_scratch)(const Job&);
    bool (*single)(const Job&, int64_t item, float* scratch);  // whether all outputs are finite
    // A packed copy of xf for single items, faster where it is used repeatedly; 0 floats where it does not pay.
    int64_t (*packed_floats)(const Plan&);
    void (*pack)(const Plan&, const float* xf, float* to);
    // Spectra in the layouts of Job; scratch is 2 W floats a point.
    void (*spectra)(const Plan&, const float* wf, const Transform&, float* out, float* scratch);
    void (*spectra1)(const Plan&, const float* wf, const Transform&, float* out, float* scratch);
    void (*finish_grad_wf)(const Job&, int width, float* lanes, float* grad_wf);  // rank x n
    int64_t (*csr_scratch)(int64_t rows, int64_t cols, int width);
    void (*csr)(const float* values, const int32_t* columns, const int64_t* starts, int64_t rows, int64_t cols,
                const float* bias, const float* x, float* y, int width, int64_t items, float* scratch);
    int levels[2];  // shared values per look-up of `symbols`, and their upper bound: more are slower than decoded weights
    int64_t (*symbols_scratch)(int64_t cols);
    // For some rows and at most SYMBOL_ITEMS items; returns a bit mask as `forward` does.
    uint32_t (*symbols)(const Symbols&, const float* x, float* y, int64_t items, int64_t first, int64_t stop, float* scratch);
    void (*step)(const Step&);
    void (*step_gradient)(const StepGradient&);
    // Of a chain of cores, one item at a time. Cores are packed once for many items; with `gradients`, their transposes too.
    int64_t (*cores_floats)(const Cores&, bool gradients);
    void (*pack_cores)(const Cores&, const float* const* cores, bool gradients, float* to);
    int64_t (*cores_scratch)(const Cores&, bool gradients);
    bool (*cores_item)(const Cores&, const float* packed, const float* x, const float* bias, float scale, bool relu, float* y,
                       float* scratch);  // whether all outputs are finite
    int64_t (*cores_sums)(const Cores&);  // floats
    void (*cores_gradient)(const Cores&, const float* packed, const float* x, const float* grad, float scale, float* grad_x,
                           float* sums, float* scratch);  // `grad_x` is written, `sums` added to; either may be null
    void (*finish_cores)(const Cores&, const float* sums, float* const* grads);
};

// Size of `Job::grad_wf`: W partial sums of each entry of wf or, by FFT, of its spectrum; just wf's entries if n = cols.
inline int64_t gradient_floats(const Job& job, int width) {
    const Plan& plan = job.plan;
    if (plan.n == plan.cols && plan.offset == 0) return plan.rank * plan.n;
    return plan.rank * (job.lanes.points ? job.lanes.points * 2 : plan.n) * width;
}

#if defined(__x86_64__)
extern const Kernels kernels_v2, kernels_v3, kernels_v4;
#else
extern const Kernels kernels_baseline;
#endif

// The best instruction set that this machine can run, or the one called `name`; null if it cannot run that.
const Kernels* find_kernels(const char* name);

// A plan from (rows, cols, n, rank, offset); throws std::invalid_argument.
Plan make_plan(int64_t rows, int64_t cols, int64_t n, int64_t rank, int64_t offset);

// y = scale x W^T + bias, rectified if asked. Items whose outputs are not all finite are computed again entry by entry, so that
// NaN and infinity come out as from a dense product. The result does not depend on `threads`.
void forward(const Kernels&, const Plan&, const float* x, const float* xf, const float* wf, const float* bias, float* y,
             int64_t batch, bool fft, float scale, bool relu, int threads);

// Gradients of x, xf and wf, given that of y; those that are null are left out.
void backward(const Kernels&, const Plan&, const float* x, const float* xf, const float* wf, const float* grad,
              float* grad_x, float* grad_xf, float* grad_wf, int64_t batch, bool fft, int threads);

// y = x A^T + bias for a sparse A of rows x cols; throws std::invalid_argument where an index is out of range.
void csr(const Kernels&, const float* values, const int32_t* columns, const int64_t* starts, int64_t rows, int64_t cols,
         int64_t entries, const float* bias, const float* x, float* y, int64_t batch, int threads);

// y = x W^T + bias for a W of one byte a weight. Items whose outputs are not all finite are computed again with the weights
// themselves, as in `forward`; a symbol without a shared value is NaN. Throws std::invalid_argument for more levels than the
// instruction set has. The result does not depend on `threads`.
void symbols(const Kernels&, const Symbols&, const float* x, float* y, int64_t batch, int threads);

// A chain from the size of the matrix and, for each core, eight numbers as in `Core`; throws std::invalid_argument.
Cores make_cores(int64_t rows, int64_t cols, const int64_t* numbers, int64_t count);

// y = scale x W^T + bias for a chain of cores, rectified if asked. Items whose outputs are not all finite are computed again
// with the weights themselves, as in `forward`. The result depends neither on `threads` nor on the batch.
void cores_forward(const Kernels&, const Cores&, const float* const* cores, const float* x, const float* bias, float* y,
                   int64_t batch, float scale, bool relu, int threads);

// Gradients of x and of each core, laid out as the core; those that are null are left out, and `grads` may be.
void cores_backward(const Kernels&, const Cores&, const float* const* cores, const float* x, const float* grad, float* grad_x,
                    float* const* grads, int64_t batch, float scale, int threads);

// A convolution of one to three dimensions (depth, height, width; sizes of 1 where there are fewer) as torch has it: its
// matrix is outputs x (channels / groups * taps). The factors' product holds it from entry `offset` on.
struct Convolution {
    int64_t batch, channels, outputs, groups;
    int64_t size[3], kernel[3], stride[3], dilation[3], before[3], after[3];  // zeros before and after an image
    int64_t n, rank, offset;
};

// Throws std::invalid_argument unless all sizes are possible; returns the positions of an image of outputs.
int64_t check_convolution(const Convolution&);

// y = scale * convolution of x + bias. Outputs that are not finite are computed again entry by entry. The result does not
// depend on `threads`.
void convolve(const Kernels&, const Convolution&, const float* x, const float* xf, const float* wf, const float* bias,
              float* y, bool fft, float scale, int threads);

// Gradients of x, xf and wf, given that of y; those that are null are left out.
void convolve_backward(const Kernels&, const Convolution&, const float* x, const float* xf, const float* wf,
                       const float* grad, float* grad_x, float* grad_xf, float* grad_wf, bool fft, int threads);

// A matrix of a recurrent layer, two factors or a chain of cores, and the arrays for its gradients: null where they are not
// wanted.
struct Gate {
    Plan plan;  // gates * hidden x inputs or hidden; of a chain its rows and cols alone
    const float *xf, *wf, *bias;  // bias: may be null
    bool fft, fft_gradient;
    float *grad_xf, *grad_wf, *grad_bias;
    const Cores* cores;  // null: two factors
    const float* core[MOST_CORES];
    float* grad_core[MOST_CORES];
};

// Layers over whole sequences: x is steps x batch x inputs, y steps x batch x directions * hidden, states are
// layers * directions x batch x hidden; all of them row-major, gates in torch's order.
struct Recurrent {
    Cell cell;
    int64_t steps, batch, inputs, hidden, layers, directions;
    const Gate* gates;  // layers x directions x {of the inputs, of the states}
};

// Floats that `recurrent` saves for the gradient.
int64_t recurrent_reserve(const Recurrent&);

// `h` and `c` hold the first states and take the last ones; `c` is an LSTM's. `reserve` may be null. The result does not
// depend on `threads`, nor on how a sequence is cut into calls.
void recurrent(const Kernels&, const Recurrent&, const float* x, float* h, float* c, float* y, float* reserve, int threads);

// `h`, `c`: the first states. `grad_h`, `grad_c` hold the gradients of the last states and take those of the first.
// `grad_x` may be null.
void recurrent_backward(const Kernels&, const Recurrent&, const float* x, const float* h, const float* c, const float* y,
                        const float* reserve, const float* grad_y, float* grad_x, float* grad_h, float* grad_c, int threads);

// Sets GOMP_parallel of the GNU OpenMP library that a framework has loaded, so that its threads are used here too. Null:
// the pool of threads.cpp.
using OpenMpParallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
void use_openmp(OpenMpParallel parallel);

// For tests: lets `count` more allocations succeed and the next one fail; negative: none fails.
void fail_allocation_after(int64_t count);

}  // namespace deepthin
