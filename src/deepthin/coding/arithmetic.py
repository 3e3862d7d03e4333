"""Adaptive binary arithmetic coding of integers: levels, indices and gaps, without a table.

A range coder with carries (Martin, 1979, "Range encoding"; Moffat, Neal and Witten, 1998, "Arithmetic coding
revisited") codes bits by adaptive probabilities; three binarisations turn integers into bits, as CABAC does (Marpe,
Schwarz and Wiegand, 2003). docs/arithmetic.md is normative for the bits. This is the reference, whose numbers are
unsigned and have at most 32 bits; `deepthin.kernels.arithmetic` is the same in native code.

A context is a probability p / 2^32 of a one, at first 1/2, and the number n of bits seen in it. After a bit, with
``r = 65536 // (n + 2)``, a one adds ``((2^32 - 1 - p) >> 16) * r`` to p, a zero subtracts ``((p >> 16) - 1) * r``; then
n grows by 1, up to 510. So the first bits adapt p as the estimator of Krichevsky and Trofimov does, and later ones at
a rate of 1/512. p stays within 2^16 and 2^32 - 1.

The coder has an interval: ``low`` and ``range``, 0 and 2^32 - 1 at first. A bit splits it at
``bound = range - (range >> 16) * (p >> 16)``: a zero takes the lower part, a one the upper. An even bit halves the
range instead, ``range >>= 1``, and a one adds it to low. While the range is below 2^24, the highest byte of low is
written and both are multiplied by 256; a carry out of low increments what was written before.

The stream is the shortest byte string that, read as a binary fraction and continued by zeros, lies in the last
interval; of several that are as short, the lowest. So its last byte is not zero, bytes after its end are read as zeros,
and exactly one stream belongs to each sequence of integers: decoders refuse all others.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from jaxtyping import Int32, Int64, Integer, UInt8

LIMIT, INHERITED = 510, 4  # bits that a context counts, and that it takes over from another one
UNARY = 14  # magnitudes above it end in a number
LONGEST = 40  # bits of a number below its leading one
MOST_LEVEL, MOST_NUMBER, WIDEST_TREE = (1 << 31) - 1, 1 << LONGEST, 12
COLUMN_CLASSES, RECENT_CLASSES = (1, 128, 512, 2048), (1, 256)  # lowest averages of the classes from 1 on, in 4096ths
_HIGHEST, _WORD = 1 << 24, (1 << 32) - 1
_RATES = [65536 // (n + 2) for n in range(LIMIT + 1)]

Encode = Callable[[str, Int32[np.ndarray, " count"] | Int64[np.ndarray, " count"], int], UInt8[np.ndarray, " bytes"]]
"""``encode``, or what does the same faster."""
Decode = Callable[[str, UInt8[np.ndarray, " bytes"], int, int, int], Int64[np.ndarray, " count"] | None]
"""``decode``, or what does the same faster."""


def encode_levels(
    values: Integer[np.ndarray, " count"], stride: int, walk: Encode | None = None
) -> UInt8[np.ndarray, " bytes"]:
    """Code signed integers around 0, such as quantised weights.

    Args:
        values: Integers of a magnitude below 2^31, row by row.
        stride: Length of a row, whose columns and rows differ in how large their integers are; 1 for a vector with
            large and small stretches; 0 for integers in no order.
        walk: A faster equivalent of ``encode``; None uses ``encode`` itself.

    Returns:
        The stream; none of its bytes says how many integers there are.

    Raises:
        ValueError: An integer is too large, or the stride is negative.
    """
    if stride < 0:
        raise ValueError(f"a stride of {stride}; it is 0 or the length of a row")
    return (walk or encode)("levels", _checked(values, -MOST_LEVEL, MOST_LEVEL), stride)


def decode_levels(
    data: UInt8[np.ndarray, " bytes"], count: int, stride: int, most: int, walk: Decode | None = None
) -> Int32[np.ndarray, " count"]:
    """Decode what ``encode_levels`` returned.

    Bytes are untrusted. The time is linear in ``count`` plus the number of bytes, and the memory in ``count``, which
    the caller bounds: a stream of no bytes may hold any number of zeros.

    Args:
        data: The stream.
        count: How many integers there are.
        stride: As in ``encode_levels``.
        most: The largest magnitude, below 2^31.
        walk: A faster equivalent of ``decode``; None uses ``decode`` itself.

    Returns:
        The integers.

    Raises:
        ValueError: The bytes are not what ``encode_levels`` writes for ``count`` integers up to ``most``.
    """
    if stride < 0:
        raise ValueError(f"a stride of {stride}; it is 0 or the length of a row")
    return _decoded("levels", data, count, stride, min(most, MOST_LEVEL), walk).astype(np.int32)


def encode_tree(
    values: Integer[np.ndarray, " count"], width: int, walk: Encode | None = None
) -> UInt8[np.ndarray, " bytes"]:
    """Code integers whose order means nothing, such as indices of shared values.

    Args:
        values: Integers from 0 to ``2**width - 1``.
        width: Bits of an integer, 1 to 12.
        walk: A faster equivalent of ``encode``; None uses ``encode`` itself.

    Returns:
        The stream.

    Raises:
        ValueError: An integer or the width is out of range.
    """
    return (walk or encode)("tree", _checked(values, 0, (1 << _tree_width(width)) - 1), width)


def decode_tree(
    data: UInt8[np.ndarray, " bytes"], count: int, width: int, most: int | None = None, walk: Decode | None = None
) -> Int32[np.ndarray, " count"]:
    """Decode what ``encode_tree`` returned; bounds as ``decode_levels``.

    Args:
        data: The stream.
        count: How many integers there are.
        width: Bits of an integer, 1 to 12.
        most: The largest integer; None for ``2**width - 1``.
        walk: A faster equivalent of ``decode``; None uses ``decode`` itself.

    Returns:
        The integers.

    Raises:
        ValueError: The bytes are not what ``encode_tree`` writes for ``count`` integers up to ``most``.
    """
    top = (1 << _tree_width(width)) - 1
    return _decoded("tree", data, count, width, top if most is None else min(most, top), walk).astype(np.int32)


def encode_numbers(values: Integer[np.ndarray, " count"], walk: Encode | None = None) -> UInt8[np.ndarray, " bytes"]:
    """Code integers from 0 on, the smaller the fewer bits, such as gaps between positions.

    Args:
        values: Integers from 0 to 2^40.
        walk: A faster equivalent of ``encode``; None uses ``encode`` itself.

    Returns:
        The stream.

    Raises:
        ValueError: An integer is out of range.
    """
    return (walk or encode)("numbers", _checked(values, 0, MOST_NUMBER), 0)


def decode_numbers(
    data: UInt8[np.ndarray, " bytes"], count: int, most: int, walk: Decode | None = None
) -> Int64[np.ndarray, " count"]:
    """Decode what ``encode_numbers`` returned; bounds as ``decode_levels``.

    Args:
        data: The stream.
        count: How many integers there are.
        most: The largest integer, at most 2^40.
        walk: A faster equivalent of ``decode``; None uses ``decode`` itself.

    Returns:
        The integers.

    Raises:
        ValueError: The bytes are not what ``encode_numbers`` writes for ``count`` integers up to ``most``.
    """
    return _decoded("numbers", data, count, 0, min(most, MOST_NUMBER), walk)


def _tree_width(width: int) -> int:
    if not 0 < width <= WIDEST_TREE:
        raise ValueError(f"a tree of {width} bits; it has 1 to {WIDEST_TREE}")
    return width


def _checked(
    values: Integer[np.ndarray, " count"], least: int, most: int
) -> Int32[np.ndarray, " count"] | Int64[np.ndarray, " count"]:
    if len(values) and not least <= int(values.min()) <= int(values.max()) <= most:
        raise ValueError(f"integers from {values.min()} to {values.max()}; they may go from {least} to {most}")
    return np.ascontiguousarray(values, np.int32 if most <= MOST_LEVEL else np.int64)


def _decoded(
    kind: str, data: UInt8[np.ndarray, " bytes"], count: int, parameter: int, most: int, walk: Decode | None
) -> Int64[np.ndarray, " count"]:
    if count < 0 or most < 0:
        raise ValueError(f"{count} integers of at most {most}; both are 0 at least")
    values = (walk or decode)(kind, data, count, parameter, most)
    if values is None:
        raise ValueError(f"{len(data)} bytes are not the arithmetic code of {count} {kind} of at most {most}")
    return values


# ---- The coder ------------------------------------------------------------------------------------------------------


class _Context:
    """An adaptive probability of a one: p / 2^32, after n bits."""

    __slots__ = ("n", "p")

    def __init__(self):
        self.p, self.n = 1 << 31, 0

    def update(self, bit: int) -> None:
        rate = _RATES[self.n]
        if bit:
            self.p += ((_WORD - self.p) >> 16) * rate
        else:
            self.p -= ((self.p >> 16) - 1) * rate
        if self.n < LIMIT:
            self.n += 1

    def inherit(self, other: "_Context") -> None:
        """Start from another context, as if some of its bits had been seen here, if none has been."""
        if not self.n:
            self.p, self.n = other.p, min(other.n, INHERITED)


def _contexts(count: int) -> list[_Context]:
    return [_Context() for _ in range(count)]


class _Coder(Protocol):
    """An encoder or a decoder: what codes a bit returns it; a decoder ignores the bit that it is given."""

    def bit(self, context: _Context, bit: int) -> int: ...

    def even(self, bit: int) -> int: ...


class _Encoder:
    def __init__(self):
        self.out, self.low, self.range = bytearray(), 0, _WORD

    def bit(self, context: _Context, bit: int) -> int:
        bound = self.range - (self.range >> 16) * (context.p >> 16)
        if bit:
            self._add(bound)
            self.range -= bound
        else:
            self.range = bound
        context.update(bit)
        self._normalise()
        return bit

    def even(self, bit: int) -> int:
        self.range >>= 1
        if bit:
            self._add(self.range)
        self._normalise()
        return bit

    def _add(self, bound: int) -> None:
        self.low += bound
        if self.low > _WORD:
            self.low -= _WORD + 1
            self._carry()

    def _carry(self) -> None:
        at = len(self.out) - 1
        while self.out[at] == 255:
            self.out[at] = 0
            at -= 1
        self.out[at] += 1

    def _normalise(self) -> None:
        while self.range < _HIGHEST:
            self.out.append(self.low >> 24)
            self.low = self.low << 8 & _WORD
            self.range <<= 8

    def finish(self) -> bytes:
        """Add the shortest number within the interval: nothing, a carry, or one byte; then drop zeros."""
        if self.low:
            if self.low + self.range > _WORD + 1:
                self._carry()
            else:
                self.out.append((self.low + _HIGHEST - 1) >> 24)
        return bytes(self.out).rstrip(b"\0")


class _Decoder:
    def __init__(self, data: bytes):
        self.data, self.at, self.range = data, 4, _WORD
        self.code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")  # the number minus low
        self.starts = self.code < self.range

    def bit(self, context: _Context, bit: int) -> int:
        bound = self.range - (self.range >> 16) * (context.p >> 16)
        bit = int(self.code >= bound)
        if bit:
            self.code -= bound
            self.range -= bound
        else:
            self.range = bound
        context.update(bit)
        self._normalise()
        return bit

    def even(self, bit: int) -> int:
        self.range >>= 1
        bit = int(self.code >= self.range)
        if bit:
            self.code -= self.range
        self._normalise()
        return bit

    def _normalise(self) -> None:
        while self.range < _HIGHEST:
            self.code = self.code << 8 | (self.data[self.at] if self.at < len(self.data) else 0)
            self.at += 1
            self.range <<= 8

    def canonical(self) -> bool:
        """Whether the bytes are the shortest number within the interval, and the lowest one that is as short.

        A unit of the last byte is 256^(at - bytes) units of ``code``: 2^24 or more, as the interval is no narrower.
        """
        if not self.data:
            return True
        last, beyond = self.data[-1], self.at - len(self.data)
        if not last or beyond < 3:
            return False
        return beyond > 3 or (self.code < _HIGHEST and self.code + (256 - last) * _HIGHEST >= self.range)


# ---- The binarisations ----------------------------------------------------------------------------------------------


class _Numbers:
    """Non-negative integers: the bits of the value plus 1 after its leading one, and before them how many those are.

    The first two are adaptive, the others even.
    """

    def __init__(self):
        self.longer, self.first = _contexts(LONGEST + 1), _contexts(LONGEST + 1)
        self.second = [_contexts(2) for _ in range(LONGEST + 1)]

    def code(self, coder: _Coder, value: int) -> int | None:
        """Code a value; None if its length is beyond all."""
        value += 1
        for length in range(LONGEST + 1):
            if length:
                self.longer[length].inherit(self.longer[length - 1])
            if not coder.bit(self.longer[length], int(value >> length > 1)):
                break
        else:
            return None
        number = 1
        for i in reversed(range(length)):
            bit = value >> i & 1
            if i == length - 1:
                bit = coder.bit(self.first[length], bit)
            elif i == length - 2:
                bit = coder.bit(self.second[length][number & 1], bit)
            else:
                bit = coder.even(bit)
            number = number << 1 | bit
        return number - 1


def _class(average: int, least: tuple[int, ...]) -> int:
    return sum(average >= one for one in least)


def _code_levels(coder: _Coder, values: list[int], stride: int, most: int) -> list[int] | None:
    """A flag for zero, the sign, the magnitude in unary up to ``UNARY``, and beyond it a number."""
    columns, recent, last = [0] * min(stride, len(values)), 0, 0
    zero = _contexts((len(COLUMN_CLASSES) + 1) * (len(RECENT_CLASSES) + 1) * 4)
    negative, more = _Context(), [_contexts(2) for _ in range(len(COLUMN_CLASSES) + 1)]
    further, rest = _contexts(UNARY + 1), _Numbers()
    active = context = 0
    coded: list[int] = []
    for i, value in enumerate(values):
        if stride:
            active = _class(columns[i % stride], COLUMN_CLASSES)
            context = ((len(RECENT_CLASSES) + 1) * active + _class(recent, RECENT_CLASSES)) * 4 + last
        given, magnitude, below = abs(value), 0, 0
        if context:
            zero[context].inherit(zero[context - 1])
        if coder.bit(zero[context], int(given > 0)):
            below = coder.bit(negative, int(value < 0))
            before = more[active - 1][0] if active else None
            for magnitude in range(1, UNARY + 1):
                flag = more[active][magnitude - 1] if magnitude <= 2 else further[magnitude]
                if before:
                    flag.inherit(before)
                if not coder.bit(flag, int(given > magnitude)):
                    break
                before = flag
            else:
                beyond = rest.code(coder, given - UNARY - 1)
                if beyond is None:
                    return None
                magnitude = UNARY + 1 + beyond
            if magnitude > most:
                return None
        coded.append(-magnitude if below else magnitude)
        if stride:
            seen = 4096 * min(magnitude, 3)
            columns[i % stride] = (31 * columns[i % stride] + seen) >> 5
            recent = (63 * recent + seen) >> 6
            last = (2 * last + (magnitude > 0)) & 3
    return coded


def _code_tree(coder: _Coder, values: list[int], width: int, most: int) -> list[int] | None:
    """The bits of an integer, highest first, each in a context of its own for all bits before it."""
    nodes = _contexts(1 << width)
    coded: list[int] = []
    for value in values:
        node = 1
        for i in reversed(range(width)):
            node = node << 1 | coder.bit(nodes[node], value >> i & 1)
        coded.append(node - (1 << width))
        if coded[-1] > most:
            return None
    return coded


def _code_numbers(coder: _Coder, values: list[int], most: int) -> list[int] | None:
    numbers = _Numbers()
    coded: list[int] = []
    for value in values:
        number = numbers.code(coder, value)
        if number is None or number > most:
            return None
        coded.append(number)
    return coded


def _code(coder: _Coder, kind: str, values: list[int], parameter: int, most: int) -> list[int] | None:
    if kind == "levels":
        return _code_levels(coder, values, parameter, most)
    return _code_tree(coder, values, parameter, most) if kind == "tree" else _code_numbers(coder, values, most)


def encode(
    kind: str, values: Int32[np.ndarray, " count"] | Int64[np.ndarray, " count"], parameter: int
) -> UInt8[np.ndarray, " bytes"]:
    """Code integers in one of the three ways.

    Args:
        kind: ``"levels"``, ``"tree"`` or ``"numbers"``.
        values: Integers within the range of that kind.
        parameter: Stride of levels, width of a tree, 0 for numbers.

    Returns:
        The stream.
    """
    coder = _Encoder()
    _code(coder, kind, values.tolist(), parameter, MOST_NUMBER)
    return np.frombuffer(coder.finish(), np.uint8).copy()


def decode(
    kind: str, data: UInt8[np.ndarray, " bytes"], count: int, parameter: int, most: int
) -> Int64[np.ndarray, " count"] | None:
    """Decode what ``encode`` returned.

    Args:
        kind: As in ``encode``.
        data: The stream, untrusted.
        count: How many integers there are.
        parameter: As in ``encode``.
        most: The largest magnitude.

    Returns:
        The integers; None if the bytes are not what ``encode`` writes for any.
    """
    coder = _Decoder(data.tobytes())
    values = _code(coder, kind, [0] * count, parameter, most) if coder.starts else None
    return None if values is None or not coder.canonical() else np.array(values, np.int64)
