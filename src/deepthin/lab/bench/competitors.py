"""The timed competitors: dense products, int8, symbols, sparse rows, and thin layers."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.errors import BudgetError
from deepthin.kernels import products
from deepthin.lab.bench.networks import Work
from deepthin.lab.bench.timing import Timing
from deepthin.methods.factor import Factor
from deepthin.methods.kmeans import KMeans
from deepthin.methods.scalar import Uniform
from deepthin.storage.contents import Part
from deepthin.torch.exchange import make_thin
from deepthin.torch.weight import ThinWeight

Shapes = Sequence[tuple[int, int]]
"""(outputs, inputs) of one linear layer after the other, rectified but for the last."""
TFKALDI: Shapes = ((2048, 440), *[(2048, 2048)] * 5, (1952, 2048))
EIGHT_BITS: Mapping[str, Any] = {"method": "uniform", "bits": 8}
CODED: Mapping[str, Any] = {"method": "coded"}


def thin_network(
    model: nn.Module, ratio: float, rank: int, method: str = "deepthin", then: Mapping[str, Any] | None = None
) -> tuple[Any, int]:
    """Compress a network for timing, with fresh factors.

    Args:
        model: The dense network; changed in place.
        ratio: Bytes of its matrices over those of the dense ones, 0 to 1.
        rank: Rank of DeepThin's factors; other methods ignore it.
        method: Name of the method, as users write it.
        then: The second method, which stores the factors, with its options; None: they are stored in float32.

    Returns:
        The network, and n of its largest matrix; 0 for a method without n.

    Raises:
        BudgetError: The ratio cannot be reached.
    """
    rule = {
        "method": method,
        **({"rank": rank} if method == "deepthin" else {}),
        **({"then": dict(then)} if then else {}),
    }
    report = dt.compress(model, {"model": {"ratio": ratio}, "rules": {"*": rule}}, init="scratch")
    return model, getattr(max(report.rows, key=lambda row: row.dense_bytes), "n", None) or 0


def network(shapes: Shapes) -> nn.Sequential:
    """A dense network of linear layers.

    Args:
        shapes: (outputs, inputs) of each layer, rectified but for the last.

    Returns:
        The network, with torch's random weights.
    """
    layers: list[nn.Module] = []
    for rows, cols in shapes:
        layers += [nn.Linear(cols, rows), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def dense_competitors(case: str, shapes: Shapes, x: torch.Tensor) -> Iterable[Timing]:
    """The dense competitors: torch's layers, oneDNN with packed weights, and dynamic int8.

    Args:
        case: Name of the case; ``"train"`` times a training step of torch's layers alone.
        shapes: (outputs, inputs) of each layer.
        x: The inputs, batch x inputs.

    Yields:
        What is timed, without a ratio; int8 only where torch has an engine for it.
    """
    dense = network(shapes)
    if case == "train":
        yield Timing("dense", None, _step(dense, x))
        return
    yield Timing("dense", None, _forward(dense, x))
    layers = [layer for layer in dense if isinstance(layer, nn.Linear)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), len(x)) for layer in layers]
    after = ["relu"] * (len(layers) - 1) + ["none"]

    def one_dnn(x: torch.Tensor) -> torch.Tensor:
        for weight, layer, activation in zip(packed, layers, after, strict=True):
            x = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, activation, [], "")
        return x

    yield Timing("packed", None, _forward(one_dnn, x))
    if torch.backends.quantized.engine in ("x86", "fbgemm", "qnnpack", "onednn"):
        integers = []
        for layer in layers:
            scale = layer.weight.detach().abs().max().item() / 127
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch has deprecated quantised tensors
                weight = torch.quantize_per_tensor(layer.weight.detach(), scale, 0, torch.qint8)
            integers.append(torch.ops.quantized.linear_prepack(weight, layer.bias.detach()))

        def int8(x: torch.Tensor) -> torch.Tensor:
            for weight, activation in zip(integers, after, strict=True):
                x = torch.ops.quantized.linear_dynamic(x, weight, True)
                x = x.relu_() if activation == "relu" else x
            return x

        yield Timing("int8", None, _forward(int8, x))


def decoded_competitor(shapes: Shapes, x: torch.Tensor, model: nn.Sequential) -> Timing:
    """Torch's layers with the weights decoded from thin ones.

    Args:
        shapes: (outputs, inputs) of each layer.
        x: The inputs, batch x inputs.
        model: The network, compressed by DeepThin.

    Returns:
        What is timed, ``decoded``, without a ratio.
    """
    dense = network(shapes)
    with torch.no_grad():
        for layer, thin in zip(dense, model, strict=True):
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(cast(Any, thin).thin["weight"]())
                layer.bias.copy_(cast(Any, thin).bias)
    return Timing("decoded", None, _forward(dense, x))


def symbol_competitors(shape: tuple[int, int], x: torch.Tensor) -> Iterable[Timing]:
    """Layers with one random symbol for each weight, as after loading with ``frozen``.

    Args:
        shape: (outputs, inputs) of the layer.
        x: The inputs, batch x inputs.

    Yields:
        ``uniform`` (8 bits) and ``kmeans`` (4 bits) by their symbols, ``kept`` by the decoded weight of the latter.
    """
    uniform, kmeans = Uniform(shape, 8), KMeans(shape, min(16, math.prod(shape)))
    codes = {
        uniform: {"symbols": torch.randint(-127, 128, shape), "step": torch.full((1, 1), 0.001)},
        kmeans: {"symbols": torch.randint(0, kmeans.levels, shape), "centres": torch.randn(kmeans.levels)},
    }
    for name, method in (("uniform", uniform), ("kmeans", kmeans)):
        model = network([shape]).requires_grad_(False)
        weight = ThinWeight(name, method, [Part(shape)], codes[method], frozen=True).requires_grad_(False)
        make_thin(model[0], {"weight": weight})
        yield Timing(name, None, _forward(model, x))
    yield Timing("cached", None, lambda: nn.functional.linear(x, weight(), cast(Any, model[0]).bias))


def thin_competitors(
    case: str, shapes: Shapes, x: torch.Tensor, model: nn.Sequential, ratio: float, threads: int
) -> Iterable[Timing]:
    """DeepThin at one ratio, and rivals with as many bytes.

    Args:
        case: Name of the case: ``"linear"``, ``"tfkaldi"`` or ``"train"``.
        shapes: (outputs, inputs) of each layer.
        x: The inputs, batch x inputs.
        model: The network, compressed by DeepThin.
        ratio: Bytes of its matrices over those of the dense ones.
        threads: Number of threads of the native kernels.

    Yields:
        ``thin`` as a module, ``operator`` the bare kernel, ``csr`` sparse rows, ``rank`` a rank factorisation; those
        that this machine and the ratio allow.
    """
    if case == "train":
        yield Timing("thin", ratio, _step(model, x))
    else:
        yield Timing("thin", ratio, _forward(model, x))
        if products.native_available:
            if case == "linear":
                yield Timing("operator", ratio, _operator(model, x, threads))
            yield Timing("csr", ratio, _sparse(shapes, x, ratio, threads))
    try:
        low, _ = thin_network(network(shapes), ratio, 1, method="rank")
    except BudgetError:
        return
    if case == "train":
        yield Timing("rank", ratio, _step(low, x))
    elif case == "linear" and products.native_available:
        yield Timing("rank", ratio, _operator(low, x, threads))
    else:
        yield Timing("rank", ratio, _forward(low, x))


def method_competitor(case: str, shapes: Shapes, x: torch.Tensor, ratio: float, method: str) -> Timing:
    """Another method with as many bytes, as a module.

    Args:
        case: Name of the case; ``"train"`` times a training step.
        shapes: (outputs, inputs) of each layer.
        x: The inputs, batch x inputs.
        ratio: Bytes of its matrices over those of the dense ones.
        method: Its name, as users write it.

    Returns:
        What is timed, by the name of the method.

    Raises:
        BudgetError: The ratio cannot be reached.
    """
    model, _ = thin_network(network(shapes), ratio, 1, method=method)
    return Timing(method, ratio, _step(model, x) if case == "train" else _forward(model, x))


def _forward(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Work:
    if isinstance(layer, nn.Sequential):
        layer = layer[0] if len(layer) == 1 else layer
        layer.eval()
    return lambda: layer(x)


def _step(layer: nn.Module, x: torch.Tensor) -> Work:
    layer.train()
    grad, inputs = torch.randn_like(layer(x)), x.clone().requires_grad_()

    def work() -> None:
        layer.zero_grad()
        inputs.grad = None
        layer(inputs).backward(grad)

    return work


def _operator(model: nn.Sequential, x: torch.Tensor, threads: int) -> Work:
    """The native product of a single layer, without checks and allocations."""
    layer = cast(Any, model[0])
    weight = layer.thin["weight"]
    method: Factor = weight.method
    y = torch.empty(len(x), method.shape[0])
    operands = [t.detach() for t in (x, weight.xf, weight.wf, layer.bias, y)]
    by_fft = weight.path(x) != "native-direct"
    plan = (*method.shape, method.n, method.rank, 0)
    arguments = (*plan, *(t.data_ptr() for t in operands), len(x), by_fft, False, threads)
    forward = products.native().forward
    return lambda: (forward(*arguments), operands)  # the arrays live as long as the closure


def _sparse(shapes: Shapes, x: torch.Tensor, ratio: float, threads: int) -> Work:
    """Sparse rows with 32 bits for a value and 32 for its column, at random places."""
    rng, inputs = np.random.default_rng(0), x.numpy()
    layers = []
    for rows, cols in shapes:
        entries = max(1, int(ratio * rows * cols / 2))
        places = np.sort(rng.choice(rows * cols, entries, replace=False))
        starts = np.searchsorted(places, np.arange(rows + 1) * cols).astype(np.int64)
        arrays = rng.standard_normal(entries).astype(np.float32), (places % cols).astype(np.int32), starts
        arrays += (np.zeros(rows, np.float32), np.empty((len(x), rows), np.float32))
        layers.append((rows, cols, entries, arrays))
    csr = products.native().csr

    def work() -> None:
        at = inputs
        for rows, cols, entries, (values, columns, starts, bias, y) in layers:
            at = at if at is inputs else np.maximum(at, 0, out=at)
            addresses = [array.ctypes.data for array in (values, columns, starts)]
            csr(*addresses, rows, cols, entries, bias.ctypes.data, at.ctypes.data, y.ctypes.data, len(x), threads)
            at = y

    return work
