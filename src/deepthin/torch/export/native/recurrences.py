"""Recurrent layers: a call for each direction of each layer and each item."""

from collections.abc import Callable
from typing import Any

from deepthin.errors import ExportError
from deepthin.torch.export.native.graph import Builder, operator
from deepthin.torch.export.native.matrix import Use
from deepthin.torch.export.native.program import Buffer, Place, View, contiguous_strides

_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}
_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


def _recur(
    build: Builder,
    mode: str,
    x: Any,
    states: list[Any],
    weights: list[Any],
    biased: bool,
    layers: int,
    both: bool,
    first: bool,
) -> tuple[View, ...]:
    source = build.whole(x)
    sequence = len(source.shape) == 2
    if sequence:
        source = View(source.place, (1, *source.shape) if first else (source.shape[0], 1, source.shape[1]), (0, 0, 0))
    steps, items = (source.shape[1], source.shape[0]) if first else (source.shape[0], source.shape[1])
    places, hidden = 2 if both else 1, states[0].shape[-1]
    each = 4 if biased else 2
    step, item = (1, steps) if first else (items, 1)  # in rows of the sequence
    if build.streaming and both:
        raise ExportError("A layer of both directions needs the whole sequence: it cannot be exported for streaming.")
    begun = [_states_of(build, state, layers * places * items * hidden) for state in states]
    width = source.shape[2]
    for level in range(layers):
        made = build.made((source.shape[0], source.shape[1], places * hidden))
        for way in range(places):
            at = (level * places + way) * each
            own = weights[at : at + each]
            matrices = [build.matrix(one) for one in own[:2]]
            biases = [build.vector(one) for one in own[2:]] if biased else [None, None]
            use = Use.PACKED if all(m.packs(steps) is Use.PACKED for m in matrices) else Use.ONCE
            scratch = sum(m.scratch(use) for m in matrices) + 2 * _GATES[mode] * hidden
            for i in range(items):
                place = ((level * places + way) * items + i) * hidden
                holds = [Place(state.buffer, state.offset + place) for state in begun]
                arguments = [
                    _CELLS[mode],
                    *matrices,
                    *biases,
                    steps,
                    way,
                    int(use),
                    Place(source.place.buffer, source.place.offset + i * item * width),
                    step * width,
                    Place(made.place.buffer, i * item * places * hidden + way * hidden),
                    step * places * hidden,
                    holds[0],
                    holds[1] if len(holds) > 1 else None,
                ]
                build.program.call("recurrent", arguments, scratch)
        source, width = made, places * hidden
    shape = source.shape[1:] if sequence and first else (source.shape[0], source.shape[2]) if sequence else source.shape
    ends = [(layers * places, hidden) if sequence else (layers * places, items, hidden) for _ in begun]
    views = [View(place, end, contiguous_strides(end)) for place, end in zip(begun, ends, strict=True)]
    return (View(source.place, tuple(shape), contiguous_strides(shape)), *views)


def _states_of(build: Builder, start: Any, floats: int) -> Place:
    """Where a state is kept during the run: in a buffer of its own, which begins with the given one."""
    buffer = Buffer(floats, kept=build.streaming)
    zeros = not isinstance(start, View) and not build.tensor(start).any()
    if build.streaming:
        if not zeros:
            raise ExportError("Streaming begins with states of zeros: call the recurrent layer without states.")
    elif zeros:
        build.program.call("fill", [floats, 0.0, Place(buffer)])
    else:
        view = build.whole(start)
        build.copy(view, View(Place(buffer), view.shape, contiguous_strides(view.shape)))
    return Place(buffer)


def _handler(mode: str) -> Callable[..., tuple[View, ...]]:
    """PyTorch's arguments; of the states an LSTM has two, in a list. Dropout and training do not count here."""

    def recur(
        build: Builder, x: Any, states: Any, weights: list[Any], biased: bool, layers: int, *rest: Any
    ) -> tuple[View, ...]:
        _, _, both, first = rest
        return _recur(build, mode, x, states if mode == "lstm" else [states], weights, biased, layers, both, first)

    return recur


for _mode in _CELLS:
    operator(_mode)(_handler(_mode))
