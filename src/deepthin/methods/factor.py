"""DeepThin: the product of two small factors, reshaped row by row into the weight so that its symmetry breaks.

Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, sections 2 and 3. The same class is the paper's two baselines: with ``n
= cols`` the reshape changes nothing and a plain rank factorisation remains; with a seed the entries are shuffled.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from deepthin.coding.bits import permutation
from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import FLOAT_BITS, Array, Code, Integers, Method, Namespace, Trains
from deepthin.methods.leading import leading, tame


@dataclass(frozen=True, slots=True)
class Factor:
    """The weight is ``(xf @ wf)``, flattened, cut to ``rows * cols`` entries and viewed as ``rows x cols``.

    ``xf`` (the paper's X_f) is m x r and ``wf`` (its W_f) is r x n, with ``m = ceil(rows * cols / n)``: the paper's
    column-major write of a (fan-in x outputs) matrix is this plain view in torch's (outputs, inputs) layout. If n and
    the fan-in ``cols`` have no common divisor, every row of the weight starts at another phase of ``wf`` and the
    weight can have full rank although r is 1; see docs/theory.md.
    """

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    n: int  # columns of the auxiliary matrix
    rank: int  # r, the inner dimension of the product
    seed: int | None = None  # None: laid out in order; an integer: scattered by the permutation that it draws

    def __post_init__(self) -> None:
        """Refuse invalid fields, as a damaged file may have, with ValueError."""
        sizes = (*self.shape, self.n, self.rank)
        if len(sizes) != 4 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"Factor needs positive integers, got shape={self.shape}, n={self.n}, rank={self.rank}.")
        if not (self.seed is None or type(self.seed) is int):
            raise ValueError(f"Factor needs an integer seed or none, got {self.seed!r}.")

    @property
    def m(self) -> int:
        """Rows of the auxiliary matrix: ``ceil(rows * cols / n)``."""
        return -(-self.shape[0] * self.shape[1] // self.n)

    @classmethod
    def fit(
        cls,
        shape: tuple[int, int],
        max_bits: int,
        *,
        rank: Any = 1,
        n: Any = "coprime",
        seed: Any = None,
    ) -> "Factor":
        """Choose the smallest n that is coprime with ``cols`` and satisfies ``32 r (m + n) <= max_bits``.

        Of the two roots of ``r n^2 - budget n + r rows cols = 0`` the small one is taken, since the product then reuses
        each partial sum most often.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            rank: r, an integer >= 1, or ``"max"``, the largest r that fits.
            n: ``"coprime"`` as above; ``"fan-in"``, n = cols, a plain rank factorisation; or an integer, taken as it
                is.
            seed: None: entries in order; an integer: entries scattered by the permutation drawn from it.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: No plan of this rank fits; it carries the smallest possible size.
            ConfigError: An option is out of range.
        """
        if rank != "max" and (type(rank) is not int or rank < 1):
            raise ConfigError(f"rank = {rank!r} is not a rank: give a positive integer or 'max'.")
        if n not in ("coprime", "fan-in") and (type(n) is not int or n < 1):
            raise ConfigError(f"n = {n!r} is not a width: give 'coprime', 'fan-in' or a positive integer.")
        if seed is not None and type(seed) is not int:
            raise ConfigError(f"seed = {seed!r} is not a seed: give an integer.")
        floats = max_bits // FLOAT_BITS
        if n == "coprime":
            plan = _coprime_plan(shape, floats, rank)
        else:
            plan = _fixed_plan(shape, floats, rank, shape[1] if n == "fan-in" else n)
        if plan is not None:
            return cls(shape, *plan, seed)

        least_rank = 1 if rank == "max" else rank
        smallest = cls(
            shape, _squarest(shape) if n == "coprime" else shape[1] if n == "fan-in" else n, least_rank, seed
        )
        ratio = smallest.bits() / (FLOAT_BITS * shape[0] * shape[1])
        name = "Rank factorisation" if n == "fan-in" else "DeepThin" if seed is None else "DeepThin-shuffled"
        raise BudgetError(
            f"{name} cannot store {shape[0]}x{shape[1]} in {max_bits} bits: the smallest plan (m={smallest.m}, "
            f"n={smallest.n}, r={least_rank}) needs {smallest.bits()}. "
            + (f"Use ratio >= {round_up(ratio)}" if ratio <= 1 else "That is more than dense: keep it dense")
            + (" or a smaller rank." if least_rank > 1 else "."),
            smallest_bits=smallest.bits(),
            smallest_ratio=ratio,
        )

    @property
    def trains(self) -> Trains:
        """The floats of both factors."""
        return "codes"

    def bits(self) -> int:
        """32 bits for each entry of the two factors.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        return FLOAT_BITS * self.rank * (self.m + self.n)

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``xf`` is m x r, ``wf`` is r x n.

        Returns:
            Entry name -> shape.
        """
        return {"xf": (self.m, self.rank), "wf": (self.rank, self.n)}

    def integers(self) -> dict[str, Integers]:
        """No integers.

        Returns:
            An empty mapping.
        """
        return {}

    def derived(self) -> Code:
        """The permutation of the shuffled baseline; nothing otherwise.

        Returns:
            Entry name -> NumPy array; empty if there is none.
        """
        return {} if self.seed is None else {"order": permutation(self.seed, self.shape[0] * self.shape[1])}

    def decode_bytes(self, item_bytes: int) -> int:
        """The product of the factors; of a shuffled matrix, the permutation too, in 64 bits, while it is sorted.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        area, product = math.prod(self.shape), item_bytes * self.m * self.n
        return product if self.seed is None else max(32 * area, product + (8 + item_bytes) * area)

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """r times the product of the largest entries of both factors.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        return self.rank * largest["xf"] * largest["wf"]

    def init(self, rng: Generator, std: float) -> Code:
        """Both factors normal, scaled to a root mean square of exactly ``(std^2 / r)^(1/4)``.

        Without the scaling a wf of few entries would put the spread of all weights to chance.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        each = (std**2 / self.rank) ** 0.25
        code = {entry: rng.normal(size=shape) for entry, shape in self.code_shapes().items()}
        return {entry: (a * (each / np.sqrt(np.mean(a * a)))).astype(np.float32) for entry, a in code.items()}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Truncated SVD of the auxiliary m x n matrix, scaled so that both factors have entries of similar size.

        Where n does not divide ``rows * cols``, the last row is incomplete: the SVD is that of the complete rows, and
        the last row gets least-squares coefficients. Encoding a decoded weight gives that weight again. Costs one SVD
        of m x n, of which ``rank`` vectors are computed (``deepthin.methods.leading``).

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Array, rows x cols, entries >= 0. A weighted low-rank fit has no closed form, so only this is
                used: in a plain rank factorisation, rows without importance get least-squares coefficients for the
                projection fitted to the others (Lee et al., 2018, arXiv:1810.12823, eq. 5).

        Returns:
            ``xf``, m x r, and ``wf``, r x n.
        """
        if importance is not None and self.seed is None and self.n == self.shape[1]:
            rows = np.flatnonzero(np.asarray(xp.sum(importance, 1)))
            if 0 < rows.size < self.shape[0]:
                wf = type(self)((rows.size, self.n), self.n, self.rank).encode(weight[rows], xp)["wf"]
                return {"xf": xp.matmul(weight, xp.linalg.pinv(wf)), "wf": wf}
        weight, size = tame(weight, xp)  # each factor takes the root of what is divided out
        flat = xp.reshape(weight, (-1,))
        if self.seed is not None:
            flat, scattered = xp.zeros_like(flat), flat
            flat[xp.asarray(self.derived()["order"])] = scattered
        complete = flat.shape[0] // self.n
        tail = flat[complete * self.n :]
        padded = tail.shape[0] > 0 and complete < self.rank  # too few complete rows to span the rank
        if padded:
            flat = xp.concatenate([flat, 0 * flat[: self.n * (complete + 1) - flat.shape[0]]])
            complete += 1
        u, sigma, vt = leading(xp.reshape(flat[: complete * self.n], (complete, self.n)), self.rank, xp)
        root = xp.sqrt(sigma)
        balance = (self.m / self.n) ** 0.25
        left = (root * balance)[:, None] * u.T
        # A zero term keeps its wf: with both factors at zero no gradient would reach it.
        wf = (xp.where(root > 0, root, xp.ones_like(root)) / balance)[:, None] * vt
        for _ in range(self.rank - left.shape[0]):  # more terms than a matrix of this shape can use
            left, wf = xp.concatenate([left, 0 * left[:1]]), xp.concatenate([wf, wf[:1]])
        xf = left.T
        if tail.shape[0] > 0 and not padded:
            last = xp.matmul(tail[None, :], xp.linalg.pinv(wf[:, : tail.shape[0]]))
            xf = xp.concatenate([xf, last])
        return {"xf": xf * size, "wf": wf * size}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """The product of the factors, reshaped: ``r m n`` multiplications.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        return xp.reshape(self.decode_flat(code, 0, self.shape[0] * self.shape[1], xp), self.shape)

    def decode_flat(self, code: Code, start: int, stop: int, xp: Namespace) -> Float[Array, "entries"]:
        """Entries ``start`` to ``stop`` (excluded) of the flattened weight; with a seed, at the cost of all entries.

        Args:
            code: Stored entries and those of ``derived``.
            start: First entry, >= 0.
            stop: Entry after the last, at most ``rows * cols``.
            xp: The namespace of the arrays.

        Returns:
            Array of ``stop - start`` entries.
        """
        if self.seed is not None:
            whole = self._laid_out(code, 0, self.shape[0] * self.shape[1], xp)
            return xp.take(whole, code["order"])[start:stop]
        return self._laid_out(code, start, stop, xp)

    def window(self, start: int, shape: tuple[int, int]) -> "Window | None":
        """The part of the factors that generates one matrix of a group.

        Args:
            start: First entry of that matrix in the flattened weight.
            shape: (rows, cols) of that matrix.

        Returns:
            The window; None if the entries are scattered by a seed.
        """
        if self.seed is not None:
            return None
        first, stop = start // self.n, -(-(start + shape[0] * shape[1]) // self.n)
        return Window(Factor(shape, self.n, self.rank), first, stop, start - first * self.n)

    def _laid_out(self, code: Code, start: int, stop: int, xp: Namespace) -> Float[Array, "entries"]:
        """Entries of the auxiliary matrix, row by row."""
        first = start // self.n
        rows = code["xf"][first : -(-stop // self.n)]
        return xp.reshape(xp.matmul(rows, code["wf"]), (-1,))[start - first * self.n : stop - first * self.n]


class Window(NamedTuple):
    """One matrix within a reshaped product of two factors, as the kernels take it."""

    plan: Factor  # of the matrix by itself, were it to begin at entry ``offset``
    first: int  # row of ``xf`` in which it begins
    stop: int  # row of ``xf`` after the last one
    offset: int  # entries of the first row, ``offset < n``, that come before it

    @property
    def is_rank(self) -> bool:
        """Whether n is the fan-in: without an offset, a plain rank factorisation."""
        return self.plan.n == self.plan.shape[1]

    @property
    def rows(self) -> int:
        """R: outputs of the matrix."""
        return self.plan.shape[0]

    @property
    def cols(self) -> int:
        """Q: its fan-in."""
        return self.plan.shape[1]

    @property
    def n(self) -> int:
        """Columns of ``wf``."""
        return self.plan.n

    @property
    def rank(self) -> int:
        """r: columns of ``xf``."""
        return self.plan.rank

    @property
    def taps(self) -> int:
        """S: consecutive rows of ``xf`` that an output reads."""
        return -(-(self.cols + self.n - 1) // self.n)

    @property
    def depth(self) -> int:
        """K: outputs that begin at the same phase, the last ones perhaps past the end."""
        return -(-self.rows // self.n)

    @property
    def read(self) -> int:
        """Numbers of ``xf`` that all outputs read, each as often as it is read."""
        return self.n * self.depth * self.taps * self.rank


@runtime_checkable
class Factored(Method, Protocol):
    """A method whose matrices are ranges of the reshaped product of its entries ``xf`` (m x r) and ``wf`` (r x n)."""

    def window(self, start: int, shape: tuple[int, int]) -> Window | None:
        """The part of the factors that generates one matrix of a group.

        Args:
            start: First entry of that matrix in the flattened weight.
            shape: (rows, cols) of that matrix.

        Returns:
            The window; None if the entries are scattered.
        """
        ...


def _coprime_plan(shape: tuple[int, int], floats: int, rank: int | Literal["max"]) -> tuple[int, int] | None:
    """(n, r) with the smallest n coprime with the fan-in, or None."""
    area = shape[0] * shape[1]
    if rank == "max":
        largest = int(floats / (2 * math.sqrt(area)))
        return next((plan for r in range(largest, 0, -1) if (plan := _coprime_plan(shape, floats, r))), None)
    discriminant = floats**2 - 4 * rank**2 * area
    if discriminant < 0:
        return None
    n_small, n_large = ((floats + sign * math.sqrt(discriminant)) / (2 * rank) for sign in (-1, 1))
    for n in range(max(1, math.floor(n_small)), math.ceil(n_large) + 1):
        m = -(-area // n)
        if math.gcd(n, shape[1]) == 1 and rank * (m + n) <= floats:
            return n, rank
    return None


def _fixed_plan(shape: tuple[int, int], floats: int, rank: int | Literal["max"], n: int) -> tuple[int, int] | None:
    """(n, r) for an n that is given, or None."""
    m = -(-shape[0] * shape[1] // n)
    if rank == "max":
        rank = min(floats // (m + n), m, n)
    return (n, rank) if rank > 0 and rank * (m + n) <= floats else None


def _squarest(shape: tuple[int, int]) -> int:
    """The n, coprime with the fan-in, of the smallest rank-1 plan: near the square root of the number of weights."""
    area = shape[0] * shape[1]
    root = max(math.isqrt(area), 1)
    best_n, best = 1, area + 1
    for distance in range(root + 1):
        if root + distance + area / (root + distance) >= best:  # a lower bound that grows with the distance
            break
        for n in (root - distance, root + distance):
            if n >= 1 and math.gcd(n, shape[1]) == 1 and n - (-area // n) < best:
                best_n, best = n, n - (-area // n)
    return best_n
