"""Training to a file of a given size: the penalty on the bits of the symbols, and the weight that it has."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from deepthin.plan import steering
from deepthin.plan.steering import Rounded, Steered, Steering
from deepthin.storage.write import size_of
from deepthin.torch import callbacks
from deepthin.torch.code_length import code_length
from deepthin.torch.files import contents
from deepthin.torch.weight import ThinWeight

_TORCH = cast(Any, torch)


class SizeTarget(Steered):
    """Steers a training so that the written file ends within a number of bytes, and not far below.

        target = SizeTarget(model, steps=1200)
        ...
        loss = task_loss + target.penalty()
        loss.backward(); optimizer.step(); target.step()

    The penalty is the code length of all symbols of methods that learn their step (``coded``), times a weight that is
    the same for the whole model: bits go where they help the loss most. The weight is raised while the file is above
    its intended size and lowered while it is below: in the first quarter of the steps this falls from the present size
    to the target. What is steered by is the size of the file as it would be written, measured up to forty times,
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
        self.model, self._weights = model, coded_weights(model)
        self._steering = Steering(steps, file_bytes, [w.file_bytes for w in self._weights], contents(model))

    def penalty(self) -> Tensor:
        """The code length of the present symbols times the weight, to be added to the loss. Call it once a step.

        Returns:
            A scalar, differentiable in the latents and in the learned steps.
        """
        lengths = [code_length(*entry).float() for weight in self._weights for entry in weight.unrounded().values()]
        total = torch.stack([length.to(lengths[0].device) for length in lengths]).sum()
        self._steering.bits = float(total.detach())
        if not self._steering.begun:
            self._steering.begin(*self._measured())
        return self.weight * total

    def add_gradient(self) -> None:
        """Add the gradient of ``penalty()`` to the gradients that the parameters have.

        Instead of adding the penalty to the loss, where that is out of reach: call it between the backward pass and the
        step of the optimiser. Under DistributedDataParallel it adds the same on all processes.
        """
        held = [p for weight in self._weights for p in weight.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(self.penalty(), held, allow_unused=True)
        for parameter, slope in zip(held, slopes, strict=True):
            if slope is not None:
                parameter.grad = slope if parameter.grad is None else parameter.grad + slope

    def lightning_callback(self) -> Any:
        """A callback with which Lightning trains to the size.

            trainer = lightning.Trainer(callbacks=[target.lightning_callback()])

        Returns:
            A ``lightning.pytorch.Callback``.
        """
        return callbacks.lightning_callback(self)

    def trainer_callback(self) -> Any:
        """A callback with which the Trainer of Hugging Face trains to the size.

            trainer = transformers.Trainer(model, arguments, callbacks=[target.trainer_callback()])

        Returns:
            A ``transformers.TrainerCallback``.
        """
        return callbacks.trainer_callback(self)

    def step(self) -> None:
        """Steer; after the last step, fix the symbols. Call it after each step of the optimiser."""
        if self._steering.begun and self._steering.due():
            self._steering.measured(*self._measured())
        finer = self._steering.advance()
        if finer > 0:
            with torch.no_grad():
                for latent in (latent for weight in self._weights for latent in weight.log_steps()):
                    latent.sub_(finer)
        if self.steps_done == self.steps:
            fit_to(self.model, self.file_bytes)

    def _measured(self) -> tuple[float, int]:
        """The code length in bits, and the size of the file in bytes."""
        with torch.no_grad():
            lengths = [code_length(*entry) for weight in self._weights for entry in weight.unrounded().values()]
            return float(sum(map(float, lengths))), size_of(contents(self.model))


def coded_weights(model: nn.Module) -> list[ThinWeight]:
    """The weights whose symbols a training codes.

    Args:
        model: Any model.

    Returns:
        Those that learn their steps and are not frozen, each once, in the order of ``model.modules()``.
    """
    return [module for module in model.modules() if isinstance(module, ThinWeight) and module.unrounded()]


def fit_to(model: nn.Module, file_bytes: int) -> int:
    """Move coded symbols to the next smaller ones until the file fits: first where a saved bit costs least error.

    Args:
        model: A model with coded weights; changed in place if its file is too large.
        file_bytes: Upper bound on the file in bytes; at least its size with every symbol zero.

    Returns:
        The size of the file in bytes.
    """
    coded = [pair for weight in coded_weights(model) for pair in _coded(weight)]

    def put(arrays: Sequence[np.ndarray]) -> None:
        for (latent, _), array in zip(coded, arrays, strict=True):
            latent.copy_(torch.from_numpy(array))

    with torch.no_grad():
        return steering.fit_to(file_bytes, lambda: contents(model), lambda: [now() for _, now in coded], put)


def _coded(weight: ThinWeight) -> Iterator[tuple[Tensor, Callable[[], Rounded]]]:
    """The latents of a weight that are rounded to a learned step, and how they are read."""

    def read(entry: str) -> Rounded:
        latents, log_step, method = weight.unrounded()[entry]
        return Rounded(latents.double().cpu().numpy(), float(method.step(log_step, _TORCH)), method.top())

    for entry in weight.unrounded():
        yield getattr(weight, entry), functools.partial(read, entry)
