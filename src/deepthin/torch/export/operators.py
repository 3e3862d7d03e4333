"""From a model to a program of the C runtime: torch.export's graph, operator by operator."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from deepthin.errors import ExportError
from deepthin.torch.compress import materialize
from deepthin.torch.export.constants import Matrices, Matrix, Use
from deepthin.torch.export.program import Buffer, Place, Program, Space, View, contiguous_strides, scratch_of
from deepthin.torch.generated import ThinLayer
from deepthin.torch.weight import ThinPart, ThinWeight

DIMENSIONS = 6  # of a copy
FUNCTIONS = ["relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "exp", "log", "sqrt", "abs", "square", "reciprocal", "line", "clamp", "leaky", "elu", "hardsigmoid", "hardswish", "softplus"]
PAIRS = ["add", "subtract", "multiply", "divide", "larger", "smaller"]
_SUM, _MEAN, _MAXIMUM, _MINIMUM = range(4)
_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}
_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
NO_ROW = 0xFFFFFFFF


class Weight:
    """A parameter of the model: a tensor, and the thin weight that it came from, if any."""

    def __init__(self, name: str, tensor: Tensor, thin: tuple[ThinWeight, int] | None, turned: bool = False) -> None:
        self.name, self.tensor, self.thin, self.turned = name, tensor, thin, turned

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, in the order in which it is used."""
        return tuple(self.tensor.shape[::-1]) if self.turned else tuple(self.tensor.shape)


def program_of(model: nn.Module, example: Sequence[Tensor], streaming: bool = False) -> Program:
    """The program that computes a model's outputs for inputs of the example's shapes.

    Args:
        model: A thin or dense network, on the CPU, in evaluation mode; it stays as it is.
        example: Its inputs.
        streaming: Whether recurrent layers keep their states from one run to the next.

    Returns:
        The program, all of whose tensors have their places.

    Raises:
        ExportError: The model has an operator that the runtime lacks; the message names it and its module.
    """
    thin: dict[str, tuple[ThinWeight, int]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, ThinLayer):
            for name, part in cast(Any, layer.thin).items():
                own = (part.group, part.index) if isinstance(part, ThinPart) else (part, 0)
                thin[f"{path}.{name}".lstrip(".")] = own
    plain = materialize(copy.deepcopy(model)).eval().requires_grad_(False)
    names: dict[int, list[str]] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(plain, tuple(example), strict=False).run_decompositions({})
    known: dict[str, tuple[ThinWeight, int]] = dict(thin)
    for same in names.values():
        found = next((thin[name] for name in same if name in thin), None)
        known |= {name: found for name in same if found is not None}
    return _Builder(exported, known, streaming).program


def _positive(index: int, size: int) -> int:
    return index + size if index < 0 else index


def _two(value: Any) -> tuple[int, int]:
    value = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return (value[0], value[1]) if len(value) > 1 else (value[0], value[0])


def _along(value: Any, missing: int) -> tuple[int, int]:
    """One number for the width of a one-dimensional layer, whose height is 1."""
    value = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return (missing, value[0])


