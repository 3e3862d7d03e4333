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

LARGEST_OF_TWO = 16  # upper bound on rows and columns of examples of two methods, which take longer to fit
_NUMPY: Any = np

Fit = Callable[..., Any]
"""``fit(shape, max_bits, **options)``."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The method under test.

    Attributes:
        name: Its name in ``METHODS``, while it is tested.
        fit: ``fit(shape, max_bits, **options)``.
        claims: What it guarantees.
        inner: (name, options) of methods that may store its floats; each example takes one.
    """

    name: str
    fit: Fit
    claims: Claims
    inner: Sequence[tuple[str, Mapping[str, Any]]] = ()


class Example:
    """A random example: a shape, options, a budget and the plan for them; counts the checks of a law that runs on it.

    Args:
        subject: The method under test.
        rng: NumPy's generator, from which everything is drawn; it is advanced.
        smallest: Lower bound on rows and columns.

    Attributes:
        shape: (rows, cols).
        options: Options of ``fit``.
        inner: (name, options) of the method that stores the floats, or None.
        least: Bits of the smallest plan.
        budget: Bits, >= ``least``.
        method: The plan.
        checks: Calls of ``check``.
    """

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
        """The plan of this example for another budget.

        Args:
            max_bits: Upper bound on ``bits()``.

        Returns:
            The method, or a ``Then`` of two.

        Raises:
            BudgetError: The budget is smaller than the smallest plan.
        """

        def outer(bits: int) -> Any:
            return self.subject.fit(self.shape, bits, **self.options)

        if self.inner is None:
            return outer(max_bits)
        name, options = self.inner
        return Then.fit(outer, lambda shape: METHODS[name].fit(shape, 1 << 40, **options), max_bits)

    def smallest_bits(self) -> int:
        """The size of the smallest plan.

        Returns:
            Bits, as ``BudgetError`` names them.
        """
        try:
            return self.fit(0).bits()
        except BudgetError as error:
            return error.smallest_bits

    def check(self, holds: Any, otherwise: str) -> None:
        """Assert a condition, and count it.

        Args:
            holds: The condition.
            otherwise: The message if it is false.

        Raises:
            AssertionError: The condition is false.
        """
        self.checks += 1
        if not holds:
            raise AssertionError(otherwise)

    def weight(self) -> np.ndarray:
        """A random weight: mostly normal numbers; sometimes with zeros, ties, or a few huge entries.

        Returns:
            float32, rows x cols.
        """
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
        """A start from scratch, with the derived tables.

        Args:
            std: Standard deviation of the decoded weight.

        Returns:
            Entry -> array.
        """
        return self.method.init(self.rng, std) | self.method.derived()

    def floats(self) -> list[str]:
        """The entries of the code that are floats.

        Returns:
            Their names.
        """
        integers = self.method.integers()
        return [entry for entry in self.method.code_shapes() if entry not in integers]

    def parts(self) -> tuple[Any, list[tuple[str, Any]]]:
        """The methods of the plan.

        Returns:
            The outer method, and (entry, method) for each entry whose floats another method stores; none if there is no
            inner method.
        """
        if self.inner is None:
            return self.method, []
        both: Any = self.method
        return both.outer, list(both.inner)

    def __str__(self) -> str:
        then = f", then {self.inner[0]} {dict(self.inner[1])}" if self.inner else ""
        options = f", options {self.options}" if self.options else ""
        return f"shape {self.shape}, max_bits {self.budget}{options}{then}: {getattr(self, 'method', 'no method')}"


def widened(code: Code) -> Code:
    """A code with its floats in float64.

    Args:
        code: Entry -> array.

    Returns:
        A new code; integers are unchanged.
    """
    return {e: a.astype(np.float64) if a.dtype.kind == "f" else a for e, a in code.items()}


def norm(array: Any) -> float:
    """The Frobenius norm in float64.

    Args:
        array: Numbers.

    Returns:
        The norm.
    """
    return float(np.linalg.norm(np.asarray(array, np.float64)))


def bits_in_file(method: Method) -> int:
    """An upper bound on the bits of a code in a file without headers, from shapes alone.

    Args:
        method: The plan.

    Returns:
        32 bits for a float, and the bound of ``Integers.bytes`` for integers.
    """
    integers, total = method.integers(), 0
    for entry, shape in method.code_shapes().items():
        count = math.prod(shape)
        total += 8 * integers[entry].bytes(count) if entry in integers else 32 * count
    return total
