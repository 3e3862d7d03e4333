// Python's way in: addresses and lengths, checked by deepthin.kernels; here the plan is, and the GIL is released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

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

// y = scale x W^T + bias for one weight, from tensors as they come. None where that is not for the kernels to do.
class Product {
  public:
    Product(int64_t rows, int64_t cols, int64_t n, int64_t rank, int64_t offset, int64_t first, float scale)
        : plan_(deepthin::make_plan(rows, cols, n, rank, offset)), first_(first), scale_(scale) {}

    // The way to take for a batch, when no gradient is wanted: 0 none of these, 1 direct, 2 by FFT.
    void choose(int64_t batch, int way) {
        std::lock_guard<nb::ft_mutex> hold(lock_);
        if (ways_.size() > 1000) ways_.clear();
        ways_[batch] = way;
    }

    nb::object operator()(nb::handle x, nb::handle xf, nb::handle wf, nb::handle bias) {
        const Torch* torch = torch_of_process;
        if (!torch || Py_TYPE(x.ptr()) != torch->tensor) return nb::none();
        const bool grad = is_true(torch->is_grad_enabled);
        if (is_true(x.attr("is_neg"))) return nb::none();  // its numbers are not what lies in memory
        deepthin::dlpack::Tensor tensors[4];
        PyObject* const objects[4] = {x.ptr(), xf.ptr(), wf.ptr(), bias.ptr()};
        const int count = bias.is_none() ? 3 : 4;
        for (nb::handle watcher : torch->watchers)
            if (is_true(watcher)) return nb::none();
        for (int i = 0; i < count; i++) {
            PyObject* object = objects[i];
            if (Py_TYPE(object) != torch->tensor && Py_TYPE(object) != torch->parameter) return nb::none();
            if (grad) {
                nb::object wanted = nb::steal(PyObject_GetAttr(object, torch->requires_grad.ptr()));
                if (wanted.ptr() != Py_False) return nb::none();
            }
            if (torch->api->from_python(object, &tensors[i]) != 0) {
                PyErr_Clear();
                return nb::none();
            }
            if (!tensors[i].is_float32_on_cpu() || !tensors[i].is_row_major()) return nb::none();
        }
        const auto &in = tensors[0], &rows = tensors[1], &columns = tensors[2];
        if (in.ndim < 1 || in.shape[in.ndim - 1] != plan_.cols || rows.ndim != 2 || rows.shape[1] != plan_.rank ||
            rows.shape[0] < first_ + plan_.m || columns.ndim != 2 || columns.shape[0] != plan_.rank ||
            columns.shape[1] != plan_.n || (count == 4 && (tensors[3].ndim != 1 || tensors[3].shape[0] != plan_.rows)))
            return nb::none();
        std::vector<int64_t> shape(in.shape, in.shape + in.ndim);
        shape.back() = plan_.rows;
        int64_t batch = 1;
        for (int32_t i = 0; i + 1 < in.ndim; i++) batch *= in.shape[i];
        int way = 0;
        {
            std::lock_guard<nb::ft_mutex> hold(lock_);
            auto found = ways_.find(batch);
            if (found != ways_.end()) way = found->second;
        }
        if (way == 0 || batch == 0) return nb::none();
        deepthin::dlpack::Tensor like{nullptr, in.device, in.ndim, in.dtype, shape.data(), nullptr, 0};
        deepthin::dlpack::ManagedTensor* made = nullptr;
        const auto fail = [](void*, const char*, const char* message) {
            nb::gil_scoped_acquire locked;
            PyErr_SetString(PyExc_MemoryError, message);
        };
        if (torch->api->allocate(&like, &made, nullptr, fail) != 0) throw nb::python_error();
        nb::object threads = nb::steal(PyObject_CallNoArgs(torch->num_threads.ptr()));
        const int thread_count = nb::cast<int>(threads);
        try {
            const Kernels& set = kernels();
            nb::gil_scoped_release unlocked;
            deepthin::forward(set, plan_, in.floats(), rows.floats() + first_ * plan_.rank, columns.floats(),
                              count == 4 ? tensors[3].floats() : nullptr, made->tensor.floats(), batch, way == 2, scale_, false,
                              thread_count);
        } catch (...) {
            made->deleter(made);
            throw;
        }
        void* object = nullptr;
        if (torch->api->to_python(made, &object) != 0) throw nb::python_error();
        return nb::steal(static_cast<PyObject*>(object));
    }

  private:
    Plan plan_;
    int64_t first_;  // row of xf where W begins
    float scale_;
    nb::ft_mutex lock_;
    std::unordered_map<int64_t, int> ways_;
};

}  // namespace

NB_MODULE(_native, m) {
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
    nb::class_<Product>(m, "Product")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float>())
        .def("choose", &Product::choose)
        .def("__call__", &Product::operator(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
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
