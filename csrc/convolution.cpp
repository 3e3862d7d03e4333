// Convolutions by the product of their factors: images are padded once, and the kernels read windows of them as items.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "linear.h"

namespace deepthin {
namespace {

// A padded image: channels x depth x rows x residues of columns modulo the stride x columns. Windows of neighbouring outputs
// are then neighbours whatever the stride.
class Layout {
  public:
    explicit Layout(const Convolution& given) : c(given) {
        int64_t padded[3], outputs[3];
        for (int i = 0; i < 3; i++) {
            padded[i] = c.before[i] + c.size[i] + c.after[i];
            outputs[i] = (padded[i] - c.dilation[i] * (c.kernel[i] - 1) - 1) / c.stride[i] + 1;
        }
        columns = (padded[2] + c.stride[2] - 1) / c.stride[2];
        line = columns * c.stride[2];
        plane = padded[1] * line;
        channel = padded[0] * plane;
        floats = c.channels * channel;
        image = floats + 2 * PATCH_EDGE;
        for (int64_t i = 0; i < c.kernel[0]; i++)
            for (int64_t j = 0; j < c.kernel[1]; j++)
                for (int64_t k = 0; k < c.kernel[2]; k++)
                    taps.push_back(i * c.dilation[0] * plane + j * c.dilation[1] * line + column(k * c.dilation[2]));
        for (int64_t i = 0; i < outputs[0]; i++)
            for (int64_t j = 0; j < outputs[1]; j++) lines.push_back(i * c.stride[0] * plane + j * c.stride[1] * line);
        row_outputs = outputs[2];
        positions = outputs[0] * outputs[1] * outputs[2];
    }

    // Where a padded column lies in its line.
    int64_t column(int64_t index) const { return index % c.stride[2] * columns + index / c.stride[2]; }

    // Writes one image with its padding and its edges; `to` is its first float after the edge.
    void pad(const float* x, float* to) const {
        std::memset(to - PATCH_EDGE, 0, sizeof(float) * image);
        by_lines([&](int64_t from, int64_t at) {
            if (c.stride[2] == 1)
                std::memcpy(to + at + c.before[2], x + from, sizeof(float) * c.size[2]);
            else
                for (int64_t i = 0; i < c.size[2]; i++) to[at + column(c.before[2] + i)] = x[from + i];
        });
    }

    void crop(const float* from, float* x) const {
        by_lines([&](int64_t to, int64_t at) {
            for (int64_t i = 0; i < c.size[2]; i++) x[to + i] = from[at + column(c.before[2] + i)];
        });
    }

    Patches patches() const {
        return {nullptr, nullptr, image, channel, int64_t(taps.size()), taps.data(), row_outputs, positions, lines.data(),
                c.outputs * positions};
    }

    int64_t image, channel, row_outputs, positions;
    std::vector<int64_t> taps, lines;

  private:
    template <class Work>
    void by_lines(Work work) const {
        for (int64_t a = 0, from = 0; a < c.channels; a++)
            for (int64_t i = 0; i < c.size[0]; i++)
                for (int64_t j = 0; j < c.size[1]; j++, from += c.size[2])
                    work(from, a * channel + (c.before[0] + i) * plane + (c.before[1] + j) * line);
    }

    const Convolution& c;
    int64_t columns, line, plane, floats;
};

int64_t image_floats(const Convolution& c) { return c.channels * c.size[0] * c.size[1] * c.size[2]; }

// The product of each group of channels, and the spectra to which they refer.
struct Groups {
    std::vector<Job> jobs;
    CachedSpectra spectra;  // the same for all

