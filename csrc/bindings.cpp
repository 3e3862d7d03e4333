// Python bindings: they take addresses and lengths that deepthin.kernels has checked, check the plan, and release the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "huffman.h"
#include "kernels.h"
#include "python.h"
#include "quantize.h"

namespace nb = nanobind;
using deepthin::Kernels;
using deepthin::Plan;
using deepthin::python::at, deepthin::python::check_batch, deepthin::python::kernels;

namespace {

// The layers of a recurrent network, from numbers and addresses.
struct Layers {
    Layers(int cell, int64_t steps, int64_t batch, int64_t inputs, int64_t hidden, int64_t layers, int64_t directions,
           const std::vector<int64_t>& plans, const std::vector<std::uintptr_t>& parts, nb::list chains,
           const std::vector<std::vector<std::uintptr_t>>& cores) {
        const auto within = [](int64_t value) { return 0 < value && value < int64_t(1) << 31; };
        if (cell < 0 || cell > 3 || !within(steps) || !within(batch) || !within(inputs) || !within(hidden) || !within(layers) ||
            directions < 1 || directions > 2 || plans.size() != std::size_t(14 * layers * directions) ||
            parts.size() != std::size_t(12 * layers * directions) || nb::len(chains) != cores.size() ||
            (!cores.empty() && cores.size() != std::size_t(2 * layers * directions)))
            throw std::invalid_argument("the layers are empty or too large, or not all of their matrices are given");
        shape = {deepthin::Cell(cell), steps, batch, inputs, hidden, layers, directions, nullptr};
        const int64_t rows = deepthin::gates_of(shape.cell) * hidden;
        if (steps * batch > (int64_t(1) << 50) / (rows * layers * 4)) throw std::invalid_argument("the batch is too large");
        for (int64_t i = 0; i < 2 * layers * directions; i++) {
            const int64_t* numbers = &plans[7 * i];
            const std::uintptr_t* part = &parts[6 * i];
            const int64_t cols = i % 2 ? hidden : i < 2 * directions ? inputs : directions * hidden;
            if (numbers[0] != rows || numbers[1] != cols) throw std::invalid_argument("a matrix has another shape than its layer");
            gates.push_back({deepthin::make_plan(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]),
                             at<const float>(part[0]), at<const float>(part[1]), at<const float>(part[2]), numbers[5] != 0,
                             numbers[6] != 0, at<float>(part[3]), at<float>(part[4]), at<float>(part[5]), nullptr, {}, {}});
            if (cores.empty() || chains[i].is_none()) continue;
            deepthin::Gate& gate = gates.back();
            gate.cores = nb::cast<const deepthin::Cores*>(chains[i]);
            const std::size_t count = gate.cores->count;
            if (gate.cores->rows != rows || gate.cores->cols != cols || (cores[i].size() != count && cores[i].size() != 2 * count))
                throw std::invalid_argument("a chain has another shape than its matrix, or not all of its cores are given");
            for (std::size_t k = 0; k < count; k++) gate.core[k] = at<const float>(cores[i][k]);
            for (std::size_t k = count; k < cores[i].size(); k++) gate.grad_core[k - count] = at<float>(cores[i][k]);
        }
        shape.gates = gates.data();
    }
    Layers(const Layers&) = delete;

    std::vector<deepthin::Gate> gates;
    deepthin::Recurrent shape;
};

// Numbers: batch, channels, outputs, groups, n, rank, offset, then for each of depth, height and width size, kernel, stride,
// dilation, and zeros before and after.
deepthin::Convolution convolution(const std::vector<int64_t>& numbers) {
    if (numbers.size() != 25) throw std::invalid_argument("a convolution has 25 numbers");
    deepthin::Convolution c{numbers[0], numbers[1], numbers[2], numbers[3], {}, {}, {}, {}, {}, {}, numbers[4], numbers[5], numbers[6]};
    for (int i = 0; i < 3; i++) {
        const int64_t* axis = &numbers[7 + 6 * i];
        c.size[i] = axis[0], c.kernel[i] = axis[1], c.stride[i] = axis[2], c.dilation[i] = axis[3];
        c.before[i] = axis[4], c.after[i] = axis[5];
    }
    deepthin::check_convolution(c);
    return c;
}

// Addresses of as many cores as a chain has.
template <class T>
std::vector<T*> of_cores(const deepthin::Cores& cores, const std::vector<std::uintptr_t>& addresses) {
    if (addresses.size() != std::size_t(cores.count)) throw std::invalid_argument("a chain needs all of its cores");
    std::vector<T*> pointers;
    for (const std::uintptr_t address : addresses) pointers.push_back(at<T>(address));
    return pointers;
}

