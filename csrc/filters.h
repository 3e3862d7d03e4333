// Spectra of the filters (the rows of wf) in the layouts that Job describes.
#pragma once
#include "fft.h"
#include "single.h"

namespace {

// `sequence(l, i)` is entry i of lane l; see forward_spectrum.
template <int W, class Sequence>
void transform_scalars(const Transform& plan, Sequence sequence, float* data) {
    for (int64_t i = 0; i < plan.points; i++)
        for (int l = 0; l < W; l++) {
            data[i * 2 * W + l] = sequence(l, i);
            data[i * 2 * W + W + l] = sequence(l, i + plan.points);
        }
    forward_levels<W>(plan, data, plan.points, 0, 1, 0);
}

void spectra(const Plan& plan, const float* wf, const Transform& transform, float* out, float* scratch) {
    constexpr int W = SINGLE;
    const int64_t n = plan.n, points = transform.points;
    for (int64_t a = 0; a < plan.rank; a += W) {
        const int64_t filters = smaller(W, plan.rank - a);
        transform_scalars<W>(
            transform,
            [=](int l, int64_t i) { return l < filters && i < n ? wf[(a + l) * n + n - 1 - i] / float(points) : 0.0f; },
            scratch);
        for (int64_t l = 0; l < filters; l++)
            for (int64_t f = 0; f < points * 2; f++) out[(a + l) * points * 2 + f] = scratch[f * W + l];
    }
}

void spectra1(const Plan& plan, const float* wf, const Transform& transform, float* out, float* scratch) {
    constexpr int W = SINGLE;
    const int64_t n = plan.n, points = transform.points;
    for (int64_t a = 0; a < plan.rank; a++)
        for (int part = 0; part < 2; part++) {  // shifts 1 - W .. 0, then 1 .. W
            transform_scalars<W>(
                transform,
                [=](int l, int64_t i) {
                    const int64_t t = i * W + l + part * W - (W - 1);
                    return 0 <= t && t < n ? wf[a * n + n - 1 - t] / float(points) : 0.0f;
                },
                scratch);
            for (int64_t f = 0; f < points; f++)
                for (int side = 0; side < 2; side++)
                    __builtin_memcpy(out + ((a * points + f) * 2 + side) * 2 * W + part * W, scratch + (f * 2 + side) * W,
                                     sizeof(float) * W);
        }
}

}  // namespace
