"""One random example of a method: a shape, options and a budget, all drawn from one seed."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deepthin.errors import BudgetError
from deepthin.method import Code, Method
from deepthin.methods import METHODS, THEN
from deepthin.methods.then import Then
from deepthin.testing.claims import Claims

LARGEST_OF_TWO = 16  # rows and columns of examples of one method after another, at most: fitting two takes longer
_NUMPY: Any = np

Fit = Callable[..., Any]
"""``fit(shape, max_bits, **options)``."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The method under test; with ``inner``, followed by one of these methods, which stores its floats."""

    name: str  # in METHODS, while it is tested
    fit: Fit
    claims: Claims
    inner: Sequence[tuple[str, Mapping[str, Any]]] = ()


class Example:
    """One example, and how often the law that runs on it checked something."""

    def __init__(self, subject: Subject, rng: np.random.Generator, smallest: int = 1) -> None:
        self.subject, self.rng, self.checks = subject, rng, 0
        largest = min(subject.claims.largest, LARGEST_OF_TWO) if subject.inner else subject.claims.largest
        rows, cols = (int(d) for d in rng.integers(smallest, max(smallest, largest) + 1, 2))
        self.shape = rows, cols
        self.options = dict(subject.claims.options[int(rng.integers(len(subject.claims.options)))])
        self.inner = subject.inner[int(rng.integers(len(subject.inner)))] if subject.inner else None
        self.name = f"{subject.name}{THEN}{self.inner[0]}" if self.inner else subject.name
        self.least = self.smallest_bits()
        self.budget = self.least + int(rng.integers(0, 32 * (40 if subject.inner else 200)))
        self.method: Method = self.fit(self.budget)

    def fit(self, max_bits: int) -> Any:
        """The method of this example for another budget, in bits."""

        def outer(bits: int) -> Any:
            return self.subject.fit(self.shape, bits, **self.options)

        if self.inner is None:
            return outer(max_bits)
        name, options = self.inner
        return Then.fit(outer, lambda own: METHODS[name].fit(own, 1 << 40, **options), max_bits)

    def smallest_bits(self) -> int:
        """What the smallest plan takes."""
        try:
            return self.fit(0).bits()
        except BudgetError as error:
            return error.smallest_bits

    def check(self, holds: Any, otherwise: str) -> None:
        """AssertionError with this text where something does not hold."""
        self.checks += 1
        if not holds:
            raise AssertionError(otherwise)

    def weight(self) -> np.ndarray:
        """A float32 matrix: mostly normal numbers; sometimes zeros, ties, or a few huge entries."""
        kind = self.rng.choice(["normal", "ties", "zeros", "huge"], p=[0.7, 0.1, 0.1, 0.1])
        weight = self.rng.normal(size=self.shape)
        if kind == "ties":
            weight = np.round(weight)
        elif kind == "zeros":
            weight *= self.rng.random(self.shape) < 0.3
        elif kind == "huge":
            weight *= np.where(self.rng.random(self.shape) < 0.05, 1e3, 1)
        return weight.astype(np.float32)

    def code(self, std: float = 0.1) -> Code:
        """A fresh start, with the derived tables."""
        return self.method.init(self.rng, std) | self.method.derived()

    def floats(self) -> list[str]:
        """The floating entries of the code."""
        integers = self.method.integers()
        return [entry for entry in self.method.code_shapes() if entry not in integers]

    def parts(self) -> tuple[Any, list[tuple[str, Any]]]:
        """The outer method and, by entry, those that store its floats; the method itself and none."""
        if self.inner is None:
            return self.method, []
        both: Any = self.method
        return both.outer, list(both.inner)

    def __str__(self) -> str:
        then = f", then {self.inner[0]} {dict(self.inner[1])}" if self.inner else ""
        options = f", options {self.options}" if self.options else ""
        return f"shape {self.shape}, max_bits {self.budget}{options}{then}: {getattr(self, 'method', 'no method')}"


def widened(code: Code) -> Code:
    """Floats in float64; integers as they are."""
    return {e: a.astype(np.float64) if a.dtype.kind == "f" else a for e, a in code.items()}


def norm(array: Any) -> float:
    """Frobenius, in float64."""
    return float(np.linalg.norm(np.asarray(array, np.float64)))


def bits_in_file(method: Method) -> int:
    """The bits that a file needs for a code, headers apart, from shapes alone: 32 a float, integers as bounded."""
    integers, total = method.integers(), 0
    for entry, shape in method.code_shapes().items():
        count = math.prod(shape)
        total += 8 * integers[entry].bytes(count) if entry in integers else 32 * count
    return total
