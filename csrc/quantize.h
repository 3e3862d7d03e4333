// Numbers as multiples of a step: rounding, how often each symbol occurs, and the slope of the code length.
#pragma once

#include <cstdint>

namespace deepthin {

constexpr int kMostSymbol = 127;

// values[i] = step * r and residual[i] = r - s, with s = latents[i] / step and r the nearest integer within -top..top.
void quantize(const float* latents, int64_t count, float step, int top, float* values, float* residual);

// counts[k] numbers have the symbol k - top, for k from 0 to 2 top.
void count_symbols(const float* latents, int64_t count, float step, int top, int64_t* counts);

// slopes[i] = scale * rise[k] / step, with k - top the integer below s; 0 beyond the largest symbol. Returns the sum of
// scale * rise[k] * s.
double code_slopes(const float* latents, int64_t count, float step, int top, const float* rise, float scale, float* slopes);

}  // namespace deepthin
