"""Tensor train: the weight as a chain of small cores, one for each pair of factors of its two dimensions.

Novikov, Podoprikhin, Osokin and Vetrov, 2015, "Tensorizing neural networks"; cores by TT-SVD, Oseledets, 2011.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import FLOAT_BITS, Array, Code, Integers, Namespace, Trains
from deepthin.methods.leading import leading, tame

ORDERS = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class TensorTrain:
    """``W[(i1..id), (j1..jd)] = g1[:, i1, j1] .. gd[:, id, jd]``, a product of d matrices, cut to rows x cols.

    Core k is r_(k-1) x R_k x Q_k x r_k, where r_k is ``rank``, or the largest useful rank if that is less, and 1 at
    both ends.
    """

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    rows: tuple[int, ...]  # R_k, whose product is at least rows
    cols: tuple[int, ...]  # Q_k
    rank: int

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        sizes = (*self.shape, *self.rows, *self.cols, self.rank)
        fine = len(self.shape) == 2 and len(self.rows) == len(self.cols) and len(self.rows) in ORDERS
        if not fine or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"TensorTrain cannot have {self.shape}, {self.rows}, {self.cols}, rank {self.rank}.")
        if any(math.prod(f) < d for f, d in zip((self.rows, self.cols), self.shape, strict=True)):
            raise ValueError(f"{self.rows} and {self.cols} are too small for a matrix of {self.shape}.")
        if any(math.prod(f) >= 2 * d for f, d in zip((self.rows, self.cols), self.shape, strict=True)):
            raise ValueError(f"{self.rows} and {self.cols} are too large for a matrix of {self.shape}.")
        sides, half = [r * q for r, q in zip(self.rows, self.cols, strict=True)], len(self.rows) // 2
        if self.rank > (most := max(math.prod(sides[:half]), math.prod(sides[half:]))):
            raise ValueError(f"TensorTrain has a rank of {most} at most with these factors, not {self.rank}.")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks r_0 to r_d."""
        sides = [r * q for r, q in zip(self.rows, self.cols, strict=True)]
        within = (min(self.rank, math.prod(sides[:k]), math.prod(sides[k:])) for k in range(1, len(sides)))
        return (1, *within, 1)

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int, *, order: Any = 3) -> "TensorTrain":
        """``order`` near-equal factors of both dimensions, and the largest rank that fits.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            order: Number of cores: 2, 3 or 4.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: Rank 1 does not fit; it carries the smallest possible size.
            ConfigError: ``order`` is not 2, 3 or 4.
        """
        if order not in ORDERS:
            raise ConfigError(f"order = {order!r}: a tensor train here has {', '.join(map(str, ORDERS))} cores.")
        factors = near_equal(shape[0], order), near_equal(shape[1], order)[::-1]  # large with small: similar cores
        low, high = 0, math.prod(factors[0][: order // 2]) * math.prod(factors[1][: order // 2]) + 1
        high = max(high, math.prod(factors[0][order // 2 :]) * math.prod(factors[1][order // 2 :]) + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cls(shape, *factors, middle).bits() <= max_bits else (low, middle)
        if low == 0:
            least = cls(shape, *factors, 1).bits()
            ratio = least / FLOAT_BITS / math.prod(shape)
            raise BudgetError(
                f"A tensor train cannot store {shape[0]}x{shape[1]} in {max_bits} bits: rank 1 needs {least}. "
                + (f"Use ratio >= {round_up(ratio)}." if ratio <= 1 else "That is more than dense: keep it dense."),
                smallest_bits=least,
                smallest_ratio=ratio,
            )
        return cls(shape, *factors, low)

    @property
    def trains(self) -> Trains:
        """The floats of the cores."""
        return "codes"

    def bits(self) -> int:
        """32 bits for each entry of the cores.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        return FLOAT_BITS * sum(math.prod(core) for core in self.code_shapes().values())

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``core0`` to ``core{d-1}``.

        Returns:
            Entry name -> shape.
        """
        ranks = self.ranks
        return {
            f"core{k}": (ranks[k], r, q, ranks[k + 1])
            for k, (r, q) in enumerate(zip(self.rows, self.cols, strict=True))
        }

    def integers(self) -> dict[str, Integers]:
        """No integers.

        Returns:
            An empty mapping.
        """
        return {}

    def derived(self) -> Code:
        """No tables.

        Returns:
            An empty mapping.
        """
        return {}

    def decode_bytes(self, item_bytes: int) -> int:
        """The products of the first cores, two at a time, or the whole, its copy in another order, and that cut.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        sides = [r * q for r, q in zip(self.rows, self.cols, strict=True)]
        products = [math.prod(sides[: k + 1]) * rank for k, rank in enumerate(self.ranks[1:])]
        return 3 * item_bytes * max(products)

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The product of the largest entries of the cores, times the inner ranks.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        return math.prod((*self.ranks, *(largest[core] for core in self.code_shapes())))

    def init(self, rng: Generator, std: float) -> Code:
        """Normal cores of equal root mean square, such that the decoded weights have standard deviation ``std``.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        each = (std**2 / math.prod(self.ranks)) ** (0.5 / len(self.rows))
        code = {entry: rng.normal(size=shape) for entry, shape in self.code_shapes().items()}
        return {entry: (a * (each / np.sqrt(np.mean(a * a)))).astype(np.float32) for entry, a in code.items()}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """TT-SVD: one truncated SVD after another (Oseledets, 2011).

        The error, in the Frobenius norm of the weight padded with zeros, is at most sqrt(d - 1) times the least.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Not used: a weighted fit has no closed form.

        Returns:
            ``core0`` to ``core{d-1}``, scaled to equal root mean squares unless the weight is zero.
        """
        weight, root = tame(weight, xp)
        down, across = math.prod(self.rows) - self.shape[0], math.prod(self.cols) - self.shape[1]
        if down:
            weight = xp.concatenate([weight, xp.tile(xp.zeros_like(weight[:1]), (down, 1))])
        if across:
            turned = weight.T
            weight = xp.concatenate([turned, xp.tile(xp.zeros_like(turned[:1]), (across, 1))]).T
        order, ranks = len(self.rows), self.ranks
        rest = xp.moveaxis(
            xp.reshape(weight, (*self.rows, *self.cols)),
            tuple(range(order, 2 * order)),
            tuple(range(1, 2 * order, 2)),
        )
        code: Code = {}
        for k in range(order - 1):
            rest = xp.reshape(rest, (ranks[k] * self.rows[k] * self.cols[k], -1))
            u, sigma, vt = leading(rest, ranks[k + 1], xp)
            code[f"core{k}"] = xp.reshape(u, self.code_shapes()[f"core{k}"])
            rest = sigma[:, None] * vt
        last = f"core{order - 1}"
        code[last] = xp.reshape(rest, self.code_shapes()[last])
        # Equal norms of all cores, so that one learning rate suits them; a last core of zeros is left as it is.
        size = {entry: xp.sqrt((a * a).mean()) for entry, a in code.items()}
        whole = math.prod(float(s) for s in size.values()) ** (1 / order) * root ** (2 / order)
        return {entry: a * (whole / size[entry]) for entry, a in code.items()} if whole > 0 else code

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """The product of the cores, from left to right.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        order, whole = len(self.rows), xp.reshape(code["core0"], (-1, self.ranks[1]))
        for k in range(1, order):
            core = xp.reshape(code[f"core{k}"], (self.ranks[k], -1))
            whole = xp.reshape(xp.matmul(whole, core), (-1, self.ranks[k + 1]))
        pairs = tuple(itertools.chain.from_iterable(zip(self.rows, self.cols, strict=True)))
        whole = xp.moveaxis(xp.reshape(whole, pairs), tuple(range(0, 2 * order, 2)), tuple(range(order)))
        return xp.reshape(whole, (math.prod(self.rows), math.prod(self.cols)))[: self.shape[0], : self.shape[1]]

    def cores(self, code: Code, xp: Namespace) -> list[Array]:
        """The code itself.

        Args:
            code: ``core0`` to ``core{d-1}``.
            xp: Not used.

        Returns:
            The cores in order.
        """
        return [code[core] for core in self.code_shapes()]

    def multiply(self, code: Code, x: Any, xp: Namespace) -> Any:
        """``x @ W.T`` core by core, without computing the weight.

        Args:
            code: The cores.
            x: Array, items x prod(Q_k); columns from the matrix's width on are zeros.
            xp: The namespace of the arrays.

        Returns:
            Array, items x rows of the matrix.
        """
        items, done = x.shape[0], 1
        ranks, rest = self.ranks, math.prod(self.cols)
        for k, (r, q) in enumerate(zip(self.rows, self.cols, strict=True)):
            rest //= q
            x = xp.moveaxis(xp.reshape(x, (items, done, ranks[k], q, rest)), (4,), (2,))
            core = xp.moveaxis(code[f"core{k}"], (1,), (2,))  # r_(k-1) x Q_k x R_k x r_k
            y = xp.matmul(xp.reshape(x, (-1, ranks[k] * q)), xp.reshape(core, (ranks[k] * q, -1)))
            x = xp.moveaxis(xp.reshape(y, (items, done, rest, r, ranks[k + 1])), (2,), (4,))
            done *= r
        return xp.reshape(x, (items, done))[:, : self.shape[0]]

    def inputs(self) -> int:
        """Columns that ``multiply`` takes.

        Returns:
            ``prod(Q_k)``.
        """
        return math.prod(self.cols)

    def summands(self) -> int:
        """Products that ``decode`` sums for each weight.

        Returns:
            ``rank``.
        """
        return self.rank

    def multiplies(self) -> int:
        """Cost of ``multiply``.

        Returns:
            Multiplications for one item.
        """
        total, done, rest, ranks = 0, 1, math.prod(self.cols), self.ranks
        for k, (r, q) in enumerate(zip(self.rows, self.cols, strict=True)):
            rest //= q
            total += done * rest * ranks[k] * q * r * ranks[k + 1]
            done *= r
        return total


@lru_cache(maxsize=1024)
def near_equal(dimension: int, order: int) -> tuple[int, ...]:
    """Near-equal factors of a dimension.

    Args:
        dimension: Positive integer.
        order: Number of factors.

    Returns:
        Rising factors, near the ``order``-th root, with the smallest product that is at least ``dimension``.
    """
    root = dimension ** (1 / order)
    near = range(max(1, math.floor(root / 2)), math.ceil(root * 2) + 1)
    best: tuple[int, int, tuple[int, ...]] = (1 << 62, 0, ())
    for first in itertools.combinations_with_replacement(near, order - 1):
        last = -(-dimension // math.prod(first))
        if last in near:
            factors = tuple(sorted((*first, last)))
            best = min(best, (math.prod(factors), sum(factors), factors))
    return best[2]
