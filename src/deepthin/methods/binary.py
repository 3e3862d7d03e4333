"""A sum of a few signs for every weight, each sign times a scale of its row: multi-bit binary codes.

Greedy and refined codes as in Guo, Yao, Zhao and Chen, 2017, arXiv:1706.02021; alternating ones as in Xu et al., 2018,
arXiv:1802.00150, section 3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from numpy.random import Generator

from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import FLOAT_BITS, Array, Code, Integers, Namespace, Trains
from deepthin.methods import binary_rows

BITS = range(1, 9)
_USUAL = 40  # binary orders of magnitude, above 1 and below, of weights whose squares can be added up
_PIECE, _PIECES = 1 << 18, 16  # weights that are rounded at once, at least; pieces of a matrix, at most
ROUNDS = 2  # "two are enough" for two bits (Xu et al.); more are better from three on


@dataclass(frozen=True, slots=True)
class Binary:
    """``W[r, i] = sum over k of scales[r, k] * sign``, the sign +1 where bit k of ``symbols[r, i]`` is set, else -1.

    The optimiser updates float latents, which are encoded in every forward pass; the gradient passes through unchanged
    (straight-through estimator).
    """

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    planes: int  # number of signs for each weight
    rounds: int = ROUNDS  # 0: greedy; 1: greedy signs, least-squares scales; >= 2: alternating rounds
    per: str = "row"  # what shares scales: "row" or "matrix"

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        whole = (*self.shape, self.planes, self.rounds)
        fine = len(whole) == 4 and all(type(number) is int for number in whole) and min(self.shape) > 0
        if not fine or self.planes not in BITS or self.rounds < 0 or self.per not in ("matrix", "row"):
            raise ValueError(f"Binary cannot have {self.shape}, {self.planes!r}, {self.rounds!r}, {self.per!r}.")

    @classmethod
    def fit(
        cls, shape: tuple[int, int], max_bits: int, *, bits: Any = None, rounds: Any = ROUNDS, per: Any = "row"
    ) -> "Binary":
        """The most sign planes that fit, 1 to 8.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            bits: Number of sign planes, 1 to 8; None: as many as fit.
            rounds: 0: greedy codes; 1: greedy signs with least-squares scales (refined); from 2 on: that many rounds of
                the alternating algorithm (Xu et al., 2018, arXiv:1802.00150, section 3).
            per: ``"row"`` or ``"matrix"``: what has its own scales.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: Even ``bits`` planes, or one, do not fit; it carries the smallest possible size.
            ConfigError: An option is out of range.
        """
        if bits is not None and (type(bits) is not int or bits not in BITS):
            raise ConfigError(f"bits = {bits!r}: binary codes have {BITS[0]} to {BITS[-1]} bits a weight.")
        if per not in ("matrix", "row") or type(rounds) is not int or rounds < 0:
            raise ConfigError(f"per = {per!r}, rounds = {rounds!r}: give per 'matrix' or 'row', rounds from 0 on.")
        plans = [cls(shape, planes, rounds, per) for planes in (BITS if bits is None else [bits])]
        fitting = [plan for plan in plans if plan.bits() <= max_bits]
        if not fitting:
            least, area = plans[0].bits(), math.prod(shape)
            ratio = least / FLOAT_BITS / area
            raise BudgetError(
                f"Binary codes cannot store {shape[0]}x{shape[1]} in {max_bits} bits: {plans[0].planes} bits for each "
                f"weight, and the scales, need {least}. "
                + (f"Use ratio >= {round_up(ratio)}." if ratio <= 1 else "That is more than dense: keep it dense."),
                smallest_bits=least,
                smallest_ratio=ratio,
            )
        return fitting[-1]

    @property
    def trains(self) -> Trains:
        """Latents, which are rounded."""
        return "through"

    def bits(self) -> int:
        """One bit for each sign, and 32 for each scale.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        scales = self.planes * (self.shape[0] if self.per == "row" else 1)
        return 8 * self.integers()["symbols"].bytes(math.prod(self.shape)) + FLOAT_BITS * scales

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``symbols``: the signs of each weight as the bits of one integer; ``scales``: one column for each plane.

        Returns:
            Entry name -> shape.
        """
        return {"symbols": self.shape, "scales": (self.shape[0] if self.per == "row" else 1, self.planes)}

    def integers(self) -> dict[str, Integers]:
        """The symbols.

        Returns:
            Entry name -> range of its values.
        """
        return {"symbols": Integers(1 << self.planes)}

    def derived(self) -> Code:
        """No tables.

        Returns:
            An empty mapping.
        """
        return {}

    def drifts(self) -> bool:
        """True: encoding a decoded code again shrinks greedy codes, and may still improve alternating ones.

        Returns:
            True if encoding a decoded code may change it by more than floating-point rounding.
        """
        return True

    def decode_bytes(self, item_bytes: int) -> int:
        """The signs of a plane, and sums.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        return (8 + 4 * item_bytes) * math.prod(self.shape)

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The largest scale, for each plane.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        return self.planes * largest["scales"]

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
        return {**code, "scales": (code["scales"] * (std / spread)).astype(np.float32)}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Choose signs and scales of each row for a small squared error; alternating rounds approach a local minimum.

        No round raises the error of a row. The sign of 0 is +1; of two equally near sums the upper one is taken. A
        round costs ``planes`` table look-ups for each weight.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Not used.

        Returns:
            ``symbols``, rows x cols in int16, and ``scales``, rows x planes (one row if ``per`` is ``"matrix"``).
        """
        kind = weight.dtype
        if xp.finfo(kind).bits < 32:  # half precision is too coarse for sums over a row
            code = self.encode(xp.asarray(weight, dtype=xp.float32), xp)
            return {key: array if key == "symbols" else xp.asarray(array, dtype=kind) for key, array in code.items()}
        size = xp.amax(xp.amax(weight, 1), 0), -xp.amin(xp.amin(weight, 1), 0)
        size = xp.where(size[0] > size[1], *size)
        # Weights whose squares could not be added up are divided by the largest
        unusual = xp.where(size > 2.0**_USUAL, size, xp.where(size < 2.0**-_USUAL, size, xp.ones_like(size)))
        size = xp.where(unusual > 0, unusual, xp.ones_like(size))
        if binary_rows.is_taken(weight):
            rows = (weight if self.per == "row" else xp.reshape(weight, (1, -1))) / size
            symbols, scales = binary_rows.rounded(rows, self.planes, self.rounds, xp)
        elif self.per == "matrix":
            symbols, scales = self._rounded(xp.reshape(weight, (1, -1)) / size, xp)
        else:
            step = max(_PIECE // self.shape[1], -(-self.shape[0] // _PIECES), 1)  # rows do not depend on each other
            made = [self._rounded(weight[i : i + step] / size, xp) for i in range(0, self.shape[0], step)]
            symbols, scales = (xp.concatenate(list(each)) for each in zip(*made, strict=True))
        return {"symbols": xp.reshape(symbols, self.shape), "scales": scales * size}

    def _rounded(
        self, rows: Float[Array, "rows cols"], xp: Namespace
    ) -> tuple[Integer[Array, "rows cols"], Float[Array, "rows planes"]]:
        """Symbols and scales of each row."""
        symbols, scales = _one_by_one(rows, self.planes, False, xp)
        if self.rounds:
            scales = _best_scales(rows, symbols, self.planes, xp)
        if self.rounds > 1:
            other, others = _one_by_one(rows, self.planes, True, xp)
            for _ in range(self.rounds):
                others = _best_scales(rows, other, self.planes, xp)
                other = _nearest(rows, others, xp)
            better = (_errors(rows, other, others, xp) < _errors(rows, symbols, scales, xp))[:, None]
            symbols, scales = xp.where(better, other, symbols), xp.where(better, others, scales)
        return xp.asarray(symbols, dtype=xp.int16), scales

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """The signed sum of the scales: one multiplication for each sign.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        return _sums(code["symbols"], code["scales"], xp)


