"""The one idea: a method turns a weight matrix into a small dictionary of arrays and back.

This file holds what every method offers (``Method``), what it produces (``Code``), the few array functions that it may
use (``Namespace``), one method after another (``Then``) and the errors of the whole library. It imports no framework.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.random import Generator

from deepthin.bits import gap_bytes, packed_bytes, width_of

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


class DeepThinError(Exception):
    """The parent of every error that this library raises by itself."""


class BudgetError(DeepThinError):
    """A size was asked for that cannot be reached; the message and the fields name the smallest that can.

    ``smallest_bits`` is what the smallest possible code takes; ``smallest_ratio`` is the same over 32 bits a weight.
    """

    def __init__(self, message: str, *, smallest_bits: int, smallest_ratio: float) -> None:
        super().__init__(message)
        self.smallest_bits = smallest_bits
        self.smallest_ratio = smallest_ratio


class ConfigError(DeepThinError):
    """A configuration, a layer name or an option that does not fit; the message names the closest valid one."""


class FormatError(DeepThinError):
    """A file that is damaged, hostile, or no ``.thin`` file at all."""


class NonFiniteError(DeepThinError):
    """A NaN or an infinity where there must be none; the message names the tensor and the index."""


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


def round_up(ratio: float) -> str:
    """A ratio in two significant digits, rounded up so that what a message recommends can be reached."""
    digits = 1 - math.floor(math.log10(ratio))
    return f"{math.ceil(ratio * 10**digits - 1e-9) / 10**digits:.{max(digits, 0)}f}"


@dataclass(frozen=True, slots=True)
class Then:
    """One method after another: ``inner`` stores each floating entry of ``outer``'s code, which it sees as a matrix.

    Han et al. (2016) prune, then share values; here any method's floats may be stored by any other.
    """

    outer: Method
    inner: tuple[tuple[str, Method], ...]  # by entry of the outer code

    @classmethod
    def fit(
        cls,
        outer: Callable[[int], Method],
        inner: Callable[[tuple[int, int]], Method],
        max_bits: int,
    ) -> "Then":
        """The largest outer plan whose floats the inner method stores in ``max_bits``; BudgetError if there is none.

        ``outer(bits)`` is the outer method that fits these bits, were its floats stored as they are; ``inner`` stores a
        matrix of some shape in a fixed number of bits for each entry.
        """

        def made(bits: int) -> "Then":
            plan = outer(bits)
            whole = {e: s for e, s in plan.code_shapes().items() if e not in plan.integers()}
            return cls(plan, tuple((e, inner(as_matrix(s))) for e, s in whole.items()))

        try:
            least = outer(0).bits()
        except BudgetError as error:
            least = error.smallest_bits
        smallest = made(least)
        if smallest.bits() > max_bits:
            raise BudgetError(
                f"It cannot be stored in {max_bits} bits: the smallest plan, its numbers then stored by "
                f"{type(smallest.inner[0][1]).__name__}, needs {smallest.bits()}.",
                smallest_bits=smallest.bits(),
                smallest_ratio=smallest.bits() / (FLOAT_BITS * math.prod(smallest.shape)),
            )
        best, low, high = smallest, least, max(least, 1)
        while high < 64 * max_bits and (found := made(high)).bits() <= max_bits:
            best, low, high = max(best, found, key=lambda plan: plan.bits()), high, 2 * high  # tables may shrink
        while high - low > max(FLOAT_BITS, low >> 12):
            middle = (low + high) // 2
            found = made(middle)
            low, high = (middle, high) if found.bits() <= max_bits else (low, middle)
            best = max(best, found, key=lambda plan: plan.bits() if plan.bits() <= max_bits else -1)
        return best

    @property
    def trains(self) -> Trains:
        """As the inner method."""
        return self.inner[0][1].trains

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense matrix."""
        return self.outer.shape

    def bits(self) -> int:
        """Of the inner codes, and of the outer integers."""
        shapes = self.outer.code_shapes()
        whole = sum(8 * kind.bytes(math.prod(shapes[e])) for e, kind in self.outer.integers().items())
        return whole + sum(method.bits() for _, method in self.inner)

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``xf_symbols``: the entry ``symbols`` of what stores ``xf``."""
        own = {e: s for e, s in self.outer.code_shapes().items() if e in self.outer.integers()}
        return own | {f"{e}_{k}": s for e, method in self.inner for k, s in method.code_shapes().items()}

    def integers(self) -> dict[str, Integers]:
        """Of both."""
        return self.outer.integers() | {f"{e}_{k}": i for e, method in self.inner for k, i in method.integers().items()}

    def derived(self) -> Code:
        """Of both."""
        return self.outer.derived() | {f"{e}_{k}": a for e, method in self.inner for k, a in method.derived().items()}

    def init(self, rng: Generator, std: float) -> Code:
        """The outer start, encoded."""
        import numpy as np

        return self.encode_floats(self.outer.init(rng, std), np)  # pyright: ignore[reportArgumentType]

    def encode(self, weight: Array, xp: Namespace, importance: Array | None = None) -> Code:
        """The outer code, encoded."""
        code = self.outer.encode(weight, xp, importance)
        return self.encode_floats(code, xp, self.shares(code, xp, importance))

    def shares(self, code: Code, xp: Namespace, importance: Array | None) -> Code:
        """The importance of the outer floats, of that of the weights: none where it cannot be told."""
        if importance is None or not isinstance(self.outer, Separable):
            return {}
        return self.outer.importance_of(code, importance, xp)

    def encode_floats(self, code: Code, xp: Namespace, shares: Mapping[str, Array] | None = None) -> Code:
        """What is stored for an outer code; ``shares`` weigh the errors of its floats, those of a missing one alike."""
        made = {entry: code[entry] for entry in self.outer.integers()}
        for entry, method in self.inner:
            share = xp.reshape(shares[entry], method.shape) if shares and entry in shares else None
            stored = method.encode(xp.reshape(code[entry], method.shape), xp, share)
            made |= {f"{entry}_{key}": array for key, array in stored.items()}
        return made

    def decode_floats(self, code: Code, xp: Namespace) -> Code:
        """The outer code of what is stored."""
        shapes, made = self.outer.code_shapes(), dict(code)
        for entry, method in self.inner:
            stored = {key.removeprefix(f"{entry}_"): made.pop(key) for key in code if key.startswith(f"{entry}_")}
            made[entry] = xp.reshape(method.decode(stored, xp), shapes[entry])
        return made

    def decode(self, code: Code, xp: Namespace) -> Array:
        """The dense matrix."""
        return self.outer.decode(self.decode_floats(code, xp), xp)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) under which an entry of a code is stored by another method."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
