"""The one idea: a method turns a weight matrix into a small dictionary of arrays and back.

This file holds what every method offers (``Method``), what it produces (``Code``), the few array functions that it may
use (``Namespace``), one method after another (``Then``) and the errors of the whole library. It imports no framework.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.random import Generator

from deepthin.coding.bits import gap_bytes, packed_bytes, width_of


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) under which a tensor is stored: (outputs, all else), and near-square for a single dimension."""
    if len(shape) > 1:
        return shape[0], math.prod(shape[1:])
    cols = math.isqrt(max(math.prod(shape) - 1, 0)) + 1
    return -(-math.prod(shape) // cols), cols


Array = Any
"""A NumPy array, a torch tensor or a Keras tensor: methods are written once for all of them."""

Trains = Literal["codes", "through"]
"""What the optimiser is shown: the floating entries of the code, or what the method encodes."""

Code = dict[str, Array]
"""What a method stores: entry name -> array. Floating arrays are trainable, integer arrays are not."""


FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Integers:
    """What an integer entry of a code may hold: ``count`` different values, from ``least`` on.

    ``rising`` numbers, positions, grow strictly through the flattened entry: they can be stored as gaps. A method whose
    ``encode`` keeps the entry within ``most_bytes``, coded, promises it.
    """

    count: int
    least: int = 0
    rising: bool = False
    most_bytes: int | None = None

    def bytes(self, entries: int) -> int:
        """The most that so many of them take in a file."""
        packed = packed_bytes(entries, width_of(self.count))
        if self.most_bytes is not None:
            return min(packed, self.most_bytes)
        return min(packed, gap_bytes(entries, self.count)) if self.rising else packed


@runtime_checkable
class Namespace(Protocol):
    """The array functions that a method may use. The modules ``numpy`` and ``torch`` have them all, as they stand.

    ``take`` reads from the flattened array. ``linalg`` (``svd``, ``pinv``) serves ``encode`` only.
    """

    linalg: Any
    int16: Any
    int64: Any
    float32: Any
    float64: Any
    finfo: Any

    def matmul(self, a: Array, b: Array, /) -> Array:
        """The matrix product ``a @ b``."""
        ...

    def reshape(self, a: Array, shape: tuple[int, ...], /) -> Array:
        """The same entries, row by row, in another shape."""
        ...

    def take(self, a: Array, index: Array, /) -> Array:
        """The entries of the flattened ``a`` at ``index``."""
        ...

    def concatenate(self, arrays: Sequence[Array], /) -> Array:
        """The arrays one below the other."""
        ...

    def stack(self, arrays: Sequence[Array], axis: int, /) -> Array:
        """The arrays along a new axis."""
        ...

    def moveaxis(self, a: Array, source: tuple[int, ...], destination: tuple[int, ...], /) -> Array:
        """The same entries with some axes moved."""
        ...

    def tile(self, a: Array, repeats: tuple[int, ...], /) -> Array:
        """A new array of repetitions."""
        ...

    def zeros_like(self, a: Array, /) -> Array:
        """An array of zeros with the shape and type of ``a``."""
        ...

    def asarray(self, a: Array, /, *, dtype: Any = None) -> Array:
        """``a``, a NumPy array or one of this namespace, as one of this namespace."""
        ...

    def bincount(self, index: Array, weights: Array, least: int, /) -> Array:
        """Sums of the weights of each index, at least so many."""
        ...

    def argsort(self, a: Array, /, *, stable: bool = False) -> Array:
        """The order that sorts ``a``."""
        ...

    def amax(self, a: Array, axis: int, /) -> Array:
        """The largest entry along an axis."""
        ...

    def amin(self, a: Array, axis: int, /) -> Array:
        """The smallest entry along an axis."""
        ...

    def sum(self, a: Array, axis: int, /) -> Array:
        """The sums along an axis."""
        ...

    def mean(self, a: Array, axis: int, /) -> Array:
        """The means along an axis."""
        ...

    def cumsum(self, a: Array, axis: int, /) -> Array:
        """The running sums along an axis."""
        ...

    def clip(self, a: Array, least: int, most: int, /) -> Array:
        """The entries within bounds."""
        ...

    def round(self, a: Array, /) -> Array:
        """The nearest whole numbers, halves to even."""
        ...

    def sqrt(self, a: Array, /) -> Array:
        """The square root of each entry."""
        ...

    def ones_like(self, a: Array, /) -> Array:
        """An array of ones with the shape and type of ``a``."""
        ...

    def where(self, condition: Array, a: Array, b: Array, /) -> Array:
        """The entries of ``a`` where the condition holds, and those of ``b`` elsewhere."""
        ...

    def bitwise_right_shift(self, a: Array, bits: int, /) -> Array:
        """Integers without their lowest bits."""
        ...


@runtime_checkable
class Method(Protocol):
    """A way to store a ``rows x cols`` matrix: a frozen value whose fields are the stored header.

    ``rows`` are outputs and ``cols`` are inputs, as torch keeps a linear layer. ``trains`` says what the optimiser is
    shown.
    """

    @property
    def trains(self) -> Trains:
        """What the optimiser is shown."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the dense matrix."""
        ...

    def bits(self) -> int:
        """The most that a file stores for this matrix, headers apart: integers packed, or as ``encode`` bounds them."""
        ...

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored entry, known before anything is read or computed."""
        ...

    def integers(self) -> dict[str, Integers]:
        """The entries that hold integers, and which; all others hold floats."""
        ...

    def derived(self) -> Code:
        """NumPy tables that follow from the fields alone: rebuilt on load, never stored."""
        ...

    def init(self, rng: Generator, std: float) -> Code:
        """A from-scratch start (float32) whose decoded weights have mean 0 and standard deviation ``std``."""
        ...

    def encode(self, weight: Array, xp: Namespace, importance: Array | None = None) -> Code:
        """The nearest code to ``weight`` that the method can find; deterministic, its arguments left as they are."""
        ...

    def decode(self, code: Code, xp: Namespace) -> Array:
        """The dense matrix from stored and derived entries, differentiable in every floating entry."""
        ...


@runtime_checkable
class Fitted(Method, Protocol):
    """A method that chooses its fields for a size."""

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int) -> "Fitted":
        """The best setting whose ``bits()`` is at most ``max_bits``, or BudgetError. Options are keywords."""
        ...


@runtime_checkable
class Separable(Method, Protocol):
    """A method whose every weight follows from one float at most, up to its sign: so importance can be handed on."""

    def importance_of(self, code: Code, importance: Array, xp: Namespace) -> Code:
        """For each floating entry the importance of its numbers, from that of the weights.

        ``sum(importance * (change of the weights)^2)`` is ``sum(importance_of * (change of the floats)^2)``.
        """
        ...


@runtime_checkable
class Flat(Method, Protocol):
    """A method that decodes a range of the flattened matrix at the cost of that range."""

    def decode_flat(self, code: Code, start: int, stop: int, xp: Namespace) -> Array:
        """The entries ``start`` to ``stop`` (excluded) of the flattened matrix."""
        ...


@runtime_checkable
class InTurn(Method, Protocol):
    """A method that multiplies inputs by its factors one after the other, without the weight."""

    def multiply(self, code: Code, x: Array, xp: Namespace) -> Array:
        """``x @ W.T`` for ``x`` of items x ``inputs()``, the columns beyond ``cols`` being zeros: items x rows."""
        ...

    def inputs(self) -> int:
        """How many columns ``multiply`` takes: ``cols``, or the next product of the factors' widths."""
        ...

    def multiplies(self) -> int:
        """Multiplications of ``multiply`` for one item."""
        ...

    def summands(self) -> int:
        """Products that ``decode`` adds up for each entry of the weight: what decoding costs beside a dense matrix."""
        ...


@runtime_checkable
class Symbols(Method, Protocol):
    """A method that stores an integer of one byte for each weight, in its entry ``symbols``.

    A weight is ``centres[symbol]`` with a table, or ``step * symbol + least`` without one.
    """

    def table_levels(self) -> int | None:
        """How many entries the table ``centres`` has; None where the weight is ``step * symbol + least``."""
        ...


@runtime_checkable
class Sparse(Method, Protocol):
    """A method that stores some weights, ``values``, at their flat ``positions``; the others are zero."""

    @property
    def kept(self) -> int:
        """How many weights are stored."""
        ...

    def with_kept(self, kept: int) -> "Sparse":
        """The same method with another number of weights."""
        ...


@runtime_checkable
class Drifting(Method, Protocol):
    """A method that is no projection: a decoded code, encoded again, may be another one by more than rounding."""

    def drifts(self) -> bool:
        """Whether it may be, with these fields."""
        ...


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) under which an entry of a code is stored by another method."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
