"""Integer arithmetic of the file format: words and permutations drawn from a seed, and integers packed into bytes.

The generator is SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators"). Its output
for a seed never changes, because files store the seed and not the table; so no library generator is used.
"""

import numpy as np
from jaxtyping import Int64, Integer, UInt, UInt8, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 1 << 64
PIECE = 1 << 18
"""Numbers of which temporary arrays are made at once."""


def splitmix(seed: int, count: int, first: int = 0) -> UInt64[np.ndarray, " count"]:
    """Words of SplitMix64.

    Args:
        seed: The state to start from, modulo 2^64.
        count: How many words.
        first: Index of the first one, from 0.

    Returns:
        Words of 64 bits.
    """
    words = np.arange(first, first + count, dtype=np.uint64)
    for at in range(0, count, PIECE):
        words[at : at + PIECE] = _mixed(seed, words[at : at + PIECE])
    return words


def _mixed(seed: int, indices: UInt64[np.ndarray, " count"]) -> UInt64[np.ndarray, " count"]:
    """The words at these indices."""
    step = (indices + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(seed % _WORD)
    step = (step ^ (step >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    step = (step ^ (step >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return step ^ (step >> np.uint64(31))


def permutation(seed: int, count: int) -> Int64[np.ndarray, "count"]:
    """The permutation that sorts the first words of ``splitmix`` (equal words, if any, by position).

    Args:
        seed: The seed, modulo 2^64.
        count: Length of the permutation.

    Returns:
        A permutation of ``range(count)``.
    """
    keys, low = splitmix(seed, count), np.uint64(width_of(count))
    below = (np.uint64(1) << low) - np.uint64(1)
    for at in range(0, count, PIECE):  # the position takes the place of the lowest bits, so that nothing else is sorted
        own = keys[at : at + PIECE]
        own |= below
        own ^= below ^ np.arange(at, at + len(own), dtype=np.uint64)
    keys.sort()
    ties = [np.empty(0, np.int64)]
    for at in range(0, count - 1, PIECE):
        after = keys[at + 1 : at + 1 + PIECE] >> low
        found = at + np.flatnonzero(keys[at : at + len(after)] >> low == after)
        ties += [found, found + 1]
    keys &= below
    if len(alike := np.unique(np.concatenate(ties))):
        tied = keys[alike]  # words that differ in their lowest bits only, or not at all
        keys[alike] = tied[np.lexsort((tied, _mixed(seed, tied)))]
    return keys.view(np.int64)


def width_of(count: int) -> int:
    """Bits that distinguish ``count`` values.

    Args:
        count: Number of values, >= 0.

    Returns:
        ``ceil(log2(count))``; 0 for at most one value.
    """
    return max(count - 1, 0).bit_length()


def pack(values: Integer[np.ndarray, " count"], width: int) -> UInt8[np.ndarray, " bytes"]:
    """Pack integers, from the lowest bit of the first byte on; the last byte is padded with ones.

    Args:
        values: Integers from 0 to ``2**width - 1``.
        width: Bits of each, 0 to 56.

    Returns:
        ``packed_bytes(len(values), width)`` bytes.
    """
    count, word = len(values), _word(width)
    packed = np.zeros((-(-count // 8), width), np.uint8)  # eight numbers take `width` whole bytes
    for first in range(0, count if width else 0, PIECE):
        piece = values[first : first + PIECE]
        words = np.full(-(-len(piece) // 8) * 8, (1 << width) - 1, word)
        words[: len(piece)] = piece
        groups, into = words.reshape(-1, 8), packed[first // 8 : first // 8 + len(words) // 8]
        for i in range(8):
            byte, shift = divmod(i * width, 8)
            shifted = groups[:, i] << word(shift)
            for j in range(byte, (i * width + width - 1) // 8 + 1):
                into[:, j] |= (shifted >> word(8 * (j - byte))).astype(np.uint8)
    return packed.reshape(-1)[: packed_bytes(count, width)]


def unpack(data: UInt8[np.ndarray, "bytes"], width: int, count: int) -> UInt[np.ndarray, "count"]:
    """The inverse of ``pack``.

    Args:
        data: ``packed_bytes(count, width)`` bytes.
        width: Bits of each integer, 0 to 56.
        count: How many integers.

    Returns:
        The integers, as uint16 up to 9 bits, uint32 up to 25, else uint64.
    """
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
    """An unsigned type that holds an integer of this width after a shift by up to 7 bits."""
    return np.uint16 if width <= 9 else np.uint32 if width <= 25 else np.uint64


def packed_bytes(count: int, width: int) -> int:
    """Size of packed integers.

    Args:
        count: How many integers.
        width: Bits of each.

    Returns:
        ``ceil(count * width / 8)`` bytes.
    """
    return -(-count * width // 8)


# Rising positions are stored as the gaps between them, `width` bits each (Han et al., 2016, arXiv:1510.00149, section
# 2). A gap that is too long takes fillers before it: symbols of all ones, each of which skips 2**width - 1 places and
# stands for no position.
WIDEST_GAP = 24


def gap_bytes(count: int, places: int) -> int:
    """Upper bound on the bytes of rising positions that are stored as gaps of the best width.

    Args:
        count: How many positions.
        places: All positions are from 0 to ``places - 1``.

    Returns:
        Bytes, for the least favourable positions.
    """
    bits = min((count + (places - count) // ((1 << width) - 1)) * width for width in range(1, WIDEST_GAP + 1))
    return -(-bits // 8)


def pack_gaps(positions: Int64[np.ndarray, "count"], width: int) -> UInt8[np.ndarray, "bytes"]:
    """Pack strictly increasing positions as gaps (Han et al., 2016, arXiv:1510.00149, section 2).

    Args:
        positions: Strictly increasing, >= 0.
        width: Bits of a gap, 1 to 24.

    Returns:
        The packed gaps, fillers included.
    """
    return pack(gaps_of(positions, width), width)


def gaps_of(positions: Int64[np.ndarray, "count"], width: int) -> Int64[np.ndarray, "symbols"]:
    """The symbols that ``pack_gaps`` packs.

    Args:
        positions: Strictly increasing, >= 0.
        width: Bits of a gap, 1 to 24.

    Returns:
        Gaps from 0 to ``2**width - 2``, each after its fillers, which are ``2**width - 1``.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    skip = (1 << width) - 1
    ends = np.cumsum(gaps // skip + 1) - 1  # index of each position's last symbol
    symbols = np.full(int(ends[-1]) + 1 if len(ends) else 0, skip, np.int64)
    symbols[ends] = gaps % skip
    return symbols


def best_gap_width(positions: Int64[np.ndarray, "count"]) -> int:
    """The width with which gaps take the fewest bytes.

    Args:
        positions: Strictly increasing, >= 0.

    Returns:
        Bits of a gap, 1 to 24.
    """
    gaps = np.diff(positions, prepend=-1) - 1

    def size(width: int) -> int:
        return packed_bytes(len(gaps) + int((gaps // ((1 << width) - 1)).sum()), width)

    return min(range(1, WIDEST_GAP + 1), key=size)


def unpack_gaps(data: UInt8[np.ndarray, "bytes"], width: int, count: int, places: int) -> Int64[np.ndarray, "count"]:
    """The inverse of ``pack_gaps``, for untrusted bytes.

    Args:
        data: The packed gaps.
        width: Bits of a gap, 1 to 24.
        count: How many positions.
        places: All positions are from 0 to ``places - 1``.

    Returns:
        The positions.

    Raises:
        ValueError: The bytes are not ``count`` positions below ``places``.
    """
    skip = (1 << width) - 1
    symbols = 8 * len(data) // width  # the padding of ones may read as fillers, but never as a position
    if symbols > count + (places - count) // skip + 8:
        raise ValueError(f"{len(data)} bytes are more than {count} positions below {places} can take")
    return positions_of(unpack(data, width, symbols), width, count, places)


def positions_of(
    symbols: Integer[np.ndarray, "symbols"], width: int, count: int, places: int
) -> Int64[np.ndarray, "positions"]:
    """The inverse of ``gaps_of``, for untrusted symbols.

    Args:
        symbols: Gaps and fillers.
        width: Bits of a gap, 1 to 24.
        count: How many positions.
        places: All positions are from 0 to ``places - 1``.

    Returns:
        The positions.

    Raises:
        ValueError: The symbols are not ``count`` positions below ``places``.
    """
    skip = (1 << width) - 1
    where = np.flatnonzero(symbols != skip)
    if len(where) != count:
        raise ValueError(f"{len(where)} positions where there should be {count}")
    fillers = where - np.arange(count)
    positions = np.cumsum(symbols[where].astype(np.int64) + 1) - 1 + fillers * skip
    if count and not 0 <= int(positions[-1]) < places:
        raise ValueError(f"a position of {int(positions[-1])} among {places}")
    return positions
