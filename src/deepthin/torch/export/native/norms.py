"""Normalisations and softmax."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deepthin.torch.export.native.functions import aten_rsqrt, mapped, paired
from deepthin.torch.export.native.graph import Builder, operator, positive
from deepthin.torch.export.native.pools import MEAN, reduced
from deepthin.torch.export.native.program import View, contiguous_strides


def _affine(build: Builder, x: Any, scale: np.ndarray, shift: np.ndarray, axis: int = 1) -> View:
    source = build.whole(x)
    made = build.made(source.shape)
    outer, inner = math.prod(source.shape[:axis]), math.prod(source.shape[axis + 1 :])
    vectors = [build.vector(torch.from_numpy(one.astype(np.float32))) for one in (scale, shift)]
    arguments = [outer, source.shape[axis], inner, *vectors, source.place, made.place]
    build.program.call("affine", arguments, over=source.place)
    return made


@operator("native_batch_norm_legit_no_training")
def aten_native_batch_norm_legit_no_training(
    build: Builder, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, epsilon: float
) -> tuple[View, ...]:
    center, spread = (build.tensor(one).double().numpy() for one in (mean, variance))
    scale = 1 / np.sqrt(spread + epsilon)
    scale = scale if weight is None else scale * build.tensor(weight).double().numpy()
    shift = -center * scale + (0 if bias is None else build.tensor(bias).double().numpy())
    return (_affine(build, x, scale, shift),)


@operator("batch_norm")
def aten_batch_norm(
    build: Builder,
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
    return aten_native_batch_norm_legit_no_training(build, x, weight, bias, mean, variance, momentum, epsilon)[0]


@operator("layer_norm")
def aten_layer_norm(
    build: Builder, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *_: Any
) -> View:
    source = build.whole(x)
    made, count = build.made(source.shape), math.prod(shape)
    arguments = [
        made.floats // count,
        count,
        float(epsilon),
        build.vector(weight),
        build.vector(bias),
        source.place,
        made.place,
    ]
    build.program.call("normalize", arguments, over=source.place)
    return made


@operator("native_layer_norm")
def aten_native_layer_norm(
    build: Builder, x: Any, shape: Any, weight: Any, bias: Any, epsilon: float
) -> tuple[View, ...]:
    return (aten_layer_norm(build, x, shape, weight, bias, epsilon),)


@operator("group_norm")
def aten_group_norm(
    build: Builder, x: Any, groups: int, weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *_: Any
) -> View:
    source = build.whole(x)
    made, channels = build.made(source.shape), source.shape[1]
    count = math.prod(source.shape[1:]) // groups
    arguments = [made.floats // count, count, float(epsilon), None, None, source.place, made.place]
    build.program.call("normalize", arguments, over=source.place)
    if weight is None and bias is None:
        return made
    scale = np.ones(channels) if weight is None else build.tensor(weight).double().numpy()
    shift = np.zeros(channels) if bias is None else build.tensor(bias).double().numpy()
    return _affine(build, made, scale, shift)


@operator("rms_norm")
def aten_rms_norm(
    build: Builder, x: Any, shape: Sequence[int], weight: Any = None, epsilon: float | None = None
) -> View:
    source, count = build.whole(x), math.prod(shape)
    rows = View(source.place, (source.floats // count, count), (count, 1))
    squares = reduced(build, mapped(build, "square", rows), [1], MEAN, True)
    factor = aten_rsqrt(build, mapped(build, "line", squares, 1.0, epsilon or float(torch.finfo(torch.float32).eps)))
    made = paired(build, "multiply", rows, factor)
    made = View(made.place, source.shape, contiguous_strides(source.shape))
    return made if weight is None else paired(build, "multiply", made, weight)


@operator("softmax")
def aten_softmax(build: Builder, x: Any, dim: int, *_: Any, logarithm: int = 0, **__: Any) -> View:
    source = build.whole(x)
    at, made = positive(dim, len(source.shape)), build.made(source.shape)
    outer, inner = math.prod(source.shape[:at]), math.prod(source.shape[at + 1 :])
    arguments = [logarithm, outer, source.shape[at], inner, source.place, made.place]
    build.program.call("softmax", arguments, over=source.place)
    return made


@operator("log_softmax")
def aten_log_softmax(build: Builder, x: Any, dim: int, *_: Any, **__: Any) -> View:
    return aten_softmax(build, x, dim, logarithm=1)
