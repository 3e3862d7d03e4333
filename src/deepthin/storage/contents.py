"""What a ``.thin`` file holds: compressed matrices, tensors as they are, and names that share a tensor."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from deepthin.method import Integers, Method, Namespace, matrix_shape
from deepthin.storage.arrays import (
    ITEM_BYTES,
    LONGEST_NAME,
    Coding,
    Raw,
    check_integers,
    largest,
    packed,
    without_repeats,
)
from deepthin.storage.budget import largest_weight
from deepthin.storage.codings import coded, stored_floats

VERSION = 2
"""The format version that is written unless another is asked for."""
VERSIONS = (1, 2)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a decoded matrix: a range of the flattened entries, times ``scale``, in its shape."""

    shape: tuple[int, ...]
    scale: float = 1.0
    transposed: bool = False  # stored (outputs, inputs), where the model keeps (inputs, outputs)
    zero_row: int | None = None  # a row of zeros: the padding of an embedding

    def cut(self, flat: Any, xp: Namespace) -> Any:
        """The tensor from its entries of the flattened matrix.

        Args:
            flat: Its entries, in any framework: one dimension.
            xp: The namespace of ``flat``.

        Returns:
            Array of ``shape``, scaled, with zeros in ``zero_row``.
        """
        if self.scale != 1.0:
            flat = flat * self.scale
        tensor = flat.reshape(self.shape[::-1]).T if self.transposed else flat.reshape(self.shape)
        if self.zero_row is None:
            return tensor
        row, after = self.zero_row, self.zero_row + 1
        return xp.concatenate([tensor[:row], 0 * tensor[row:after], tensor[after:]])


def flat_shape(parts: Sequence[Part]) -> tuple[int, int]:
    """The shape of the matrix that holds tensors, one after the other.

    Args:
        parts: The tensors.

    Returns:
        That of one tensor as a matrix; near-square for several.
    """
    if len(parts) == 1:
        return _own_shape(parts[0])
    return matrix_shape((sum(math.prod(part.shape) for part in parts),))


def stacked_shape(parts: Sequence[Part]) -> tuple[int, int] | None:
    """The shape of the matrix that holds tensors, one below the other.

    Args:
        parts: The tensors.

    Returns:
        The sum of their rows, and their columns; None if they have different columns.
    """
    own = [_own_shape(part) for part in parts]
    return (sum(rows for rows, _ in own), own[0][1]) if len({cols for _, cols in own}) == 1 else None


def _own_shape(part: Part) -> tuple[int, int]:
    return matrix_shape(part.shape[::-1] if part.transposed else part.shape)


Stored = Mapping[str, tuple[Raw, Coding | None]]
"""The entries of a matrix as the file has them: floats, and integers as bytes; with how these are to be read."""


def _planned(raw: Raw, kind: Integers) -> tuple[Raw, Coding] | None:
    """The most bytes that integers can take which are not there yet, as on torch's meta device."""
    return (Raw.zeros("U8", (kind.bytes(math.prod(raw.shape)),)), ("planned", 0)) if raw.planned else None


