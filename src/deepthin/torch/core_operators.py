"""The product with a chain of cores as a torch operator, ``torch.ops.deepthin.core_linear``.

Novikov et al., 2015, "Tensorizing neural networks". As ``deepthin.torch.operators``: registered with shapes, gradients
and an autocast rule; single precision on the CPU runs native code, all else the torch operations of
``deepthin.torch.product``.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from deepthin.kernels import chains, products
from deepthin.kernels.chains import Layout, Sizes
from deepthin.method import Method
from deepthin.torch.operators import short_ways, takes
from deepthin.torch.product import chain_gradients, chain_linear

_library = torch.library.Library("deepthin", "FRAGMENT")
_library.define(
    "core_linear(Tensor x, Tensor[] cores, Tensor? bias, int rows, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "core_linear_backward(Tensor grad, Tensor x, Tensor[] cores, float scale, bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def core_linear(
    x: Float[Tensor, "*batch cols"],
    cores: Sequence[Float[Tensor, "before rows cols after"]],
    bias: Float[Tensor, " rows"] | None = None,
    *,
    rows: int,
    scale: float = 1.0,
) -> Float[Tensor, "*batch rows"]:
    """``scale * x @ W.T + bias`` for the W of a chain of cores, cut to rows x cols.

    Differentiable in every operand, to any order. Under autocast the operands are cast to float32.

    Args:
        x: Inputs, any number of leading dimensions.
        cores: r_(k-1) x R_k x Q_k x r_k each, with ranks of 1 at both ends.
        bias: One number per output, or None.
        rows: Outputs, from 1.
        scale: What the product is multiplied by before the bias is added.

    Returns:
        The outputs, with the leading dimensions of x.

    Raises:
        ValueError: Shapes do not fit each other.
        TypeError: The operands are not all of one floating type.
    """
    return torch.ops.deepthin.core_linear(x, list(cores), bias, rows, scale)


def eager_core_linear(
    layout: Layout, entries: Sequence[Tensor], x: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """``core_linear`` without the dispatcher, for plain tensors that only autograd observes.

    Args:
        layout: How the entries are cores.
        entries: The entries of a code, in order.
        x: Inputs, any number of leading dimensions.
        bias: One number per output, or None.
        scale: What the product is multiplied by before the bias is added.

    Returns:
        The outputs, as ``core_linear`` returns them.
    """
    return cast(Tensor, _Eager.apply(layout, scale, x, bias, *entries))


def _check(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, rows: int) -> None:
    operands = [x, *cores, *([] if bias is None else [bias])]
    if not x.is_floating_point() or any(t.dtype != x.dtype for t in operands):
        raise TypeError(
            f"x, cores and bias are {', '.join(str(t.dtype) for t in operands)}: a product needs one floating type. "
            "Convert x with x.to(cores[0].dtype)."
        )
    if not cores or x.dim() == 0 or any(core.dim() != 4 or 0 in core.shape for core in cores) or not x.shape[-1]:
        raise ValueError(f"Cores need four axes with entries, x inputs: {[tuple(t.shape) for t in (*cores, x)]}.")
    ranks = [1, *(core.shape[3] for core in cores)]
    down, across = 1, 1
    for core in cores:
        down, across = down * core.shape[1], across * core.shape[2]
    chained = all(core.shape[0] == rank for core, rank in zip(cores, ranks, strict=False)) and ranks[-1] == 1
    if not chained or not 0 < rows <= down or x.shape[-1] > across:
        raise ValueError(
            f"Cores of {[tuple(core.shape) for core in cores]} are no chain for {rows} outputs of {x.shape[-1]} inputs."
        )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"The bias is {tuple(bias.shape)}: {rows} outputs need ({rows},).")


def _forward(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, rows: int, scale: float) -> Tensor:
    _check(x, cores, bias, rows)
    if not takes(x, bias, *cores):
        y = chain_linear(cores, x, rows) * scale
        return y if bias is None else y + bias
    cores = [_dense(core) for core in cores]
    return _native_forward(_layout(x, cores, rows), cores, x, bias, scale)


def _backward(grad: Tensor, x: Tensor, cores: Sequence[Tensor], scale: float, wanted: Sequence[bool]) -> list[Tensor]:
    if not takes(grad, x, *cores):
        of_x, of_cores = chain_gradients(cores, x, grad * scale)
        whole = zip((of_x, *of_cores), (x, *cores), wanted, strict=True)
        return [torch.empty_like(t).copy_(g) if want else x.new_empty(0) for g, t, want in whole]
    cores = [_dense(core) for core in cores]
    return _native_backward(_layout(x, cores, grad.shape[-1]), cores, x, grad, scale, wanted)


def _dense(core: Tensor) -> Tensor:
    """The core itself, its axes in any order, if its entries fill their memory; else a copy."""
    core = core.detach().resolve_neg()
    span = 1 + sum((count - 1) * step for count, step in zip(core.shape, core.stride(), strict=True))
    return core if span == core.numel() and 0 not in core.stride() else core.contiguous()


def _layout(x: Tensor, cores: Sequence[Tensor], rows: int) -> Layout:
    sizes, steps = (tuple(core.shape) for core in cores), (core.stride() for core in cores)
    return Layout((rows, x.shape[-1]), cast(Any, tuple(sizes)), cast(Any, tuple(steps)))


def _plain(t: Tensor) -> Tensor:
    """Row-major. An alias keeps the memory alive if another thread replaces the tensor's data during the call."""
    return t.detach().resolve_neg().contiguous()


