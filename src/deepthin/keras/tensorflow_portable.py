"""Thin weights in plain TensorFlow operations on small constants, for graphs that run without deepthin.

Converters and runtimes compute once what follows from constants, so no product of constants may be as large as the
dense weight, and no integer of a code may become a float. Inputs are therefore multiplied by the code where it has a
structured form: a convolution with one factor, then products with windows of the other (docs/theory.md). What must be
decoded is read from position 0 of its constants, and that 0 is computed from the input, which no converter foresees.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import tensorflow as tf
from jaxtyping import Float, Int, Integer

from deepthin.keras.namespace import KerasNamespace
from deepthin.keras.weight import ThinWeight
from deepthin.method import Code, InTurn, Namespace
from deepthin.methods.factor import Factored, Window
from deepthin.methods.float_coding import inner_of

Form = Literal["structured", "factors in turn", "single rows", "decoded in the graph", "decoded at export"]
"""How a weight is computed. Only the last two ever make the dense weight."""

_CHANNELS = 16  # outputs of the convolution at each place; its kernel is so much longer than wf
_COPIES = 1.25  # upper bound on the size of the stored windows over that of the factor
_SMALL = 4096  # bytes up to which a weight is stored dense


class _Sizes(Window):
    """A matrix in the product of two factors."""

    def phases(self) -> Int[np.ndarray, " n"]:
        """For each phase of the outputs, which of n neighbouring entries of the correlation they read."""
        return (self.n - 1 - (self.offset + np.arange(self.n) * self.cols) % self.n).astype(np.int32)

    def kernel(self, wf: Float[np.ndarray, "rank n"]) -> Float[np.ndarray, "long 1 channels"]:
        """16 copies of each row of wf, one entry further each."""
        long = self.n + _CHANNELS - 1
        made = np.zeros((long, 1, _CHANNELS, self.rank), np.float32)
        for shift in range(_CHANNELS):
            made[shift : shift + self.n, 0, shift] = wf.T
        return made.reshape(long, 1, -1)


class _Integers:
    """Integers as one constant of few bytes: of 8, 4 or 2 bits, or as gaps between those that are not zero."""

    def __init__(self, values: Integer[np.ndarray, "..."], rising: bool) -> None:
        flat, self.shape = values.reshape(-1).astype(np.int64), values.shape
        self.gaps: np.ndarray | None = None
        self.least, self.bits, self.rising = 0, 0, rising
        if rising:
            self.stored = _narrow(np.diff(flat, prepend=-1))
            return
        least, most = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
        self.bits = next((bits for bits in (2, 4, 8) if most - least < 1 << bits), 0)
        plain = _narrow(flat)
        gaps, numbers = _sparse(flat)
        if gaps.nbytes + numbers.nbytes < 0.8 * len(flat) * (self.bits / 8 or plain.itemsize):
            self.gaps, self.stored, self.bits = gaps, numbers, 0
        elif self.bits:
            each, self.least = 8 // self.bits, least
            digits = np.pad(flat - least, (0, -len(flat) % each)).reshape(-1, each)
            self.stored = (digits << (self.bits * np.arange(each))).sum(1).astype(np.uint8)
        else:
            self.stored = plain

    def bytes(self) -> int:
        """Size of the constants."""
        return self.stored.nbytes + (0 if self.gaps is None else self.gaps.nbytes)

    def unpack(self, zero: tf.Tensor) -> tf.Tensor:
        """The integers, int32, in their shape."""
        stored, count = tf.cast(_unforeseen(self.stored, zero), tf.int32), math.prod(self.shape)
        if self.rising:
            return tf.reshape(tf.cumsum(stored) - 1, self.shape)
        if self.gaps is not None:
            places = tf.cumsum(tf.cast(_unforeseen(self.gaps, zero), tf.int32)) - 1
            return tf.reshape(tf.scatter_nd(places[:, None], stored, [count]), self.shape)
        if not self.bits or self.bits == 8:
            return tf.reshape(stored, self.shape) + self.least
        rest, digits = tf.cast(stored, tf.float32), list[tf.Tensor]()  # runtimes rarely shift or divide integers
        for _ in range(8 // self.bits - 1):
            above = tf.floor(rest / 2**self.bits)
            digits.append(rest - above * 2**self.bits)
            rest = above
        flat = tf.reshape(tf.stack([*digits, rest], 1), [-1])[:count]
        return tf.cast(tf.reshape(flat, self.shape), tf.int32) + self.least


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same in the smallest of the types that TensorFlow Lite has."""
    least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
    kinds = (np.uint8, np.int8, np.int16, np.int32)
    return values.astype(next(k for k in kinds if np.iinfo(k).min <= least and most <= np.iinfo(k).max))