@dataclass(frozen=True)
class Thin:
    """A compressed matrix and the tensors that it holds, one after the other: several in a group, else one."""

    name: str  # the method's, as users write it
    method: Method
    parts: Mapping[str, Part]  # by the tensor's name, in order
    code: Mapping[str, Raw]  # integers as they are, not packed
    planned: bool = False  # whether there is no code yet: integers are then so many bytes, the most that they can take
    read: tuple[int, Stored] | None = field(
        default=None, compare=False
    )  # of a file: its version, and the entries in it

    @classmethod
    def plan(cls, name: str, method: Method, parts: Mapping[str, Part], like: Raw) -> "Thin":
        """A placeholder that takes at least as many bytes as any code of this method; it has no values.

        Args:
            name: Name of the method, as users write it.
            method: The method.
            parts: The tensors of the matrix, by name, in order.
            like: A tensor whose type the floats of the code have.

        Returns:
            The matrix, with ``planned`` set.
        """
        integers, code = method.integers(), dict[str, Raw]()
        for entry, shape in method.code_shapes().items():
            if entry in integers:
                code[entry] = Raw.zeros("U8", (integers[entry].bytes(math.prod(shape)),))
            else:
                code[entry] = Raw.zeros(like.dtype, shape)
        return cls(name, method, parts, code, planned=True)

    def check(self) -> None:
        """Refuse integers that ``read`` would refuse.

        Raises:
            ConfigError: They have another shape, are out of range, or do not rise.
        """
        integers, shapes = self.method.integers(), self.method.code_shapes()
        for entry in () if self.planned else integers:
            place = f"{next(iter(self.parts))}/{entry}"
            check_integers(place, self.code[entry].numpy(), integers[entry], tuple(shapes[entry]))

    def stored_as(self, version: int) -> Stored:
        """Every entry as a file of a format version has it. Integers are coded once, when this is first asked for.

        Args:
            version: 1 or 2.

        Returns:
            Entry -> the stored tensor, and how it is to be read.
        """
        if self.read is not None and self.read[0] == version:
            return self.read[1]
        return self.stored if version == VERSION else self._stored_before

    @functools.cached_property
    def stored(self) -> Stored:
        """Every entry as a file of version 2 has it."""
        integers = self.method.integers()
        if self.planned:
            return {entry: (raw, ("planned", 0) if entry in integers else None) for entry, raw in self.code.items()}
        floats = stored_floats({entry: raw for entry, raw in self.code.items() if entry not in integers})
        return {
            entry: floats[entry]
            if entry in floats
            else _planned(raw, integers[entry]) or coded(raw.numpy(), integers[entry])
            for entry, raw in self.code.items()
        }

    @functools.cached_property
    def _stored_before(self) -> Stored:
        integers = self.method.integers()
        if self.planned:
            return {entry: (raw, LONGEST_NAME if entry in integers else None) for entry, raw in self.code.items()}
        return {
            entry: packed(raw.numpy(), integers[entry]) if entry in integers else without_repeats(entry, raw)
            for entry, raw in self.code.items()
        }

    @property
    def bytes(self) -> int:
        """Bytes of the entries in a file of the version that this was read from, or that is written."""
        return sum(raw.bytes for raw, _ in self.stored_as(self.read[0] if self.read else VERSION).values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense tensors, in the type of the code."""
        return sum(self.item_bytes * math.prod(part.shape) for part in self.parts.values())

    @property
    def item_bytes(self) -> int:
        """Bytes of one float of the code."""
        integers = self.method.integers()
        return ITEM_BYTES[next(raw.dtype for entry, raw in self.code.items() if entry not in integers)]

    def surely_within(self, limit: float) -> bool:
        """Whether all weights are finite and at most ``limit``, however they are computed; False if unsure."""
        most = {entry: largest(raw) for entry, raw in self.code.items()}  # 0 for integers
        kind = np.float64 if self.item_bytes == 8 else np.float32
        scale, largest_float = max(1.0, *(part.scale for part in self.parts.values())), float(np.finfo(kind).max)
        bound = 2 * max(*most.values(), scale * largest_weight(self.method, most))
        products = 32.0 * max(self.method.shape) * max(most.values())  # of inputs with a factor, in single precision
        within = bound < min(limit, largest_float) and products < min(largest_float, float(np.finfo(np.float32).max))
        return within and scale < largest_float  # zero times an infinite scale is NaN

    def decode(self) -> dict[str, np.ndarray]:
        """Decode the tensors of the matrix with NumPy; codes in half precision are decoded in float32.

        Returns:
            Tensor name -> array of its dense shape, contiguous.
        """
        code = {entry: raw.numpy() for entry, raw in self.code.items()}
        code = {entry: a.astype(np.float32) if a.dtype == np.float16 else a for entry, a in code.items()}
        flat = np.reshape(self.method.decode(code | self.method.derived(), cast(Any, np)), (-1,))
        ends = list(itertools.accumulate(math.prod(part.shape) for part in self.parts.values()))
        cuts = zip(self.parts.items(), [0, *ends], ends, strict=False)
        return {
            name: np.ascontiguousarray(part.cut(flat[start:end], cast(Any, np))) for (name, part), start, end in cuts
        }


@dataclass(frozen=True, slots=True)
class Contents:
    """All that a file holds: compressed matrices, tensors as they are, and names that share another name's tensor.

    ``thin`` is keyed by the name of each matrix's first tensor. Of a model, contents refer to its tensors, whose values
    are read when they are written: they serve until the model changes.
    """

    thin: Mapping[str, Thin]
    dense: Mapping[str, Raw] = field(default_factory=dict[str, Raw])
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    version: int = VERSION  # of the format: that of the file, or that is written

    @property
    def dense_bytes(self) -> int:
        """Bytes of every parameter and buffer of the dense model."""
        return sum(raw.bytes for raw in self.dense.values()) + sum(thin.dense_bytes for thin in self.thin.values())
