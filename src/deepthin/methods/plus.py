"""The sum of two codes: ``W = first + second``.

"Doping" (Thakker et al., 2021, arXiv:2102.07071) adds a sparse matrix to a structured one. Here the second code is that
of any method, or all weights (``Rest``), of which rate-aware training leaves few that are not zero.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import (
    FLOAT_BITS,
    STEPS_OF_SPREAD,
    Array,
    Bounded,
    Code,
    Integers,
    Method,
    Namespace,
    Trains,
)

NO_LIMIT = 1 << 62
_Value = TypeVar("_Value")

PREFIX = "plus_"  # of the second code's entries
SHARE = 0.25  # of the budget, for the second code
GAIN = 0.1  # weights over stored numbers: at the learning rate of factors these move as dense weights do
SMALL = 0.1  # standard deviation of the second code's weights at the start, over that of all


@dataclass(frozen=True, slots=True)
class Rest:
    """All weights, over ``GAIN``: for a sum whose floats are coded, which makes nearly all of these zero.

    Attributes:
        shape: (rows, cols).
    """

    shape: tuple[int, int]

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        if len(self.shape) != 2 or not all(type(side) is int and side > 0 for side in self.shape):
            raise ValueError(f"Rest needs positive integers, got {self.shape}.")

    @property
    def trains(self) -> Trains:
        """The weights."""
        return "codes"

    def bits(self) -> int:
        """32 bits for each weight.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        return FLOAT_BITS * math.prod(self.shape)

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``rest``: rows x cols.

        Returns:
            Entry name -> shape.
        """
        return {"rest": self.shape}

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
        """The weights.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        return item_bytes * math.prod(self.shape)

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The largest number, of which a weight is the tenth part (``GAIN``).

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        return largest["rest"]

    def init(self, rng: Generator, std: float) -> Code:
        """Normal weights.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        return {"rest": rng.normal(scale=std / GAIN, size=self.shape).astype(np.float32)}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """The weights over ``GAIN``.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Not used.

        Returns:
            ``rest``, rows x cols.
        """
        return {"rest": weight / GAIN}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """The numbers times ``GAIN``.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        return GAIN * code["rest"]


