// The part of a product that does not depend on the instruction set: plans, working memory, splitting a batch, and items that
// are not finite.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "linear.h"

namespace deepthin {

float* scratch(int64_t floats) {
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

void exact(const Job& job, int64_t item) {
    const Plan& p = job.plan;
    const float* x = job.x + item * p.cols;
    float* y = job.y + item * p.rows;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    bool lost = false;  // a NaN input makes every output NaN
    for (int64_t q = 0; q < p.cols; q++) lost |= std::isnan(x[q]);
    for (int64_t j = 0; j < p.rows; j++) {
        const int64_t begin = p.offset + j * p.cols, end = begin + p.cols;
        float sum = 0;
        bool gone = lost;
        for (int64_t i = begin / p.n * p.rank; i < ((end - 1) / p.n + 1) * p.rank; i++) gone |= std::isnan(job.xf[i]);
        for (int64_t e = begin; e < end && !gone && !std::isnan(sum);) {
            const int64_t row = e / p.n, stop = std::min(end, (row + 1) * p.n);
            for (; e < stop; e++) {
                float weight = 0;
                for (int64_t a = 0; a < p.rank; a++) weight += job.xf[row * p.rank + a] * job.wf[a * p.n + e % p.n];
                sum += weight * x[e - begin];
            }
        }
        sum = gone ? nan : sum * job.scale;
        if (job.bias) sum += job.bias[j];
        y[j] = job.relu && sum < 0 ? 0 : sum;
    }
}

std::vector<Block> split(const Kernels& kernels, int64_t batch, bool alone) {
    constexpr int64_t FEW = 3;
    std::vector<Block> blocks;
    for (int64_t first = 0; first < batch;) {
        const int64_t rest = batch - first;
        int width = kernels.widths[1] && rest <= kernels.widths[1] ? kernels.widths[1] : kernels.widths[0];
        if (alone && rest <= FEW) width = 1;
        blocks.push_back({first, std::min<int64_t>(rest, width), width});
        first += blocks.back().items;
    }
    return blocks;
}

CachedSpectra go_by_fft(const Kernels& kernels, Job& job) {
    const Plan& plan = job.plan;
    if (is_plain_rank(plan)) return nullptr;
    job.lanes = transform_of(kernels, (plan.piece + plan.n) / 2);  // real sequences as half as many complex points
    CachedSpectra spectra = spectra_of(kernels, plan, job.wf, job.lanes, false);
    job.spectra = spectra->get();
    return spectra;
}

FactorGradients::FactorGradients(const Job& job, int width, int64_t slices, float* grad_xf, int64_t xf_floats, float* grad_wf)
    : job_(job),
      width_(width),
      slices_(slices),
      xf_floats_(grad_xf ? xf_floats : 0),
      wf_floats_(grad_wf ? gradient_floats(job, width) : 0),
      grad_xf_(grad_xf),
      grad_wf_(grad_wf),
      sums_xf_(allocate((slices - 1) * xf_floats_)),
      sums_wf_(allocate(slices * wf_floats_)) {}

void FactorGradients::begin(int64_t slice, Job& job) {
    if (grad_xf_) {
        job.grad_xf = slice == 0 ? grad_xf_ : sums_xf_.get() + (slice - 1) * xf_floats_;
        std::memset(job.grad_xf, 0, sizeof(float) * xf_floats_);
    }
    if (grad_wf_) {
        job.grad_wf = sums_wf_.get() + slice * wf_floats_;
        std::memset(job.grad_wf, 0, sizeof(float) * wf_floats_);
    }
}

void FactorGradients::finish(const Kernels& kernels) {
    for (int64_t slice = 1; slice < slices_; slice++) {
        const float* from = sums_xf_.get() + (slice - 1) * xf_floats_;
        for (int64_t i = 0; i < xf_floats_; i++) grad_xf_[i] += from[i];
        const float* lanes = sums_wf_.get() + slice * wf_floats_;
        for (int64_t i = 0; i < wf_floats_; i++) sums_wf_[i] += lanes[i];
    }
    if (grad_wf_) kernels.finish_grad_wf(job_, width_, sums_wf_.get(), grad_wf_);
}

Plan make_plan(int64_t rows, int64_t cols, int64_t n, int64_t rank, int64_t offset) {
    constexpr int64_t LIMIT = int64_t(1) << 31;
    const auto within = [](int64_t value) { return 0 < value && value < LIMIT; };
    if (!within(rows) || !within(cols) || !within(n) || !within(rank) || offset < 0 || offset >= n)
        throw std::invalid_argument("rows, cols, n and rank must be from 1 to 2^31 - 1, and 0 <= offset < n");
    Plan plan{rows, cols, n, rank, (offset + rows * cols - 1) / n + 1, offset, 0, 0, 0, 0, cols, cols};
    plan.common = std::gcd(n, cols);
    plan.phases = n / plan.common;
    plan.step = cols / plan.common;
    plan.blocks = (n - 1 + cols - 1) / n + 1;
    if (plan.common == n) plan.blocks = (offset + cols - 1) / n + 1;  // all outputs start at the same entry of wf
    return in_pieces(plan, 1);
}

Plan in_pieces(Plan plan, int64_t multiple) {
    constexpr int64_t PIECE = 4096, LEAST = 2048;  // measured
    const int64_t least = std::max({PIECE / plan.rank, LEAST, 8 * plan.n});  // each piece correlates n positions more
    if (is_plain_rank(plan) || plan.cols < 2 * least) return plan;
    const int64_t pieces = plan.cols / least, size = (plan.cols + pieces - 1) / pieces;
    plan.piece = std::min(plan.cols, (size + multiple - 1) / multiple * multiple);
    return plan;
}

const Kernels* find_kernels(const char* name) {
#if defined(__x86_64__)
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#if defined(DEEPTHIN_EMULATE_V4)
    const bool v4 = v3;
#else
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    const std::pair<const Kernels*, bool> known[] = {
        {&kernels_v4, v4}, {&kernels_v3, v3}, {&kernels_v2, __builtin_cpu_supports("sse4.2") != 0}};
#else
    const std::pair<const Kernels*, bool> known[] = {{&kernels_baseline, true}};
#endif
    for (auto [kernels, usable] : known)
        if (usable && (!name || std::strcmp(name, kernels->name) == 0)) return kernels;
    return nullptr;
}

Product::Product(const Kernels& kernels, const Plan& plan, const float* xf, const float* wf, const float* bias, bool fft,
                 float scale, bool relu, const std::vector<Block>& blocks, bool often)
    : kernels_(&kernels) {
    job_.plan = plan;
    job_.xf = xf, job_.wf = wf, job_.bias = bias, job_.scale = scale, job_.relu = relu;
    const bool alone = !blocks.empty() && blocks.back().width == 1;
    if (const int64_t floats = often && alone ? kernels.packed_floats(plan) : 0) {
        packed_ = allocate(floats);
        kernels.pack(plan, xf, packed_.get());
        job_.packed = packed_.get();
    }
    if (!fft || is_plain_rank(plan) || blocks.empty()) return;
    if (blocks.front().width > 1) spectra_ = go_by_fft(kernels, job_);
    if (alone) {
        const int64_t lanes = 2 * kernels.single_width;  // each lane has as many positions
        job_.single = transform_of(kernels, (plan.cols + plan.n - 1 + lanes - 1) / lanes);
        spectra1_ = spectra_of(kernels, plan, wf, job_.single, true);
        job_.spectra1 = spectra1_->get();
    }
}

void Product::operator()(const Block& block, const float* x, float* y) const {
    if (cores_) {
        float* memory = scratch(kernels_->cores_scratch(*cores_, false));
        for (int64_t i = block.first; i < block.first + block.items; i++) {
            const float* item = x + i * cores_->cols;
            float* to = y + i * cores_->rows;
            if (kernels_->cores_item(*cores_, packed_.get(), item, job_.bias, job_.scale, job_.relu, to, memory)) continue;
            exact(*cores_, from_, item, job_.bias, job_.scale, job_.relu, to);
            memory = scratch(kernels_->cores_scratch(*cores_, false));
        }
        return;
    }
    Job job = job_;
    job.x = x, job.y = y;
    uint32_t odd;
    if (block.width == 1)
        odd = !kernels_->single(job, block.first, scratch(kernels_->single_scratch(job)));
    else
        odd = kernels_->forward(job, block.width, block.first, block.items,
                                scratch(kernels_->forward_scratch(job, block.width)));
    for (int64_t b = 0; odd; b++, odd >>= 1)
        if (odd & 1) exact(job, block.first + b);
}

Product::Product(const Kernels& kernels, const Cores& cores, const float* const* from, const float* bias, float scale, bool relu)
    : kernels_(&kernels), packed_(allocate(kernels.cores_floats(cores, false))), cores_(&cores), from_(from) {
    job_.bias = bias, job_.scale = scale, job_.relu = relu;
    kernels.pack_cores(cores, from, false, packed_.get());
}

void forward(const Kernels& kernels, const Plan& plan, const float* x, const float* xf, const float* wf,
             const float* bias, float* y, int64_t batch, bool fft, float scale, bool relu, int threads) {
    const auto blocks = split(kernels, batch, true);
    const Product product(kernels, plan, xf, wf, bias, fft, scale, relu, blocks, false);
    in_parallel(int64_t(blocks.size()), threads, [&](int64_t i) { product(blocks[i], x, y); });
}

InputGradient::InputGradient(const Kernels& kernels, const Cores& cores, const float* const* from)
    : kernels_(&kernels), cores_(&cores), packed_(allocate(kernels.cores_floats(cores, true))) {
    kernels.pack_cores(cores, from, true, packed_.get());
}

InputGradient::InputGradient(const Kernels& kernels, const Plan& plan, const float* xf, const float* wf, bool fft,
                             const std::vector<Block>& blocks)
    : kernels_(&kernels) {
    job_.plan = plan;
    job_.xf = xf, job_.wf = wf;
    if (fft && !blocks.empty()) spectra_ = go_by_fft(kernels, job_);
}

void InputGradient::operator()(const Block& block, const float* grad, float* grad_x) const {
    if (cores_) {
        float* memory = scratch(kernels_->cores_scratch(*cores_, true));
        for (int64_t i = block.first; i < block.first + block.items; i++)
            kernels_->cores_gradient(*cores_, packed_.get(), nullptr, grad + i * cores_->rows, 1, grad_x + i * cores_->cols,
                                     nullptr, memory);
        return;
    }
    Job job = job_;
    job.grad = grad, job.grad_x = grad_x;
    kernels_->backward(job, block.width, block.first, block.items, scratch(kernels_->backward_scratch(job, block.width)));
}

void backward(const Kernels& kernels, const Plan& plan, const float* x, const float* xf, const float* wf,
              const float* grad, float* grad_x, float* grad_xf, float* grad_wf, int64_t batch, bool fft, int threads) {
    Job job{};
    job.plan = plan;
    job.x = x, job.xf = xf, job.wf = wf, job.grad = grad, job.grad_x = grad_x;
    const CachedSpectra spectra = fft ? go_by_fft(kernels, job) : nullptr;
    const int width = kernels.widths[1] && batch <= kernels.widths[1] ? kernels.widths[1] : kernels.widths[0];
    const int64_t bundle = width * kernels.bundle, bundles = (batch + bundle - 1) / bundle;
    // Their number depends on the batch alone, as the result does.
    const int64_t slices = std::max<int64_t>(1, std::min<int64_t>(8, bundles / 2));
    FactorGradients sums(job, width, slices, grad_xf, plan.m * plan.rank, grad_wf);
    in_parallel(slices, threads, [&](int64_t slice) {
        Job part = job;
        sums.begin(slice, part);
        float* memory = scratch(kernels.backward_scratch(part, width));
        for (int64_t i = bundles * slice / slices; i < bundles * (slice + 1) / slices; i++)
            kernels.backward(part, width, i * bundle, std::min<int64_t>(bundle, batch - i * bundle), memory);
    });
    sums.finish(kernels);
}

void csr(const Kernels& kernels, const float* values, const int32_t* columns, const int64_t* starts, int64_t rows,
         int64_t cols, int64_t entries, const float* bias, const float* x, float* y, int64_t batch, int threads) {
    bool valid = starts[0] == 0 && starts[rows] == entries;
    for (int64_t j = 0; j < rows; j++) valid &= starts[j] <= starts[j + 1];
    for (int64_t i = 0; i < entries; i++) valid &= uint32_t(columns[i]) < uint64_t(cols);
    if (!valid) throw std::invalid_argument("row starts must rise from 0 to the number of entries, columns lie within the matrix");
    const auto blocks = split(kernels, batch, true);
    in_parallel(int64_t(blocks.size()), threads, [&](int64_t i) {
        const Block& block = blocks[i];
        kernels.csr(values, columns, starts, rows, cols, bias, x + block.first * cols, y + block.first * rows, block.width,
                    block.items, scratch(kernels.csr_scratch(rows, cols, block.width)));
    });
}

void symbols(const Kernels& kernels, const Symbols& given, const float* x, float* y, int64_t batch, int threads) {
    float table[SYMBOL_LEVELS];
    Symbols s = given;
    if (s.table) {
        if (s.levels < 1 || s.levels > kernels.levels[1]) throw std::invalid_argument("too many shared values for this instruction set");
        std::fill(std::copy(s.table, s.table + s.levels, table), table + SYMBOL_LEVELS, std::numeric_limits<float>::quiet_NaN());
        s.table = table;
    }
    const auto weight = [&s](int64_t row, int64_t col) {
        const uint8_t symbol = s.symbols[row * s.cols + col];
        if (s.table) return symbol < s.levels ? s.table[symbol] : std::numeric_limits<float>::quiet_NaN();
        const float step = s.step[s.by_row ? row : 0];
        return s.least ? s.least[s.by_row ? row : 0] + step * float(symbol) : step * float(int8_t(symbol));
    };
    constexpr int64_t ROWS = 128;  // per task: enough to pay for the inputs' layout, few enough to balance the threads
    const int64_t parts = (s.rows + ROWS - 1) / ROWS, blocks = (batch + SYMBOL_ITEMS - 1) / SYMBOL_ITEMS;
    in_parallel(parts * blocks, threads, [&](int64_t i) {
        const int64_t item = i / parts * SYMBOL_ITEMS, row = i % parts * ROWS;
        const int64_t stop = std::min(row + ROWS, s.rows), items = std::min<int64_t>(SYMBOL_ITEMS, batch - item);
        uint32_t odd = kernels.symbols(s, x + item * s.cols, y + item * s.rows, items, row, stop,
                                       scratch(kernels.symbols_scratch(s.cols)));
        for (int64_t b = item; odd; b++, odd >>= 1)
            for (int64_t j = row; odd & 1 && j < stop; j++) {
                float sum = 0;
                for (int64_t q = 0; q < s.cols; q++) sum += x[b * s.cols + q] * weight(j, q);
                y[b * s.rows + j] = sum + (s.bias ? s.bias[j] : 0.0f);
            }
    });
}

}  // namespace deepthin
