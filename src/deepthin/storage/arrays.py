"""One array of a file: its type, its bytes, and how integers, and floats that repeat, become few of them.

docs/format.md is normative for the codings. Bytes that are read are untrusted: FormatError says what is wrong.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from deepthin.coding import huffman
from deepthin.coding.bits import (
    WIDEST_GAP,
    best_gap_width,
    gaps_of,
    pack,
    pack_gaps,
    packed_bytes,
    positions_of,
    unpack,
    unpack_gaps,
    width_of,
)
from deepthin.errors import ConfigError, FormatError
from deepthin.kernels import products
from deepthin.method import Integers

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8", "BOOL": "|b1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
}  # fmt: skip
ITEM_BYTES = {"BF16": 2, **{name: np.dtype(code).itemsize for name, code in _NUMPY.items()}}
FLOATS = ("F64", "F32", "F16", "BF16")
Coding = tuple[str, int]
"""How an entry is coded: a name and a number, often a width."""
WIDEST_CODED_GAP = 12  # bits of a gap, so that one table can hold all
LONGEST_NAME: Coding = ("huffman", huffman.WIDEST)
MOST_REPEATED = 1 << 16  # longest vector stored without its repeats: bounds what a small file can declare


Buffer = bytes | bytearray | memoryview
"""Contiguous bytes in main memory."""

PIECE_BYTES = 1 << 22
"""Upper bound on a copy of a tensor that is not contiguous in main memory."""


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros in the place of values that are not there yet."""

    count: int  # of bytes

    def __call__(self) -> Iterator[Buffer]:
        """The zeros in pieces."""
        return (bytes(min(PIECE_BYTES, self.count - at)) for at in range(0, self.count, PIECE_BYTES))


@dataclass(frozen=True, slots=True)
class Raw:
    """One stored tensor: its safetensors type, its shape, and its bytes, little-endian and row by row.

    ``source`` has the bytes, or yields them piece by piece each time it is called: a tensor of a model is read when it
    is written, and not before. So what is written are the values that the model has then.
    """

    dtype: str
    shape: tuple[int, ...]
    source: Buffer | Callable[[], Iterator[Buffer]]

    @classmethod
    def of(cls, array: np.ndarray) -> "Raw":
        """A NumPy array as a stored tensor; not copied if it is contiguous and little-endian.

        Args:
            array: An array of any shape.

        Returns:
            The tensor.

        Raises:
            TypeError: safetensors has no name for the array's type.
        """
        kind = array.dtype.newbyteorder("<")
        row_by_row = np.ascontiguousarray(array, dtype=kind).reshape(-1)
        return cls(dtype_name(array.dtype), array.shape, row_by_row.view(np.uint8).data)

    @classmethod
    def zeros(cls, dtype: str, shape: tuple[int, ...]) -> "Raw":
        """A placeholder of zeros; takes no memory, whatever its shape.

        Args:
            dtype: Name of the type in safetensors, such as ``"F32"``.
            shape: Shape of the tensor.

        Returns:
            The tensor, whose bytes are made when they are read.
        """
        return cls(dtype, shape, Zeros(ITEM_BYTES[dtype] * math.prod(shape)))

    @property
    def planned(self) -> bool:
        """Whether it is a placeholder, which has no values yet."""
        return isinstance(self.source, Zeros)

    @property
    def bytes(self) -> int:
        """Number of bytes; known without reading them."""
        return len(self.source) if isinstance(self.source, Buffer) else ITEM_BYTES[self.dtype] * math.prod(self.shape)

    @property
    def data(self) -> Buffer:
        """All bytes at once: where they lie, or else a copy, which may be written to."""
        if isinstance(self.source, Buffer):
            return self.source
        copy, at = bytearray(self.bytes), 0
        for piece in self.pieces():
            copy[at : at + len(piece)] = piece
            at += len(piece)
        return copy

    def checksum(self) -> int:
        """CRC-32 of the bytes, piece by piece; of a file's tensor, that which was computed when it was checked."""
        if (known := getattr(self.source, "checksum", None)) is not None:
            return known
        value = 0
        for piece in self.pieces():
            value = zlib.crc32(piece, value)
        return value

    def pieces(self) -> Iterator[Buffer]:
        """The bytes, one piece after the other.

        Returns:
            An iterator over buffers whose concatenation is ``data``.
        """
        return iter((self.source,)) if isinstance(self.source, Buffer) else self.source()

    def numpy(self) -> np.ndarray:
        """The tensor as a NumPy array; bfloat16, which NumPy lacks, is widened to float32 without loss.

        Returns:
            Array of ``shape``; it may be a read-only view of the bytes.
        """
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype("<u4") << np.uint32(16)
            return wide.view("<f4").reshape(self.shape)
        return np.frombuffer(self.data, _NUMPY[self.dtype]).reshape(self.shape)


