// The kernels of one machine against plain loops in double precision, without Python: for cross compilers and emulators.
// `make portable` runs it for 64-bit ARM under QEMU. Prints the largest errors; exit code 1 if one is out of bounds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/kernels.h"

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

// The largest difference over the largest number.
static double error(const Floats& got, const Doubles& want) {
    double size = 1e-30, worst = 0;
    for (std::size_t i = 0; i < want.size(); i++) {
        size = std::max(size, std::fabs(want[i]));
        worst = std::max(worst, std::fabs(got[i] - want[i]));
    }
    return worst / size;
}

// W[j, q] of a matrix.
static double weight(const deepthin::Gate& gate, int64_t j, int64_t q) {
    const int64_t entry = gate.plan.offset + j * gate.plan.cols + q, rank = gate.plan.rank;
    double sum = 0;
    for (int64_t a = 0; a < rank; a++)
        sum += double(gate.xf[entry / gate.plan.n * rank + a]) * gate.wf[a * gate.plan.n + entry % gate.plan.n];
    return sum;
}

// A layer of LSTM cells in one direction, from states of zero.
static Doubles lstm(const deepthin::Recurrent& shape, const Doubles& x) {
    const int64_t hidden = shape.hidden, inputs = shape.inputs;
    Doubles y(shape.steps * shape.batch * hidden), h(shape.batch * hidden), c(h.size()), sums(4 * hidden);
    const auto sigmoid = [](double value) { return 1 / (1 + std::exp(-value)); };
    for (int64_t t = 0; t < shape.steps; t++)
        for (int64_t b = 0; b < shape.batch; b++) {
            for (int64_t j = 0; j < 4 * hidden; j++) {
                sums[j] = 0;
                for (int64_t q = 0; q < inputs; q++) sums[j] += weight(shape.gates[0], j, q) * x[(t * shape.batch + b) * inputs + q];
                for (int64_t q = 0; q < hidden; q++) sums[j] += weight(shape.gates[1], j, q) * h[b * hidden + q];
            }
            for (int64_t k = 0; k < hidden; k++) {
                double& state = c[b * hidden + k];
                state = sigmoid(sums[hidden + k]) * state + sigmoid(sums[k]) * std::tanh(sums[2 * hidden + k]);
                h[b * hidden + k] = sigmoid(sums[3 * hidden + k]) * std::tanh(state);
            }
            std::copy_n(&h[b * hidden], hidden, &y[(t * shape.batch + b) * hidden]);
        }
    return y;
}

