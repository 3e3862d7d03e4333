"""Uniform quantisation: one symbol of a few bits for each weight, and a step that is computed or learned.

``Uniform``: linear quantisation as in ESE (Han et al., 2017, arXiv:1612.00694, section 3), one step for the matrix or
one for each row. ``Coded``: one step, learned as in LSQ (Esser et al., 2020, arXiv:1902.08153), in a training that adds
the code length of the symbols to the loss (entropy-penalised reparametrisation: Oktay et al., 2020, arXiv:1906.06624).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import FLOAT_BITS, STEPS_OF_SPREAD, Array, Code, Integers, Namespace, Trains

BITS = range(2, 17)
MANTISSA_BITS = 8  # of a learned step, as in bfloat16, so that a file stores it in two bytes


@dataclass(frozen=True, slots=True)
class Uniform:
    """``W = step * symbol``, symbols from -(2^(b-1) - 1) to 2^(b-1) - 1; affine: ``least + step * symbol``, from 0 on.

    The step follows from the largest magnitude (affine: from the range) of the matrix or of each row. The optimiser
    updates float latents, which are rounded in every forward pass with a newly computed step; the gradient passes
    through unchanged (straight-through estimator).
    """

    shape: tuple[int, int]  # (rows, cols) of the dense matrix
    width: int  # bits of a symbol
    per: str = "matrix"  # what shares a step: "matrix" or "row"
    affine: bool = False

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        fine = len(self.shape) == 2 and all(type(d) is int and d > 0 for d in self.shape) and type(self.width) is int
        if not fine or self.width not in BITS or self.per not in ("matrix", "row") or type(self.affine) is not bool:
            raise ValueError(f"Uniform cannot have {self.shape}, {self.width!r}, {self.per!r}, {self.affine!r}.")

    @classmethod
    def fit(
        cls,
        shape: tuple[int, int],
        max_bits: int,
        *,
        bits: Any = None,
        per: Any = "matrix",
        affine: Any = False,
    ) -> "Uniform":
        """The most bits for each weight, 2 to 16, that fit.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            bits: Bits of a symbol, 2 to 16; None: as many as fit.
            per: ``"matrix"`` or ``"row"``: what has its own step.
            affine: False: symbols symmetric about 0; True: symbols from 0 on, added to the least value.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: Even ``bits`` bits for each weight, or two, do not fit; it carries the smallest possible size.
            ConfigError: An option is out of range.
        """
        if bits is not None and (type(bits) is not int or bits not in BITS):
            raise ConfigError(f"bits = {bits!r}: uniform quantisation has {BITS[0]} to {BITS[-1]} bits a weight.")
        if per not in ("matrix", "row") or type(affine) is not bool:
            raise ConfigError(f"per = {per!r}, affine = {affine!r}: give per 'matrix' or 'row', affine true or false.")
        widths = BITS if bits is None else [bits]
        fitting = [plan for width in widths if (plan := cls(shape, width, per, affine)).bits() <= max_bits]
        if not fitting:
            least, area = cls(shape, widths[0], per, affine).bits(), math.prod(shape)
            ratio = least / FLOAT_BITS / area
            raise BudgetError(
                f"Uniform quantisation cannot store {shape[0]}x{shape[1]} in {max_bits} bits: {widths[0]} bits for "
                f"each weight need {least}. "
                + (f"Use ratio >= {round_up(ratio)}." if ratio <= 1 else "That is more than dense: keep it dense."),
                smallest_bits=least,
                smallest_ratio=ratio,
            )
        return fitting[-1]

    def top(self) -> int:
        """The largest symbol.

        Returns:
            ``2^width - 1`` if affine, else ``2^(width - 1) - 1``.
        """
        return (1 << self.width) - 1 if self.affine else (1 << (self.width - 1)) - 1

    @property
    def trains(self) -> Trains:
        """Latents, which are rounded."""
        return "through"

    def bits(self) -> int:
        """``width`` bits for each weight, 32 for each step and, if affine, 32 for each least value.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        steps = self.shape[0] if self.per == "row" else 1
        return 8 * self.integers()["symbols"].bytes(math.prod(self.shape)) + FLOAT_BITS * steps * (1 + self.affine)

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``symbols``: one for each weight; ``step``, and ``least`` if affine: rows x 1, or 1 x 1.

        Returns:
            Entry name -> shape.
        """
        steps = (self.shape[0] if self.per == "row" else 1, 1)
        return {"symbols": self.shape, "step": steps} | ({"least": steps} if self.affine else {})

    def integers(self) -> dict[str, Integers]:
        """The symbols.

        Returns:
            Entry name -> range of its values.
        """
        return {"symbols": Integers(self.top() + 1) if self.affine else Integers(2 * self.top() + 1, -self.top())}

    def derived(self) -> Code:
        """No tables.

        Returns:
            An empty mapping.
        """
        return {}

    def table_levels(self) -> None:
        """None: symbols are multiplied by the step."""

    def decode_bytes(self, item_bytes: int) -> int:
        """The symbols as floats, and their products.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        return 3 * item_bytes * math.prod(self.shape)

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The largest symbol times the largest step; if affine, plus the least value.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        return self.top() * largest["step"] + largest.get("least", 0.0)

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
        scale = std / math.sqrt((self.decode(code, numpy) ** 2).mean())
        return {e: a if e == "symbols" else (a * scale).astype(np.float32) for e, a in code.items()}

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Round to the nearest symbol, ties to even; in a range that is constant (all 0, if not affine) the step is 1.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Not used.

        Returns:
            ``symbols``, rows x cols in int16 (int32 above 15 bits), ``step``, and ``least`` if affine.
        """
        kind = weight.dtype
        if xp.finfo(kind).bits < 32:  # half precision cannot hold the symbols exactly
            code = self.encode(xp.asarray(weight, dtype=xp.float32), xp)
            return {key: array if key == "symbols" else xp.asarray(array, dtype=kind) for key, array in code.items()}
        rows = weight if self.per == "row" else xp.reshape(weight, (1, -1))
        if not self.affine:
            step = xp.amax(abs(rows), -1)[:, None] / self.top()
            step = xp.where(step > 0, step, xp.ones_like(step))
            symbols = xp.clip(xp.round(weight / step), -self.top(), self.top())
            return {"symbols": _integers(symbols, self.top(), xp), "step": step}
        least = xp.amin(rows, -1)[:, None]
        step = xp.amax(rows, -1)[:, None] / self.top() - least / self.top()
        step = xp.where(step > 0, step, xp.ones_like(step))
        symbols = xp.clip(xp.round((weight - least) / step), 0, self.top())
        return {"symbols": _integers(symbols, self.top(), xp), "step": step, "least": least}

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """One multiplication for each weight.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        weight = code["step"] * xp.asarray(code["symbols"], dtype=code["step"].dtype)
        if self.affine:
            weight += code["least"]
        return weight


