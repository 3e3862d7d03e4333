// Products with a matrix in compressed sparse rows, for comparison.
#pragma once
#include "vector.h"

namespace {

void csr_single(const float* values, const int32_t* columns, const int64_t* starts, int64_t rows, const float* bias,
                const float* x, float* y) {
    for (int64_t j = 0; j < rows; j++) {
        float sum[4] = {};
        int64_t i = starts[j];
        for (; i + 4 <= starts[j + 1]; i += 4) {
            DEEPTHIN_UNROLL
            for (int k = 0; k < 4; k++) sum[k] += values[i + k] * x[columns[i + k]];
        }
        for (; i < starts[j + 1]; i++) sum[0] += values[i] * x[columns[i]];
        y[j] = (sum[0] + sum[1]) + (sum[2] + sum[3]) + (bias ? bias[j] : 0.0f);
    }
}

template <int W>
void csr_block(const float* values, const int32_t* columns, const int64_t* starts, int64_t rows, int64_t cols,
               const float* bias, const float* x, float* y, int64_t items, float* scratch) {
    float *lanes = scratch, *out = scratch + cols * W;
    rows_to_lanes<W>(x, cols, items, cols, lanes);
    for (int64_t j = 0; j < rows; j++) {
        Vec<W> sum[4] = {};
        int64_t i = starts[j];
        for (; i + 4 <= starts[j + 1]; i += 4) {
            DEEPTHIN_UNROLL
            for (int k = 0; k < 4; k++) sum[k] += load<W>(lanes + columns[i + k] * W) * values[i + k];
        }
        for (; i < starts[j + 1]; i++) sum[0] += load<W>(lanes + columns[i] * W) * values[i];
        Vec<W> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        if (bias) total += bias[j];
        store<W>(out + j * W, total);
    }
    lanes_to_rows<W>(out, rows, items, rows, y);
}

}  // namespace
