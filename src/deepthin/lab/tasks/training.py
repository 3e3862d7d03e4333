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
from deepthin.torch import Distillation, Recipe, adam_importance, parameter_groups
from deepthin.torch.weight import ThinWeight

WARM_UP = 50  # steps


@dataclass(kw_only=True)
class Training:
    """One training: so many steps from a seed. Tasks differ in where batches and losses come from.

        for chosen in training.batches(len(inputs), 128):
            training.minimise(cross_entropy(model(inputs[chosen]), targets[chosen]))

    ``lr`` is the rate of what is dense; codes get their multiple of it. ``decay``: in every step, matrices and codes
    lose their rate times that of themselves (AdamW; Loshchilov and Hutter, 2019, arXiv:1711.05101). ``recipe`` takes
    the dense model through its stages; states are judged when it is as thin as it gets. ``distillation`` has a teacher,
    which ``taught`` asks. ``checkpoint`` keeps the state of the training, from which ``batches`` goes on; what a
    task carries from step to step, such as a recurrent state, belongs into ``carried``.
    """

    model: nn.Module
    steps: int
    lr: float
    decay: float = 0.0
    seed: int = 0
    learning_rate_multiplier: float | None = None  # of codes, times ``lr``; None: that of each method
    recipe: Recipe | None = None
    distillation: Distillation | None = None
    progress: Callable[[int], None] = lambda _: None  # told after each step how many there were
    checkpoint: Checkpoint | None = None
    carried: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)  # for whatever a task draws
        self._judge: Callable[[], float] | None = None
        self._judgments = 0
        self._asked = False
        self._best, self._best_state = math.inf, None
        self._optimizer: torch.optim.Optimizer | None = None

    def keep_best(self, judge: Callable[[], float], times: int) -> None:
        """``judge`` the model so many times, evenly and at the end; the state with the lowest value stays."""
        self._judge, self._judgments = judge, times

    def batches(
        self,
        count: int,
        batch: int,
        warm_up: int = WARM_UP,
        order: Callable[[], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Indices below ``count``, so many at a time, in reshuffled passes, one for each step.

        ``order`` draws a pass, where it is not to be any permutation; what fills no batch at its end is left out.
        The rate rises over ``warm_up`` steps and falls to zero by half a cosine. At the end the best judged state is
        restored.
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
        self.generator.set_state(saved["generator"])
        self.carried.clear()
        self.carried.update(saved["carried"])
        restore_random(saved)
        return saved["indices"], saved["at"]

    def taught(self, inputs: Any, scores: Tensor, loss: Tensor) -> Tensor:
        """The loss of a batch whose ``scores`` are logits, joined by a teacher's of ``inputs`` if there is one."""
        self._asked = True
        return loss if self.distillation is None else self.distillation(inputs, scores, loss)

    def minimise(self, loss: Tensor, clip: float | None = None) -> None:
        """One step down the gradient of ``loss``, whose norm is at most ``clip``.

        NonFiniteError names the step if the loss is no number.
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
        self._optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        if self.recipe is not None and self.recipe.step():
            self._prepare()
        due = self.step * self._judgments // self.steps > (self.step - 1) * self._judgments // self.steps
        if due and (self.recipe is None or self.recipe.done) and self._judge is not None:
            if (value := self._judge()) < self._best:
                self._best, self._best_state = value, copy.deepcopy(self.model.state_dict())
            self.model.train()
        self.progress(self.step)

    def importance(self) -> dict[str, Tensor]:
        """Of all that is trained now, by what the optimiser keeps (``deepthin.torch.adam_importance``)."""
        return {} if self._optimizer is None else adam_importance(self._optimizer, self.model)

    def _prepare(self) -> torch.optim.Optimizer:
        """An optimiser for the parameters that there are now, and its rate from here on."""
        first = self.step

        def rate(step: int) -> float:
            done = first + step
            return min((done + 1) / self._warm_up, 1.0) * 0.5 * (1 + math.cos(math.pi * done / self.steps))

        groups = parameter_groups(self.model, self.lr, self.learning_rate_multiplier)
        if self.decay:
            groups = [part for group in groups for part in _by_decay(self.model, group, self.decay)]
        # Fused: a third of a dense step
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, rate)
        return self._optimizer


def _by_decay(model: nn.Module, group: dict[str, Any], decay: float) -> list[dict[str, Any]]:
    """A group in two: matrices and codes, and all else."""
    codes = {id(p) for module in model.modules() if isinstance(module, ThinWeight) for p in module.parameters()}
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for parameter in group["params"]:
        parts[parameter.dim() < 2 and id(parameter) not in codes].append(parameter)
    return [{**group, "params": part, "weight_decay": w} for part, w in zip(parts, (decay, 0.0), strict=True) if part]


def predict(model: nn.Module, inputs: Tensor, batch: int = 1000) -> Tensor:
    """The model's outputs in evaluation, items first."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(batch)])


def error(scores: Tensor, targets: Tensor) -> float:
    """Share of items whose likeliest class is wrong, in percent."""
    return 100 * (scores.argmax(1) != targets).double().mean().item()
