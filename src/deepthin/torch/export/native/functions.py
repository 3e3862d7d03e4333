"""Functions of each entry, and of two."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from deepthin.errors import ExportError
from deepthin.torch.export.native.graph import Builder, operator
from deepthin.torch.export.native.program import View, merged
from deepthin.torch.export.native.views import aten_chunk, broadcast

FUNCTIONS = (
    *("relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "exp", "log", "sqrt", "abs", "square", "reciprocal"),
    *("line", "clamp", "leaky", "elu", "hardsigmoid", "hardswish", "softplus"),
)
"""In the order of runtime/dt.h."""
PAIRS = ("add", "subtract", "multiply", "divide", "larger", "smaller")
"""In the order of runtime/dt.h."""
_PLAIN = (
    *("relu", "sigmoid", "tanh", "silu", "exp", "log", "sqrt", "abs", "square", "reciprocal"),
    *("hardsigmoid", "hardswish"),
)
_LARGEST = float(np.finfo(np.float32).max)
_DIMENSIONS = 4  # of a pair
_POWERS = 8  # at most


def _plain(name: str) -> Callable[..., View]:
    return lambda build, x, *_, **__: mapped(build, name, x)


for _each in _PLAIN:
    operator(_each)(_plain(_each))


def mapped(build: Builder, function: str, x: Any, a: float = 0.0, b: float = 0.0) -> View:
    """A function of every entry.

    Args:
        build: The program's builder.
        function: A name in ``FUNCTIONS``.
        x: A tensor.
        a: The function's first number, if it has any.
        b: Its second.

    Returns:
        The results.
    """
    source = build.whole(x)
    made = build.made(source.shape)
    index = FUNCTIONS.index(function)
    build.program.call("map", [index, made.floats, float(a), float(b), source.place, made.place], over=source.place)
    return made


@operator("gelu")
def aten_gelu(build: Builder, x: Any, *, approximate: str = "none") -> View:
    return mapped(build, "gelu_tanh" if approximate == "tanh" else "gelu", x)


@operator("leaky_relu")
def aten_leaky_relu(build: Builder, x: Any, slope: float = 0.01) -> View:
    return mapped(build, "leaky", x, slope)


@operator("elu")
def aten_elu(build: Builder, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> View:
    if scale != 1.0 or input_scale != 1.0:
        raise ExportError("The C runtime has elu with one factor only, and no selu.")
    return mapped(build, "elu", x, alpha)


@operator("clamp", "hardtanh")
def aten_clamp(build: Builder, x: Any, min: float | None = None, max: float | None = None) -> View:
    return mapped(build, "clamp", x, -_LARGEST if min is None else min, _LARGEST if max is None else max)


@operator("relu6")
def aten_relu6(build: Builder, x: Any) -> View:
    return mapped(build, "clamp", x, 0.0, 6.0)


@operator("softplus")
def aten_softplus(build: Builder, x: Any, beta: float = 1, threshold: float = 20) -> View:
    if beta != 1:
        raise ExportError("The C runtime has softplus with beta = 1 only.")
    return mapped(build, "softplus", x)


@operator("neg")
def aten_neg(build: Builder, x: Any) -> View:
    return mapped(build, "line", x, -1.0)


@operator("rsqrt")
def aten_rsqrt(build: Builder, x: Any) -> View:
    return mapped(build, "reciprocal", mapped(build, "sqrt", x))


@operator("pow")
def aten_pow(build: Builder, x: Any, power: Any) -> View:
    functions = {0.5: "sqrt", -1.0: "reciprocal", 1.0: "line"}
    if isinstance(power, int | float) and float(power) in functions:
        return mapped(build, functions[float(power)], x, 1.0)
    if power not in range(2, _POWERS + 1):
        raise ExportError(f"The C runtime has the powers -1, 1/2 and 1 to {_POWERS}, not {power!r}.")
    made = mapped(build, "square", x)
    for _ in range(int(power) - 2):
        made = paired(build, "multiply", made, x)
    return made


def paired(build: Builder, function: str, x: Any, y: Any) -> View:
    """A function of two entries, with broadcasting.

    Args:
        build: The program's builder.
        function: A name in ``PAIRS``.
        x: A tensor.
        y: Another, or a number.

    Returns:
        The results.
    """
    number = isinstance(y, int | float)
    if number and function in ("add", "subtract", "multiply", "divide"):
        y = float(y)
        line = {
            "add": (1.0, y),
            "subtract": (1.0, -y),
            "multiply": (y, 0.0),
            "divide": (1 / y if y else math.inf, 0.0),
        }
        return mapped(build, "line", x, *line[function])
    a, b = build.dense(x), build.dense(y)
    shape = tuple(torch.broadcast_shapes(a.shape, b.shape))
    a, b = broadcast(build, a, shape), broadcast(build, b, shape)
    sizes, first, second = merged(a, b)
    if len(sizes) > 4:
        a, b = build.whole(a), build.whole(b)
        sizes, first, second = merged(a, b)
    pad = 4 - len(sizes)
    made = build.made(shape)
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
    build.program.call("pair", arguments, over=a.place if same else None)
    return made


@operator("add")
def aten_add(build: Builder, x: Any, y: Any, *, alpha: float = 1) -> View:
    if isinstance(x, int | float):
        x, y = y, x
    return paired(
        build,
        "add",
        x,
        mapped(build, "line", y, alpha)
        if alpha != 1 and not isinstance(y, int | float)
        else y
        if alpha == 1
        else alpha * y,
    )


@operator("sub")
def aten_sub(build: Builder, x: Any, y: Any, *, alpha: float = 1) -> View:
    return paired(build, "subtract", x, y) if alpha == 1 else aten_add(build, x, y, alpha=-alpha)


@operator("rsub")
def aten_rsub(build: Builder, x: Any, y: Any, *, alpha: float = 1) -> View:
    return aten_add(build, mapped(build, "line", x, -alpha), y)


@operator("mul")
def aten_mul(build: Builder, x: Any, y: Any) -> View:
    return paired(build, "multiply", y, x) if isinstance(x, int | float) else paired(build, "multiply", x, y)


@operator("div")
def aten_div(build: Builder, x: Any, y: Any, **named: Any) -> View:
    if named.get("rounding_mode"):
        raise ExportError("The C runtime does not round quotients.")
    return paired(build, "divide", x, y)


@operator("maximum")
def aten_maximum(build: Builder, x: Any, y: Any) -> View:
    return paired(build, "larger", x, y)


@operator("minimum")
def aten_minimum(build: Builder, x: Any, y: Any) -> View:
    return paired(build, "smaller", x, y)


@operator("glu")
def aten_glu(build: Builder, x: View, dim: int = -1) -> View:
    first, second = aten_chunk(build, x, 2, dim)
    return paired(build, "multiply", first, mapped(build, "sigmoid", second))
