"""Operators that arrange entries: most only change strides; the others copy."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from deepthin.errors import ExportError
from deepthin.torch.export.native.graph import Builder, Weight, operator, positive
from deepthin.torch.export.native.program import Place, View, contiguous_strides


@operator("view", "reshape", "unsafe_view")
def aten_view(build: Builder, x: Any, shape: Any) -> Any:
    if not isinstance(x, View):
        return build.tensor(x).reshape(shape)
    made = cast(tuple[int, ...], build.shape)
    source = build.whole(x)
    return View(source.place, made, contiguous_strides(made))


@operator("flatten")
def aten_flatten(build: Builder, x: Any, *_: Any, **__: Any) -> Any:
    return aten_view(build, x, build.shape)


@operator("unsqueeze")
def aten_unsqueeze(build: Builder, x: Any, dim: int) -> Any:
    if not isinstance(x, View):
        return build.tensor(x).unsqueeze(dim)
    at = positive(dim, len(x.shape) + 1)
    return View(x.place, (*x.shape[:at], 1, *x.shape[at:]), (*x.strides[:at], 0, *x.strides[at:]))


@operator("squeeze")
def aten_squeeze(build: Builder, x: Any, dim: Any = None) -> Any:
    if not isinstance(x, View):
        return build.tensor(x).squeeze() if dim is None else build.tensor(x).squeeze(dim)
    chosen = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {at for d in chosen if x.shape[at := positive(d, len(x.shape))] == 1}
    left = [at for at in range(len(x.shape)) if at not in gone]
    return View(x.place, tuple(x.shape[at] for at in left), tuple(x.strides[at] for at in left))


@operator("permute")
def aten_permute(build: Builder, x: Any, dims: Sequence[int]) -> Any:
    if isinstance(x, Weight) and len(x.shape) == 2 and [positive(d, 2) for d in dims] == [1, 0]:
        return Weight(x.name, x.tensor, x.thin, not x.turned)
    if not isinstance(x, View):
        return build.tensor(x).permute(*dims)
    order = [positive(d, len(x.shape)) for d in dims]
    return View(x.place, tuple(x.shape[at] for at in order), tuple(x.strides[at] for at in order))


@operator("transpose")
def aten_transpose(build: Builder, x: Any, first: int, second: int) -> Any:
    order = list(range(len(x.shape)))
    first, second = positive(first, len(order)), positive(second, len(order))
    order[first], order[second] = second, first
    return aten_permute(build, x, order)


@operator("t", "numpy_T")
def aten_t(build: Builder, x: Any) -> Any:
    return aten_permute(build, x, [1, 0]) if len(x.shape) == 2 else x


@operator("expand")
def aten_expand(build: Builder, x: View, sizes: Sequence[int], **_: Any) -> View:
    return broadcast(build, x, cast(tuple[int, ...], build.shape))


def broadcast(build: Builder, x: View, shape: tuple[int, ...]) -> View:
    """Repeat a tensor along dimensions of size 1, without a copy.

    Args:
        build: Not used.
        x: The tensor.
        shape: The shape to give it.

    Returns:
        A view whose strides are 0 there.
    """
    new = len(shape) - len(x.shape)
    strides = [0] * new + [0 if own == 1 else stride for own, stride in zip(x.shape, x.strides, strict=True)]
    return View(x.place, shape, tuple(strides))


@operator("select")
def aten_select(build: Builder, x: View, dim: int, index: int) -> View:
    at = positive(dim, len(x.shape))
    place = Place(x.place.buffer, x.place.offset + positive(index, x.shape[at]) * x.strides[at])
    return View(place, x.shape[:at] + x.shape[at + 1 :], x.strides[:at] + x.strides[at + 1 :])


@operator("slice")
def aten_slice(build: Builder, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    at = positive(dim, len(x.shape))
    start, end, _ = slice(start, end).indices(x.shape[at])
    if not isinstance(x, View):
        whole_rows = isinstance(x, Weight) and at == 0 and step == 1
        ranges = (*(slice(None),) * at, slice(start, end, step))
        return x.range(start, end) if whole_rows else build.tensor(x)[ranges]
    count = max(0, -(-(end - start) // step))
    place = Place(x.place.buffer, x.place.offset + start * x.strides[at])
    shape, strides = list(x.shape), list(x.strides)
    shape[at], strides[at] = count, strides[at] * step
    return View(place, tuple(shape), tuple(strides))


@operator("narrow")
def aten_narrow(build: Builder, x: View, dim: int, start: int, length: int) -> View:
    return aten_slice(build, x, dim, start, start + length)


@operator("split")
def aten_split(build: Builder, x: View, size: int, dim: int = 0) -> list[View]:
    whole = x.shape[positive(dim, len(x.shape))]
    return [aten_slice(build, x, dim, first, min(first + size, whole)) for first in range(0, whole, size)]


@operator("split_with_sizes")
def aten_split_with_sizes(build: Builder, x: View, sizes: Sequence[int], dim: int = 0) -> list[View]:
    ends = np.cumsum(sizes).tolist()
    return [aten_slice(build, x, dim, end - size, end) for end, size in zip(ends, sizes, strict=True)]


@operator("chunk")
def aten_chunk(build: Builder, x: View, chunks: int, dim: int = 0) -> list[View]:
    return aten_split(build, x, -(-x.shape[positive(dim, len(x.shape))] // chunks), dim)


@operator("unbind")
def aten_unbind(build: Builder, x: View, dim: int = 0) -> list[View]:
    return [aten_select(build, x, dim, index) for index in range(x.shape[positive(dim, len(x.shape))])]


@operator("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "to", "to_copy", "dropout", "feature_dropout")
def aten_same(build: Builder, x: Any, *_: Any, **__: Any) -> Any:
    return x


@operator("cat", "concat")
def aten_cat(build: Builder, parts: list[Any], dim: int = 0) -> View:
    made = build.made(cast(tuple[int, ...], build.shape))
    at, first = positive(dim, len(made.shape)), 0
    for part in parts:
        view = build.dense(part)
        if not view.floats:
            continue
        build.copy(view, aten_slice(build, made, at, first, first + view.shape[at]))
        first += view.shape[at]
    return made


@operator("stack")
def aten_stack(build: Builder, parts: list[Any], dim: int = 0) -> View:
    return aten_cat(build, [aten_unsqueeze(build, build.dense(part), dim) for part in parts], dim)


@operator("repeat")
def aten_repeat(build: Builder, x: View, repeats: Sequence[int]) -> View:
    shape = cast(tuple[int, ...], build.shape)
    new = len(shape) - len(x.shape)
    own, strides = (1,) * new + x.shape, (0,) * new + x.strides
    made = build.made(shape)
    split = [pair for size, own_size in zip(shape, own, strict=True) for pair in (size // own_size, own_size)]
    source = View(x.place, tuple(split), tuple(v for stride in strides for v in (0, stride)))
    build.copy(source, View(made.place, tuple(split), contiguous_strides(split)))
    return made


@operator("constant_pad_nd")
def aten_constant_pad_nd(build: Builder, x: View, pad: Sequence[int], value: float = 0) -> View:
    made = build.made(cast(tuple[int, ...], build.shape))
    build.program.call("fill", [made.floats, float(value), made.place])
    inner: View = made
    for k in range(len(pad) // 2):
        at = len(made.shape) - 1 - k
        before = int(pad[2 * k])
        if before < 0 or pad[2 * k + 1] < 0:
            x = aten_slice(build, x, at, max(-before, 0), x.shape[at] + min(int(pad[2 * k + 1]), 0))
        inner = aten_slice(build, inner, at, max(before, 0), max(before, 0) + x.shape[at])
    build.copy(x, inner)
    return made


@operator("pad")
def aten_pad(build: Builder, x: View, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> View:
    if mode != "constant":
        raise ExportError(f"The C runtime pads with a constant only, not by {mode!r}.")
    return aten_constant_pad_nd(build, x, pad, value or 0.0)
