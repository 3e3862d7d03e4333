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
    std::printf("%s: largest error over the largest number %.2g\n", kernels.name, worst);
    return worst < 1e-4 ? 0 : 1;
}
