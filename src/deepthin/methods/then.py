"""One method after another: the second quantises the floats of the first one's code.

Han, Mao and Dally, 2016, arXiv:1510.00149, prune and then share values; here any two methods may be combined.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from numpy.random import Generator

from deepthin import method as base
from deepthin.errors import BudgetError
from deepthin.method import (
    FLOAT_BITS,
    Array,
    Bounded,
    Code,
    Drifting,
    Integers,
    Method,
    Namespace,
    Separable,
    Trains,
    as_matrix,
)


@dataclass(frozen=True, slots=True)
class Then:
    """Two methods: ``inner`` stores each floating entry of ``outer``'s code, as a matrix.

    Attributes:
        outer: The method that makes the weights.
        inner: Entry of the outer code -> method that stores it, as pairs.
    """

    outer: Method
    inner: tuple[tuple[str, Method], ...]  # by entry of the outer code

    @classmethod
    def fit(
        cls,
        outer: Callable[[int], Method],
        inner: Callable[[tuple[int, int]], Method],
        max_bits: int,
    ) -> "Then":
        """Choose the largest outer code whose floats the inner method stores within the budget, by bisection.

        Args:
            outer: Bits -> the outer method that fits them, with its floats in 32 bits.
            inner: (rows, cols) -> the method that stores a matrix of that shape in a fixed number of bits for each
                entry.
            max_bits: Upper bound on ``bits()``.

        Returns:
            The pair, with ``bits() <= max_bits``.

        Raises:
            BudgetError: The smallest outer code does not fit; it carries the smallest possible size.
            ConfigError: An option of either method is invalid.
        """

        def made(bits: int) -> "Then":
            plan = outer(bits)
            whole = {e: s for e, s in plan.code_shapes().items() if e not in plan.integers()}
            return cls(plan, tuple((e, inner(as_matrix(s))) for e, s in whole.items()))

        try:
            least = outer(0).bits()
        except BudgetError as error:
            least = error.smallest_bits
        smallest = made(least)
        if smallest.bits() > max_bits:
            raise BudgetError(
                f"It cannot be stored in {max_bits} bits: the smallest plan, its numbers then stored by "
                f"{type(smallest.inner[0][1]).__name__}, needs {smallest.bits()}.",
                smallest_bits=smallest.bits(),
                smallest_ratio=smallest.bits() / (FLOAT_BITS * math.prod(smallest.shape)),
            )
        best, low, high = smallest, least, max(least, 1)
        while high < 64 * max_bits and (candidate := made(high)).bits() <= max_bits:
            best = max(best, candidate, key=lambda plan: plan.bits())  # tables may shrink
            low, high = high, 2 * high
        while high - low > max(FLOAT_BITS, low >> 12):
            middle = (low + high) // 2
            candidate = made(middle)
            low, high = (middle, high) if candidate.bits() <= max_bits else (low, middle)
            best = max(best, candidate, key=lambda plan: plan.bits() if plan.bits() <= max_bits else -1)
        return best

    @property
    def trains(self) -> Trains:
        """As the inner method: its floats, or latents of the outer method's floats."""
        return self.inner[0][1].trains

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the dense matrix."""
        return self.outer.shape

    def bits(self) -> int:
        """Bits of the inner codes and of the outer integers.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        shapes = self.outer.code_shapes()
        whole = sum(8 * kind.bytes(math.prod(shapes[e])) for e, kind in self.outer.integers().items())
        return whole + sum(method.bits() for _, method in self.inner)

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``xf_symbols``: the entry ``symbols`` of the code that stores ``xf``.

        Returns:
            Entry name -> shape.
        """
        integer_shapes = {e: s for e, s in self.outer.code_shapes().items() if e in self.outer.integers()}
        return integer_shapes | {f"{e}_{k}": s for e, method in self.inner for k, s in method.code_shapes().items()}

    def integers(self) -> dict[str, Integers]:
        """The integers of both methods.

        Returns:
            Entry name -> range of its values.
        """
        return self.outer.integers() | {f"{e}_{k}": i for e, method in self.inner for k, i in method.integers().items()}

    def derived(self) -> Code:
        """The tables of both methods.

        Returns:
            Entry name -> NumPy array; empty if there is none.
        """
        return self.outer.derived() | {f"{e}_{k}": a for e, method in self.inner for k, a in method.derived().items()}

    def decode_bytes(self, item_bytes: int) -> int:
        """What both methods take; of a method that does not say, 128 bytes for each number.

        Args:
            item_bytes: Bytes of a float of the code.

        Returns:
            Upper bound in bytes.
        """
        both = (self.outer, *(method for _, method in self.inner))
        return sum(m.decode_bytes(item_bytes) if isinstance(m, Bounded) else 128 * math.prod(m.shape) for m in both)

    def largest_weight(self, largest: Mapping[str, float]) -> float:
        """That of the outer method, for the largest floats of the inner ones; infinity where one does not say.

        Args:
            largest: Entry of the code -> the largest magnitude of its floats.

        Returns:
            Upper bound on the magnitude of every weight.
        """
        floats: dict[str, float] = {}
        for entry, method in self.inner:
            own = {key: largest[f"{entry}_{key}"] for key in method.code_shapes() if f"{entry}_{key}" in largest}
            floats[entry] = method.largest_weight(own) if isinstance(method, Bounded) else math.inf
        return self.outer.largest_weight(floats) if isinstance(self.outer, Bounded) else math.inf

    def init(self, rng: Generator, std: float) -> Code:
        """The outer method's random code, encoded.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        import numpy as np

        return self.encode_floats(self.outer.init(rng, std), np)  # pyright: ignore[reportArgumentType]

    def drifts(self) -> bool:
        """Whether any inner method drifts.

        Returns:
            True if encoding a decoded code may change it by more than floating-point rounding.
        """
        return any(isinstance(method, Drifting) and method.drifts() for _, method in self.inner)

    def encode(self, weight: Array, xp: Namespace, importance: Array | None = None) -> Code:
        """Encode by the outer method, and then its floats by the inner one.

        Args:
            weight: Array, rows x cols, finite.
            xp: The namespace of ``weight``.
            importance: Array, rows x cols, entries >= 0: the weight of each squared error. It also weighs the inner
                method's errors if the outer method is ``Separable``.

        Returns:
            Entries of the outer integers and of the inner codes.
        """
        code = self.outer.encode(weight, xp, importance)
        return self.encode_floats(code, xp, self.importance_of_floats(code, xp, importance))

    def importance_of_floats(self, code: Code, xp: Namespace, importance: Array | None) -> Code:
        """The importance of the outer floats, from that of the weights.

        Args:
            code: The outer code.
            xp: The namespace of the arrays.
            importance: Array, rows x cols; None: no importance.

        Returns:
            Entry name -> array; empty without importance, or if the outer method is not ``Separable``.
        """
        if importance is None or not isinstance(self.outer, Separable):
            return {}
        return self.outer.importance_of(code, importance, xp)

    def encode_floats(self, code: Code, xp: Namespace, importance: Mapping[str, Array] | None = None) -> Code:
        """Encode the floats of an outer code.

        Args:
            code: The outer code.
            xp: The namespace of the arrays.
            importance: Entry name -> weight of each squared error; entries without importance weigh equally.

        Returns:
            Entries of the outer integers and of the inner codes.
        """
        made = {entry: code[entry] for entry in self.outer.integers()}
        for entry, method in self.inner:
            weights = xp.reshape(importance[entry], method.shape) if importance and entry in importance else None
            stored = method.encode(xp.reshape(code[entry], method.shape), xp, weights)
            made |= {f"{entry}_{key}": array for key, array in stored.items()}
        return made

    def decode_floats(self, code: Code, xp: Namespace) -> Code:
        """Decode the floats of the outer code.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            The outer code.
        """
        shapes, made = self.outer.code_shapes(), dict(code)
        for entry, method in self.inner:
            stored = {key.removeprefix(f"{entry}_"): made.pop(key) for key in code if key.startswith(f"{entry}_")}
            made[entry] = xp.reshape(method.decode(stored, xp), shapes[entry])
        return made

    def decode(self, code: Code, xp: Namespace) -> Array:
        """The dense matrix, rows x cols: decode the inner codes, then the outer one.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        return self.outer.decode(self.decode_floats(code, xp), xp)


base.Then = Then  # pyright: ignore[reportAttributeAccessIssue] -- pickles of version 0.1 name it there
