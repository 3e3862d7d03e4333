// The fast path for torch tensors: all checks are made here, in a few hundred nanoseconds.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <unordered_map>
#include <vector>

#include "python.h"
#include "tensors.h"

namespace nb = nanobind;
using deepthin::Kernels;
using deepthin::Plan;
using deepthin::python::kernels;

namespace {

struct Torch {
    const deepthin::dlpack::ExchangeApi* api = nullptr;
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    nb::object is_grad_enabled, num_threads, requires_grad, is_neg, detach, version, level;
    nb::list watchers;  // functions that return 0, False or None while no mode or hook intercepts operations
    nb::dict forward_mode;  // where `_current_level` is the level of forward-mode differentiation, negative for none
    nb::list steps;     // one object, another one after each step of an optimiser
} *torch_of_process = nullptr;

nb::object intern(const char* name) { return nb::steal(PyUnicode_InternFromString(name)); }

// Sets how tensors are read. False where this torch has no supported exchange table.
bool use_torch(nb::handle tensor, nb::handle parameter, nb::handle is_grad_enabled, nb::handle num_threads,
               nb::list watchers, nb::dict forward_mode) {
    if (!nb::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
    nb::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<deepthin::dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw nb::python_error();
    if (api->version.major != 1 || !api->from_python) return false;
    auto* torch = new Torch;  // lives as long as the process
    torch->api = api;
    torch->tensor = reinterpret_cast<PyTypeObject*>(tensor.ptr());
    torch->parameter = reinterpret_cast<PyTypeObject*>(parameter.ptr());
    torch->is_grad_enabled = nb::borrow(is_grad_enabled);
    torch->num_threads = nb::borrow(num_threads);
    torch->requires_grad = intern("requires_grad");
    torch->is_neg = intern("is_neg");
    torch->detach = intern("detach");
    torch->version = intern("_version");
    torch->level = intern("_current_level");
    torch->watchers = watchers;
    torch->forward_mode = forward_mode;
    torch_of_process = torch;
    return true;
}

nb::object call(PyObject* result) {  // a new reference; throws Python's exception
    if (!result) throw nb::python_error();
    return nb::steal(result);
}

bool is_true(nb::object value) {
    return value.ptr() == Py_False || value.is_none() ? false : PyObject_IsTrue(value.ptr()) != 0;
}

// Whether no mode or hook intercepts operations now.
bool is_quiet(const Torch& torch) {
    PyObject* level = PyDict_GetItemWithError(torch.forward_mode.ptr(), torch.level.ptr());
    if (!level || !PyLong_Check(level) || PyLong_AsLong(level) >= 0) return false;
    for (nb::handle watcher : torch.watchers)
        if (is_true(call(PyObject_CallNoArgs(watcher.ptr())))) return false;
    return true;
}

// A plain row-major float32 tensor in CPU memory that needs no gradient. False, without an error, for all else.
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
    return tensor.data && tensor.is_float32_on_cpu() && tensor.is_row_major();
}

// Whether the tensor is a view with the sign of the stored numbers reversed.
bool is_negated(const Torch& torch, PyObject* object) {
    return is_true(call(PyObject_CallMethodNoArgs(object, torch.is_neg.ptr())));
}

bool read_input(const Torch& torch, nb::handle x, bool grad, deepthin::dlpack::Tensor& tensor) {
    return Py_TYPE(x.ptr()) == torch.tensor && read_tensor(torch, x.ptr(), grad, tensor) && tensor.ndim > 0 &&
           !is_negated(torch, x.ptr());
}

struct Names {
    nb::object forward = intern("forward"), hooks = intern("_forward_hooks"), pre_hooks = intern("_forward_pre_hooks"),
               called = intern("__call__"), compiled = intern("_compiled_call_impl"), training = intern("training"), modules = intern("_modules"), parameters = intern("_parameters"),
               thin = intern("thin"), weight = intern("weight"), bias = intern("bias"), group = intern("group"),
               product = intern("product"), xf = intern("xf"), wf = intern("wf"), direct = intern("direct"),
               evaluated = intern("_evaluated"), all_hooks = intern("_global_forward_hooks"),
               all_pre_hooks = intern("_global_forward_pre_hooks");
};

const Names& names() {
    static const Names& all = *new Names;
    return all;
}

nb::object dictionary(PyObject* object) { return call(PyObject_GenericGetDict(object, nullptr)); }

// Null where there is no such entry; borrowed, while the GIL is held.
PyObject* get(nb::handle dictionary, const nb::object& key) {
    return dictionary && PyDict_Check(dictionary.ptr()) ? PyDict_GetItemWithError(dictionary.ptr(), key.ptr()) : nullptr;
}

// Whether a tensor was written to as often as when its version was noted.
bool is_version(const Torch& torch, PyObject* tensor, PyObject* noted) {
    PyObject* version = PyObject_GetAttr(tensor, torch.version.ptr());
    if (!version) {  // a tensor of inference mode
        PyErr_Clear();
        return false;
    }
    const nb::object now = nb::steal(version);
    return PyLong_Check(noted) && PyLong_AsLongLong(now.ptr()) == PyLong_AsLongLong(noted);
}

// Whether an entry of a state is as it was noted (Source: name, tensor, alias, version, copy, address).
bool is_unchanged(const Torch& torch, PyObject* source, PyObject* now, bool grad) {
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
nb::object current(const Torch& torch, nb::handle attributes, bool grad) {
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

// As above for Python, or None; None too while a mode or hook intercepts operations.
nb::object current_of(nb::dict attributes) {
    const Torch* torch = torch_of_process;
    if (!torch || !is_quiet(*torch)) return nb::none();
    nb::object held = current(*torch, attributes, is_true(call(PyObject_CallNoArgs(torch->is_grad_enabled.ptr()))));
    return held ? held : nb::none();
}

int64_t items(const deepthin::dlpack::Tensor& x) {
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

    // Like `x`, a row-major tensor of floats in the CPU's memory, but with other columns. Throws std::bad_alloc.
    Result(const Torch& torch, const deepthin::dlpack::Tensor& x, int64_t columns)
        : shape(x.shape, x.shape + x.ndim), strides(x.ndim, 1) {
        shape.back() = columns;
        for (int32_t i = x.ndim - 1; i > 0; i--) strides[i - 1] = strides[i] * shape[i];
        const std::size_t count = static_cast<std::size_t>(strides[0]) * shape[0];
        if (count > (std::size_t(1) << 60)) throw std::bad_alloc();
        numbers.reset(std::aligned_alloc(64, (count * sizeof(float) / 64 + 1) * 64));  // as torch aligns
        if (!numbers) throw std::bad_alloc();
        managed = {torch.api->version, this, [](deepthin::dlpack::ManagedTensor* made) { delete of(made); }, 0,
                   {numbers.get(), x.device, x.ndim, x.dtype, shape.data(), strides.data(), 0}};
    }

    static Result* of(deepthin::dlpack::ManagedTensor* made) { return static_cast<Result*>(made->manager); }
};

// A new tensor like `x` with other columns, filled by `fill(data)` while other threads may run Python.
template <class Fill>
nb::object make_tensor(const Torch& torch, const deepthin::dlpack::Tensor& x, int64_t columns, Fill fill) {
    auto made = std::make_unique<Result>(torch, x, columns);
    const int threads = nb::cast<int>(call(PyObject_CallNoArgs(torch.num_threads.ptr())));
    {
        nb::gil_scoped_release unlocked;
        fill(made->managed.tensor.floats(), threads);
    }
    void* object = nullptr;
    if (torch.api->to_python(&made.release()->managed, &object) != 0) throw nb::python_error();
    return nb::steal(static_cast<PyObject*>(object));
}

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

    // Bias: null or None for none.
    bool read(const Torch& torch, PyObject* xf, PyObject* wf, PyObject* bias, bool grad, Operands& operands) {
        deepthin::dlpack::Tensor rows, columns, shift;
        const nb::object owned[] = {nb::borrow(xf), nb::borrow(wf), nb::borrow(bias)};  // torch may let threads run below
        const bool shifted = bias && bias != Py_None;
        if (!read_tensor(torch, xf, grad, rows) || !read_tensor(torch, wf, grad, columns) ||
            (shifted && !read_tensor(torch, bias, grad, shift)))
            return false;
        if (rows.ndim != 2 || rows.shape[1] != plan.rank || rows.shape[0] < first_ + plan.m || columns.ndim != 2 ||
            columns.shape[0] != plan.rank || columns.shape[1] != plan.n ||
            (shifted && (shift.ndim != 1 || shift.shape[0] != plan.rows)))
            return false;
        operands = {rows.floats() + first_ * plan.rank, columns.floats(), shifted ? shift.floats() : nullptr, {}};
        return hold(torch, 0, xf, rows, operands) && hold(torch, 1, wf, columns, operands) &&
               (!shifted || hold(torch, 2, bias, shift, operands));
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
    std::unordered_map<int64_t, int> ways_;
};

PyObject* at(nb::handle tuple, int index) { return PyTuple_GET_ITEM(tuple.ptr(), index); }

Py_ssize_t size(nb::handle tuple) { return PyTuple_GET_SIZE(tuple.ptr()); }

nb::object changed() { return nb::borrow(nb::handle(Py_NotImplemented)); }

bool is_empty(nb::handle dictionary, const nb::object& key) {
    PyObject* hooks = get(dictionary, key);
    return hooks && PyDict_Check(hooks) && PyDict_Size(hooks) == 0;
}

// Whether calling a module with these attributes runs the forward of its class and nothing else.
bool is_plain(nb::handle attributes) {
    const Names& names = ::names();
    PyObject* compiled = get(attributes, names.compiled);
    return !get(attributes, names.forward) && is_empty(attributes, names.hooks) && is_empty(attributes, names.pre_hooks) &&
           (!compiled || compiled == Py_None);
}

// Whether no hook is called with every module. Globals: those of the module that has these hooks.
bool has_no_hooks(nb::handle globals) {
    return is_empty(globals, names().all_hooks) && is_empty(globals, names().all_pre_hooks);
}

// One product of a call, ready to run: a thin linear layer, rectified or not.
struct Step {
    nb::object owner;
    Product* product = nullptr;
    Product::Operands operands{};
    int way = 0;
    bool relu = false;
};

// A thin linear layer as it was when a native call was prepared.
class Layer {
  public:
    enum Found { ready, not_now, changed };

    // Link: (module, Product, group, part, thin, bias group, bias part, its index). The module's `thin` holds under
    // "weight" the part, or the group itself where that is the same, and likewise under "bias", or there is None.
    explicit Layer(nb::handle link)
        : group_type_(Py_TYPE(at(link, 2))), part_type_(Py_TYPE(at(link, 3))), bias_type_(Py_TYPE(at(link, 5))) {}

    // The product of a batch by the layer with these attributes, if that is the same as calling the layer.
    Found read(const Torch& torch, nb::handle link, nb::handle attributes, bool grad, int64_t batch, Step& step) const {
        const Names& names = ::names();
        PyObject *group = at(link, 2), *part = at(link, 3), *thin = at(link, 4);
        if (get(get(attributes, names.modules), names.thin) != thin || Py_TYPE(group) != group_type_) return changed;
        step = {nb::borrow(at(link, 1)), nb::inst_ptr<Product>(nb::handle(at(link, 1)))};
        if ((step.way = step.product->way(batch)) == 0) return not_now;
        nb::object within = dictionary(thin), state = dictionary(group);
        PyObject* parts = get(within, names.modules);
        if (get(parts, names.weight) != part || get(state, names.training) != Py_False) return changed;
        if (Py_TYPE(part) != part_type_ || !is_part(part, group)) return changed;
        if (get(state, names.product) || (part != group && get(dictionary(part), names.product))) return not_now;
        nb::object code, shift = nb::borrow(get(get(attributes, names.parameters), names.bias));
        if (get(state, names.direct) == Py_True) {
            code = nb::borrow(get(state, names.parameters));
        } else if (nb::object held = current(torch, state, grad)) {
            code = nb::borrow(PyTuple_GET_ITEM(held.ptr(), 2));
        } else {
            return not_now;
        }
        PyObject* bias = get(parts, names.bias);
        if (bias || at(link, 6) != Py_None) {
            PyObject* owner = at(link, 5);
            if (bias != at(link, 6) || Py_TYPE(owner) != bias_type_ || !is_part(bias, owner)) return changed;
            nb::object of_bias = dictionary(owner);
            if (!is_plain(of_bias) || !is_plain(dictionary(bias))) return not_now;
            shift = decoded(torch, current(torch, of_bias, grad), at(link, 7));
        }
        if (!shift) return not_now;  // a bias that is no parameter, or not decoded yet
        const bool reads = step.product->read(torch, get(code, names.xf), get(code, names.wf), shift.ptr(), grad, step.operands);
        return reads ? ready : not_now;
    }

  private:
    // Whether a part is the group itself, or refers to it.
    static bool is_part(PyObject* part, PyObject* group) {
        return part == group || get(get(dictionary(part), names().modules), names().group) == group;
    }
    // A tensor that was decoded for evaluation; null where there is none, or someone has written to it.
    static nb::object decoded(const Torch& torch, const nb::object& held, PyObject* index) {
        if (!held) return {};
        PyObject* dense = PyTuple_GET_ITEM(held.ptr(), 3);
        const nb::object pair = nb::borrow(PyDict_Check(dense) ? PyDict_GetItemWithError(dense, index) : nullptr);
        if (!pair || !PyTuple_Check(pair.ptr()) || PyTuple_GET_SIZE(pair.ptr()) != 2) return {};
        const nb::object tensor = nb::borrow(PyTuple_GET_ITEM(pair.ptr(), 0));
        return is_version(torch, tensor.ptr(), PyTuple_GET_ITEM(pair.ptr(), 1)) ? tensor : nb::object();
    }

    PyTypeObject *group_type_, *part_type_, *bias_type_;
};

// Calling a thin linear layer, in one call. It does not refer to the layer, which refers to it.
class Single {
  public:
    // Link: as `Layer` reads it, without the module. Module: the class nn.Module. Globals: those of the module that has
    // the hooks of all modules.
    Single(nb::tuple link, nb::type_object type, nb::type_object module, nb::dict globals)
        : link_(link), globals_(globals), type_(type), module_(module), forward_(entry(type, names().forward)),
          called_(entry(module, names().called)), layer_(link) {}

    // As `Chain`. None too where the class of the layer or nn.Module was given another forward or __call__.
    nb::object operator()(nb::handle module, nb::handle x) {
        const Torch* torch = torch_of_process;
        if (!torch) return nb::none();
        if (Py_TYPE(module.ptr()) != reinterpret_cast<PyTypeObject*>(type_.ptr())) return changed();
        if (!is_quiet(*torch)) return nb::none();
        const bool grad = is_true(call(PyObject_CallNoArgs(torch->is_grad_enabled.ptr())));
        deepthin::dlpack::Tensor in;
        Step step;
        if (!read_input(*torch, x, grad, in) || !has_no_hooks(globals_) || !forward_.is(entry(type_, names().forward)) ||
            !called_.is(entry(module_, names().called)))
            return nb::none();
        const int64_t batch = items(in);
        nb::object attributes = dictionary(module.ptr());
        if (!is_plain(attributes)) return nb::none();
        const Layer::Found found = layer_.read(*torch, link_, attributes, grad, batch, step);
        if (found != Layer::ready) return found == Layer::changed ? changed() : nb::none();
        if (step.product->plan.cols != in.shape[in.ndim - 1]) return nb::none();
        const Kernels& set = kernels();
        return make_tensor(*torch, in, step.product->plan.rows, [&](float* y, int threads) {
            step.product->run(set, step.operands, in.floats(), y, batch, step.way, false, threads);
        });
    }

    static int traverse(PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(Py_TYPE(self));
        if (!nb::inst_ready(self)) return 0;
        Single& single = *nb::inst_ptr<Single>(self);
        for (PyObject* held : {single.link_.ptr(), single.globals_.ptr(), single.type_.ptr(), single.module_.ptr(),
                               single.forward_.ptr(), single.called_.ptr()})
            Py_VISIT(held);
        return 0;
    }

    static int clear(PyObject* self) {
        if (nb::inst_ready(self)) nb::inst_ptr<Single>(self)->link_ = nb::tuple();
        return 0;
    }

  private:
    // What a class itself defines under a name; null where it inherits that.
    static nb::object entry(nb::handle type, const nb::object& name) {
        return nb::borrow(get(reinterpret_cast<PyTypeObject*>(type.ptr())->tp_dict, name));
    }

    nb::tuple link_;
    nb::dict globals_;
    nb::object type_, module_, forward_, called_;
    Layer layer_;
};

// Several products in a row, each rectified or not, in one call, as long as the modules that they replace are unchanged.
class Chain {
  public:
    // Links: as `Layer` reads them, of a linear layer; (module,) of a rectifier; (module, None) of what does nothing
    // outside training. Globals: those of the module that has the hooks of all modules.
    Chain(nb::list links, nb::dict globals) : links_(links), globals_(globals) {
        for (nb::handle link : links) {
            seen_.push_back(Py_TYPE(at(link, 0)));
            layers_.push_back(size(link) > 2 ? std::optional<Layer>(link) : std::nullopt);
        }
    }

    // None: not for this call. NotImplemented: never again, since the modules have changed.
    nb::object operator()(nb::handle x) {
        const Torch* torch = torch_of_process;
        if (!torch) return nb::none();
        const bool grad = is_true(call(PyObject_CallNoArgs(torch->is_grad_enabled.ptr())));
        deepthin::dlpack::Tensor in;
        if (!is_quiet(*torch) || !read_input(*torch, x, grad, in) || !has_no_hooks(globals_)) return nb::none();
        std::vector<Step> steps;
        steps.reserve(nb::len(links_));
        int64_t width = in.shape[in.ndim - 1], widest = 0;
        const int64_t batch = items(in);
        for (std::size_t i = 0; i < nb::len(links_); i++) {
            nb::handle link = PyList_GET_ITEM(links_.ptr(), i);
            PyObject* module = at(link, 0);
            if (Py_TYPE(module) != seen_[i]) return changed();
            nb::object attributes = dictionary(module);
            if (!is_plain(attributes)) return nb::none();
            if (size(link) == 1) {
                steps.back().relu = true;
                continue;
            }
            if (size(link) == 2) {
                if (get(attributes, names().training) != Py_False) return changed();
                continue;
            }
            const Layer::Found found = layers_[i]->read(*torch, link, attributes, grad, batch, steps.emplace_back());
            if (found != Layer::ready) return found == Layer::changed ? changed() : nb::none();
            const Plan& plan = steps.back().product->plan;
            if (plan.cols != width) return nb::none();
            width = plan.rows;
            widest = std::max(widest, width);
        }
        const Kernels& set = kernels();
        const int64_t cols = in.shape[in.ndim - 1];
        return make_tensor(*torch, in, width, [&](float* y, int threads) {
            // Some items at a time: enough to keep the threads busy, few enough to keep intermediate results small. A multiple
            // of all widths, so that the bits are those of the whole batch.
            const int64_t most = std::max<int64_t>(64, (int64_t(1) << 20) / widest / 64 * 64);
            thread_local std::vector<float> between[2];
            for (auto& memory : between) memory.resize(std::max<std::size_t>(memory.size(), std::min(batch, most) * widest));
            for (int64_t first = 0; first < batch; first += most) {
                const int64_t count = std::min(most, batch - first);
                const float* from = in.floats() + first * cols;
                for (std::size_t i = 0; i < steps.size(); i++) {
                    const Step& step = steps[i];
                    float* to = i + 1 == steps.size() ? y + first * width : between[i % 2].data();
                    step.product->run(set, step.operands, from, to, count, step.way, step.relu, threads);
                    from = to;
                }
            }
        });
    }

    static int traverse(PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(Py_TYPE(self));
        if (!nb::inst_ready(self)) return 0;
        Py_VISIT(nb::inst_ptr<Chain>(self)->links_.ptr());
        Py_VISIT(nb::inst_ptr<Chain>(self)->globals_.ptr());
        return 0;
    }

    static int clear(PyObject* self) {
        if (nb::inst_ready(self)) nb::inst_ptr<Chain>(self)->links_ = nb::list();
        return 0;
    }

  private:
    nb::list links_;
    nb::dict globals_;
    std::vector<PyTypeObject*> seen_;
    std::vector<std::optional<Layer>> layers_;
};

template <class Held>
PyType_Slot collected[] = {{Py_tp_traverse, reinterpret_cast<void*>(&Held::traverse)},
                           {Py_tp_clear, reinterpret_cast<void*>(&Held::clear)},
                           {0, nullptr}};

}  // namespace

void deepthin::python::bind_torch(nb::module_& m) {
    m.def("use_torch", &use_torch);
    m.def("use_steps", [](nb::list steps) { torch_of_process->steps = steps; });
    m.def("current", &current_of);
    nb::class_<Product>(m, "Product")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float>())
        .def("choose", &Product::choose)
        .def("__call__", &Product::operator(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none());
    nb::class_<Single>(m, "Single", nb::type_slots(collected<Single>))
        .def(nb::init<nb::tuple, nb::type_object, nb::type_object, nb::dict>())
        .def("__call__", &Single::operator());
    nb::class_<Chain>(m, "Chain", nb::type_slots(collected<Chain>))
        .def(nb::init<nb::list, nb::dict>())
        .def("__call__", &Chain::operator());
}
