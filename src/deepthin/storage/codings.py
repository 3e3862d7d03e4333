"""How version 2 of the format writes the integers and the floats of a code in few bytes (docs/format.md)."""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from deepthin.coding import arithmetic, huffman
from deepthin.coding.bits import best_gap_width, gaps_of, pack, pack_gaps, packed_bytes, width_of
from deepthin.errors import FormatError
from deepthin.kernels.arithmetic import decode as walk_back
from deepthin.kernels.arithmetic import encode as walk
from deepthin.method import Integers
from deepthin.storage.arrays import (
    ITEM_BYTES,
    Buffer,
    Coding,
    Raw,
    coded_gap_bytes,
    integer_array,
    kept_of,
    repeated,
    unpacked,
)

WAYS = ("packed", "gaps", "huffman", "levels", "rows", "tree", "numbers", "line")
"""Codings of integers by their numbers; ``rows`` and ``line``: levels whose stride is the last dimension, or 1."""
ARITHMETIC = ("levels", "tree", "numbers")
FORMS = ("F32", "short", "F64", "F16", "BF16")
"""Forms of floats by their numbers; ``short``: F32 without lower halves, which are zero."""


def way_bytes(way: str, length: int, rising: bool) -> int:
    """The bytes that name the coding of integers in the header.

    Args:
        way: The coding.
        length: Bytes of the coded integers.
        rising: Whether they rise.

    Returns:
        Bytes.
    """
    number = 0 if way == "packed" else length << 3 | 7
    return _number_bytes(number) + (rising and way in ("gaps", "huffman", "planned"))


def coded(values: np.ndarray, kind: Integers) -> tuple[Raw, Coding]:
    """Integers in the fewest bytes, those that name the coding included, within their upper bound.

    Args:
        values: Integers within the range of ``kind``, of the entry's shape.
        kind: Their range, whether they rise, and the upper bound on their bytes.

    Returns:
        The bytes as a tensor of type U8, and the coding.
    """
    most = kind.bytes(values.size)

    def cost(way: _Way) -> tuple[bool, int]:
        (name, _), size, _ = way
        return size > most, size + way_bytes(name, size, kind.rising)

    coding, _, stream = min(_ways(values, kind), key=cost)
    return Raw.of(stream()), coding


_Way = tuple[Coding, int, Callable[[], np.ndarray]]  # a coding, its bytes, and what makes the stream


def _ways(values: np.ndarray, kind: Integers) -> Iterator[_Way]:
    """Each coding that there is for integers of a kind. Large arrays are made again rather than held."""
    width = width_of(kind.count)

    def flat(item: type[np.signedinteger] = np.int64 if kind.rising or kind.count > 1 << 30 else np.int32):
        numbers = values.reshape(-1).astype(item)
        numbers -= kind.least
        return numbers

    yield ("packed", width), packed_bytes(values.size, width), lambda: pack(flat(), width)
    if kind.rising:
        yield from _rising_ways(flat(), width)
        return
    if (size := huffman.coded_bytes(huffman.counts_of(flat()), width)) is not None:
        yield ("huffman", width), size, lambda: huffman.encode(flat(), width)
    if not width or not values.size or (kind.least >= 0 and width > arithmetic.WIDEST_TREE):
        return
    if kind.least < 0:
        wide = values.reshape(-1).astype(np.int32)
        for stride in (0, 1, values.shape[-1]):
            yield _made(("levels", stride), arithmetic.encode_levels(wide, stride, walk))
    else:
        yield _made(("tree", width), arithmetic.encode_tree(flat(), width, walk))


def _rising_ways(flat: np.ndarray, width: int) -> Iterator[_Way]:
    """Codings of positions by their gaps."""
    for narrow, size in coded_gap_bytes(flat).items():
        yield ("huffman", narrow), size, lambda narrow=narrow: huffman.encode(gaps_of(flat, narrow), narrow)
    narrow = best_gap_width(flat)
    yield _made(("gaps", narrow), pack_gaps(flat, narrow))
    if width and len(flat) and (gaps := np.diff(flat, prepend=-1) - 1).max() <= arithmetic.MOST_NUMBER:
        yield _made(("numbers", 0), arithmetic.encode_numbers(gaps, walk))


def _made(coding: Coding, stream: np.ndarray) -> _Way:
    return coding, len(stream), lambda: stream


def stored_floats(floats: Mapping[str, Raw]) -> dict[str, tuple[Raw, Coding | None]]:
    """The floats of a code in the fewest bytes, those that name their forms included.

    Args:
        floats: The entries; of one type.

    Returns:
        Entry -> the tensor as it is stored, and its coding; None where it is stored as it is.
    """
    plain: dict[str, tuple[Raw, Coding | None]] = {entry: (raw, None) for entry, raw in floats.items()}
    short = {entry: _short(raw) for entry, raw in floats.items()}
    cut = {entry: _without_repeats(*stored) for entry, stored in short.items()}

    def cost(chosen: dict[str, tuple[Raw, Coding | None]]) -> int:
        size = sum(raw.bytes for raw, _ in chosen.values())
        forms = {(raw.dtype, coding and coding[0]) for raw, coding in chosen.values()}
        kept = [coding[1] for entry, (raw, coding) in chosen.items() if coding and raw.shape != floats[entry].shape]
        if len(forms) > 1 or kept:
            return size + len(chosen) + sum(map(_number_bytes, kept))
        return size + (not forms <= {("F32", None), ("BF16", "short")})

    return min((plain, short, cut), key=cost)


