"""Weights of two factors on an accelerator: one operation decodes them, two products give the gradients of the factors.

An accelerator decodes a matrix in the time of a few calls of the host, so what counts there is the number of operations
and of passes over memory: entries of rank 1 are products of broadcast vectors, which no setting of TensorFloat-32
rounds; under autocast they are written in its type at once; and the gradient of the weight is written where the
products read it. Nothing here looks at values, so the host never waits, and CUDA graphs can record it.
"""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepthin.method import Method
from deepthin.methods.factor import Factored
from deepthin.storage.contents import Part
from deepthin.torch.tracing import without_autocast

_LONG = 1 << 32  # multiplications that take a device longer than the host takes to start a training step
_SPARE = 10  # decoded weights are kept while a tenth of the memory is free


def on_accelerator(tensor: Tensor) -> bool:
    """Whether a tensor is in the memory of an accelerator.

    Args:
        tensor: Any tensor.

    Returns:
        False on the CPU and on the meta device.
    """
    return not (tensor.is_cpu or tensor.is_meta)


def is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph records what is computed now from a tensor.

    Args:
        tensor: Any tensor.

    Returns:
        True while the current stream is captured.
    """
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Place(NamedTuple):
    """Where a tensor lies in the product of two factors.

    Attributes:
        first: Row of ``xf`` in which it begins.
        stop: Row of ``xf`` after the last one.
        offset: Entries of the first row, ``offset < n``, that come before it.
        n: Columns of ``wf``.
        shape: Shape of the tensor as the layer has it.
        transposed: Whether it is stored with its dimensions in reverse order.
        scale: What its entries are multiplied by.
        strides: Of the tensor in the contiguous product.
    """

    first: int
    stop: int
    offset: int
    n: int
    shape: tuple[int, ...]
    transposed: bool
    scale: float
    strides: tuple[int, ...]

    def view(self, flat: Float[Tensor, " entries"]) -> Tensor:
        """The tensor in the flattened product of rows ``first`` to ``stop``.

        Args:
            flat: All entries of these rows.

        Returns:
            A view.
        """
        entries = flat[self.offset : self.offset + math.prod(self.shape)]
        return entries.view(self.shape[::-1]).T if self.transposed else entries.view(self.shape)

    def strided(self, product: Float[Tensor, "m n"]) -> Tensor:
        """The same by a single operation, of a contiguous product.

        Args:
            product: The product of these rows.

        Returns:
            A view.
        """
        return product.as_strided(self.shape, self.strides, self.offset)

    def rows(self, xf: Float[Tensor, "m r"]) -> Float[Tensor, "rows r"]:
        """The rows of the left factor that the tensor reads, times ``scale``.

        Args:
            xf: The left factor.

        Returns:
            ``xf`` itself where nothing changes.
        """
        xf = xf if xf.shape[0] == self.stop - self.first else xf[self.first : self.stop]
        return xf if self.scale == 1.0 else xf * self.scale


def place_of(method: Method, part: Part, start: int) -> Place | None:
    """Where a tensor lies in the product of a method's factors.

    Args:
        method: The method that decodes the weight.
        part: The tensor.
        start: Its first entry in the flattened matrix.

    Returns:
        The place; None if the method has no such product, or the tensor a row of zeros.
    """
    window = method.window(start, (1, math.prod(part.shape))) if isinstance(method, Factored) else None
    if window is None or part.zero_row is not None:
        return None
    shape = part.shape[::-1] if part.transposed else part.shape
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    strides = strides[::-1] if part.transposed else strides
    return Place(window.first, window.stop, window.offset, window.n, part.shape, part.transposed, part.scale, strides)


def decode(xf: Float[Tensor, "m r"], wf: Float[Tensor, "r n"], place: Place, kind: torch.dtype | None = None) -> Tensor:
    """Decode a tensor, differentiable to any order, in few operations of the host.

    Args:
        xf: Left factor.
        wf: Right factor.
        place: Where the tensor lies in their product.
        kind: Type of the result, to which the product is rounded once; None: that of the factors.

    Returns:
        The tensor, of the place's shape.
    """
    rows = place.rows(xf)
    if torch.is_grad_enabled() and (xf.requires_grad or wf.requires_grad):
        device = xf.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                made = torch.mm(rows, wf)  # whose gradients are two products
        else:
            made = torch.mm(rows, wf)
        made = place.strided(made)
        return made if kind is None or kind is made.dtype else made.to(kind)
    with without_autocast(xf):
        return _decoded(rows, wf, place, kind or xf.dtype)


def plain_decode(xf: Float[Tensor, "m r"], wf: Float[Tensor, "r n"], place: Place) -> Tensor:
    """The same in operations that a compiler joins with others: for graphs.

    Args:
        xf: Left factor.
        wf: Right factor.
        place: Where the tensor lies in their product.

    Returns:
        The tensor, of the place's shape and in the factors' type.
    """
    with without_autocast(xf):
        return place.view(_product(place.rows(xf), wf).reshape(-1))


def linear(
    x: Float[Tensor, "*batch cols"],
    xf: Float[Tensor, "m r"],
    wf: Float[Tensor, "r n"],
    bias: Float[Tensor, " rows"] | None,
    place: Place,
    kind: torch.dtype,
) -> Float[Tensor, "*batch rows"]:
    """``x @ W.T + bias`` by the decoded matrix, differentiable in every operand, to any order.

    Where the host is the slower one, that is by torch's own operations; where the device is, under autocast and in CUDA
    graphs, by one that has fewer passes over memory, and more overhead in Python.

    Args:
        x: Inputs, any number of leading dimensions.
        xf: Left factor.
        wf: Right factor.
        bias: One number per output, or None.
        place: Where W, outputs x inputs and not transposed, lies in the factors' product.
        kind: Type in which it is computed: that of the operands, or of autocast.

    Returns:
        The outputs, with the leading dimensions of x, in the type ``kind``.
    """
    if kind is xf.dtype and x.numel() * place.shape[0] < _LONG and not is_captured(x):
        return F.linear(x, decode(xf, wf, place), bias)
    return cast(Tensor, _Linear.apply(x, place.rows(xf), wf, bias, place, kind))


def straight_through(latents: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers with the gradient of the latents, without a pass over memory.

    Args:
        latents: Numbers before rounding.
        rounded: As many, of the same type, without a gradient.

    Returns:
        A tensor that shares its memory with ``rounded``.
    """
    return cast(Tensor, _StraightThrough.apply(latents, rounded))


