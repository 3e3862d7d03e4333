"""Products with weights, between tensors, and what consists of them: linear layers, attention, convolutions."""

import math
from typing import Any, cast

import torch
from torch import Tensor

from deepthin.errors import ExportError
from deepthin.torch.export.native.functions import aten_add, paired
from deepthin.torch.export.native.graph import Builder, Weight, operator
from deepthin.torch.export.native.matrix import Matrix, Use
from deepthin.torch.export.native.norms import aten_softmax
from deepthin.torch.export.native.pools import sides
from deepthin.torch.export.native.program import View, contiguous_strides, merged, scratch_of
from deepthin.torch.export.native.views import aten_transpose, broadcast

NO_ROW = 0xFFFFFFFF  # of an embedding without padding
_MASKED = -1e30  # a score whose exponential is 0


@operator("linear")
def aten_linear(build: Builder, x: Any, weight: Any, bias: Any = None) -> View:
    if not isinstance(weight, Weight | Tensor):
        raise ExportError("The C runtime multiplies by a weight that is known when the model is exported.")
    return _linear(build, x, build.matrix(weight), bias)


def _linear(build: Builder, x: Any, matrix: Matrix, bias: Any) -> View:
    source = build.whole(x)
    items = source.floats // matrix.inputs
    made = build.made((*source.shape[:-1], matrix.outputs))
    use = matrix.packs(items)
    build.program.call(
        "linear", [matrix, build.vector(bias), items, int(use), source.place, made.place], scratch_of(matrix, use)
    )
    return made


@operator("addmm")
def aten_addmm(build: Builder, bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> View:
    if beta != 1 or alpha != 1 or isinstance(weight, View):
        return aten_add(build, bias, aten_matmul(build, x, weight))
    return _linear(build, x, build.matrix(weight, turned=True), bias)


@operator("matmul", "mm", "bmm")
def aten_matmul(build: Builder, x: Any, y: Any) -> View:
    if isinstance(y, Weight) and len(y.shape) == 2:
        return _linear(build, x, build.matrix(y, turned=True), None)
    shape, a, b = cast(tuple[int, ...], build.shape), build.dense(x), build.dense(y)
    a = View(a.place, (1, *a.shape), (0, *a.strides)) if len(a.shape) == 1 else a
    b = View(b.place, (*b.shape, 1), (*b.strides, 0)) if len(b.shape) == 1 else b
    return View(_products(build, a, b, 1.0).place, shape, contiguous_strides(shape))


def _products(build: Builder, a: View, b: View, scale: float) -> View:
    """``scale a @ b`` of the last two dimensions; the others are broadcast."""
    lead = tuple(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    a, b = broadcast(build, a, (*lead, *a.shape[-2:])), broadcast(build, b, (*lead, *b.shape[-2:]))
    batches = merged(View(a.place, lead, a.strides[:-2]), View(b.place, lead, b.strides[:-2]))
    if len(batches[0]) > 1:
        a, b = build.whole(a), build.whole(b)
        batches = merged(View(a.place, lead, a.strides[:-2]), View(b.place, lead, b.strides[:-2]))
    items, a_step, b_step = (of[0] for of in batches) if batches[0] else (1, 0, 0)
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    made = build.made((*lead, rows, columns))
    sizes, a_strides, b_strides = (
        (items, rows, inner, columns),
        (a_step, *a.strides[-2:]),
        (b_step, *b.strides[-2:]),
    )
    build.program.call("matmul", [sizes, a_strides, b_strides, scale, a.place, b.place, made.place])
    return made


@operator("scaled_dot_product_attention")
def aten_scaled_dot_product_attention(
    build: Builder,
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
        k, v = (_for_each_query(build, one, q.shape[-3] // one.shape[-3]) for one in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    scores = _products(build, q, aten_transpose(build, k, -2, -1), scale)
    if is_causal:
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        attn_mask = torch.zeros(keep.shape).masked_fill(~keep, _MASKED)
    if attn_mask is not None:
        mask = build.tensor(attn_mask) if not isinstance(attn_mask, View) else attn_mask
        if isinstance(mask, Tensor):
            mask = torch.zeros(mask.shape).masked_fill(~mask, _MASKED) if mask.dtype is torch.bool else mask
            mask = mask.clamp(min=_MASKED)
        scores = paired(build, "add", scores, mask)
    return _products(build, aten_softmax(build, scores, -1), v, 1.0)


def _for_each_query(build: Builder, x: View, count: int) -> View:
    """Keys or values of groups of heads, repeated for each head of a group."""
    split = View(x.place, (*x.shape[:-2], 1, *x.shape[-2:]), (*x.strides[:-2], 0, *x.strides[-2:]))
    whole = build.whole(broadcast(build, split, (*x.shape[:-2], count, *x.shape[-2:])))
    shape = (*x.shape[:-3], x.shape[-3] * count, *x.shape[-2:])
    return View(whole.place, shape, contiguous_strides(shape))


@operator("embedding")
def aten_embedding(build: Builder, weight: Any, ids: View, padding_idx: int = -1, *_: Any, **__: Any) -> View:
    matrix = build.matrix(weight, rows=True)
    if matrix.turned:
        matrix = build.constants.of_tensor(build.tensor(weight))
    source = build.whole(ids)
    made = build.made((*source.shape, matrix.cols))
    zero = weight.thin[0].parts[weight.thin[1]].zero_row if isinstance(weight, Weight) and weight.thin else None
    row = NO_ROW if zero is None else zero
    build.program.call(
        "embedding", [matrix, source.floats, row, source.place, made.place], scratch_of(matrix, Use.ROWS)
    )
    return made


def _convolve(
    build: Builder, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, flat: bool
) -> View:
    pair, shape = sides(flat), cast(tuple[int, ...], build.shape)
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
    source = build.whole(x)
    alone = len(source.shape) == (2 if flat else 3)
    sizes = source.shape if alone else source.shape[1:]
    outs = shape if alone else shape[1:]
    sizes, outs = ((sizes[0], 1, sizes[1]), (outs[0], 1, outs[1])) if flat else (sizes, outs)
    window = (*sizes, *outs, *kernel, *stride, *padding, *dilation, groups)
    matrix = build.matrix(weight, rows=groups > 1)
    if matrix.turned:
        matrix = build.constants.of_tensor(build.tensor(weight))
    use = matrix.packs(outs[1] * outs[2]) if groups == 1 else Use.ROWS
    items, made = 1 if alone else source.shape[0], build.made(shape)
    scratch = matrix.scratch(use) + matrix.cols + matrix.rows
    arguments = [window, matrix, build.vector(bias), items, int(use), source.place, made.place]
    build.program.call("conv", arguments, scratch)
    return made


@operator("conv1d", "conv2d")
def aten_conv(
    build: Builder,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> View:
    return _convolve(build, x, weight, bias, stride, padding, dilation, groups, flat=len(weight.shape) == 3)


@operator("convolution")
def aten_convolution(
    build: Builder,
    x: Any,
    w: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    turned: bool,
    _: Any,
    groups: int,
) -> View:
    if turned or len(w.shape) not in (3, 4):
        raise ExportError("The C runtime has no transposed and no three-dimensional convolution.")
    return aten_conv(build, x, w, bias, stride, padding, dilation, groups)
