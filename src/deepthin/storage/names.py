"""Names and shapes of a file's tensors, carried over to a model's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepthin.errors import ConfigError, closest
from deepthin.storage.contents import Contents


def shapes_of(stored: Contents) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors.

    Args:
        stored: What the file holds.

    Returns:
        Dense shape of every tensor, under each of its names.
    """
    shapes = {name: part.shape for thin in stored.thin.values() for name, part in thin.parts.items()}
    shapes |= {name: raw.shape for name, raw in stored.dense.items()}
    return shapes | {name: shapes[target] for name, target in stored.aliases.items()}


def renamed(stored: Contents, names: Mapping[str, str], path: str) -> Contents:
    """The contents of a file under the names of a model.

    Args:
        stored: What the file holds.
        names: File name -> model name; names that are left out stay.
        path: The file, for messages.

    Returns:
        New contents, which share the tensors.

    Raises:
        ConfigError: The file lacks a name, or two names would become one.
    """
    known = {*stored.dense, *stored.aliases, *(name for thin in stored.thin.values() for name in thin.parts)}
    for name in names:
        if name not in known:
            raise ConfigError(f"names: {path} lacks {name!r}.{closest(name, known)}")

    def carried(old: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in old.items()}

    if len({names.get(name, name) for name in known}) < len(known):
        raise ConfigError("names: two names of the file would become one in the model.")
    aliases = {names.get(name, name): names.get(target, target) for name, target in stored.aliases.items()}
    thin = {
        names.get(key, key): dataclasses.replace(thin, parts=carried(thin.parts)) for key, thin in stored.thin.items()
    }
    return Contents(thin, carried(stored.dense), aliases)


def check_names(wanted: Mapping[str, tuple[int, ...]], have: Mapping[str, tuple[int, ...]], path: str) -> None:
    """Check that a file and a model have the same tensors.

    Args:
        wanted: Shapes by name in the file, as ``shapes_of`` gives them.
        have: Shapes by name in the model.
        path: The file, for messages.

    Raises:
        ConfigError: A name or a shape differs; the message names the closest one.
    """
    if extra := sorted(wanted.keys() - have.keys()):
        raise ConfigError(
            f"{path} holds {_listed(extra)}, which the model lacks."
            f"{closest(extra[0], have.keys() - wanted)} Build the architecture that was saved, "
            "or pass names={file name: model name}."
        )
    if missing := sorted(have.keys() - wanted.keys()):
        raise ConfigError(
            f"{path} lacks {_listed(missing)} of the model. Build the architecture that was saved, or pass "
            "names={file name: model name}."
        )
    for name, shape in wanted.items():
        if shape != have[name]:
            raise ConfigError(f"{name} has shape {shape} in {path}, but {have[name]} in the model.")


def _listed(names: list[str]) -> str:
    """The first name, and how many there are besides."""
    more = len(names) - 1
    return repr(names[0]) + (f" and {more} more tensor{'s' if more > 1 else ''}" if more else "")
