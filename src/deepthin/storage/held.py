"""What a model of any framework holds, as contents; and whether the tensors of a file can stand where it holds them."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from deepthin.errors import ConfigError
from deepthin.storage.arrays import FLOATS, Raw
from deepthin.storage.contents import Contents, Thin

Numbers = Literal["whole", "real", "complex"]
"""Kind of a tensor's numbers; booleans count as whole."""


class Parted(Protocol):
    """A compressed matrix as a framework holds it."""

    @property
    def parts(self) -> Collection[Any]:
        """One for each tensor that it holds."""
        ...


Matrix = TypeVar("Matrix", bound=Parted)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def contents_of(
    thin: Mapping[str, tuple[Matrix, int]],
    dense: Mapping[str, tuple[Hashable, Raw]],
    as_thin: Callable[[Matrix, Sequence[str]], Thin],
) -> Contents:
    """All that a model would save. A tensor with several names is stored under the first of them in alphabetical order.

    Args:
        thin: By name of a tensor the matrix that holds it, and which of its tensors it is.
        dense: By name a tensor that is stored as it is, after a key that is the same for every name of one tensor.
        as_thin: Turns a matrix, and the names of its tensors, into what a file has.

    Returns:
        The contents, which refer to the model's tensors.

    Raises:
        ConfigError: Only some of the tensors that share a code are in the model.
        ValueError: A name is not valid UTF-8.
    """
    for name in (*thin, *dense):
        if not _is_text(name):
            raise ValueError(f"The name {name!r} is no UTF-8 text, which a file's names must be: rename the module.")
    aliases: dict[str, str] = {}
    matrices: dict[int, Matrix] = {}
    names: dict[int, dict[int, str]] = {}  # names of each matrix's tensors
    for name, (matrix, index) in sorted(thin.items()):
        matrices[id(matrix)] = matrix
        if (first := names.setdefault(id(matrix), {}).setdefault(index, name)) != name:
            aliases[name] = first
    stored: dict[str, Thin] = {}
    for key, matrix in matrices.items():
        tensors = [name for _, name in sorted(names[key].items())]
        if len(tensors) < len(matrix.parts):
            raise ConfigError(
                f"{', '.join(tensors)} share one code with layers that are not in this model: save the model that "
                "holds them all, or materialize it and compress this one again."
            )
        stored[tensors[0]] = as_thin(matrix, tensors)
    firsts: dict[Hashable, str] = {}
    for name, (key, _) in sorted(dense.items(), key=lambda item: item[0]):
        if (first := firsts.setdefault(key, name)) != name:
            aliases[name] = first
    return Contents(stored, {name: dense[name][1] for name in firsts.values()}, aliases)


def names_of(stored: Contents, tensors: Collection[str]) -> list[str]:
    """The names of some tensors of a file, and every alias of them.

    Args:
        stored: What the file holds.
        tensors: Names under which tensors are stored.

    Returns:
        These names, then the aliases.
    """
    return [*tensors, *(name for name, target in stored.aliases.items() if target in tensors)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model holds a tensor of some name."""

    key: Hashable  # the same for every name of one tensor
    numbers: Numbers
    why_not: str = ""  # why it cannot be thin; empty if it can


def check_places(stored: Contents, places: Mapping[str, Place], path: str) -> None:
    """Check that what a file holds under each name can stand where the model has that name.

    Args:
        stored: What the file holds, under the model's names.
        places: The model's tensors, by name.
        path: The file, for messages.

    Raises:
        ConfigError: A tensor is thin in the file and cannot be in the model, has another kind of numbers, or is shared
            in the model and not in the file.
    """
    thin = {name: part for entry in stored.thin.values() for name, part in entry.parts.items()}
    for name in names_of(stored, thin):
        if reason := places[name].why_not:
            raise ConfigError(f"{path} stores {name} thin, but in the model {reason}.")
    for name in names_of(stored, stored.dense):
        kind, now = stored.dense[stored.aliases.get(name, name)].dtype, places[name].numbers
        if now not in (("real", "complex") if kind in FLOATS else ("complex",) if kind == "C64" else ("whole",)):
            raise ConfigError(f"{path} stores {name} as {kind}, but the model holds {now} numbers there.")
    firsts: dict[Hashable, str] = {}
    for name, place in places.items():
        twin = firsts.setdefault(place.key, name)
        if stored.aliases.get(twin, twin) != stored.aliases.get(name, name):
            raise ConfigError(
                f"The model shares one tensor as {twin} and {name}, but {path} stores two different ones."
            )