class _Builder:
    """Walks over the graph; ``values`` has what each node stands for."""

    def __init__(self, exported: Any, thin: dict[str, tuple[ThinWeight, int]], streaming: bool) -> None:
        self.program, self.streaming, self.constants = Program(), streaming, Matrices()
        self.values: dict[fx.Node, Any] = {}
        self._found: dict[tuple[Any, ...], Matrix] = {}
        self._constants: dict[tuple[int, tuple[int, ...]], Buffer] = {}
        self._held: list[Any] = []
        signature = exported.graph_signature
        parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        parameters |= getattr(signature, "inputs_to_lifted_tensor_constants", {})
        state = {**exported.state_dict, **exported.constants}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node, parameters, state, thin)
            elif node.op == "call_function":
                self.values[node] = self._node(node)
            elif node.op == "output":
                wanted = [self.values[of] if isinstance(of, fx.Node) else of for of in node.args[0]]
                wanted = wanted[-len(signature.user_outputs) :] if signature.user_outputs else wanted
                self._outputs(wanted)
        self.program.place()

    # -- values --

    def _placeholder(self, node: fx.Node, parameters: Any, state: Any, thin: Any) -> Any:
        if node.name in parameters:
            name = parameters[node.name]
            tensor = state[name].detach().cpu()
            return Weight(name, tensor, thin.get(name)) if tensor.is_floating_point() else tensor
        given = node.meta["val"]
        if not isinstance(given, Tensor):
            raise ExportError(f"The input {node.name} is no tensor, which the C runtime needs.")
        integers = not given.is_floating_point()
        buffer = Buffer(given.numel(), Space.INPUT, len(self.program.inputs))
        self.program.inputs.append(buffer)
        self.program.integers.append(integers)
        return View(Place(buffer), tuple(given.shape), contiguous_strides(given.shape))

    def _outputs(self, wanted: list[Any]) -> None:
        for index, value in enumerate(wanted):
            view = self.dense(value)
            buffer = view.place.buffer
            whole = view.contiguous and view.place.offset == 0 and buffer.floats == view.floats
            if whole and buffer.space is Space.ARENA and not buffer.kept:
                buffer.space, buffer.index = Space.OUTPUT, index
                self.program.outputs.append(buffer)
                continue
            out = Buffer(view.floats, Space.OUTPUT, index)
            self.program.outputs.append(out)
            self.copy(view, View(Place(out), view.shape, contiguous_strides(view.shape)))

    def tensor(self, value: Any) -> Tensor:
        """A constant, as a tensor."""
        if isinstance(value, Weight):
            tensor = value.tensor
            if value.thin is not None:
                self.program.forms.setdefault(value.name, "decoded at export")
            return tensor.T if value.turned else tensor
        return cast(Tensor, value)

    def dense(self, value: Any) -> View:
        """A value as a view; constants get a place."""
        if isinstance(value, View):
            return value
        if isinstance(value, bool | int | float):
            value = torch.tensor(float(value))
        tensor = self.tensor(value).detach().float().contiguous()
        key = (id(value), tuple(tensor.shape))
        if key not in self._constants:
            self._held.append(value)
            data = tensor.numpy().reshape(-1).astype(np.float32)
            self._constants[key] = Buffer(data.size, Space.CONSTANT, data=data)
        return View(Place(self._constants[key]), tuple(tensor.shape), contiguous_strides(tensor.shape))

    def made(self, shape: Sequence[int]) -> View:
        """A new tensor in the arena."""
        return View(Place(Buffer(math.prod(shape))), tuple(shape), contiguous_strides(shape))

    def whole(self, value: Any) -> View:
        """A value as a contiguous tensor, copied if need be."""
        view = self.dense(value)
        if view.contiguous:
            return View(view.place, view.shape, contiguous_strides(view.shape))
        made = self.made(view.shape)
        self.copy(view, made)
        return made

    def copy(self, source: View, target: View) -> None:
        """Copy entries; both have the same shape."""
        sizes, first, second = _merged(source, target)
        if len(sizes) > DIMENSIONS:
            raise ExportError(f"The C runtime copies tensors of up to {DIMENSIONS} dimensions, not {source.shape}.")
        pad = DIMENSIONS - len(sizes)
        arguments = [(1,) * pad + sizes, (0,) * pad + first, (0,) * pad + second, source.place, target.place]
        self.program.call("copy", arguments)

    def matrix(self, value: Any, turned: bool = False, rows: bool = False) -> Matrix:
        """The matrix that multiplies from the left: outputs x inputs; ``turned``: the tensor is inputs x outputs."""
        if isinstance(value, Weight):
            turned ^= value.turned
        key = (id(value.tensor) if isinstance(value, Weight) else id(value), turned, rows)
        if key in self._found:
            return self._found[key]
        if isinstance(value, Weight) and value.thin is not None:
            weight, index = value.thin
            found, form = self.constants.of_weight(weight, index, rows)
            self.program.forms[value.name] = form
            turned ^= weight.parts[index].transposed
        else:
            tensor = value.tensor if isinstance(value, Weight) else cast(Tensor, value)
            found = self.constants.of_tensor(tensor)
        if turned and found.kind == 0 and found.a is not None and found.a.stored.bits == 32:
            flat = found.a.stored.data[: found.rows * found.cols].reshape(found.rows, found.cols)
            found = self.constants.of_tensor(torch.from_numpy(np.ascontiguousarray(flat.T)))
            turned = False
        if turned:
            found = Matrix(**{**{f: getattr(found, f) for f in found.__dataclass_fields__}, "turned": True})
        self._held.append(value)
        self._found[key] = found
        return found

    def vector(self, value: Any) -> Place | None:
        """A constant vector; None for none."""
        return None if value is None else self.dense(value).place

    # -- nodes --

    def _node(self, node: fx.Node) -> Any:
        given = [self._resolved(argument) for argument in node.args]
        named = {key: self._resolved(argument) for key, argument in node.kwargs.items()}
        target = cast(Any, node.target)
        name = target.__name__ if not hasattr(target, "_schema") else target._schema.name.split("::")[1]
        if name == "getitem":
            return given[0][given[1]]
        flat = [v for v in _flat([*given, *named.values()]) if isinstance(v, View | Weight | Tensor)]
        looks = name in _VIEWS and isinstance(given[0], Weight)
        if not any(isinstance(v, View) for v in flat) and not looks:
            return self._computed(target, given, named)
        handler = getattr(self, f"do_{name.strip('_')}", None)
        if handler is None:
            module = next(reversed((node.meta.get("nn_module_stack") or {"": ("the model", None)}).values()))
            raise ExportError(
                f"The C runtime has no operator {name}, which {module[0] or 'the model'} uses. docs/runtime.md lists "
                "those that it has; export to onnx instead, or write the layer with these."
            )
        value = node.meta.get("val")
        value = value[0] if isinstance(value, list | tuple) and value else value
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if shape is not None and any(not isinstance(size, int) for size in shape):
            raise ExportError(
                f"The shape of {node.name} depends on the inputs' values, which the C runtime cannot follow."
            )
        self.shape = shape
        return handler(*given, **named)

    def _resolved(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, list | tuple):
            return [self._resolved(one) for one in argument]
        return argument

    def _computed(self, target: Any, given: list[Any], named: dict[str, Any]) -> Any:
        """The result of an operator on constants."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(one) for one in value]
            return self.tensor(value) if isinstance(value, Weight) else value

        named = {key: plain(value) for key, value in named.items()}
        if "device" in named:
            named["device"] = torch.device("cpu")
        return target(*[plain(value) for value in given], **named)

    # -- views --

    def do_view(self, x: Any, shape: Any) -> Any:
        if not isinstance(x, View):
            return self.tensor(x).reshape(shape)
        made = cast(tuple[int, ...], self.shape)
        source = self.whole(x)
        return View(source.place, made, contiguous_strides(made))

    do_reshape = do__unsafe_view = do_unsafe_view = do_view

    def do_flatten(self, x: Any, *_: Any, **__: Any) -> Any:
        return self.do_view(x, self.shape)

    def do_unsqueeze(self, x: Any, dim: int) -> Any:
        if not isinstance(x, View):
            return self.tensor(x).unsqueeze(dim)
        at = _positive(dim, len(x.shape) + 1)
        return View(x.place, (*x.shape[:at], 1, *x.shape[at:]), (*x.strides[:at], 0, *x.strides[at:]))

    def do_squeeze(self, x: Any, dim: Any = None) -> Any:
        if not isinstance(x, View):
            return self.tensor(x).squeeze() if dim is None else self.tensor(x).squeeze(dim)
        chosen = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
        gone = {at for d in chosen if x.shape[at := _positive(d, len(x.shape))] == 1}
        left = [at for at in range(len(x.shape)) if at not in gone]
        return View(x.place, tuple(x.shape[at] for at in left), tuple(x.strides[at] for at in left))

    def do_permute(self, x: Any, dims: Sequence[int]) -> Any:
        if isinstance(x, Weight) and len(x.shape) == 2 and [_positive(d, 2) for d in dims] == [1, 0]:
            return Weight(x.name, x.tensor, x.thin, not x.turned)
        if not isinstance(x, View):
            return self.tensor(x).permute(*dims)
        order = [_positive(d, len(x.shape)) for d in dims]
        return View(x.place, tuple(x.shape[at] for at in order), tuple(x.strides[at] for at in order))

    def do_transpose(self, x: Any, first: int, second: int) -> Any:
        order = list(range(len(x.shape)))
        first, second = _positive(first, len(order)), _positive(second, len(order))
        order[first], order[second] = second, first
        return self.do_permute(x, order)

    def do_t(self, x: Any) -> Any:
        return self.do_permute(x, [1, 0]) if len(x.shape) == 2 else x

    do_numpy_T = do_t

    def do_expand(self, x: View, sizes: Sequence[int], **_: Any) -> View:
        return self._broadcast(x, cast(tuple[int, ...], self.shape))

    def _broadcast(self, x: View, shape: tuple[int, ...]) -> View:
        new = len(shape) - len(x.shape)
        strides = [0] * new + [0 if own == 1 else stride for own, stride in zip(x.shape, x.strides, strict=True)]
        return View(x.place, shape, tuple(strides))

    def do_select(self, x: View, dim: int, index: int) -> View:
        at = _positive(dim, len(x.shape))
        place = Place(x.place.buffer, x.place.offset + _positive(index, x.shape[at]) * x.strides[at])
        return View(place, x.shape[:at] + x.shape[at + 1 :], x.strides[:at] + x.strides[at + 1 :])

    def do_slice(self, x: View, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> View:
        at = _positive(dim, len(x.shape))
        size = x.shape[at]
        start, end, step = slice(start, end).indices(size)[0], slice(start, end).indices(size)[1], step
        count = max(0, -(-(end - start) // step))
        place = Place(x.place.buffer, x.place.offset + start * x.strides[at])
        shape, strides = list(x.shape), list(x.strides)
        shape[at], strides[at] = count, strides[at] * step
        return View(place, tuple(shape), tuple(strides))

    def do_narrow(self, x: View, dim: int, start: int, length: int) -> View:
        return self.do_slice(x, dim, start, start + length)

    def do_split(self, x: View, size: int, dim: int = 0) -> list[View]:
        whole = x.shape[_positive(dim, len(x.shape))]
        return [self.do_slice(x, dim, first, min(first + size, whole)) for first in range(0, whole, size)]

    def do_split_with_sizes(self, x: View, sizes: Sequence[int], dim: int = 0) -> list[View]:
        ends = np.cumsum(sizes).tolist()
        return [self.do_slice(x, dim, end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def do_chunk(self, x: View, chunks: int, dim: int = 0) -> list[View]:
        return self.do_split(x, -(-x.shape[_positive(dim, len(x.shape))] // chunks), dim)

    def do_unbind(self, x: View, dim: int = 0) -> list[View]:
        return [self.do_select(x, dim, index) for index in range(x.shape[_positive(dim, len(x.shape))])]

    def _same(self, x: Any, *_: Any, **__: Any) -> Any:
        return x

    do_clone = do_contiguous = do_detach = do_alias = do_dropout = do_lift_fresh_copy = do_to = do_native_dropout = (
        _same
    )
    do_feature_dropout = do_alpha_dropout = do_detach_ = _same

    def do_to_copy(self, x: View, **named: Any) -> View:
        return x

    def do_cat(self, parts: list[Any], dim: int = 0) -> View:
        made = self.made(cast(tuple[int, ...], self.shape))
        at, first = _positive(dim, len(made.shape)), 0
        for part in parts:
            view = self.dense(part)
            if not view.floats:
                continue
            self.copy(view, self.do_slice(made, at, first, first + view.shape[at]))
            first += view.shape[at]
        return made

    do_concat = do_cat

    def do_stack(self, parts: list[Any], dim: int = 0) -> View:
        return self.do_cat([self.do_unsqueeze(self.dense(part), dim) for part in parts], dim)

    def do_repeat(self, x: View, repeats: Sequence[int]) -> View:
        shape = cast(tuple[int, ...], self.shape)
        new = len(shape) - len(x.shape)
        own, strides = (1,) * new + x.shape, (0,) * new + x.strides
        made = self.made(shape)
        split = [pair for size, own_size in zip(shape, own, strict=True) for pair in (size // own_size, own_size)]
        source = View(x.place, tuple(split), tuple(v for stride in strides for v in (0, stride)))
        self.copy(source, View(made.place, tuple(split), contiguous_strides(split)))
        return made

    def do_constant_pad_nd(self, x: View, pad: Sequence[int], value: float = 0) -> View:
        made = self.made(cast(tuple[int, ...], self.shape))
        self.program.call("fill", [made.floats, float(value), made.place])
        inner: View = made
        for k in range(len(pad) // 2):
            at = len(made.shape) - 1 - k
            before = int(pad[2 * k])
            if before < 0 or pad[2 * k + 1] < 0:
                x = self.do_slice(x, at, max(-before, 0), x.shape[at] + min(int(pad[2 * k + 1]), 0))
            inner = self.do_slice(inner, at, max(before, 0), max(before, 0) + x.shape[at])
        self.copy(x, inner)
        return made

    def do_pad(self, x: View, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> View:
        if mode != "constant":
            raise ExportError(f"The C runtime pads with a constant only, not by {mode!r}.")
        return self.do_constant_pad_nd(x, pad, value or 0.0)

    # -- products --

    def do_linear(self, x: Any, weight: Any, bias: Any = None) -> View:
        if not isinstance(weight, Weight | Tensor):
            raise ExportError("The C runtime multiplies by a weight that is known when the model is exported.")
        return self._linear(x, self.matrix(weight), bias)

    def _linear(self, x: Any, matrix: Matrix, bias: Any) -> View:
        source = self.whole(x)
        items = source.floats // matrix.inputs
        made = self.made((*source.shape[:-1], matrix.outputs))
        use = matrix.packs(items)
        self.program.call(
            "linear", [matrix, self.vector(bias), items, int(use), source.place, made.place], scratch_of(matrix, use)
        )
        return made

    def do_addmm(self, bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> View:
        if beta != 1 or alpha != 1 or isinstance(weight, View):
            return self.do_add(bias, self.do_matmul(x, weight))
        return self._linear(x, self.matrix(weight, turned=True), bias)

    def do_matmul(self, x: Any, y: Any) -> View:
        if isinstance(y, Weight) and len(y.shape) == 2:
            return self._linear(x, self.matrix(y, turned=True), None)
        shape, a, b = cast(tuple[int, ...], self.shape), self.dense(x), self.dense(y)
        a = View(a.place, (1, *a.shape), (0, *a.strides)) if len(a.shape) == 1 else a
        b = View(b.place, (*b.shape, 1), (*b.strides, 0)) if len(b.shape) == 1 else b
        return View(self._products(a, b, 1.0).place, shape, contiguous_strides(shape))

    def _products(self, a: View, b: View, scale: float) -> View:
        """``scale a @ b`` of the last two dimensions; the others are broadcast."""
        lead = tuple(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
        a, b = self._broadcast(a, (*lead, *a.shape[-2:])), self._broadcast(b, (*lead, *b.shape[-2:]))
        batches = _merged(View(a.place, lead, a.strides[:-2]), View(b.place, lead, b.strides[:-2]))
        if len(batches[0]) > 1:
            a, b = self.whole(a), self.whole(b)
            batches = _merged(View(a.place, lead, a.strides[:-2]), View(b.place, lead, b.strides[:-2]))
        items, a_step, b_step = (of[0] for of in batches) if batches[0] else (1, 0, 0)
        rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        made = self.made((*lead, rows, columns))
        sizes, a_strides, b_strides = (
            (items, rows, inner, columns),
            (a_step, *a.strides[-2:]),
            (b_step, *b.strides[-2:]),
        )
        self.program.call("matmul", [sizes, a_strides, b_strides, scale, a.place, b.place, made.place])
        return made

    do_mm = do_bmm = do_matmul

    def do_scaled_dot_product_attention(
        self,
        q: View,
        k: View,
        v: View,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> View:
        if enable_gqa:
            raise ExportError("The C runtime has no attention with grouped queries.")
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        scores = self._products(q, self.do_transpose(k, -2, -1), scale)
        if is_causal:
            keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            attn_mask = torch.zeros(keep.shape).masked_fill(~keep, _MASKED)
        if attn_mask is not None:
            mask = self.tensor(attn_mask) if not isinstance(attn_mask, View) else attn_mask
            if isinstance(mask, Tensor):
                mask = torch.zeros(mask.shape).masked_fill(~mask, _MASKED) if mask.dtype is torch.bool else mask
                mask = mask.clamp(min=_MASKED)
            scores = self.pair("add", scores, mask)
        return self._products(self.do_softmax(scores, -1), v, 1.0)

    def do_embedding(self, weight: Any, ids: View, padding_idx: int = -1, *_: Any, **__: Any) -> View:
        matrix = self.matrix(weight, rows=True)
        if matrix.turned:
            matrix = self.constants.of_tensor(self.tensor(weight))
        source = self.whole(ids)
        made = self.made((*source.shape, matrix.cols))
        zero = weight.thin[0].parts[weight.thin[1]].zero_row if isinstance(weight, Weight) and weight.thin else None
        row = NO_ROW if zero is None else zero
        self.program.call(
            "embedding", [matrix, source.floats, row, source.place, made.place], scratch_of(matrix, Use.ROWS)
        )
        return made

    def _conv(
        self, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, flat: bool
    ) -> View:
        pair, shape = (_along if flat else lambda value, _: _two(value)), cast(tuple[int, ...], self.shape)
        kernel = pair(weight.shape[2:], 1)
        dilation, stride = pair(dilation, 1), pair(stride, 1)
        if isinstance(padding, str):
            if padding == "same":
                total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
                if any(t % 2 for t in total):
                    raise ExportError("The C runtime has no padding='same' of an even kernel: pad before the layer.")
                padding = (total[0] // 2, total[1] // 2)
            else:
                padding = (0, 0)
        else:
            padding = pair(padding, 0)
        source = self.whole(x)
        alone = len(source.shape) == (2 if flat else 3)
        sizes = source.shape if alone else source.shape[1:]
        outs = shape if alone else shape[1:]
        sizes, outs = ((sizes[0], 1, sizes[1]), (outs[0], 1, outs[1])) if flat else (sizes, outs)
        window = (*sizes, *outs, *kernel, *stride, *padding, *dilation, groups)
        matrix = self.matrix(weight, rows=groups > 1)
        if matrix.turned:
            matrix = self.constants.of_tensor(self.tensor(weight))
        use = matrix.packs(outs[1] * outs[2]) if groups == 1 else Use.ROWS
        items, made = 1 if alone else source.shape[0], self.made(shape)
        scratch = matrix.scratch(use) + matrix.cols + matrix.rows
        arguments = [window, matrix, self.vector(bias), items, int(use), source.place, made.place]
        self.program.call("conv", arguments, scratch)
        return made

    def do_conv2d(
        self,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> View:
        return self._conv(x, weight, bias, stride, padding, dilation, groups, flat=False)

    def do_conv1d(
        self,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> View:
        return self._conv(x, weight, bias, stride, padding, dilation, groups, flat=True)

    def do_convolution(
        self, x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, turned: bool, _: Any, groups: int
    ) -> View:
        if turned or len(w.shape) not in (3, 4):
            raise ExportError("The C runtime has no transposed and no three-dimensional convolution.")
        return self._conv(x, w, bias, stride, padding, dilation, groups, flat=len(w.shape) == 3)

    # -- recurrent layers --

    def _recurrent(
        self,
        mode: str,
        x: Any,
        states: list[Any],
        weights: list[Any],
        biased: bool,
        layers: int,
        both: bool,
        first: bool,
    ) -> tuple[View, ...]:
        source = self.whole(x)
        sequence = len(source.shape) == 2
        if sequence:
            source = View(
                source.place, (1, *source.shape) if first else (source.shape[0], 1, source.shape[1]), (0, 0, 0)
            )
        steps, items = (source.shape[1], source.shape[0]) if first else (source.shape[0], source.shape[1])
        places, hidden = 2 if both else 1, states[0].shape[-1]
        each = 4 if biased else 2
        step, item = (1, steps) if first else (items, 1)  # in rows of the sequence
        if self.streaming and both:
            raise ExportError(
                "A layer of both directions needs the whole sequence: it cannot be exported for streaming."
            )
        begun = [self._states(state, layers * places * items * hidden) for state in states]
        width = source.shape[2]
        for level in range(layers):
            made = self.made((source.shape[0], source.shape[1], places * hidden))
            for way in range(places):
                at = (level * places + way) * each
                own = weights[at : at + each]
                matrices = [self.matrix(one) for one in own[:2]]
                biases = [self.vector(one) for one in own[2:]] if biased else [None, None]
                use = Use.PACKED if all(m.packs(steps) is Use.PACKED for m in matrices) else Use.ONCE
                scratch = sum(m.scratch(use) for m in matrices) + 2 * _GATES[mode] * hidden
                for i in range(items):
                    place = ((level * places + way) * items + i) * hidden
                    holds = [Place(state.buffer, state.offset + place) for state in begun]
                    arguments = [
                        _CELLS[mode],
                        *matrices,
                        *biases,
                        steps,
                        way,
                        int(use),
                        Place(source.place.buffer, source.place.offset + i * item * width),
                        step * width,
                        Place(made.place.buffer, i * item * places * hidden + way * hidden),
                        step * places * hidden,
                        holds[0],
                        holds[1] if len(holds) > 1 else None,
                    ]
                    self.program.call("recurrent", arguments, scratch)
            source, width = made, places * hidden
        shape = (
            source.shape[1:] if sequence and first else (source.shape[0], source.shape[2]) if sequence else source.shape
        )
        ends = [(layers * places, hidden) if sequence else (layers * places, items, hidden) for _ in begun]
        views = [View(place, end, contiguous_strides(end)) for place, end in zip(begun, ends, strict=True)]
        return (View(source.place, tuple(shape), contiguous_strides(shape)), *views)

    def _states(self, start: Any, floats: int) -> Place:
        """Where a state is kept during the run: in a buffer of its own, which begins with the given one."""
        buffer = Buffer(floats, kept=self.streaming)
        zeros = not isinstance(start, View) and not self.tensor(start).any()
        if self.streaming:
            if not zeros:
                raise ExportError("Streaming begins with states of zeros: call the recurrent layer without states.")
        elif zeros:
            self.program.call("fill", [floats, 0.0, Place(buffer)])
        else:
            view = self.whole(start)
            self.copy(view, View(Place(buffer), view.shape, contiguous_strides(view.shape)))
        return Place(buffer)

    def do_lstm(
        self,
        x: Any,
        states: list[Any],
        weights: list[Any],
        biased: bool,
        layers: int,
        _: Any,
        __: Any,
        both: bool,
        first: bool,
    ) -> Any:
        return self._recurrent("lstm", x, states, weights, biased, layers, both, first)

    def do_gru(
        self,
        x: Any,
        state: Any,
        weights: list[Any],
        biased: bool,
        layers: int,
        _: Any,
        __: Any,
        both: bool,
        first: bool,
    ) -> Any:
        return self._recurrent("gru", x, [state], weights, biased, layers, both, first)

    def do_rnn_tanh(
        self,
        x: Any,
        state: Any,
        weights: list[Any],
        biased: bool,
        layers: int,
        _: Any,
        __: Any,
        both: bool,
        first: bool,
    ) -> Any:
        return self._recurrent("rnn_tanh", x, [state], weights, biased, layers, both, first)

    def do_rnn_relu(
        self,
        x: Any,
        state: Any,
        weights: list[Any],
        biased: bool,
        layers: int,
        _: Any,
        __: Any,
        both: bool,
        first: bool,
    ) -> Any:
        return self._recurrent("rnn_relu", x, [state], weights, biased, layers, both, first)

    # -- functions of each entry --

    def map(self, function: str, x: Any, a: float = 0.0, b: float = 0.0) -> View:
        """A function of every entry."""
        source = self.whole(x)
        made = self.made(source.shape)
        index = FUNCTIONS.index(function)
        self.program.call("map", [index, made.floats, float(a), float(b), source.place, made.place], over=source.place)
        return made

    def do_gelu(self, x: Any, *, approximate: str = "none") -> View:
        return self.map("gelu_tanh" if approximate == "tanh" else "gelu", x)

    def do_leaky_relu(self, x: Any, slope: float = 0.01) -> View:
        return self.map("leaky", x, slope)

    def do_elu(self, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> View:
        if scale != 1.0 or input_scale != 1.0:
            raise ExportError("The C runtime has elu with one factor only, and no selu.")
        return self.map("elu", x, alpha)

    def do_clamp(self, x: Any, min: float | None = None, max: float | None = None) -> View:
        return self.map("clamp", x, -_LARGEST if min is None else min, _LARGEST if max is None else max)

    do_hardtanh = do_clamp

    def do_relu6(self, x: Any) -> View:
        return self.map("clamp", x, 0.0, 6.0)

    def do_softplus(self, x: Any, beta: float = 1, threshold: float = 20) -> View:
        if beta != 1:
            raise ExportError("The C runtime has softplus with beta = 1 only.")
        return self.map("softplus", x)

    def do_neg(self, x: Any) -> View:
        return self.map("line", x, -1.0)

    def do_rsqrt(self, x: Any) -> View:
        return self.map("reciprocal", self.map("sqrt", x))

    def do_pow(self, x: Any, power: Any) -> View:
        functions = {2.0: "square", 0.5: "sqrt", -1.0: "reciprocal"}
        if not isinstance(power, int | float) or float(power) not in functions:
            raise ExportError(f"The C runtime has the powers 2, 1/2 and -1, not {power!r}.")
        return self.map(functions[float(power)], x)

    def pair(self, function: str, x: Any, y: Any) -> View:
        """A function of two entries, with broadcasting."""
        number = isinstance(y, int | float)
        if number and function in ("add", "subtract", "multiply", "divide"):
            y = float(y)
            line = {
                "add": (1.0, y),
                "subtract": (1.0, -y),
                "multiply": (y, 0.0),
                "divide": (1 / y if y else math.inf, 0.0),
            }
            return self.map("line", x, *line[function])
        a, b = self.dense(x), self.dense(y)
        shape = tuple(torch.broadcast_shapes(a.shape, b.shape))
        a, b = self._broadcast(a, shape), self._broadcast(b, shape)
        sizes, first, second = _merged(a, b)
        if len(sizes) > 4:
            a, b = self.whole(a), self.whole(b)
            sizes, first, second = _merged(a, b)
        pad = 4 - len(sizes)
        made = self.made(shape)
        arguments = [
            PAIRS.index(function),
            (1,) * pad + sizes,
            (0,) * pad + first,
            (0,) * pad + second,
            a.place,
            b.place,
            made.place,
        ]
        over = a if a.contiguous and a.place.offset == 0 and a.place.buffer.floats == made.floats else None
        same = over is not None and b.place.buffer is not a.place.buffer
        self.program.call("pair", arguments, over=a.place if same else None)
        return made

    def do_add(self, x: Any, y: Any, *, alpha: float = 1) -> View:
        if isinstance(x, int | float):
            x, y = y, x
        return self.pair(
            "add",
            x,
            self.map("line", y, alpha)
            if alpha != 1 and not isinstance(y, int | float)
            else y
            if alpha == 1
            else alpha * y,
        )

    def do_sub(self, x: Any, y: Any, *, alpha: float = 1) -> View:
        return self.pair("subtract", x, y) if alpha == 1 else self.do_add(x, y, alpha=-alpha)

    def do_rsub(self, x: Any, y: Any, *, alpha: float = 1) -> View:
        return self.do_add(self.map("line", x, -alpha), y)

    def do_mul(self, x: Any, y: Any) -> View:
        return self.pair("multiply", y, x) if isinstance(x, int | float) else self.pair("multiply", x, y)

    def do_div(self, x: Any, y: Any, **named: Any) -> View:
        if named.get("rounding_mode"):
            raise ExportError("The C runtime does not round quotients.")
        return self.pair("divide", x, y)

    def do_maximum(self, x: Any, y: Any) -> View:
        return self.pair("larger", x, y)

    def do_minimum(self, x: Any, y: Any) -> View:
        return self.pair("smaller", x, y)

    def do_glu(self, x: View, dim: int = -1) -> View:
        first, second = self.do_chunk(x, 2, dim)
        return self.pair("multiply", first, self.map("sigmoid", second))

    # -- normalisations --

    def _affine(self, x: Any, scale: np.ndarray, shift: np.ndarray, axis: int = 1) -> View:
        source = self.whole(x)
        made = self.made(source.shape)
        outer, inner = math.prod(source.shape[:axis]), math.prod(source.shape[axis + 1 :])
        vectors = [self.vector(torch.from_numpy(one.astype(np.float32))) for one in (scale, shift)]
        arguments = [outer, source.shape[axis], inner, *vectors, source.place, made.place]
        self.program.call("affine", arguments, over=source.place)
        return made

    def do_native_batch_norm_legit_no_training(
        self, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, epsilon: float
    ) -> tuple[View, ...]:
        center, spread = (self.tensor(one).double().numpy() for one in (mean, variance))
        scale = 1 / np.sqrt(spread + epsilon)
        scale = scale if weight is None else scale * self.tensor(weight).double().numpy()
        shift = -center * scale + (0 if bias is None else self.tensor(bias).double().numpy())
        return (self._affine(x, scale, shift),)

    def do_batch_norm(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        mean: Any,
        variance: Any,
        training: bool,
        momentum: float,
        epsilon: float,
        _: Any,
    ) -> View:
        return self.do_native_batch_norm_legit_no_training(x, weight, bias, mean, variance, momentum, epsilon)[0]

    def do_layer_norm(
        self, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *_: Any
    ) -> View:
        source = self.whole(x)
        made, count = self.made(source.shape), math.prod(shape)
        arguments = [
            made.floats // count,
            count,
            float(epsilon),
            self.vector(weight),
            self.vector(bias),
            source.place,
            made.place,
        ]
        self.program.call("normalize", arguments, over=source.place)
        return made

    def do_native_layer_norm(self, x: Any, shape: Any, weight: Any, bias: Any, epsilon: float) -> tuple[View, ...]:
        return (self.do_layer_norm(x, shape, weight, bias, epsilon),)

    def do_group_norm(
        self, x: Any, groups: int, weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *_: Any
    ) -> View:
        source = self.whole(x)
        made, channels = self.made(source.shape), source.shape[1]
        count = math.prod(source.shape[1:]) // groups
        arguments = [made.floats // count, count, float(epsilon), None, None, source.place, made.place]
        self.program.call("normalize", arguments, over=source.place)
        if weight is None and bias is None:
            return made
        scale = np.ones(channels) if weight is None else self.tensor(weight).double().numpy()
        shift = np.zeros(channels) if bias is None else self.tensor(bias).double().numpy()
        return self._affine(made, scale, shift)

    def do_rms_norm(self, x: Any, shape: Sequence[int], weight: Any = None, epsilon: float | None = None) -> View:
        source, count = self.whole(x), math.prod(shape)
        rows = View(source.place, (source.floats // count, count), (count, 1))
        squares = self._reduce(self.map("square", rows), [1], _MEAN, True)
        factor = self.do_rsqrt(self.map("line", squares, 1.0, epsilon or float(torch.finfo(torch.float32).eps)))
        made = self.pair("multiply", rows, factor)
        made = View(made.place, source.shape, contiguous_strides(source.shape))
        return made if weight is None else self.pair("multiply", made, weight)

    def do_softmax(self, x: Any, dim: int, *_: Any, logarithm: int = 0, **__: Any) -> View:
        source = self.whole(x)
        at, made = _positive(dim, len(source.shape)), self.made(source.shape)
        outer, inner = math.prod(source.shape[:at]), math.prod(source.shape[at + 1 :])
        arguments = [logarithm, outer, source.shape[at], inner, source.place, made.place]
        self.program.call("softmax", arguments, over=source.place)
        return made

    def do_log_softmax(self, x: Any, dim: int, *_: Any, **__: Any) -> View:
        return self.do_softmax(x, dim, logarithm=1)

    # -- sums and pools --

    def _reduce(self, x: Any, dims: Any, function: int, keep: bool) -> View:
        view = self.dense(x)
        chosen = sorted(
            {
                _positive(d, len(view.shape))
                for d in (
                    range(len(view.shape)) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims
                )
            }
        )
        if chosen != list(range(chosen[0], chosen[-1] + 1)):
            left = [at for at in range(len(view.shape)) if at not in chosen]
            order = [*left, *chosen]
            view = View(view.place, tuple(view.shape[at] for at in order), tuple(view.strides[at] for at in order))
            low, high = len(left), len(order)
        else:
            left = [at for at in range(len(view.shape)) if at not in chosen]
            low, high = chosen[0], chosen[-1] + 1
        source = self.whole(view)
        outer, count, inner = (math.prod(source.shape[a:b]) for a, b in ((0, low), (low, high), (high, None)))
        shape = tuple(self.dense(x).shape[at] if at in left else 1 for at in range(len(view.shape)))
        shape = shape if keep else tuple(self.dense(x).shape[at] for at in left)
        made = self.made(shape)
        self.program.call("reduce", [function, outer, count, inner, source.place, made.place])
        return made

    def do_mean(self, x: Any, dims: Any = None, keepdim: bool = False, **_: Any) -> View:
        return self._reduce(x, dims, _MEAN, keepdim)

    def do_sum(self, x: Any, dims: Any = None, keepdim: bool = False, **_: Any) -> View:
        return self._reduce(x, dims, _SUM, keepdim)

    def do_amax(self, x: Any, dims: Any = None, keepdim: bool = False) -> View:
        return self._reduce(x, dims, _MAXIMUM, keepdim)

    def do_amin(self, x: Any, dims: Any = None, keepdim: bool = False) -> View:
        return self._reduce(x, dims, _MINIMUM, keepdim)

    def _pool(
        self, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, largest: bool, whole: bool, flat: bool
    ) -> View:
        pair, shape = (_along if flat else lambda value, _: _two(value)), cast(tuple[int, ...], self.shape)
        source = self.whole(x)
        spatial = 1 if flat else 2
        planes = math.prod(source.shape[:-spatial])
        size, outs = source.shape[-spatial:], shape[-spatial:]
        size, outs = ((1, *size), (1, *outs)) if flat else (size, outs)
        kernel = pair(kernel, 1)
        strides = pair(stride, 1) if stride not in (None, []) else kernel
        window = (planes, *size, planes, *outs, *kernel, *strides, *pair(padding, 0), *pair(dilation, 1), 1)
        made = self.made(shape)
        self.program.call("pool", [window, int(largest), int(whole), source.place, made.place])
        return made

    def do_avg_pool2d(
        self,
        x: Any,
        kernel: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil: bool = False,
        whole: bool = True,
        by: Any = None,
    ) -> View:
        if by is not None:
            raise ExportError("The C runtime has no pooling with a divisor of its own.")
        return self._pool(x, kernel, stride, padding, 1, False, whole, flat=False)

    def do_avg_pool1d(
        self, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, ceil: bool = False, whole: bool = True
    ) -> View:
        return self._pool(x, kernel, stride, padding, 1, False, whole, flat=True)

    def do_max_pool2d(
        self, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
    ) -> View:
        return self._pool(x, kernel, stride, padding, dilation, True, False, flat=False)

    def do_max_pool1d(
        self, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
    ) -> View:
        return self._pool(x, kernel, stride, padding, dilation, True, False, flat=True)

    def do_max_pool2d_with_indices(self, x: Any, *rest: Any, **named: Any) -> tuple[View, ...]:
        return (self.do_max_pool2d(x, *rest, **named),)

    def _adaptive(self, x: Any, sizes: Any, flat: bool) -> View:
        view = self.dense(x)
        spatial = 1 if flat else 2
        shape = cast(tuple[int, ...], self.shape)
        size, outs = view.shape[-spatial:], shape[-spatial:]
        if any(a % b for a, b in zip(size, outs, strict=True)):
            raise ExportError(f"The C runtime pools {size} to {outs} only where these divide the size.")
        kernel = [a // b for a, b in zip(size, outs, strict=True)]
        return self._pool(x, kernel, kernel, 0, 1, False, True, flat)

    def do_adaptive_avg_pool2d(self, x: Any, sizes: Any) -> View:
        return self._adaptive(x, sizes, flat=False)

    def do_adaptive_avg_pool1d(self, x: Any, sizes: Any) -> View:
        return self._adaptive(x, sizes, flat=True)


def _function(name: str) -> Callable[[_Builder, Any], View]:
    return lambda self, x, *_, **__: self.map(name, x)


for _name in (
    "relu",
    "sigmoid",
    "tanh",
    "silu",
    "exp",
    "log",
    "sqrt",
    "abs",
    "square",
    "reciprocal",
    "hardsigmoid",
    "hardswish",
):
    setattr(_Builder, f"do_{_name}", _function(_name))

_VIEWS = ("permute", "transpose", "t", "numpy_T")
_MASKED = -1e30  # a score whose exponential is 0
_LARGEST = float(np.finfo(np.float32).max)


def _flat(values: Sequence[Any]) -> list[Any]:
    return [one for value in values for one in (_flat(value) if isinstance(value, list) else [value])]


def _merged(first: View, second: View) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes and both strides, with neighbouring dimensions joined where both tensors allow."""
    made: list[list[int]] = []
    for size, a, b in zip(first.shape, first.strides, second.strides, strict=True):
        if size == 1:
            continue
        if made and made[-1][1] == a * size and made[-1][2] == b * size:
            made[-1] = [made[-1][0] * size, a, b]
        else:
            made.append([size, a, b])
    return tuple(m[0] for m in made), tuple(m[1] for m in made), tuple(m[2] for m in made)
