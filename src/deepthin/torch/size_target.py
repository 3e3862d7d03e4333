"""Training to a file of a given size: the penalty on the bits of the symbols, and the weight that it has."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from deepthin.errors import BudgetError, ConfigError
from deepthin.plan.file_limit import of_zeros
from deepthin.storage.write import size_of
from deepthin.torch.code_length import code_length, symbol_lengths
from deepthin.torch.files import contents
from deepthin.torch.weight import ThinWeight

RAMP = 0.25  # fraction of the steps in which the size falls to the target
AIM = 0.985  # of the target, so that what the last steps change stays within it
FIRST_PENALTY = 0.01  # nats: the first weight is this over the first bits
# A controller with an integral and a proportional part, of the error in log(size)
INTEGRAL, PROPORTIONAL = 30.0, 6.0  # change of log(weight) for an error of 1: over all steps, and at once
BELOW = 4.0  # an error below the intended size counts so many times: what is lost comes back slowly, if at all
MOST_CHANGE, MOST_FACTOR = 0.1, 20.0  # upper bounds on these parts: of log(weight) in a step, and as a factor
FINER, MOST_FINER = 0.2, 0.02  # decrease of log(step) in a step of the training, for an error of -1, and at most
LEAST_SAVED = 1e-3  # bits that moving a symbol counts as saving
MEASUREMENTS = 100  # at most: how often the true size is measured in a training


class SizeTarget:
    """Steers a training so that the written file ends within a number of bytes, and not far below.

        target = SizeTarget(model, steps=1200)
        ...
        loss = task_loss + target.penalty()
        loss.backward(); optimizer.step(); target.step()

    The penalty is the code length of all symbols of methods that learn their step (``coded``), times a weight that is
    the same for the whole model: bits go where they help the loss most. The weight is raised while the file is above
    its intended size and lowered while it is below: in the first quarter of the steps this falls from the present size
    to the target. What is steered by is the size of the file as it would be written, measured up to a hundred times,
    and the code length in between.

    In the last step the symbols are fixed: should the file still be too large, the symbols that are nearest to the next
    smaller one are moved there.

    Args:
        model: A model with coded weights, as ``compress`` makes it; it may be wrapped by DistributedDataParallel.
        steps: Number of optimiser steps, >= 1.
        file_bytes: The target in bytes; None: the ``[model] file_bytes`` that the model was compressed with.

    Attributes:
        model: The model.
        steps: Number of steps.
        file_bytes: The target in bytes.
        steps_done: Number of steps so far.
        weight: The weight of a bit, in units of the loss.
        bytes: Predicted size of the file.

    Raises:
        ConfigError: The model has no coded weights, or there is no target.
        BudgetError: The target is below the size of the file if all symbols were zero.
    """

    def __init__(self, model: nn.Module, steps: int, file_bytes: int | None = None) -> None:
        self.model, self.steps, self.steps_done = model, steps, 0
        self._weights = coded_weights(model)
        if not self._weights:
            raise ConfigError(
                "The model has no coded weights: compress it with method = 'coded', or then = { method = 'coded' }."
            )
        if type(steps) is not int or steps < 1:
            raise ConfigError(f"steps = {steps!r} must be a whole number from 1 on.")
        given = file_bytes or next((w.file_bytes for w in self._weights if w.file_bytes), None)
        if given is None:
            raise ConfigError("There is no target: give file_bytes, or compress with [model] file_bytes.")
        self.file_bytes = given
        self._fixed = smallest_bytes(self.model)
        if self._fixed > given:
            raise BudgetError(
                f"The file cannot be trained to {given} bytes: with every symbol zero it has {self._fixed}. Use "
                f"file_bytes >= {self._fixed}, or code more of the tensors ([model] biases).",
                smallest_bits=8 * self._fixed,
                smallest_ratio=self._fixed / max(contents(self.model).dense_bytes, 1),
            )
        self._log_weight: float | None = None
        self._first = 0.0
        self._ratio = 1.0  # coded bits in the file / code length
        self._bits = 0.0  # code length at the last penalty
        self._every = max(steps // MEASUREMENTS, 1)

    @property
    def weight(self) -> float:
        """The weight of a bit, in units of the loss."""
        if self._log_weight is None:
            return 0.0
        ahead = PROPORTIONAL * self._error()
        return math.exp(self._log_weight) * min(max(math.exp(ahead), 1 / MOST_FACTOR), MOST_FACTOR)

    @property
    def bytes(self) -> float:
        """Predicted size of the file in bytes, from the code length at the last penalty."""
        return self._fixed + self._ratio * self._bits / 8

    def penalty(self) -> Tensor:
        """The code length of the present symbols times the weight, to be added to the loss. Call it once a step.

        Returns:
            A scalar, differentiable in the latents and in the learned steps.
        """
        lengths = [code_length(*pair).float() for weight in self._weights for pair in weight.unrounded().values()]
        total = torch.stack([length.to(lengths[0].device) for length in lengths]).sum()
        self._bits = float(total.detach())
        if self._log_weight is None:
            self._log_weight = math.log(FIRST_PENALTY / max(self._bits, 1.0))
            self._measure()
            self._first = self.bytes
        return self.weight * total

    def step(self) -> None:
        """Steer; after the last step, fix the symbols. Call it after each step of the optimiser."""
        if self._log_weight is None:
            raise ConfigError("Call target.penalty() before target.step(), and add it to the loss.")
        self.steps_done += 1
        if self.steps_done % self._every == 0 or self.steps_done >= self.steps:
            self._measure()
        error = self._error()
        change = min(INTEGRAL / self.steps, MOST_CHANGE) * error
        self._log_weight += min(max(change, -MOST_CHANGE), MOST_CHANGE)
        if error < 0 and self.steps_done > RAMP * self.steps:
            with torch.no_grad():
                for latent in (latent for weight in self._weights for latent in weight.log_steps()):
                    latent.sub_(min(-FINER * error, MOST_FINER))
        if self.steps_done == self.steps:
            fit_to(self.model, self.file_bytes)

    def _goal(self) -> float:
        """The size in bytes that the file is to have now."""
        aim, done = AIM * self.file_bytes, min(self.steps_done / (RAMP * self.steps), 1.0)
        return aim if self._first <= aim else math.exp((1 - done) * math.log(self._first) + done * math.log(aim))

    def _error(self) -> float:
        """Logarithm of the size over the intended one; several times this where it is smaller."""
        error = math.log(self.bytes / self._goal()) if self._first else 0.0
        return error if error > 0 else BELOW * error

    def _measure(self) -> None:
        with torch.no_grad():
            lengths = [code_length(*pair) for weight in self._weights for pair in weight.unrounded().values()]
            self._bits = float(sum(map(float, lengths)))
            coded = size_of(contents(self.model)) - self._fixed
        self._ratio = 8 * coded / max(self._bits, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """What steering depends on.

        Returns:
            Name -> number; for ``load_state_dict`` of a target with the same model and number of steps.
        """
        return {name: getattr(self, name) for name in ("steps_done", "_log_weight", "_first", "_ratio", "_bits")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: What ``state_dict`` returned.
        """
        for name, value in state.items():
            setattr(self, name, value)


