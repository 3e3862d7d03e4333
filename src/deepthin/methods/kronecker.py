"""A sum of Kronecker products: each block of the weight is a multiple of one small matrix, term by term.

The nearest such sum is a truncated SVD of the rearranged matrix: Van Loan and Pitsianis, 1993, "Approximation with
Kronecker products".
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from deepthin.errors import BudgetError, round_up
from deepthin.method import FLOAT_BITS, Array, Code, Integers, Namespace, Trains
from deepthin.methods.leading import leading, tame


@dataclass(frozen=True, slots=True)
class Kronecker:
    """``W = sum_t a[t] (x) b[t]``, cut to ``rows x cols``; a is terms x R1 x Q1, b is terms x R2 x Q2.

    R2 and Q2 are the least for which R1 R2 >= rows and Q1 Q2 >= cols.
    """

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    left: tuple[int, int]  # (R1, Q1)
    terms: int

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        sizes = (*self.shape, *self.left, self.terms)
        if len(sizes) != 5 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"Kronecker needs positive integers, got {self.shape}, {self.left}, {self.terms}.")
        if any(factor > side for factor, side in zip(self.left, self.shape, strict=True)):
            raise ValueError(f"Kronecker cannot have a left factor of {self.left} in a matrix of {self.shape}.")
        if self.terms > (most := min(math.prod(self.left), math.prod(self.right))):
            raise ValueError(f"Kronecker has {most} terms at most with these factors, not {self.terms}.")

    @property
    def right(self) -> tuple[int, int]:
        """(R2, Q2)."""
        return -(-self.shape[0] // self.left[0]), -(-self.shape[1] // self.left[1])

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int) -> "Kronecker":
        """The factor shapes with the smallest term, R1 and Q1 near sqrt(rows) and sqrt(cols), and as many terms as fit.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: One term does not fit; it carries the smallest possible size.
        """
        one = _smallest_term(shape)
        terms = min(max_bits // one.bits(), *(math.prod(side) for side in (one.left, one.right)))
        if terms == 0:
            ratio = one.bits() / FLOAT_BITS / math.prod(shape)
            raise BudgetError(
                f"A Kronecker sum cannot store {shape[0]}x{shape[1]} in {max_bits} bits: one term needs {one.bits()}. "
                + (f"Use ratio >= {round_up(ratio)}." if ratio <= 1 else "That is more than dense: keep it dense."),
                smallest_bits=one.bits(),
                smallest_ratio=ratio,
            )
        return cls(shape, one.left, terms)

    @property
    def trains(self) -> Trains:
        """The floats of both factors."""
        return "codes"

    def bits(self) -> int:
        """32 bits for each entry of both factors.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        return FLOAT_BITS * self.terms * (math.prod(self.left) + math.prod(self.right))

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``a``, terms x R1 x Q1, and ``b``, terms x R2 x Q2.

        Returns:
            Entry name -> shape.
        """
        return {"a": (self.terms, *self.left), "b": (self.terms, *self.right)}

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
        """The blocks of the matrix, as they are computed, as they lie in it, and cut to it.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        (r1, q1), (r2, q2) = self.left, self.right
        return item_bytes * (3 * r1 * r2 * q1 * q2 + self.terms * (r1 * q1 + r2 * q2))

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The product of the largest entries of both factors, for each term.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        return self.terms * largest["a"] * largest["b"]

    def init(self, rng: Generator, std: float) -> Code:
        """Normal factors of equal root mean square, such that the decoded weights have standard deviation ``std``.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        each = (std**2 / self.terms) ** 0.25
        code = {entry: rng.normal(size=shape) for entry, shape in self.code_shapes().items()}
        return {entry: (a * (each / np.sqrt(np.mean(a * a)))).astype(np.float32) for entry, a in code.items()}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Truncated SVD of the matrix whose rows are the blocks of the weight (Van Loan and Pitsianis, 1993).

        This minimises the squared error where R1 R2 = rows and Q1 Q2 = cols; otherwise it minimises that of the weight
        padded with zeros.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Not used: a weighted fit has no closed form.

        Returns:
            ``a``, terms x R1 x Q1, and ``b``, terms x R2 x Q2.
        """
        (r1, q1), (r2, q2) = self.left, self.right
        weight, size = tame(weight, xp)  # each factor takes the root of what is divided out
        down, across = r1 * r2 - self.shape[0], q1 * q2 - self.shape[1]
        if down:
            weight = xp.concatenate([weight, xp.tile(xp.zeros_like(weight[:1]), (down, 1))])
        if across:
            turned = weight.T
            weight = xp.concatenate([turned, xp.tile(xp.zeros_like(turned[:1]), (across, 1))]).T
        blocks = xp.moveaxis(xp.reshape(weight, (r1, r2, q1, q2)), (2,), (1,))
        u, sigma, vt = leading(xp.reshape(blocks, (r1 * q1, r2 * q2)), self.terms, xp)
        root, terms = xp.sqrt(sigma), self.terms
        balance = (math.prod(self.left) / math.prod(self.right)) ** 0.25
        a = (root * balance)[:, None] * u.T
        # A zero term keeps its b: with both factors at zero no gradient would reach it.
        b = (xp.where(root > 0, root, xp.ones_like(root)) / balance)[:, None] * vt
        return {"a": xp.reshape(a * size, (terms, r1, q1)), "b": xp.reshape(b * size, (terms, r2, q2))}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """The sum of Kronecker products: ``terms`` multiplications for each entry.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        (r1, q1), (r2, q2) = self.left, self.right
        a, b = xp.reshape(code["a"], (self.terms, -1)), xp.reshape(code["b"], (self.terms, -1))
        blocks = xp.moveaxis(xp.reshape(xp.matmul(xp.moveaxis(a, (1,), (0,)), b), (r1, q1, r2, q2)), (2,), (1,))
        return xp.reshape(blocks, (r1 * r2, q1 * q2))[: self.shape[0], : self.shape[1]]

    def cores(self, code: Code, xp: Namespace) -> list[Array]:
        """A tensor train of two cores, whose inner rank is the number of terms.

        Args:
            code: ``a`` and ``b``.
            xp: The namespace of the arrays.

        Returns:
            1 x R1 x Q1 x terms, and terms x R2 x Q2 x 1.
        """
        return [xp.moveaxis(code["a"], (0,), (2,))[None], code["b"][..., None]]

    def multiply(self, code: Code, x: Any, xp: Namespace) -> Any:
        """``x @ W.T`` by the factors, without computing the weight.

        Args:
            code: ``a`` and ``b``.
            x: Array, items x (Q1 Q2); columns from ``cols`` on are zeros.
            xp: The namespace of the arrays.

        Returns:
            Array, items x rows.
        """
        (r1, q1), (r2, q2), terms = self.left, self.right, self.terms
        by_b = xp.moveaxis(xp.reshape(code["b"], (terms * r2, q2)), (1,), (0,))
        inner = xp.matmul(xp.reshape(x, (-1, q2)), by_b)  # items q1 x terms r2
        inner = xp.moveaxis(xp.reshape(inner, (-1, q1, terms, r2)), (2,), (1,))  # items x terms x q1 x r2
        outer = xp.reshape(xp.moveaxis(code["a"], (1,), (0,)), (r1, terms * q1))
        y = xp.matmul(outer, xp.reshape(inner, (-1, terms * q1, r2)))  # items x r1 x r2
        return xp.reshape(y, (-1, r1 * r2))[:, : self.shape[0]]

    def inputs(self) -> int:
        """Columns that ``multiply`` takes.

        Returns:
            ``Q1 Q2``.
        """
        return self.left[1] * self.right[1]

    def summands(self) -> int:
        """Products that ``decode`` sums for each weight.

        Returns:
            ``terms``.
        """
        return self.terms

    def multiplies(self) -> int:
        """Cost of ``multiply``.

        Returns:
            Multiplications for one item.
        """
        (r1, q1), (r2, q2) = self.left, self.right
        return self.terms * q1 * r2 * (q2 + r1)


@functools.lru_cache
def _smallest_term(shape: tuple[int, int]) -> Kronecker:
    rows, cols = (range(max(1, math.isqrt(d) // 2), min(d, 2 * math.isqrt(d) + 1) + 1) for d in shape)
    plans = (Kronecker(shape, (r, q), 1) for r in rows for q in cols)
    return min(plans, key=lambda plan: (plan.bits(), sum(plan.left) + sum(plan.right), plan.left[1]))
