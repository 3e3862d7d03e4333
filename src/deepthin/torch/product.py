"""``x @ W.T`` without the weight W: DeepThin's fused product as standard torch operations.

The paper (Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, section 3 and Figure 1) reuses partial sums over every n-th
output; here the same reuse is one correlation of the input with each row of ``wf`` and then n small matrix products,
one for every phase at which an output may start. docs/theory.md derives it. Everything has gradients, of any order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deepthin.kernels.costs import fft_length
from deepthin.method import InTurn
from deepthin.methods.factor import Factor


@dataclass(frozen=True, eq=False)
class _Tables:
    """Where entries go, for one plan."""

    windows: Int64[Tensor, "taps"]  # n x K x S: the row of xf that each tap of each output reads
    outputs: Int64[Tensor, "rows"]  # index of each output among n x K
    readers: Int64[Tensor, "reads"]  # D x m: the taps that read each row of xf
    blocks: int  # S: consecutive rows of xf that one output reads
    depth: int  # K: outputs that share a phase


_Key = tuple[tuple[int, int], int, int, int, torch.device]
# Tables live as long as a weight that they were made for: weights of one plan share them.
_alive: "WeakValueDictionary[_Key, _Tables]" = WeakValueDictionary()
_held: "WeakIdKeyDictionary" = WeakIdKeyDictionary()  # owner -> its tables by key


def multiply_in_turn(
    method: InTurn, floats: Mapping[str, Tensor], x: Float[Tensor, "*batch cols"]
) -> Float[Tensor, "*batch rows"]:
    """``x @ W.T`` by one factor after the other.

    Args:
        method: A method that can multiply so.
        floats: Its code, by entry.
        x: Inputs, any number of leading dimensions.

    Returns:
        The outputs, with the leading dimensions of x.
    """
    items = F.pad(x.reshape(-1, x.shape[-1]), (0, method.inputs() - x.shape[-1]))
    return method.multiply(dict(floats), items, cast(Any, torch)).reshape(*x.shape[:-1], method.shape[0])


def chain_linear(
    cores: Sequence[Float[Tensor, "before rows cols after"]], x: Float[Tensor, "*batch cols"], rows: int
) -> Float[Tensor, "*batch rows"]:
    """``x @ W.T`` by a chain of cores, one after the other.

    Args:
        cores: r_(k-1) x R_k x Q_k x r_k each, with ranks of 1 at both ends.
        x: Inputs, any number of leading dimensions.
        rows: Outputs; the chain may have more.

    Returns:
        The outputs, with the leading dimensions of x.
    """
    y = _states(cores, x)[-1]
    return y.reshape(y.shape[0], y.shape[2])[:, :rows].reshape(*x.shape[:-1], rows)


def decoded_chain(cores: Sequence[Float[Tensor, "before rows cols after"]]) -> Float[Tensor, "rows cols"]:
    """The matrix of a chain of cores.

    Args:
        cores: As ``chain_linear`` takes them.

    Returns:
        The matrix, of as many rows and columns as the products of those of the cores.
    """
    whole = cores[0][0]  # rows x cols x rank
    for core in cores[1:]:
        (down, across, rank), (_, r, q, after) = whole.shape, core.shape
        product = whole.reshape(down * across, rank) @ core.reshape(rank, r * q * after)
        product = product.reshape(down, across, r, q, after).permute(0, 2, 1, 3, 4)
        whole = product.reshape(down * r, across * q, after)
    return whole[..., 0]


def chain_gradients(
    cores: Sequence[Float[Tensor, "before rows cols after"]],
    x: Float[Tensor, "*batch cols"],
    grad: Float[Tensor, "*batch rows"],
) -> tuple[Float[Tensor, "*batch cols"], list[Float[Tensor, "before rows cols after"]]]:
    """The gradients of ``chain_linear``, in differentiable operations.

    Args:
        cores: As ``chain_linear`` takes them.
        x: Inputs.
        grad: Gradient of the outputs.

    Returns:
        The gradient of x, and that of each core.
    """
    states, of_cores = _states(cores, x), list(cores)
    height = math.prod(core.shape[1] for core in cores)
    back = grad.reshape(states[0].shape[0], grad.shape[-1])
    back = F.pad(back, (0, height - grad.shape[-1])) if height > grad.shape[-1] else back
    for k in reversed(range(len(cores))):
        (rank, down, across, after), (items, _, places, _) = cores[k].shape, states[k].shape
        back = back.reshape(items * places, down * after)
        rows = states[k].permute(0, 2, 1, 3).reshape(items * places, across * rank)
        of_cores[k] = (rows.t() @ back).reshape(across, rank, down, after).permute(1, 2, 0, 3)
        matrix = cores[k].permute(1, 3, 2, 0).reshape(down * after, across * rank)
        back = (back @ matrix).reshape(items, places, across, rank).permute(0, 2, 1, 3)
    back = back.reshape(states[0].shape[0], math.prod(core.shape[2] for core in cores))
    if back.shape[1] > x.shape[-1]:  # batched gradients know no slice of everything
        back = back[:, : x.shape[-1]]
    return back.reshape(x.shape), of_cores


def _states(cores: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """The input and the result of each step, items x Q_k x places x rank; the last one items x 1 x R x 1."""
    widths = [core.shape[2] for core in cores]
    state = F.pad(x.reshape(-1, x.shape[-1]), (0, math.prod(widths) - x.shape[-1]))
    states = [state.reshape(len(state), widths[0], math.prod(widths[1:]), 1)]
    for core, width in zip(cores, [*widths[1:], 1], strict=True):
        rank, down, across, after = core.shape
        items, _, places, _ = states[-1].shape
        rows = states[-1].permute(0, 2, 1, 3).reshape(items * places, across * rank)
        y = rows @ core.permute(2, 0, 1, 3).reshape(across * rank, down * after)
        states.append(y.reshape(items, width, places * down // width, after))
    return states


def factor_linear(
    method: Factor,
    x: Float[Tensor, "*batch cols"],
    xf: Float[Tensor, "m r"],
    wf: Float[Tensor, "r n"],
    path: Literal["factors", "direct", "fft"],
    offset: int = 0,
    owner: object = None,
) -> Float[Tensor, "*batch rows"]:
    """``x @ W.T`` by the structured way ``path``; W is the factors' product from entry ``offset`` on.

    Half precision is computed in single precision and rounded at the end.

    Index tables are cached as long as ``owner`` lives.

    Args:
        method: The plan: shape of W, n and rank. ``direct`` and ``fft`` need n coprime with the fan-in.
        x: Inputs, any number of leading dimensions.
        xf: Left factor, m x r.
        wf: Right factor, r x n.
        path: ``factors`` (n is the fan-in), or the correlation ``direct`` or by ``fft``.
        offset: Entry of the factors' product at which W begins, from 0 to n - 1.
        owner: The weight that has the factors; None: ``xf``.

    Returns:
        The outputs, with the leading dimensions and dtype of x. The relative error is that of a dense product for
        ``factors`` and ``direct``; by ``fft`` it is relative to the largest input of the item.
    """
    if path == "factors":
        return F.linear(F.linear(x, wf), xf)
    kind = x.dtype
    if kind in (torch.float16, torch.bfloat16):
        x, xf, wf = x.float(), xf.float(), wf.float()
    items = x.reshape(-1, method.shape[1])
    tables = _tables_of(xf if owner is None else owner, (method.shape, method.n, offset, len(xf), x.device))
    if path == "fft":
        y = _TransformProduct.apply(items, xf, wf, tables)[0]
    else:
        y = _second_stage(_direct(items, wf, tables.blocks), xf, tables)
    return y.reshape(*x.shape[:-1], method.shape[0]).to(kind)


def _tables_of(owner: object, key: _Key) -> _Tables:
    """The tables of a plan, kept for an owner; one of several threads that make the same may make them in vain."""
    held = cast("dict[_Key, _Tables]", _held.setdefault(owner, {}))
    tables = held.get(key)
    if tables is None:
        tables = _alive.get(key)
        if tables is None:
            tables = _alive[key] = _tables(*key)
        held[key] = tables
    return tables


def _tables(shape: tuple[int, int], n: int, offset: int, m: int, device: torch.device) -> _Tables:
    """The index tables of a plan whose n is coprime with the fan-in; ``m`` is the number of rows of xf.

    Output j begins at entry ``p = offset + j Q``: it reads xf from row ``p div n`` on and meets ``wf`` at ``p mod n``.
    The phases are put in descending order of that, so that phase o is column o of the correlation in rows of n.
    """
    rows, cols = shape
    blocks, depth = -(-(cols + n - 1) // n), -(-rows // n)
    with torch.inference_mode(False):  # the cached tables may serve training later
        output = torch.arange(depth * n, device=device)
        entry = offset + output * cols
        slot = (n - 1 - entry % n) * depth + output // n
        start = torch.empty_like(output)
        start[slot] = entry // n
        used = torch.empty_like(output, dtype=torch.bool)
        used[slot] = output < rows
        windows = start[:, None] + torch.arange(blocks, device=device)
        windows = torch.where((windows < m) & used[:, None], windows, m).flatten()  # m: a row of zeros
        order = torch.argsort(windows, stable=True)[: int((windows < m).sum())]
        row = windows[order]
        counts = torch.bincount(row, minlength=m)
        most = int(counts.max())
        place = torch.arange(len(row), device=device) - (torch.cumsum(counts, 0) - counts)[row]
        readers = torch.full((most, m), len(windows), device=device)  # past the end: an entry of zeros
        readers[place, row] = order
        return _Tables(windows, slot[:rows].clone(), readers.flatten(), blocks, depth)


def _direct(x: Tensor, wf: Tensor, blocks: int) -> Float[Tensor, "items r length"]:
    """The correlation of each item with each row of wf, as one product with banded n x (2n-1) matrices."""
    rank, n = wf.shape
    padded = F.pad(x, (n - 1, blocks * n - x.shape[1]))
    pieces = padded.unfold(1, 2 * n - 1, n)  # items x blocks x (2n-1)
    band = F.pad(wf, (n - 1, n - 1)).unfold(1, 2 * n - 1, 1).flip(1)  # r x n x (2n-1): wf one entry further each row
    return torch.einsum("bsw,rnw->brsn", pieces, band).reshape(len(x), rank, blocks * n)


def _transform(x: Tensor, wf: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same correlation by FFT, and the spectra of x and of the reversed wf."""
    length = blocks * wf.shape[1]
    points = fft_length(length)
    spectrum, filters = torch.fft.rfft(x, points), torch.fft.rfft(wf.flip(1), points)
    return torch.fft.irfft(spectrum[:, None] * filters, points)[..., :length], spectrum, filters


