// One pass over memory each. Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace deepthin {
namespace {

constexpr float kRound = 12582912.0f;

inline float nearest(float symbol, float top) {
    const float within = std::min(std::max(symbol, -top), top);
    return (within + kRound) - kRound;
}

}  // namespace

void quantize(const float* latents, int64_t count, float step, int top, float* values, float* residual) {
    for (int64_t i = 0; i < count; i++) {
        const float symbol = latents[i] / step, rounded = nearest(symbol, float(top));
        values[i] = rounded * step;
        residual[i] = rounded - symbol;
    }
}

void count_symbols(const float* latents, int64_t count, float step, int top, int64_t* counts) {
    constexpr int kTables = 4;  // equal symbols in a row then do not wait for each other
    const int symbols = 2 * top + 1;
    std::vector<int64_t> tables(std::size_t(kTables * symbols));
    for (int64_t i = 0; i < count; i++) {
        const float symbol = latents[i] / step;
        if (std::isnan(symbol)) continue;
        tables[std::size_t((i % kTables) * symbols + int(nearest(symbol, float(top))) + top)]++;
    }
    for (int k = 0; k < symbols; k++)
        counts[k] = tables[std::size_t(k)] + tables[std::size_t(symbols + k)] + tables[std::size_t(2 * symbols + k)] +
                    tables[std::size_t(3 * symbols + k)];
}

double code_slopes(const float* latents, int64_t count, float step, int top, const float* rise, float scale, float* slopes) {
    const float over = scale / step, most = float(top);
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        const float symbol = latents[i] / step;
        if (!(std::fabs(symbol) <= most)) {
            slopes[i] = 0;
            continue;
        }
        int below = int(symbol);
        below -= float(below) > symbol;
        const float slope = rise[std::min(below, top - 1) + top];
        slopes[i] = slope * over;
        sum += double(slope) * double(symbol);
    }
    return double(scale) * sum;
}

}  // namespace deepthin
