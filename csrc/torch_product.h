// The product of one weight, from torch's tensors: in evaluation, and with its gradients in a training.
#pragma once
#include <memory>
#include <mutex>
#include <unordered_map>

#include "python.h"
#include "torch_state.h"

namespace deepthin::python {

// y = scale x W^T + bias for one weight, from unchecked tensors. None where the kernels do not apply.
class Product {
  public:
    struct Operands {
        const float *xf, *wf, *bias;
        nb::object held[3];  // references to the tensors, whose memory must outlive the call
    };

    Product(int64_t rows, int64_t cols, int64_t n, int64_t rank, int64_t offset, int64_t first, float scale)
        : plan(deepthin::make_plan(rows, cols, n, rank, offset)), first_(first), scale_(scale) {}

    const Plan plan;

    // The way to multiply a batch without a gradient: 0 neither of these, 1 direct, 2 by FFT.
    void choose(int64_t batch, int way) {
        std::lock_guard<nb::ft_mutex> hold(lock_);
        if (ways_.size() > 1000) ways_.clear();
        ways_[batch] = way;
    }

    int way(int64_t batch) {
        std::lock_guard<nb::ft_mutex> hold(lock_);
        auto entry = ways_.find(batch);
        return entry == ways_.end() || batch == 0 ? 0 : entry->second;
    }

    // The ways in which a training multiplies a batch: 0 none of these; else 1, + 2 for products by FFT, + 4 for gradients.
    void choose_training(int64_t batch, int ways) {
        std::lock_guard<nb::ft_mutex> hold(lock_);
        if (trained_.size() > 1000) trained_.clear();
        trained_[batch] = ways;
    }

    // These ways for an input and the parameters from which the factors follow; 0 too where they are not plain tensors of
    // this plan, and where someone observes operations.
    int trained(nb::handle x, nb::handle xf, nb::handle wf, nb::handle bias) {
        const Torch* torch = torch_of_process;
        deepthin::dlpack::Tensor in;
        Operands operands;
        if (!torch || !is_quiet(*torch) || !read_input(*torch, x, false, in) || in.shape[in.ndim - 1] != plan.cols ||
            !read(*torch, xf.ptr(), wf.ptr(), bias.ptr(), false, first_, operands))
            return 0;
        std::lock_guard<nb::ft_mutex> hold(lock_);
        auto entry = trained_.find(items(in));
        return entry == trained_.end() ? 0 : entry->second;
    }

    // For autograd, in a training: the product without the scale, by factors whose first row is W's. None where an operand
    // is not plain.
    nb::object forward(nb::handle x, nb::handle xf, nb::handle wf, nb::handle bias, bool fft) {
        const Torch* torch = torch_of_process;
        deepthin::dlpack::Tensor in;
        Operands o;
        if (!torch || !read_input(*torch, x, false, in) || in.shape[in.ndim - 1] != plan.cols ||
            !read(*torch, xf.ptr(), wf.ptr(), bias.ptr(), false, 0, o))
            return nb::none();
        const Kernels& set = kernels();
        return make_tensor(*torch, in, plan.rows, [&](float* y, int threads) {
            deepthin::forward(set, plan, in.floats(), o.xf, o.wf, o.bias, y, items(in), fft, 1.0f, false, threads);
        });
    }

    // The gradients of x, xf and wf, those that are wanted; None as above.
    nb::object backward(nb::handle grad, nb::handle x, nb::handle xf, nb::handle wf, bool fft, bool to_x, bool to_xf,
                        bool to_wf) {
        const Torch* torch = torch_of_process;
        deepthin::dlpack::Tensor in, out, rows, columns;
        Operands o;
        if (!torch || !read_input(*torch, x, false, in) || !read_input(*torch, grad, false, out) ||
            in.shape[in.ndim - 1] != plan.cols || out.shape[out.ndim - 1] != plan.rows || items(in) != items(out) ||
            !read(*torch, xf.ptr(), wf.ptr(), nullptr, false, 0, o) || !read_tensor(*torch, xf.ptr(), false, rows) ||
            !read_tensor(*torch, wf.ptr(), false, columns))
            return nb::none();
        std::unique_ptr<Result> made[3];
        if (to_x) made[0] = std::make_unique<Result>(*torch, in, in.ndim - 1, plan.cols);
        if (to_xf) made[1] = std::make_unique<Result>(*torch, rows, 1, plan.rank);
        if (to_wf) made[2] = std::make_unique<Result>(*torch, columns, 1, plan.n);
        const auto memory = [&](int which) { return made[which] ? made[which]->floats() : nullptr; };
        const int threads = nb::cast<int>(call(PyObject_CallNoArgs(torch->num_threads.ptr())));
        const Kernels& set = kernels();
        {
            nb::gil_scoped_release unlocked;
            deepthin::backward(set, plan, in.floats(), o.xf, o.wf, out.floats(), memory(0), memory(1), memory(2), items(in),
                               fft, threads);
        }
        nb::list gradients;
        for (auto& one : made) gradients.append(one ? make_tensor(*torch, std::move(one)) : nb::none());
        return gradients;
    }

