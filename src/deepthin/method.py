"""The one idea: a method turns a weight matrix into a small dictionary of arrays and back.

This file holds what every method offers (``Method``), what it produces (``Code``), the few array functions that it may
use (``Namespace``) and the errors of the whole library. It imports no framework.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from numpy.random import Generator

Array = Any
"""A NumPy array, a torch tensor or a Keras tensor: methods are written once for all of them."""

Trains = Literal["codes", "through"]
"""What the optimiser is shown: the floating entries of the code, or what the method encodes."""

Code = dict[str, Array]
"""What a method stores: entry name -> array. Floating arrays are trainable, integer arrays are not."""


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

    ``take`` reads from the flattened array. ``linalg`` (``svd``, ``pinv``) and ``concatenate`` serve ``encode`` only.
    """

    linalg: Any

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

    def asarray(self, a: Array, /) -> Array:
        """The NumPy array ``a`` as an array of this namespace."""
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


@runtime_checkable
class Method(Protocol):
    """A way to store a ``rows x cols`` matrix: a frozen value whose fields are the stored header.

    ``rows`` are outputs and ``cols`` are inputs, as torch keeps a linear layer. ``trains`` says what the optimiser is
    shown.
    """

    trains: ClassVar[Trains]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the dense matrix."""
        ...

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int) -> "Method":
        """The best setting whose ``bits()`` is at most ``max_bits``, or BudgetError. Options are keywords."""
        ...

    def bits(self) -> int:
        """Payload with plain bit packing: an upper bound of what a file stores for this matrix, headers apart."""
        ...

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored entry, known before anything is read or computed."""
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


def round_up(ratio: float) -> str:
    """A ratio in two significant digits, rounded up so that what a message recommends can be reached."""
    digits = 1 - math.floor(math.log10(ratio))
    return f"{math.ceil(ratio * 10**digits - 1e-9) / 10**digits:.{max(digits, 0)}f}"
