"""Training to a file of a given size, in any framework: how much a bit weighs, and how the last bytes are saved.

A controller with an integral and a proportional part follows the logarithm of the size. What it steers is the weight of
the code length in the loss (entropy-penalised training; Oktay et al., 2020, arXiv:1906.06624).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepthin.errors import BudgetError, ConfigError
from deepthin.plan.file_limit import of_zeros
from deepthin.storage.contents import Contents
from deepthin.storage.write import size_of

RAMP = 0.25  # fraction of the steps in which the size falls to the target
AIM = 0.985  # of the target, so that what the last steps change stays within it
FIRST_PENALTY = 0.01  # nats: the first weight is this over the first bits
# A controller with an integral and a proportional part, of the error in log(size)
INTEGRAL, PROPORTIONAL = 30.0, 6.0  # change of log(weight) for an error of 1: over all steps, and at once
BELOW = 2.0  # an error below the intended size counts so many times: what is lost comes back slowly, if at all
MOST_CHANGE, MOST_FACTOR = 0.1, 20.0  # upper bounds on these parts: of log(weight) in a step, and as a factor
# A size further below the intended one than SLACK does not come back by itself: steps become finer, slowly, as numbers
# that lie just below one half of a step would become symbols all at once. In a step of the training, log(step) falls
# by FINER for an error of -1, and by MOST_FINER at most.
SLACK, FINER, MOST_FINER = 0.01, 0.1, 0.002
_LEAST_SQUARE = 1e-100  # of symbols that are all zero
LEAST_SAVED = 1e-3  # bits that moving a symbol counts as saving
MEASUREMENTS = 40  # at most: how often the true size is measured in a training
PRIOR = 0.5  # added to the count of each symbol, as Krichevsky and Trofimov do


class Steering:
    """The weight of a bit in the loss, from step to step.

    Args:
        steps: Number of optimiser steps, >= 1.
        file_bytes: The target in bytes; None: what the model was compressed with.
        given: For each coded weight the size that its model was compressed for; None where there was none.
        contents: What the model's file would hold now.

    Attributes:
        steps: Number of steps.
        file_bytes: The target in bytes.
        fixed_bytes: Size of the file if all symbols were zero.
        steps_done: Number of steps so far.
        bits: Code length of the symbols, as last seen.

    Raises:
        ConfigError: There are no coded weights, or there is no target.
        BudgetError: The target is below the size of the file if all symbols were zero.
    """

    _STATE = ("steps", "steps_done", "bits", "_log_weight", "_first", "_ratio")

    def __init__(self, steps: int, file_bytes: int | None, given: Sequence[int | None], contents: Contents) -> None:
        if not given:
            raise ConfigError(
                "The model has no coded weights: compress it with method = 'coded', or then = { method = 'coded' }."
            )
        if type(steps) is not int or steps < 1:
            raise ConfigError(f"steps = {steps!r} must be a whole number from 1 on.")
        target = file_bytes or next(filter(None, given), None)
        if target is None:
            raise ConfigError("There is no target: give file_bytes, or compress with [model] file_bytes.")
        self.steps, self.file_bytes, self.fixed_bytes = steps, target, size_of(of_zeros(contents))
        if self.fixed_bytes > target:
            raise BudgetError(
                f"The file cannot be trained to {target} bytes: with every symbol zero it has {self.fixed_bytes}. Use "
                f"file_bytes >= {self.fixed_bytes}, or code more of the tensors ([model] biases).",
                smallest_bits=8 * self.fixed_bytes,
                smallest_ratio=self.fixed_bytes / max(contents.dense_bytes, 1),
            )
        self.steps_done, self.bits = 0, 0.0
        self._log_weight: float | None = None
        self._first = 0.0  # size at the start, in bytes
        self._ratio = 1.0  # coded bits in the file / code length

    @property
    def begun(self) -> bool:
        """Whether ``begin`` was called."""
        return self._log_weight is not None

    @property
    def weight(self) -> float:
        """The weight of a bit, in units of the loss; 0 before ``begin``."""
        if self._log_weight is None:
            return 0.0
        ahead = PROPORTIONAL * self.error()
        return math.exp(self._log_weight) * min(max(math.exp(ahead), 1 / MOST_FACTOR), MOST_FACTOR)

    @property
    def bytes(self) -> float:
        """Predicted size of the file in bytes, from ``bits``."""
        return self.fixed_bytes + self._ratio * self.bits / 8

    def begin(self, bits: float, file_bytes: int) -> None:
        """Choose the first weight.

        Args:
            bits: Code length of the symbols at the start.
            file_bytes: The size that the file would have.
        """
        self._log_weight = math.log(FIRST_PENALTY / max(bits, 1.0))
        self.measured(bits, file_bytes)
        self._first = self.bytes

    def measured(self, bits: float, file_bytes: int) -> None:
        """Take in a measured size.

        Args:
            bits: Code length of the symbols.
            file_bytes: The size that the file of these symbols would have.
        """
        self.bits, self._ratio = bits, 8 * (file_bytes - self.fixed_bytes) / max(bits, 1.0)

    def due(self) -> bool:
        """Whether the size is to be measured before ``advance``.

        Returns:
            True at most forty times in a training, and before its last step is counted.
        """
        done = self.steps_done + 1
        return done % max(self.steps // MEASUREMENTS, 1) == 0 or done >= self.steps

    def advance(self) -> float:
        """Count a step of the optimiser, and change the weight.

        Returns:
            How much finer the learned steps should become, as a decrease of their logarithms >= 0: below its intended
            size a file does not grow by itself soon.

        Raises:
            ConfigError: ``begin`` was not called.
        """
        if self._log_weight is None:
            raise ConfigError("Call target.penalty() before target.step(), and add it to the loss.")
        self.steps_done += 1
        change = min(INTEGRAL / self.steps, MOST_CHANGE) * self.error()
        self._log_weight += min(max(change, -MOST_CHANGE), MOST_CHANGE)
        missing = math.log(self.goal() / self.bytes) - SLACK
        return min(FINER * missing, MOST_FINER) if missing > 0 and self.steps_done > RAMP * self.steps else 0.0

    def goal(self) -> float:
        """The size in bytes that the file is to have now.

        Returns:
            In the first quarter of the steps between the first size and the target, then just below the target.
        """
        aim, done = AIM * self.file_bytes, min(self.steps_done / (RAMP * self.steps), 1.0)
        return aim if self._first <= aim else math.exp((1 - done) * math.log(self._first) + done * math.log(aim))

    def error(self) -> float:
        """How far the size is off.

        Returns:
            Logarithm of the size over the intended one; several times this where it is smaller.
        """
        error = math.log(self.bytes / self.goal()) if self._first else 0.0
        return error if error > 0 else BELOW * error

    def state_dict(self) -> dict[str, Any]:
        """What steering depends on.

        Returns:
            Name -> number, the number of steps included; for ``load_state_dict`` of a controller of the same model.
        """
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: What ``state_dict`` returned.
        """
        for name in self._STATE:
            setattr(self, name, state[name])