    Groups(const Kernels& kernels, const Convolution& c, const Layout& layout, const float* xf, const float* wf, bool fft) {
        const int64_t rows = c.outputs / c.groups, cols = c.channels / c.groups * int64_t(layout.taps.size());
        for (int64_t g = 0; g < c.groups; g++) {
            const int64_t entry = c.offset + g * rows * cols;
            Job job{};
            job.plan = in_pieces(make_plan(rows, cols, c.n, c.rank, entry % c.n), int64_t(layout.taps.size()));
            job.xf = xf + entry / c.n * c.rank, job.wf = wf;
            if (fft && g == 0)
                spectra = go_by_fft(kernels, job);
            else if (spectra)
                job.lanes = jobs[0].lanes, job.spectra = jobs[0].spectra;
            jobs.push_back(job);
        }
    }
};

// Images that are padded at a time: enough positions to fill lanes and threads, few enough for the caches.
int64_t images_at_a_time(const Convolution& c, const Layout& layout) {
    constexpr int64_t POSITIONS = 256, FLOATS = 1 << 18;
    const int64_t images = std::max((POSITIONS + layout.positions - 1) / layout.positions, FLOATS / layout.image);
    return std::clamp<int64_t>(images, 1, std::max<int64_t>(c.batch, 1));
}

// An item with outputs that are not finite.
void exact_window(Job job, const Patches& patches, int64_t item) {
    const Plan& plan = job.plan;
    std::vector<float> window(plan.cols), outputs(plan.rows);
    const int64_t position = item % patches.positions;
    const float* from = patches.images + item / patches.positions * patches.image + patches.row[position / patches.row_outputs] +
                        position % patches.row_outputs;
    for (int64_t q = 0; q < plan.cols; q++) window[q] = from[q / patches.taps * patches.channel + patches.tap[q % patches.taps]];
    float* const y = job.y + item / patches.positions * patches.outputs + position;
    job.x = window.data(), job.y = outputs.data();
    exact(job, 0);
    for (int64_t j = 0; j < plan.rows; j++) y[j * patches.positions] = outputs[j];
}

}  // namespace

int64_t check_convolution(const Convolution& c) {
    const auto within = [](int64_t value) { return 0 < value && value < int64_t(1) << 24; };
    bool valid = c.batch >= 0 && within(c.channels) && within(c.outputs) && within(c.groups) && c.channels % c.groups == 0 &&
                 c.outputs % c.groups == 0 && within(c.n) && within(c.rank) && c.offset >= 0 && c.offset < c.n;
    double floats = double(std::max<int64_t>(c.batch, 1)), outputs = floats, cols = double(c.channels);
    int64_t positions = 1;
    for (int i = 0; valid && i < 3; i++) {
        valid = within(c.size[i]) && within(c.kernel[i]) && within(c.stride[i]) && within(c.dilation[i]) && c.before[i] >= 0 &&
                c.after[i] >= 0 && within(c.before[i] + 1) && within(c.after[i] + 1);
        if (!valid) break;
        const int64_t padded = c.before[i] + c.size[i] + c.after[i], reach = c.dilation[i] * (c.kernel[i] - 1) + 1;
        valid = padded >= reach;
        positions *= valid ? (padded - reach) / c.stride[i] + 1 : 1;
        floats *= double(padded + c.stride[i]), outputs *= double(padded), cols *= double(c.kernel[i]);
    }
    const double most = double(int64_t(1) << 48);
    if (!valid || floats * double(c.channels) > most || outputs * double(c.outputs) > most || cols > double(1 << 30))
        throw std::invalid_argument("a convolution of no possible sizes, or one that is too large");
    return positions;
}

void convolve(const Kernels& kernels, const Convolution& c, const float* x, const float* xf, const float* wf, const float* bias,
              float* y, bool fft, float scale, int threads) {
    const Layout layout(c);
    const Groups groups(kernels, c, layout, xf, wf, fft);
    const int64_t most = images_at_a_time(c, layout);
    Memory padded = allocate(most * layout.image);
    Patches patches = layout.patches();
    patches.images = padded.get() + PATCH_EDGE;
    for (int64_t first = 0; first < c.batch; first += most) {
        const int64_t images = std::min(most, c.batch - first);
        in_parallel(images, threads, [&](int64_t i) {
            layout.pad(x + (first + i) * image_floats(c), padded.get() + i * layout.image + PATCH_EDGE);
        });
        const auto blocks = split(kernels, images * layout.positions, false);
        in_parallel(int64_t(blocks.size()) * c.groups, threads, [&](int64_t task) {
            const Block& block = blocks[task / c.groups];
            const int64_t g = task % c.groups;
            Job job = groups.jobs[g];
            Patches group = patches;
            group.images += g * (c.channels / c.groups) * layout.channel;
            job.patches = &group, job.scale = scale, job.bias = bias ? bias + g * job.plan.rows : nullptr;
            job.y = y + first * patches.outputs + g * job.plan.rows * layout.positions;
            uint32_t odd =
                kernels.forward(job, block.width, block.first, block.items, scratch(kernels.forward_scratch(job, block.width)));
            for (int64_t i = block.first; odd; i++, odd >>= 1)
                if (odd & 1) exact_window(job, group, i);
        });
    }
}

void convolve_backward(const Kernels& kernels, const Convolution& c, const float* x, const float* xf, const float* wf,
                       const float* grad, float* grad_x, float* grad_xf, float* grad_wf, bool fft, int threads) {
    const Layout layout(c);
    const Groups groups(kernels, c, layout, xf, wf, fft);
    const Plan& plan = groups.jobs[0].plan;
    const int64_t items = c.batch * layout.positions;
    const int width = kernels.widths[1] && items <= kernels.widths[1] ? kernels.widths[1] : kernels.widths[0];
    const int64_t bundle = width * kernels.bundle;
    // Of whole images; their number depends on the batch alone, as the result does.
    const int64_t slices = std::clamp<int64_t>(std::min(c.batch, items / (2 * bundle)), 1, 8);
    const int64_t xf_rows = (c.offset + c.outputs * plan.cols + c.n - 1) / c.n;
    FactorGradients sums(groups.jobs[0], width, slices, grad_xf, xf_rows * c.rank, grad_wf);
    in_parallel(slices, threads, [&](int64_t slice) {
        Job part{};
        sums.begin(slice, part);
        const int64_t stop = c.batch * (slice + 1) / slices, most = images_at_a_time(c, layout);
        Memory padded = allocate(grad_xf || grad_wf ? most * layout.image : 0), back = allocate(grad_x ? most * layout.image : 0);
        Patches patches = layout.patches();
        patches.images = padded.get() + PATCH_EDGE, patches.grad_images = back.get() + PATCH_EDGE;
        for (int64_t first = c.batch * slice / slices; first < stop; first += most) {
            const int64_t images = std::min(most, stop - first);
            for (int64_t i = 0; (grad_xf || grad_wf) && i < images; i++)
                layout.pad(x + (first + i) * image_floats(c), padded.get() + i * layout.image + PATCH_EDGE);
            if (grad_x) std::memset(back.get(), 0, sizeof(float) * images * layout.image);
            for (int64_t g = 0; g < c.groups; g++) {
                Job job = groups.jobs[g];
                Patches group = patches;
                const int64_t skipped = g * (c.channels / c.groups) * layout.channel;
                group.images += skipped, group.grad_images += skipped;
                job.patches = &group;
                job.grad = grad + first * patches.outputs + g * job.plan.rows * layout.positions;
                job.grad_x = grad_x ? group.grad_images : nullptr;
                job.grad_xf = grad_xf ? part.grad_xf + (job.xf - xf) : nullptr;
                job.grad_wf = part.grad_wf;
                float* memory = scratch(kernels.backward_scratch(job, width));
                for (int64_t i = 0; i < images * layout.positions; i += bundle)
                    kernels.backward(job, width, i, std::min(bundle, images * layout.positions - i), memory);
            }
            for (int64_t i = 0; grad_x && i < images; i++)
                layout.crop(back.get() + i * layout.image + PATCH_EDGE, grad_x + (first + i) * image_floats(c));
        }
    });
    sums.finish(kernels);
}

}  // namespace deepthin