def fits(raw: Raw) -> bool:
    """Whether the bytes have the shape and the type that are declared, which NumPy can hold."""
    if raw.bytes != ITEM_BYTES[raw.dtype] * math.prod(raw.shape):
        return False
    try:
        np.broadcast_to(np.zeros((), "<u2" if raw.dtype == "BF16" else _NUMPY[raw.dtype]), raw.shape)
    except ValueError:
        return False
    return True


def largest(raw: Raw) -> float:
    """The largest magnitude of floating numbers, piece by piece: NaN if one is; 0 for numbers of other types."""
    if raw.dtype not in (*FLOATS, "C64") or not raw.bytes:
        return 0.0
    kind, magnitude = _NUMPY.get(raw.dtype, "<u2").replace("c8", "f4"), 0.0
    for buffer in raw.pieces():
        numbers = np.frombuffer(buffer, kind)
        for first in range(0, len(numbers), PIECE_BYTES // 8):
            piece = numbers[first : first + PIECE_BYTES // 8]
            if raw.dtype == "BF16":
                piece = (piece.astype("<u4") << np.uint32(16)).view("<f4")
            most = float(max(piece.max(), -piece.min()))
            if not math.isfinite(most):
                return most
            magnitude = max(magnitude, most)
    return magnitude


def dtype_name(dtype: np.dtype) -> str:
    """The name that safetensors has for a type.

    Args:
        dtype: NumPy's type, of either byte order.

    Returns:
        The name, such as ``"F32"``.

    Raises:
        TypeError: safetensors has no such type.
    """
    name = next((name for name, code in _NUMPY.items() if np.dtype(code) == dtype.newbyteorder("<")), None)
    if name is None:
        raise TypeError(f"A .thin file cannot hold arrays of type {dtype}. It can hold: {', '.join(_NUMPY)}.")
    return name


def pieces_of(tensor: Any, item_bytes: int, copied: Callable[[Any], Buffer]) -> Iterator[Buffer]:
    """The bytes of a tensor of any framework, row by row and at most ``PIECE_BYTES`` at once.

    Args:
        tensor: A tensor with a ``shape``, which can be sliced along its first dimension.
        item_bytes: Bytes of one entry.
        copied: Copies a slice of the tensor to main memory.

    Yields:
        Buffers whose concatenation is the tensor, row-major.
    """
    shape = tuple(tensor.shape)
    row_bytes = item_bytes * math.prod(shape[1:])
    if not shape or item_bytes * math.prod(shape) <= PIECE_BYTES:
        yield copied(tensor)
    elif row_bytes > PIECE_BYTES:
        for row in range(shape[0]):
            yield from pieces_of(tensor[row], item_bytes, copied)
    else:
        rows = PIECE_BYTES // row_bytes
        for first in range(0, shape[0], rows):
            yield copied(tensor[first : first + rows])


def packed(values: np.ndarray, kind: Integers) -> tuple[Raw, Coding]:
    """Integers in the fewest bytes, those that name the coding included, within their upper bound (docs/format.md).

    Args:
        values: Integers within the range of ``kind``.
        kind: Their range, whether they rise, and the upper bound on their bytes.

    Returns:
        The bytes as a tensor of type U8, and the coding.
    """
    flat = values.reshape(-1).astype(np.int64 if kind.rising or kind.count > 1 << 30 else np.int32)
    flat -= kind.least
    width = width_of(kind.count)
    sizes: dict[Coding, int | None] = {("packed", width): packed_bytes(len(flat), width)}
    if kind.rising:
        sizes |= {("huffman", narrow): size for narrow, size in coded_gap_bytes(flat).items()}
        narrow = best_gap_width(flat)
        sizes["gaps", narrow] = len(pack_gaps(flat, narrow))
    else:
        sizes["huffman", width] = huffman.coded_bytes(huffman.counts_of(flat), width)
    known = {coding: size for coding, size in sizes.items() if size is not None}
    most = kind.bytes(len(flat))
    way, width = min(known, key=lambda coding: (known[coding] > most, known[coding] + len(json.dumps(coding))))
    if way == "huffman":
        return Raw.of(huffman.encode(gaps_of(flat, width) if kind.rising else flat, width)), (way, width)
    return Raw.of(pack_gaps(flat, width) if way == "gaps" else pack(flat, width)), (way, width)


def coded_gap_bytes(positions: np.ndarray) -> dict[int, int]:
    """Sizes of positions as gaps by a Huffman code.

    Args:
        positions: Strictly increasing integers from 0 on.

    Returns:
        Bits of a gap -> bytes, for each width that can be coded.
    """
    gaps, sizes = np.diff(positions, prepend=-1) - 1, dict[int, int]()
    for narrow in range(1, WIDEST_CODED_GAP + 1):
        skip = (1 << narrow) - 1
        counts = np.bincount(gaps % skip, minlength=skip + 1)
        counts[skip] += int((gaps // skip).sum())
        if (size := huffman.coded_bytes(counts, narrow)) is not None:
            sizes[narrow] = size
    return sizes


def check_integers(name: str, values: np.ndarray, kind: Integers, shape: tuple[int, ...]) -> None:
    """Refuse integers that no file may hold, before they are packed: ``unpacked`` would refuse them.

    Args:
        name: The entry's name, for messages.
        values: The integers.
        kind: Their range, and whether they rise.
        shape: Shape that the method's fields demand.

    Raises:
        ConfigError: The shape is another one, an integer is out of range, or they do not rise.
    """
    least, most = kind.least, kind.least + kind.count - 1
    if values.shape != shape or values.dtype.kind not in "iu":
        raise ConfigError(f"{name} is {values.dtype} {values.shape}, but the method stores integers of shape {shape}.")
    if values.size and not least <= int(values.min()) <= int(values.max()) <= most:
        raise ConfigError(
            f"{name} has integers from {values.min()} to {values.max()}, but the method has those from {least} to "
            f"{most}: something changed them, such as an average. Take the integers of one model."
        )
    if kind.rising and (np.diff(values.reshape(-1).astype(np.int64)) < 1).any():
        raise ConfigError(
            f"{name} must rise: something changed its integers, such as an average. Take the integers of one model."
        )


def without_repeats(entry: str, raw: Raw) -> tuple[Raw, Coding | None]:
    """A vector of floats without the repeats of its last entry, where leaving them out saves more than naming the
    coding.

    Args:
        entry: Name of the entry in the code, which the header would repeat.
        raw: The floats.

    Returns:
        The stored tensor, and the coding; None where all entries are stored.
    """
    if (kept := kept_of(raw)) is None:
        return raw, None
    coding, size = ("repeats", kept), ITEM_BYTES[raw.dtype]
    if (raw.shape[0] - kept) * size <= len(json.dumps({"codings": {entry: coding}})):
        return raw, None
    return Raw(raw.dtype, (kept,), memoryview(raw.data)[: kept * size]), coding


def kept_of(raw: Raw) -> int | None:
    """How many entries of a vector of floats remain without the repeats of its last one.

    Args:
        raw: The floats.

    Returns:
        At least one and less than all; None if there are no repeats, or for what is no vector of 2 to 65,536 entries.
    """
    if len(raw.shape) != 1 or not 1 < raw.shape[0] <= MOST_REPEATED or raw.planned:
        return None
    items = np.frombuffer(raw.data, np.uint8).reshape(raw.shape[0], -1)
    kept = int(np.flatnonzero((items != items[-1]).any(1)).max(initial=-1)) + 2
    return kept if kept < len(items) else None


def unpacked(name: str, raw: Raw | None, coding: Any, kind: Integers, shape: tuple[int, ...]) -> Raw:
    """The integers of a file: the inverse of ``packed``, for untrusted bytes.

    Args:
        name: The entry's name, for messages.
        raw: The stored tensor; None if the file lacks it.
        coding: The coding that the header names; any JSON value.
        kind: Range of the integers.
        shape: Shape that the method's fields demand.

    Returns:
        The integers, of ``shape``.

    Raises:
        FormatError: The bytes are not such integers.
        ValueError: A coded stream is damaged.
    """
    count = math.prod(shape)
    way, width = _pair(coding)
    if raw is None or raw.dtype != "U8" or len(raw.shape) != 1 or width is None:
        raise FormatError(f"{name} must be packed integers, but is {raw and (raw.dtype, raw.shape)}, {coding!r}.")
    data = np.frombuffer(raw.data, np.uint8)
    if way == "gaps" and kind.rising and 1 <= width <= WIDEST_GAP:
        values = unpack_gaps(data, width, count, kind.count)
    elif way == "huffman" and kind.rising and 1 <= width <= WIDEST_CODED_GAP:
        skip = (1 << width) - 1
        most = count + max(kind.count - count, 0) // skip
        found = huffman.decode(data, width, count, skip, most, products.huffman_walk)
        values = positions_of(found, width, count, kind.count)
    elif way == "huffman" and not kind.rising and width == width_of(kind.count):
        values = huffman.decode(data, width, count, walk=products.huffman_walk)
    elif way == "packed" and width == width_of(kind.count) and len(data) == packed_bytes(count, width):
        if not width and count > huffman.MOST_FREE:
            raise FormatError(f"{name} declares {count} numbers that take no bits; at most {huffman.MOST_FREE} may.")
        values = unpack(data, width, count)
        if kind.rising and (np.diff(values.astype(np.int64)) < 1).any():
            raise FormatError(f"{name} must rise.")
    else:
        raise FormatError(f"{name}, {len(data)} bytes, is not {count} integers below {kind.count} as {coding!r}.")
    if count and int(values.max()) >= kind.count:
        raise FormatError(f"{name} holds {int(values.max())}, but there are {kind.count} values.")
    return Raw.of(integer_array(values, kind).reshape(shape))


def repeated(name: str, raw: Raw | None, coding: Any, shape: tuple[int, ...]) -> Raw:
    """A vector of floats whose last entry repeats: the inverse of ``without_repeats``, for untrusted bytes.

    Args:
        name: The entry's name, for messages.
        raw: The stored tensor; None if the file lacks it.
        coding: The coding that the header names; any JSON value.
        shape: Shape that the method's fields demand.

    Returns:
        The floats, of ``shape``.

    Raises:
        FormatError: The bytes are not such floats.
    """
    (way, kept), length = _pair(coding), shape[0] if len(shape) == 1 else 0
    fine = way == "repeats" and kept is not None and 0 < kept < length <= MOST_REPEATED
    if raw is None or kept is None or not fine or raw.shape != (kept,) or raw.dtype not in FLOATS:
        found = "is missing" if raw is None else f"is {raw.dtype} {raw.shape}"
        raise FormatError(f"{name} must be floating numbers of shape {shape}, as {coding!r}, but {found}.")
    data = bytes(raw.data)
    return Raw(raw.dtype, shape, data + data[-ITEM_BYTES[raw.dtype] :] * (length - kept))


def _pair(coding: Any) -> tuple[Any, int | None]:
    """The name and the number of a coding; None as the number of an invalid one."""
    pair = cast(list[Any], coding) if isinstance(coding, list) else []
    way, number = pair if len(pair) == 2 else (None, None)
    return way, number if type(number) is int else None


def integer_array(values: np.ndarray, kind: Integers) -> np.ndarray:
    """Unpacked numbers, which count from 0, as the integers of the code.

    Args:
        values: Numbers from 0 to ``kind.count - 1``.
        kind: Range of the integers.

    Returns:
        ``values + kind.least``: int64 for positions and for values beyond int16, else int16.
    """
    wide = kind.rising or kind.least + kind.count - 1 >= 1 << 15
    return (values.astype(np.int64) + kind.least) if wide else values.astype(np.int16) + np.int16(kind.least)
