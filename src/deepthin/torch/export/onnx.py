"""A portable model as an ONNX file."""

import contextlib
import itertools
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from deepthin.torch.export.recurrent import GATES, ORDER, as_operators
from deepthin.torch.export.written import Written
from deepthin.torch.packed import PackedIntegers
from deepthin.torch.portable import PortableCode, Stage, portable

_OPSET = 18
_FOLDED = 64  # bytes up to which results of constants are computed at export


def build(
    model: nn.Module, example: Sequence[Tensor], stage: Stage = "band", compact: bool = False, folds: bool = False
) -> Any:
    """Export a model.

    Args:
        model: A thin or dense network; it is copied.
        example: Its inputs. Every dimension may vary later that the model lets vary.
        stage: How inputs are correlated with the smaller factor.
        compact: Whether integers are stored once.
        folds: Whether another program computes what follows from constants and stores it: integers are kept from it.

    Returns:
        An ``onnx.ModelProto``, opset 18, all constants within, without names of source files.
    """
    copied = portable(model, stage, True, compact)
    as_operators(copied)
    program = exported(copied, example)
    with quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,  # which would compute the dense weights
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
            custom_translation_table={cast(Any, torch.ops).deepthin.sequence.default: _sequence()},
        )
    _simplify(cast(Any, made).model)
    proto = cast(Any, made).model_proto
    _strip(proto.graph)
    del proto.metadata_props[:]
    codes = [
        (name, code) for name, code in copied.named_modules() if isinstance(code, PortableCode) and code.makes_dense
    ]
    constants = {f"{name}.{key}".lstrip(".") for name, code in codes for key, _ in code.named_buffers()}
    if folds:
        packed = [(name, part) for name, part in copied.named_modules() if isinstance(part, PackedIntegers)]
        constants |= {f"{name}.{key}".lstrip(".") for name, part in packed for key, _ in part.named_buffers()}
    areas = {math.prod(code.decoder.shape) for _, code in codes}
    if constants:
        _defer(proto.graph, constants, areas)
    return proto


def write(model: nn.Module, example: Sequence[Tensor], path: Path, compact: bool = False) -> Written:
    """Export a model to a file.

    Args:
        model: A thin or dense network.
        example: Its inputs.
        path: The ``.onnx`` file.
        compact: Whether integers are stored once.

    Returns:
        The files that were written.
    """
    path.write_bytes(build(model, example, compact=compact).SerializeToString())
    return Written.of(path)


def runner(path: Path) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Load a file.

    Args:
        path: The ``.onnx`` file.

    Returns:
        A function of the inputs, by ONNX Runtime on one thread of the CPU.
    """
    session = _session(path)
    names = [given.name for given in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def constants(path: Path) -> list[tuple[str, int, int]]:
    """The constants of a file, and of what ONNX Runtime makes of it when it is loaded.

    Args:
        path: The ``.onnx`` file.

    Returns:
        Name, number of entries, and bytes of each.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        _session(path, optimised)
        models = [onnx.load(path), onnx.load(optimised)]
    tensors = [tensor for model in models for tensor in _tensors(model.graph)]
    arrays = [(tensor.name, onnx.numpy_helper.to_array(tensor)) for tensor in tensors]
    return [(name, array.size, array.nbytes) for name, array in arrays]


def _session(path: Path, optimised: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)