def _panels(correlation: Float[Tensor, "items r length"], tables: _Tables) -> Float[Tensor, "n terms items"]:
    """Phase first, items last. Two copies, a transposition and then whole rows, are faster than one permutation."""
    items, rank, length = correlation.shape
    n = length // tables.blocks
    rows = correlation.reshape(items, -1).t().contiguous().view(rank, tables.blocks, n, items)
    return rows.permute(2, 1, 0, 3).reshape(n, tables.blocks * rank, items)


def _unpanel(panels: Float[Tensor, "n terms items"], tables: _Tables) -> Float[Tensor, "items r length"]:
    """The inverse of ``_panels``."""
    n, _, items = panels.shape
    rows = panels.view(n, tables.blocks, -1, items).permute(2, 1, 0, 3).contiguous()
    return rows.view(-1, items).t().contiguous().view(items, -1, tables.blocks * n)


def _filters(xf: Tensor, tables: _Tables) -> Float[Tensor, "n depth terms"]:
    return F.pad(xf, (0, 0, 0, 1)).index_select(0, tables.windows).view(-1, tables.depth, tables.blocks * xf.shape[1])


def _collect(phases: Float[Tensor, "n depth items"], tables: _Tables) -> Float[Tensor, "items rows"]:
    return phases.flatten(0, 1).index_select(0, tables.outputs).t().contiguous()


