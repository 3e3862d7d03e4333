// The product of one weight, from torch's tensors: in evaluation, and with its gradients in a training.
#pragma once
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "python.h"
#include "torch_state.h"

namespace deepthin::python {

// y = scale x W^T + bias for one weight, two factors or a chain of cores, from unchecked tensors. None where the kernels do not
// apply.
class Product {
  public:
    struct Operands {
        const float *factor[deepthin::MOST_CORES], *bias;
        nb::object held[deepthin::MOST_CORES + 1];  // references to the tensors, whose memory must outlive the call
    };

    Product(int64_t rows, int64_t cols, int64_t n, int64_t rank, int64_t offset, int64_t first, float scale)
        : plan(deepthin::make_plan(rows, cols, n, rank, offset)),
          entries_{{names().xf, {first + plan.m, rank}}, {names().wf, {rank, n}}},
          first_(first),
          scale_(scale) {}

    // Entries: the name and the shape of each core, whose memory is that of the chain.
    Product(const deepthin::Cores& cores, nb::list entries, float scale)
        : plan{cores.rows, cores.cols}, cores_(std::make_unique<deepthin::Cores>(cores)), first_(0), scale_(scale) {
        if (nb::len(entries) != std::size_t(cores.count)) throw std::invalid_argument("a chain needs all of its cores");
        for (int k = 0; k < cores.count; k++) {
            nb::tuple entry = nb::cast<nb::tuple>(entries[k]);
            entries_.push_back({entry[0], nb::cast<std::vector<int64_t>>(entry[1])});
            int64_t floats = 1, last = 1;
            for (const int64_t count : entries_.back().shape) floats *= count;
            const deepthin::Core& core = cores.core[cores.place(k)];
            const int64_t counts[] = {core.rank, core.rows, core.cols, core.next};
            for (int axis = 0; axis < 4; axis++) last += (counts[axis] - 1) * core.step[axis];
            if (entries_.back().shape.empty() || floats != last) throw std::invalid_argument("a core is not all of its entry");
        }
    }

    const Plan plan;  // of a chain the rows and cols alone

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
    int trained(nb::handle x, nb::handle code, nb::handle bias) {
        const Torch* torch = torch_of_process;
        deepthin::dlpack::Tensor in;
        Operands operands;
        if (!torch || !is_quiet(*torch) || !read_input(*torch, x, false, in) || in.shape[in.ndim - 1] != plan.cols ||
            !read(*torch, code, bias.ptr(), false, operands))
            return 0;
        std::lock_guard<nb::ft_mutex> hold(lock_);
        auto entry = trained_.find(items(in));
        return entry == trained_.end() ? 0 : entry->second;
    }

    // For autograd, in a training: the product without the scale, by factors whose first row is W's, or by the entries of a
    // chain. None where an operand is not plain.
    nb::object forward(nb::handle x, nb::tuple factors, nb::handle bias, bool fft) {
        const Torch* torch = torch_of_process;
        deepthin::dlpack::Tensor in;
        Operands o;
        if (!torch || !read_input(*torch, x, false, in) || in.shape[in.ndim - 1] != plan.cols ||
            !read(*torch, factors, bias.ptr(), o))
            return nb::none();
        const Kernels& set = kernels();
        return make_tensor(*torch, in, plan.rows, [&](float* y, int threads) {
            run(set, o, in.floats(), y, items(in), fft ? 2 : 1, false, 1.0f, threads);
        });
    }

    // The gradients of x and of the factors, those that are wanted; None as above.
    nb::object backward(nb::handle grad, nb::handle x, nb::tuple factors, bool fft, const std::vector<bool>& wanted) {
        const Torch* torch = torch_of_process;
        deepthin::dlpack::Tensor in, out;
        Operands o;
        if (!torch || wanted.size() != entries_.size() + 1 || !read_input(*torch, x, false, in) ||
            !read_input(*torch, grad, false, out) || in.shape[in.ndim - 1] != plan.cols ||
            out.shape[out.ndim - 1] != plan.rows || items(in) != items(out) || !read(*torch, factors, nullptr, o))
            return nb::none();
        std::vector<std::unique_ptr<Result>> made(wanted.size());
        if (wanted[0]) made[0] = std::make_unique<Result>(*torch, in, in.ndim - 1, plan.cols);
        float* memory[deepthin::MOST_CORES + 1] = {wanted[0] ? made[0]->floats() : nullptr};
        bool any = false;
        for (std::size_t k = 1; k < wanted.size(); k++) {
            deepthin::dlpack::Tensor like;
            if (!wanted[k]) continue;
            if (!read_tensor(*torch, at(factors, int(k) - 1), false, like)) return nb::none();
            made[k] = std::make_unique<Result>(*torch, like, like.ndim - 1, like.shape[like.ndim - 1]);
            memory[k] = made[k]->floats();
            any = true;
        }
        const int threads = nb::cast<int>(call(PyObject_CallNoArgs(torch->num_threads.ptr())));
        const Kernels& set = kernels();
        {
            nb::gil_scoped_release unlocked;
            if (cores_)
                deepthin::cores_backward(set, *cores_, o.factor, in.floats(), out.floats(), memory[0], any ? memory + 1 : nullptr,
                                         items(in), 1.0f, threads);
            else
                deepthin::backward(set, plan, in.floats(), o.factor[0], o.factor[1], out.floats(), memory[0], memory[1],
                                   memory[2], items(in), fft, threads);
        }
        nb::list gradients;
        for (auto& one : made) gradients.append(one ? make_tensor(*torch, std::move(one)) : nb::none());
        return gradients;
    }

