"""Entropy coding of integers: a canonical Huffman code, its table of code lengths, and its bit stream.

Huffman, 1952, "A method for the construction of minimum-redundancy codes". Codes have at most 15 bits and are optimal
under that limit (package-merge: Larmore and Hirschberg, 1990). docs/format-1.md is normative for the bits.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer, UInt8, UInt16, UInt32

from deepthin.coding.bits import PIECE

LONGEST, MOST_USED, WIDEST = 15, 4096, 16  # bits of a code; different symbols; bits of a symbol
MOST_FREE = 1 << 24  # symbols of a single kind, which take no bits: bounds what a small file can declare
_SAME, _NEXT, _RUN, _OTHER = range(4)  # prefix codes: that many ones announce the next item of the table
_TABLE_BYTES = MOST_USED * 41 // 8 + 8  # the longest table: a run, an escape and a length for each symbol


def lengths_of(counts: Int64[np.ndarray, "symbols"], longest: int = LONGEST) -> Int64[np.ndarray, "symbols"]:
    """Code lengths that minimise the total number of bits, none above ``longest`` (package-merge).

    Args:
        counts: How often each symbol occurs.
        longest: Upper bound on the length of a code, in bits; ``2**longest`` is at least the number of used symbols.

    Returns:
        The length of each symbol's code in bits; 0 if it is unused, or the only one that is used. A symbol's code is at
        least as long as that of any equally frequent later symbol.
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), np.int64)
    if len(used) < 2:
        return lengths
    rising = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[rising].astype(np.int64)
    merged, packages = leaves, [np.zeros(len(leaves), bool)]
    for _ in range(longest - 1):
        pairs = merged[: len(merged) // 2 * 2].reshape(-1, 2).sum(1)
        both = np.concatenate([leaves, pairs])
        order = np.argsort(both, kind="stable")
        merged = both[order]
        packages.append(order >= len(leaves))
    taken, leaf_lengths = 2 * len(leaves) - 2, np.zeros(len(leaves), np.int64)
    for package in reversed(packages):  # the cheapest items of each list: leaves, and packages of the list before
        whole = int(package[:taken].sum())
        leaf_lengths[: taken - whole] += 1
        taken = 2 * whole
    lengths[rising] = leaf_lengths
    return lengths


def coded_bytes(counts: Int64[np.ndarray, "symbols"], width: int) -> int | None:
    """Size of what ``encode`` returns, from the counts alone.

    Args:
        counts: How often each symbol occurs.
        width: Bits of a symbol, 1 to 16.

    Returns:
        Bytes, the table included; None if no symbol is used, more than 4,096 are, or one does not fit in ``width``
        bits.
    """
    used = np.flatnonzero(counts)
    if not 0 < len(used) <= MOST_USED or not 0 < width <= WIDEST or used[-1] >= 1 << width:
        return None
    listed = _listed(counts)
    lengths = lengths_of(listed)
    bits = int(_table(lengths, listed, width)[1].sum()) + int((counts * lengths[: len(counts)]).sum())
    return -(-bits // 8)


def _listed(counts: Int64[np.ndarray, "symbols"]) -> Int64[np.ndarray, "more"]:
    """The counts that the table is made for.

    A symbol that is the only one takes no bits; if it occurs more than ``MOST_FREE`` times, a neighbour is added, so
    that it takes one.
    """
    if len(used := np.flatnonzero(counts)) != 1 or counts.sum() <= MOST_FREE:
        return counts
    listed = np.append(counts, 0)
    listed[used[0] - 1 if used[0] else 1] = 1
    return listed


def usual_table_bits(symbols: int, width: int) -> int:
    """Size of a table in which neighbouring symbols have code lengths that differ by at most one.

    Args:
        symbols: Number of used symbols, without gaps between them.
        width: Bits of a symbol.

    Returns:
        Upper bound on the bits of the table.
    """
    return 2 * width + 4 + 3 * (symbols - 1)


def counts_of(symbols: Integer[np.ndarray, " count"]) -> Int64[np.ndarray, " symbols"]:
    """How often each symbol occurs.

    Args:
        symbols: Integers from 0 on.

    Returns:
        The counts, up to that of the largest symbol.
    """
    counts = np.zeros(int(symbols.max()) + 1 if len(symbols) else 0, np.int64)
    for first in range(0, len(symbols), PIECE):
        own = np.bincount(symbols[first : first + PIECE])
        counts[: len(own)] += own
    return counts


def encode(symbols: Integer[np.ndarray, " count"], width: int) -> UInt8[np.ndarray, " bytes"]:
    """Huffman-code symbols.

    Args:
        symbols: Integers from 0 to ``2**width - 1``.
        width: Bits of a symbol, 1 to 16.

    Returns:
        The table of code lengths and the codes, padded with ones to whole bytes.

    Raises:
        ValueError: There are no symbols, more than 4,096 different ones, or one does not fit in ``width`` bits.
    """
    counts = counts_of(symbols)
    if coded_bytes(counts, width) is None:
        raise ValueError(
            f"{len(symbols)} symbols, {np.count_nonzero(counts)} of them different, up to {len(counts) - 1}, cannot be "
            f"coded: at most {MOST_USED} may be different, of {width} bits, and {WIDEST} at most."
        )
    counts = _listed(counts)
    lengths = lengths_of(counts)
    items = [_table(lengths, counts, width)]
    total = int(items[0][1].sum())
    codes = _reversed(_codes(lengths), lengths)
    if lengths.any():
        total += int((counts * lengths).sum())

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield items[0]
        for first in range(0, len(symbols) if lengths.any() else 0, PIECE):
            own = symbols[first : first + PIECE]
            yield codes[own], lengths[own]
        yield np.array([(1 << -total % 8) - 1]), np.array([-total % 8])

    return _put(pieces(), total)


def _put(items: Iterable[tuple[np.ndarray, np.ndarray]], total: int) -> UInt8[np.ndarray, " bytes"]:
    """Concatenate numbers, given with their widths in bits, lowest bit first; ``total`` bits, then whole bytes."""
    words, start = np.zeros(-(-total // 32) + 2, "<u4"), 0
    for values, widths in items:
        ends = start + np.cumsum(widths)
        places = ends - widths
        shifted = values << (places & 31)  # below 2**63: numbers have 31 bits at most
        first = start >> 5
        word = (places >> 5) - first
        low = np.bincount(word, shifted & 0xFFFFFFFF)  # exact: no two numbers have a bit in common
        high = np.bincount(word + 1, shifted >> 32)
        words[first : first + len(low)] |= low.astype("<u4")
        words[first : first + len(high)] |= high.astype("<u4")
        start = int(ends[-1])
    return words.view(np.uint8)[: -(-total // 8)].copy()


def _table(
    lengths: Int64[np.ndarray, "symbols"], counts: Int64[np.ndarray, "symbols"], width: int
) -> tuple[Int64[np.ndarray, "items"], Int64[np.ndarray, "items"]]:
    """The table as numbers and their widths: first and last symbol, first length, then changes of length."""
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    items = [(first, width), (last, width)]
    used_lengths: list[int] = lengths[used].tolist()
    if len(used) > 1:
        items.append((used_lengths[0], 4))
    for run, before, length in zip((np.diff(used) - 1).tolist(), used_lengths, used_lengths[1:], strict=False):
        if run:  # by Elias' gamma code: zeros, a one, and what is below the highest bit
            top = run.bit_length() - 1
            items += [_form(_RUN), (1 << top, top + 1), (run - (1 << top), top)]
        if length == before:
            items.append(_form(_SAME))
        elif abs(length - before) == 1:
            items += [_form(_NEXT), (int(length > before), 1)]
        else:
            items += [_form(_OTHER), (length, 4)]
    values, widths = zip(*items, strict=True)
    return np.array(values, np.int64), np.array(widths, np.int64)


def _form(ones: int) -> tuple[int, int]:
    """A prefix code: that many ones, and a zero except after the longest run."""
    return (1 << ones) - 1, min(ones + 1, _OTHER)


def _codes(lengths: Int64[np.ndarray, "symbols"]) -> Int64[np.ndarray, "symbols"]:
    """Canonical codes: shorter first, then by symbol; each is the previous one plus 1, shifted to its length."""
    used = np.flatnonzero(lengths)
    order = used[np.argsort(lengths[used], kind="stable")]
    steps = 1 << (LONGEST - lengths[order])
    codes = np.zeros(len(lengths), np.int64)
    codes[order] = (np.cumsum(steps) - steps) >> (LONGEST - lengths[order])
    return codes


def _reversed(codes: Int64[np.ndarray, "symbols"], lengths: Int64[np.ndarray, "symbols"]) -> np.ndarray:
    """Codes with their bits reversed, since a stream is read from the lowest bit on."""
    turned = np.zeros_like(codes)
    for bit in range(LONGEST):
        turned |= (codes >> bit & 1) << np.maximum(lengths - 1 - bit, 0) * (bit < lengths)
    return turned


@dataclass(slots=True)
class _Bits:
    """A reader of single bits; ValueError at their end."""

    all: bytes
    at: int = 0

    def number(self, width: int) -> int:
        """The next number of ``width`` bits, lowest bit first."""
        start = self.at
        if start + width > len(self.all):
            raise ValueError("the bits end within the table of lengths")
        self.at += width
        return sum(self.all[start + i] << i for i in range(width))

    def ones(self, most: int) -> int:
        """The number of ones before the next zero, at most ``most``; no zero follows that many."""
        return next((count for count in range(most) if not self.number(1)), most)

    def run(self) -> int:
        """A number from 1 on, in Elias gamma code."""
        top = next((count for count in range(WIDEST) if self.number(1)), None)
        if top is None:
            raise ValueError("a run of unused symbols is too long")
        return (1 << top) + self.number(top)


def _read_table(data: UInt8[np.ndarray, "bytes"], width: int) -> tuple[list[int], list[int], int]:
    """The used symbols, their code lengths, and the bit where the codes begin.

    A symbol that is the only one has length 0. ValueError for a table that ``encode`` cannot have written.
    """
    bits = _Bits(np.unpackbits(data[:_TABLE_BYTES], bitorder="little").tobytes())
    first, last = bits.number(width), bits.number(width)
    if first >= last:
        if first > last:
            raise ValueError(f"the last symbol {last} is below the first one, {first}")
        return [first], [0], bits.at
    used, lengths = [first], [bits.number(4)]
    while used[-1] < last:
        step, length, form = 1, lengths[-1], bits.ones(3)
        if form == _RUN:
            step, form = 1 + bits.run(), bits.ones(3)
        if form == _NEXT:
            length += 1 if bits.number(1) else -1
        elif form == _OTHER:
            length = bits.number(4)
        if form == _RUN or (form == _OTHER and abs(length - lengths[-1]) < 2):
            raise ValueError("the table is written in a longer way than there is")
        if used[-1] + step > last or not 0 < length <= LONGEST or len(used) == MOST_USED:
            raise ValueError(f"symbol {used[-1] + step} of at most {last} has a code of {length} bits")
        used.append(used[-1] + step)
        lengths.append(length)
    if (total := sum(1 << (LONGEST - length) for length in lengths)) != 1 << LONGEST:
        raise ValueError(f"the table has {'too many' if total > 1 << LONGEST else 'too few'} codes")
    return used, lengths, bits.at


Walk = Callable[[np.ndarray, int, np.ndarray, int, int, int], tuple[np.ndarray, int]]
"""``walk``, or what does the same faster."""


def decode(
    data: UInt8[np.ndarray, "bytes"], width: int, count: int, skip: int = -1, most: int = 0, walk: Walk | None = None
) -> UInt16[np.ndarray, "symbols"]:
    """Decode what ``encode`` returned. Bytes are untrusted: memory and time are bounded by their number.

    Only for a symbol that is the only one, which takes no bits, the bound is ``MOST_FREE`` symbols.

    Args:
        data: The table and the codes.
        width: Bits of a symbol, 1 to 16.
        count: How many symbols other than ``skip`` there are.
        skip: A symbol that is not counted; -1: none.
        most: Upper bound on all symbols, those equal to ``skip`` included; at least ``count`` is assumed.
        walk: A faster equivalent of ``walk``; None uses ``walk`` itself.

    Returns:
        All symbols up to the last counted one.

    Raises:
        ValueError: The bytes are not what ``encode`` writes for ``count`` symbols.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"symbols of {width} bits; they have 1 to {WIDEST}")
    used, lengths, start = _read_table(data, width)
    if len(used) == 1:
        if used[0] == skip or count > MOST_FREE:
            raise ValueError(f"{count} times the symbol {used[0]}, from no bits at all")
        symbols, end = np.full(count, used[0], np.uint16), start
    else:
        most = min(max(most, count), 8 * len(data) - start)  # every code has at least one bit
        if count > most:
            raise ValueError(f"{len(data)} bytes are too few for {count} codes")
        symbols, end = (walk or globals()["walk"])(data, start, _lookup(used, lengths), most, count, skip)
    left = 8 * len(data) - end
    if not 0 <= left < 8 or (left and int(data[-1]) >> (8 - left) != (1 << left) - 1):
        raise ValueError(f"{left} bits are left over, or are not ones")
    return symbols


def _lookup(used: list[int], lengths: list[int]) -> UInt32[np.ndarray, "windows"]:
    """Look-up table over windows as long as the longest code: 16 * symbol + length of the code at its start."""
    widths = np.array(lengths, np.int64)
    order, top = np.argsort(widths, kind="stable"), max(lengths)
    entries = (np.array(used, np.uint32) << np.uint32(4)) + widths.astype(np.uint32)
    windows = np.arange(1 << top)
    return np.repeat(entries[order], 1 << (top - widths[order]))[_reversed(windows, np.full(1 << top, top))]


def walk(
    data: UInt8[np.ndarray, "bytes"],
    start: int,
    lookup: UInt32[np.ndarray, "windows"],
    most: int,
    count: int,
    skip: int,
) -> tuple[UInt16[np.ndarray, "symbols"], int]:
    """Decode a bit stream; the reference for faster versions.

    Args:
        data: The stream.
        start: Its first bit.
        lookup: The table of a complete code, as ``_lookup`` makes it.
        most: Upper bound on the symbols that are read.
        count: How many symbols other than ``skip`` to read.
        skip: A symbol that is not counted; -1: none.

    Returns:
        The symbols up to the last counted one, and the bit after its code.

    Raises:
        ValueError: The bits end first, or more than ``most`` symbols would be read.
    """
    if not count:
        return np.empty(0, np.uint16), start
    top = len(lookup).bit_length() - 1
    bits = np.concatenate([np.unpackbits(data, bitorder="little")[start:], np.ones(top, np.uint8)])
    windows = np.zeros(len(bits) - top, np.uint16)
    for i in range(top):
        windows |= bits[i : i + len(windows)].astype(np.uint16) << np.uint16(i)
    entries = lookup[windows]
    following: list[int] = (np.arange(len(entries)) + (entries & np.uint32(15))).tolist()
    places: list[int] = []
    at, total = 0, len(following)
    while at < total and len(places) < most:
        places.append(at)
        at = following[at]
    symbols = (entries[places] >> np.uint32(4)).astype(np.uint16)
    ends_at = int(np.searchsorted(np.cumsum(symbols != skip), count)) + 1
    if ends_at > len(places) or following[places[ends_at - 1]] > total:
        raise ValueError(f"the bits end, or {most} symbols are read, before there are {count}")
    return symbols[:ends_at], start + following[places[ends_at - 1]]
