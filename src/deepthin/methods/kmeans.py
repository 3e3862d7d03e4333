"""K-means: centres that all weights share, and a symbol for each weight that selects its centre.

Han, Mao and Dally, 2016, arXiv:1510.00149, section 3; weighted by importance as in Choi, El-Khamy and Lee, 2017,
arXiv:1612.01543.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import FLOAT_BITS, Array, Code, Integers, Namespace, Trains
from deepthin.methods.lloyd import STARTS, centres_of, midpoints, symbols_of

BITS = range(1, 9)


@dataclass(frozen=True, slots=True)
class KMeans:
    """``W[i] = centres[symbols[i]]``. Training moves the centres, each by the summed gradient of its weights."""

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    levels: int  # number of centres
    start: str = "linear"  # first centres: evenly spaced, at quantiles ("density"), or at weights ("random")
    seed: int = 0  # seed of a random start

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        sizes = (*self.shape, self.levels)
        fine = len(sizes) == 3 and all(type(size) is int and size > 0 for size in sizes) and type(self.seed) is int
        if (
            not fine
            or not min(2, math.prod(self.shape)) <= self.levels <= min(1 << BITS[-1], math.prod(self.shape))
            or self.start not in STARTS
        ):
            raise ValueError(f"KMeans cannot have {self.shape}, levels={self.levels!r}, {self.start!r}, {self.seed!r}.")

    @classmethod
    def fit(
        cls, shape: tuple[int, int], max_bits: int, *, bits: Any = None, start: Any = "linear", seed: Any = 0
    ) -> "KMeans":
        """The most bits for each symbol, 1 to 8, that fit with their ``2^bits`` centres.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            bits: Bits of a symbol, 1 to 8; None: as many as fit.
            start: First centres of Lloyd's algorithm: ``"linear"`` (evenly spaced), ``"density"`` (quantiles) or
                ``"random"`` (weights) (Han, Mao and Dally, 2016, arXiv:1510.00149, section 3.2).
            seed: Seed of a random start.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: Even ``bits`` bits for each symbol, or one, do not fit; it carries the smallest possible size.
            ConfigError: An option is out of range.
        """
        if bits is not None and (type(bits) is not int or bits not in BITS):
            raise ConfigError(f"bits = {bits!r}: k-means has {BITS[0]} to {BITS[-1]} bits a weight.")
        if start not in STARTS or type(seed) is not int:
            raise ConfigError(
                f"start = {start!r}, seed = {seed!r}: start is one of {', '.join(STARTS)}, seed a number."
            )
        area = math.prod(shape)
        plans = [cls(shape, min(1 << width, area), start, seed) for width in (BITS if bits is None else [bits])]
        fitting = [plan for plan in plans if plan.bits() <= max_bits]
        if not fitting:
            least = plans[0].bits()
            ratio = least / FLOAT_BITS / area
            raise BudgetError(
                f"K-means cannot store {shape[0]}x{shape[1]} in {max_bits} bits: {plans[0].levels} centres and the "
                f"symbols need {least}. "
                + (f"Use ratio >= {round_up(ratio)}." if ratio <= 1 else "That is more than dense: keep it dense."),
                smallest_bits=least,
                smallest_ratio=ratio,
            )
        return fitting[-1]

    @property
    def trains(self) -> Trains:
        """The centres; symbols are fixed."""
        return "codes"

    def bits(self) -> int:
        """32 bits for each centre, and the packed symbols.

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
        return {"symbols": Integers(self.levels)}

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
        """Minimise the squared error, times ``importance`` if given, by Lloyd's algorithm, which finds a local minimum.

        Of two equally near centres the upper one is taken. With ``importance`` the weighted error is at most that of
        the unweighted centres. Runs in NumPy on the host, in float64: a sort, one binary search for each weight, and a
        few hundred rounds of ``levels * log(weights)`` steps.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Array, rows x cols, entries >= 0: the weight of each squared error; None weighs all equally.

        Returns:
            ``centres`` (levels, rising) and ``symbols``, rows x cols in int16.
        """
        kind = xp.float64 if xp.finfo(weight.dtype).bits == 64 else xp.float32
        flat = np.asarray(xp.asarray(weight, dtype=kind)).reshape(-1)
        flat_importance = None if importance is None else np.asarray(importance).reshape(-1)
        centres = xp.asarray(centres_of(flat, self.levels, self.start, self.seed, flat_importance), dtype=weight.dtype)
        bounds = midpoints(np.asarray(xp.asarray(centres, dtype=xp.float64)))  # of the centres as they are stored
        return {"centres": centres, "symbols": xp.asarray(symbols_of(flat, bounds).reshape(self.shape))}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """One table look-up for each weight.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        return xp.take(code["centres"], xp.asarray(code["symbols"], dtype=xp.int64))
