"""What every method offers, ``Method``: it turns a weight matrix into a small dictionary of arrays, ``Code``, and back.

Beside it are the array functions that a method may use (``Namespace``) and the protocols of further abilities. Nothing
here imports a framework.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.random import Generator

from deepthin.coding.bits import gap_bytes, packed_bytes, width_of


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix shape under which a tensor is stored.

    Args:
        shape: Shape of the tensor, outputs first.

    Returns:
        (rows, cols): (outputs, product of the rest); near-square for one dimension.
    """
    if len(shape) > 1:
        return shape[0], math.prod(shape[1:])
    cols = math.isqrt(max(math.prod(shape) - 1, 0)) + 1
    return -(-math.prod(shape) // cols), cols


Array = Any
"""A NumPy array, a torch tensor or a Keras tensor: methods are written once for all of them."""

Trains = Literal["codes", "through"]
"""What the optimiser updates: the floats of the code, or the latents that the method encodes."""

Code = dict[str, Array]
"""What a method stores: entry name -> array. Floating arrays are trainable, integer arrays are not."""


FLOAT_BITS = 32
STEPS_OF_SPREAD = 4  # root mean square of the numbers over a learned step at the start of a training


@dataclass(frozen=True, slots=True)
class Integers:
    """The values that an integer entry of a code may have, and how large it can be in a file.

    Attributes:
        count: Number of different values.
        least: The smallest value; the largest is ``least + count - 1``.
        rising: Whether the flattened entry is strictly increasing, as positions are: it can then be stored as gaps.
        most_bytes: Upper bound on the coded size of the entry, guaranteed by ``encode``; None: that of packing.
    """

    count: int
    least: int = 0
    rising: bool = False
    most_bytes: int | None = None

    def bytes(self, entries: int) -> int:
        """Upper bound on the bytes of an entry in a file.

        Args:
            entries: How many integers the entry has.

        Returns:
            The smaller of the packed size and ``most_bytes``; without ``most_bytes``, the smaller of the packed size
            and, for rising integers, the largest size as gaps.
        """
        packed = packed_bytes(entries, width_of(self.count))
        if self.most_bytes is not None:
            return min(packed, self.most_bytes)
        return min(packed, gap_bytes(entries, self.count)) if self.rising else packed


@runtime_checkable
class Namespace(Protocol):
    """The array functions that a method may use; the modules ``numpy`` and ``torch`` provide them under these names.

    ``take`` indexes the flattened array. ``linalg`` (``svd``, ``pinv``) is used by ``encode`` only.
    """

    linalg: Any
    int16: Any
    int32: Any
    int64: Any
    float32: Any
    float64: Any
    finfo: Any

    def matmul(self, a: Array, b: Array, /) -> Array:
        """Matrix product ``a @ b``.

        Args:
            a: Left matrices.
            b: Right matrices.

        Returns:
            The product.
        """
        ...

    def reshape(self, a: Array, shape: tuple[int, ...], /) -> Array:
        """The same entries, in row-major order, with another shape.

        Args:
            a: Array of any shape.
            shape: New shape; one length may be -1.

        Returns:
            Array of that shape; it may share memory with ``a``.
        """
        ...

    def take(self, a: Array, index: Array, /) -> Array:
        """The entries of the flattened ``a`` at ``index``.

        Args:
            a: Array of any shape.
            index: Integers from 0 to the number of entries - 1.

        Returns:
            Array shaped as ``index``.
        """
        ...

    def concatenate(self, arrays: Sequence[Array], /) -> Array:
        """Arrays joined along the first axis.

        Args:
            arrays: Arrays that differ in the first length only.

        Returns:
            The joined array.
        """
        ...

    def stack(self, arrays: Sequence[Array], axis: int, /) -> Array:
        """The arrays along a new axis.

        Args:
            arrays: Arrays of one shape.
            axis: Position of the new axis.

        Returns:
            Array with one dimension more.
        """
        ...

    def moveaxis(self, a: Array, source: tuple[int, ...], destination: tuple[int, ...], /) -> Array:
        """The same entries with some axes moved.

        Args:
            a: Array.
            source: Axes to move.
            destination: Their new positions.

        Returns:
            Array with the axes in the new order.
        """
        ...

    def tile(self, a: Array, repeats: tuple[int, ...], /) -> Array:
        """A new array of repetitions.

        Args:
            a: Array.
            repeats: Number of repetitions along each axis.

        Returns:
            The repeated array.
        """
        ...

    def zeros_like(self, a: Array, /) -> Array:
        """An array of zeros with the shape and type of ``a``.

        Args:
            a: Array.

        Returns:
            The zeros.
        """
        ...

    def asarray(self, a: Array, /, *, dtype: Any = None) -> Array:
        """``a``, a NumPy array or one of this namespace, as one of this namespace.

        Args:
            a: Array.
            dtype: Type of the result; None keeps that of ``a``.

        Returns:
            Array of this namespace; ``a`` itself if nothing changes.
        """
        ...

    def bincount(self, index: Array, weights: Array, least: int, /) -> Array:
        """For each index, the sum of its weights; the result has at least ``least`` entries.

        Args:
            index: Integers >= 0, one dimension.
            weights: Number for each index.
            least: Lower bound on the length of the result.

        Returns:
            The sums.
        """
        ...

    def argsort(self, a: Array, /, *, stable: bool = False) -> Array:
        """Indices that sort ``a`` along its last axis.

        Args:
            a: Array.
            stable: Whether equal entries keep their order.

        Returns:
            Integers shaped as ``a``.
        """
        ...

    def amax(self, a: Array, axis: int, /) -> Array:
        """The largest entry along an axis.

        Args:
            a: Array.
            axis: The axis that is reduced.

        Returns:
            Array with one dimension less.
        """
        ...

    def amin(self, a: Array, axis: int, /) -> Array:
        """The smallest entry along an axis.

        Args:
            a: Array.
            axis: The axis that is reduced.

        Returns:
            Array with one dimension less.
        """
        ...

    def sum(self, a: Array, axis: int, /) -> Array:
        """The sums along an axis.

        Args:
            a: Array.
            axis: The axis that is reduced.

        Returns:
            Array with one dimension less.
        """
        ...

    def mean(self, a: Array, axis: int, /) -> Array:
        """The means along an axis.

        Args:
            a: Array.
            axis: The axis that is reduced.

        Returns:
            Array with one dimension less.
        """
        ...

    def cumsum(self, a: Array, axis: int, /) -> Array:
        """Cumulative sums along an axis.

        Args:
            a: Array.
            axis: The axis along which is summed.

        Returns:
            Array shaped as ``a``.
        """
        ...

    def clip(self, a: Array, least: int, most: int, /) -> Array:
        """Entries limited to the range ``least`` to ``most``.

        Args:
            a: Array.
            least: Lower bound.
            most: Upper bound.

        Returns:
            Array shaped as ``a``.
        """
        ...

    def round(self, a: Array, /) -> Array:
        """The nearest integers, ties to even.

        Args:
            a: Array of floats.

        Returns:
            Floats with integer values.
        """
        ...

    def sqrt(self, a: Array, /) -> Array:
        """The square root of each entry.

        Args:
            a: Array, entries >= 0.

        Returns:
            Array shaped as ``a``.
        """
        ...

    def exp(self, a: Array, /) -> Array:
        """The exponential of each entry.

        Args:
            a: Array.

        Returns:
            Array shaped as ``a``.
        """
        ...

    def log(self, a: Array, /) -> Array:
        """The natural logarithm of each entry.

        Args:
            a: Array, entries > 0.

        Returns:
            Array shaped as ``a``.
        """
        ...

    def ones_like(self, a: Array, /) -> Array:
        """An array of ones with the shape and type of ``a``.

        Args:
            a: Array.

        Returns:
            The ones.
        """
        ...

    def where(self, condition: Array, a: Array, b: Array, /) -> Array:
        """The entries of ``a`` where the condition holds, and those of ``b`` elsewhere.

        Args:
            condition: Booleans.
            a: Array.
            b: Array.

        Returns:
            Array of the common shape.
        """
        ...

    def bitwise_right_shift(self, a: Array, bits: int, /) -> Array:
        """Integers divided by ``2**bits``, rounded down.

        Args:
            a: Array of integers.
            bits: Number of bits, >= 0.

        Returns:
            Integers shaped as ``a``.
        """
        ...


@runtime_checkable
class Method(Protocol):
    """A way to store a ``rows x cols`` matrix: an immutable value whose fields are stored in the file's header.

    ``rows`` are outputs and ``cols`` are inputs, as in torch's linear layers. docs/extending.md shows how to write one,
    and ``deepthin.testing.check_method`` checks its laws.
    """

    @property
    def trains(self) -> Trains:
        """What the optimiser updates: ``"codes"``, the floats of the code, or ``"through"``, latents that are rounded.

        With ``"through"`` the forward pass decodes the encoded latents, and their gradient passes through the rounding
        unchanged (straight-through estimator: Bengio, Leonard and Courville, 2013, arXiv:1308.3432).
        """
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the dense matrix."""
        ...

    def bits(self) -> int:
        """Upper bound on the stored bits of this matrix, headers apart.

        Returns:
            32 for each float, and for integers what ``Integers.bytes`` says.
        """
        ...

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored entry, which follows from the fields alone.

        Returns:
            Entry name -> shape.
        """
        ...

    def integers(self) -> dict[str, Integers]:
        """The entries that hold integers, and their ranges; all other entries hold floats.

        Returns:
            Entry name -> range of its values.
        """
        ...

    def derived(self) -> Code:
        """NumPy tables that follow from the fields alone: recomputed on load, never stored.

        Returns:
            Entry name -> array; no name that ``code_shapes`` has.
        """
        ...

    def init(self, rng: Generator, std: float) -> Code:
        """Draw a random code to train from scratch.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``: floats in float32, integers within ``integers``.
        """
        ...

    def encode(self, weight: Array, xp: Namespace, importance: Array | None = None) -> Code:
        """Approximate a matrix by the nearest code that the method finds. Deterministic; arguments are not modified.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Array, rows x cols, entries >= 0: the weight of each squared error. None weighs all equally;
                methods without a weighted fit ignore it.

        Returns:
            Arrays of ``code_shapes``; floats have the dtype of ``weight``.
        """
        ...

    def decode(self, code: Code, xp: Namespace) -> Array:
        """Compute the dense matrix; differentiable in every floating entry. Arguments are not modified.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols, in the dtype of the code's floats.
        """
        ...


@runtime_checkable
class Fitted(Method, Protocol):
    """A method that can choose its fields for a size."""

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int) -> "Fitted":
        """Choose the best fields for a budget. Options of the method are further keyword arguments.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: No fields fit; it carries the smallest possible ``bits()``.
            ConfigError: An option is invalid.
        """
        ...


