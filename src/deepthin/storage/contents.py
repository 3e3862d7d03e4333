"""What a ``.thin`` file holds: compressed matrices, tensors as they are, and names that share a tensor."""

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from deepthin.method import Method, Namespace
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


Stored = Mapping[str, tuple[Raw, Coding | None]]
"""The entries of a matrix as the file has them: floats, and integers as bytes; with how these are to be read."""


@dataclass(frozen=True)
class Thin:
    """A compressed matrix and the tensors that it holds, one after the other: several in a group, else one."""

    name: str  # the method's, as users write it
    method: Method
    parts: Mapping[str, Part]  # by the tensor's name, in order
    code: Mapping[str, Raw]  # integers as they are, not packed
    planned: bool = False  # whether there is no code yet: integers are then so many bytes, the most that they can take
    read: Stored | None = field(default=None, compare=False)  # of a file: the entries as they are in it

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

    @functools.cached_property
    def stored(self) -> Stored:
        """Every entry as the file has it. Integers are coded once, when this is first asked for."""
        integers = self.method.integers()
        if self.read is not None:
            return self.read
        if self.planned:
            return {entry: (raw, LONGEST_NAME if entry in integers else None) for entry, raw in self.code.items()}
        return {
            entry: packed(raw.numpy(), integers[entry]) if entry in integers else without_repeats(entry, raw)
            for entry, raw in self.code.items()
        }

    @property
    def bytes(self) -> int:
        """Bytes of the stored entries."""
        return sum(raw.bytes for raw, _ in self.stored.values())

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
        scale = max(1.0, *(part.scale for part in self.parts.values()))
        return 2 * max(*most.values(), scale * largest_weight(self.method, most)) < min(
            limit, float(np.finfo(kind).max)
        )

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

    @property
    def dense_bytes(self) -> int:
        """Bytes of every parameter and buffer of the dense model."""
        return sum(raw.bytes for raw in self.dense.values()) + sum(thin.dense_bytes for thin in self.thin.values())
