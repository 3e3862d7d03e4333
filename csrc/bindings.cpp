// Python's way in: addresses and lengths, checked by deepthin.kernels; here the plan is, and the GIL is released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace nb = nanobind;
using deepthin::Kernels;
using deepthin::Plan;

namespace {

const Kernels* chosen = deepthin::find_kernels(nullptr);

const Kernels& kernels() {
    if (!chosen) throw std::runtime_error("this processor runs none of the instruction sets that were compiled");
    return *chosen;
}

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check_batch(const Plan& plan, int64_t batch) {
    const int64_t most = plan.rows > plan.cols ? plan.rows : plan.cols;
    if (batch < 0 || batch > (int64_t(1) << 58) / most) throw std::invalid_argument("the batch is negative or too large");
}

// ---- The short way for torch tensors: all checks here, in some hundred nanoseconds ----------------------------------

struct Torch {
    const deepthin::dlpack::ExchangeApi* api = nullptr;
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    nb::object is_grad_enabled, num_threads, requires_grad;
    nb::list watchers;  // functions that return 0, False or None where nothing watches or records operations
} *torch_of_process = nullptr;

// Tells how tensors are read. False where this torch has no exchange table that is understood.
bool use_torch(nb::handle tensor, nb::handle parameter, nb::handle is_grad_enabled, nb::handle num_threads,
               nb::list watchers) {
    if (!nb::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
    nb::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<deepthin::dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw nb::python_error();
    if (api->version.major != 1 || !api->from_python) return false;
    auto* torch = new Torch;  // for as long as the process
    torch->api = api;
    torch->tensor = reinterpret_cast<PyTypeObject*>(tensor.ptr());
    torch->parameter = reinterpret_cast<PyTypeObject*>(parameter.ptr());
    torch->is_grad_enabled = nb::borrow(is_grad_enabled);
    torch->num_threads = nb::borrow(num_threads);
    torch->requires_grad = nb::str("requires_grad");
    torch->watchers = watchers;
    torch_of_process = torch;
    return true;
}

bool is_true(nb::handle function) {
    PyObject* result = PyObject_CallNoArgs(function.ptr());
    if (!result) throw nb::python_error();
    const int truth = result == Py_False || result == Py_None ? 0 : PyObject_IsTrue(result);
    Py_DECREF(result);
    return truth != 0;
}

// Whether nothing watches or records operations now.
bool is_quiet(const Torch& torch) {
    for (nb::handle watcher : torch.watchers)
        if (is_true(watcher)) return false;
    return true;
}

// A plain float32 tensor in the CPU's memory, row-major, whose gradient nobody wants. False, and no error, for all else.
bool read_tensor(const Torch& torch, PyObject* object, bool grad, deepthin::dlpack::Tensor& tensor) {
    if (!object || (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter)) return false;
    if (grad) {
        nb::object wanted = nb::steal(PyObject_GetAttr(object, torch.requires_grad.ptr()));
        if (wanted.ptr() != Py_False) return false;
    }
    if (torch.api->from_python(object, &tensor) != 0) {
        PyErr_Clear();
        return false;
    }
    return tensor.is_float32_on_cpu() && tensor.is_row_major();
}

// The same for an input, which may also be a view whose numbers are not what lies in memory.
bool read_input(const Torch& torch, nb::handle x, bool grad, deepthin::dlpack::Tensor& tensor) {
    if (Py_TYPE(x.ptr()) != torch.tensor || is_true(x.attr("is_neg"))) return false;
    return read_tensor(torch, x.ptr(), grad, tensor) && tensor.ndim > 0;
}

int64_t items(const deepthin::dlpack::Tensor& x) {
    int64_t batch = 1;
    for (int32_t i = 0; i + 1 < x.ndim; i++) batch *= x.shape[i];
    return batch;
}

// A new tensor like `x` with other columns, filled by `fill(data)` while other threads may run Python.
template <class Fill>
nb::object make_tensor(const Torch& torch, const deepthin::dlpack::Tensor& x, int64_t columns, Fill fill) {
    std::vector<int64_t> shape(x.shape, x.shape + x.ndim);
    shape.back() = columns;
    deepthin::dlpack::Tensor like{nullptr, x.device, x.ndim, x.dtype, shape.data(), nullptr, 0};
    deepthin::dlpack::ManagedTensor* made = nullptr;
    const auto fail = [](void*, const char*, const char* message) {
        nb::gil_scoped_acquire locked;
        PyErr_SetString(PyExc_MemoryError, message);
    };
    if (torch.api->allocate(&like, &made, nullptr, fail) != 0) throw nb::python_error();
    nb::object count = nb::steal(PyObject_CallNoArgs(torch.num_threads.ptr()));
    try {
        const int threads = nb::cast<int>(count);
        nb::gil_scoped_release unlocked;
        fill(made->tensor.floats(), threads);
    } catch (...) {
        made->deleter(made);
        throw;
    }
    void* object = nullptr;
    if (torch.api->to_python(made, &object) != 0) throw nb::python_error();
    return nb::steal(static_cast<PyObject*>(object));
}

// y = scale x W^T + bias for one weight, from tensors as they come. None where that is not for the kernels to do.
class Product {
  public:
    struct Operands {
        const float *xf, *wf, *bias;
    };

    Product(int64_t rows, int64_t cols, int64_t n, int64_t rank, int64_t offset, int64_t first, float scale)
        : plan(deepthin::make_plan(rows, cols, n, rank, offset)), first_(first), scale_(scale) {}

    const Plan plan;

    // The way to take for a batch, when no gradient is wanted: 0 none of these, 1 direct, 2 by FFT.
    void choose(int64_t batch, int way) {
        std::lock_guard<nb::ft_mutex> hold(lock_);
        if (ways_.size() > 1000) ways_.clear();
        ways_[batch] = way;
    }

    int way(int64_t batch) {
        std::lock_guard<nb::ft_mutex> hold(lock_);
        auto found = ways_.find(batch);
        return found == ways_.end() || batch == 0 ? 0 : found->second;
    }

    // Bias: null or None for none.
    bool read(const Torch& torch, PyObject* xf, PyObject* wf, PyObject* bias, bool grad, Operands& operands) const {
        deepthin::dlpack::Tensor rows, columns, shift;
        const bool shifted = bias && bias != Py_None;
        if (!read_tensor(torch, xf, grad, rows) || !read_tensor(torch, wf, grad, columns) ||
            (shifted && !read_tensor(torch, bias, grad, shift)))
            return false;
        if (rows.ndim != 2 || rows.shape[1] != plan.rank || rows.shape[0] < first_ + plan.m || columns.ndim != 2 ||
            columns.shape[0] != plan.rank || columns.shape[1] != plan.n ||
            (shifted && (shift.ndim != 1 || shift.shape[0] != plan.rows)))
            return false;
        operands = {rows.floats() + first_ * plan.rank, columns.floats(), shifted ? shift.floats() : nullptr};
        return true;
    }

    void run(const Kernels& set, const Operands& o, const float* x, float* y, int64_t batch, int way, bool relu,
             int threads) const {
        deepthin::forward(set, plan, x, o.xf, o.wf, o.bias, y, batch, way == 2, scale_, relu, threads);
    }

    nb::object operator()(nb::handle x, nb::handle xf, nb::handle wf, nb::handle bias) {
        const Torch* torch = torch_of_process;
        if (!torch) return nb::none();
        const bool grad = is_true(torch->is_grad_enabled);
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
    int64_t first_;  // row of xf where W begins
    float scale_;
    nb::ft_mutex lock_;
    std::unordered_map<int64_t, int> ways_;
};

// Several products in a row, each rectified or not, in one call. The modules that they stand for must be as they were.
class Chain {
  public:
    // Links: (Product, parameters of its weight, parameters of its layer, whether rectified). Conditions, all of them
    // about dictionaries: `same` (dictionary, key, the object that it must hold), `lacking` (dictionary, key), `empty`.
    // Kinds: (object, its class).
    Chain(nb::list links, nb::list same, nb::list lacking, nb::list empty, nb::list kinds)
        : links_(links), same_(same), lacking_(lacking), empty_(empty), kinds_(kinds) {}

    // None: not now. NotImplemented: never again, the modules have changed.
    nb::object operator()(nb::handle x) {
        const Torch* torch = torch_of_process;
        if (!torch) return nb::none();
        for (nb::handle item : kinds_)
            if (reinterpret_cast<PyObject*>(Py_TYPE(at(item, 0))) != at(item, 1)) return changed();
        for (nb::handle item : same_)
            if (PyDict_GetItemWithError(at(item, 0), at(item, 1)) != at(item, 2)) return changed();
        for (nb::handle item : lacking_)
            if (PyDict_GetItemWithError(at(item, 0), at(item, 1))) return nb::none();
        for (nb::handle hooks : empty_)
            if (PyDict_Size(hooks.ptr()) != 0) return nb::none();
        const bool grad = is_true(torch->is_grad_enabled);
        deepthin::dlpack::Tensor in;
        if (!is_quiet(*torch) || !read_input(*torch, x, grad, in)) return nb::none();
        struct Step {
            const Product* product;
            Product::Operands operands;
            int way;
            bool relu;
        };
        std::vector<Step> steps;
        int64_t width = in.shape[in.ndim - 1], widest = 0;
        const int64_t batch = items(in);
        for (nb::handle link : links_) {
            Product& product = *nb::inst_ptr<Product>(nb::handle(at(link, 0)));
            PyObject *weight = at(link, 1), *layer = at(link, 2);
            Step step{&product, {}, product.way(batch), at(link, 3) == Py_True};
            if (step.way == 0 || product.plan.cols != width ||
                !product.read(*torch, PyDict_GetItemString(weight, "xf"), PyDict_GetItemString(weight, "wf"),
                              PyDict_GetItemString(layer, "bias"), grad, step.operands))
                return nb::none();
            width = product.plan.rows;
            widest = std::max(widest, width);
            steps.push_back(step);
        }
        const Kernels& set = kernels();
        return make_tensor(*torch, in, width, [&](float* y, int threads) {
            thread_local std::vector<float> between[2];
            for (auto& memory : between)
                if (int64_t(memory.size()) < batch * widest) memory.resize(batch * widest);
            const float* from = in.floats();
            for (std::size_t i = 0; i < steps.size(); i++) {
                const Step& step = steps[i];
                float* to = i + 1 == steps.size() ? y : between[i % 2].data();
                step.product->run(set, step.operands, from, to, batch, step.way, step.relu, threads);
                from = to;
            }
        });
    }

  private:
    static PyObject* at(nb::handle tuple, int index) { return PyTuple_GET_ITEM(tuple.ptr(), index); }
    static nb::object changed() { return nb::borrow(nb::handle(Py_NotImplemented)); }

    nb::list links_, same_, lacking_, empty_, kinds_;
};

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // a model that lives to the end of the process is no leak
    m.doc() = "Compiled kernels. Use them through deepthin.kernels, which checks what is handed over.";
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("isas", [] {
        nb::list found;
        for (const char* name : {"v2", "v3", "v4", "baseline"})
            if (deepthin::find_kernels(name)) found.append(name);
        return found;
    });
    m.def("select", [](const std::string& name) {
        const Kernels* found = deepthin::find_kernels(name.empty() ? nullptr : name.c_str());
        if (found) chosen = found;
        return found != nullptr;
    });
    m.def("width", [] { return kernels().widths[0]; });
    m.def("use_torch", &use_torch);
    m.def("use_openmp", [](std::uintptr_t address) { deepthin::use_openmp(reinterpret_cast<deepthin::OpenMpParallel>(address)); });
    nb::class_<Product>(m, "Product")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float>())
        .def("choose", &Product::choose)
        .def("__call__", &Product::operator(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none());
    nb::class_<Chain>(m, "Chain")
        .def(nb::init<nb::list, nb::list, nb::list, nb::list, nb::list>())
        .def("__call__", &Chain::operator());
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
    m.def("csr", [](std::uintptr_t values, std::uintptr_t columns, std::uintptr_t starts, int64_t rows, int64_t cols,
                    int64_t entries, std::uintptr_t bias, std::uintptr_t x, std::uintptr_t y, int64_t batch,
                    int threads) {
        check_batch(deepthin::make_plan(rows, cols, 1, 1, 0), batch);
        const Kernels& set = kernels();
        nb::gil_scoped_release unlocked;
        deepthin::csr(set, at<const float>(values), at<const int32_t>(columns), at<const int64_t>(starts), rows, cols,
                      entries, at<const float>(bias), at<const float>(x), at<float>(y), batch, threads);
    });
}
