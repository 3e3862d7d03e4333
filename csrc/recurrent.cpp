// Recurrent layers over whole sequences: the products with the inputs of many steps at once, then step after step.
#include <algorithm>
#include <cstring>
#include <vector>

#include "linear.h"

namespace deepthin {
namespace {

constexpr int64_t CHUNK = int64_t(1) << 18;  // floats of gates at a time if no gradient is wanted: about the size of a cache

// One direction of a layer: where its parts of the reserve and of the states are.
struct Direction {
    const Gate *input, *state;
    int64_t place;  // layer * directions + direction
    bool turned;    // runs from the last step to the first
    float *gates, *saved;
};

// Sizes, and the reserve's layout: for each layer what it returns, but for the last, then gates and `saved` by direction.
struct Layout {
    const Recurrent& shape;
    int64_t width, out, items;  // of all gates; of y; of a sequence
    bool saves;                 // whether the cell saves more than its gates
    int64_t of_direction, of_layer;

    explicit Layout(const Recurrent& shape) : shape(shape) {
        width = gates_of(shape.cell) * shape.hidden;
        out = shape.directions * shape.hidden;
        items = shape.steps * shape.batch;
        saves = shape.cell == Cell::lstm || shape.cell == Cell::gru;
        of_direction = items * (width + (saves ? shape.hidden : 0));
        of_layer = items * out + shape.directions * of_direction;
    }
    int64_t total() const { return shape.layers * of_layer - items * out; }

