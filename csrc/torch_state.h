// What the native calls for torch tensors share: checks in a few hundred nanoseconds, of tensors, modes, modules and states.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "tensors.h"

namespace deepthin::python {

namespace nb = nanobind;

struct Torch {
    const deepthin::dlpack::ExchangeApi* api = nullptr;
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    nb::object is_grad_enabled, num_threads, requires_grad, is_neg, detach, version, level;
    nb::list watchers;      // functions that return 0, False or None while no mode or hook intercepts operations
    nb::dict forward_mode;  // where `_current_level` is the level of forward-mode differentiation, negative for none
    nb::list steps;         // one object, another one after each step of an optimiser
    nb::dict hooks;         // the variables of the module that has the hooks of all modules
    nb::object module, module_call;  // nn.Module, and how it is called
    PyTypeObject *weight = nullptr, *part = nullptr;
};

inline Torch* torch_of_process = nullptr;

inline nb::object intern(const char* name) { return nb::steal(PyUnicode_InternFromString(name)); }

inline nb::object call(PyObject* result) {  // a new reference; throws Python's exception
    if (!result) throw nb::python_error();
    return nb::steal(result);
}

inline bool is_true(nb::object value) {
    return value.ptr() == Py_False || value.is_none() ? false : PyObject_IsTrue(value.ptr()) != 0;
}

// Whether no mode or hook intercepts operations now.
inline bool is_quiet(const Torch& torch) {
    PyObject* level = PyDict_GetItemWithError(torch.forward_mode.ptr(), torch.level.ptr());
    if (!level || !PyLong_Check(level) || PyLong_AsLong(level) >= 0) return false;
    for (nb::handle watcher : torch.watchers)
        if (is_true(call(PyObject_CallNoArgs(watcher.ptr())))) return false;
    return true;
}

// A plain row-major float32 tensor in CPU memory that needs no gradient. False, without an error, for all else.
inline bool read_tensor(const Torch& torch, PyObject* object, bool grad, deepthin::dlpack::Tensor& tensor) {
    if (!object || (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter)) return false;
    if (grad) {
        nb::object wanted = nb::steal(PyObject_GetAttr(object, torch.requires_grad.ptr()));
        if (wanted.ptr() != Py_False) return false;
    }
    if (torch.api->from_python(object, &tensor) != 0) {
        PyErr_Clear();
        return false;
    }
    return tensor.data && tensor.is_float32_on_cpu() && tensor.is_row_major();
}

// Whether the tensor is a view with the sign of the stored numbers reversed.
inline bool is_negated(const Torch& torch, PyObject* object) {
    return is_true(call(PyObject_CallMethodNoArgs(object, torch.is_neg.ptr())));
}

inline bool read_input(const Torch& torch, nb::handle x, bool grad, deepthin::dlpack::Tensor& tensor) {
    return Py_TYPE(x.ptr()) == torch.tensor && read_tensor(torch, x.ptr(), grad, tensor) && tensor.ndim > 0 &&
           !is_negated(torch, x.ptr());
}

struct Names {
    nb::object forward = intern("forward"), hooks = intern("_forward_hooks"), pre_hooks = intern("_forward_pre_hooks"),
               called = intern("__call__"), compiled = intern("_compiled_call_impl"), training = intern("training"),
               modules = intern("_modules"), parameters = intern("_parameters"), index = intern("index"),
               thin = intern("thin"), weight = intern("weight"), bias = intern("bias"), group = intern("group"),
               product = intern("product"), xf = intern("xf"), wf = intern("wf"), direct = intern("direct"),
               evaluated = intern("_evaluated"), all_hooks = intern("_global_forward_hooks"),
               all_pre_hooks = intern("_global_forward_pre_hooks");
};

inline const Names& names() {
    static const Names& all = *new Names;
    return all;
}

inline nb::object dictionary(PyObject* object) { return call(PyObject_GenericGetDict(object, nullptr)); }

// Null where there is no such entry; borrowed, while the GIL is held.
inline PyObject* get(nb::handle dictionary, const nb::object& key) {
    return dictionary && PyDict_Check(dictionary.ptr()) ? PyDict_GetItemWithError(dictionary.ptr(), key.ptr()) : nullptr;
}

// Whether a tensor was written to as often as when its version was noted.
inline bool is_version(const Torch& torch, PyObject* tensor, PyObject* noted) {
    PyObject* version = PyObject_GetAttr(tensor, torch.version.ptr());
    if (!version) {  // a tensor of inference mode
        PyErr_Clear();
        return false;
    }
    const nb::object now = nb::steal(version);
    return PyLong_Check(noted) && PyLong_AsLongLong(now.ptr()) == PyLong_AsLongLong(noted);
}

// Whether an entry of a state is as it was noted (Source: name, tensor, alias, version, copy, address).
inline bool is_unchanged(const Torch& torch, PyObject* source, PyObject* now, bool grad) {
    if (!PyTuple_Check(source) || PyTuple_GET_SIZE(source) != 6) return false;
    PyObject *tensor = PyTuple_GET_ITEM(source, 1), *copy = PyTuple_GET_ITEM(source, 4);
    if (!now || (Py_TYPE(now) != torch.tensor && Py_TYPE(now) != torch.parameter)) return false;
    if (grad && call(PyObject_GetAttr(now, torch.requires_grad.ptr())).ptr() != Py_False) return false;
    deepthin::dlpack::Tensor old, read;
    if (torch.api->from_python(now, &read) != 0 || (copy != Py_None && torch.api->from_python(copy, &old) != 0)) {
        PyErr_Clear();
        return false;
    }
    if (copy == Py_None)  // an alias keeps the memory, so that no other tensor gets the address
        return now == tensor && read.floats() == PyLong_AsVoidPtr(PyTuple_GET_ITEM(source, 5)) &&
               is_version(torch, now, PyTuple_GET_ITEM(source, 3));
    if (read.device.type != deepthin::dlpack::CPU || old.device.type != deepthin::dlpack::CPU || read.ndim != old.ndim ||
        !read.is_row_major() || !old.is_row_major() || read.dtype.code != old.dtype.code ||
        read.dtype.bits != old.dtype.bits || read.dtype.lanes != old.dtype.lanes || is_negated(torch, now))
        return false;
    int64_t bytes = read.dtype.bits * read.dtype.lanes / 8;
    for (int32_t i = 0; i < read.ndim; i++) {
        if (read.shape[i] != old.shape[i]) return false;
        bytes *= read.shape[i];
    }
    return bytes == 0 || std::memcmp(read.floats(), old.floats(), bytes) == 0;
}

// What a ThinWeight holds for evaluation (Evaluated: sources, step, floats, dense); null where it may not be current.
inline nb::object current(const Torch& torch, nb::handle attributes, bool grad) {
    if (get(attributes, names().training) != Py_False || nb::len(torch.steps) != 1) return {};
    const nb::object held = nb::borrow(get(attributes, names().evaluated));
    if (!held || !PyTuple_Check(held.ptr()) || PyTuple_GET_SIZE(held.ptr()) != 4) return {};
    PyObject* sources = PyTuple_GET_ITEM(held.ptr(), 0);
    if (!PyTuple_Check(sources) || PyTuple_GET_ITEM(held.ptr(), 1) != PyList_GET_ITEM(torch.steps.ptr(), 0)) return {};
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sources); i++) {
        PyObject* source = PyTuple_GET_ITEM(sources, i);
        const nb::object name = nb::borrow(PyTuple_GET_ITEM(source, 0));
        PyObject* now = get(attributes, name);
        const nb::object entry = nb::borrow(now ? now : get(get(attributes, names().parameters), name));
        if (!is_unchanged(torch, source, entry.ptr(), grad)) return {};
    }
    return held;
}

