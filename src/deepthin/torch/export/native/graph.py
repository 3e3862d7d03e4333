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
from deepthin.torch.export.native.matrices import Matrices
from deepthin.torch.export.native.matrix import Matrix
from deepthin.torch.export.native.program import Buffer, Place, Program, Space, View, contiguous_strides, merged
from deepthin.torch.generated import ThinLayer
from deepthin.torch.weight import ThinPart, ThinWeight

DIMENSIONS = 6  # of a copy
HANDLERS: dict[str, Callable[..., Any]] = {}
"""Operator of PyTorch -> what appends its calls; `operators` imports all files that register some."""
_ROUNDS = 3  # of decomposing what has no handler
_OF_WEIGHTS = (*("permute", "transpose", "t", "numpy_T", "slice", "narrow", "split", "split_with_sizes", "chunk"),)
"""Views of a weight that may stay one."""
_IGNORED = ("assert_tensor_metadata", "assert_async", "assert_scalar", "sym_constrain_range_for_size")


def operator(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler: a function of the builder and of the operator's arguments, which returns its result.

    Args:
        names: Of PyTorch's operators, without namespace and leading underscores.

    Returns:
        A decorator.
    """

    def registered(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return registered


class Weight:
    """A parameter of the model: a tensor, and the thin weight that it came from, if any.

    Args:
        name: Its name in the model.
        tensor: Its values.
        thin: The thin weight, and which of its tensors.
        turned: Whether it is used transposed.
        rows: Its first row and the one after its last, where it is a range of rows of the thin tensor.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        thin: tuple[ThinWeight, int] | None,
        turned: bool = False,
        rows: tuple[int, int] | None = None,
    ) -> None:
        self.name, self.tensor, self.thin, self.turned, self.rows = name, tensor, thin, turned, rows

    def range(self, first: int, stop: int) -> "Weight | Tensor":
        """A range of its rows, which stays thin where the thin weight is a matrix of outputs x inputs.

        Args:
            first: The first row.
            stop: The row after the last.

        Returns:
            The range.
        """
        if self.turned:
            return self.tensor.T[first:stop]
        transposed = self.thin is not None and self.thin[0].parts[self.thin[1]].transposed
        if self.tensor.dim() != 2 or transposed:
            return self.tensor[first:stop]
        base = self.rows[0] if self.rows else 0
        return Weight(self.name, self.tensor[first:stop], self.thin, rows=(base + first, base + stop))

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
        table = torch.export.default_decompositions()
        for _ in range(_ROUNDS):
            calls = (node.target for node in exported.graph.nodes if node.op == "call_function")
            lacking = {target: table[target] for target in calls if _name(target) not in HANDLERS and target in table}
            if not lacking:
                break
            exported = exported.run_decompositions(lacking)
    known: dict[str, tuple[ThinWeight, int]] = dict(thin)
    for same in names.values():
        found = next((thin[name] for name in same if name in thin), None)
        known |= {name: found for name in same if found is not None}
    return Builder(exported, known, streaming).program


class Builder:
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
        sizes, first, second = merged(source, target)
        if len(sizes) > DIMENSIONS:
            raise ExportError(f"The C runtime copies tensors of up to {DIMENSIONS} dimensions, not {source.shape}.")
        pad = DIMENSIONS - len(sizes)
        arguments = [(1,) * pad + sizes, (0,) * pad + first, (0,) * pad + second, source.place, target.place]
        self.program.call("copy", arguments)

    def matrix(self, value: Any, turned: bool = False, rows: bool = False) -> Matrix:
        """The matrix that multiplies from the left: outputs x inputs; ``turned``: the tensor is inputs x outputs."""
        if isinstance(value, Weight):
            turned ^= value.turned
        own = (id(value.thin[0]), value.thin[1], value.rows) if isinstance(value, Weight) and value.thin else None
        key = (own or id(value.tensor if isinstance(value, Weight) else value), turned, rows)
        if key in self._found:
            return self._found[key]
        if isinstance(value, Weight) and value.thin is not None:
            weight, index = value.thin
            found, form = self.constants.of_weight(weight, index, rows, value.rows)
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
        target, name = cast(Any, node.target), _name(node.target)
        if name in _IGNORED:
            return None
        if name == "getitem":
            return given[0][given[1]]
        flat = [v for v in _flat([*given, *named.values()]) if isinstance(v, View | Weight | Tensor)]
        looks = name in _OF_WEIGHTS and isinstance(given[0], Weight)
        if not any(isinstance(v, View) for v in flat) and not looks:
            return self._computed(target, given, named)
        handler = HANDLERS.get(name)
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
        return handler(self, *given, **named)

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


def _name(target: Any) -> str:
    """An operator's name, without namespace and leading underscores."""
    name = target._schema.name.split("::")[1] if hasattr(target, "_schema") else target.__name__
    return name.lstrip("_")


def _flat(values: Sequence[Any]) -> list[Any]:
    return [one for value in values for one in (_flat(value) if isinstance(value, list) else [value])]


def positive(index: int, size: int) -> int:
    """A dimension, counted from the first.

    Args:
        index: Perhaps negative, counted from the end.
        size: Number of dimensions.

    Returns:
        0 to size - 1.
    """
    return index + size if index < 0 else index
