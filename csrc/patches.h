// The items of a convolution: windows of images, read where they lie. Neighbouring positions are neighbours in memory, so that
// an entry of all lanes is one load for each row of outputs that the lanes touch.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace {

using deepthin::Patches;

// Lanes from `first[i]` on, up to those of the next run, read at `at[i]` + lane.
template <int W>
struct Runs {
    int count = 0;
    int64_t at[W];
    int first[W];

    Runs(const Patches& p, int64_t item, int64_t items) {
        int64_t image = item / p.positions, row = item % p.positions / p.row_outputs, column = item % p.row_outputs;
        for (int64_t lane = 0; lane < items; count++) {
            first[count] = int(lane);
            at[count] = image * p.image + p.row[row] + column - lane;
            lane += p.row_outputs - column;
            column = 0;
            if (++row * p.row_outputs == p.positions) row = 0, image++;
        }
    }
};

template <int W>
DEEPTHIN_INLINE typename Integers<W>::type lanes_from(int64_t first) {
    Vec<W> number;
    DEEPTHIN_UNROLL
    for (int i = 0; i < W; i++) number[i] = float(i);
    return number >= float(first);
}

// Entries of `items` windows, from some channel on -> cols x W; lanes without an item are zero. RUNS: their number as a
// constant, or 0.
template <int W, int RUNS>
void take_runs(const Patches& p, const Runs<W>& runs, int64_t items, int64_t first, int64_t cols, float* to) {
    const int count = RUNS ? RUNS : runs.count;
    typename Integers<W>::type from[W];
    for (int i = 1; i < count; i++) from[i] = lanes_from<W>(runs.first[i]);
    const auto empty = lanes_from<W>(items);
    for (int64_t channel = first; channel < first + cols / p.taps; channel++) {
        const float* images = p.images + channel * p.channel;
        for (int64_t t = 0; t < p.taps; t++, to += W) {
            const float* entry = images + p.tap[t];
            Vec<W> value = load<W>(entry + runs.at[0]);
            for (int i = 1; i < count; i++) value = from[i] ? load<W>(entry + runs.at[i]) : value;
            store<W>(to, empty ? Vec<W>{} : value);
        }
    }
}

template <int W>
void take_windows(const Patches& p, int64_t first, int64_t items, int64_t column, int64_t cols, float* to) {
    const int64_t channel = column / p.taps;
    const Runs<W> runs(p, first, items);
    switch (runs.count) {
        case 1: take_runs<W, 1>(p, runs, items, channel, cols, to); break;
        case 2: take_runs<W, 2>(p, runs, items, channel, cols, to); break;
        case 3: take_runs<W, 3>(p, runs, items, channel, cols, to); break;
        default: take_runs<W, 0>(p, runs, items, channel, cols, to);
    }
}

// Adds the gradients of the entries of windows from `column` on, cols x W, to the images. Entries beside a run have a zero added.
template <int W>
void add_windows(const Patches& p, int64_t first, int64_t items, int64_t column, int64_t cols, const float* from) {
    const Runs<W> runs(p, first, items);
    typename Integers<W>::type begin[W], end[W];
    for (int i = 0; i < runs.count; i++) {
        begin[i] = lanes_from<W>(runs.first[i]);
        end[i] = lanes_from<W>(i + 1 < runs.count ? runs.first[i + 1] : items);
    }
    for (int64_t channel = column / p.taps; channel < (column + cols) / p.taps; channel++) {
        float* images = p.grad_images + channel * p.channel;
        for (int64_t t = 0; t < p.taps; t++, from += W) {
            const Vec<W> value = load<W>(from);
            float* entry = images + p.tap[t];
            for (int i = 0; i < runs.count; i++) {
                float* to = entry + runs.at[i];
                store<W>(to, load<W>(to) + (begin[i] & ~end[i] ? value : Vec<W>{}));
            }
        }
    }
}

// Calls `work(offset in images of outputs, lane, lanes)` for the lanes of each image.
template <class Work>
DEEPTHIN_INLINE void by_images(const Patches& p, int64_t first, int64_t items, Work work) {
    for (int64_t lane = 0; lane < items;) {
        const int64_t image = (first + lane) / p.positions, position = (first + lane) % p.positions;
        const int64_t lanes = smaller(items - lane, p.positions - position);
        work(image * p.outputs + position, lane, lanes);
        lane += lanes;
    }
}

// rows x W -> images of `rows` channels.
template <int W>
void put_outputs(const Patches& p, const float* lanes, int64_t first, int64_t items, int64_t rows, float* images) {
    by_images(p, first, items, [&](int64_t offset, int64_t lane, int64_t count) DEEPTHIN_INLINED {
        float* to = images + offset;
        const float* from = lanes + lane;
        if (count == W)
            for (int64_t j = 0; j < rows; j++, from += W, to += p.positions) store<W>(to, load<W>(from));
        else
            for (int64_t j = 0; j < rows; j++, from += W, to += p.positions)
                for (int64_t i = 0; i < count; i++) to[i] = from[i];
    });
}

// Images of `rows` channels -> rows x W; lanes without an item are zero.
template <int W>
void take_outputs(const Patches& p, const float* images, int64_t first, int64_t items, int64_t rows, float* lanes) {
    if (items < W) __builtin_memset(lanes, 0, sizeof(float) * rows * W);
    by_images(p, first, items, [&](int64_t offset, int64_t lane, int64_t count) DEEPTHIN_INLINED {
        const float* from = images + offset;
        float* to = lanes + lane;
        if (count == W)
            for (int64_t j = 0; j < rows; j++, to += W, from += p.positions) store<W>(to, load<W>(from));
        else
            for (int64_t j = 0; j < rows; j++, to += W, from += p.positions)
                for (int64_t i = 0; i < count; i++) to[i] = from[i];
    });
}

}  // namespace