def _second_stage(correlation: Tensor, xf: Tensor, tables: _Tables) -> Tensor:
    return _collect(torch.bmm(_filters(xf, tables), _panels(correlation, tables)), tables)


class _TransformProduct(torch.autograd.Function):
    """The product by FFT with its gradient written out: four transforms a step, gathers instead of scatters."""

    @staticmethod
    def forward(x: Tensor, xf: Tensor, wf: Tensor, tables: _Tables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        correlation, spectrum, filters = _transform(x, wf, tables.blocks)
        panels = _panels(correlation, tables)
        return _collect(torch.bmm(_filters(xf, tables), panels), tables), panels, spectrum, filters

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, xf, wf, ctx.tables = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, xf, wf, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad, tables = grads[0], ctx.tables
        x, xf, wf, panels, spectrum, filters = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: let autograd derive both
            x, xf, wf = (t.view_as(t) for t in (x, xf, wf))  # apart: one may have been computed from another
            y = _second_stage(_transform(x, wf, tables.blocks)[0], xf, tables)
            wanted = [t for t, needed in zip((x, xf, wf), ctx.needs_input_grad, strict=False) if needed]
            grads_of = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *(next(grads_of) if needed else None for needed in ctx.needs_input_grad[:3]), None
        (items, cols), (rank, n), depth = x.shape, wf.shape, tables.depth
        points = 2 * (spectrum.shape[-1] - 1)
        spread = (
            grad.new_zeros(n * depth, items).index_copy_(0, tables.outputs, grad.t().contiguous()).view(n, depth, items)
        )
        grad_x = grad_xf = grad_wf = None
        if ctx.needs_input_grad[1]:
            reads = torch.bmm(spread, panels.transpose(1, 2)).view(-1, rank)
            grad_xf = F.pad(reads, (0, 0, 0, 1)).index_select(0, tables.readers).view(-1, len(xf), rank).sum(0)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            back = _unpanel(torch.bmm(_filters(xf, tables).transpose(1, 2), spread), tables)
            back = torch.fft.rfft(back, points)
            if ctx.needs_input_grad[0]:
                grad_x = torch.fft.irfft((back * filters.conj()).sum(1), points)[:, :cols]
            if ctx.needs_input_grad[2]:
                grad_wf = torch.fft.irfft((back * spectrum.conj()[:, None]).sum(0), points)[:, :n].flip(1)
        return grad_x, grad_xf, grad_wf, None
