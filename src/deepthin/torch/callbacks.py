"""Callbacks for the training loops of others: Lightning, and the Trainer of Hugging Face.

For a size, they add the gradient of the penalty to the gradients of the loss just before the optimiser's step, and
steer after it. For learning rates, they enlarge the step that the optimiser took with codes: to all optimisers whose
step is proportional to the rate, this is the larger rate of ``parameter_groups``, without groups.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.torch.rates import parameter_groups
from deepthin.torch.recipe import Recipe
from deepthin.torch.replaced import rates_are_right


class Target(Protocol):
    """What a callback asks of ``SizeTarget``."""

    def add_gradient(self) -> None:
        """Add the penalty's gradient."""
        ...

    def step(self) -> None:
        """Steer."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What steering depends on.

        Returns:
            Name -> number.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: What ``state_dict`` returned.
        """
        ...


STATE = "size_target.json"


def lightning_callback(target: Target) -> Any:
    """A callback for ``lightning.Trainer``.

    Args:
        target: The target; its steps are those of the optimiser.

    Returns:
        A ``lightning.pytorch.Callback``, whose state is saved in Lightning's checkpoints.

    Raises:
        ImportError: Lightning is not installed.
    """
    from lightning.pytorch import Callback

    class SizeTargetCallback(Callback):
        """Adds the penalty's gradient before each step of the optimiser, and steers after it."""

        def __init__(self) -> None:
            self._due = False

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            target.add_gradient()
            self._due = True

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self._due:
                self._due = False
                target.step()

        def state_dict(self) -> dict[str, Any]:
            return target.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            target.load_state_dict(state_dict)

    return SizeTargetCallback()


def trainer_callback(target: Target) -> Any:
    """A callback for ``transformers.Trainer``.

    Args:
        target: The target; its steps are those of the optimiser.

    Returns:
        A ``transformers.TrainerCallback``. Its state is the file ``size_target.json`` in each checkpoint, from which a
        resumed training goes on.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    class SizeTargetCallback(TrainerCallback):
        """Adds the penalty's gradient before each step of the optimiser, and steers after it."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            saved = _checkpoint(args, state) / STATE
            if state.global_step and saved.exists():
                target.load_state_dict(json.loads(saved.read_text()))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            target.add_gradient()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            target.step()

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.is_world_process_zero and (folder := _checkpoint(args, state)).is_dir():
                (folder / STATE).write_text(json.dumps(target.state_dict()))

    return SizeTargetCallback()


class _Steps:
    """Enlarges steps of codes: to be called just before a step of the optimiser, and after it."""

    def __init__(self, model: nn.Module, learning_rate_multiplier: float | None) -> None:
        self.model, self.multiplier = model, learning_rate_multiplier
        self._before: list[tuple[nn.Parameter, Tensor, float, float]] = []

    def begin(self) -> None:
        """No optimiser need have groups for this model."""
        rates_are_right(self.model)

    def before(self, optimizer: Any) -> None:
        """Keep the codes as they are."""
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        if any(group.get("name") for group in optimizer.param_groups):
            raise ConfigError(
                "The optimiser has the groups of parameter_groups already: give it model.parameters(), or leave the "
                "callback out. Otherwise codes would learn at the square of their multiplier."
            )
        self._before = [
            (p, p.detach().clone(), group["lr"], group.get("weight_decay", 0.0) * group["lr"] * rates[id(p)])
            for group in parameter_groups(self.model, 1.0, self.multiplier)
            if group["lr"] != 1.0
            for p in group["params"]
            if id(p) in rates
        ]

    def after(self) -> None:
        """Enlarge the step."""
        with torch.no_grad():
            for parameter, old, times, decay in self._before:
                parameter.copy_(old + times * (parameter - old) - decay * old)
        self._before = []


def rates_callback(model: nn.Module, learning_rate_multiplier: float | None = None) -> Any:
    """A callback with which ``transformers.Trainer`` trains codes at their learning rates.

        trainer = transformers.Trainer(model, arguments, callbacks=[rates_callback(model)])

    The Trainer's own optimiser and schedule stay; ``learning_rate`` is that of the dense network.

    Args:
        model: The thin model.
        learning_rate_multiplier: As in ``parameter_groups``.

    Returns:
        A ``transformers.TrainerCallback`` without a state.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    steps = _Steps(model, learning_rate_multiplier)

    class RatesCallback(TrainerCallback):
        """Enlarges the steps of codes."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            steps.begin()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            steps.before(rest["optimizer"])

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            steps.after()

    return RatesCallback()


def lightning_rates_callback(model: nn.Module, learning_rate_multiplier: float | None = None) -> Any:
    """The same for ``lightning.Trainer``, whose module returns a plain optimiser.

    Args:
        model: The thin model.
        learning_rate_multiplier: As in ``parameter_groups``.

    Returns:
        A ``lightning.pytorch.Callback`` without a state.

    Raises:
        ImportError: Lightning is not installed.
    """
    from lightning.pytorch import Callback

    steps = _Steps(model, learning_rate_multiplier)

    class RatesCallback(Callback):
        """Enlarges the steps of codes."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            steps.begin()

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            steps.before(optimizer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            steps.after()

    return RatesCallback()


def recipe_callback(recipe: Recipe) -> Any:
    """A callback with which ``transformers.Trainer`` goes through the stages of a recipe.

    When a stage replaces parameters, the new ones take the place of the old in the Trainer's optimiser, and its rates
    are those of ``rates_callback``, which this includes. A training cannot be resumed from a checkpoint.

    Args:
        recipe: The recipe; its steps are those of the optimiser.

    Returns:
        A ``transformers.TrainerCallback``.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    steps = _Steps(recipe.model, recipe.learning_rate_multiplier)

    class RecipeCallback(TrainerCallback):
        """Counts the steps, and exchanges parameters in the optimiser."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step != recipe.steps:
                raise ConfigError(
                    f"The Trainer is at step {state.global_step} and the recipe at {recipe.steps}: a training with a "
                    "recipe callback cannot be resumed. Begin it anew."
                )
            steps.begin()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            steps.before(rest["optimizer"])

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            steps.after()
            if recipe.step():
                _exchange(rest["optimizer"], recipe.model)
                steps.begin()

    return RecipeCallback()


def _exchange(optimizer: Any, model: nn.Module) -> None:
    """Exchange parameters that a model no longer has for those that it has got, in the first group."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    now = {id(p): p for p in model.parameters() if p.requires_grad}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        gone = [p for p in group["params"] if id(p) not in now]
        group["params"] = [p for p in group["params"] if id(p) in now]
        for parameter in gone:
            optimizer.state.pop(parameter, None)
    optimizer.param_groups[0]["params"] += [p for key, p in now.items() if key not in held]


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder of the checkpoint at the present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
