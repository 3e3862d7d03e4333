"""The product without the weight as a torch operator, ``torch.ops.deepthin.factor_linear``.

Registered with shapes, gradients and an autocast rule, so that torch.compile, torch.export and autograd treat it as a
built-in operator. Single precision on the CPU runs the native kernels of deepthin.kernels, all else the torch
operations of deepthin.torch.product. The kernels read the factors in place; there are no packed copies.
"""

import ctypes
import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from deepthin.kernels import products
from deepthin.kernels.costs import choose_native
from deepthin.methods.factor import Factor
from deepthin.torch.product import factor_linear
from deepthin.torch.tracing import RECORDERS, forward_mode

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_library = torch.library.Library("deepthin", "DEF")
_library.define(
    "factor_linear(Tensor x, Tensor xf, Tensor wf, Tensor? bias, int rows, int offset, str correlation, bool relu) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "factor_linear_backward(Tensor grad, Tensor x, Tensor xf, Tensor wf, int rows, int offset, str correlation, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def linear(
    x: Float[Tensor, "*batch cols"],
    xf: Float[Tensor, "m r"],
    wf: Float[Tensor, "r n"],
    bias: Float[Tensor, " rows"] | None = None,
    *,
    rows: int,
    offset: int = 0,
    correlation: str = "auto",
    relu: bool = False,
) -> Float[Tensor, "*batch rows"]:
    """``x @ W.T + bias``, rectified if asked; W, rows x cols, is what the factors decode to from entry ``offset`` on.

    Differentiable in every operand, to any order. Under autocast the operands are cast to float32.

    Args:
        x: Inputs, any number of leading dimensions.
        xf: Left factor, m x r with m = ceil((offset + rows * cols) / n).
        wf: Right factor, r x n.
        bias: One number per output, or None.
        rows: Outputs, from 1.
        offset: Entry of the factors' product at which W begins, from 0 to n - 1.
        correlation: ``direct``, ``fft``, or ``auto`` for the one that is predicted to be faster.
        relu: Whether to rectify the outputs.

    Returns:
        The outputs, with the leading dimensions of x; float32 where native code computes them.

    Raises:
        ValueError: Shapes do not fit each other, or the offset or the correlation is out of range.
        TypeError: The operands are not all of one floating type.
    """
    return torch.ops.deepthin.factor_linear(x, xf, wf, bias, rows, offset, correlation, relu)


def product(method: Factor, first: int, offset: int, scale: float) -> Any:
    """A callable for ``scale * x @ W.T + bias`` with the least delay, or none without native code.

    Args:
        method: The plan: shape, n and rank.
        first: Row of xf at which the weight begins, from 0.
        offset: Entry of that row of the product at which it begins, from 0 to n - 1.
        scale: What the product is multiplied by before the bias is added.

    Returns:
        A callable of x, the code by entry, and the bias or None; or None without native code. It returns None where an
        operand is not a plain float32 tensor on the CPU, a gradient is needed, a tracer or mode observes operations, or
        ``choose`` was not called for this batch. For trainings it has ``trained``, ``forward`` and ``backward``.
    """
    if not short_ways:
        return None
    return products.native().Product(*method.shape, method.n, method.rank, offset, first, scale)


short_ways: bool = products.native_available and products.native().use_torch(
    Tensor,
    torch.nn.Parameter,
    torch.is_grad_enabled,
    torch.get_num_threads,
    [
        *(recorder for recorder in RECORDERS if recorder is not forward_mode),
        torch._C._len_torch_function_stack,
        partial(torch.is_autocast_enabled, "cpu"),
    ],
    vars(forward_ad),
)


def _share_threads() -> None:
    """Run the kernels in torch's thread pool, if it is GNU OpenMP's: two pools would compete for the cores."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        parallel = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if parallel is not None:
            products.native().use_openmp(ctypes.cast(parallel, ctypes.c_void_p).value)
            return


if products.native_available:
    _share_threads()


def takes(*operands: Tensor | None) -> bool:
    """Whether native code can read all operands.

    Args:
        operands: Tensors, or None.

    Returns:
        Whether each is None or a plain float32 tensor in the CPU's memory; False without native code.
    """
    return products.native_available and all(t is None or _is_plain(t) for t in operands)


def _is_plain(t: Tensor) -> bool:
    return t.dtype is torch.float32 and _in_memory(t)


def _in_memory(t: Tensor) -> bool:
    if type(t) not in (Tensor, torch.nn.Parameter) or not t.is_cpu:
        return False
    if t.layout is not torch.strided or t.is_nested:
        return False
    return torch.compiler.is_compiling() or not t._is_zerotensor()


def same_values(old: Tensor, now: Tensor) -> bool:
    """Compare two tensors as ``torch.equal`` does, ten times as fast for plain tensors in the CPU's memory.

    Args:
        old: A tensor.
        now: Another of the same device and dtype.

    Returns:
        Whether shapes and values are equal. Of plain tensors the bits are compared: NaN equals NaN, 0 is not -0.
    """
    if old is now:
        return True
    if (
        products.native_available
        and old.dtype == now.dtype
        and (now.dtype is torch.float32 or now.dtype in _INTEGERS)
        and _in_memory(old)
        and _in_memory(now)
        and old.is_contiguous()
        and now.is_contiguous()
        and not now.is_neg()
        and old.shape == now.shape
    ):
        return products.native().same_bytes(old.data_ptr(), now.data_ptr(), now.element_size() * now.numel())
    return torch.equal(old, now)


def symbol_linear(
    x: Float[Tensor, "*batch cols"],
    symbols: Shaped[Tensor, "rows cols"],
    bias: Float[Tensor, " rows"] | None,
    *,
    step: Float[Tensor, "steps 1"] | None = None,
    least: Float[Tensor, "steps 1"] | None = None,
    centres: Float[Tensor, " levels"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    """``products.symbol_linear`` for plain CPU tensors that need no gradients.

    Args:
        x: Inputs, float32, any number of leading dimensions.
        symbols: One byte per weight: int8, or uint8 with least values or centres.
        bias: One number per output, or None.
        step: Factor of the symbols: one for all rows, or one per row.
        least: Offset added after it, shaped as step; or None.
        centres: Shared values that symbols index, instead of a step.

    Returns:
        The outputs, float32. Shapes and dtypes are not checked.
    """
    rows, cols = symbols.shape
    items, *others = (_as_read(t) for t in (x, symbols, step, least, centres, bias))
    y = torch.empty((*x.shape[:-1], rows), dtype=torch.float32, device="cpu")
    at = [0 if t is None else t.data_ptr() for t in others]
    products.native().symbols(
        rows,
        cols,
        *at[:3],
        step is not None and len(step) > 1,
        at[3],
        0 if centres is None else len(centres),
        at[4],
        cast(Tensor, items).data_ptr(),
        y.data_ptr(),
        x.numel() // cols,
        torch.get_num_threads(),
    )
    return y


def _method(x: Tensor, xf: Tensor, wf: Tensor, rows: int, offset: int) -> Factor:
    """The plan, its shapes and types checked against each other."""
    if not x.is_floating_point() or not x.dtype == xf.dtype == wf.dtype:
        raise TypeError(
            f"x, xf and wf are {x.dtype}, {xf.dtype} and {wf.dtype}: a product needs one floating type. Convert x "
            "with x.to(xf.dtype)."
        )
    if wf.dim() != 2 or xf.dim() != 2 or x.dim() == 0:
        raise ValueError(f"x needs a dimension, xf and wf two; they have {x.dim()}, {xf.dim()} and {wf.dim()}.")
    if 0 in wf.shape or x.shape[-1] == 0 or rows < 1:
        raise ValueError(f"Weights of {rows} x {x.shape[-1]} by factors of {tuple(wf.shape)} have no entries.")
    (rank, n), cols = wf.shape, x.shape[-1]
    m = -(-(offset + rows * cols) // n)
    if not 0 <= offset < n or xf.shape != (m, rank):
        raise ValueError(
            f"{rows} x {cols} weights from entry {offset} of rows of {n} need an xf of {m} x {rank}, "
            f"not {tuple(xf.shape)}, and an offset below {n}."
        )
    return Factor((rows, cols), n, rank)


def _forward(
    x: Tensor, xf: Tensor, wf: Tensor, bias: Tensor | None, rows: int, offset: int, correlation: str, relu: bool
) -> Tensor:
    if correlation not in ("auto", "direct", "fft"):
        raise ValueError(f"correlation={correlation!r} must be 'auto', 'direct' or 'fft'.")
    method = _method(x, xf, wf, rows, offset)
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"The bias is {tuple(bias.shape)}: {rows} outputs need ({rows},).")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"The bias is {bias.dtype}, x is {x.dtype}: convert the bias with bias.to(x.dtype).")
    if not takes(x, xf, wf, bias):
        y = _in_torch(method, x, xf, wf, offset)
        y = y if bias is None else y + bias
        return y.relu() if relu else y
    operands = tuple(_as_read(t) for t in (x, xf, wf, bias))
    y = torch.empty((*x.shape[:-1], rows), dtype=torch.float32, device="cpu")
    products.native().forward(
        *method.shape,
        method.n,
        method.rank,
        offset,
        *(0 if t is None else t.data_ptr() for t in (*operands, y)),
        y.numel() // rows,
        _by_fft(method, x, correlation, training=False),
        relu,
        torch.get_num_threads(),
    )
    return y


def _backward(
    grad: Tensor, x: Tensor, xf: Tensor, wf: Tensor, rows: int, offset: int, correlation: str, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    method = _method(x, xf, wf, rows, offset)
    if grad.shape != (*x.shape[:-1], rows):
        raise ValueError(f"The gradient is {tuple(grad.shape)}: outputs are {(*x.shape[:-1], rows)}.")
    if not takes(grad, x, xf, wf):
        whole = _gradients_in_torch(grad, x, xf, wf, rows, offset)
        made = [g if want else x.new_empty(0) for g, want in zip(whole, wanted, strict=True)]
        return made[0], made[1], made[2]
    operands = [cast(Tensor, _as_read(t)) for t in (x, xf, wf, grad)]
    made = [
        torch.empty(t.shape, dtype=torch.float32, device="cpu") if want else x.new_empty(0)
        for t, want in zip((x, xf, wf), wanted, strict=True)
    ]
    products.native().backward(
        *method.shape,
        method.n,
        method.rank,
        offset,
        *(t.data_ptr() for t in operands),
        *(t.data_ptr() if want else 0 for t, want in zip(made, wanted, strict=True)),
        grad.numel() // rows,
        _by_fft(method, x, correlation, training=True),
        torch.get_num_threads(),
    )
    return made[0], made[1], made[2]


def _as_read(t: Tensor | None) -> Tensor | None:
    """Row-major. An alias keeps the memory alive if another thread replaces the tensor's data during the call."""
    return None if t is None else t.detach().resolve_neg().contiguous()


def _by_fft(method: Factor, x: Tensor, correlation: str, training: bool) -> bool:
    if correlation != "auto":
        return correlation == "fft"
    return choose_native(method, math.prod(x.shape[:-1]), training) == "native-fft"


def _in_torch(method: Factor, x: Tensor, xf: Tensor, wf: Tensor, offset: int) -> Tensor:
    """The product in torch operations: any dtype, any device."""
    if method.n != method.shape[1] and math.gcd(method.n, method.shape[1]) == 1 and x.numel():
        return factor_linear(method, x, xf, wf, "fft", offset)
    rows, cols = method.shape
    return F.linear(x, (xf @ wf).reshape(-1)[offset : offset + rows * cols].view(rows, cols))


def _gradients_in_torch(
    grad: Tensor, x: Tensor, xf: Tensor, wf: Tensor, rows: int, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by way of the dense weight: any dtype, any device, differentiable again."""
    cols, entries = x.shape[-1], len(xf) * wf.shape[1]
    used = rows * cols
    weight = (xf @ wf).reshape(-1)[offset : offset + used].view(rows, cols)
    flat = (grad.reshape(-1, rows).T @ x.reshape(-1, cols)).reshape(-1)
    flat = F.pad(flat, (offset, entries - offset - used)).view(len(xf), -1)
    return grad @ weight, flat @ wf.T, xf.T @ flat


def _fake_forward(
    x: Tensor, xf: Tensor, wf: Tensor, bias: Tensor | None, rows: int, offset: int, correlation: str, relu: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _fake_backward(
    grad: Tensor, x: Tensor, xf: Tensor, wf: Tensor, rows: int, offset: int, correlation: str, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    made = [t.new_empty(t.shape) if want else x.new_empty(0) for t, want in zip((x, xf, wf), wanted, strict=True)]
    return made[0], made[1], made[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, xf, wf, _, *ctx.plan, ctx.relu = inputs
    ctx.save_for_backward(x, xf, wf, *((output,) if ctx.relu else ()))


def _grad(ctx: Any, grad: Tensor, backward: Any = None) -> tuple[Tensor | None, ...]:
    x, xf, wf, *output = ctx.saved_tensors
    if ctx.relu:
        grad = grad * (output[0] > 0)
    rows, offset, correlation = ctx.plan
    wanted = list(ctx.needs_input_grad[:3])
    made: list[Tensor | None] = [None, None, None]
    if any(wanted):
        backward = backward or torch.ops.deepthin.factor_linear_backward
        grads = backward(grad, x, xf, wf, rows, offset, correlation, wanted)
        made = [g if want else None for g, want in zip(grads, wanted, strict=True)]
    bias = grad.reshape(-1, rows).sum(0) if ctx.needs_input_grad[3] else None
    return *made, bias, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, rows, offset, _, ctx.wanted = inputs
    ctx.plan = rows, offset
    ctx.save_for_backward(*operands)


def _grad_of_grad(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients, from the same formulas in torch operations."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():  # aliases, since one operand may have been computed from another
        inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
        first = _gradients_in_torch(*inputs, *ctx.plan)
        outputs = [g for g, want in zip(first, ctx.wanted, strict=True) if want]
        weights = [h for h, want in zip(grads, ctx.wanted, strict=True) if want]
        second = torch.autograd.grad(outputs, inputs, weights, create_graph=again, allow_unused=True)
    return *second, None, None, None, None


class _Eager(torch.autograd.Function):
    """The registered operator without the dispatcher, which costs 0.1 ms a step in eager programs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch._C._are_functorch_transforms_active() or is_legacy_batchedtensor(grads[0]):  # many gradients at once
            return _grad(ctx, grads[0], lambda *operands: _gradients_in_torch(*operands[:-2]))
        if torch.is_grad_enabled():
            return _grad(ctx, grads[0])
        return _grad(ctx, grads[0], _backward)


def eager_linear(x: Tensor, xf: Tensor, wf: Tensor, bias: Tensor | None, rows: int, offset: int) -> Tensor:
    """``linear`` without the dispatcher, for plain tensors that only autograd observes.

    Args:
        x: Inputs, any number of leading dimensions.
        xf: Left factor, m x r.
        wf: Right factor, r x n.
        bias: One number per output, or None.
        rows: Outputs, from 1.
        offset: Entry of the factors' product at which the matrix begins, from 0 to n - 1.

    Returns:
        The outputs, as ``linear`` returns them.

    Raises:
        ValueError: As ``linear``.
    """
    return cast(Tensor, _Eager.apply(x, xf, wf, bias, rows, offset, "auto", False))


class _Trained(torch.autograd.Function):
    """``_Eager`` by a native product, which reads torch's tensors itself."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, xf, wf, bias, ctx.product, ctx.ways, rows, offset = inputs
        ctx.plan, ctx.relu = (rows, offset, "auto"), False
        ctx.save_for_backward(x, xf, wf)
        y = ctx.product.forward(x, (xf, wf), bias, bool(ctx.ways & 2))
        return _forward(x, xf, wf, bias, *ctx.plan, False) if y is None else y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or is_legacy_batchedtensor(grads[0]):
            return _Eager.backward(ctx, *grads)
        wanted, rows = ctx.needs_input_grad, ctx.plan[0]
        x, *factors = ctx.saved_tensors
        made = ctx.product.backward(grads[0], x, tuple(factors), bool(ctx.ways & 4), list(wanted[:3]))
        if made is None:
            return _Eager.backward(ctx, *grads)
        bias = grads[0].reshape(-1, rows).sum(0) if wanted[3] else None
        return *made, bias, None, None, None, None


def trained_linear(
    product: Any, ways: int, x: Tensor, xf: Tensor, wf: Tensor, bias: Tensor | None, rows: int, offset: int
) -> Tensor:
    """``eager_linear`` in a training, with the least delay.

    Args:
        product: What ``product`` returned for this plan; its scale is not applied.
        ways: What its ``trained`` returned for x: not 0.
        x: Inputs, any number of leading dimensions.
        xf: Left factor, m x r.
        wf: Right factor, r x n.
        bias: One number per output, or None.
        rows: Outputs, from 1.
        offset: Entry of the factors' product at which the matrix begins, from 0 to n - 1.

    Returns:
        The outputs, with the same bits as those of ``eager_linear``.
    """
    return cast(Tensor, _Trained.apply(x, xf, wf, bias, product, ways, rows, offset))


_library.impl("factor_linear", _forward, "CompositeExplicitAutograd")
_library.impl("factor_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("deepthin::factor_linear", _fake_forward, lib=_library)
torch.library.register_fake("deepthin::factor_linear_backward", _fake_backward, lib=_library)
torch.library.register_autograd("deepthin::factor_linear", _grad, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "deepthin::factor_linear_backward", _grad_of_grad, setup_context=_save_backward, lib=_library
)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("deepthin::factor_linear", _device, torch.float32, lib=_library)
