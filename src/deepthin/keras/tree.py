"""The layers of a model and their weights, by the names that rules and files give them."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from deepthin.errors import ConfigError
from deepthin.keras.generated import ThinLayer
from deepthin.keras.layers import RECURRENT, THIN
from deepthin.keras.layout import Layout, Shape, layouts
from deepthin.keras.weight import ThinWeight


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight is used.

    Attributes:
        layer: The layer.
        weight: The weight's name in the layer.
    """

    layer: Any
    weight: str


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of the file in the model: a variable, a row of one, or a tensor of a ThinWeight.

    Attributes:
        places: The layers that use it; several if it is shared.
        shape: Shape of the Keras weight.
        layout: The permutation from the Keras weight to the tensor of the file.
        variable: The variable; None if it is thin.
        thin: The ThinWeight; None if it is dense.
        index: Which of the ThinWeight's tensors.
    """

    places: tuple[Place, ...]
    shape: Shape
    layout: Layout
    variable: Any = None
    thin: ThinWeight | None = None
    index: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Equal for all names of one tensor."""
        if self.thin is not None:
            return id(self.thin), self.index
        return id(self.variable), self.layout.row or 0


def walk(layer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A layer and all layers inside it.

    A child goes by its name; if Keras named it and a user's class holds it, by the attribute, and in a list or
    dictionary by its index or key there as well.

    Args:
        layer: The model or layer.
        path: Its dotted path.

    Yields:
        Dotted path and layer; a shared layer under each of its paths.
    """
    yield path, layer
    if isinstance(layer, ThinWeight):
        return
    for name, child in _children(layer):
        yield from walk(child, f"{path}.{name}".lstrip("."))


def tensors(model: Any) -> dict[str, Held]:
    """Every tensor that a file of the model contains.

    Args:
        model: A built model, dense or thin.

    Returns:
        Name in the file -> tensor; a shared one under each of its names.

    Raises:
        ConfigError: A layer has no weights yet, or two weights have the same name.
    """
    by_name: dict[str, Held] = {}

    def add(name: str, held: Held) -> None:
        name = name.lstrip(".")
        if name in by_name and by_name[name].key != held.key:
            raise ConfigError(f"Two weights are called {name}: give their layers different names.")
        by_name[name] = held

    for path, layer in walk(model):
        if isinstance(layer, ThinWeight):
            continue
        if not layer.built:
            raise ConfigError(
                f"{path or layer.name} has no weights yet: build the model, or call it once on a batch, first."
            )
        for name, variable in own_variables(layer).items():
            shape = tuple(variable.shape)
            for stored, layout in layouts(layer, name, shape).items():
                add(f"{path}.{stored}", Held((Place(layer, name),), shape, layout, variable=variable))
        if isinstance(layer, ThinLayer):
            for name, thin in layer.thin.items():
                shape = layer.shapes[name]
                layout = layouts(layer, name, shape)[name]
                held = Held((Place(layer, name),), shape, layout, thin=thin, index=layer.indices[name])
                add(f"{path}.{name}", held)
    places: dict[tuple[int, int], list[Place]] = {}
    for held in by_name.values():
        users = places.setdefault(held.key, [])
        if not any(place.layer is held.places[0].layer for place in users):
            users.append(held.places[0])
    return {
        name: Held(tuple(places[held.key]), held.shape, held.layout, held.variable, held.thin, held.index)
        for name, held in by_name.items()
    }


def layer_name(name: str) -> str:
    """A valid name for the ThinWeight of a tensor: torch allows no dots there, Keras no slashes, TensorFlow less still.

    Args:
        name: Dotted name of the tensor.

    Returns:
        The name with underscores in place of all but letters, digits and hyphens.
    """
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def own_variables(layer: Any) -> dict[str, Any]:
    """The weights of a layer itself, without those of layers inside it, seeds and states of sequences.

    Args:
        layer: The layer.

    Returns:
        Name -> variable; equal names are numbered from the second on.
    """
    variables: dict[str, Any] = {}
    for variable in (*layer._trainable_variables, *layer._non_trainable_variables):
        name, number = variable.name, 1
        while name in variables:
            name, number = f"{variable.name}_{number}", number + 1
        variables[name] = variable
    return variables


def _children(layer: Any) -> list[tuple[str, Any]]:
    listed = layer.layers if isinstance(layer, keras.Model) else layer._flatten_layers(False, False)
    if _of_keras(layer):
        return [(child.name, child) for child in listed]
    children = [(name, child) for name, value in _attributes(layer).items() for name, child in _within(name, value)]
    known = {id(child) for _, child in children}
    children += [(child.name, child) for child in listed if id(child) not in known]
    listed = {id(child) for child in listed}
    named: dict[int, tuple[str, Any]] = {}
    for name, child in children:
        if id(child) in listed:
            named.setdefault(id(child), (name if is_unnamed(child) else child.name, child))
    return list(named.values())


def _attributes(layer: Any) -> dict[str, Any]:
    """Public attributes of a user's layer; with the torch backend layers are in ``_modules``."""
    everything = {**vars(layer), **vars(layer).get("_modules", {})}
    return {name: value for name, value in everything.items() if not name.startswith("_")}


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Layers in an attribute: its name with their index or key, and the layer."""
    if isinstance(value, keras.layers.Layer):
        yield name, value
    elif isinstance(value, list | tuple | Mapping):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _within(f"{name}.{key}", inner)


def _of_keras(layer: Any) -> bool:
    return type(layer).__module__.startswith(("keras.", "deepthin.keras"))


def is_unnamed(layer: Any) -> bool:
    """Whether a layer was named by Keras: its class, and a number that depends on the layers made before.

    Args:
        layer: The layer.

    Returns:
        Whether its name has that form.
    """
    return re.fullmatch(rf"{re.escape(_usual_name(layer))}(_\d+)?", layer.name) is not None


def _usual_name(layer: Any) -> str:
    """The name that Keras gives the first layer of a class; for a thin layer, of its dense class."""
    kinds = {thin: plain for plain, thin in {**THIN, **RECURRENT}.items()}
    kind = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", kinds.get(type(layer), type(layer)).__name__)
    usual = re.sub(r"([a-z])([A-Z])", r"\1_\2", kind).lower()
    direction = re.match(r"forward_|backward_", layer.name)  # of a Bidirectional
    return f"{direction[0]}{usual}" if direction else usual


def steady(model: Any, name: str) -> str:
    """The name that a tensor would have if its model were the first made in the process.

    Keras numbers unnamed layers in the order in which they are made, so names, and draws from them, would depend on it.

    Args:
        model: The model.
        name: Dotted name of the tensor.

    Returns:
        The name with numbers that begin at the first layer of each class within a layer.
    """
    path, _, weight = name.rpartition(".")
    usual = _counterparts(model, lambda _, name, count: [name, *(f"{name}_{k}" for k in range(1, count))])
    return f"{usual[path]}.{weight}" if path in usual else name


def renumbered(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Match the numbers that Keras appends to unnamed layers, in order.

    Args:
        model: The model.
        names: All names in a file.

    Returns:
        Name in the file -> name in the model, for names that differ.
    """
    known = set(names)

    def theirs(path: str, name: str, count: int) -> list[str]:
        inside = f"{path}." if path else ""
        siblings = {other[len(inside) :].partition(".")[0] for other in known if other.startswith(inside)}
        return sorted((other for other in siblings if re.fullmatch(rf"{re.escape(name)}(_\d+)?", other)), key=_number)

    there = {theirs: ours for ours, theirs in _counterparts(model, theirs).items()}
    return {
        name: f"{there[path]}.{weight}"
        for name in known
        for path, _, weight in [name.rpartition(".")]
        if there.get(path, path) != path
    }


def _counterparts(model: Any, theirs: Callable[[str, str, int], list[str]]) -> dict[str, str]:
    """Path of each layer of the model -> its path where unnamed layers have the names that ``theirs`` returns.

    ``theirs`` takes a path there, the usual name of a class, and how many layers of it the model has in that place.
    """
    paths: dict[str, str] = {}

    def visit(layer: Any, here: str, there: str) -> None:
        paths[here] = there
        children = _children(layer)
        groups: dict[str, list[str]] = {}
        for name, child in children:
            if name == child.name and is_unnamed(child) and child.weights:
                groups.setdefault(_usual_name(child), []).append(name)
        other: dict[str, str] = {}
        for usual, ours in groups.items():
            names = theirs(there, usual, len(ours))
            if len(names) == len(ours):
                other |= dict(zip(sorted(ours, key=_number), names, strict=True))
        for name, child in children:
            visit(child, f"{here}.{name}".lstrip("."), f"{there}.{other.get(name, name)}".lstrip("."))

    visit(model, "", "")
    return paths


def _number(name: str) -> int:
    """The number that Keras appended; 0 for the first layer, which has none."""
    digits = re.search(r"_(\d+)$", name)
    return int(digits[1]) if digits else 0
