"""Magnitude pruning: the largest weights and their positions; all others are zero.

Han, Pool, Tran and Dally, 2015, arXiv:1506.02626; stored as in Han et al., 2016, arXiv:1510.00149, section 2. The
number of weights is exact: of equal magnitudes the first in order are stored. Load-balance-aware pruning: ESE (Han et
al., 2017, arXiv:1612.00694, section 3.1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.random import Generator

from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import FLOAT_BITS, Array, Code, Integers, Namespace, Trains

INDEXES = ("gaps", "csr")
_USUAL = 16  # binary orders of magnitude of weights and importance whose products are taken as they are


@dataclass(frozen=True, slots=True)
class Pruned:
    """``W`` is zero except for ``values`` at ``positions``, which are strictly increasing in the flattened matrix."""

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    kept: int  # number of stored weights
    index: str = "gaps"  # "gaps", or "csr" to count positions at the size of compressed sparse rows
    balance: int = 1  # number of processing elements that take rows in turn, with equal densities

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        sizes = (*self.shape, self.kept)
        if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"Pruned needs positive integers, got {self.shape}, kept={self.kept}.")
        if self.index not in INDEXES:
            raise ValueError(f"Pruned has no index {self.index!r}.")
        if self.kept > math.prod(self.shape):
            raise ValueError(f"Pruned cannot keep {self.kept} of {math.prod(self.shape)} weights.")
        if type(self.balance) is not int or not 1 <= self.balance <= self.shape[0]:
            raise ValueError(f"Pruned cannot balance {self.shape[0]} rows over {self.balance!r}.")

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int, *, index: Any = "gaps", balance: Any = 1) -> "Pruned":
        """As many weights as fit, with their positions stored in the shortest of the known codings.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            index: ``"gaps"``, or ``"csr"``: count positions at the size of compressed sparse rows, which leaves fewer
                weights (16 bits for each column, 32 in a matrix of more than 65,536 columns, and 32 for each row). The
                file is then smaller than counted.
            balance: Number of processing elements, >= 1, that take rows in turn and keep equal shares of weights,
                within one (load-balance-aware pruning; 32 in ESE, Han et al., 2017, arXiv:1612.00694, section 3.1). At
                most ``rows`` are used.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: One weight and its position do not fit; it carries the smallest possible size.
            ConfigError: An option is out of range.
        """
        if index not in INDEXES:
            raise ConfigError(f"index = {index!r} is unknown. Valid: {', '.join(INDEXES)}.")
        if type(balance) is not int or balance < 1:
            raise ConfigError(f"balance = {balance!r}: the number of processing elements is an integer >= 1.")
        balance = min(balance, shape[0])
        low, high = 0, min(max_bits // FLOAT_BITS, math.prod(shape)) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cls(shape, middle, index).bits() <= max_bits else (low, middle)
        if low == 0:
            least, area = cls(shape, 1, index).bits(), math.prod(shape)
            ratio = least / FLOAT_BITS / area
            raise BudgetError(
                f"Pruning cannot store {shape[0]}x{shape[1]} in {max_bits} bits: one weight and its position need "
                f"{least}. "
                + (f"Use ratio >= {round_up(ratio)}." if ratio <= 1 else "That is more than dense: keep it dense."),
                smallest_bits=least,
                smallest_ratio=ratio,
            )
        return cls(shape, low, index, balance)

    @property
    def trains(self) -> Trains:
        """The values; positions are fixed."""
        return "codes"

    def bits(self) -> int:
        """32 bits for each value, and an upper bound on the positions: gaps or packed, or the size of sparse rows.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        positions = 8 * self.integers()["positions"].bytes(self.kept)
        if self.index == "csr":
            columns = 16 if self.shape[1] <= 1 << 16 else 32
            positions = max(positions, columns * self.kept + 32 * (self.shape[0] + 1))
        return FLOAT_BITS * self.kept + positions

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``values`` and ``positions``, of equal length.

        Returns:
            Entry name -> shape.
        """
        return {"values": (self.kept,), "positions": (self.kept,)}

    def integers(self) -> dict[str, Integers]:
        """The positions, through the flattened matrix.

        Returns:
            Entry name -> range of its values.
        """
        return {"positions": Integers(math.prod(self.shape), rising=True)}

    def derived(self) -> Code:
        """No tables.

        Returns:
            An empty mapping.
        """
        return {}

    def with_kept(self, kept: int) -> "Pruned":
        """The same method with another number of stored weights.

        Args:
            kept: Number of weights, 1 to ``rows * cols``.

        Returns:
            A new method; all other fields are unchanged.
        """
        return replace(self, kept=kept)

    def decode_bytes(self, item_bytes: int) -> int:
        """Zeros for all weights, made once and repeated.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        return 2 * item_bytes * math.prod(self.shape)

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The largest value.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        return largest["values"]

    def init(self, rng: Generator, std: float) -> Code:
        """Random positions; values with ``rows * cols / kept`` times the variance, so that the weights have ``std``.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        area, cols = math.prod(self.shape), self.shape[1]
        chosen = [
            _place(rng.choice(weights, stored, replace=False), first, self.balance, cols)
            for first, weights, stored in self._elements()
        ]
        positions = np.sort(np.concatenate(chosen)).astype(np.int64)
        values = rng.normal(size=self.kept)
        scale = std * math.sqrt(area / self.kept) / np.sqrt(np.mean(values * values))
        return {"values": (values * scale).astype(np.float32), "positions": positions}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Store the weights of largest magnitude, which minimises the squared error for their number.

        With ``balance`` above 1 this holds within the rows of each processing element.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Array, rows x cols, entries >= 0: stores the largest ``importance * w^2`` instead (LeCun, Denker
                and Solla, 1990, "Optimal brain damage").

        Returns:
            ``values`` and ``positions``, strictly increasing, in the flattened matrix.
        """
        flat = xp.reshape(weight, (-1,))
        host: Any = np.asarray(flat)
        size: Any = abs(host) if importance is None else _damage(host, np.asarray(importance))
        rows, chosen = size.reshape(self.shape), list[Any]()
        for first, _, stored in self._elements():
            largest = _largest(rows[first :: self.balance].reshape(-1), stored)
            chosen.append(_place(largest, first, self.balance, self.shape[1]))
        positions = chosen[0] if len(chosen) == 1 else np.sort(np.concatenate(chosen))
        positions = xp.asarray(positions)
        return {"values": xp.take(flat, positions), "positions": positions}

    def _elements(self) -> list[tuple[int, int, int]]:
        """For each processing element: its first row, its number of weights, and how many of them it stores."""
        (rows, cols), done, stored = self.shape, 0, 0
        elements: list[tuple[int, int, int]] = []
        for first in range(self.balance):
            weights = len(range(first, rows, self.balance)) * cols
            done += weights
            most = self.kept * done // (rows * cols)
            elements.append((first, weights, most - stored))
            stored = most
        return elements

    def importance_of(self, code: Code, importance: Float[Array, "rows cols"], xp: Namespace) -> Code:
        """The importance of the stored weights.

        Args:
            code: Stored entries and those of ``derived``.
            importance: Array, rows x cols, entries >= 0.
            xp: The namespace of the arrays.

        Returns:
            Entry name -> array of the entry's shape, for each floating entry.
        """
        return {"values": xp.take(xp.reshape(importance, (-1,)), code["positions"])}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """Zeros, with the values at their positions.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        flat = xp.tile(xp.zeros_like(code["values"][:1]), (math.prod(self.shape),))
        flat[code["positions"]] = code["values"]
        return xp.reshape(flat, self.shape)


def _largest(size: Float[np.ndarray, " count"], kept: int) -> Int64[np.ndarray, " kept"]:
    """The positions of so many largest entries, rising; of equal ones the first."""
    if kept == 0:
        return np.empty(0, np.int64)
    least = np.partition(size, len(size) - kept)[len(size) - kept]
    above = size > least
    above[np.flatnonzero(size == least)[: kept - int(np.count_nonzero(above))]] = True
    return np.flatnonzero(above)


def _damage(
    flat: Float[np.ndarray, " count"], importance: Float[np.ndarray, "rows cols"]
) -> Float[np.ndarray, " count"]:
    """``importance * w^2``; in double precision, and up to a factor, where it could overflow or vanish."""
    own = importance.reshape(-1)
    exponents = [math.frexp(max(float(a.max()), -float(a.min())))[1] for a in (flat, own)]
    if max(map(abs, exponents)) > _USUAL:
        own, flat = (a.astype(np.float64) / 2.0**e for a, e in zip((own, flat), exponents[::-1], strict=True))
    return own * flat * flat


def _place(flat: Any, first: int, balance: int, cols: int) -> Any:
    """Positions in the whole matrix of weights of one processing element (rows ``first``, ``first + balance``, ...)."""
    return (first + balance * (flat // cols)) * cols + flat % cols