class Steered:
    """What every framework's ``SizeTarget`` shows of its controller."""

    _steering: Steering

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self._steering.steps

    @property
    def file_bytes(self) -> int:
        """The target in bytes."""
        return self._steering.file_bytes

    @property
    def steps_done(self) -> int:
        """Number of steps so far."""
        return self._steering.steps_done

    @property
    def weight(self) -> float:
        """The weight of a bit, in units of the loss."""
        return self._steering.weight

    @property
    def bytes(self) -> float:
        """Predicted size of the file in bytes, from the code length at the last penalty."""
        return self._steering.bytes

    def state_dict(self) -> dict[str, Any]:
        """What steering depends on.

        Returns:
            Name -> number; for ``load_state_dict`` of a target with the same model and number of steps.
        """
        return self._steering.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: What ``state_dict`` returned.
        """
        self._steering.load_state_dict(state)


def symbol_lengths(symbols: np.ndarray, top: int) -> np.ndarray:
    """The bits that an adaptive code of zero order takes for each symbol.

    Args:
        symbols: Rounded symbols from -top to top, of any shape.
        top: The largest symbol, >= 1.

    Returns:
        2 top + 1 numbers: for the symbols from -top to top.
    """
    counts = np.bincount(symbols.reshape(-1).astype(np.int64) + top, minlength=2 * top + 1)
    return np.log2(counts.sum() + PRIOR * len(counts)) - np.log2(counts + PRIOR)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Numbers that are rounded to multiples of a step.

    Attributes:
        latents: The numbers.
        step: The step, > 0.
        top: The largest symbol.
    """

    latents: np.ndarray
    step: float
    top: int

    def smaller(self) -> tuple[np.ndarray, np.ndarray]:
        """Each number one symbol nearer to zero, and what that costs.

        Returns:
            The numbers after the move; and what each move adds to the squared error, over the bits that it saves:
            infinity where the symbol is zero already.
        """
        symbols = self.latents.astype(np.float64) / self.step
        size, sign = np.abs(symbols), np.sign(symbols).astype(np.int64)
        nearest = np.clip(np.round(size), None, self.top).astype(np.int64)
        lengths = symbol_lengths(sign * nearest, self.top)
        now = sign * nearest + self.top
        saved = np.maximum(lengths[now] - lengths[now - sign], LEAST_SAVED)
        grown = ((size - nearest + 1) ** 2 - (size - nearest) ** 2) / max(np.mean(size**2), _LEAST_SQUARE)
        return sign * self.step * (nearest - 1.0), np.where(nearest > 0, grown / saved, np.inf)


def fit_to(
    file_bytes: int,
    contents: Callable[[], Contents],
    rounded: Callable[[], Sequence[Rounded]],
    put: Callable[[Sequence[np.ndarray]], None],
) -> int:
    """Move coded symbols to the next smaller ones until the file fits: first where a saved bit costs least error.

    Args:
        file_bytes: Upper bound on the file in bytes.
        contents: Returns what the file of the present symbols would hold.
        rounded: Returns the numbers that are rounded, of all coded tensors.
        put: Replaces their latents, in the same order.

    Returns:
        The size of the file in bytes.

    Raises:
        BudgetError: The file is larger than ``file_bytes`` with every symbol zero.
    """

    def moved(before: Sequence[Rounded], moves: Sequence[tuple[np.ndarray, np.ndarray]], most: float) -> int:
        """The size of the file with all moves that cost ``most`` at most."""
        pairs = zip(before, moves, strict=True)
        put([np.where(costs <= most, smaller, entry.latents) for entry, (smaller, costs) in pairs])
        return size_of(contents())

    now = size_of(contents())
    while now > file_bytes:
        before = rounded()
        moves = [entry.smaller() for entry in before]
        order = np.concatenate([costs.reshape(-1) for _, costs in moves])
        order = np.sort(order[np.isfinite(order)])
        if not len(order):
            raise BudgetError(
                f"The file has {now} bytes with every symbol zero, above the limit of {file_bytes}.",
                smallest_bits=8 * now,
                smallest_ratio=now / max(contents().dense_bytes, 1),
            )

        low, high = 0, len(order)  # moves: too few, and enough or all
        while high - low > max(high >> 5, 1):
            middle = (low + high) // 2
            low, high = (low, middle) if moved(before, moves, order[middle - 1]) <= file_bytes else (middle, high)
        now = moved(before, moves, order[high - 1])
    return now
