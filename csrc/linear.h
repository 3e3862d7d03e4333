// Shared by products and layers made of them: memory, threads, and a prepared product for repeated use.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"

namespace deepthin {

struct Release {
    void operator()(float* memory) const;
};
using Memory = std::unique_ptr<float[], Release>;

Memory allocate(int64_t floats);  // 64-byte aligned; throws std::bad_alloc

// Working memory of the calling thread, reused from call to call.
float* scratch(int64_t floats);

// Calls `work(i)` for i < tasks on at most `threads` threads. The first exception is rethrown after all have ended.
void in_parallel(int64_t tasks, int threads, const std::function<void(int64_t)>& work);

struct Block {
    int64_t first, items;
    int width;  // lanes; 1: a single item
};

// The blocks of a batch: full ones, then the remainder, item by item if it is small and `alone` is set. Depends on the batch
// only.
std::vector<Block> split(const Kernels& kernels, int64_t batch, bool alone);

// One item in plain loops, for outputs that are not finite.
void exact(const Job& job, int64_t item);

// Whether the weight is a plain product of two factors: n is the fan-in, and it begins at entry 0.
inline bool is_plain_rank(const Plan& plan) { return plan.n == plan.cols && plan.offset == 0; }

// The same of a chain of cores.
void exact(const Cores&, const float* const* cores, const float* x, const float* bias, float scale, bool relu, float* y);

// The plan with pieces of a multiple of some number of inputs.
Plan in_pieces(Plan plan, int64_t multiple);

// The fastest transform of at least so many points. Cached for the life of the process.
const Transform& transform_of(const Kernels&, int64_t least);

using CachedSpectra = std::shared_ptr<const Memory>;

// The spectra of wf in a layout of Job: for one item per SIMD lane, or for a `single` item. Cached; the key is the value of wf.
CachedSpectra spectra_of(const Kernels&, const Plan&, const float* wf, const Transform&, bool single);

// Sets a job, of one item per SIMD lane, to go by FFT, unless the weight is a plain product of two factors. The job refers to
// the result.
CachedSpectra go_by_fft(const Kernels&, Job&);

// The gradients of xf and wf, summed over slices of a batch in memory of their own, then over the slices in their order: the
// result does not depend on threads. Those that are null are left out.
class FactorGradients {
  public:
    FactorGradients(const Job&, int width, int64_t slices, float* grad_xf, int64_t xf_floats, float* grad_wf);
    // Lets a job add to the sums of a slice, which are zero.
    void begin(int64_t slice, Job&);
    void finish(const Kernels&);

  private:
    const Job& job_;
    int width_;
    int64_t slices_, xf_floats_, wf_floats_;
    float *grad_xf_, *grad_wf_;
    Memory sums_xf_, sums_wf_;  // those of the first slice of xf are in grad_xf itself
};

// y = scale x W^T + bias, rectified if asked, prepared for the given blocks. `often`: the weight is used so often that packing
// it pays.
class Product {
  public:
    Product(const Kernels&, const Plan&, const float* xf, const float* wf, const float* bias, bool fft, float scale,
            bool relu, const std::vector<Block>& blocks, bool often);
    // scale x W^T + bias by a chain of cores.
    Product(const Kernels&, const Cores&, const float* const* from, const float* bias, float scale, bool relu);
    // x and y are those of the whole batch. May be called from several threads.
    void operator()(const Block& block, const float* x, float* y) const;

  private:
    const Kernels* kernels_;
    Job job_{};
    CachedSpectra spectra_, spectra1_;
    Memory packed_;
    const Cores* cores_ = nullptr;
    const float* const* from_ = nullptr;
};

// Gradients of the inputs of one product after another: grad W.
class InputGradient {
  public:
    InputGradient(const Kernels&, const Plan&, const float* xf, const float* wf, bool fft, const std::vector<Block>& blocks);
    InputGradient(const Kernels&, const Cores&, const float* const* from);
    void operator()(const Block& block, const float* grad, float* grad_x) const;

  private:
    const Kernels* kernels_;
    Job job_{};
    CachedSpectra spectra_;
    const Cores* cores_ = nullptr;
    Memory packed_;
};

}  // namespace deepthin
