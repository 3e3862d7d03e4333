"""HashedNets: every weight is one of a few floats, chosen and given its sign by a hash of its position.

Chen, Wilson, Tyree, Weinberger and Chen, 2015, "Compressing neural networks with the hashing trick", section 4. Neither
the index nor the sign is stored: both follow from the seed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.random import Generator

from deepthin.coding.bits import PIECE, splitmix
from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import FLOAT_BITS, Array, Code, Integers, Namespace, Trains

_PIECE = 1 << 18  # weights that are summed at once, at least


@dataclass(frozen=True, slots=True)
class Hashed:
    """``W[i] = sign[i] * values[bucket[i]]``, for i over the flattened matrix.

    Both come from the i-th word drawn from ``seed``: the bucket is its upper half, scaled to the number of buckets, the
    sign its lowest bit. Each matrix needs its own seed, since otherwise layers would share their pattern.
    """

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    buckets: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        sizes = (*self.shape, self.buckets)
        if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes) or type(self.seed) is not int:
            raise ValueError(
                f"Hashed needs positive integers, got {self.shape}, buckets={self.buckets}, {self.seed!r}."
            )
        if self.buckets > min(1 << 31, math.prod(self.shape)):
            raise ValueError(f"Hashed has at most 2^31 buckets, and one for each weight, not {self.buckets}.")

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int, *, seed: Any = 0) -> "Hashed":
        """As many buckets as fit, at most one for each weight.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            seed: Seed of the hash; every matrix needs its own.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: ``max_bits`` is below 32, one bucket; it carries the smallest possible size.
            ConfigError: ``seed`` is not an integer.
        """
        if type(seed) is not int:
            raise ConfigError(f"seed = {seed!r} is not a seed: give an integer.")
        area = shape[0] * shape[1]
        if max_bits < FLOAT_BITS:
            raise BudgetError(
                f"HashedNets cannot store {shape[0]}x{shape[1]} in {max_bits} bits: one bucket needs {FLOAT_BITS}. "
                f"Use ratio >= {round_up(1 / area)}.",
                smallest_bits=FLOAT_BITS,
                smallest_ratio=1 / area,
            )
        return cls(shape, min(max_bits // FLOAT_BITS, area), seed)

    @property
    def trains(self) -> Trains:
        """The floats of the buckets."""
        return "codes"

    def bits(self) -> int:
        """32 bits for each bucket.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        return FLOAT_BITS * self.buckets

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``values``: one float for each bucket.

        Returns:
            Entry name -> shape.
        """
        return {"values": (self.buckets,)}

    def integers(self) -> dict[str, Integers]:
        """No integers.

        Returns:
            An empty mapping.
        """
        return {}

    def derived(self) -> Code:
        """``index``: for each weight its position in the values followed by their negatives.

        Returns:
            Entry name -> NumPy array; empty if there is none.
        """
        index = np.empty(math.prod(self.shape), np.int64)
        for first in range(0, len(index), PIECE):
            index[first : first + PIECE] = self._index(first, min(PIECE, len(index) - first))
        return {"index": index}

    def _index(self, first: int, count: int) -> Int64[np.ndarray, " count"]:
        """A range of the table."""
        words = splitmix(self.seed, count, first)
        bucket = ((words >> np.uint64(32)) * np.uint64(self.buckets)) >> np.uint64(32)
        return (bucket + (words & np.uint64(1)) * np.uint64(self.buckets)).astype(np.int64)

    def decode_bytes(self, item_bytes: int) -> int:
        """An index of 64 bits for each weight, and the words of 64 bits from which a piece of it follows.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        area = math.prod(self.shape)
        return 24 * area + 24 * min(area, PIECE) + 3 * item_bytes * self.buckets

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The largest value.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        return largest["values"]

    def init(self, rng: Generator, std: float) -> Code:
        """Uniform, as in the paper, scaled to a root mean square of exactly ``std``.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        values = rng.uniform(-1, 1, self.buckets)
        return {"values": (values * (std / np.sqrt(np.mean(values * values)))).astype(np.float32)}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Least squares: the (weighted) mean of each bucket's weights times their signs; 0 for an empty bucket.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Array, rows x cols, entries >= 0: the weight of each squared error; None weighs all equally.

        Returns:
            ``values``: one float for each bucket.
        """
        flat = xp.reshape(weight, (-1,))
        every = None if importance is None else xp.reshape(importance, (-1,))
        sums: Any = 0
        shares: Any = 0
        step = max(_PIECE, 2 * self.buckets)
        for first in range(0, flat.shape[0], step):
            own = flat[first : first + step]
            index = xp.asarray(self._index(first, own.shape[0]))
            weigh = xp.ones_like(own) if every is None else every[first : first + step]
            # A sum of large weights has room in double precision only
            sums = sums + xp.bincount(index, xp.asarray(weigh * own, dtype=xp.float64), 2 * self.buckets)
            shares = shares + xp.bincount(index, xp.asarray(weigh, dtype=xp.float64), 2 * self.buckets)
        total = shares[: self.buckets] + shares[self.buckets :]
        mean = (sums[: self.buckets] - sums[self.buckets :]) / xp.where(total > 0, total, xp.ones_like(total))  # 0 / 1
        return {"values": xp.asarray(mean, dtype=flat.dtype)}

    def importance_of(self, code: Code, importance: Float[Array, "rows cols"], xp: Namespace) -> Code:
        """The sum of the importance over the weights of each bucket.

        Args:
            code: Stored entries and those of ``derived``.
            importance: Array, rows x cols, entries >= 0.
            xp: The namespace of the arrays.

        Returns:
            Entry name -> array of the entry's shape, for each floating entry.
        """
        bucket = xp.asarray(self.derived()["index"] % self.buckets)
        sums = xp.bincount(bucket, xp.reshape(importance, (-1,)), self.buckets)
        return {"values": xp.asarray(sums, dtype=importance.dtype)}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """One table look-up for each weight.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        both = xp.concatenate([code["values"], -code["values"]])
        return xp.reshape(xp.take(both, code["index"]), self.shape)
