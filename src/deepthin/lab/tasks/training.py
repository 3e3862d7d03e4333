"""The training recipe that all tasks share: AdamW, a short warm-up, a cosine to zero (docs/training.md)."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError, NonFiniteError
from deepthin.lab.checkpoint import Checkpoint, restore_random
from deepthin.torch import Distillation, Recipe, SizeTarget, adam_importance, parameter_groups
from deepthin.torch.rates import STEPS
from deepthin.torch.size_target import coded_weights
from deepthin.torch.weight import ThinWeight

WARM_UP = 50  # steps


@dataclass(kw_only=True)
class Training:
    """One training: a number of steps from a seed. Tasks differ in their batches and losses.

        for chosen in training.batches(len(inputs), 128):
            training.minimise(cross_entropy(model(inputs[chosen]), targets[chosen]))

    AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101), a linear warm-up, and half a cosine down to zero. Where the
    size of the model's file is trained (``deepthin.torch.SizeTarget``), the penalty is added to every loss.

    Attributes:
        model: The network, dense or thin.
        steps: Number of steps, >= 1.
        lr: Learning rate of dense parameters, > 0; codes get a multiple of it.
        decay: Weight decay of matrices and codes; other parameters have none.
        seed: Seed of the batches.
        learning_rate_multiplier: Learning rate of codes / ``lr``; None: that of each method.
        recipe: Makes a dense model thin during the training; the model is judged only once it is thin. None: no stages.
        distillation: A teacher's loss, which ``taught`` adds; None: no teacher.
        progress: Called after each step with the number of steps so far.
        step: Number of steps so far.
        checkpoint: Saves the state of the training, from which ``batches`` continues; None: no checkpoints.
        carried: What a task carries from step to step, such as a recurrent state.
    """

    model: nn.Module
    steps: int
    lr: float
    decay: float = 0.0
    seed: int = 0
    learning_rate_multiplier: float | None = None  # None: that of each method
    recipe: Recipe | None = None
    distillation: Distillation | None = None
    progress: Callable[[int], None] = lambda _: None  # called with the number of steps so far
    checkpoint: Checkpoint | None = None
    carried: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)  # for everything that a task draws
        self._judge: Callable[[], float] | None = None
        self._judgments = 0
        self._asked = False
        self._best, self._best_state = math.inf, None
        self._optimizer: torch.optim.Optimizer | None = None
        self._target: SizeTarget | None = None

    def keep_best(self, judge: Callable[[], float], times: int) -> None:
        """Restore, at the end, the state of the model with the lowest value.

        Not in a training to a size: only its last state has it.

        Args:
            judge: Returns a value of the model, lower being better.
            times: How often it is called: evenly spaced, the last time after the last step.
        """
        self._judge, self._judgments = judge, times

    def batches(
        self,
        count: int,
        batch: int,
        warm_up: int = WARM_UP,
        order: Callable[[], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Indices of a batch for each step, in reshuffled passes.

        The learning rate rises over ``warm_up`` steps and falls to zero by half a cosine. After the last step the best
        judged state is restored.

        Args:
            count: Number of items; indices are below it.
            batch: Items per batch; at most ``count`` are used.
            warm_up: Number of steps, >= 1.
            order: Draws the order of one pass; None: a random permutation. Items that fill no batch are left out.

        Yields:
            Indices, one batch after the other.

        Raises:
            ConfigError: ``minimise`` was not called for a batch.
        """
        self._warm_up = warm_up
        batch = min(batch, count)
        draw = order or (lambda: torch.randperm(count, generator=self.generator))
        saved = None if self.checkpoint is None or self.step else self.checkpoint.load()
        if saved is None:
            self._prepare()
            indices, at = draw(), 0
        else:
            indices, at = self._go_on(saved)
        self.model.train()
        while self.step < self.steps:
            if at + batch > len(indices):
                indices, at = draw(), 0
            before = self.step
            yield indices[at : at + batch]
            if self.step == before:
                raise ConfigError(
                    "A batch was not used: call training.minimise(loss) once for each of training.batches(...)."
                )
            at += batch
            if self.checkpoint is not None and self.step % self.checkpoint.every == 0 and self.step < self.steps:
                self.checkpoint.save(self._state(indices, at))
        if self._best_state is not None:
            self.model.load_state_dict(self._best_state)

    def _state(self, indices: Tensor, at: int) -> dict[str, Any]:
        """All that the rest of the training depends on, but for its arguments."""
        return {
            "step": self.step,
            "indices": indices,
            "at": at,
            "generator": self.generator.get_state(),
            "recipe": None if self.recipe is None else self.recipe.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": {} if self._optimizer is None else self._optimizer.state_dict(),
            "target": None if self._target is None else self._target.state_dict(),
            "best": self._best,
            "best_state": self._best_state,
            "carried": self.carried,
        }

    def _go_on(self, saved: dict[str, Any]) -> tuple[Tensor, int]:
        """The state of a checkpoint; the pass that was under way, and how much of it is done."""
        if self.recipe is not None:
            self.recipe.load_state_dict(saved["recipe"])
        self.model.load_state_dict(saved["model"])
        self.step, self._best, self._best_state = saved["step"], saved["best"], saved["best_state"]
        self._prepare().load_state_dict(saved["optimizer"])
        if self._target is not None:
            self._target.load_state_dict(saved["target"])
        self.generator.set_state(saved["generator"])
        self.carried.clear()
        self.carried.update(saved["carried"])
        restore_random(saved)
        return saved["indices"], saved["at"]

    def taught(self, inputs: Any, scores: Tensor, loss: Tensor) -> Tensor:
        """Add the teacher's loss, if there is a teacher.

        Args:
            inputs: Inputs of the batch.
            scores: The model's logits for them.
            loss: The task's loss.

        Returns:
            The weighted sum of both losses; ``loss`` itself without a teacher.
        """
        self._asked = True
        return loss if self.distillation is None else self.distillation(inputs, scores, loss)

    def minimise(self, loss: Tensor, clip: float | None = None) -> None:
        """Take one optimiser step.

        Args:
            loss: The loss of the batch, a scalar.
            clip: Upper bound on the norm of the gradient; None: no bound.

        Raises:
            NonFiniteError: The loss is not finite; the message names the step.
            ConfigError: It is not called within ``batches``, or there is a teacher and ``taught`` was not called.
        """
        if self._optimizer is None:
            raise ConfigError("training.minimise belongs into a loop: for chosen in training.batches(count, batch).")
        if self.distillation is not None and not self._asked:
            raise ConfigError(
                "There is a teacher, which the training does not ask: call training.minimise(training.taught(inputs, "
                "scores, loss)), or leave the teacher out."
            )
        self._asked = False
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"The loss is {loss.item()} at step {self.step}: use a smaller learning rate than {self.lr:g}."
            )
        if self._target is not None:
            loss = loss + self._target.penalty()
        self._optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        if self._target is not None:
            self._target.step()
        if self.recipe is not None and self.recipe.step():
            self._prepare()
        due = self.step * self._judgments // self.steps > (self.step - 1) * self._judgments // self.steps
        if due and (self.recipe is None or self.recipe.done) and self._target is None and self._judge is not None:
            if (value := self._judge()) < self._best:
                self._best, self._best_state = value, copy.deepcopy(self.model.state_dict())
            self.model.train()
        self.progress(self.step)

    def importance(self) -> dict[str, Tensor]:
        """Importance of the parameters, from Adam's second moments (``deepthin.torch.adam_importance``).

        Returns:
            Parameter name -> array of its shape; empty before the first step.
        """
        return {} if self._optimizer is None else adam_importance(self._optimizer, self.model)

    def _prepare(self) -> torch.optim.Optimizer:
        """Create an optimiser for the present parameters, with the rest of the learning-rate schedule."""
        first = self.step

        def rate(step: int) -> float:
            done = first + step
            return min((done + 1) / self._warm_up, 1.0) * 0.5 * (1 + math.cos(math.pi * done / self.steps))

        groups = parameter_groups(self.model, self.lr, self.learning_rate_multiplier, weight_decay=0.0)
        if self.decay:
            decays = [{**group, "weight_decay": 0.0 if group["name"] == STEPS else self.decay} for group in groups]
            groups = [part for group in decays for part in _by_decay(self.model, group)]
        # fused AdamW saves a third of a dense step's time
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, rate)
        if any(weight.file_bytes for weight in coded_weights(self.model)):
            self._target = SizeTarget(self.model, self.steps - first)
        return self._optimizer


def _by_decay(model: nn.Module, group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a group into matrices and codes, which decay as the group says, and all else."""
    codes = {id(p) for module in model.modules() if isinstance(module, ThinWeight) for p in module.parameters()}
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for parameter in group["params"]:
        parts[parameter.dim() < 2 and id(parameter) not in codes].append(parameter)
    decays = group["weight_decay"], 0.0
    return [{**group, "params": part, "weight_decay": w} for part, w in zip(parts, decays, strict=True) if part]


def predict(model: nn.Module, inputs: Tensor, batch: int = 1000) -> Tensor:
    """The outputs of a model in evaluation mode, computed in batches.

    Args:
        model: The network.
        inputs: Array, items first.
        batch: Items per batch.

    Returns:
        The outputs, items first.
    """
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(batch)])


def error(scores: Tensor, targets: Tensor) -> float:
    """Items whose likeliest class is wrong.

    Args:
        scores: Array, items x classes.
        targets: Class of each item.

    Returns:
        Percent.
    """
    return 100 * (scores.argmax(1) != targets).double().mean().item()
