"""Multiples of a learned step in training: the rounded numbers, and how many bits their symbols will take in a file.

The code length of a symbol is minus the logarithm of its frequency in its tensor. The gradient is that of the linear
interpolation between the two symbols beside a number, at fixed frequencies: these minimise the sum, so that it does not
change with them to first order. Oktay et al., 2020, arXiv:1906.06624, learn a table of frequencies instead.

On the CPU, in float32, native code does each in one pass over memory; the operations of torch beside it are its
reference.
"""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from deepthin.kernels import products, rounding
from deepthin.method import Stepped
from deepthin.plan.steering import PRIOR
from deepthin.torch import accelerated
from deepthin.torch.host import array_of

_TORCH = cast(Any, torch)
_EXACT = 1 << 24


def _is_native(latents: Tensor) -> bool:
    return (
        products.native_available
        and latents.dtype == torch.float32
        and latents.device.type == "cpu"
        and latents.is_contiguous()
    )


class _Scalars:
    """NumPy for arrays of one number, a fraction of torch's time; but the exponential is torch's."""

    @staticmethod
    def exp(number: np.ndarray) -> np.ndarray:
        return torch.from_numpy(number).exp().numpy()

    @staticmethod
    def where(condition: Any, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return one if condition else other

    @staticmethod
    def ones_like(number: np.ndarray) -> np.ndarray:
        return _ONE

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


_ONE = np.ones((1, 1), np.float32)
_SCALARS = cast(Any, _Scalars())


def _step(log_step: Tensor, method: Stepped) -> float:
    """``method.step`` of a float32 tensor, to the last bit."""
    with np.errstate(all="ignore"):  # as torch
        return float(method.step(cast(Any, array_of(log_step)), _SCALARS)[0, 0])


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, log_step: Tensor, method: Stepped) -> Tensor:
        top = method.top()
        if _is_native(latents) and _is_native(log_step):
            step = _step(log_step, method)
            values, residual = map(torch.from_numpy, rounding.quantize(array_of(latents), step, top))
        else:
            step = method.step(log_step, _TORCH)
            symbols = latents / step.reshape(())
            rounded = symbols.round().clamp(-top, top)
            values, residual = step.reshape(()) * rounded, rounded - symbols
        ctx.save_for_backward(residual, log_step)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        residual, log_step = ctx.saved_tensors
        return gradients[0], (gradients[0] * residual).sum() * log_step.exp(), None


def quantized(latents: Tensor, log_step: Tensor, method: Stepped) -> Tensor:
    """Round to multiples of a learned step.

    The gradient passes the rounding to the latents unchanged; that of the step is the rounded symbol less the unrounded
    one (Esser et al., 2020, arXiv:1902.08153, equation 3), and that of its logarithm this times the exponential, as if
    the step were not rounded to eight bits.

    Args:
        latents: Numbers of any shape.
        log_step: Natural logarithm of the step, 1 x 1.
        method: What rounds the step and limits the symbols.

    Returns:
        The multiples, of the shape of ``latents``.
    """
    return cast(Tensor, _Quantized.apply(latents, log_step, method))


def _counts(symbols: Tensor, top: int) -> Tensor:
    """How often each symbol from ``-top`` to ``top`` occurs, in float64."""
    if not accelerated.on_accelerator(symbols):
        return torch.bincount((symbols + top).long(), minlength=2 * top + 1).double()
    # A histogram with given limits, of which a host does not wait for the values; float32 counts exactly so far
    pieces = [piece.float().histc(2 * top + 1, -top - 0.5, top + 0.5) for piece in symbols.split(_EXACT)]
    return torch.stack(pieces).double().sum(0)


class _CodeLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, log_step: Tensor, method: Stepped) -> Tensor:
        top = method.top()
        if _is_native(latents) and _is_native(log_step):
            step = _step(log_step, method)
            counts = torch.from_numpy(rounding.count_symbols(array_of(latents), step, top)).double()
        else:
            step = method.step(log_step, _TORCH)
            symbols = (latents / step.reshape(())).reshape(-1).clamp(-top, top)
            counts = _counts(symbols.round(), top)
        lengths = torch.log2(counts.sum() + PRIOR * len(counts)) - torch.log2(counts + PRIOR)
        ctx.save_for_backward(latents, log_step, lengths.diff())
        ctx.step, ctx.top = step, top  # a float where native code counts
        return (counts * lengths).sum().to(latents.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        latents, log_step, rises = ctx.saved_tensors
        step, top = ctx.step, ctx.top
        if isinstance(step, float):
            rise = array_of(rises).astype(np.float32)
            scale = float(gradients[0])
            slopes, total = rounding.code_slopes(array_of(latents), step, top, rise, scale)
            return torch.from_numpy(slopes), total * log_step.exp() / step, None
        symbols = latents / step.reshape(())
        below = symbols.floor().clamp(-top, top - 1)
        rise = (gradients[0] * rises.to(latents.dtype))[(below + top).long()] * (symbols.abs() <= top)
        return rise / step.reshape(()), -(rise * symbols).sum() * log_step.exp() / step, None


def code_length(latents: Tensor, log_step: Tensor, method: Stepped) -> Tensor:
    """The bits that an adaptive code of zero order takes for the symbols of numbers.

    Args:
        latents: Numbers of any shape.
        log_step: Natural logarithm of the step, 1 x 1.
        method: What rounds the step and limits the symbols; larger numbers count as the largest symbol.

    Returns:
        Bits, a scalar. Its gradient for a symbol is the length of the integer above less that of the one below; 0
        beyond the largest.
    """
    return cast(Tensor, _CodeLength.apply(latents, log_step, method))