def _native_forward(layout: Layout, cores: Sequence[Tensor], x: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The product by tensors whose memory is laid out so."""
    rows, cols = layout.shape
    items, shift = _plain(x), None if bias is None else _plain(bias)
    y = torch.empty((*x.shape[:-1], rows), dtype=torch.float32, device="cpu")
    chains.native_chain(layout).forward(
        [core.data_ptr() for core in cores],
        items.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        y.data_ptr(),
        x.numel() // cols,
        scale,
        torch.get_num_threads(),
    )
    return y


def _native_backward(
    layout: Layout, cores: Sequence[Tensor], x: Tensor, grad: Tensor, scale: float, wanted: Sequence[bool]
) -> list[Tensor]:
    """The gradients of x and of the cores, those that are wanted; others are empty."""
    items, outputs = _plain(x), _plain(grad)
    like = {"dtype": torch.float32, "device": "cpu"}
    made = [torch.empty(x.shape if wanted[0] else 0, **like)]
    for core, want in zip(cores, wanted[1:], strict=True):
        made.append(torch.empty_strided(core.shape, core.stride(), **like) if want else torch.empty(0, **like))
    chains.native_chain(layout).backward(
        [core.data_ptr() for core in cores],
        items.data_ptr(),
        outputs.data_ptr(),
        made[0].data_ptr() if wanted[0] else 0,
        [g.data_ptr() if want else 0 for g, want in zip(made[1:], wanted[1:], strict=True)] if any(wanted[1:]) else [],
        x.numel() // layout.shape[1],
        scale,
        torch.get_num_threads(),
    )
    return made


def _as_core(entry: Tensor, sizes: Sizes, steps: Sizes) -> Tensor:
    """A view of an entry of a code: its axes in the core's order."""
    order = sorted(range(4), key=lambda axis: -steps[axis] if sizes[axis] > 1 else 0)
    back = [order.index(axis) for axis in range(4)]
    return entry.reshape([sizes[axis] for axis in order]).permute(back)


def _as_entry(core: Tensor, steps: Sizes, shape: Sequence[int]) -> Tensor:
    """The inverse of ``_as_core``."""
    order = sorted(range(4), key=lambda axis: -steps[axis] if core.shape[axis] > 1 else 0)
    return core.permute(order).reshape(list(shape))


def _in_torch(layout: Layout, entries: Sequence[Tensor]) -> list[Tensor]:
    return [_as_core(entry, *place) for entry, *place in zip(entries, layout.sizes, layout.steps, strict=True)]


class _Eager(torch.autograd.Function):
    """The registered operator without the dispatcher, by the entries of a code."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, layout: Layout, scale: float, x: Tensor, bias: Tensor | None, *entries: Tensor
    ) -> Tensor:
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(x, *entries)
        if bias is not None and (bias.shape != layout.shape[:1] or not takes(bias)):
            return _forward(x, _in_torch(layout, entries), bias, layout.shape[0], scale)
        return _native_forward(layout, [_plain(entry) for entry in entries], x, bias, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, *entries = ctx.saved_tensors
        grad, layout, scale, (_, _, to_x, to_bias, *to_entries) = grads[0], ctx.layout, ctx.scale, ctx.needs_input_grad
        wanted = [to_x, *to_entries]
        bias = grad.reshape(-1, layout.shape[0]).sum(0) if to_bias else None
        if not any(wanted):
            return None, None, None, bias, *(None for _ in entries)
        watched = torch._C._are_functorch_transforms_active() or is_legacy_batchedtensor(grad)
        if torch.is_grad_enabled() or watched or not takes(grad):
            of_x, of_cores = chain_gradients(_in_torch(layout, entries), x, grad * scale)
            whole = [of_x]
            for core, steps, entry in zip(of_cores, layout.steps, entries, strict=True):
                whole.append(_as_entry(core, steps, entry.shape))
        else:
            whole = _native_backward(layout, [_plain(entry) for entry in entries], x, grad, scale, wanted)
        of_x, *of_entries = (g if want else None for g, want in zip(whole, wanted, strict=True))
        return None, None, of_x, bias, *of_entries


class _Trained(torch.autograd.Function):
    """``_Eager`` by a native product, which reads torch's tensors itself."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, layout: Layout, native: Any, x: Tensor, bias: Tensor | None, *entries: Tensor
    ) -> Tensor:
        ctx.layout, ctx.scale, ctx.native = layout, 1.0, native
        ctx.save_for_backward(x, *entries)
        y = native.forward(x, entries, bias, False)
        return _native_forward(layout, [_plain(entry) for entry in entries], x, bias, 1.0) if y is None else y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or is_legacy_batchedtensor(grad):
            return _Eager.backward(ctx, *grads)
        _, _, to_x, to_bias, *to_entries = ctx.needs_input_grad
        x, *entries = ctx.saved_tensors
        made = ctx.native.backward(grad, x, tuple(entries), False, [to_x, *to_entries])
        if made is None:
            return _Eager.backward(ctx, *grads)
        bias = grad.reshape(-1, ctx.layout.shape[0]).sum(0) if to_bias else None
        return None, None, made[0], bias, *made[1:]


