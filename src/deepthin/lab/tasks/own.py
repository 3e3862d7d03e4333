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

Named = str | Callable[..., Any]
"""A function, or its name as ``package.module:function``."""


class _Seen(Exception):
    """Carries the first item that a model was given."""


class Own:
    """A task made of the user's three functions; lower values are better.

    ``factory([width])`` builds the dense network, ``train(model, training)`` trains it, dense or thin, by a
    `deepthin.tasks.training.Training`, and ``evaluate(model, split)`` returns a number, or several by name, for
    ``"dev"`` or ``"test"``. ``same-size`` networks need a factory that takes a ``width`` with a default.

    Args:
        name: Name of the task: the factory's.
        factory: Builds the network.
        train: Trains it.
        evaluate: Judges it.

    Raises:
        ConfigError: A function cannot be used; the message names the option.
    """

    depth = network = None
    networks = ()
    steps = 1000
    asks_teacher = True  # if the user's training calls training.taught
    learning_rate = 1e-3
    allocation = "flat"
    loss = calibration = None

    def __init__(self, name: str, factory: Callable[..., Any], train: Callable[..., Any], evaluate: Callable[..., Any]):
        """Call the functions once, so that mistakes show before the training."""
        self.name, self._factory, self._train, self._evaluate = name, factory, train, evaluate
        self.learning_rates: dict[str, float] = {}
        self.network_rates: dict[str, dict[str, float]] = {}
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
    def find(cls, factory: Named, train: Named, evaluate: Named) -> "Own":
        """Import the three functions.

        Args:
            factory: ``package.module:function`` of ``--model``, or the function itself.
            train: The same of ``--train``.
            evaluate: The same of ``--evaluate``.

        Returns:
            The task.

        Raises:
            ConfigError: A function cannot be found or used; the message names the option.
        """
        found = [
            resolved(spec, option)
            for spec, option in ((factory, "--model"), (train, "--train"), (evaluate, "--evaluate"))
        ]
        return cls(spelled(factory).partition(":")[2], *found)

    def load(self, _: Path | None) -> "Own":
        """The user's functions load their data themselves.

        Args:
            _: Not used.

        Returns:
            The task, which stands for the data.
        """
        return self

    def build(self, _: Any, width: int) -> nn.Module:
        """Build the dense network.

        Args:
            _: Not used.
            width: The width; any other than the default only where the factory takes one.

        Returns:
            The network.

        Raises:
            ConfigError: The factory takes no width, or returns no module.
        """
        if width != self.width and not self._has_width:
            raise ConfigError(
                f"--model {self.name} takes no width, so there is no same-size network: give it a parameter, such as "
                "width=256, or leave same-size out of --methods, and --width."
            )
        model = self._factory(width=width) if self._has_width else self._factory()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"--model {self.name} returned {type(model).__name__}, not a torch.nn.Module.")
        return model

    def rules(self, rule: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The table ``rules`` of a configuration that covers every matrix.

        Args:
            rule: Method and options.

        Returns:
            The pattern ``*`` -> ``rule``.
        """
        return {"*": rule}

    def fit(self, model: nn.Module, _: Any, training: Any) -> None:
        """Run the user's training.

        Args:
            model: The network, dense or thin; changed in place.
            _: Not used.
            training: Batches, optimiser and number of steps.
        """
        self._train(model, training)

    def evaluate(self, model: nn.Module, _: Any, split: str) -> dict[str, float]:
        """Run the user's evaluation.

        Args:
            model: The network.
            _: Not used.
            split: ``"dev"`` or ``"test"``.

        Returns:
            Metric -> value; a number without a name is called ``error``.

        Raises:
            ConfigError: The function returned neither a number nor a mapping of names to numbers.
        """
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
        """The first item that ``evaluate`` passes to the network.

        Args:
            _: Not used.

        Returns:
            The network's positional arguments.
        """
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
        raise ConfigError(f"{where}: the function must be callable without arguments: {error}.") from None


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


def spelled(named: Named) -> str:
    """The name of a function, as a command line has it.

    Args:
        named: The function, or its name already.

    Returns:
        ``package.module:function``.
    """
    return named if isinstance(named, str) else _name(named)


def resolved(named: Named, option: str) -> Callable[..., Any]:
    """The function that a name stands for.

    Args:
        named: The function itself, or its name as ``package.module:function``.
        option: The option that gave it, for messages.

    Returns:
        The function.

    Raises:
        ConfigError: It cannot be imported, or is no function.
    """
    return function(named, option) if isinstance(named, str) else named


def built(factory: Callable[..., Any], _: int = 0) -> nn.Module:
    """Build a network by a function without arguments.

    Args:
        factory: The function.
        _: A width, which it does not take.

    Returns:
        The network.

    Raises:
        ConfigError: The function needs arguments, or returns no module.
    """
    check_no_arguments(factory, f"--model {spelled(factory)}")
    model = factory()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {spelled(factory)} returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def function(spec: str, option: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        spec: ``package.module:function``.
        option: The option that gave it, for messages.

    Returns:
        The function.

    Raises:
        ConfigError: It cannot be imported, or is no function.
    """
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
