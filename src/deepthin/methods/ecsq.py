"""Entropy-coded scalar quantisation (ECSQ): centres that all weights share, chosen for symbols of low entropy.

Choi, El-Khamy and Lee, 2017, arXiv:1612.01543: minimise squared error plus lambda times the entropy of the symbols, and
drop centres that no weight uses. Lambda follows from the upper bound on the bytes of the coded symbols.
"""

import math
from collections.abc import Mapping
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
SPARE_BITS = 2  # first levels: 2^(bits + SPARE_BITS), since many are dropped
USED_BITS = 1.5  # levels have up to this many bits more than the budget leaves for a weight


@dataclass(frozen=True, slots=True)
class Ecsq:
    """``W[i] = centres[symbols[i]]``, with symbols of at most ``coded_bytes``, Huffman-coded or packed.

    The fields do not depend on the weights: they fix the number of centres, of which ``encode`` may leave some unused,
    and the upper bound, which ``encode`` meets by its choice of lambda. Training moves the centres.
    """

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    levels: int  # upper bound on the centres
    coded_bytes: int  # upper bound on all symbols in a file, their table included

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        sizes = (*self.shape, self.levels)
        fine = len(sizes) == 3 and all(type(size) is int and size > 0 for size in sizes)
        if not fine or not min(2, math.prod(self.shape)) <= self.levels <= min(1 << MOST_BITS, math.prod(self.shape)):
            raise ValueError(f"Ecsq cannot have {self.shape}, levels={self.levels!r}.")
        least = min(_least_bytes(math.prod(self.shape), self.levels, 1), self._packed_bytes())
        if type(self.coded_bytes) is not int or self.coded_bytes < least:
            raise ValueError(f"Ecsq cannot have coded_bytes={self.coded_bytes!r}: {self.shape} need {least}.")

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int, *, bits: Any = None, levels: Any = None) -> "Ecsq":
        """Choose the number of centres and the upper bound on the coded symbols.

        With ``bits``, the centres are the largest power of two up to ``4 * 2^ceil(bits)``, at most 256, that fits.
        Without, levels and bits are balanced: the levels have, if they can, 1.5 bits more than the bound leaves for
        each weight. ``encode`` may leave some centres unused.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            bits: Mean bits of a coded symbol, 1 to 8, not necessarily an integer; the table of code lengths is added.
                None: what the centres leave of ``max_bits``.
            levels: Number of centres, 2 to 256; None: as above.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: The smallest table of centres and the coded symbols, of ``bits`` (or 1, the least of a prefix
                code) for each weight, do not fit; it carries the smallest possible size.
            ConfigError: An option is out of range.
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
        fitting = [plan for plan in least if plan.bits() <= max_bits]
        if not fitting:
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
            return fitting[-1]
        rooms = [
            replace(plan, coded_bytes=min((max_bits - FLOAT_BITS * plan.levels) // 8, plan._packed_bytes()))
            for plan in fitting
        ]
        return max(rooms, key=lambda plan: min(math.log2(plan.levels) - USED_BITS, plan._bits_a_weight()))

    @property
    def trains(self) -> Trains:
        """The centres; symbols are fixed."""
        return "codes"

    def _packed_bytes(self) -> int:
        return Integers(self.levels).bytes(math.prod(self.shape))

    def _bits_a_weight(self) -> float:
        """Bits for each weight that the upper bound leaves beside a table of all centres."""
        table = usual_table_bits(self.levels, width_of(self.levels))
        return (8 * self.coded_bytes - table) / math.prod(self.shape)

    def bits(self) -> int:
        """32 bits for each centre, and the upper bound on the coded symbols.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        return FLOAT_BITS * self.levels + 8 * self.integers()["symbols"].bytes(math.prod(self.shape))

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """One symbol for each weight, and the centres.

        Returns:
            Entry name -> shape.
        """
        return {"centres": (self.levels,), "symbols": self.shape}

    def integers(self) -> dict[str, Integers]:
        """The symbols.

        Returns:
            Entry name -> range of its values.
        """
        return {"symbols": Integers(self.levels, most_bytes=self.coded_bytes)}

    def derived(self) -> Code:
        """No tables.

        Returns:
            An empty mapping.
        """
        return {}

    def table_levels(self) -> int:
        """Number of centres.

        Returns:
            ``levels``.
        """
        return self.levels

    def decode_bytes(self, item_bytes: int) -> int:
        """An index of 64 bits for each weight.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        return (8 + item_bytes) * math.prod(self.shape)

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The largest centre.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        return largest["centres"]

    def init(self, rng: Generator, std: float) -> Code:
        """Normal weights, encoded, then scaled to a root mean square of exactly ``std``.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        numpy: Any = np
        code = self.encode(rng.normal(size=self.shape), numpy)
        spread = math.sqrt((self.decode(code, numpy) ** 2).mean())
        return {**code, "centres": (code["centres"] * (std / spread)).astype(np.float32)}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Minimise the squared error within the upper bound on the coded symbols; the search starts from k-means.

        If ``fit`` was given an integer ``bits``, the error is at most that of k-means with as many bits. Runs in NumPy
        on the host, in float64: a sort and some hundred rounds of ``levels * log(weights)`` steps. With more than 64
        different values of importance it costs about sixty times as much, and the search rounds them to three values
        per octave.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Array, rows x cols, entries >= 0: the weight of each squared error; None weighs all equally.

        Returns:
            ``centres`` (levels; unused ones are 0 and not trained) and ``symbols``, rows x cols in int16.
        """
        kind = xp.float64 if xp.finfo(weight.dtype).bits == 64 else xp.float32
        flat = np.asarray(xp.asarray(weight, dtype=kind)).reshape(-1)
        flat_importance = None if importance is None else np.asarray(importance).reshape(-1)

        def fits(counts: np.ndarray) -> bool:
            if self._packed_bytes() <= self.coded_bytes:
                return True
            size = coded_bytes(counts, width_of(self.levels))
            return size is not None and size <= self.coded_bytes

        centres, symbols = within(flat, self.levels, fits, flat_importance)
        filled = np.concatenate([centres, np.zeros(self.levels - len(centres))])
        return {"centres": xp.asarray(filled, dtype=weight.dtype), "symbols": xp.asarray(symbols.reshape(self.shape))}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """One table look-up for each weight.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        return xp.take(code["centres"], xp.asarray(code["symbols"], dtype=xp.int64))


def _least_bytes(weights: int, levels: int, bits: int | float) -> int:
    """The smaller of ``bits`` for each weight with a table of all centres, and packed symbols."""
    coded = math.floor(bits * weights) + usual_table_bits(levels, width_of(levels))
    return min(-(-coded // 8), Integers(levels).bytes(weights))