def may_keep(dense: Tensor) -> bool:
    """Whether a decoded weight may stay in an accelerator's memory.

    Args:
        dense: The weight.

    Returns:
        False where less than a tenth of a CUDA device's memory is free; True on others, which do not say.
    """
    if not dense.is_cuda:
        return True
    free, total = torch.cuda.mem_get_info(dense.device)
    free += torch.cuda.memory_reserved(dense.device) - torch.cuda.memory_allocated(dense.device)
    return free * _SPARE >= total


def _product(xf: Tensor, wf: Tensor) -> Float[Tensor, "m n"]:
    return xf * wf if wf.shape[0] == 1 else xf @ wf


def _decoded(xf: Tensor, wf: Tensor, place: Place, kind: torch.dtype) -> Tensor:
    """Without gradients."""
    if kind is xf.dtype or wf.shape[0] > 1:
        return place.view(_product(xf, wf).to(kind).reshape(-1))
    made = torch.empty(xf.shape[0], wf.shape[1], dtype=kind, device=xf.device)
    return place.view(torch.mul(xf, wf, out=made).view(-1))


def _of_factors(
    flat: Float[Tensor, " entries"], xf: Tensor, wf: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of both factors from that of their product."""
    grad = flat.view(xf.shape[0], wf.shape[1])
    grad = grad if grad.dtype is xf.dtype else grad.to(xf.dtype)
    return grad @ wf.t() if wanted[0] else None, xf.t() @ grad if wanted[1] else None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, xf: Tensor, wf: Tensor, bias: Tensor | None, place: Place, kind: torch.dtype
    ) -> Tensor:
        ctx.kinds = x.dtype, None if bias is None else bias.dtype
        ctx.place = place
        with without_autocast(x):
            weight = _decoded(xf, wf, place, kind)
            items = x if x.dtype is kind else x.to(kind)
            if bias is not None and bias.dtype is not kind:
                bias = bias.to(kind)
            ctx.save_for_backward(x, items, xf, wf, weight)
            return F.linear(items, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, cast_x, xf, wf, weight = ctx.saved_tensors
        (kind, kind_of_bias), place, grad = ctx.kinds, ctx.place, grads[0]
        rows, cols = place.shape
        of_x, of_xf, of_wf, of_bias = ctx.needs_input_grad[:4]
        grad_x = grad_bias = None
        of_factors: tuple[Tensor | None, Tensor | None] = None, None
        with without_autocast(x):
            items = grad.reshape(-1, rows)
            again = torch.is_grad_enabled()  # a gradient of this gradient is wanted
            if of_x:
                grad_x = grad @ (_decoded_again(xf, wf, place, grad.dtype) if again else weight)
                grad_x = grad_x if grad_x.dtype is kind else grad_x.to(kind)
            if of_xf or of_wf:
                left = items.t()
                right = (x.to(grad.dtype) if again else cast_x).reshape(-1, cols)  # the cast one has no gradient
                after = xf.shape[0] * wf.shape[1] - place.offset - rows * cols
                if again:
                    flat = F.pad((left @ right).reshape(-1), (place.offset, after))
                else:
                    flat = torch.empty(xf.shape[0] * wf.shape[1], dtype=grad.dtype, device=grad.device)
                    torch.mm(left, right, out=place.view(flat))
                    if place.offset:
                        flat[: place.offset].zero_()
                    if after:
                        flat[-after:].zero_()
                of_factors = _of_factors(flat, xf, wf, (of_xf, of_wf))
            if of_bias:
                grad_bias = items.sum(0).to(kind_of_bias)
        return grad_x, *of_factors, grad_bias, None, None


def _decoded_again(xf: Tensor, wf: Tensor, place: Place, kind: torch.dtype) -> Tensor:
    """With gradients: the factors as they are saved have them."""
    return place.view(_product(xf, wf).reshape(-1)).to(kind)