@runtime_checkable
class Separable(Method, Protocol):
    """A method whose every weight depends on at most one float, up to its sign: importance adds up for each float."""

    def importance_of(self, code: Code, importance: Array, xp: Namespace) -> Code:
        """The importance of each float, from that of the weights.

        A small change of the floats then has the same cost in both: ``sum(importance * (change of weights)^2)`` equals
        ``sum(importance_of * (change of floats)^2)``.

        Args:
            code: Stored entries and those of ``derived``.
            importance: Array, rows x cols, entries >= 0.
            xp: The namespace of the arrays.

        Returns:
            Entry name -> array of the entry's shape, for each floating entry.
        """
        ...


@runtime_checkable
class Flat(Method, Protocol):
    """A method that can decode a range of the flattened matrix at a cost proportional to that range."""

    def decode_flat(self, code: Code, start: int, stop: int, xp: Namespace) -> Array:
        """Decode a range of the flattened matrix.

        Args:
            code: Stored entries and those of ``derived``.
            start: First entry, >= 0.
            stop: Entry after the last, at most ``rows * cols``.
            xp: The namespace of the arrays.

        Returns:
            Array of ``stop - start`` entries, equal to that range of the decoded matrix.
        """
        ...


@runtime_checkable
class InTurn(Method, Protocol):
    """A method that multiplies inputs by its factors one after the other, without computing the dense matrix."""

    def multiply(self, code: Code, x: Array, xp: Namespace) -> Array:
        """Multiply inputs by the factors in turn.

        Args:
            code: Stored entries and those of ``derived``.
            x: Array, items x ``inputs()``; columns from ``cols`` on are zeros.
            xp: The namespace of the arrays.

        Returns:
            ``x[:, :cols] @ W.T``: array, items x rows.
        """
        ...

    def inputs(self) -> int:
        """Number of columns that ``multiply`` takes.

        Returns:
            At least ``cols``: the product of the factors' widths.
        """
        ...

    def multiplies(self) -> int:
        """Cost of ``multiply``.

        Returns:
            Multiplications for one item.
        """
        ...

    def summands(self) -> int:
        """Cost of ``decode``, relative to writing a dense matrix.

        Returns:
            Products that are summed for each weight.
        """
        ...


