// What products share with the layers that are made of them: memory, threads, and a product that is used again and again.
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

// `work(i)` for i < tasks, on so many threads at most. What one of them throws is thrown here, in the end.
void in_parallel(int64_t tasks, int threads, const std::function<void(int64_t)>& work);

struct Block {
    int64_t first, items;
    int width;  // lanes; 1: a single item
};

// The blocks of a batch: full ones, then what is left over; with `alone`, one by one if it is little. Depends on the batch
// alone.
std::vector<Block> split(const Kernels& kernels, int64_t batch, bool alone);

// Of at least so many points, the fastest length that is not much larger. Cached for the life of the process.
const Transform& transform_of(int64_t least);

using CachedSpectra = std::shared_ptr<const Memory>;

// The spectra of wf in a layout of Job: for one item per SIMD lane, or for a `single` item. Cached; the key is the value of wf.
CachedSpectra spectra_of(const Kernels&, const Plan&, const float* wf, const Transform&, bool single);

// y = scale x W^T + bias, rectified if asked, all set for blocks like those that it is made for. `often`: each of them meets
// the weight so many times that it pays to lay it out anew.
class Product {
  public:
    Product(const Kernels&, const Plan&, const float* xf, const float* wf, const float* bias, bool fft, float scale,
            bool relu, const std::vector<Block>& blocks, bool often);
    // x and y are those of the whole batch. May be called from several threads.
    void operator()(const Block& block, const float* x, float* y) const;

  private:
    const Kernels* kernels_;
    Job job_{};
    CachedSpectra spectra_, spectra1_;
    Memory packed_;
};

// Gradients of the inputs of one product after another: grad W.
class InputGradient {
  public:
    InputGradient(const Kernels&, const Plan&, const float* xf, const float* wf, bool fft, const std::vector<Block>& blocks);
    void operator()(const Block& block, const float* grad, float* grad_x) const;

  private:
    const Kernels* kernels_;
    Job job_{};
    CachedSpectra spectra_;
};

}  // namespace deepthin