def _sums(
    symbols: Integer[Array, "rows cols"], scales: Float[Array, "own planes"], xp: Namespace
) -> Float[Array, "rows cols"]:
    """The sum over planes of scale times sign; ``own`` is rows, or 1 for one row of scales."""
    weight = _signed(symbols, scales, 0, xp)
    for k in range(1, scales.shape[1]):
        weight += _signed(symbols, scales, k, xp)
    return weight


def _signed(
    symbols: Integer[Array, "rows cols"], scales: Float[Array, "own planes"], k: int, xp: Namespace
) -> Float[Array, "rows cols"]:
    """The scale of plane k where bit k is set, else its negative."""
    scale = scales[:, k : k + 1]
    return xp.where((xp.bitwise_right_shift(symbols, k) & 1) > 0, scale, -scale)


def _signs(symbols: Integer[Array, "rows cols"], k: int, kind: Any, xp: Namespace) -> Float[Array, "rows cols"]:
    """+1 where bit k is set, else -1."""
    return 2 * xp.asarray(xp.bitwise_right_shift(symbols, k) & 1, dtype=kind) - 1


def _turned(a: Float[Array, "rows cols"], xp: Namespace) -> Float[Array, "cols rows"]:
    return xp.moveaxis(a, (1,), (0,))


def _errors(
    rows: Float[Array, "rows cols"],
    symbols: Integer[Array, "rows cols"],
    scales: Float[Array, "rows planes"],
    xp: Namespace,
) -> Float[Array, "rows"]:
    """Squared distances, summed over each row."""
    return xp.sum((rows - _sums(symbols, scales, xp)) ** 2, 1)


