"""A few numbers that all weights share, chosen so that the symbols can be coded in few bits: their entropy is bounded.

ECSQ as in Choi, El-Khamy and Lee, 2017, arXiv:1612.01543: squared distances plus lambda times the entropy are
minimised, and empty classes are dropped; lambda follows from the bound.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from deepthin.lloyd import within_entropy
from deepthin.method import FLOAT_BITS, Array, BudgetError, Code, ConfigError, Integers, Namespace, Trains, round_up

MOST_BITS = 8
SPARE_BITS = 2  # levels to begin with: so many times two to the bits that are wanted, since many are dropped


@dataclass(frozen=True, slots=True)
class Ecsq:
    """``W[i] = centres[symbols[i]]``, where the symbols' entropy times the weight count is at most ``entropy_bits``.

    A plan does not know the weights, so it fixes two things: the centres, of which ``encode`` may leave some unused,
    and the bound, which ``encode`` meets by its choice of lambda. Symbols are packed, so ``bits()`` goes by the
    centres; a coder by frequency would take little more than ``entropy_bits``. Training moves the centres.
    """

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    levels: int  # the most centres
    entropy_bits: int  # of all symbols together, at most

    def __post_init__(self) -> None:
        """Refuse fields that no ``fit`` makes."""
        sizes = (*self.shape, self.levels)
        fine = len(sizes) == 3 and all(type(size) is int and size > 0 for size in sizes)
        fine = fine and type(self.entropy_bits) is int and self.entropy_bits >= 0
        if not fine or self.levels > min(1 << MOST_BITS, math.prod(self.shape)):
            raise ValueError(f"Ecsq cannot have {self.shape}, levels={self.levels!r}, {self.entropy_bits!r}.")

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int, *, bits: Any = None, levels: Any = None) -> "Ecsq":
        """An entropy of ``bits`` a weight, with as many of ``4 * 2^bits`` centres, at most 256, as fit when packed.

        Without ``bits`` the symbols may have what the centres leave of ``max_bits``: packed ones never need as much,
        so this is k-means. ``levels`` gives the centres.
        """
        if bits is not None and (type(bits) not in (int, float) or not 0 < bits <= MOST_BITS):
            raise ConfigError(f"bits = {bits!r}: ECSQ has more than 0 and at most {MOST_BITS} bits a weight.")
        if levels is not None and (type(levels) is not int or not 1 < levels <= 1 << MOST_BITS):
            raise ConfigError(f"levels = {levels!r}: ECSQ has 2 to {1 << MOST_BITS} centres.")
        area = math.prod(shape)
        most = MOST_BITS if bits is None else min(math.ceil(bits) + SPARE_BITS, MOST_BITS)
        counts = [min(count, area) for count in ([levels] if levels else [1 << width for width in range(1, most + 1)])]
        entropy = None if bits is None else math.floor(bits * area)
        plans = [cls(shape, n, max(max_bits - FLOAT_BITS * n, 0) if entropy is None else entropy) for n in counts]
        found = [plan for plan in plans if plan.bits() <= max_bits]
        if not found:
            least = plans[0].bits()
            ratio = least / FLOAT_BITS / area
            raise BudgetError(
                f"ECSQ cannot store {shape[0]}x{shape[1]} in {max_bits} bits: {counts[0]} centres and the packed "
                f"symbols need {least}. "
                + (f"Use ratio >= {round_up(ratio)}." if ratio <= 1 else "That is more than dense: keep it dense."),
                smallest_bits=least,
                smallest_ratio=ratio,
            )
        return found[-1]

    @property
    def trains(self) -> Trains:
        """The centres themselves."""
        return "codes"

    def bits(self) -> int:
        """32 bits a centre, and the packed symbols."""
        return FLOAT_BITS * self.levels + 8 * self.integers()["symbols"].bytes(math.prod(self.shape))

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """A symbol a weight."""
        return {"centres": (self.levels,), "symbols": self.shape}

    def integers(self) -> dict[str, Integers]:
        """The symbols."""
        return {"symbols": Integers(self.levels)}

    def derived(self) -> Code:
        """Nothing."""
        return {}

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

        Never worse than k-means of as many bits as the bound has whole ones for each weight.

        By NumPy, on the host, in float64. With ``importance`` it takes some hundred times ``levels`` passes over the
        weights. Unused centres repeat the last one.
        """
        flat = np.asarray(xp.asarray(weight, dtype=xp.float64)).reshape(-1)
        shares = None if importance is None else np.asarray(xp.asarray(importance, dtype=xp.float64)).reshape(-1)
        centres, symbols = within_entropy(flat, self.levels, self.entropy_bits, shares)
        filled = np.concatenate([centres, np.full(self.levels - len(centres), centres[-1])])
        symbols = symbols.reshape(self.shape).astype(np.int16)
        return {"centres": xp.asarray(filled, dtype=weight.dtype), "symbols": xp.asarray(symbols)}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """One look-up a weight."""
        return xp.take(code["centres"], xp.asarray(code["symbols"], dtype=xp.int64))
