"""Integer arithmetic that is part of the file format: what is drawn from a seed, and integers packed into bytes.

The generator is SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators"). What it
yields for a seed never changes, because saved files store the seed and not the table; so no library generator is used.
"""

import numpy as np
from jaxtyping import Int64, Integer, UInt, UInt8, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 1 << 64


def splitmix(seed: int, count: int) -> UInt64[np.ndarray, "count"]:
    """The first ``count`` 64-bit words that SplitMix64 yields from ``seed``, of which the low 64 bits matter."""
    step = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(seed % _WORD)
    step = (step ^ (step >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    step = (step ^ (step >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return step ^ (step >> np.uint64(31))


def permutation(seed: int, count: int) -> Int64[np.ndarray, "count"]:
    """The permutation of ``range(count)`` that sorts the seed's words (ties, if any, by position)."""
    return np.argsort(splitmix(seed, count), kind="stable").astype(np.int64)


def width_of(count: int) -> int:
    """Bits that tell ``count`` values apart."""
    return max(count - 1, 0).bit_length()


def pack(values: Int64[np.ndarray, "count"], width: int) -> UInt8[np.ndarray, "bytes"]:
    """Numbers below ``2**width``, ``width`` (0 to 56) bits each, from the lowest bit of the first byte on.

    Ones fill the last byte.
    """
    count, word = len(values), _word(width)
    words = np.full(-(-count // 8) * 8, (1 << width) - 1, word)
    words[:count] = values
    groups = words.reshape(-1, 8)  # eight numbers take `width` whole bytes
    packed = np.zeros((len(groups), width), np.uint8)
    for i in range(8 if width else 0):
        byte, shift = divmod(i * width, 8)
        shifted = groups[:, i] << word(shift)
        for j in range(byte, (i * width + width - 1) // 8 + 1):
            packed[:, j] |= (shifted >> word(8 * (j - byte))).astype(np.uint8)
    return packed.reshape(-1)[: packed_bytes(count, width)]


def unpack(data: UInt8[np.ndarray, "bytes"], width: int, count: int) -> UInt[np.ndarray, "count"]:
    """What ``pack`` packed; ``data`` has ``packed_bytes(count, width)`` bytes."""
    groups = np.zeros((-(-count // 8), width), np.uint8)
    groups.reshape(-1)[: len(data)] = data
    word = _word(width)
    words = np.zeros((len(groups), 8), word)
    for i in range(8 if width else 0):
        byte, shift = divmod(i * width, 8)
        last = (i * width + width - 1) // 8
        for j in range(byte, last + 1):
            words[:, i] |= groups[:, j].astype(word) << word(8 * (j - byte))
        words[:, i] = (words[:, i] >> word(shift)) & word((1 << width) - 1)
    return words.reshape(-1)[:count]


def _word(width: int) -> type[np.unsignedinteger]:
    """What holds a number at any place within a byte."""
    return np.uint16 if width <= 9 else np.uint32 if width <= 25 else np.uint64


def packed_bytes(count: int, width: int) -> int:
    """Bytes of ``count`` numbers of ``width`` bits."""
    return -(-count * width // 8)


# Rising positions are stored as the gaps between them, `width` bits each (Han et al., 2016, arXiv:1510.00149, section
# 2). A gap that is too long takes fillers before it: symbols of all ones, each of which skips 2**width - 1 places and
# is no position.
WIDEST_GAP = 24


def gap_bytes(count: int, places: int) -> int:
    """The most that ``count`` rising positions below ``places`` can take, with the width that suits them best."""
    bits = min((count + (places - count) // ((1 << width) - 1)) * width for width in range(1, WIDEST_GAP + 1))
    return -(-bits // 8)


def pack_gaps(positions: Int64[np.ndarray, "count"], width: int) -> UInt8[np.ndarray, "bytes"]:
    """Strictly rising positions as gaps of ``width`` bits."""
    return pack(gaps_of(positions, width), width)


def gaps_of(positions: Int64[np.ndarray, "count"], width: int) -> Int64[np.ndarray, "symbols"]:
    """The symbols for strictly rising positions, fillers included."""
    gaps = np.diff(positions, prepend=-1) - 1
    skip = (1 << width) - 1
    ends = np.cumsum(gaps // skip + 1) - 1  # where each position's own symbol stands
    symbols = np.full(int(ends[-1]) + 1 if len(ends) else 0, skip, np.int64)
    symbols[ends] = gaps % skip
    return symbols


def best_gap_width(positions: Int64[np.ndarray, "count"]) -> int:
    """The width that takes the fewest bytes for these positions."""
    gaps = np.diff(positions, prepend=-1) - 1

    def size(width: int) -> int:
        return packed_bytes(len(gaps) + int((gaps // ((1 << width) - 1)).sum()), width)

    return min(range(1, WIDEST_GAP + 1), key=size)


def unpack_gaps(data: UInt8[np.ndarray, "bytes"], width: int, count: int, places: int) -> Int64[np.ndarray, "count"]:
    """What ``pack_gaps`` packed; ValueError for bytes that are not ``count`` positions below ``places``."""
    skip = (1 << width) - 1
    symbols = 8 * len(data) // width  # what is left at the end are bits of ones, too few for a symbol or fillers
    if symbols > count + (places - count) // skip + 8:
        raise ValueError(f"{len(data)} bytes are more than {count} positions below {places} can take")
    return positions_of(unpack(data, width, symbols), width, count, places)


def positions_of(
    found: Integer[np.ndarray, "symbols"], width: int, count: int, places: int
) -> Int64[np.ndarray, "positions"]:
    """The positions that these gaps lead to; ValueError where they are not ``count``, or not below ``places``."""
    skip = (1 << width) - 1
    where = np.flatnonzero(found != skip)
    if len(where) != count:
        raise ValueError(f"{len(where)} positions where there should be {count}")
    fillers = where - np.arange(count)
    positions = np.cumsum(found[where].astype(np.int64) + 1) - 1 + fillers * skip
    if count and not 0 <= int(positions[-1]) < places:
        raise ValueError(f"a position of {int(positions[-1])} among {places}")
    return positions