def _one_by_one(
    rows: Float[Array, "rows cols"], planes: int, refined: bool, xp: Namespace
) -> tuple[Integer[Array, "rows cols"], Float[Array, "rows planes"]]:
    """Greedy planes: each has the signs of the remaining error, and its mean magnitude as scale.

    ``refined``: before each next plane, all scales so far are replaced by the least-squares ones.
    """
    symbols = xp.asarray(rows >= 0, dtype=xp.int16)
    scales = xp.mean(abs(rows), 1)[:, None]
    for k in range(1, planes):
        left = rows - _sums(symbols, scales, xp)
        symbols = symbols + xp.asarray(left >= 0, dtype=xp.int16) * (1 << k)
        if refined:
            scales = _best_scales(rows, symbols, k + 1, xp)
        else:
            scales = _turned(xp.concatenate([_turned(scales, xp), xp.mean(abs(left), 1)[None, :]]), xp)
    return symbols, scales


def _best_scales(
    rows: Float[Array, "rows cols"], symbols: Integer[Array, "rows cols"], planes: int, xp: Namespace
) -> Float[Array, "rows planes"]:
    """Least-squares scales; those of least norm where the signs of two planes are equal or opposite in a whole row."""
    signs = xp.stack([_signs(symbols, k, rows.dtype, xp) for k in range(planes)], 1)
    gram = xp.matmul(signs, xp.moveaxis(signs, (2,), (1,)))
    inverse = xp.linalg.pinv(gram, rtol=16 * xp.finfo(rows.dtype).eps, hermitian=True)
    return xp.matmul(inverse, xp.matmul(signs, rows[:, :, None]))[:, :, 0]


def _nearest(
    rows: Float[Array, "rows cols"], scales: Float[Array, "rows planes"], xp: Namespace
) -> Integer[Array, "rows cols"]:
    """The symbol whose sum is nearest, by binary search: one comparison for each plane."""
    sums, planes = 0 * _turned(scales[:, :1], xp), scales.shape[1]
    for k in range(planes):  # bit k is set in the second half
        sums = xp.concatenate([sums - scales[:, k], sums + scales[:, k]])
    sums = _turned(sums, xp)
    order = xp.argsort(sums, stable=True)
    row = xp.cumsum(xp.ones_like(order[:, :1]), 0) - 1
    sums = xp.take(sums, order + row * (1 << planes))
    bounds = sums[:, :-1] / 2 + sums[:, 1:] / 2
    below = 0 * row  # number of bounds that are at most the weight
    for k in reversed(range(planes)):
        bound = xp.take(bounds, below + row * ((1 << planes) - 1) + ((1 << k) - 1))
        below = below + xp.asarray(rows >= bound, dtype=xp.int64) * (1 << k)
    return xp.asarray(xp.take(order, below + row * (1 << planes)), dtype=xp.int16)
