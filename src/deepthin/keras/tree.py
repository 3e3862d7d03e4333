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
    """Where a weight stands: its layer and its name there."""

    layer: Any
    weight: str


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of the file, or all of it: a variable of the model, or a tensor of a ThinWeight."""

    places: tuple[Place, ...]  # more than one where it is shared
    shape: Shape  # in Keras
    layout: Layout
    variable: Any = None
    thin: ThinWeight | None = None
    index: int = 0  # of the ThinWeight's tensors

    @property
    def key(self) -> tuple[int, int]:
        """The same for every name of one tensor."""
        if self.thin is not None:
            return id(self.thin), self.index
        return id(self.variable), self.layout.row or 0


def walk(layer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A layer and all within it, with their dotted paths; a shared layer under each of its paths.

    A layer goes by its name; one that a class of the user's holds without having named it, by the attribute, and one in
    a list or dictionary there by its place as well.
    """
    yield path, layer
    if isinstance(layer, ThinWeight):
        return
    for name, child in _children(layer):
        yield from walk(child, f"{path}.{name}".lstrip("."))


def tensors(model: Any) -> dict[str, Held]:
    """Every tensor that a file of the model holds, by its name; a shared one under each of its names.

    ConfigError for a model that has no weights yet.
    """
    found: dict[str, Held] = {}

    def add(name: str, held: Held) -> None:
        name = name.lstrip(".")
        if name in found and found[name].key != held.key:
            raise ConfigError(f"Two weights are called {name}: give their layers names of their own.")
        found[name] = held

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
    for held in found.values():
        own = places.setdefault(held.key, [])
        if not any(place.layer is held.places[0].layer for place in own):
            own.append(held.places[0])
    return {
        name: Held(tuple(places[held.key]), held.shape, held.layout, held.variable, held.thin, held.index)
        for name, held in found.items()
    }


def layer_name(name: str) -> str:
    """A tensor's name as that of a layer: torch wants no dots there."""
    return name.replace(".", "_")


def own_variables(layer: Any) -> dict[str, Any]:
    """The weights that a layer itself holds, by name: no seeds, and no states of sequences."""
    found: dict[str, Any] = {}
    for variable in (*layer._trainable_variables, *layer._non_trainable_variables):
        name, number = variable.name, 1
        while name in found:
            name, number = f"{variable.name}_{number}", number + 1
        found[name] = variable
    return found


def _children(layer: Any) -> list[tuple[str, Any]]:
    listed = layer.layers if isinstance(layer, keras.Model) else layer._flatten_layers(False, False)
    if _of_keras(layer):
        return [(child.name, child) for child in listed]
    found = [(name, child) for name, value in _attributes(layer).items() for name, child in _within(name, value)]
    known = {id(child) for _, child in found}
    found += [(child.name, child) for child in listed if id(child) not in known]
    listed = {id(child) for child in listed}
    named: dict[int, tuple[str, Any]] = {}
    for name, child in found:
        if id(child) in listed:
            named.setdefault(id(child), (name if is_unnamed(child) else child.name, child))
    return list(named.values())


def _attributes(layer: Any) -> dict[str, Any]:
    """What the user's class holds; torch keeps layers in a place of their own."""
    everything = {**vars(layer), **vars(layer).get("_modules", {})}
    return {name: value for name, value in everything.items() if not name.startswith("_")}


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Layers in an attribute, by its name and their place."""
    if isinstance(value, keras.layers.Layer):
        yield name, value
    elif isinstance(value, list | tuple | Mapping):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _within(f"{name}.{key}", inner)


def _of_keras(layer: Any) -> bool:
    return type(layer).__module__.startswith(("keras.", "deepthin.keras"))


def is_unnamed(layer: Any) -> bool:
    """Whether Keras named it: by its class, and a number that depends on what was made before."""
    return re.fullmatch(rf"{_usual_name(layer)}(_\d+)?", layer.name) is not None


def _usual_name(layer: Any) -> str:
    """What Keras calls the first of its class; of a thin layer, of its dense class."""
    kinds = {thin: plain for plain, thin in {**THIN, **RECURRENT}.items()}
    kind = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", kinds.get(type(layer), type(layer)).__name__)
    usual = re.sub(r"([a-z])([A-Z])", r"\1_\2", kind).lower()
    found = re.match(r"forward_|backward_", layer.name)  # of a Bidirectional
    return f"{found[0]}{usual}" if found else usual


def steady(model: Any, name: str) -> str:
    """A tensor's name in a model that was made first in its process: what Keras numbers begins anew."""
    path, _, own = name.rpartition(".")
    usual = _counterparts(model, lambda _, name, count: [name, *(f"{name}_{k}" for k in range(1, count))])
    return f"{usual[path]}.{own}" if path in usual else name


def renumbered(model: Any, names: Iterable[str]) -> dict[str, str]:
    """By names in a file those in the model, where they differ in what Keras numbers: layers are taken in order."""
    known = set(names)

    def theirs(path: str, name: str, count: int) -> list[str]:
        inside = f"{path}." if path else ""
        siblings = {own[len(inside) :].partition(".")[0] for own in known if own.startswith(inside)}
        return sorted((own for own in siblings if re.fullmatch(rf"{name}(_\d+)?", own)), key=_number)

    there = {theirs: ours for ours, theirs in _counterparts(model, theirs).items()}
    return {
        name: f"{there[path]}.{own}"
        for name in known
        for path, _, own in [name.rpartition(".")]
        if there.get(path, path) != path
    }


def _counterparts(model: Any, theirs: Callable[[str, str, int], list[str]]) -> dict[str, str]:
    """Paths of the model's layers, and elsewhere, where what Keras numbers within a path has the names ``theirs``."""
    found: dict[str, str] = {}

    def visit(layer: Any, here: str, there: str) -> None:
        found[here] = there
        children = _children(layer)
        groups: dict[str, list[str]] = {}
        for name, child in children:
            if name == child.name and is_unnamed(child) and child.weights:
                groups.setdefault(_usual_name(child), []).append(name)
        other: dict[str, str] = {}
        for usual, own in groups.items():
            names = theirs(there, usual, len(own))
            if len(names) == len(own):
                other |= dict(zip(sorted(own, key=_number), names, strict=True))
        for name, child in children:
            visit(child, f"{here}.{name}".lstrip("."), f"{there}.{other.get(name, name)}".lstrip("."))

    visit(model, "", "")
    return found


def _number(name: str) -> int:
    """What Keras appended, 0 for the first."""
    found = re.search(r"_(\d+)$", name)
    return int(found[1]) if found else 0