inline int64_t items(const deepthin::dlpack::Tensor& x) {
    int64_t batch = 1;
    for (int32_t i = 0; i + 1 < x.ndim; i++) batch *= x.shape[i];
    return batch;
}

// Memory of a result, until the tensor that gets it is dropped: the tensor's description, and its numbers.
struct Result {
    deepthin::dlpack::ManagedTensor managed;
    std::vector<int64_t> shape, strides;
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> numbers;

    // A row-major tensor of floats in the CPU's memory: of the first `ndim` dimensions of `x`, and of columns. Throws
    // std::bad_alloc.
    Result(const Torch& torch, const deepthin::dlpack::Tensor& x, int32_t ndim, int64_t columns)
        : shape(x.shape, x.shape + ndim), strides(ndim + 1, 1) {
        shape.push_back(columns);
        for (int32_t i = ndim; i > 0; i--) strides[i - 1] = strides[i] * shape[i];
        const std::size_t count = static_cast<std::size_t>(strides[0]) * shape[0];
        if (count > (std::size_t(1) << 60)) throw std::bad_alloc();
        numbers.reset(std::aligned_alloc(64, (count * sizeof(float) / 64 + 1) * 64));  // as torch aligns
        if (!numbers) throw std::bad_alloc();
        managed = {torch.api->version, this, [](deepthin::dlpack::ManagedTensor* made) { delete of(made); }, 0,
                   {numbers.get(), x.device, ndim + 1, deepthin::dlpack::FLOAT32, shape.data(), strides.data(), 0}};
    }