def trained_core_linear(
    layout: Layout, native: Any, entries: Sequence[Tensor], x: Tensor, bias: Tensor | None
) -> Tensor:
    """``eager_core_linear`` in a training, with the least delay, and without a scale.

    Args:
        layout: How the entries are cores.
        native: What ``chain_product`` returned for this plan; its ``trained`` returned 1 for x.
        entries: The entries of a code, in order.
        x: Inputs, any number of leading dimensions.
        bias: One number per output, or None.

    Returns:
        The outputs, with the same bits as those of ``eager_core_linear``.
    """
    return cast(Tensor, _Trained.apply(layout, native, x, bias, *entries))


def chain_product(method: Method, scale: float) -> Any:
    """A callable for ``scale * x @ W.T + bias`` with the least delay.

    Args:
        method: The method that decodes the weight.
        scale: What the product is multiplied by before the bias is added.

    Returns:
        As ``operators.product``; None too where the method is no chain that native code can read.
    """
    layout = chains.layout_of(method) if short_ways else None
    if layout is None:
        return None
    entries = [(entry, list(shape)) for entry, shape in method.code_shapes().items()]
    return products.native().Product(chains.native_chain(layout), entries, scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cores, _, ctx.rows, ctx.scale = inputs
    ctx.save_for_backward(x, *cores)


def _grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *cores = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # of any order: let autograd derive them
        of_x, of_cores = chain_gradients(cores, x, grad * ctx.scale)
    else:
        wanted = [t.requires_grad for t in (x, *cores)]
        made = torch.ops.deepthin.core_linear_backward(grad, x, cores, ctx.scale, wanted)
        of_x, *of_cores = (g if want else None for g, want in zip(made, wanted, strict=True))
    bias = grad.reshape(-1, ctx.rows).sum(0) if ctx.needs_input_grad[2] else None
    return of_x, of_cores, bias, None, None


def _fake_forward(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, rows: int, scale: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _fake_backward(
    grad: Tensor, x: Tensor, cores: Sequence[Tensor], scale: float, wanted: Sequence[bool]
) -> list[Tensor]:
    return [torch.empty_like(t) if want else x.new_empty(0) for t, want in zip((x, *cores), wanted, strict=True)]


_library.impl("core_linear", _forward, "CompositeExplicitAutograd")
_library.impl("core_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("deepthin::core_linear", _fake_forward, lib=_library)
torch.library.register_fake("deepthin::core_linear_backward", _fake_backward, lib=_library)
torch.library.register_autograd("deepthin::core_linear", _grad, setup_context=_save, lib=_library)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("deepthin::core_linear", _device, torch.float32, lib=_library)