    // Outputs of layer `layer`; y for the last one.
    template <class Float>
    Float* outputs(Float* reserve, int64_t layer, Float* y) const {
        return layer + 1 == shape.layers ? y : reserve + layer * of_layer;
    }
    Direction direction(float* reserve, int64_t layer, int64_t number) const {
        const Gate* gates = shape.gates + 2 * (layer * shape.directions + number);
        Direction result{gates, gates + 1, layer * shape.directions + number, number == 1, nullptr, nullptr};
        if (reserve) {
            result.gates = reserve + layer * of_layer + (layer + 1 == shape.layers ? 0 : items * out) + number * of_direction;
            result.saved = saves ? result.gates + items * width : nullptr;
        }
        return result;
    }
};

void add(float* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

// Whether the gradient of any factor or core is wanted.
bool is_wanted(const Gate& gate) {
    if (!gate.cores) return gate.grad_xf || gate.grad_wf;
    return std::any_of(gate.grad_core, gate.grad_core + gate.cores->count, [](const float* grad) { return grad != nullptr; });
}

void gradients(const Kernels& kernels, const Gate& gate, const float* x, const float* grad, float* grad_x, int64_t items,
               int threads) {
    if (gate.cores)
        cores_backward(kernels, *gate.cores, gate.core, x, grad, grad_x, is_wanted(gate) ? gate.grad_core : nullptr, items, 1.0f,
                       threads);
    else
        backward(kernels, gate.plan, x, gate.xf, gate.wf, grad, grad_x, gate.grad_xf, gate.grad_wf, items, gate.fft_gradient,
                 threads);
}

}  // namespace

int64_t recurrent_reserve(const Recurrent& shape) { return Layout(shape).total(); }

void recurrent(const Kernels& kernels, const Recurrent& shape, const float* x, float* h, float* c, float* y, float* reserve,
               int threads) {
    const Layout layout(shape);
    const int64_t batch = shape.batch, hidden = shape.hidden, steps = shape.steps, width = layout.width, out = layout.out;
    const int64_t chunk = reserve ? steps : std::clamp<int64_t>(CHUNK / (shape.directions * batch * width), 1, steps);
    const int64_t gate_floats = chunk * batch * width;
    const Memory gates = allocate(reserve ? 0 : shape.directions * gate_floats);
    const Memory products = allocate(shape.directions * batch * width);
    const Memory between[2] = {allocate(!reserve && shape.layers > 1 ? layout.items * out : 0),
                               allocate(!reserve && shape.layers > 2 ? layout.items * out : 0)};
    const auto blocks = split(kernels, batch, true);
    const float* in = x;
    for (int64_t layer = 0; layer < shape.layers; layer++) {
        float* to = reserve || layer + 1 == shape.layers ? layout.outputs(reserve, layer, y) : between[layer % 2].get();
        std::vector<Direction> directions;
        std::vector<Product> of_inputs, of_states;
        for (int64_t d = 0; d < shape.directions; d++) {
            const Direction one = layout.direction(reserve, layer, d);
            const auto product = [&](const Gate& gate, const std::vector<Block>& blocks, bool often) {
                if (gate.cores) return Product(kernels, *gate.cores, gate.core, gate.bias, 1.0f, false);
                return Product(kernels, gate.plan, gate.xf, gate.wf, gate.bias, gate.fft, 1.0f, false, blocks, often);
            };
            directions.push_back(one);
            of_inputs.push_back(product(*one.input, split(kernels, chunk * batch, false), false));
            of_states.push_back(product(*one.state, blocks, true));
        }
        const int64_t inputs = directions.front().input->plan.cols;
        for (int64_t done = 0; done < steps; done += chunk) {
            const int64_t count = std::min(chunk, steps - done);
            const auto first_of = [&](const Direction& d) { return d.turned ? steps - done - count : done; };
            const auto gates_of_chunk = [&](int64_t d) {
                return reserve ? directions[d].gates + first_of(directions[d]) * batch * width : gates.get() + d * gate_floats;
            };
            // Items are never processed one by one here, so that the bits do not depend on the number of steps.
            const auto pieces = split(kernels, count * batch, false);
            in_parallel(shape.directions * int64_t(pieces.size()), threads, [&](int64_t i) {
                const int64_t d = i / int64_t(pieces.size());
                of_inputs[d](pieces[i % pieces.size()], in + first_of(directions[d]) * batch * inputs, gates_of_chunk(d));
            });
            in_parallel(shape.directions * int64_t(blocks.size()), threads, [&](int64_t i) {
                const int64_t d = i / int64_t(blocks.size());
                const Block& block = blocks[i % blocks.size()];
                const Direction& one = directions[d];
                const int64_t state = one.place * batch * hidden, item = block.first * hidden;
                float* const product = products.get() + d * batch * width;
                Step step{};
                step.cell = shape.cell, step.items = block.items, step.hidden = hidden;
                step.products = product + block.first * width;
                step.gates_step = step.products_step = width;
                step.h = h + state + item, step.c = c ? c + state + item : nullptr;
                step.h_step = step.saved_step = hidden, step.y_step = out;
                for (int64_t s = 0; s < count; s++) {
                    const int64_t at = one.turned ? count - 1 - s : s, row = at * batch + block.first;
                    of_states[d](block, h + state, product);
                    step.gates = gates_of_chunk(d) + row * width;
                    const int64_t place = first_of(one) * batch + row;
                    step.y = to + place * out + d * hidden;
                    step.saved = one.saved ? one.saved + place * hidden : nullptr;
                    kernels.step(step);
                }
            });
        }
        in = to;
    }
}

void recurrent_backward(const Kernels& kernels, const Recurrent& shape, const float* x, const float* h, const float* c,
                        const float* y, const float* reserve, const float* grad_y, float* grad_x, float* grad_h,
                        float* grad_c, int threads) {
    const Layout layout(shape);
    const int64_t batch = shape.batch, hidden = shape.hidden, steps = shape.steps, width = layout.width, out = layout.out;
    const int64_t items = layout.items, number = shape.directions;
    const bool apart = shape.cell == Cell::gru;  // the gradients of gates and products differ
    const Memory grads = allocate(number * items * width), grads_apart = allocate(apart ? number * items * width : 0);
    const Memory back = allocate(number * batch * hidden), before = allocate(items * hidden);
    const Memory from_above = allocate(shape.layers > 1 ? items * out : 0);
    const int64_t widest = shape.layers > 1 ? std::max(shape.inputs, out) : shape.inputs;
    const Memory second = allocate(number > 1 ? items * widest : 0);
    const auto blocks = split(kernels, batch, false);
    for (int64_t layer = shape.layers - 1; layer >= 0; layer--) {
        const float* outputs_of_layer = layout.outputs(reserve, layer, y);
        const float* in = layer ? layout.outputs(reserve, layer - 1, y) : x;
        const float* grad_outputs = layer + 1 == shape.layers ? grad_y : from_above.get();
        std::vector<Direction> directions;
        std::vector<InputGradient> of_states;
        for (int64_t d = 0; d < number; d++) {
            directions.push_back(layout.direction(const_cast<float*>(reserve), layer, d));
            const Gate& gate = *directions.back().state;
            if (gate.cores)
                of_states.emplace_back(kernels, *gate.cores, gate.core);
            else
                of_states.emplace_back(kernels, gate.plan, gate.xf, gate.wf, gate.fft_gradient, blocks);
        }
        const auto of_gates = [&](int64_t d) { return grads.get() + d * items * width; };
        const auto of_products = [&](int64_t d) { return apart ? grads_apart.get() + d * items * width : of_gates(d); };
        in_parallel(number * int64_t(blocks.size()), threads, [&](int64_t i) {
            const int64_t d = i / int64_t(blocks.size());
            const Block& block = blocks[i % blocks.size()];
            const Direction& one = directions[d];
            const int64_t state = one.place * batch * hidden, item = block.first * hidden;
            float* const passed = back.get() + d * batch * hidden;
            StepGradient step{};
            step.cell = shape.cell, step.items = block.items, step.hidden = hidden;
            step.gates_step = step.grad_step = width;
            step.saved_step = step.c_step = hidden, step.y_step = step.grad_y_step = out;
            step.grad_h = grad_h + state + item, step.grad_c = grad_c ? grad_c + state + item : nullptr;
            for (int64_t s = steps - 1; s >= 0; s--) {
                const auto row_of = [&](int64_t s) { return (one.turned ? steps - 1 - s : s) * batch + block.first; };
                const int64_t row = row_of(s), last = s ? row_of(s - 1) : 0;
                step.gates = one.gates + row * width;
                step.saved = one.saved ? one.saved + row * hidden : nullptr;
                step.h = s ? outputs_of_layer + last * out + d * hidden : h + state + item, step.h_step = s ? out : hidden;
                if (c) step.c = s ? one.saved + last * hidden : c + state + item;
                step.y = outputs_of_layer + row * out + d * hidden;
                step.grad_y = grad_outputs + row * out + d * hidden;
                step.grad_gates = of_gates(d) + row * width;
                step.grad_products = of_products(d) + row * width;
                kernels.step_gradient(step);
                of_states[d](block, of_products(d) + (row - block.first) * width, passed);
                add(step.grad_h, passed + item, block.items * hidden);
            }
        });
        float* const below = layer ? from_above.get() : grad_x;
        for (int64_t d = 0; d < number; d++) {
            const Direction& one = directions[d];
            const Gate &state = *one.state, &input = *one.input;
            const auto sum_of = [&](const float* from, float* to) {
                if (!to) return;
                std::memset(to, 0, sizeof(float) * width);
                for (int64_t i = 0; i < items; i++) add(to, from + i * width, width);
            };
            sum_of(of_products(d), state.grad_bias);
            sum_of(of_gates(d), input.grad_bias);
            if (is_wanted(state)) {
                const float* first = h + one.place * batch * hidden;
                for (int64_t t = 0; t < steps; t++)
                    for (int64_t b = 0; b < batch; b++) {
                        const bool start = one.turned ? t + 1 == steps : t == 0;
                        const float* from = start ? first + b * hidden
                                                  : outputs_of_layer +
                                                        ((one.turned ? t + 1 : t - 1) * batch + b) * out + d * hidden;
                        std::memcpy(before.get() + (t * batch + b) * hidden, from, sizeof(float) * hidden);
                    }
                gradients(kernels, state, before.get(), of_products(d), nullptr, items, threads);
            }
            float* const to = !below ? nullptr : d ? second.get() : below;
            if (to || is_wanted(input)) gradients(kernels, input, in, of_gates(d), to, items, threads);
            if (d && below) add(below, second.get(), items * input.plan.cols);
        }
    }
}

}  // namespace deepthin
