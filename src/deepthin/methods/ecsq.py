"""A few numbers that all weights share, chosen so that their symbols take few bits when coded by how often they occur.

ECSQ as in Choi, El-Khamy and Lee, 2017, arXiv:1612.01543: squared distances plus lambda times the entropy are
minimised, and empty classes are dropped; lambda follows from the bytes that the coded symbols may take.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from deepthin.coding.bits import width_of
from deepthin.coding.huffman import coded_bytes, usual_table_bits
from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import FLOAT_BITS, Array, Code, Integers, Namespace, Trains
from deepthin.methods.lloyd import within

MOST_BITS = 8
SPARE_BITS = 2  # levels to begin with: so many times two to the bits that are wanted, since many are dropped
USED_BITS = 1.5  # a budget gets levels of so many bits more than it has for a weight, if it can


@dataclass(frozen=True, slots=True)
class Ecsq:
    """``W[i] = centres[symbols[i]]``, where the symbols take at most ``coded_bytes`` by Huffman's code, or packed.

    A plan does not know the weights, so it fixes two things: the centres, of which ``encode`` may leave some unused,
    and the bound, which ``encode`` meets by its choice of lambda. Training moves the centres.
    """

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    levels: int  # the most centres
    coded_bytes: int  # of all symbols together in a file, their table included, at most

    def __post_init__(self) -> None:
        """Refuse fields that no ``fit`` makes."""
        sizes = (*self.shape, self.levels)
        fine = len(sizes) == 3 and all(type(size) is int and size > 0 for size in sizes)
        if not fine or self.levels > min(1 << MOST_BITS, math.prod(self.shape)):
            raise ValueError(f"Ecsq cannot have {self.shape}, levels={self.levels!r}.")
        least = min(_least_bytes(math.prod(self.shape), self.levels, 1), self._packed_bytes())
        if type(self.coded_bytes) is not int or self.coded_bytes < least:
            raise ValueError(f"Ecsq cannot have coded_bytes={self.coded_bytes!r}: {self.shape} need {least}.")

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int, *, bits: Any = None, levels: Any = None) -> "Ecsq":
        """Symbols of ``bits`` a weight, and their table, with as many of ``4 * 2^bits`` centres, at most 256, as fit.

        Without ``bits`` the symbols have what the centres leave of ``max_bits``, which must be a bit for each weight:
        no code of whole bits takes less. ``levels`` gives the centres.
        """
        if bits is not None and (type(bits) not in (int, float) or not 1 <= bits <= MOST_BITS):
            raise ConfigError(
                f"bits = {bits!r}: ECSQ has 1 to {MOST_BITS} bits a weight; a code of whole bits cannot have less."
            )
        if levels is not None and (type(levels) is not int or not 1 < levels <= 1 << MOST_BITS):
            raise ConfigError(f"levels = {levels!r}: ECSQ has 2 to {1 << MOST_BITS} centres.")
        area = math.prod(shape)
        most = MOST_BITS if bits is None else min(math.ceil(bits) + SPARE_BITS, MOST_BITS)
        counts = [min(count, area) for count in ([levels] if levels else [1 << width for width in range(1, most + 1)])]
        least = [cls(shape, n, _least_bytes(area, n, 1 if bits is None else bits)) for n in counts]
        found = [plan for plan in least if plan.bits() <= max_bits]
        if not found:
            needed = least[0].bits()
            ratio = needed / FLOAT_BITS / area
            raise BudgetError(
                f"ECSQ cannot store {shape[0]}x{shape[1]} in {max_bits} bits: {counts[0]} centres and the coded "
                f"symbols, of {1 if bits is None else bits} bits or more, need {needed}. "
                + (f"Use ratio >= {round_up(ratio)}." if ratio <= 1 else "That is more than dense: keep it dense."),
                smallest_bits=needed,
                smallest_ratio=ratio,
            )
        if bits is not None:
            return found[-1]
        rooms = [
            replace(plan, coded_bytes=min((max_bits - FLOAT_BITS * plan.levels) // 8, plan._packed_bytes()))
            for plan in found
        ]
        return max(rooms, key=lambda plan: min(math.log2(plan.levels) - USED_BITS, plan._bits_a_weight()))

    @property
    def trains(self) -> Trains:
        """The centres themselves."""
        return "codes"

    def _packed_bytes(self) -> int:
        return Integers(self.levels).bytes(math.prod(self.shape))

    def _bits_a_weight(self) -> float:
        """What the bound leaves beside a table of all centres."""
        table = usual_table_bits(self.levels, width_of(self.levels))
        return (8 * self.coded_bytes - table) / math.prod(self.shape)

    def bits(self) -> int:
        """32 bits a centre, and what the symbols may take."""
        return FLOAT_BITS * self.levels + 8 * self.integers()["symbols"].bytes(math.prod(self.shape))

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """A symbol a weight."""
        return {"centres": (self.levels,), "symbols": self.shape}

    def integers(self) -> dict[str, Integers]:
        """The symbols."""
        return {"symbols": Integers(self.levels, most_bytes=self.coded_bytes)}

    def derived(self) -> Code:
        """Nothing."""
        return {}

    def table_levels(self) -> int:
        """The centres."""
        return self.levels

    def init(self, rng: Generator, std: float) -> Code:
        """Normal weights, encoded, then scaled to a root mean square of exactly ``std``."""
        numpy: Any = np
        code = self.encode(rng.normal(size=self.shape), numpy)
        spread = math.sqrt((self.decode(code, numpy) ** 2).mean())
        return {**code, "centres": (code["centres"] * (std / spread)).astype(np.float32)}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Begins at k-means; minimises squared distances, times ``importance`` if given, within the bound.

        Never worse than k-means of as many bits as ``fit`` was given whole ones.

        By NumPy, on the host, in float64. Takes a sort and some hundred rounds of ``levels * log(weights)`` steps; with
        ``importance`` sixty times as many, and the search tells only three values of it in each doubling apart. Unused
        centres are zeros, which training leaves alone, and are stored as one.
        """
        flat = np.asarray(xp.asarray(weight, dtype=xp.float64)).reshape(-1)
        shares = None if importance is None else np.asarray(xp.asarray(importance, dtype=xp.float64)).reshape(-1)

        def fits(counts: np.ndarray) -> bool:
            if self._packed_bytes() <= self.coded_bytes:
                return True
            size = coded_bytes(counts, width_of(self.levels))
            return size is not None and size <= self.coded_bytes

        centres, symbols = within(flat, self.levels, fits, shares)
        filled = np.concatenate([centres, np.zeros(self.levels - len(centres))])
        symbols = symbols.reshape(self.shape).astype(np.int16)
        return {"centres": xp.asarray(filled, dtype=weight.dtype), "symbols": xp.asarray(symbols)}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """One look-up a weight."""
        return xp.take(code["centres"], xp.asarray(code["symbols"], dtype=xp.int64))


def _least_bytes(weights: int, levels: int, bits: int | float) -> int:
    """So many bits a weight and a table of all centres; or fewer, where packed symbols are."""
    coded = math.floor(bits * weights) + usual_table_bits(levels, width_of(levels))
    return min(-(-coded // 8), Integers(levels).bytes(weights))
