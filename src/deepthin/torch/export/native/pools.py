"""Sums over dimensions and over windows."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch

from deepthin.errors import ExportError
from deepthin.torch.export.native.graph import Builder, operator, positive
from deepthin.torch.export.native.program import View

SUM, MEAN, MAXIMUM, MINIMUM = range(4)
"""In the order of runtime/dt.h."""


def sides(flat: bool) -> Callable[[Any, int], tuple[int, int]]:
    """How a size of a layer is read as height and width.

    Args:
        flat: Whether the layer has one dimension: its height is then a number that is given.

    Returns:
        A function of the layer's number or numbers, and of that height.
    """

    def both(value: Any, missing: int) -> tuple[int, int]:
        value = [int(v) for v in value] if isinstance(value, list | tuple | torch.Size) else [int(value)]
        return (missing, value[0]) if flat else (value[0], value[-1])

    return both


def reduced(build: Builder, x: Any, dims: Any, function: int, keep: bool) -> View:
    """Sums, means or extremes over some dimensions.

    Args:
        build: The program's builder.
        x: A tensor.
        dims: The dimensions; none of them: all.
        function: ``SUM``, ``MEAN``, ``MAXIMUM`` or ``MINIMUM``.
        keep: Whether they stay, of size 1.

    Returns:
        The results.
    """
    view = build.dense(x)
    chosen = sorted(
        {
            positive(d, len(view.shape))
            for d in (range(len(view.shape)) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims)
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
    source = build.whole(view)
    outer, count, inner = (math.prod(source.shape[a:b]) for a, b in ((0, low), (low, high), (high, None)))
    shape = tuple(build.dense(x).shape[at] if at in left else 1 for at in range(len(view.shape)))
    shape = shape if keep else tuple(build.dense(x).shape[at] for at in left)
    made = build.made(shape)
    build.program.call("reduce", [function, outer, count, inner, source.place, made.place])
    return made


@operator("mean")
def aten_mean(build: Builder, x: Any, dims: Any = None, keepdim: bool = False, **_: Any) -> View:
    return reduced(build, x, dims, MEAN, keepdim)


@operator("sum")
def aten_sum(build: Builder, x: Any, dims: Any = None, keepdim: bool = False, **_: Any) -> View:
    return reduced(build, x, dims, SUM, keepdim)


@operator("amax")
def aten_amax(build: Builder, x: Any, dims: Any = None, keepdim: bool = False) -> View:
    return reduced(build, x, dims, MAXIMUM, keepdim)


@operator("amin")
def aten_amin(build: Builder, x: Any, dims: Any = None, keepdim: bool = False) -> View:
    return reduced(build, x, dims, MINIMUM, keepdim)


def _pooled(
    build: Builder,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    largest: bool,
    whole: bool,
    flat: bool,
) -> View:
    pair, shape = sides(flat), cast(tuple[int, ...], build.shape)
    source = build.whole(x)
    spatial = 1 if flat else 2
    planes = math.prod(source.shape[:-spatial])
    size, outs = source.shape[-spatial:], shape[-spatial:]
    size, outs = ((1, *size), (1, *outs)) if flat else (size, outs)
    kernel = pair(kernel, 1)
    strides = pair(stride, 1) if stride not in (None, []) else kernel
    window = (planes, *size, planes, *outs, *kernel, *strides, *pair(padding, 0), *pair(dilation, 1), 1)
    made = build.made(shape)
    build.program.call("pool", [window, int(largest), int(whole), source.place, made.place])
    return made


@operator("avg_pool2d")
def aten_avg_pool2d(
    build: Builder,
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
    return _pooled(build, x, kernel, stride, padding, 1, False, whole, flat=False)


@operator("avg_pool1d")
def aten_avg_pool1d(
    build: Builder, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, ceil: bool = False, whole: bool = True
) -> View:
    return _pooled(build, x, kernel, stride, padding, 1, False, whole, flat=True)


@operator("max_pool2d")
def aten_max_pool2d(
    build: Builder, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> View:
    return _pooled(build, x, kernel, stride, padding, dilation, True, False, flat=False)


@operator("max_pool1d")
def aten_max_pool1d(
    build: Builder, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> View:
    return _pooled(build, x, kernel, stride, padding, dilation, True, False, flat=True)


@operator("max_pool2d_with_indices")
def aten_max_pool2d_with_indices(build: Builder, x: Any, *rest: Any, **named: Any) -> tuple[View, ...]:
    return (aten_max_pool2d(build, x, *rest, **named),)


def _adaptive(build: Builder, x: Any, sizes: Any, flat: bool) -> View:
    view = build.dense(x)
    spatial = 1 if flat else 2
    shape = cast(tuple[int, ...], build.shape)
    size, outs = view.shape[-spatial:], shape[-spatial:]
    if any(a % b for a, b in zip(size, outs, strict=True)):
        raise ExportError(f"The C runtime pools {size} to {outs} only where these divide the size.")
    kernel = [a // b for a, b in zip(size, outs, strict=True)]
    return _pooled(build, x, kernel, kernel, 0, 1, False, True, flat)


@operator("adaptive_avg_pool2d")
def aten_adaptive_avg_pool2d(build: Builder, x: Any, sizes: Any) -> View:
    return _adaptive(build, x, sizes, flat=False)


@operator("adaptive_avg_pool1d")
def aten_adaptive_avg_pool1d(build: Builder, x: Any, sizes: Any) -> View:
    return _adaptive(build, x, sizes, flat=True)
