"""Recurrent layers without their weights as a torch operator, ``torch.ops.deepthin.recurrent``: a sequence in one call.

Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, Table 2 (DeepSpeech). The products with the inputs of many steps are
taken at once, those with the states step after step, all by the factors; gates, states and gradients are those of
torch's own layers. Single precision on the CPU runs native code, all else torch's layers with decoded weights.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from deepthin.kernels import chains, products
from deepthin.kernels.chains import Layout
from deepthin.kernels.costs import NATIVE, chain_work, choose_native, repeated_dense_work, work
from deepthin.kernels.recurrent import CELLS, gates_of
from deepthin.methods.factor import Factor
from deepthin.torch.operators import takes
from deepthin.torch.product import decoded_chain
from deepthin.torch.tracing import is_recorded

_STEPS = 100  # of a typical sequence
_INPUT_ITEMS = 32  # items assumed in products with the inputs, which always take many at a time
_library = torch.library.Library("deepthin", "FRAGMENT")
_library.define(
    "recurrent(Tensor x, Tensor h, Tensor? c, Tensor[] factors, Tensor[] biases, int[] offsets, str cell, "
    "int directions, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "recurrent_backward(Tensor grad_y, Tensor grad_h, Tensor grad_c, Tensor x, Tensor h, Tensor? c, Tensor y, "
    "Tensor reserve, Tensor[] factors, Tensor[] biases, int[] offsets, str cell, int directions, bool[] wanted) "
    "-> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class _Layers(NamedTuple):
    """The sizes of a call. ``plans``: for each matrix its factors' method and where it begins, or its chain."""

    cell: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int
    directions: int
    plans: list[tuple[Factor, int] | Layout]

    def split(self, factors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The factors or cores of each matrix."""
        counts = [len(plan.sizes) if isinstance(plan, Layout) else 2 for plan in self.plans]
        ends = list(accumulate(counts))
        return [factors[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def numbers(self) -> tuple[int, ...]:
        """The seven sizes in the order of the native function's arguments; the cell as its index in ``CELLS``."""
        return CELLS.index(self.cell), *self[1:7]


@lru_cache(maxsize=4096)
def pays(matrices: tuple[Factor | Layout, ...], batch: int, training: bool) -> bool:
    """Whether the native layers are predicted to be faster than torch's with decoded weights.

    The prediction sums costs of products over a hundred steps, whatever the length, so that a sequence in pieces is
    computed like the whole. The overhead of a call is left out.

    Args:
        matrices: Plans, or chains of cores, of the matrix of the inputs and of that of the states, for each direction
            of each layer.
        batch: Sequences at a time, from 1.
        training: Whether gradients of all factors are needed; if not, the decoded weights are taken to be cached.

    Returns:
        True where native code is predicted to be faster.
    """
    native = dense = 0.0
    for number, method in enumerate(matrices):
        calls = _STEPS if number % 2 else 1
        items = batch if number % 2 else _STEPS * batch
        if isinstance(method, Layout):
            native += chain_work(method, items, calls, not training)
            summands = max(after for _, _, _, after in method.sizes)
        else:
            native += calls * min(cost for path, cost in work(method, items, not training).items() if path in NATIVE)
            summands = method.rank
        dense += repeated_dense_work(method.shape, summands, items, calls, not training)
    return native < dense


def recurrent(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Sequence[int],
    cell: str,
    directions: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run recurrent layers as torch's do, multiplying by the factors; differentiable in every operand, to any order.

    Args:
        x: Inputs, steps x batch x inputs, not empty.
        h: States before the first step, layers * directions x batch x hidden.
        c: The same of an LSTM's cells; None for every other cell.
        factors: xf and wf, or the cores of a chain, of the matrix of the inputs, then of that of the states, for each
            direction of each layer.
        biases: One bias of gates * hidden entries for each matrix, in the same order; or empty.
        offsets: For each matrix, the entry of its factors' product at which it begins, from 0 to n - 1; of a chain of
            cores minus their number.
        cell: ``tanh``, ``relu``, ``lstm`` or ``gru``.
        directions: 1, or 2 for bidirectional layers.

    Returns:
        The outputs of all steps, steps x batch x directions * hidden, and h and c after the last step, shaped as given.

    Raises:
        ValueError: A shape, a count or the name of the cell does not fit.
    """
    operands = [t for t in (x, h, c, *factors, *biases) if t is not None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    rest = list(offsets), cell, directions
    if is_recorded() or type(x) is not Tensor:
        results = torch.ops.deepthin.recurrent(x, h, c, list(factors), list(biases), *rest, keep)
    elif keep:
        results = cast(Any, _Eager.apply(len(factors), *rest, x, h, c, *factors, *biases))
    else:
        results = _forward(x, h, c, factors, biases, *rest, False)
    return results[0], results[1], None if c is None else results[2]


def _layers(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Sequence[int],
    cell: str,
    directions: int,
) -> _Layers:
    """The sizes, all operands checked against each other: native code reads what they say."""
    if cell not in CELLS:
        raise ValueError(f"cell={cell!r} must be one of {', '.join(CELLS)}.")
    if x.dim() != 3 or h.dim() != 3 or directions not in (1, 2) or len(h) % directions or not len(h):
        raise ValueError(f"x and h need three dimensions, and h all directions; they are {x.shape} and {h.shape}.")
    (steps, batch, inputs), (places, _, hidden) = x.shape, h.shape
    need = sum(2 if offset >= 0 else -offset for offset in offsets)
    if h.shape[1] != batch or len(offsets) != 2 * places or len(factors) != need:
        raise ValueError(
            f"{places} states of {h.shape[1]} sequences need {4 * places} factors and as many sequences: there are "
            f"{len(factors)} and {batch}."
            + (f" With {len(offsets)} offsets {list(offsets)} they are {need} factors and cores." if need else "")
        )
    if (c is not None) != (cell == "lstm") or (c is not None and c.shape != h.shape):
        raise ValueError(
            f"An LSTM alone has a state c, of the shape of h: {tuple(h.shape)}, {c is not None and c.shape}."
        )
    rows = gates_of(cell) * hidden
    if biases and (len(biases) != 2 * places or any(bias.shape != (rows,) for bias in biases)):
        raise ValueError(f"{2 * places} matrices need as many biases of {rows}, or none: {[b.shape for b in biases]}.")
    if 0 in x.shape or 0 in h.shape:
        raise ValueError(f"Sequences and states may not be empty; they are {tuple(x.shape)} and {tuple(h.shape)}.")
    plans: list[tuple[Factor, int] | Layout] = []
    rest = iter(factors)
    for number, offset in enumerate(offsets):
        cols = hidden if number % 2 else inputs if number < 2 * directions else directions * hidden
        shape = (rows, cols)
        if offset < 0:
            plans.append(_chain(shape, [next(rest) for _ in range(-offset)]))
            continue
        xf, wf = next(rest), next(rest)
        if xf.dim() != 2 or wf.dim() != 2 or 0 in wf.shape or not 0 <= offset < wf.shape[1]:
            raise ValueError(f"Factors are matrices; {number} has {tuple(xf.shape)} and {tuple(wf.shape)}.")
        (rank, n), need = wf.shape, -(-(offset + math.prod(shape)) // wf.shape[1])
        if tuple(xf.shape) != (need, rank):
            raise ValueError(
                f"Matrix {number} of {shape} with rows of {n} needs an xf of {(need, rank)}, not {tuple(xf.shape)}."
            )
        plans.append((Factor(shape, n, rank), offset))
    return _Layers(cell, steps, batch, inputs, hidden, places // directions, directions, plans)


def _forward(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Sequence[int],
    cell: str,
    directions: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers = _layers(x, h, c, factors, biases, offsets, cell, directions)
    if not takes(x, h, c, *factors, *biases):
        with torch.no_grad():
            return *_in_torch(layers, x, h, c, factors, biases), x.new_empty(0)
    like = {"dtype": torch.float32, "device": "cpu"}
    y = torch.empty(layers.steps, layers.batch, directions * layers.hidden, **like)
    last = h.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    last_c = (
        torch.empty(0, **like) if c is None else c.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    )
    reserve = torch.empty(_reserve(layers) if keep else 0, **like)
    held = [_plain(t) for t in (x, *factors, *biases)]
    products.native().recurrent(
        *layers.numbers(),
        *_operands(layers, held[1 : 1 + len(factors)], held[1 + len(factors) :]),
        held[0].data_ptr(),
        last.data_ptr(),
        last_c.data_ptr() if c is not None else 0,
        y.data_ptr(),
        reserve.data_ptr() if keep else 0,
        torch.get_num_threads(),
    )
    return y, last, last_c, reserve


def _reserve(layers: _Layers) -> int:
    """How many floats the forward pass saves for the gradient."""
    if not products.native_available:
        return 0
    numbers = layers.numbers()
    return products.native().recurrent_reserve(*numbers[:3], *numbers[4:])


def _operands(
    layers: _Layers, factors: Sequence[Tensor], biases: Sequence[Tensor], grads: Sequence[Tensor] = ()
) -> tuple[list[int], list[int], list[Any], list[list[int]]]:
    """Plans, chains and addresses for native code. How a product is made does not depend on the steps."""
    plans: list[int] = []
    parts: list[int] = []
    found: list[Any] = []
    cores: list[list[int]] = []
    into = layers.split(grads[: len(factors)]) if grads else None
    for number, (plan, own) in enumerate(zip(layers.plans, layers.split(factors), strict=True)):
        bias = _address(biases[number]) if biases else 0
        of_bias = _address(grads[len(factors) + number]) if grads and biases else 0
        addresses = [_address(t) for t in own]
        of_own = [_address(t) for t in into[number]] if into else []
        if isinstance(plan, Layout):
            plans += [*plan.shape, plan.shape[1], 1, 0, 0, 0]
            parts += [0, 0, bias, 0, 0, of_bias]
            found.append(chains.native_chain(plan))
            cores.append([*addresses, *of_own])
            continue
        method, offset = plan
        batch = layers.batch if number % 2 else _INPUT_ITEMS
        ways = [choose_native(method, batch, which) == "native-fft" for which in (False, True)]
        plans += [*method.shape, method.n, method.rank, offset, *ways]
        parts += [*addresses, bias, *(of_own or [0, 0]), of_bias]
        found.append(None)
        cores.append([])
    return plans, parts, found, cores


def _address(t: Tensor) -> int:
    """Of its memory; 0 for an empty one, a gradient that is not wanted."""
    return t.data_ptr() if t.numel() else 0


def _chain(shape: tuple[int, int], cores: Sequence[Tensor]) -> Layout:
    """Of cores in row-major memory, checked against each other and the matrix."""
    ranks = [1, *(core.shape[-1] for core in cores)]
    fine = all(core.dim() == 4 and 0 not in core.shape for core in cores) and ranks[-1] == 1
    fine = fine and all(core.shape[0] == rank for core, rank in zip(cores, ranks, strict=False))
    if not fine or any(math.prod(core.shape[1 + k] for core in cores) < shape[k] for k in (0, 1)):
        raise ValueError(f"Cores of {[tuple(core.shape) for core in cores]} are no chain for a matrix of {shape}.")
    sizes = tuple(tuple(core.shape) for core in cores)
    steps = tuple((r * q * b, q * b, b, 1) for _, r, q, b in sizes)
    return Layout(shape, cast(Any, sizes), steps)


def _plain(t: Tensor) -> Tensor:
    """Row-major. An alias keeps the memory alive if another thread replaces the tensor's data during the call."""
    return t.detach().resolve_neg().contiguous()


def _backward(
    grad_y: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Sequence[int],
    cell: str,
    directions: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    layers = _layers(x, h, c, factors, biases, offsets, cell, directions)
    states = [h] if c is None else [h, c]
    inputs = [x, *states, *factors, *biases]
    out = (layers.steps, layers.batch, directions * layers.hidden)
    if grad_y.shape != out or y.shape != out or grad_h.shape != h.shape or (c is not None and grad_c.shape != c.shape):
        raise ValueError(f"Gradients need the shapes {out} and {tuple(h.shape)}, not {grad_y.shape}, {grad_h.shape}.")
    if reserve.numel() not in (0, _reserve(layers)):
        raise ValueError(f"The reserve has {reserve.numel()} numbers: it is not that of these operands.")
    if not reserve.numel() or not takes(grad_y, grad_h, grad_c, *inputs, y, reserve):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in inputs]
            results = _in_torch_of(layers, leaves, len(factors), c is not None)
            outputs = results if c is not None else results[:2]
            grads = torch.autograd.grad(outputs, leaves, (grad_y, grad_h, grad_c)[: len(outputs)])
        return [g if want else x.new_empty(0) for g, want in zip(grads, wanted, strict=True)]
    held = [_plain(t) for t in (*inputs, y, reserve, grad_y)]
    made = [
        torch.empty(t.shape, dtype=torch.float32, device="cpu") if want else x.new_empty(0)
        for t, want in zip(inputs, wanted, strict=True)
    ]
    for place, grad in enumerate((grad_h, grad_c)[: len(states)]):  # in: of the last states; out: of the first
        made[1 + place] = grad.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    first = 1 + len(states)
    factors, biases = held[first : first + len(factors)], held[first + len(factors) : len(inputs)]
    addresses = [t.data_ptr() for t in held]
    products.native().recurrent_backward(
        *layers.numbers(),
        *_operands(layers, factors, biases, made[first:]),
        addresses[0],
        addresses[1],
        addresses[2] if c is not None else 0,
        *addresses[-3:],
        made[0].data_ptr() if made[0].numel() else 0,
        made[1].data_ptr(),
        made[2].data_ptr() if c is not None else 0,
        torch.get_num_threads(),
    )
    return made


def _in_torch(
    layers: _Layers,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's layers with decoded weights: any dtype, any device, differentiable to any order."""
    weights: list[Tensor] = []
    for number, (plan, own) in enumerate(zip(layers.plans, layers.split(factors), strict=True)):
        if isinstance(plan, Layout):
            matrix = decoded_chain(own)[: plan.shape[0], : plan.shape[1]]
        else:
            method, offset = plan
            flat = (own[0] @ own[1]).reshape(-1)
            matrix = flat[offset : offset + math.prod(method.shape)].view(method.shape)
        weights.append(matrix)
        if number % 2 and biases:  # torch's order: both matrices of a direction, then both biases
            weights += [biases[number - 1], biases[number]]
    rest = (bool(biases), layers.layers, 0.0, False, layers.directions == 2, False)
    functions = cast(Any, torch._VF)
    if layers.cell == "lstm":
        return functions.lstm(x, (h, c), weights, *rest)
    name = {"gru": "gru", "tanh": "rnn_tanh", "relu": "rnn_relu"}[layers.cell]
    y, last = getattr(functions, name)(x, h, weights, *rest)
    return y, last, x.new_empty(0)


def _in_torch_of(layers: _Layers, inputs: Sequence[Tensor], factors: int, has_c: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``_in_torch`` of one list: x, h, c if there is one, the factors and the biases."""
    first = 3 if has_c else 2
    c = inputs[2] if has_c else None
    return _in_torch(layers, inputs[0], inputs[1], c, inputs[first : first + factors], inputs[first + factors :])


def _fake_forward(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Sequence[int],
    cell: str,
    directions: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    steps, batch, _ = x.shape
    places, _, hidden = h.shape
    gates = gates_of(cell) * hidden + (hidden if cell in ("lstm", "gru") else 0)
    layer = steps * batch * directions * (hidden + gates)
    reserve = (places // directions) * layer - steps * batch * directions * hidden
    y = x.new_empty(steps, batch, directions * hidden)
    native = products.native_available and all(
        t is None or (t.dtype is torch.float32 and t.is_cpu) for t in (x, h, c, *factors, *biases)
    )
    return (
        y,
        h.new_empty(h.shape),
        x.new_empty(0 if c is None else c.shape),
        x.new_empty(reserve if keep and native else 0),
    )


def _fake_backward(*operands: Any) -> list[Tensor]:
    _, _, _, x, h, c, _, _, factors, biases, _, _, _, wanted = operands
    inputs = [x, *([h] if c is None else [h, c]), *factors, *biases]
    states = 1 if c is None else 2
    return [
        t.new_empty(t.shape) if want or 0 < place <= states else x.new_empty(0)
        for place, (t, want) in enumerate(zip(inputs, wanted, strict=True))
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h, c, factors, biases, *ctx.rest, _ = inputs
    y, _, _, reserve = output
    ctx.has_c, ctx.factors = c is not None, len(factors)
    ctx.mark_non_differentiable(reserve)
    ctx.save_for_backward(x, h, *([c] if ctx.has_c else []), *factors, *biases, y, reserve)


def _grad(ctx: Any, *grads: Tensor, backward: Any = None) -> tuple[Any, ...]:
    """Gradients of x, h, c, the factors and the biases; the last two are lists."""
    *inputs, y, reserve = ctx.saved_tensors
    first = 3 if ctx.has_c else 2
    x, h, c = inputs[0], inputs[1], inputs[2] if ctx.has_c else None
    factors, biases = inputs[first : first + ctx.factors], inputs[first + ctx.factors :]
    offsets, cell, directions = ctx.rest
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # of any order: let autograd derive them
        views = [t.view_as(t) for t in inputs]  # since one may have been computed from another
        layers = _layers(x, h, c, factors, biases, offsets, cell, directions)
        results = _in_torch_of(layers, views, ctx.factors, ctx.has_c)
        wanted = [t for t in views if t.requires_grad]
        outputs = results if ctx.has_c else results[:2]
        made = iter(torch.autograd.grad(outputs, wanted, grads[: len(outputs)], create_graph=True, allow_unused=True))
        by_input = [next(made) if t.requires_grad else None for t in views]
    else:
        wanted = [t.requires_grad for t in inputs]
        backward = backward or torch.ops.deepthin.recurrent_backward
        made = backward(*grads[:3], x, h, c, y, reserve, factors, biases, offsets, cell, directions, wanted)
        by_input = [g if want else None for g, want in zip(made, wanted, strict=True)]
    of_c, of_factors = by_input[2] if ctx.has_c else None, by_input[first : first + ctx.factors]
    return *by_input[:2], of_c, of_factors, by_input[first + ctx.factors :], None, None, None, None


class _Eager(torch.autograd.Function):
    """The registered operator without the dispatcher, for eager programs."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        count: int,
        offsets: list[int],
        cell: str,
        directions: int,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (x, h, c, rest[:count], rest[count:], offsets, cell, directions, True)
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, h, c, factors, biases, *_ = _grad(ctx, *grads, backward=_backward)
        return None, None, None, None, x, h, c, *factors, *biases


_library.impl("recurrent", _forward, "CompositeExplicitAutograd")
_library.impl("recurrent_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("deepthin::recurrent", _fake_forward, lib=_library)
torch.library.register_fake("deepthin::recurrent_backward", _fake_backward, lib=_library)
torch.library.register_autograd("deepthin::recurrent", _grad, setup_context=_save, lib=_library)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("deepthin::recurrent", _device, torch.float32, lib=_library)
