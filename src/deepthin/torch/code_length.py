"""How many bits symbols will take in a file, differentiable in the numbers that are rounded to them.

The code length of a symbol is minus the logarithm of its frequency in its tensor. The gradient is that of the linear
interpolation between the two symbols beside a number, at fixed frequencies: these minimise the sum, so that it does not
change with them to first order. Oktay et al., 2020, arXiv:1906.06624, learn a table of frequencies instead.
"""

from typing import Any, cast

import torch
from torch import Tensor

from deepthin.plan.steering import PRIOR


class _CodeLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, symbols: Tensor, top: int) -> Tensor:
        flat = symbols.reshape(-1).clamp(-top, top)
        counts, lengths = _counted(flat, top)
        place = flat.floor_().clamp_(max=top - 1).add_(top).long()
        ctx.save_for_backward(lengths.diff().to(symbols.dtype), place, symbols.abs() <= top)
        return (counts * lengths).sum().to(symbols.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        slopes, place, inside = ctx.saved_tensors
        return (gradients[0] * slopes)[place].reshape(inside.shape).mul_(inside), None


def code_length(symbols: Tensor, top: int) -> Tensor:
    """The bits that an adaptive code of zero order takes for rounded symbols.

    Args:
        symbols: Unrounded symbols, of any shape.
        top: The largest symbol, >= 1; larger numbers count as this one.

    Returns:
        Bits, a scalar, differentiable in ``symbols``: for each the difference of the lengths of the symbols above and
        below it; 0 beyond the largest.
    """
    return cast(Tensor, _CodeLength.apply(symbols, top))


def _counted(symbols: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """How often each symbol occurs, and its length in bits."""
    counts = torch.bincount((symbols.round() + top).long(), minlength=2 * top + 1).double()
    return counts, torch.log2(counts.sum() + PRIOR * len(counts)) - torch.log2(counts + PRIOR)