def _short(raw: Raw) -> tuple[Raw, Coding | None]:
    """Floats without lower halves, if these are zeros."""
    return (narrowed(raw), ("short", math.prod(raw.shape))) if is_short(raw) else (raw, None)


def _without_repeats(raw: Raw, coding: Coding | None) -> tuple[Raw, Coding | None]:
    """Floats without repeats of the last one that take more than what tells of them."""
    if (kept := kept_of(raw)) is None or ITEM_BYTES[raw.dtype] * (raw.shape[0] - kept) <= _number_bytes(kept) + 1:
        return raw, coding
    data = memoryview(raw.data)[: kept * ITEM_BYTES[raw.dtype]]
    return Raw(raw.dtype, (kept,), data), ("short" if coding else "repeats", kept)


def _number_bytes(number: int) -> int:
    return max(-(-number.bit_length() // 7), 1)


def is_short(raw: Raw) -> bool:
    """Whether floats of type F32 all have lower halves of zeros, so that two bytes each suffice.

    Args:
        raw: A tensor; it is read up to the first number that has not.

    Returns:
        False as well for an empty tensor, and one that has no values yet.
    """
    if raw.dtype != "F32" or not raw.bytes or raw.planned:
        return False
    return not any(np.frombuffer(piece, "<u2")[::2].any() for piece in raw.pieces())


def narrowed(raw: Raw) -> Raw:
    """Floats of type F32 without their lower halves.

    Args:
        raw: A tensor for which ``is_short``.

    Returns:
        A tensor of type BF16; ValueError while it is read if ``raw`` has changed since.
    """

    def pieces() -> Iterator[Buffer]:
        for piece in raw.pieces():
            halves = np.frombuffer(piece, "<u2").reshape(-1, 2)
            if halves[:, 0].any():
                raise ValueError("A tensor changed while it was written. Save while nothing trains the model.")
            yield np.ascontiguousarray(halves[:, 1]).view(np.uint8).data

    return Raw("BF16", raw.shape, pieces)


def widened(raw: Raw) -> Raw:
    """Shortened floats as F32.

    Args:
        raw: A tensor of type BF16.

    Returns:
        A tensor of type F32; read now if its bytes are in memory, else when they are asked for.
    """

    def wide(piece: Buffer) -> Buffer:
        return (np.frombuffer(piece, "<u2").astype("<u4") << np.uint32(16)).view(np.uint8).data

    if isinstance(raw.source, Buffer):
        return Raw("F32", raw.shape, wide(raw.source))
    return Raw("F32", raw.shape, lambda: (wide(piece) for piece in raw.pieces()))


def extended(name: str, raw: Raw | None, coding: Coding, shape: tuple[int, ...]) -> Raw:
    """Floats as the code has them: the inverse of ``stored_floats``, for untrusted bytes.

    Args:
        name: The entry's name, for messages.
        raw: The stored tensor.
        coding: Its coding.
        shape: Shape that the method's fields demand.

    Returns:
        The floats, of ``shape``.

    Raises:
        FormatError: There are not so many floats.
    """
    way, kept = coding
    if raw is None:
        raise FormatError(f"{name} is missing.")
    own = widened(raw) if way == "short" else raw
    return own if raw.shape == shape else repeated(name, own, ["repeats", kept], shape)


def uncoded(name: str, raw: Raw | None, coding: Coding, kind: Integers, shape: tuple[int, ...]) -> Raw:
    """The integers of a file: the inverse of ``coded``, for untrusted bytes.

    Args:
        name: The entry's name, for messages.
        raw: The stored tensor.
        coding: The coding that the header names.
        kind: Range of the integers.
        shape: Shape that the method's fields demand.

    Returns:
        The integers, of ``shape``.

    Raises:
        FormatError: The bytes are not such integers.
        ValueError: A coded stream is damaged.
    """
    (way, parameter), count = coding, math.prod(shape)
    if raw is None or way not in ARITHMETIC:
        return unpacked(name, raw, list(coding), kind, shape)
    data, most = np.frombuffer(raw.data, np.uint8), kind.least + kind.count - 1
    if (way == "numbers") != kind.rising or (way == "levels") != (kind.least < 0):
        raise FormatError(f"{name} has integers from {kind.least} to {most}, which are not coded as {way}.")
    if way == "numbers":
        values = np.cumsum(arithmetic.decode_numbers(data, count, most, walk_back) + 1) - 1
        if (np.diff(values) < 1).any():
            raise FormatError(f"{name} must rise.")
    elif way == "levels":
        values = arithmetic.decode_levels(data, count, parameter, max(-kind.least, most), walk_back) - kind.least
    else:
        values = arithmetic.decode_tree(data, count, parameter, kind.count - 1, walk_back)
    if count and not 0 <= int(values.min()) <= int(values.max()) < kind.count:
        raise FormatError(f"{name} holds numbers beyond those from {kind.least} to {most}.")
    return Raw.of(integer_array(values, kind).reshape(shape))
