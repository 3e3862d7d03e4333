"""Compiled recurrent layers whose matrices are factored, for numpy arrays, and beside them the definition in numpy.

Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, Table 2 (DeepSpeech); docs/performance.md says how csrc/ goes about it.
Gates stand in the order of torch's layers: i f g o of an LSTM, r z n of a GRU.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Float, Float32, Float64

from deepthin.kernels.products import Correlation, native
from deepthin.methods.factor import Factor

CELLS = ("tanh", "relu", "lstm", "gru")
"""Elman's networks by their function, and the two gated ones; in the order of the native code's numbers."""


class Gate(NamedTuple):
    """One matrix, gates * hidden x inputs or hidden: factors, the entry of their product where it begins, a bias."""

    method: Factor
    xf: Float32[np.ndarray, "m r"]
    wf: Float32[np.ndarray, "r n"]
    bias: Float32[np.ndarray, " rows"] | None = None
    offset: int = 0


Array = Float32[np.ndarray, "..."]
States = tuple[Float32[np.ndarray, "places batch hidden"], Float32[np.ndarray, "places batch hidden"] | None]
"""h, and c of an LSTM, of each direction of each layer."""


def gates_of(cell: str) -> int:
    """How many gates a cell has: its matrices have that many rows for each hidden unit.

    Args:
        cell: One of ``CELLS``.

    Returns:
        4 for ``"lstm"``, 3 for ``"gru"``, else 1.
    """
    return {"lstm": 4, "gru": 3}.get(cell, 1)


def recurrent(
    cell: str,
    gates: Sequence[Gate],
    x: Float32[np.ndarray, "steps batch inputs"],
    states: States,
    *,
    directions: int = 1,
    correlation: Correlation = "fft",
    threads: int = 1,
) -> tuple[Float32[np.ndarray, "steps batch outputs"], States]:
    """The outputs of all steps, directions * hidden wide, and the states after the last one.

    A sequence in pieces, each started from the states after the one before, gives the same bits as the whole.

    Args:
        cell: One of ``CELLS``.
        gates: For each direction of each layer, the matrix of the inputs, then that of the states.
        x: Inputs, float32.
        states: h and, for an LSTM alone, c before the first step: layers * directions x batch x hidden.
        directions: 1, or 2 for bidirectional layers.
        correlation: How the input is correlated with the rows of wf.
        threads: Upper bound on the threads, from 1; the bits of the result do not depend on it.

    Returns:
        The outputs, float32, and the states after the last step, shaped as given.

    Raises:
        ValueError: Shapes, types, counts or the name of the cell do not fit.
        RuntimeError: There is no native code.
    """
    x, h, c = _operands(cell, gates, x, states, directions)
    h, c = h.copy(), None if c is None else c.copy()
    y = np.empty((*x.shape[:2], directions * h.shape[2]), np.float32)
    native().recurrent(*_numbers(cell, x, h, directions), *_parts(gates, correlation), *_at(x, h, c, y), 0, threads)
    return y, (h, c)


def recurrent_gradients(
    cell: str,
    gates: Sequence[Gate],
    x: Float32[np.ndarray, "steps batch inputs"],
    states: States,
    grad_y: Float32[np.ndarray, "steps batch outputs"],
    *,
    directions: int = 1,
    correlation: Correlation = "fft",
    threads: int = 1,
) -> tuple[Array, States, list[tuple[Array, Array, Array]]]:
    """Gradients of x, of the states, and of xf, wf and bias of every matrix.

    Args:
        cell: One of ``CELLS``.
        gates: For each direction of each layer, the matrix of the inputs, then that of the states.
        x: Inputs, float32.
        states: h and, for an LSTM alone, c before the first step: layers * directions x batch x hidden.
        grad_y: Gradient of the outputs of ``recurrent``.
        directions: 1, or 2 for bidirectional layers.
        correlation: How the input is correlated with the rows of wf.
        threads: Upper bound on the threads, from 1; the bits of the result do not depend on it.

    Returns:
        The gradients of x, of the states (h and c), and for each matrix those of xf, wf and bias; all float32.

    Raises:
        ValueError: As ``recurrent``, or the gradient has another shape than the outputs.
        RuntimeError: There is no native code.
    """
    x, h, c = _operands(cell, gates, x, states, directions)
    numbers, grad_y = _numbers(cell, x, h, directions), np.ascontiguousarray(grad_y, np.float32)
    y = np.empty((*x.shape[:2], directions * h.shape[2]), np.float32)
    if grad_y.shape != y.shape:
        raise ValueError(f"The gradient is {grad_y.shape}: outputs are {y.shape}.")
    reserve = np.empty(native().recurrent_reserve(*numbers[:3], *numbers[4:]), np.float32)
    last = h.copy(), None if c is None else c.copy()
    native().recurrent(*numbers, *_parts(gates, correlation), *_at(x, *last, y, reserve), threads)
    grads = [(np.empty_like(g.xf), np.empty_like(g.wf), np.empty(g.method.shape[0], np.float32)) for g in gates]
    grad_x, grad_h, grad_c = np.empty_like(x), np.zeros_like(h), None if c is None else np.zeros_like(c)
    native().recurrent_backward(
        *numbers,
        *_parts(gates, correlation, grads),
        *_at(x, h, c, y, reserve, grad_y, grad_x, grad_h, grad_c),
        threads,
    )
    return grad_x, (grad_h, grad_c), grads


def recurrent_reference(
    cell: str,
    gates: Sequence[Gate],
    x: Float[np.ndarray, "steps batch inputs"],
    states: tuple[np.ndarray, np.ndarray | None],
    *,
    directions: int = 1,
) -> tuple[Float64[np.ndarray, "steps batch outputs"], tuple[np.ndarray, np.ndarray | None]]:
    """The definition of ``recurrent`` in float64: the weights are built from their factors, then the steps computed.

    Args:
        cell: One of ``CELLS``.
        gates: For each direction of each layer, the matrix of the inputs, then that of the states.
        x: Inputs.
        states: h and, for an LSTM alone, c before the first step: layers * directions x batch x hidden.
        directions: 1, or 2 for bidirectional layers.

    Returns:
        The outputs of all steps, directions * hidden wide, and the states after the last one.
    """
    weights = [_weight(gate) for gate in gates]
    h, c = states[0].astype(np.float64), None if states[1] is None else states[1].astype(np.float64)
    y = x.astype(np.float64)
    for layer in range(len(h) // directions):
        outputs: list[np.ndarray] = []
        for place in range(layer * directions, (layer + 1) * directions):
            turn = slice(None, None, -1 if place % directions else 1)
            (of_inputs, shift), (of_states, state_shift) = weights[2 * place : 2 * place + 2]
            step_outputs: list[np.ndarray] = []
            for now in y[turn]:
                a, b = now @ of_inputs.T + shift, h[place] @ of_states.T + state_shift
                h[place], state = _cell(cell, a, b, h[place], None if c is None else c[place])
                if c is not None:
                    c[place] = state
                step_outputs.append(h[place].copy())
            outputs.append(np.stack(step_outputs)[turn])
        y = np.concatenate(outputs, 2)
    return y, (h, c)


def _cell(
    cell: str, a: np.ndarray, b: np.ndarray, h: np.ndarray, c: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """One step, of the products with the inputs and with the states."""
    if cell == "lstm":
        i, f, g, o = np.split(a + b, 4, axis=1)
        c = _sigmoid(f) * cast(np.ndarray, c) + _sigmoid(i) * np.tanh(g)
        return _sigmoid(o) * np.tanh(c), c
    if cell == "gru":
        (r, z, n), (of_r, of_z, of_n) = np.split(a, 3, axis=1), np.split(b, 3, axis=1)
        z = _sigmoid(z + of_z)
        return (1 - z) * np.tanh(n + _sigmoid(r + of_r) * of_n) + z * h, None
    return np.tanh(a + b) if cell == "tanh" else np.maximum(a + b, 0), None


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _weight(gate: Gate) -> tuple[np.ndarray, np.ndarray | float]:
    rows, cols = gate.method.shape
    flat = (gate.xf.astype(np.float64) @ gate.wf.astype(np.float64)).reshape(-1)
    return flat[gate.offset : gate.offset + rows * cols].reshape(rows, cols), 0.0 if gate.bias is None else gate.bias


def _operands(
    cell: str, gates: Sequence[Gate], x: np.ndarray, states: States, directions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Check the operands, and make them contiguous float32 arrays."""
    h, c = states
    if cell not in CELLS:
        raise ValueError(f"cell={cell!r} must be one of {', '.join(CELLS)}.")
    if x.ndim != 3 or h.ndim != 3 or directions not in (1, 2) or len(gates) != 2 * len(h) or len(h) % directions:
        raise ValueError(
            f"x and h need three dimensions, and {len(gates)} gates two for each of h's places; they are {x.shape} and "
            f"{h.shape}, for {directions} directions."
        )
    if h.shape[1] != x.shape[1] or (c is None) == (cell == "lstm") or (c is not None and c.shape != h.shape):
        raise ValueError(f"h, and c for an LSTM alone, need the batch of x: {x.shape}, {h.shape}.")
    for gate in gates:
        if gate.method.seed is not None or not 0 <= gate.offset < gate.method.n:
            raise ValueError("A shuffled weight has no product without the weight, and offsets are below n.")
        m, rows = -(-(gate.offset + gate.method.shape[0] * gate.method.shape[1]) // gate.method.n), gate.method.shape[0]
        for name, array, shape in (
            ("xf", gate.xf, (m, gate.method.rank)),
            ("wf", gate.wf, (gate.method.rank, gate.method.n)),
            ("bias", gate.bias, (rows,)),
        ):
            if array is not None and (
                array.shape != shape or array.dtype != np.float32 or not array.flags.c_contiguous
            ):
                raise ValueError(f"{name} is {array.dtype} {array.shape}: this plan needs float32 {shape}, row-major.")
    x, h = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(h, np.float32)
    return x, h, None if c is None else np.ascontiguousarray(c, np.float32)


def _numbers(cell: str, x: np.ndarray, h: np.ndarray, directions: int) -> tuple[int, ...]:
    steps, batch, inputs = x.shape
    return CELLS.index(cell), steps, batch, inputs, h.shape[2], len(h) // directions, directions


def _parts(
    gates: Sequence[Gate], correlation: Correlation, grads: Sequence[tuple[np.ndarray, ...]] = ()
) -> tuple[list[int], list[int], list[None], list[list[int]]]:
    fft = int(correlation == "fft")
    plans = [v for g in gates for v in (*g.method.shape, g.method.n, g.method.rank, g.offset, fft, fft)]
    parts: list[int] = []
    for number, gate in enumerate(gates):
        parts += [*_at(gate.xf, gate.wf, gate.bias), *(_at(*grads[number]) if grads else (0, 0, 0))]
    return plans, parts, [], []  # and no chains of cores


def _at(*arrays: np.ndarray | None) -> list[int]:
    return [0 if array is None else array.ctypes.data for array in arrays]
