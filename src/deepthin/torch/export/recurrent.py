"""Recurrent layers as one operator each, which ONNX has; torch's exporter fixes the number of steps otherwise."""

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
"""ONNX's order of the gates, by torch's: input, forget, cell, output; reset, update, new."""

_library = torch.library.Library("deepthin", "FRAGMENT")
_library.define(
    "sequence(Tensor x, Tensor h, Tensor c, Tensor w, Tensor r, Tensor b, str cell) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(x: Tensor, h: Tensor, c: Tensor, w: Tensor, r: Tensor, b: Tensor, cell: str) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, in torch's own operators.

    Args:
        x: Inputs, steps x batch x inputs.
        h: States before the first step, directions x batch x hidden.
        c: The same of an LSTM's cells; of other cells it is not read.
        w: Matrices of the inputs, directions x (gates hidden) x inputs, torch's order of gates.
        r: Matrices of the states, directions x (gates hidden) x hidden.
        b: Biases of both, directions x (2 gates hidden).
        cell: As ``nn.RNNBase.mode``.

    Returns:
        Outputs, steps x batch x (directions hidden), and both states after the last step.
    """
    weights: list[Tensor] = []
    for at in range(len(w)):
        weights += [w[at], r[at], *b[at].chunk(2)]
    rest: tuple[Any, ...] = (weights, True, 1, 0.0, False, len(w) == 2, False)
    operators = cast(Any, torch)
    if cell == "LSTM":
        return operators.lstm(x, (h, c), *rest)
    y, last = getattr(operators, cell.lower())(x, h, *rest)
    return y, last, c.clone()


def _shapes(x: Tensor, h: Tensor, c: Tensor, w: Tensor, r: Tensor, b: Tensor, cell: str) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape[0], x.shape[1], h.shape[0] * h.shape[2]), torch.empty_like(h), torch.empty_like(c)


_library.impl("sequence", _run, "CPU")
torch.library.register_fake("deepthin::sequence", _shapes, lib=_library)


def as_operators(model: nn.Module) -> None:
    """Let the recurrent layers of a copied model run by ``torch.ops.deepthin.sequence``, in place.

    Args:
        model: The copy, in evaluation mode.
    """
    for layer in model.modules():
        if isinstance(layer, nn.RNNBase) and not layer.proj_size:
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, input: Tensor, hx: Any = None) -> Any:
    """As torch's recurrent layers: batch first or not, one sequence alone or several."""
    lstm, alone = layer.mode == "LSTM", input.dim() == 2
    x = input.unsqueeze(1) if alone else input.transpose(0, 1) if layer.batch_first else input
    places = 2 if layer.bidirectional else 1
    if hx is None:
        zeros = x.new_zeros(layer.num_layers * places, x.shape[1], layer.hidden_size)
        states = (zeros, zeros)
    else:
        states = tuple(state.unsqueeze(1) if alone else state for state in (hx if lstm else (hx, hx)))
    ends: list[tuple[Tensor, Tensor]] = []
    for level in range(layer.num_layers):
        suffixes = [f"_l{level}{end}" for end in ("", "_reverse")[:places]]
        starts = [tuple(state[level * places + at].clone() for state in states) for at in range(places)]
        if _multiplies(layer, suffixes):
            made = [
                _loop(layer, end, x, *start, backwards=at == 1)
                for at, (end, start) in enumerate(zip(suffixes, starts, strict=True))
            ]
            x = torch.cat([y for y, *_ in made], 2)
            ends.append((torch.stack([h for _, h, _ in made]), torch.stack([c for *_, c in made])))
            continue
        w, r = (torch.stack([getattr(layer, f"weight_{of}{end}") for end in suffixes]) for of in ("ih", "hh"))
        if layer.bias:
            b = torch.stack(
                [torch.cat([getattr(layer, f"bias_ih{end}"), getattr(layer, f"bias_hh{end}")]) for end in suffixes]
            )
        else:
            b = x.new_zeros(places, 2 * GATES[layer.mode] * layer.hidden_size)
        h, c = (state[level * places : (level + 1) * places] for state in states)
        x, h, c = torch.ops.deepthin.sequence(x, h, c, w, r, b, layer.mode)
        ends.append((h, c))
    last = [torch.cat(of) for of in zip(*ends, strict=True)]
    last = [state.squeeze(1) if alone else state for state in last]
    y = x.squeeze(1) if alone else x.transpose(0, 1) if layer.batch_first else x
    return y, tuple(last) if lstm else last[0]


def _multiplies(layer: Any, suffixes: list[str]) -> bool:
    """Whether all matrices of a level are multiplied by their codes."""
    thin = cast(Any, layer)._modules.get("thin")
    names = [f"weight_{of}{end}" for of in ("ih", "hh") for end in suffixes]
    return thin is not None and all(name in thin and thin[name].form == "structured" for name in names)


def _loop(layer: Any, end: str, x: Tensor, h: Tensor, c: Tensor, backwards: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of a level: the products with all inputs at once, those with the states step by step."""
    from torch._higher_order_ops.scan import scan

    weight = layer.thin[f"weight_hh{end}"]
    biases = [getattr(layer, f"bias_{of}{end}") if layer.bias else None for of in ("ih", "hh")]
    gates = layer.thin[f"weight_ih{end}"].product(x, bias=biases[0])
    operands, added = weight.operands(), biases[1]

    def step(states: tuple[Tensor, Tensor], given: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, c = states
        own = weight.multiply(h, operands)
        own = own if added is None else own + added
        if layer.mode == "LSTM":
            i, f, g, o = (given + own).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        elif layer.mode == "GRU":
            (r, z, n), (hr, hz, hn) = given.chunk(3, 1), own.chunk(3, 1)
            z, n = torch.sigmoid(z + hz), torch.tanh(n + torch.sigmoid(r + hr) * hn)
            h, c = n + z * (h - n), c.clone()
        else:
            h, c = (torch.tanh if layer.mode == "RNN_TANH" else torch.relu)(given + own), c.clone()
        return (h, c), h.clone()

    (h, c), y = scan(step, (h, c), gates, reverse=backwards)
    return y, h, c