    float* floats() const { return static_cast<float*>(numbers.get()); }

    static Result* of(deepthin::dlpack::ManagedTensor* made) { return static_cast<Result*>(made->manager); }
};

// The tensor that owns a result.
inline nb::object make_tensor(const Torch& torch, std::unique_ptr<Result> made) {
    void* object = nullptr;
    if (torch.api->to_python(&made.release()->managed, &object) != 0) throw nb::python_error();
    return nb::steal(static_cast<PyObject*>(object));
}

// A new tensor like `x` with other columns, filled by `fill(data, threads)` while other threads may run Python.
template <class Fill>
nb::object make_tensor(const Torch& torch, const deepthin::dlpack::Tensor& x, int64_t columns, Fill fill) {
    auto made = std::make_unique<Result>(torch, x, x.ndim - 1, columns);
    const int threads = nb::cast<int>(call(PyObject_CallNoArgs(torch.num_threads.ptr())));
    {
        nb::gil_scoped_release unlocked;
        fill(made->floats(), threads);
    }
    return make_tensor(torch, std::move(made));
}

inline PyObject* at(nb::handle tuple, int index) { return PyTuple_GET_ITEM(tuple.ptr(), index); }

inline Py_ssize_t size(nb::handle tuple) { return PyTuple_GET_SIZE(tuple.ptr()); }

inline nb::object changed() { return nb::borrow(nb::handle(Py_NotImplemented)); }

inline bool is_empty(nb::handle dictionary, const nb::object& key) {
    PyObject* hooks = get(dictionary, key);
    return hooks && PyDict_Check(hooks) && PyDict_Size(hooks) == 0;
}

// Whether calling a module with these attributes runs the forward of its class and nothing else.
inline bool is_plain(nb::handle attributes) {
    const Names& names = python::names();
    PyObject* compiled = get(attributes, names.compiled);
    return !get(attributes, names.forward) && is_empty(attributes, names.hooks) && is_empty(attributes, names.pre_hooks) &&
           (!compiled || compiled == Py_None);
}

// What a class itself defines under a name; null where it inherits that.
inline PyObject* entry(nb::handle type, const nb::object& name) {
    return get(reinterpret_cast<PyTypeObject*>(type.ptr())->tp_dict, name);
}

// Whether calling a module runs no more than its hooks and its forward: no hook of all modules, no other nn.Module.__call__.
inline bool is_usual(const Torch& torch) {
    return torch.module && is_empty(torch.hooks, names().all_hooks) && is_empty(torch.hooks, names().all_pre_hooks) &&
           entry(torch.module, names().called) == torch.module_call.ptr();
}

// Whether a part is the group itself, or refers to it.
inline bool is_part(PyObject* part, PyObject* group) {
    return part == group || get(get(dictionary(part), names().modules), names().group) == group;
}

// A tensor that was decoded for evaluation; null where there is none, or someone has written to it.
inline nb::object decoded(const Torch& torch, const nb::object& held, PyObject* index) {
    if (!held) return {};
    PyObject* dense = PyTuple_GET_ITEM(held.ptr(), 3);
    const nb::object pair = nb::borrow(PyDict_Check(dense) ? PyDict_GetItemWithError(dense, index) : nullptr);
    if (!pair || !PyTuple_Check(pair.ptr()) || PyTuple_GET_SIZE(pair.ptr()) != 2) return {};
    const nb::object tensor = nb::borrow(PyTuple_GET_ITEM(pair.ptr(), 0));
    return is_version(torch, tensor.ptr(), PyTuple_GET_ITEM(pair.ptr(), 1)) ? tensor : nb::object();
}

}  // namespace deepthin::python