@runtime_checkable
class Chain(InTurn, Protocol):
    """A method that is a tensor train: each entry of its code is one core."""

    def cores(self, code: Code, xp: Namespace) -> list[Array]:
        """The cores, with ``W[(i1..id), (j1..jd)] = g1[:, i1, j1, :] .. gd[:, id, jd, :]``, cut to rows x cols.

        Args:
            code: Floats, or integers that stand for them, in the shapes of ``code_shapes``.
            xp: The namespace of the arrays.

        Returns:
            For each entry of ``code_shapes``, in order, r_(k-1) x R_k x Q_k x r_k, with a rank of 1 at both ends.
        """
        ...


@runtime_checkable
class Drawn(Method, Protocol):
    """A method whose weight i is one of ``buckets`` entries ``values``, chosen and given its sign by a word.

    The words are those of ``deepthin.coding.bits.splitmix``, from ``seed``: the upper half, scaled to the number of
    buckets, is the bucket; the lowest bit is set for a negative sign.
    """

    @property
    def seed(self) -> int:
        """Seed of the words."""
        ...

    @property
    def buckets(self) -> int:
        """Number of entries."""
        ...


@runtime_checkable
class Symbols(Method, Protocol):
    """A method that stores one integer for each weight, in its entry ``symbols``.

    A weight is ``centres[symbol]`` for a method with a table, else ``step * symbol + least``. Native code multiplies by
    the symbols directly where they have at most 8 bits.
    """

    def table_levels(self) -> int | None:
        """Size of the table ``centres``.

        Returns:
            The number of centres; None where the weight is ``step * symbol + least``.
        """
        ...