    // Bias: null or None for none. First: the row of xf where W begins.
    bool read(const Torch& torch, PyObject* xf, PyObject* wf, PyObject* bias, bool grad, int64_t first, Operands& operands) {
        deepthin::dlpack::Tensor rows, columns, shift;
        const nb::object owned[] = {nb::borrow(xf), nb::borrow(wf), nb::borrow(bias)};  // torch may let threads run below
        const bool shifted = bias && bias != Py_None;
        if (!read_tensor(torch, xf, grad, rows) || !read_tensor(torch, wf, grad, columns) ||
            (shifted && !read_tensor(torch, bias, grad, shift)))
            return false;
        if (rows.ndim != 2 || rows.shape[1] != plan.rank || rows.shape[0] < first + plan.m || columns.ndim != 2 ||
            columns.shape[0] != plan.rank || columns.shape[1] != plan.n ||
            (shifted && (shift.ndim != 1 || shift.shape[0] != plan.rows)))
            return false;
        operands = {rows.floats() + first * plan.rank, columns.floats(), shifted ? shift.floats() : nullptr, {}};
        return hold(torch, 0, xf, rows, operands) && hold(torch, 1, wf, columns, operands) &&
               (!shifted || hold(torch, 2, bias, shift, operands));
    }

    bool read(const Torch& torch, PyObject* xf, PyObject* wf, PyObject* bias, bool grad, Operands& operands) {
        return read(torch, xf, wf, bias, grad, first_, operands);
    }

    void run(const Kernels& set, const Operands& o, const float* x, float* y, int64_t batch, int way, bool relu,
             int threads) const {
        deepthin::forward(set, plan, x, o.xf, o.wf, o.bias, y, batch, way == 2, scale_, relu, threads);
    }

    nb::object operator()(nb::handle x, nb::handle xf, nb::handle wf, nb::handle bias) {
        const Torch* torch = torch_of_process;
        if (!torch) return nb::none();
        const bool grad = is_true(call(PyObject_CallNoArgs(torch->is_grad_enabled.ptr())));
        deepthin::dlpack::Tensor in;
        Operands operands;
        if (!is_quiet(*torch) || !read_input(*torch, x, grad, in) || in.shape[in.ndim - 1] != plan.cols ||
            !read(*torch, xf.ptr(), wf.ptr(), bias.ptr(), grad, operands))
            return nb::none();
        const int64_t batch = items(in);
        const int chosen = way(batch);
        if (chosen == 0) return nb::none();
        const Kernels& set = kernels();
        return make_tensor(*torch, in, plan.rows, [&](float* y, int threads) {
            run(set, operands, in.floats(), y, batch, chosen, false, threads);
        });
    }

  private:
    // A parameter's memory may be replaced (`p.data = ...`): an alias, made once, owns the memory that is read. False for
    // a view with reversed signs.
    bool hold(const Torch& torch, int which, PyObject* object, const deepthin::dlpack::Tensor& tensor, Operands& operands) {
        std::lock_guard<nb::ft_mutex> locked(lock_);
        Alias& alias = aliases_[which];
        if (alias.of != object || alias.memory != tensor.data) {
            if (is_negated(torch, object)) return false;
            nb::object made = call(PyObject_CallMethodNoArgs(object, torch.detach.ptr()));
            deepthin::dlpack::Tensor now;
            if (!read_tensor(torch, made.ptr(), false, now) || now.data != tensor.data) return false;
            operands.held[which] = made;
            alias = {object, tensor.data, made};  // dropping the old one may let threads run, and they exchange it again
        } else {
            operands.held[which] = alias.tensor;
        }
        return true;
    }

    struct Alias {
        PyObject* of = nullptr;
        void* memory = nullptr;
        nb::object tensor;
    } aliases_[3];
    int64_t first_;  // row of xf where W begins
    float scale_;
    nb::ft_mutex lock_;
    std::unordered_map<int64_t, int> ways_, trained_;
};

}  // namespace deepthin::python