def _sparse(flat: Int[np.ndarray, " count"]) -> tuple[np.ndarray, np.ndarray]:
    """Steps from one number that is not zero to the next, in bytes, and the numbers; zeros divide steps above 255."""
    places = np.nonzero(flat)[0]
    steps = np.diff(places, prepend=-1)
    zeros = (steps - 1) // 255
    ends = np.cumsum(zeros + 1) - 1
    count = int(ends[-1]) + 1 if len(ends) else 0
    gaps, numbers = np.full(count, 255, np.uint8), np.zeros(count, np.int64)
    gaps[ends], numbers[ends] = steps - 255 * zeros, flat[places]
    return gaps, _narrow(numbers)


def _unforeseen(values: np.ndarray, zero: tf.Tensor) -> tf.Tensor:
    """A constant as something that is not one: its entries from ``zero`` on, flattened, all but one more at the end."""
    longer = np.append(values.reshape(-1), np.zeros(1, values.dtype))  # converters drop a slice of everything
    return tf.slice(tf.constant(longer), [zero], [values.size])


class _Shifted(NamedTuple):
    """An integer shifted to the right, of which a bit is wanted."""

    value: tf.Tensor

    def __and__(self, ones: int) -> tf.Tensor:
        return tf.math.floormod(self.value, ones + 1)


class _PortableNamespace(KerasNamespace):
    """``KerasNamespace`` by operations that TensorFlow Lite has, for a batch of unknown size."""

    def reshape(self, a: tf.Tensor, shape: Any) -> tf.Tensor:
        """Reshape; None stands for the size of the batch."""
        return tf.reshape(a, [-1 if size is None else size for size in shape])

    def bitwise_right_shift(self, a: tf.Tensor, k: int) -> _Shifted:
        """Divide by a power of two, rounding down."""
        return _Shifted(tf.math.floordiv(a, 2**k))


_NAMESPACE = cast(Namespace, _PortableNamespace())


@dataclass(frozen=True)
class Graph:
    """What the weights of one graph are computed with.

    Attributes:
        zero: A scalar of int32 that is 0 whatever the input, but depends on it.
        weights: id of a ThinWeight -> how it is computed.
    """

    zero: tf.Tensor
    weights: Mapping[int, "PortableWeight"]
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What was made before in the same graph of TensorFlow: layers may be called many times, as by TimeDistributed.

        Args:
            key: What identifies it.
            make: How to make it.

        Returns:
            Tensors of the present graph.
        """
        key = (id(tf.compat.v1.get_default_graph()), *key)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _briefly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Name operations without the names of layers, which files hold with each of them."""

    @functools.wraps(method)
    def named(*args: Any) -> Any:
        with tf.name_scope("w/"):
            return method(*args)

    return named


