"""A user's own network and training as a task: three functions, named on the command line (docs/comparison.md)."""

import importlib
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deepthin.method import ConfigError


class _Seen(Exception):
    """Carries the first item that a model was given."""


class Own:
    """Three functions, less being better in what the third gives; ``split`` is "dev" or "test".

    ``factory([width])`` builds the dense network, ``train(model, training)`` trains it, ``evaluate(model, split)`` is
    a number, or several by name. ``train`` gets a network that is dense or thin, and a
    `deepthin.tasks.training.Training`. The same-size network needs a factory that takes a ``width`` with a default.
    """

    DEPTH = None
    DEFAULT_STEPS = 1000
    LEARNING_RATE = 1e-3
    ALLOCATION = "flat"
    LEARNING_RATES: ClassVar[dict[str, float]] = {}
    ALLOCATIONS: ClassVar[dict[str, float | str]] = {}
    OPTIONS: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, name: str, factory: Callable[..., Any], train: Callable[..., Any], evaluate: Callable[..., Any]):
        self.NAME, self._factory, self._train, self._evaluate = name, factory, train, evaluate
        width = signature(factory).parameters.get("width")
        if width is not None and width.default is Parameter.empty:
            raise ConfigError(f"--model {name}: give width a default, which is that of the dense network.")
        try:
            signature(factory).bind()
        except TypeError as error:
            raise ConfigError(f"--model {name}: the function must work without arguments, but has a {error}.") from None
        self._has_width = width is not None
        self.WIDTH: int = width.default if width is not None else 1
        self._first = self._item()
        self.METRICS = tuple(self.evaluate(self.build(None, self.WIDTH), None, "dev"))  # also shows mistakes at once
        self.about = f"{factory.__module__}:{factory.__name__}"

    @classmethod
    def find(cls, factory: str, train: str, evaluate: str) -> "Own":
        """From three ``package.module:function``; ConfigError, naming the option, for what cannot be found or used."""
        found = [
            function(spec, option)
            for spec, option in ((factory, "--model"), (train, "--train"), (evaluate, "--evaluate"))
        ]
        return cls(factory.partition(":")[2], *found)

    def load(self, _: Path | None) -> "Own":
        """The data are the user's business."""
        return self

    def build(self, _: Any, width: int) -> nn.Module:
        """The dense network; ConfigError if there is but one width and another is asked for."""
        if width != self.WIDTH and not self._has_width:
            raise ConfigError(
                f"{self.about} takes no width, so there is no same-size network: give it a parameter, such as "
                "width=256, or leave same-size out of --methods."
            )
        model = self._factory(width=width) if self._has_width else self._factory()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"--model {self.NAME} returned {type(model).__name__}, no torch.nn.Module.")
        return model

    def rules(self, rule: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Every matrix."""
        return {"*": rule}

    def fit(self, model: nn.Module, _: Any, training: Any) -> None:
        """The user's training."""
        self._train(model, training)

    def evaluate(self, model: nn.Module, _: Any, split: str) -> dict[str, float]:
        """The user's numbers; one without a name is called error."""
        model.eval()
        with torch.no_grad():
            found = self._evaluate(model, split)
        values = found if isinstance(found, Mapping) else {"error": found}
        try:
            return {str(name): float(value) for name, value in values.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        except (TypeError, ValueError):
            raise ConfigError(
                f"--evaluate returned {found!r} for {split!r}: return a number, or a mapping of names to numbers."
            ) from None

    def example(self, _: Any) -> tuple[Any, ...]:
        """The first item that the network is given when it is evaluated."""
        return self._first

    def _item(self) -> tuple[Any, ...]:
        model = self.build(None, self.WIDTH)

        def first(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _Seen(tuple(x[:1] if isinstance(x, Tensor) and x.dim() else x for x in inputs))

        model.register_forward_pre_hook(first)
        try:
            self.evaluate(model, None, "dev")
        except _Seen as seen:
            return seen.args[0]
        raise ConfigError("--evaluate never calls the network: it must judge what model(...) gives.")


def function(spec: str, option: str) -> Callable[..., Any]:
    """What ``package.module:function`` names; ConfigError with the option otherwise."""
    module_name, _, name = spec.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(f"{option} {spec}: cannot import {module_name!r} from {Path.cwd()}: {error}.") from None
    except (AttributeError, ValueError, TypeError):
        raise ConfigError(f"{option} {spec}: write package.module:function; {module_name!r} has no {name!r}.") from None
    if isinstance(found, nn.Module) or not callable(found):
        raise ConfigError(f"{option} {spec} is {type(found).__name__}: it must be a function.")
    return found