@dataclass(frozen=True, slots=True)
class Plus:
    """``W = first + second``; entries of the second code have the prefix ``plus_``.

    Attributes:
        first: The method of the first summand.
        second: The method of the second summand, of the same shape.

    Raises:
        ValueError: The shapes differ.
    """

    first: Method
    second: Method

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        if self.first.shape != self.second.shape:
            raise ValueError(f"Plus cannot add {self.second.shape} to {self.first.shape}.")

    @classmethod
    def fit(
        cls,
        first: Callable[[int], Method],
        second: Callable[[int], Method],
        max_bits: int,
        share: float = SHARE,
    ) -> "Plus":
        """Divide a budget between two methods.

        Args:
            first: Bits -> the method of the first summand that fits them.
            second: Bits -> that of the second; ``Rest``, whose size is known after training only, takes none.
            max_bits: Upper bound on ``bits()``; with ``Rest``, on those of the first.
            share: Fraction of ``max_bits`` for the second, above 0 and below 1; more or less where one would not fit.

        Returns:
            The sum.

        Raises:
            BudgetError: The smallest codes do not fit; it carries the smallest possible size.
            ConfigError: An option of either method is invalid.
        """

        def least(fit: Callable[[int], Method]) -> int:
            try:
                return fit(0).bits()
            except BudgetError as error:
                return error.smallest_bits

        if isinstance(rest := second(NO_LIMIT), Rest):
            return cls(first(max_bits), rest)
        one, other = least(first), least(second)
        if one + other > max_bits:
            ratio = (one + other) / FLOAT_BITS / math.prod(rest.shape)
            raise BudgetError(
                f"A sum of two codes cannot store {rest.shape[0]}x{rest.shape[1]} in {max_bits} bits: the smallest, "
                f"of {one} and {other}, need {one + other}. "
                + (f"Use ratio >= {round_up(ratio)}." if ratio <= 1 else "That is more than dense: keep it dense."),
                smallest_bits=one + other,
                smallest_ratio=ratio,
            )
        for_second = min(max(math.floor(share * max_bits), other), max_bits - one)
        small = second(for_second)
        return cls(first(max_bits - small.bits()), small)

    @property
    def trains(self) -> Trains:
        """The floats of both codes."""
        return "codes"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the dense matrix."""
        return self.first.shape

    def bits(self) -> int:
        """The bits of both codes.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        return self.first.bits() + self.second.bits()

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """The entries of both codes.

        Returns:
            Entry name -> shape.
        """
        return self.first.code_shapes() | _prefixed(self.second.code_shapes())

    def integers(self) -> dict[str, Integers]:
        """The integers of both codes.

        Returns:
            Entry name -> range of its values.
        """
        return self.first.integers() | _prefixed(self.second.integers())

    def derived(self) -> Code:
        """The tables of both methods.

        Returns:
            Entry name -> NumPy array; empty if there is none.
        """
        return self.first.derived() | _prefixed(self.second.derived())

    def decode_bytes(self, item_bytes: int) -> int:
        """What both methods take, and the sum; of a method that does not say, 128 bytes for each weight.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        area = math.prod(self.shape)
        both = (self.first, self.second)
        return item_bytes * area + sum(
            m.decode_bytes(item_bytes) if isinstance(m, Bounded) else 128 * area for m in both
        )

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The sum of both bounds; infinity where one method does not say.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        pairs = zip((self.first, self.second), _parted(largest), strict=True)
        return sum(m.largest_weight(own) if isinstance(m, Bounded) else math.inf for m, own in pairs)

    def init(self, rng: Generator, std: float) -> Code:
        """Draw both; the second has a tenth of the standard deviation, or, of ``Rest``, is zero.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        if isinstance(self.second, Rest):
            return self.first.init(rng, std) | _prefixed({"rest": np.zeros(self.shape, np.float32)})
        first = self.first.init(rng, std * math.sqrt(1 - SMALL**2))
        return first | _prefixed(self.second.init(rng, std * SMALL))

    def start_of_steps(self, code: Code, xp: Namespace) -> Code:
        """Numbers by which the first step of a rest of zeros is chosen: it is as large as the first code's weights.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Entry name -> array of its shape; empty for other methods than ``Rest``.
        """
        if not isinstance(self.second, Rest):
            return {}
        rest = code[f"{PREFIX}rest"]
        used = xp.amax(xp.reshape(abs(rest), (1, -1)), -1)[:, None] > 0
        likely = self.first.decode(_parted(code)[0], xp) * (STEPS_OF_SPREAD / GAIN)
        return {f"{PREFIX}rest": xp.where(used, rest, likely)}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Encode by the first method, and what that leaves by the second.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Array, rows x cols, entries >= 0: the weight of each squared error; None weighs all equally.

        Returns:
            The entries of both codes.
        """
        first = self.first.encode(weight, xp, importance)
        tables = {entry: xp.asarray(table) for entry, table in self.first.derived().items()}
        left = weight - self.first.decode(first | tables, xp)
        return first | _prefixed(self.second.encode(left, xp, importance))

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """Decode both and add them.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        first, second = _parted(code)
        return self.first.decode(first, xp) + self.second.decode(second, xp)


def check_share(share: object, where: str) -> None:
    """Refuse an invalid share of the second code.

    Args:
        share: What a user gave.
        where: What messages call the place in the configuration.

    Raises:
        ConfigError: It is no number above 0 and below 1.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise ConfigError(
            f"{where} share = {share!r}: give the second code's fraction of the bytes, above 0 and below 1."
        )


def _prefixed(entries: Mapping[str, _Value]) -> dict[str, _Value]:
    return {f"{PREFIX}{entry}": value for entry, value in entries.items()}


def _parted(entries: Mapping[str, _Value]) -> tuple[dict[str, _Value], dict[str, _Value]]:
    """The entries of the first code, and those of the second without the prefix."""
    first = {entry: value for entry, value in entries.items() if not entry.startswith(PREFIX)}
    second = {e.removeprefix(PREFIX): value for e, value in entries.items() if e.startswith(PREFIX)}
    return first, second
