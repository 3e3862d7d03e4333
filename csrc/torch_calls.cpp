// The fast path for torch's layers: a thin linear layer, or several layers in a row, in one call that makes all checks.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "python.h"
#include "torch_product.h"

namespace nb = nanobind;
using deepthin::Kernels;
using deepthin::Plan;
using namespace deepthin::python;

namespace {

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

// What a ThinWeight with these attributes holds for evaluation, or None; None too while a mode or hook intercepts operations.
nb::object current_of(nb::dict attributes) {
    const Torch* torch = torch_of_process;
    if (!torch || !is_quiet(*torch)) return nb::none();
    nb::object held = current(*torch, attributes, is_true(call(PyObject_CallNoArgs(torch->is_grad_enabled.ptr()))));
    return held ? held : nb::none();
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
        const Names& names = deepthin::python::names();
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
        const bool reads = step.product->read(torch, code, shift.ptr(), grad, step.operands);
        return reads ? ready : not_now;
    }

  private:
    PyTypeObject *group_type_, *part_type_, *bias_type_;
};

// Calling a thin linear layer, in one call. It does not refer to the layer, which refers to it.
class Single {
  public:
    // Link: as `Layer` reads it, but without the module, which is of this type.
    Single(nb::tuple link, nb::type_object type)
        : link_(link), type_(type), forward_(nb::borrow(entry(type, names().forward))), layer_(link) {}

    // As `Chain`. None too where the class of the layer was given another forward.
    nb::object operator()(nb::handle module, nb::handle x) {
        const Torch* torch = torch_of_process;
        if (!torch) return nb::none();
        if (Py_TYPE(module.ptr()) != reinterpret_cast<PyTypeObject*>(type_.ptr())) return changed();
        const bool grad = is_true(call(PyObject_CallNoArgs(torch->is_grad_enabled.ptr())));
        deepthin::dlpack::Tensor in;
        if (!is_quiet(*torch) || !read_input(*torch, x, grad, in) || !is_usual(*torch) ||
            entry(type_, names().forward) != forward_.ptr())
            return nb::none();
        const int64_t batch = items(in);
        Step step;
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
        Py_VISIT(nb::inst_ptr<Single>(self)->link_.ptr());
        Py_VISIT(nb::inst_ptr<Single>(self)->type_.ptr());
        Py_VISIT(nb::inst_ptr<Single>(self)->forward_.ptr());
        return 0;
    }

    static int clear(PyObject* self) {
        if (nb::inst_ready(self)) nb::inst_ptr<Single>(self)->link_ = nb::tuple();
        return 0;
    }

  private:
    nb::tuple link_;
    nb::object type_, forward_;
    Layer layer_;
};

// Several products in a row, each rectified or not, in one call, as long as the modules that they replace are unchanged.
class Chain {
  public:
    // Links: as `Layer` reads them, of a linear layer; (module,) of a rectifier; (module, None) of what does nothing
    // outside training.
    explicit Chain(nb::list links) : links_(links) {
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
        if (!is_quiet(*torch) || !read_input(*torch, x, grad, in) || !is_usual(*torch)) return nb::none();
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
        return 0;
    }

    static int clear(PyObject* self) {
        if (nb::inst_ready(self)) nb::inst_ptr<Chain>(self)->links_ = nb::list();
        return 0;
    }

  private:
    nb::list links_;
    std::vector<PyTypeObject*> seen_;
    std::vector<std::optional<Layer>> layers_;
};

template <class Held>
PyType_Slot collected[] = {{Py_tp_traverse, reinterpret_cast<void*>(&Held::traverse)},
                           {Py_tp_clear, reinterpret_cast<void*>(&Held::clear)},
                           {0, nullptr}};

// The decoded tensor of a ThinWeight, by its index, or of a ThinPart, as calling it returns it; None where nothing current
// is held.
nb::object decoded_of(nb::handle part, nb::int_ of_weight) {
    const Torch* torch = torch_of_process;
    if (!torch || !is_quiet(*torch) || !is_usual(*torch)) return nb::none();
    nb::object attributes = dictionary(part.ptr()), index = of_weight, group = attributes;
    if (!is_plain(attributes)) return nb::none();
    if (Py_TYPE(part.ptr()) == torch->part) {
        PyObject* owner = get(get(attributes, names().modules), names().group);
        if (!owner || Py_TYPE(owner) != torch->weight || !get(attributes, names().index)) return nb::none();
        index = nb::borrow(get(attributes, names().index));
        group = dictionary(owner);
        if (!is_plain(group)) return nb::none();
    } else if (Py_TYPE(part.ptr()) != torch->weight) {
        return nb::none();
    }
    nb::object held = current(*torch, group, is_true(call(PyObject_CallNoArgs(torch->is_grad_enabled.ptr()))));
    nb::object tensor = decoded(*torch, held, index.ptr());
    return tensor ? tensor : nb::none();
}

}  // namespace

void deepthin::python::bind_torch(nb::module_& m) {
    m.def("use_torch", &use_torch);
    m.def("use_steps", [](nb::list steps) { torch_of_process->steps = steps; });
    m.def("use_modules", [](nb::type_object module, nb::dict hooks, nb::type_object weight, nb::type_object part) {
        torch_of_process->module = module;
        torch_of_process->module_call = nb::borrow(entry(module, names().called));
        torch_of_process->hooks = hooks;
        torch_of_process->weight = reinterpret_cast<PyTypeObject*>(weight.ptr());  // they live as long as the process
        torch_of_process->part = reinterpret_cast<PyTypeObject*>(part.ptr());
    });
    m.def("current", &current_of);
    m.def("decoded", &decoded_of, nb::arg(), nb::arg() = 0);
    bind_rows(m);
    nb::class_<Product>(m, "Product")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float>())
        .def(nb::init<const deepthin::Cores&, nb::list, float>())
        .def("choose", &Product::choose)
        .def("choose_training", &Product::choose_training)
        .def("trained", &Product::trained, nb::arg(), nb::arg().none(), nb::arg().none())
        .def("forward", &Product::forward, nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
        .def("backward", &Product::backward)
        .def("__call__", &Product::operator(), nb::arg(), nb::arg().none(), nb::arg().none());
    nb::class_<Single>(m, "Single", nb::type_slots(collected<Single>))
        .def(nb::init<nb::tuple, nb::type_object>())
        .def("__call__", &Single::operator());
    nb::class_<Chain>(m, "Chain", nb::type_slots(collected<Chain>))
        .def(nb::init<nb::list>())
        .def("__call__", &Chain::operator());
}