    // By a code, a dictionary of tensors. Bias: null or None for none.
    bool read(const Torch& torch, nb::handle code, PyObject* bias, bool grad, Operands& operands) {
        PyObject* tensors[deepthin::MOST_CORES];
        for (std::size_t k = 0; k < entries_.size(); k++) tensors[k] = get(code, entries_[k].name);
        return read(torch, tensors, bias, grad, first_, operands);
    }

    // By factors from W's first row on.
    bool read(const Torch& torch, nb::tuple factors, PyObject* bias, Operands& operands) {
        if (nb::len(factors) != entries_.size()) return false;
        PyObject* tensors[deepthin::MOST_CORES];
        for (std::size_t k = 0; k < entries_.size(); k++) tensors[k] = at(factors, int(k));
        return read(torch, tensors, bias, false, 0, operands);
    }

    // Way: 2 by FFT, 1 not.
    void run(const Kernels& set, const Operands& o, const float* x, float* y, int64_t batch, int way, bool relu, float scale,
             int threads) const {
        if (cores_)
            deepthin::cores_forward(set, *cores_, o.factor, x, o.bias, y, batch, scale, relu, threads);
        else
            deepthin::forward(set, plan, x, o.factor[0], o.factor[1], o.bias, y, batch, way == 2, scale, relu, threads);
    }

    void run(const Kernels& set, const Operands& o, const float* x, float* y, int64_t batch, int way, bool relu,
             int threads) const {
        run(set, o, x, y, batch, way, relu, scale_, threads);
    }

    nb::object operator()(nb::handle x, nb::handle code, nb::handle bias) {
        const Torch* torch = torch_of_process;
        if (!torch) return nb::none();
        const bool grad = is_true(call(PyObject_CallNoArgs(torch->is_grad_enabled.ptr())));
        deepthin::dlpack::Tensor in;
        Operands operands;
        if (!is_quiet(*torch) || !read_input(*torch, x, grad, in) || in.shape[in.ndim - 1] != plan.cols ||
            !read(*torch, code, bias.ptr(), grad, operands))
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
    struct Entry {
        nb::object name;
        std::vector<int64_t> shape;  // of two factors, the first may have more rows
    };

    bool read(const Torch& torch, PyObject* const* tensors, PyObject* bias, bool grad, int64_t first, Operands& operands) {
        const std::size_t count = entries_.size();
        nb::object owned[deepthin::MOST_CORES + 1];  // torch may let threads run below
        for (std::size_t k = 0; k < count; k++) owned[k] = nb::borrow(tensors[k]);
        owned[count] = nb::borrow(bias);
        deepthin::dlpack::Tensor found[deepthin::MOST_CORES], shift;
        const bool shifted = bias && bias != Py_None;
        for (std::size_t k = 0; k < count; k++) {
            const std::vector<int64_t>& shape = entries_[k].shape;
            if (!read_tensor(torch, tensors[k], grad, found[k]) || found[k].ndim != int32_t(shape.size())) return false;
            for (std::size_t axis = 0; axis < shape.size(); axis++) {
                const int64_t rows = found[k].shape[axis];
                const bool longer = !cores_ && k == 0 && axis == 0;
                if (longer ? rows < first + plan.m : rows != shape[axis]) return false;
            }
            operands.factor[k] = found[k].floats();
        }
        if (shifted && (!read_tensor(torch, bias, grad, shift) || shift.ndim != 1 || shift.shape[0] != plan.rows)) return false;
        if (!cores_) operands.factor[0] += first * plan.rank;
        operands.bias = shifted ? shift.floats() : nullptr;
        for (std::size_t k = 0; k < count; k++)
            if (!hold(torch, int(k), tensors[k], found[k], operands)) return false;
        return !shifted || hold(torch, int(count), bias, shift, operands);
    }

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
    } aliases_[deepthin::MOST_CORES + 1];
    std::unique_ptr<const deepthin::Cores> cores_;  // null: two factors
    std::vector<Entry> entries_;
    int64_t first_;  // row of xf where W begins
    float scale_;
    nb::ft_mutex lock_;
    std::unordered_map<int64_t, int> ways_, trained_;
};

}  // namespace deepthin::python