def exported(model: nn.Module, example: Sequence[Tensor], fixed: bool = False) -> Any:
    """A portable model as a ``torch.export`` program.

    Args:
        model: The model.
        example: Its inputs.
        fixed: Whether all shapes are those of the example.

    Returns:
        The program; dimensions vary where the model lets them.
    """
    auto = torch.export.Dim.AUTO
    shapes = None if fixed else tuple(dict.fromkeys(range(tensor.dim()), auto) for tensor in example)
    with quiet(), torch.no_grad():
        return torch.export.export(model, tuple(example), dynamic_shapes=shapes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' messages about themselves.

    Yields:
        Nothing.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "torch._export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _sequence() -> Any:
    """What ``torch.ops.deepthin.sequence`` is in ONNX."""
    from onnxscript import opset18 as op

    def reordered(tensor: Any, cell: str, copies: int = 1) -> Any:
        gates = GATES[cell]
        if gates == 1:
            return tensor
        parts = op.Split(tensor, axis=1, num_outputs=gates * copies)
        return op.Concat(*(parts[gates * copy + at] for copy in range(copies) for at in ORDER[cell]), axis=1)

    def sequence(x: Any, h: Any, c: Any, w: Any, r: Any, b: Any, cell: str) -> Any:
        places, hidden = int(w.shape[0]), int(r.shape[2])
        direction = "bidirectional" if places == 2 else "forward"
        w, r, b = reordered(w, cell), reordered(r, cell), reordered(b, cell, 2)
        if cell == "LSTM":
            y, last, last_c = op.LSTM(x, w, r, b, None, h, c, direction=direction, hidden_size=hidden)
        else:
            last_c = op.Identity(c)
            if cell == "GRU":
                y, last = op.GRU(x, w, r, b, None, h, direction=direction, hidden_size=hidden, linear_before_reset=1)
            else:
                activations = [cell.removeprefix("RNN_").title()] * places
                y, last = op.RNN(x, w, r, b, None, h, direction=direction, hidden_size=hidden, activations=activations)
        y = op.Transpose(y, perm=[0, 2, 1, 3])  # steps x batch x directions x hidden
        return op.Reshape(y, op.Constant(value_ints=[0, 0, -1])), last, last_c

    return sequence


def _simplify(model: Any) -> None:
    """Compute what is small, merge what is equal, and give results short names: nodes take more bytes than codes."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.optimize_ir(model, input_size_limit=_FOLDED, output_size_limit=_FOLDED, num_iterations=2)
    common.CommonSubexpressionEliminationPass()(model)
    common.DeduplicateInitializersPass(size_limit=_FOLDED)(model)
    numbers = itertools.count()
    for graph in model.graphs():  # with those of loops, whose names must differ
        for node in graph:
            node.name = None
            for output in node.outputs:
                if not output.is_graph_output():
                    output.name = str(next(numbers))


def _strip(graph: Any) -> None:
    """Remove names of source files, shapes of intermediate results, and shapes of results that may vary."""
    del graph.value_info[:], graph.metadata_props[:]
    graph.doc_string = ""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)
    for value in [*graph.input, *graph.output, *graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""


def _defer(graph: Any, names: set[str], areas: set[int]) -> None:
    """Let constants depend on the shape of the input, so that no runtime computes the dense weight when it loads.

    A dense weight that is decoded at every run is temporary; as a constant it would stay in memory.

    Args:
        graph: The graph of a model.
        names: The constants from which weights are decoded.
        areas: Numbers of entries of these weights: constants of one number repeated so often depend on the input, too.
    """
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    known = dict(stored)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            known[node.output[0]] = node.attribute[0].t
    zero = "deepthin.zero"
    added = [
        helper.make_node("Shape", [graph.input[0].name], ["deepthin.batch"], start=0, end=1),
        helper.make_node("Sub", ["deepthin.batch", "deepthin.batch"], [zero]),
    ]
    for name in sorted(names & stored.keys()):
        shape = f"{name}.shape"
        graph.initializer.append(numpy_helper.from_array(np.array(stored[name].dims, np.int64).reshape(-1), shape))
        added += [
            helper.make_node("Add", [shape, zero], [f"{shape}.now"]),
            helper.make_node("Reshape", [name, f"{shape}.now"], [f"{name}.now"], allowzero=1),
        ]
    later: list[Any] = []
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name in names and name in stored:
                node.input[at] = f"{name}.now"
        repeated = {"Expand": 1, "Tile": 1, "ConstantOfShape": 0}.get(node.op_type)
        shape = None if repeated is None else known.get(node.input[repeated])
        if shape is not None and math.prod(numpy_helper.to_array(shape).tolist()) in areas:
            name = f"{node.output[0]}.shape.now"
            later.append(helper.make_node("Add", [node.input[repeated], zero], [name]))
            node.input[repeated] = name
        later.append(node)
    nodes = [*added, *later]
    del graph.node[:]
    graph.node.extend(nodes)


def warm_up() -> None:
    """Load the runtime and run an empty session, so that the memory of a file can be told apart from its own."""
    import onnx
    import onnxruntime

    shown = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "empty", shown[:1], shown[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", _OPSET)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros(1, np.float32)})
