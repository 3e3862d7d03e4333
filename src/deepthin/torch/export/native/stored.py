"""Arrays of numbers in constant memory, in the smallest form that keeps their values exactly (runtime/dt.h)."""

from dataclasses import dataclass, field

import numpy as np

FLOATS = 32  # bits of an array that is not packed
DIGITS = {103: (3, 5), 106: (6, 3)}
"""``bits`` of integers that are digits, several in a byte -> their base, and how many a byte holds."""
_TABLE_BITS = 8  # of an index into a table of floats


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