def coded_weights(model: nn.Module) -> list[ThinWeight]:
    """The weights whose symbols a training codes.

    Args:
        model: Any model.

    Returns:
        Those that learn their steps and are not frozen, each once, in the order of ``model.modules()``.
    """
    return [module for module in model.modules() if isinstance(module, ThinWeight) and module.unrounded()]


def smallest_bytes(model: nn.Module) -> int:
    """The size of the file if every coded symbol were zero: no training can make it smaller.

    Args:
        model: A model with coded weights.

    Returns:
        Bytes.
    """
    return size_of(of_zeros(contents(model)))


def fit_to(model: nn.Module, file_bytes: int) -> int:
    """Move coded symbols to the next smaller ones until the file fits: first where a saved bit costs least error.

    Args:
        model: A model with coded weights; changed in place if its file is too large.
        file_bytes: Upper bound on the file in bytes; at least ``smallest_bytes``.

    Returns:
        The size of the file in bytes.
    """
    now = size_of(contents(model))
    with torch.no_grad():
        while now > file_bytes:
            moves = [move for weight in coded_weights(model) for move in _moves(weight)]
            order = torch.cat([cost for _, _, cost in moves])
            order = order[order.isfinite()].sort().values
            if not len(order):
                raise BudgetError(
                    f"The file has {now} bytes with every symbol zero, above the limit of {file_bytes}.",
                    smallest_bits=8 * now,
                    smallest_ratio=now / max(contents(model).dense_bytes, 1),
                )
            before = [latent.clone() for latent, _, _ in moves]
            low, high = 0, len(order)  # moves: too few, and enough or all
            while high - low > max(high >> 5, 1):
                middle = (low + high) // 2
                if _moved(model, moves, before, float(order[middle - 1])) <= file_bytes:
                    high = middle
                else:
                    low = middle
            now = _moved(model, moves, before, float(order[high - 1]))
    return now


Move = tuple[Tensor, Tensor, Tensor]
"""Latents, what they would be one symbol nearer to zero, and what each of these moves costs; infinity for zeros."""


def _moves(weight: ThinWeight) -> list[Move]:
    """Each symbol one nearer to zero. A move costs what the squared error grows by, over the bits that it saves."""
    moves: list[Move] = []
    for entry, (symbols, top) in weight.unrounded().items():
        latent = getattr(weight, entry)
        size, nearest = symbols.abs(), symbols.abs().round().clamp(max=top)
        step = latent.abs().max() / size.max()
        lengths = symbol_lengths(symbols, top)
        signed = (symbols.sign() * nearest).long() + top
        saved = lengths[signed] - lengths[signed - symbols.sign().long()]
        grown = ((size - nearest + 1) ** 2 - (size - nearest) ** 2) / (size**2).mean()
        cost = torch.where(nearest > 0, grown / saved.clamp(min=LEAST_SAVED), math.inf)
        moves.append((latent, symbols.sign() * step * (nearest - 1), cost.reshape(-1).cpu()))
    return moves


def _moved(model: nn.Module, moves: list[Move], before: list[Tensor], limit: float) -> int:
    """The size of the file with all moves that cost ``limit`` at most."""
    for (latent, smaller, cost), was in zip(moves, before, strict=True):
        latent.copy_(torch.where((cost <= limit).to(latent.device).reshape(latent.shape), smaller, was))
    return size_of(contents(model))