@runtime_checkable
class Sparse(Method, Protocol):
    """A method that stores some weights, ``values`` at flat ``positions``; all others are zero."""

    @property
    def kept(self) -> int:
        """Number of stored weights."""
        ...

    def with_kept(self, kept: int) -> "Sparse":
        """The same method with another number of stored weights.

        Args:
            kept: Number of weights, 1 to ``rows * cols``.

        Returns:
            A new method; all other fields are unchanged.
        """
        ...


@runtime_checkable
class Stepped(Method, Protocol):
    """A method that rounds to multiples of one step, which is learned beside the latents, and limits the symbols.

    Its code has the entries ``symbols`` and ``step``. Training may also minimise the code length of the symbols.
    """

    def top(self) -> int:
        """The largest symbol.

        Returns:
            Symbols are from ``-top`` to ``top``.
        """
        ...

    def start(self, weight: Array, xp: Namespace) -> Array:
        """The step with which a training starts.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.

        Returns:
            Natural logarithm of the step, 1 x 1.
        """
        ...

    def step(self, log_step: Array, xp: Namespace) -> Array:
        """The step that the code has, from the latent that is learned.

        Args:
            log_step: Natural logarithm of the step, 1 x 1.
            xp: The namespace of ``log_step``.

        Returns:
            The step, 1 x 1, > 0.
        """
        ...

    def quantize(self, weight: Array, log_step: Array, xp: Namespace) -> Code:
        """Round to the nearest multiple of a learned step.

        Args:
            weight: Array, rows x cols, finite.
            log_step: Natural logarithm of the step, 1 x 1.
            xp: The namespace of the arrays.

        Returns:
            Arrays of ``code_shapes``.
        """
        ...


@runtime_checkable
class Drifting(Method, Protocol):
    """A method that is not idempotent: encoding a decoded code may change it by more than floating-point rounding."""

    def drifts(self) -> bool:
        """Whether this is so with the present fields.

        Returns:
            True if encoding a decoded code may change it.
        """
        ...


@runtime_checkable
class Bounded(Method, Protocol):
    """A method that says, from its fields alone, what decoding takes and how large the weights can become.

    Files are untrusted: both are asked before anything is decoded. A method that does not say counts as one that takes
    128 bytes for each weight, and its matrices are decoded to find out whether they are finite.
    """

    def decode_bytes(self, item_bytes: int) -> int:
        """Memory of ``derived`` and ``decode`` in NumPy.

        Args:
            item_bytes: Bytes of a float of the code, 4 or 8.

        Returns:
            Upper bound on the bytes that both allocate, the tables and the result included; the code is not counted.
        """
        ...

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """How large weights can be, by magnitude.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight, and of every number that ``decode`` computes on its way.
        """
        ...


@runtime_checkable
class StartsSteps(Method, Protocol):
    """A method that says how large floats of zeros will become, so that their learned step can begin as large."""

    def start_of_steps(self, code: Code, xp: Namespace) -> Code:
        """Numbers by which the first steps of some entries are chosen, instead of the entries themselves.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Entry name -> array of its shape; entries that are left out speak for themselves.
        """
        ...


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix shape under which a second method stores an entry of a code.

    Args:
        shape: Shape of the entry.

    Returns:
        (rows, cols): (1, length) for one dimension, else (first dimension, product of the rest).
    """
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
