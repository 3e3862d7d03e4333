"""A user's own network and training as a task: three functions, named on the command line (docs/comparison.md)."""

import importlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, Signature, getsourcefile, isclass, signature
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError


class _Seen(Exception):
    """Carries the first item that a model was given."""


class Own:
    """Three functions, less being better in what the third gives; ``split`` is "dev" or "test".

    ``factory([width])`` builds the dense network, ``train(model, training)`` trains it, ``evaluate(model, split)`` is
    a number, or several by name. ``train`` gets a network that is dense or thin, and a
    `deepthin.tasks.training.Training`. The same-size network needs a factory that takes a ``width`` with a default.
    """

    depth = None
    steps = 1000
    asks_teacher = True  # by training.taught, which is the user's to call
    learning_rate = 1e-3
    allocation = "flat"
    loss = calibration = None

    def __init__(self, name: str, factory: Callable[..., Any], train: Callable[..., Any], evaluate: Callable[..., Any]):
        """Tries the functions, so that mistakes show before the training."""
        self.name, self._factory, self._train, self._evaluate = name, factory, train, evaluate
        self.learning_rates: dict[str, float] = {}
        self.decays: dict[str, float] = {}
        self.allocations: dict[str, float | str] = {}
        self.options: dict[str, dict[str, Any]] = {}
        width = _signature(factory, f"--model {name}").parameters.get("width")
        if width is not None and width.default is Parameter.empty:
            raise ConfigError(f"--model {name}: give width a default, which is that of the dense network.")
        check_no_arguments(factory, f"--model {name}")
        self._has_width = width is not None
        self.width: int = width.default if width is not None else 1
        three = (factory, train, evaluate)
        files = {file for f in three if (file := _source(f)) is not None}
        sources = "".join(file.read_text(errors="replace") for file in sorted(files, key=str))
        names = ", ".join(map(_name, three))
        self.about = f"{names}, checksum {zlib.crc32(sources.encode()):08x}"  # another source gives other results
        self._first = self._item()
        self.metrics = tuple(self.evaluate(self.build(None, self.width), None, "dev"))

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
        if width != self.width and not self._has_width:
            raise ConfigError(
                f"--model {self.name} takes no width, so there is no same-size network: give it a parameter, such as "
                "width=256, or leave same-size out of --methods, and --width."
            )
        model = self._factory(width=width) if self._has_width else self._factory()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"--model {self.name} returned {type(model).__name__}, no torch.nn.Module.")
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
            numbers = {str(name): float(value) for name, value in values.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        except (TypeError, ValueError):
            numbers = {}
        if not numbers:
            raise ConfigError(
                f"--evaluate returned {found!r} for {split!r}: return a number, or a mapping of names to numbers."
            )
        return numbers

    def example(self, _: Any) -> tuple[Any, ...]:
        """The first item that the network is given when it is evaluated."""
        return self._first

    def _item(self) -> tuple[Any, ...]:
        model = self.build(None, self.width)

        def first(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            try:
                bound = signature(model.forward).bind(*inputs, **named)
                bound.apply_defaults()
            except TypeError as error:
                raise ConfigError(f"--evaluate calls the network with {error}.") from None
            if bound.kwargs:
                raise ConfigError(
                    f"The network takes {', '.join(bound.kwargs)} by name only: let it take them in order."
                )
            raise _Seen(tuple(map(_cut, bound.args)))

        handle = model.register_forward_pre_hook(first, with_kwargs=True)
        try:
            self.evaluate(model, None, "dev")
        except _Seen as seen:
            handle.remove()
            with torch.no_grad():
                model.eval()(*seen.args[0])
            return seen.args[0]
        raise ConfigError("--evaluate never calls the network: it must judge what model(...) gives.")


def _cut(inputs: Any) -> Any:
    """One item of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[:1] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {key: _cut(value) for key, value in inputs.items()}  # pyright: ignore[reportUnknownVariableType]
    return type(inputs)(map(_cut, inputs)) if type(inputs) in (list, tuple) else inputs  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def check_no_arguments(factory: Callable[..., Any], where: str) -> None:
    """ConfigError if what builds a network cannot be called without arguments."""
    try:
        _signature(factory, where).bind()
    except TypeError as error:
        raise ConfigError(f"{where}: the function must work without arguments, but has a {error}.") from None


def _signature(factory: Callable[..., Any], where: str) -> Signature:
    try:
        return signature(factory)
    except (ValueError, TypeError):  # something built in
        raise ConfigError(
            f"{where} is {type(factory).__name__}, whose arguments cannot be told: write a function around it."
        ) from None


def _plain_function(found: Any) -> Any:
    """The function or class that does the work of a callable: what ``partial`` calls, the class of an object."""
    while isinstance(found, partial):
        found = cast(Any, found).func
    found = getattr(found, "__func__", found)  # of a bound method
    return found if hasattr(found, "__qualname__") else type(found)


def _source(found: Any) -> Path | None:
    """The file in which a callable is written; none for what is built in or typed in."""
    try:
        file = getsourcefile(_plain_function(found))
    except TypeError:
        return None
    return Path(file) if file is not None and Path(file).is_file() else None


def _name(found: Any) -> str:
    """``module:function``, with the arguments of a ``partial`` and the attributes of an object where they are plain."""
    inner = _plain_function(found)
    name = f"{inner.__module__}:{inner.__name__}"
    if isinstance(found, partial):
        outer = cast(Any, found)
        return f"{_name(outer.func)}{_told([*outer.args], outer.keywords)}"
    owner = getattr(found, "__self__", found)
    return name if owner is inner or isclass(owner) else f"{name}{_told([], getattr(owner, '__dict__', {}))}"


def _told(values: Sequence[Any], named: Mapping[str, Any]) -> str:
    """Arguments as text that is the same in every run: of what is not plain, the type."""

    def text(value: Any, depth: int = 4) -> str:
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return repr(value)
        if type(value) in (list, tuple) and depth:
            return f"[{', '.join(text(part, depth - 1) for part in value)}]"
        if isinstance(value, partial) and depth:
            return _name(value)
        named = cast(Any, value)
        return f"{named.__module__}:{named.__qualname__}" if hasattr(named, "__qualname__") else type(named).__name__

    return f"({', '.join([*map(text, values), *(f'{key}={text(value)}' for key, value in named.items())])})"


def function(spec: str, option: str) -> Callable[..., Any]:
    """What ``package.module:function`` names; ConfigError with the option otherwise."""
    module_name, _, name = spec.partition(":")
    form = f"{option} {spec}: write package.module:function"
    if not module_name or not name or module_name.startswith("."):
        raise ConfigError(f"{form}.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{option} {spec}: cannot import {module_name!r} from {Path.cwd()}: {error}.") from None
    except Exception as error:  # whatever its source makes of it
        raise ConfigError(
            f"{option} {spec}: importing {module_name!r} raised {type(error).__name__}: {error}."
        ) from error
    found: Any = getattr(module, name, None)
    if found is None:
        raise ConfigError(f"{form}; {module_name!r} has no {name!r}.")
    if isinstance(found, nn.Module) or not callable(found):
        raise ConfigError(
            f"{option} {spec} is {type(found).__name__}: it must be a function"
            + (" that returns the network." if option == "--model" else ".")
        )
    return found