class PortableWeight:
    """A thin weight as constants, of one tensor or of a group.

    Args:
        weight: The thin weight, with float32 latents.

    Attributes:
        forms: For each tensor, how it was computed when it was last asked for.
    """

    def __init__(self, weight: ThinWeight) -> None:
        self.weight, self.forms = weight, dict[int, Form]()
        self.is_plain = not inner_of(weight.method) and not weight.rounds  # stored as the decoder takes it
        self.fixed = {entry: value.numpy() for entry, value in weight.floats().items()}  # now: no graph reads variables
        integers = weight.method.integers()
        self.integers: dict[str, _Integers] = {}
        self.stored: Code = {}
        for entry, value in weight.code().items():
            if entry in integers:
                self.integers[entry] = _Integers(value, integers[entry].rising)
            else:
                self.stored[entry] = np.asarray(value, np.float32)

    def bytes(self) -> int:
        """Size of the constants.

        Returns:
            Bytes.
        """
        packed = sum(integers.bytes() for integers in self.integers.values())
        return packed + sum(array.nbytes for array in self.stored.values())

    @_briefly
    def dense(self, index: int, graph: Graph) -> tf.Tensor:
        """Decode a tensor.

        Args:
            index: Which of the weight's tensors.
            graph: The graph that is traced.

        Returns:
            The tensor in the file's layout.
        """
        weight, area = self.weight, math.prod(self.weight.parts[index].shape)
        if weight.method.derived() or 4 * area <= max(_SMALL, self.bytes() if len(weight.parts) == 1 else 0):
            self.forms[index] = "decoded at export"
            with tf.init_scope():
                made = weight.dense_of({e: tf.constant(a) for e, a in self.fixed.items()}, index).numpy()
            return tf.constant(made)
        self.forms[index] = "decoded in the graph"
        return weight.dense_of(self._floats(graph, unforeseen=True), index)

    @_briefly
    def product(
        self, x: Float[tf.Tensor, "*batch cols"], index: int, graph: Graph
    ) -> Float[tf.Tensor, "*batch rows"] | None:
        """``x @ W.T`` without W.

        Args:
            x: Inputs, any number of leading dimensions.
            index: Which of the weight's tensors is W, (outputs, inputs).
            graph: The graph that is traced.

        Returns:
            The outputs; None where the weight is small or has no structured form.
        """
        weight, part = self.weight, self.weight.parts[index]
        small = 4 * math.prod(part.shape) <= _SMALL
        if small or len(part.shape) != 2 or part.transposed or part.zero_row is not None or x.dtype != tf.float32:
            return None
        if weight.method.derived():
            return None
        rows, cols = part.shape
        items = x if x.shape.rank == 2 else tf.reshape(x, [-1, cols])
        window = self._window(index)
        if window is not None and not (window.is_rank and window.offset):
            self.forms[index] = "structured"
            y = self._structured(items, window, graph)
        elif isinstance(weight.decoder, InTurn) and len(weight.parts) == 1:
            self.forms[index], method = "factors in turn", cast(InTurn, weight.decoder)
            items = tf.pad(items, [[0, 0], [0, method.inputs() - cols]])
            y = method.multiply(self._floats(graph), items, _NAMESPACE)
        else:
            return None
        if x.shape.rank != 2:
            y = tf.reshape(y, tf.concat([tf.shape(x)[:-1], [rows]], 0))
            y.set_shape([*x.shape[:-1], rows])
        return y if part.scale == 1.0 else y * part.scale

    @_briefly
    def rows(
        self, places: Int[tf.Tensor, "*batch"], index: int, graph: Graph
    ) -> Float[tf.Tensor, "*batch cols"] | None:
        """Single rows of a matrix in a product of two factors.

        Args:
            places: Row indices, int32.
            index: Which of the weight's tensors.
            graph: The graph that is traced.

        Returns:
            One row for each index; None where the whole table must be decoded.
        """
        part, window = self.weight.parts[index], self._window(index)
        if window is None or part.transposed or 4 * math.prod(part.shape) <= _SMALL or self.weight.method.derived():
            return None
        self.forms[index] = "single rows"
        floats, (_, cols), n = self._floats(graph), part.shape, window.plan.n
        flat = tf.reshape(places, [-1])
        start = self.weight.cuts[index][0] + flat * cols
        first = start // n
        blocks = (cols + n - 2) // n + 1  # rows of xf that a row of the matrix may touch
        touched = tf.minimum(first[:, None] + tf.range(blocks), floats["xf"].shape[0] - 1)
        entries = tf.matmul(tf.reshape(tf.gather(floats["xf"], touched), [-1, window.plan.rank]), floats["wf"])
        entries = tf.reshape(entries, [-1, blocks * n])
        made = tf.gather(entries, (start - first * n)[:, None] + tf.range(cols), batch_dims=1) * part.scale
        if part.zero_row is not None:
            made *= tf.cast(flat != part.zero_row, tf.float32)[:, None]
        made = tf.reshape(made, tf.concat([tf.shape(places), [cols]], 0))
        made.set_shape([*places.shape, cols])
        return made

    def sizes_of_results(self) -> set[int]:
        """Numbers of entries of constants that may be as large as a small dense matrix.

        Returns:
            Those of the stored entries, of windows and of kernels.
        """
        arrays = list(self.stored.values())
        for integers in self.integers.values():
            arrays += [integers.stored] if integers.gaps is None else [integers.stored, integers.gaps]
        made = {array.size + more for array in arrays for more in (0, 1)}
        for index in range(len(self.weight.parts)):
            if (window := self._window(index)) is not None:
                sizes = _sizes(window)
                made |= {
                    sizes.n * sizes.depth * sizes.taps * sizes.rank,
                    sizes.rank * _CHANNELS * (sizes.n + _CHANNELS - 1),
                }
        return made

    def _window(self, index: int) -> Window | None:
        decoder, part = self.weight.decoder, self.weight.parts[index]
        if not isinstance(decoder, Factored) or len(part.shape) != 2:
            return None
        return decoder.window(self.weight.cuts[index][0], cast("tuple[int, int]", part.shape))

    def _floats(self, graph: Graph, unforeseen: bool = False) -> dict[str, Any]:
        """The code that the decoder takes, computed in the graph; if ``unforeseen``, not from constants alone."""
        return graph.once((id(self), unforeseen), lambda: self._decoded(graph, unforeseen))

    def _decoded(self, graph: Graph, unforeseen: bool) -> dict[str, Any]:
        code: dict[str, Any] = {entry: integers.unpack(graph.zero) for entry, integers in self.integers.items()}
        for entry, array in self.stored.items():
            held = unforeseen and array.size > 1
            code[entry] = tf.reshape(_unforeseen(array, graph.zero), array.shape) if held else tf.constant(array)
        return dict(self.weight._coding.decode(code, _NAMESPACE))

    def _structured(self, x: tf.Tensor, window: Window, graph: Graph) -> Float[tf.Tensor, "items rows"]:
        """The product by both factors: a correlation by a convolution, then n products, one for each phase."""
        sizes = _sizes(window)
        if window.is_rank:
            floats = self._floats(graph)
            by_wf = tf.matmul(x, floats["wf"], transpose_b=True)
            return tf.matmul(by_wf, floats["xf"][sizes.first : sizes.stop], transpose_b=True)
        n, rank, taps, depth = sizes.n, sizes.rank, sizes.taps, sizes.depth
        windows, kernel, phases = graph.once((id(self), window), lambda: self._operands(sizes, graph))
        places, front = -(-taps * n // _CHANNELS), n - 1
        whole = (places - 1) * _CHANNELS + n + _CHANNELS - 1
        padded = tf.pad(x, [[0, 0], [front, whole - front - sizes.cols]])
        image = tf.reshape(padded, [-1, 1, whole, 1])
        sums = tf.nn.conv2d(image, kernel, [1, _CHANNELS], "VALID")
        sums = tf.reshape(sums, [-1, places * _CHANNELS, rank])[:, : taps * n]
        sums = tf.gather(tf.reshape(sums, [-1, taps, n, rank]), phases, axis=2)
        sums = tf.reshape(tf.transpose(sums, [2, 1, 3, 0]), [n, taps * rank, -1])
        y = tf.transpose(tf.matmul(windows, sums), [2, 1, 0])  # items x depth x n
        return tf.reshape(y, [-1, depth * n])[:, : sizes.rows]

    def _operands(self, sizes: _Sizes, graph: Graph) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Windows, the kernel of the convolution, and phases."""
        if self.is_plain and sizes.n * sizes.depth * sizes.taps <= _COPIES * (sizes.stop - sizes.first):
            windows = tf.constant(_windows(sizes, self.fixed["xf"]))
        else:
            windows = _windows_in_graph(sizes, self._floats(graph)["xf"], graph.zero)
        return windows, tf.constant(sizes.kernel(self.fixed["wf"])[None]), tf.constant(sizes.phases())


def _sizes(window: Window) -> _Sizes:
    return _Sizes(*window)


def _windows(sizes: _Sizes, xf: Float[np.ndarray, "m rank"]) -> Float[np.ndarray, "n depth terms"]:
    """For each phase p and each k, the rows of xf that output ``k n + p`` reads; zeros past the end."""
    base = (sizes.offset + np.arange(sizes.depth * sizes.n) * sizes.cols) // sizes.n
    reads = np.minimum(base[:, None] + np.arange(sizes.taps), sizes.stop - sizes.first)
    rows = np.pad(xf[sizes.first : sizes.stop], ((0, 1), (0, 0)))[reads]
    return rows.reshape(sizes.depth, sizes.n, -1).swapaxes(0, 1).astype(np.float32)


def _windows_in_graph(sizes: _Sizes, xf: tf.Tensor, zero: tf.Tensor) -> Float[tf.Tensor, "n depth terms"]:
    """The same from a factor that is decoded in the graph, with a table of where each output begins."""
    base = (sizes.offset + np.arange(sizes.depth * sizes.n) * sizes.cols) // sizes.n
    base = np.minimum(base, sizes.stop - sizes.first).astype(np.int32)
    reads = tf.reshape(_unforeseen(base, zero), [-1, 1]) + tf.range(sizes.taps)
    rows = tf.gather(tf.pad(xf[sizes.first : sizes.stop], [[0, sizes.taps], [0, 0]]), reads)
    return tf.transpose(tf.reshape(rows, [sizes.depth, sizes.n, sizes.taps * sizes.rank]), [1, 0, 2])