int main() {
    const deepthin::Kernels& kernels = *deepthin::find_kernels(nullptr);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const auto pick = [&](int least, int most) { return int64_t(least + random() % (most - least + 1)); };
    const auto draw = [&](int64_t count) {
        Floats values(count);
        for (float& value : values) value = normal(random);
        return values;
    };
    double worst = 0;
    for (int turn = 0; turn < 1000; turn++) {
        const int64_t rows = pick(1, 60), cols = pick(1, 60), batch = pick(1, 40), rank = turn % 3 ? 1 : pick(1, 18);
        const int64_t n = turn % 8 ? pick(1, 80) : cols, offset = turn % 2 ? pick(0, int(n) - 1) : 0;
        const auto plan = deepthin::make_plan(rows, cols, n, rank, offset);
        const Floats x = draw(batch * cols), xf = draw(plan.m * rank), wf = draw(rank * n), grad = draw(batch * rows);
        Doubles y(batch * rows), grad_x(x.size()), grad_xf(xf.size()), grad_wf(wf.size());
        for (int64_t b = 0; b < batch; b++)
            for (int64_t j = 0; j < rows; j++)
                for (int64_t q = 0; q < cols; q++) {
                    const int64_t entry = offset + j * cols + q, row = entry / n * rank, at = entry % n;
                    const double value = x[b * cols + q], back = grad[b * rows + j];
                    for (int64_t a = 0; a < rank; a++) {
                        const double left = xf[row + a], right = wf[a * n + at];
                        y[b * rows + j] += left * right * value;
                        grad_x[b * cols + q] += left * right * back;
                        grad_xf[row + a] += right * value * back;
                        grad_wf[a * n + at] += left * value * back;
                    }
                }
        for (const bool fft : {false, true}) {
            Floats out(y.size()), out_x(x.size()), out_xf(xf.size()), out_wf(wf.size());
            deepthin::forward(kernels, plan, x.data(), xf.data(), wf.data(), nullptr, out.data(), batch, fft, 1, false, 2);
            deepthin::backward(kernels, plan, x.data(), xf.data(), wf.data(), grad.data(), out_x.data(), out_xf.data(),
                               out_wf.data(), batch, fft, 2);
            worst = std::max({worst, error(out, y), error(out_x, grad_x), error(out_xf, grad_xf), error(out_wf, grad_wf)});
        }
    }
    for (int turn = 0; turn < 100; turn++) {
        const int64_t steps = pick(1, 6), batch = pick(1, 20), inputs = pick(1, 20), hidden = pick(1, 20);
        std::vector<Floats> numbers;
        deepthin::Gate gates[2] = {};
        for (int i = 0; i < 2; i++) {
            const auto plan = deepthin::make_plan(4 * hidden, i ? hidden : inputs, pick(1, 30), 1, 0);
            numbers.push_back(draw(plan.m));
            numbers.push_back(draw(plan.n));
            gates[i].plan = plan, gates[i].fft = gates[i].fft_gradient = turn % 2;
        }
        for (int i = 0; i < 2; i++) gates[i].xf = numbers[2 * i].data(), gates[i].wf = numbers[2 * i + 1].data();
        const deepthin::Recurrent shape{deepthin::Cell::lstm, steps, batch, inputs, hidden, 1, 1, gates};
        const Floats x = draw(steps * batch * inputs), grad_y = draw(steps * batch * hidden), start(batch * hidden);
        Floats h = start, c = start, y(grad_y.size()), reserve(deepthin::recurrent_reserve(shape));
        deepthin::recurrent(kernels, shape, x.data(), h.data(), c.data(), y.data(), reserve.data(), 2);
        const Doubles exact(x.begin(), x.end());
        worst = std::max(worst, error(y, lstm(shape, exact)));
        Floats grad_x(x.size()), grad_h(start), grad_c(start);
        deepthin::recurrent_backward(kernels, shape, x.data(), start.data(), start.data(), y.data(), reserve.data(),
                                     grad_y.data(), grad_x.data(), grad_h.data(), grad_c.data(), 2);
        const int64_t place = pick(0, int(x.size()) - 1);  // one of the gradients, by a difference
        Doubles ends[2];
        for (int side = 0; side < 2; side++) {
            Doubles moved = exact;
            moved[place] += side ? -1e-5 : 1e-5;
            ends[side] = lstm(shape, moved);
        }
        double want = 0, size = 1;
        for (std::size_t i = 0; i < grad_y.size(); i++) want += grad_y[i] * (ends[0][i] - ends[1][i]) / 2e-5;
        for (float value : grad_x) size = std::max(size, double(std::fabs(value)));
        worst = std::max(worst, std::fabs(want - grad_x[place]) / size);
    }
    for (int turn = 0; turn < 200; turn++) {  // convolutions of images with zeros around them
        const int64_t groups = pick(1, 2), batch = pick(1, 4), inputs = groups * pick(1, 4), outputs = groups * pick(1, 12);
        deepthin::Convolution c{batch, inputs, outputs, groups, {1, pick(3, 9), pick(3, 9)}, {1, pick(1, 3), pick(1, 3)},
                                {1, pick(1, 2), pick(1, 3)}, {1, 1, 1}, {0, pick(0, 2), pick(0, 2)}, {0, pick(0, 2), pick(0, 2)},
                                pick(1, 30), pick(1, 3), 0};
        c.offset = pick(0, int(c.n) - 1);
        const int64_t positions = deepthin::check_convolution(c), taps = c.kernel[1] * c.kernel[2], cols = inputs / groups * taps;
        const int64_t m = (c.offset + outputs * cols + c.n - 1) / c.n, image = c.size[1] * c.size[2];
        const int64_t across = (c.before[2] + c.size[2] + c.after[2] - c.kernel[2]) / c.stride[2] + 1;
        const Floats x = draw(batch * inputs * image), xf = draw(m * c.rank), wf = draw(c.rank * c.n);
        const Floats grad = draw(batch * outputs * positions);
        Doubles y(grad.size()), grad_x(x.size()), grad_xf(xf.size()), grad_wf(wf.size());
        for (int64_t b = 0; b < batch; b++)
            for (int64_t j = 0; j < outputs; j++)
                for (int64_t p = 0; p < positions; p++)
                    for (int64_t q = 0; q < cols; q++) {
                        const int64_t channel = j / (outputs / groups) * (inputs / groups) + q / taps;
                        const int64_t row = p / across * c.stride[1] + q % taps / c.kernel[2] - c.before[1];
                        const int64_t column = p % across * c.stride[2] + q % c.kernel[2] - c.before[2];
                        if (row < 0 || row >= c.size[1] || column < 0 || column >= c.size[2]) continue;
                        const int64_t place = (b * inputs + channel) * image + row * c.size[2] + column;
                        const int64_t output = (b * outputs + j) * positions + p, entry = c.offset + j * cols + q;
                        for (int64_t a = 0; a < c.rank; a++) {
                            const int64_t left_at = entry / c.n * c.rank + a, right_at = a * c.n + entry % c.n;
                            const double left = xf[left_at], right = wf[right_at], value = x[place], back = grad[output];
                            y[output] += left * right * value;
                            grad_x[place] += left * right * back;
                            grad_xf[left_at] += right * value * back;
                            grad_wf[right_at] += left * value * back;
                        }
                    }
        for (const bool fft : {false, true}) {
            Floats out(y.size()), out_x(x.size()), out_xf(xf.size()), out_wf(wf.size());
            deepthin::convolve(kernels, c, x.data(), xf.data(), wf.data(), nullptr, out.data(), fft, 1, 2);
            deepthin::convolve_backward(kernels, c, x.data(), xf.data(), wf.data(), grad.data(), out_x.data(), out_xf.data(),
                                        out_wf.data(), fft, 2);
            worst = std::max({worst, error(out, y), error(out_x, grad_x), error(out_xf, grad_xf), error(out_wf, grad_wf)});
        }
    }
    std::printf("%s: largest error over the largest number %.2g\n", kernels.name, worst);
    return worst < 1e-4 ? 0 : 1;
}
