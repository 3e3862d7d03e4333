"""Constants of the C runtime: arrays of floats or of few bits, and the forms of a matrix (runtime/dt.h)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from deepthin.method import Chain, Code, Drawn, Sparse
from deepthin.methods.factor import Factored, Window
from deepthin.methods.float_coding import FloatCoding, stored_by
from deepthin.torch.weight import ThinWeight

FLOATS = 32  # bits of an array that is not packed
DIGITS = {103: (3, 5), 106: (6, 3)}
"""``bits`` of integers that are digits, several in a byte -> their base, and how many a byte holds."""
_WIDEST = 16  # floats in a vector, at most; the runtime's scratch is the same for all
_LONGEST_BLOCK = 128  # sums that the runtime computes at once, at most
_AHEAD = 512  # integers of windows that are decoded at once
_SPARSE_CHUNK = 64  # values of a sparse matrix that are decoded at once
_TABLE_BITS = 8  # of an index into a table of floats


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


@dataclass(eq=False)
class Stored:
    """Numbers in constant memory: floats, integers of some bits, and the floats that they stand for.

    Attributes:
        data: Floats, or bytes of packed integers, the lowest bits of a byte first.
        count: Number of entries.
        bits: 1 to 8 or 16 of an integer; a key of ``DIGITS``; 32 for floats.
        zero: What is subtracted from an integer before it is multiplied by the step.
        row: Entries that share a step, or a table; 0: all do.
        step: Factor of the integers; None with a table.
        least: What is added; or None.
        table: ``2^bits`` floats for each row; or None.
        fix_at: Entries that are listed, rising.
        fix: Their values.
    """

    data: np.ndarray
    count: int
    bits: int = FLOATS
    zero: int = 0
    row: int = 0
    step: np.ndarray | None = None
    least: np.ndarray | None = None
    table: np.ndarray | None = None
    fix_at: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    fix: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def bytes(self) -> int:
        """Size of all constants."""
        parts = (self.data, self.step, self.least, self.table, self.fix_at, self.fix)
        return sum(part.nbytes for part in parts if part is not None)


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


_UP_TO = 4  # products for which constants stay where they are
_CACHE = 1 << 20  # bytes of scratch for constants, at most


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers of some bits one after the other, the lowest bits of a byte first.

    Args:
        values: Integers from 0 to ``2^bits - 1``.
        bits: 1 to 8, 16, or a key of ``DIGITS``.

    Returns:
        Bytes.
    """
    if bits in DIGITS:
        base, each = DIGITS[bits]
        digits = np.pad(values, (0, -values.size % each)).reshape(-1, each)
        return (digits * base ** np.arange(each)).sum(1).astype(np.uint8)
    if bits == 16:
        return values.astype("<u2").view(np.uint8)
    planes = (values[:, None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little")


def store(values: np.ndarray, symbols: np.ndarray | None = None, step: np.ndarray | None = None) -> Stored:
    """The smallest form of an array that keeps its values exactly.

    Args:
        values: float32, two dimensions.
        symbols: Integers that stand for them, of the same shape; None: they are looked for.
        step: Their factor, one or one for each row, if ``step * symbols`` are the values.

    Returns:
        The stored form.
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    forms = [Stored(flat, flat.size)]
    if symbols is not None and step is not None:
        made = _stepped(
            flat, symbols.reshape(-1).astype(np.int64), step.reshape(-1).astype(np.float32), values.shape[-1]
        )
        forms += [made] if made is not None else []
    forms += _tabled(flat, 0)
    if values.ndim == 2 and values.shape[1] > 1:
        forms += _tabled(flat, values.shape[1])
    return min(forms, key=lambda form: form.bytes)


def _stepped(flat: np.ndarray, symbols: np.ndarray, step: np.ndarray, cols: int) -> Stored | None:
    """Multiples of a step, in the bits that take the fewest bytes; the numbers beyond them are listed."""
    if step.size not in (1, flat.size // cols):
        return None
    row = cols if step.size > 1 else 0
    factors = np.repeat(step, cols) if row else step
    if not np.array_equal(factors * symbols.astype(np.float32), flat):
        return None
    low, _high = int(symbols.min()), int(symbols.max())
    best: tuple[float, int, int] | None = None
    counts = np.bincount(symbols - low)
    ends = np.concatenate([[0], np.cumsum(counts)])
    for bits in (*range(1, 9), 16, *DIGITS):
        base, each = DIGITS.get(bits, (1 << bits, 8 / bits))
        levels = min(base, len(counts))
        inside = ends[levels:] - ends[:-levels] if levels < len(ends) else ends[-1:]
        at = int(np.argmax(inside))
        size = symbols.size / each + 8 * (symbols.size - int(inside[at]))
        if best is None or size < best[0]:
            best = (size, bits, low + at)
    assert best is not None
    _, bits, least = best
    base = DIGITS[bits][0] if bits in DIGITS else 1 << bits
    outside = np.flatnonzero((symbols < least) | (symbols >= least + base))
    inside = symbols - least
    inside[outside] = 0
    return Stored(
        pack_bits(inside, bits),
        flat.size,
        bits,
        -least,
        row,
        step,
        fix_at=outside.astype(np.uint32),
        fix=flat[outside].copy(),
    )


def _tabled(flat: np.ndarray, row: int) -> list[Stored]:
    """Indices into a table of the values that occur, one table or one for each row."""
    lines = flat.reshape(-1, row) if row else flat[None]
    if not row and len(np.unique(flat[: 1 << 12])) > 1 << _TABLE_BITS:
        return []
    found = [np.unique(line) for line in lines]
    most = max(len(levels) for levels in found)
    bits = max(1, (most - 1).bit_length())
    if bits > _TABLE_BITS:
        return []
    table = np.zeros((len(lines), 1 << bits), np.float32)
    index = np.empty(lines.shape, np.int64)
    for at, levels in enumerate(found):
        table[at, : len(levels)] = levels
        index[at] = np.searchsorted(levels, lines[at])
    return [Stored(pack_bits(index.reshape(-1), bits), flat.size, bits, row=row, table=table.reshape(-1))]


class Matrices:
    """The matrices of a model, each constant stored once."""

    def __init__(self) -> None:
        self._stored: dict[tuple[int, Any], Stored] = {}
        self._codes: dict[int, tuple[Code, Code]] = {}

    def of_tensor(self, tensor: Tensor) -> Matrix:
        """A dense matrix.

        Args:
            tensor: Rows x anything.

        Returns:
            The matrix.
        """
        values = tensor.detach().float().numpy().reshape(tensor.shape[0], -1)
        return Matrix(Kind.DENSE, *values.shape, a=Array(Stored(np.ascontiguousarray(values).reshape(-1), values.size)))

    def of_weight(
        self, weight: ThinWeight, index: int, rows: bool = False, within: tuple[int, int] | None = None
    ) -> tuple[Matrix, str]:
        """The matrix of a thin tensor, as its method stores it: outputs x inputs.

        Args:
            weight: The thin weight.
            index: Which of its tensors.
            rows: Whether single rows are asked for.
            within: The first row and the one after the last, if only these are wanted.

        Returns:
            The matrix, and how it is stored, in words.
        """
        part, decoder, (start, stop) = weight.parts[index], FloatCoding(weight.method).decoder, weight._cuts[index]
        shape = part.shape[::-1] if part.transposed else part.shape
        height, width = shape[0], math.prod(shape[1:])
        first, last = within or (0, height)
        start, stop, height = start + first * width, start + last * width, last - first
        window = decoder.window(start, (height, width)) if isinstance(decoder, Factored) else None
        alone = len(weight.parts) == 1 and height == shape[0]
        common: dict[str, Any] = {"rows": height, "cols": width, "scale": float(part.scale)}
        matrix: Matrix | None = None
        if window is not None and not window.is_rank:
            matrix = self._windows(weight, window, common)
        elif window is not None:
            matrix = self._rank(weight, window, common)
        elif alone and isinstance(decoder, Chain):
            matrix = self._train(weight, decoder, common)
        elif alone and isinstance(decoder, Sparse) and (found := self._sparse(weight, common)) is not None:
            matrix = found
        elif isinstance(decoder, Drawn):
            values = Array(self._entry(weight, "values"))
            matrix = Matrix(
                Kind.HASHED, a=values, n=decoder.buckets, seed=decoder.seed % (1 << 64), offset=start, **common
            )
        dense = self._dense(weight, index, (start, stop), (first, last), common)
        if matrix is None or (size_of(dense) <= size_of(matrix) and not rows):
            return dense, "integers" if cast(Array, dense.a).stored.bits != FLOATS else "decoded at export"
        return matrix, _WORDS[matrix.kind]

    def _floats(self, weight: ThinWeight) -> tuple[Code, Code]:
        """The stored code, and the floats of the decoder, as arrays."""
        if id(weight) not in self._codes:
            with torch.no_grad():
                code = {entry: value.detach().cpu() for entry, value in weight.code().items()}
                floats = FloatCoding(weight.method).decode(
                    {**code, **{k: torch.from_numpy(np.asarray(v)) for k, v in weight.method.derived().items()}},
                    cast(Any, torch),
                )
            self._codes[id(weight)] = (
                {entry: value.numpy() for entry, value in code.items()},
                {entry: value.numpy() for entry, value in floats.items()},
            )
        return self._codes[id(weight)]

    def _integers(self, weight: ThinWeight, entry: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Symbols and steps of a floating entry, where it is stored so."""
        code, floats = self._floats(weight)
        prefix = f"{entry}_" if stored_by(weight.method, entry) is not None else ""
        if entry not in floats or f"{prefix}symbols" not in code or f"{prefix}step" not in code:
            return None
        return code[f"{prefix}symbols"], code[f"{prefix}step"]

    def _entry(self, weight: ThinWeight, entry: str, order: Any = None) -> Stored:
        """One floating entry, perhaps in another order: a function of an array, which gives one."""
        key = (id(weight), entry)
        if key not in self._stored:
            values = self._floats(weight)[1][entry].astype(np.float32)
            shape, integers = values.shape, self._integers(weight, entry)
            flat_shape = (values.size // shape[-1], shape[-1]) if values.ndim else (1, 1)
            if order is None:
                symbols, step = integers if integers is not None else (None, None)
                grid = symbols.shape if symbols is not None and symbols.ndim == 2 else flat_shape
                self._stored[key] = store(values.reshape(grid), symbols, step)
            else:
                turned = order(values)
                symbols, step = (None, None)
                if integers is not None and integers[1].size == 1:
                    symbols, step = order(integers[0].reshape(shape)).reshape(1, -1), integers[1]
                self._stored[key] = store(turned.reshape(1, -1), symbols, step)
        return self._stored[key]

    def _windows(self, weight: ThinWeight, window: Window, common: Mapping[str, Any]) -> Matrix:
        return Matrix(
            Kind.WINDOWS,
            a=Array(self._entry(weight, "xf"), window.first * window.rank),
            b=Array(self._entry(weight, "wf")),
            n=window.n,
            rank=window.rank,
            offset=window.offset,
            m=window.stop - window.first,
            **common,
        )

    def _rank(self, weight: ThinWeight, window: Window, common: Mapping[str, Any]) -> Matrix:
        if window.offset:
            return self._windows(weight, window, common)
        xf, wf = Array(self._entry(weight, "xf"), window.first * window.rank), Array(self._entry(weight, "wf"))
        rank = window.rank
        cores = (Core(1, window.rows, 1, rank, xf), Core(rank, 1, window.cols, 1, wf))
        return Matrix(Kind.TRAIN, cores=cores, **common)

    def _train(self, weight: ThinWeight, decoder: Chain, common: Mapping[str, Any]) -> Matrix:
        numpy: Any = np
        code = self._floats(weight)[1]
        cores = []
        for at, (entry, core) in enumerate(zip(decoder.code_shapes(), decoder.cores(code, numpy), strict=True)):

            def order(array: np.ndarray, at: int = at, entry: str = entry) -> np.ndarray:
                made = decoder.cores({**code, entry: array}, numpy)[at]
                return np.ascontiguousarray(made)

            before, rows, cols, after = core.shape
            same = np.array_equal(np.asarray(core).reshape(-1), code[entry].reshape(-1))
            cores.append(Core(before, rows, cols, after, Array(self._entry(weight, entry, None if same else order))))
        return Matrix(Kind.TRAIN, cores=tuple(cores), **common)

    def _sparse(self, weight: ThinWeight, common: Mapping[str, Any]) -> Matrix | None:
        floats = self._floats(weight)[1]
        if "positions" not in floats or "values" not in floats:
            return None
        positions = floats["positions"].reshape(-1).astype(np.int64)
        steps = np.diff(positions, prepend=-1) - 1
        gaps = np.full(positions.size + int((steps // 255).sum()), 255, np.uint8)
        ends = np.cumsum(steps // 255 + 1) - 1
        gaps[ends] = steps % 255
        values = self._entry(weight, "values")
        return Matrix(Kind.SPARSE, a=Array(values), gaps=gaps, n=gaps.size, m=positions.size, **common)

    def _dense(
        self, weight: ThinWeight, index: int, entries: tuple[int, int], rows: tuple[int, int], common: Mapping[str, Any]
    ) -> Matrix:
        part, shape = weight.parts[index], (common["rows"], common["cols"])
        with torch.no_grad():
            tensor = weight(index).detach().cpu().float()
        tensor = tensor.T if part.transposed else tensor
        values = np.ascontiguousarray(tensor.reshape(-1, shape[1])[slice(*rows)].numpy())
        integers = self._integers(weight, "weight") if part.scale == 1.0 and part.zero_row is None else None
        symbols = step = None
        if integers is not None:
            symbols, step = integers[0].reshape(-1)[slice(*entries)].reshape(shape), integers[1]
        return Matrix(Kind.DENSE, *shape, a=Array(store(values, symbols, step)))


_WORDS = {
    Kind.WINDOWS: "structured",
    Kind.TRAIN: "factors in turn",
    Kind.SPARSE: "sparse",
    Kind.HASHED: "hashed at each run",
}


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