@dataclass(frozen=True, slots=True)
class Coded:
    """``W = step * symbol`` with one step, which is learned beside the latents: rate-aware training.

    ``deepthin.torch.SizeTarget`` adds the code length of the symbols to the loss, so that the file, which codes them
    arithmetically, ends within its size.

    Attributes:
        shape: (rows, cols).
        width: Upper bound on the bits of a symbol, 2 to 8: symbols are from -top to top, ``top = 2^(width - 1) - 1``.

    Raises:
        ValueError: A field is out of range.
    """

    shape: tuple[int, int]
    width: int = 8

    def __post_init__(self) -> None:
        """Refuse invalid fields with ValueError."""
        if type(self.width) is not int or self.width > 8:
            raise ValueError(f"Coded cannot have symbols of {self.width!r} bits.")
        self._uniform()

    def _uniform(self) -> Uniform:
        return Uniform(self.shape, self.width)

    @classmethod
    def fit(cls, shape: tuple[int, int], max_bits: int, *, bits: Any = None) -> "Coded":
        """The most bits for each symbol, 2 to 8, that fit before they are coded.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            bits: Upper bound on the bits of a symbol, 2 to 8; None: as many as fit.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: Even ``bits`` bits for each number, or two, do not fit; it carries the smallest possible size.
            ConfigError: An option is out of range.
        """
        limit = cls(shape).bits() if bits is None else max_bits
        uniform = Uniform.fit(shape, min(max_bits, limit), bits=bits)
        return cls(shape, uniform.width)

    def top(self) -> int:
        """The largest symbol.

        Returns:
            ``2^(width - 1) - 1``.
        """
        return (1 << (self.width - 1)) - 1

    @property
    def trains(self) -> Trains:
        """Latents, which are rounded, and the step."""
        return "through"

    def bits(self) -> int:
        """``width`` bits for each number and 32 for the step: what the file takes if coding saves nothing.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        return self._uniform().bits()

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``symbols``: one for each number; ``step``: 1 x 1.

        Returns:
            Entry name -> shape.
        """
        return self._uniform().code_shapes()

    def integers(self) -> dict[str, Integers]:
        """The symbols.

        Returns:
            Entry name -> range of its values.
        """
        return self._uniform().integers()

    def derived(self) -> Code:
        """No tables.

        Returns:
            An empty mapping.
        """
        return {}

    def table_levels(self) -> None:
        """None: symbols are multiplied by the step."""

    def decode_bytes(self, item_bytes: int) -> int:
        """The symbols as floats, and their products.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        return self._uniform().decode_bytes(item_bytes)

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """The largest symbol times the step.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every number.
        """
        return self._uniform().largest_weight(largest)

    def init(self, rng: Generator, std: float) -> Code:
        """Normal numbers, encoded, then scaled to a root mean square of exactly ``std``.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded numbers, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        return self._uniform().init(rng, std)

    def encode(
        self, weight: Float[Array, "rows cols"], xp: Namespace, importance: Float[Array, "rows cols"] | None = None
    ) -> Code:
        """Round to the nearest symbol, ties to even; the largest number is the largest symbol.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Not used.

        Returns:
            ``symbols``, rows x cols in int16, and ``step``.
        """
        return self._uniform().encode(weight, xp)

    def decode(self, code: Code, xp: Namespace) -> Float[Array, "rows cols"]:
        """One multiplication for each number.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        return code["step"] * xp.asarray(code["symbols"], dtype=code["step"].dtype)  # Dynamo makes no frozen instances

    def start(self, weight: Float[Array, "rows cols"], xp: Namespace) -> Float[Array, "1 1"]:
        """The step with which a training starts: a quarter of the root mean square; 1 for zeros.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.

        Returns:
            Natural logarithm of the step, 1 x 1.
        """
        flat = xp.reshape(weight, (1, -1))
        most = xp.amax(abs(flat), -1)[:, None]
        most = xp.where(most > 0, most, xp.ones_like(most))
        share = xp.sqrt(xp.mean((flat / most) ** 2, -1))[:, None] / STEPS_OF_SPREAD
        return xp.log(most * xp.where(share > 0, share, xp.ones_like(share)))

    def step(self, log_step: Float[Array, "1 1"], xp: Namespace) -> Float[Array, "1 1"]:
        """The learned step, rounded to eight significant bits by Veltkamp's splitting (Dekker, 1971).

        Args:
            log_step: Its natural logarithm.
            xp: The namespace of ``log_step``.

        Returns:
            The step, > 0, of the type of ``log_step``.
        """
        step, info = xp.exp(log_step), xp.finfo(log_step.dtype)
        significant = 1 - round(math.log2(float(info.eps)))  # bits, the leading one included
        ones, factor = xp.ones_like(step), 2.0 ** (significant - MANTISSA_BITS) + 1
        scale = xp.where(step > 1, ones * (0.5 / (factor - 1)), ones)  # a power of two: large steps do not overflow
        small = step * scale
        high = small * factor
        rounded = (high - (high - small)) / scale
        return xp.where(rounded > float(info.tiny), rounded, xp.ones_like(rounded) * float(info.tiny))

    def quantize(self, weight: Float[Array, "rows cols"], log_step: Float[Array, "1 1"], xp: Namespace) -> Code:
        """Round to multiples of a learned step, ties to even.

        Args:
            weight: Array, rows x cols, finite.
            log_step: Natural logarithm of the step, 1 x 1.
            xp: The namespace of the arrays.

        Returns:
            ``symbols``, rows x cols in int16, and ``step``.
        """
        step = self.step(log_step, xp)
        symbols = xp.clip(xp.round(weight / step), -self.top(), self.top())
        return {"symbols": xp.asarray(symbols, dtype=xp.int16), "step": step}


def _integers(symbols: Array, top: int, xp: Namespace) -> Array:
    return xp.asarray(symbols, dtype=xp.int16 if top < 1 << 15 else xp.int32)
