// Chains of cores, the part that does not depend on the instruction set: sizes, slices of a batch, items that are not finite.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "linear.h"

namespace deepthin {
namespace {

constexpr double TASK = 1 << 18;  // multiplications of a task, about: enough to pay for starting it

// Multiplications for one item.
double work_of(const Cores& cores) {
    double total = 0, rest = 1, done = 1;
    for (int k = 0; k < cores.count; k++) rest *= double(cores.core[k].cols);
    for (int k = 0; k < cores.count; k++) {
        const Core& core = cores.core[k];
        total += done * rest * double(core.rank) * double(core.rows) * double(core.next);
        rest /= double(core.cols), done *= double(core.rows);
    }
    return total;
}

// The chain from its other end.
Cores mirror(const Cores& cores) {
    Cores result{cores.rows, cores.cols, cores.count, {}, !cores.mirrored};
    for (int k = 0; k < cores.count; k++) {
        const Core& core = cores.core[cores.count - 1 - k];
        result.core[k] = {core.next, core.rows, core.cols, core.rank, {core.step[3], core.step[1], core.step[2], core.step[0]}};
    }
    return result;
}

Cores in_order(const Cores& cores) { return cores.mirrored ? mirror(cores) : cores; }

}  // namespace

// In plain loops: each row of the matrix is the product of slices of the cores.
void exact(const Cores& given, const float* const* from, const float* x, const float* bias, float scale, bool relu, float* y) {
    const Cores cores = in_order(given);
    int64_t widest = 1, across = 1;
    for (int k = 0; k < cores.count; k++) {
        across *= cores.core[k].cols;
        widest = std::max(widest, across * cores.core[k].next);
    }
    float* memory[2] = {scratch(2 * widest), nullptr};
    memory[1] = memory[0] + widest;
    for (int64_t row = 0; row < cores.rows; row++) {
        int64_t below = 1;
        for (int k = 0; k < cores.count; k++) below *= cores.core[k].rows;
        float *now = memory[0], *next = memory[1];
        now[0] = 1;
        int64_t count = 1;  // of columns so far
        for (int k = 0; k < cores.count; k++) {
            const Core& core = cores.core[k];
            below /= core.rows;
            const int64_t i = row / below % core.rows;
            for (int64_t c = 0; c < count; c++)
                for (int64_t q = 0; q < core.cols; q++)
                    for (int64_t b = 0; b < core.next; b++) {
                        float sum = 0;
                        for (int64_t a = 0; a < core.rank; a++)
                            sum += now[c * core.rank + a] *
                                   from[k][a * core.step[0] + i * core.step[1] + q * core.step[2] + b * core.step[3]];
                        next[(c * core.cols + q) * core.next + b] = sum;
                    }
            count *= core.cols;
            std::swap(now, next);
        }
        float sum = 0;
        for (int64_t q = 0; q < cores.cols; q++) sum += now[q] * x[q];
        sum = sum * scale + (bias ? bias[row] : 0.0f);
        y[row] = relu && sum < 0 ? 0 : sum;
    }
}

namespace {

// Memory of the calling thread for what all threads read, reused from call to call.
float* shared_scratch(int64_t floats) {
    thread_local Memory memory;
    thread_local int64_t size = 0;
    if (size < floats) {
        size = 0;
        memory.reset();
        memory = allocate(floats);
        size = floats;
    }
    return memory.get();
}

}  // namespace

Cores make_cores(int64_t rows, int64_t cols, const int64_t* numbers, int64_t count) {
    constexpr int64_t LIMIT = int64_t(1) << 31, MOST = int64_t(1) << 40;
    const auto within = [](int64_t value) { return 0 < value && value < LIMIT; };
    if (count < 1 || count > MOST_CORES || !within(rows) || !within(cols))
        throw std::invalid_argument("a chain has 1 to 8 cores, rows and cols from 1 to 2^31 - 1");
    Cores cores{rows, cols, int(count), {}, false};
    int64_t down = 1, across = 1, rank = 1;
    for (int k = 0; k < cores.count; k++, numbers += 8) {
        Core& core = cores.core[k] = {numbers[0], numbers[1], numbers[2], numbers[3], {numbers[4], numbers[5], numbers[6], numbers[7]}};
        if (!within(core.rank) || !within(core.rows) || !within(core.cols) || !within(core.next) || core.rank != rank)
            throw std::invalid_argument("a core is empty, too large, or of another rank than the one before");
        for (const int64_t step : core.step)
            if (step < 0 || step > MOST) throw std::invalid_argument("the entries of a core lie too far apart");
        rank = core.next, down *= core.rows, across *= core.cols;
        if (down >= LIMIT || across >= LIMIT || down * rank > MOST || across * rank > MOST)
            throw std::invalid_argument("the cores are too large");
    }
    if (rank != 1 || down < rows || across < cols) throw std::invalid_argument("the cores do not cover the matrix");
    const Cores other = mirror(cores);
    for (const Cores* chain : {&std::as_const(cores), &other}) {
        int64_t rest = across, done = 1;
        for (int k = 0; k < cores.count; k++) {  // of all steps' arrays
            rest /= chain->core[k].cols, done *= chain->core[k].rows;
            if (chain->core[k].next > MOST / rest / done) throw std::invalid_argument("the cores are too large");
        }
    }
    const double moved = double(down + across) * (cores.count == 2 ? 4 : 100);  // what reversing the axes takes, about
    return work_of(other) + moved < work_of(cores) ? other : cores;
}

void cores_forward(const Kernels& kernels, const Cores& cores, const float* const* from, const float* x, const float* bias,
                   float* y, int64_t batch, float scale, bool relu, int threads) {
    if (batch == 0) return;
    float* packed = shared_scratch(kernels.cores_floats(cores, false));
    kernels.pack_cores(cores, from, false, packed);
    const int64_t each = std::max<int64_t>(1, int64_t(TASK / work_of(cores))), tasks = (batch + each - 1) / each;
    in_parallel(tasks, threads, [&](int64_t task) {
        for (int64_t i = task * each; i < std::min(batch, (task + 1) * each); i++) {
            const float* item = x + i * cores.cols;
            float* to = y + i * cores.rows;
            if (!kernels.cores_item(cores, packed, item, bias, scale, relu, to, scratch(kernels.cores_scratch(cores, false))))
                exact(cores, from, item, bias, scale, relu, to);
        }
    });
}

void cores_backward(const Kernels& kernels, const Cores& cores, const float* const* from, const float* x, const float* grad,
                    float* grad_x, float* const* grads, int64_t batch, float scale, int threads) {
    float* packed = shared_scratch(kernels.cores_floats(cores, true));
    kernels.pack_cores(cores, from, true, packed);
    // Their number depends on the batch alone, as the result does.
    const int64_t slices = std::clamp<int64_t>(batch / 8, 1, 8), floats = grads ? kernels.cores_sums(cores) : 0;
    const Memory sums = allocate(slices * floats);
    in_parallel(slices, threads, [&](int64_t slice) {
        float* const own = grads ? sums.get() + slice * floats : nullptr;
        if (own) std::memset(own, 0, sizeof(float) * floats);
        float* memory = scratch(kernels.cores_scratch(cores, true));
        for (int64_t i = batch * slice / slices; i < batch * (slice + 1) / slices; i++)
            kernels.cores_gradient(cores, packed, x + i * cores.cols, grad + i * cores.rows, scale,
                                   grad_x ? grad_x + i * cores.cols : nullptr, own, memory);
    });
    for (int64_t slice = 1; slice < slices; slice++)
        for (int64_t i = 0; i < floats; i++) sums[i] += sums[slice * floats + i];
    if (grads) kernels.finish_cores(cores, sums.get(), grads);
}

}  // namespace deepthin
