"""A matrix of the C runtime: its kinds, and the memory that a product needs (runtime/dt.h)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import cast

import numpy as np

from deepthin.torch.export.native.stored import FLOATS, Stored

_WIDEST = 16  # floats in a vector, at most; the runtime's scratch is the same for all
_LONGEST_BLOCK = 128  # sums that the runtime computes at once, at most
_AHEAD = 512  # integers of windows that are decoded at once
_SPARSE_CHUNK = 64  # values of a sparse matrix that are decoded at once
_UP_TO = 4  # products for which constants stay where they are
_CACHE = 1 << 20  # bytes of scratch for constants, at most


class Kind(IntEnum):
    """How a matrix is stored, as in runtime/dt.h."""

    DENSE = 0
    WINDOWS = 1
    TRAIN = 2
    SPARSE = 3
    HASHED = 4


class Use(IntEnum):
    """How a matrix is used, which decides on the memory that it needs."""

    ONCE = 0
    PACKED = 1
    ROWS = 2


@dataclass(frozen=True)
class Array:
    """A range of stored numbers, from entry ``first`` on."""

    stored: Stored
    first: int = 0


@dataclass(frozen=True)
class Core:
    """One core of a tensor train: before x rows x cols x after."""

    before: int
    rows: int
    cols: int
    after: int
    values: Array


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of the runtime; runtime/dt.h describes the kinds and what their fields mean."""

    kind: Kind
    rows: int
    cols: int
    a: Array | None = None
    b: Array | None = None
    n: int = 0
    rank: int = 0
    offset: int = 0
    m: int = 0
    cores: tuple[Core, ...] = ()
    gaps: np.ndarray | None = None
    seed: int = 0
    scale: float = 1.0
    turned: bool = False

    @property
    def inputs(self) -> int:
        """Numbers that a product takes."""
        return self.rows if self.turned else self.cols

    @property
    def outputs(self) -> int:
        """Numbers that a product gives."""
        return self.cols if self.turned else self.rows

    def scratch(self, use: Use) -> int:
        """Memory of a product, as ``dt_scratch`` in runtime/dt.c counts it.

        Args:
            use: How the matrix is used.

        Returns:
            Floats.
        """
        floats = self.cols if self.turned and use is not Use.ROWS else 0
        use = Use.ROWS if self.turned else use
        packed = self.a is not None and self.a.stored.bits != FLOATS
        if self.kind is Kind.DENSE:
            return floats + packed * {Use.ONCE: self.cols, Use.PACKED: self.rows * self.cols, Use.ROWS: 0}[use]
        if self.kind is Kind.WINDOWS:
            taps, depth = -(-(self.cols + self.n - 1) // self.n), -(-self.rows // self.n)
            terms, sums = taps * self.rank, taps * self.n
            width = _up(terms, _WIDEST)
            floats += self.rank * self.n if cast(Array, self.b).stored.bits != FLOATS else 0
            if use is Use.ROWS:
                return floats + self.rank
            floats += _up(sums, _LONGEST_BLOCK) + self.n + _LONGEST_BLOCK + self.n * width
            return floats + (self.n * terms * _up(depth, _WIDEST) if use is Use.PACKED else width + packed * _AHEAD)
        if self.kind is Kind.TRAIN:
            return floats + self._floats_of_train(use is Use.ROWS)
        if self.kind is Kind.SPARSE:
            return floats + _SPARSE_CHUNK
        return floats + packed * self.n

    def _floats_of_train(self, rows: bool) -> int:
        before, done, row = math.prod(core.cols for core in self.cores), 1, 0
        most = before
        for core in reversed(self.cores):
            before //= core.cols
            done *= core.cols if rows else core.rows
            most = max(most, (1 if rows else before) * core.before * done)
            if core.values.stored.bits != FLOATS:
                row = max(row, core.cols * core.after)
        return 2 * most + row

    def packs(self, products: int) -> Use:
        """Whether constants are laid out for the vectors first.

        Args:
            products: How many products follow one after the other.

        Returns:
            ``PACKED`` if that pays.
        """
        if products < _UP_TO or self.turned:
            return Use.ONCE
        if self.kind is Kind.WINDOWS:
            depth, taps = -(-self.rows // self.n), -(-(self.cols + self.n - 1) // self.n)
            vectors = -(-depth // 8)
            pays = vectors * taps * self.rank <= 2 * depth * -(-taps * self.rank // 8)
            return Use.PACKED if pays and 4 * self.scratch(Use.PACKED) <= _CACHE else Use.ONCE
        if self.kind is Kind.DENSE and cast(Array, self.a).stored.bits != FLOATS:
            return Use.PACKED if 4 * self.rows * self.cols <= _CACHE else Use.ONCE
        return Use.ONCE


def size_of(matrix: Matrix) -> int:
    """Bytes of a matrix's constants.

    Args:
        matrix: The matrix.

    Returns:
        Bytes, those that it shares with other matrices included.
    """
    arrays: Sequence[Array | None] = (matrix.a, matrix.b, *(core.values for core in matrix.cores))
    whole = {id(array.stored): array.stored.bytes for array in arrays if array is not None}
    return sum(whole.values()) + (0 if matrix.gaps is None else matrix.gaps.nbytes)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