void check_items(const deepthin::Cores& cores, int64_t batch) {
    if (batch < 0 || batch > (int64_t(1) << 58) / (cores.rows > cores.cols ? cores.rows : cores.cols))
        throw std::invalid_argument("the batch is negative or too large");
}

void check_code(int kind, int64_t bytes, int64_t count, int64_t parameter) {
    if (kind < 0 || kind > 2 || bytes < 0 || count < 0 || parameter < 0 || (kind == 1 && (parameter < 1 || parameter > 12)))
        throw std::invalid_argument("integers of no possible number, stride or width");
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // models may live until the process ends
    m.doc() = "Compiled kernels. Use them through deepthin.kernels, which checks what is handed over.";
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("isas", [] {
        nb::list result;
        for (const char* name : {"v2", "v3", "v4", "baseline"})
            if (deepthin::find_kernels(name)) result.append(name);
        return result;
    });
    m.def("select", [](const std::string& name) {
        const Kernels* result = deepthin::find_kernels(name.empty() ? nullptr : name.c_str());
        if (result) deepthin::python::chosen = result;
        return result != nullptr;
    });
    m.def("width", [] { return kernels().widths[0]; });
    deepthin::python::bind_torch(m);
    m.def("use_openmp", [](std::uintptr_t address) { deepthin::use_openmp(reinterpret_cast<deepthin::OpenMpParallel>(address)); });
    m.def("same_bytes", [](std::uintptr_t a, std::uintptr_t b, std::size_t bytes) {
        return std::memcmp(at<const void>(a), at<const void>(b), bytes) == 0;
    });
    m.def("fail_allocation_after", &deepthin::fail_allocation_after);
    m.def(
        "forward",
        [](int64_t rows, int64_t cols, int64_t n, int64_t rank, int64_t offset, std::uintptr_t x, std::uintptr_t xf,
           std::uintptr_t wf, std::uintptr_t bias, std::uintptr_t y, int64_t batch, bool fft, bool relu, int threads) {
            const Plan plan = deepthin::make_plan(rows, cols, n, rank, offset);
            check_batch(plan, batch);
            const Kernels& set = kernels();
            nb::gil_scoped_release unlocked;
            deepthin::forward(set, plan, at<const float>(x), at<const float>(xf), at<const float>(wf),
                              at<const float>(bias), at<float>(y), batch, fft, 1.0f, relu, threads);
        });
    m.def("backward", [](int64_t rows, int64_t cols, int64_t n, int64_t rank, int64_t offset, std::uintptr_t x,
                         std::uintptr_t xf, std::uintptr_t wf, std::uintptr_t grad, std::uintptr_t grad_x,
                         std::uintptr_t grad_xf, std::uintptr_t grad_wf, int64_t batch, bool fft, int threads) {
        const Plan plan = deepthin::make_plan(rows, cols, n, rank, offset);
        check_batch(plan, batch);
        const Kernels& set = kernels();
        nb::gil_scoped_release unlocked;
        deepthin::backward(set, plan, at<const float>(x), at<const float>(xf), at<const float>(wf), at<const float>(grad),
                           at<float>(grad_x), at<float>(grad_xf), at<float>(grad_wf), batch, fft, threads);
    });
    // `numbers`: for each core its rank, rows, cols and next rank, and the distances of entries along these axes.
    nb::class_<deepthin::Cores>(m, "Cores")
        .def("__init__",
             [](deepthin::Cores* self, int64_t rows, int64_t cols, const std::vector<int64_t>& numbers) {
                 if (numbers.size() % 8) throw std::invalid_argument("a core has 8 numbers");
                 new (self) deepthin::Cores(deepthin::make_cores(rows, cols, numbers.data(), int64_t(numbers.size() / 8)));
             })
        .def("forward",
             [](const deepthin::Cores& cores, const std::vector<std::uintptr_t>& addresses, std::uintptr_t x, std::uintptr_t bias,
                std::uintptr_t y, int64_t batch, float scale, int threads) {
                 check_items(cores, batch);
                 const auto from = of_cores<const float>(cores, addresses);
                 const Kernels& set = kernels();
                 nb::gil_scoped_release unlocked;
                 deepthin::cores_forward(set, cores, from.data(), at<const float>(x), at<const float>(bias), at<float>(y), batch,
                                         scale, false, threads);
             })
        .def("backward", [](const deepthin::Cores& cores, const std::vector<std::uintptr_t>& addresses, std::uintptr_t x,
                            std::uintptr_t grad, std::uintptr_t grad_x, const std::vector<std::uintptr_t>& grads, int64_t batch,
                            float scale, int threads) {
            check_items(cores, batch);
            const auto from = of_cores<const float>(cores, addresses);
            const auto to = grads.empty() ? std::vector<float*>() : of_cores<float>(cores, grads);
            const Kernels& set = kernels();
            nb::gil_scoped_release unlocked;
            deepthin::cores_backward(set, cores, from.data(), at<const float>(x), at<const float>(grad), at<float>(grad_x),
                                     to.empty() ? nullptr : to.data(), batch, scale, threads);
        });
    m.def("convolve", [](const std::vector<int64_t>& numbers, std::uintptr_t x, std::uintptr_t xf, std::uintptr_t wf,
                         std::uintptr_t bias, std::uintptr_t y, bool fft, float scale, int threads) {
        const deepthin::Convolution c = convolution(numbers);
        const Kernels& set = kernels();
        nb::gil_scoped_release unlocked;
        deepthin::convolve(set, c, at<const float>(x), at<const float>(xf), at<const float>(wf), at<const float>(bias),
                           at<float>(y), fft, scale, threads);
    });
    m.def("convolve_backward", [](const std::vector<int64_t>& numbers, std::uintptr_t x, std::uintptr_t xf, std::uintptr_t wf,
                                  std::uintptr_t grad, std::uintptr_t grad_x, std::uintptr_t grad_xf, std::uintptr_t grad_wf,
                                  bool fft, int threads) {
        const deepthin::Convolution c = convolution(numbers);
        const Kernels& set = kernels();
        nb::gil_scoped_release unlocked;
        deepthin::convolve_backward(set, c, at<const float>(x), at<const float>(xf), at<const float>(wf), at<const float>(grad),
                                    at<float>(grad_x), at<float>(grad_xf), at<float>(grad_wf), fft, threads);
    });
    // `plans`: for each matrix rows, cols, n, rank, offset, and whether the product and the gradients go by FFT; `parts`:
    // for each the addresses of xf, wf, bias and of their gradients; 0 for none. `chains`: for each None or its chain, `cores`
    // the addresses of the cores and of their gradients; both empty where there is no chain. In the order of Recurrent::gates.
    m.def("recurrent", [](int cell, int64_t steps, int64_t batch, int64_t inputs, int64_t hidden, int64_t layers,
                          int64_t directions, const std::vector<int64_t>& plans, const std::vector<std::uintptr_t>& parts,
                          nb::list chains, const std::vector<std::vector<std::uintptr_t>>& cores, std::uintptr_t x, std::uintptr_t h, std::uintptr_t c, std::uintptr_t y, std::uintptr_t reserve,
                          int threads) {
        const Layers made(cell, steps, batch, inputs, hidden, layers, directions, plans, parts, chains, cores);
        const Kernels& set = kernels();
        nb::gil_scoped_release unlocked;
        deepthin::recurrent(set, made.shape, at<const float>(x), at<float>(h), at<float>(c), at<float>(y), at<float>(reserve),
                            threads);
    });
    m.def("recurrent_reserve", [](int cell, int64_t steps, int64_t batch, int64_t hidden, int64_t layers, int64_t directions) {
        return deepthin::recurrent_reserve({deepthin::Cell(cell), steps, batch, 1, hidden, layers, directions, nullptr});
    });
    m.def("recurrent_backward",
          [](int cell, int64_t steps, int64_t batch, int64_t inputs, int64_t hidden, int64_t layers, int64_t directions,
             const std::vector<int64_t>& plans, const std::vector<std::uintptr_t>& parts, nb::list chains,
             const std::vector<std::vector<std::uintptr_t>>& cores, std::uintptr_t x, std::uintptr_t h,
             std::uintptr_t c, std::uintptr_t y, std::uintptr_t reserve, std::uintptr_t grad_y, std::uintptr_t grad_x,
             std::uintptr_t grad_h, std::uintptr_t grad_c, int threads) {
              const Layers made(cell, steps, batch, inputs, hidden, layers, directions, plans, parts, chains, cores);
              const Kernels& set = kernels();
              nb::gil_scoped_release unlocked;
              deepthin::recurrent_backward(set, made.shape, at<const float>(x), at<const float>(h), at<const float>(c),
                                           at<const float>(y), at<const float>(reserve), at<const float>(grad_y),
                                           at<float>(grad_x), at<float>(grad_h), at<float>(grad_c), threads);
          });
    m.def("huffman_walk", [](std::uintptr_t data, int64_t bytes, int64_t start, std::uintptr_t lookup, int64_t entries,
                             std::uintptr_t out, int64_t most, int64_t count, int64_t skip) {
        const int width = std::has_single_bit(uint64_t(entries)) ? std::countr_zero(uint64_t(entries)) : 0;
        if (bytes < 0 || bytes >> 58 || start < 0 || start > 8 * bytes || width < 1 || width > 15 || most < 0 || count < 0)
            throw std::invalid_argument("the stream or the table is of no possible size");
        for (int64_t i = 0; i < entries; i++) {
            const uint32_t entry = at<const uint32_t>(lookup)[i];
            if (!(entry & 15) || int(entry & 15) > width || entry >> 20)
                throw std::invalid_argument("the table has a code of no bits or of too many");
        }
        int64_t end = 0, read;
        {
            nb::gil_scoped_release unlocked;
            read = deepthin::huffman_walk(at<const uint8_t>(data), bytes, start, at<const uint32_t>(lookup), width,
                                          at<uint16_t>(out), most, count, skip, &end);
        }
        return std::vector<int64_t>{read, end};
    });
    // Kinds: 0 levels, 1 tree, 2 numbers. Integers to encode have 64 bits if `wide`, else 32.
    m.def("arithmetic_encode", [](int kind, std::uintptr_t values, int64_t count, int64_t parameter, bool wide) {
        check_code(kind, 0, count, parameter);
        std::vector<uint8_t> data;
        {
            nb::gil_scoped_release unlocked;
            const auto binarisation = deepthin::Binarisation(kind);
            data = wide ? deepthin::arithmetic_encode(binarisation, at<const int64_t>(values), count, parameter)
                        : deepthin::arithmetic_encode(binarisation, at<const int32_t>(values), count, parameter);
        }
        return nb::bytes(data.data(), data.size());
    });
    m.def("arithmetic_decode", [](int kind, std::uintptr_t data, int64_t bytes, std::uintptr_t out, int64_t count,
                                  int64_t parameter, int64_t most) {
        check_code(kind, bytes, count, parameter);
        nb::gil_scoped_release unlocked;
        return deepthin::arithmetic_decode(deepthin::Binarisation(kind), at<const uint8_t>(data), bytes, at<int64_t>(out), count,
                                           parameter, most);
    });
    const auto check_symbols = [](int64_t count, float step, int top) {
        if (count < 0 || !(step > 0) || top < 1 || top > deepthin::kMostSymbol)
            throw std::invalid_argument("symbols need a step above 0 and go up to 127");
    };
    m.def("quantize", [check_symbols](std::uintptr_t latents, int64_t count, float step, int top, std::uintptr_t values,
                                      std::uintptr_t residual) {
        check_symbols(count, step, top);
        nb::gil_scoped_release unlocked;
        deepthin::quantize(at<const float>(latents), count, step, top, at<float>(values), at<float>(residual));
    });
    m.def("count_symbols", [check_symbols](std::uintptr_t latents, int64_t count, float step, int top, std::uintptr_t counts) {
        check_symbols(count, step, top);
        nb::gil_scoped_release unlocked;
        deepthin::count_symbols(at<const float>(latents), count, step, top, at<int64_t>(counts));
    });
    m.def("code_slopes", [check_symbols](std::uintptr_t latents, int64_t count, float step, int top, std::uintptr_t rise,
                                         float scale, std::uintptr_t slopes) {
        check_symbols(count, step, top);
        nb::gil_scoped_release unlocked;
        return deepthin::code_slopes(at<const float>(latents), count, step, top, at<const float>(rise), scale,
                                     at<float>(slopes));
    });
    m.def("csr", [](std::uintptr_t values, std::uintptr_t columns, std::uintptr_t starts, int64_t rows, int64_t cols,
                    int64_t entries, std::uintptr_t bias, std::uintptr_t x, std::uintptr_t y, int64_t batch,
                    int threads) {
        check_batch(deepthin::make_plan(rows, cols, 1, 1, 0), batch);
        const Kernels& set = kernels();
        nb::gil_scoped_release unlocked;
        deepthin::csr(set, at<const float>(values), at<const int32_t>(columns), at<const int64_t>(starts), rows, cols,
                      entries, at<const float>(bias), at<const float>(x), at<float>(y), batch, threads);
    });
    m.def("levels", [] { return nb::make_tuple(kernels().levels[0], kernels().levels[1]); });
    m.def("symbols", [](int64_t rows, int64_t cols, std::uintptr_t symbols, std::uintptr_t step, std::uintptr_t least, bool by_row,
                        std::uintptr_t table, int levels, std::uintptr_t bias, std::uintptr_t x, std::uintptr_t y, int64_t batch,
                        int threads) {
        check_batch(deepthin::make_plan(rows, cols, 1, 1, 0), batch);
        const Kernels& set = kernels();
        nb::gil_scoped_release unlocked;
        const deepthin::Symbols given{rows, cols, at<const uint8_t>(symbols), at<const float>(step), at<const float>(least), by_row,
                                      at<const float>(table), levels, at<const float>(bias)};
        deepthin::symbols(set, given, at<const float>(x), at<float>(y), batch, threads);
    });
}
