"""Generated variables to ``.thin`` files and back; the matrices outputs first, as every file has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deepthin.errors import ConfigError, closest
from deepthin.keras.files import upright
from deepthin.keras.weight import ThinWeight
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents, Thin
from deepthin.storage.names import renamed
from deepthin.storage.read import read
from deepthin.storage.write import write
from deepthin.tensorflow.entries import contents
from deepthin.tensorflow.host import assign, dotted

if TYPE_CHECKING:
    from deepthin.tensorflow.entries import Entry
    from deepthin.tensorflow.variables import Variables


def save(variables: "Variables", path: str | Path, max_bytes: int | None = None) -> int:
    """Write all variables of a factory, atomically, and return the bytes written; the matrices outputs first.

    Those of a graph of TensorFlow 1 are read in the default session. BudgetError, with nothing written, above
    ``max_bytes``.
    """
    return write(contents(variables._state), path, max_bytes)


def load(variables: "Variables", path: str | Path, names: Mapping[str, str] | None = None) -> "Variables":
    """Put a file's tensors into a factory; returns it.

    What it has already takes the values over, in place; what it has not is made from the file when it is asked for, by
    the file's method, whatever the rules say. ``names`` maps names in the file to names here. ConfigError, before
    anything is touched, where the file lacks a variable, or has it in another shape or by another plan; FormatError for
    a damaged file.
    """
    stored = renamed(read(path), {name: dotted(own) for name, own in (names or {}).items()}, str(path))
    state, found = variables._state, _by_name(stored)
    if missing := sorted(state.entries.keys() - found.keys()):
        raise ConfigError(
            f"{path} lacks {missing[0]!r}.{closest(missing[0], found)} Pass names={{file name: name here}}, or "
            "load into a new Variables()."
        )
    for name, entry in state.entries.items():
        _check(name, entry, *found[name], str(path))
    done: set[int] = set()
    for name, entry in state.entries.items():
        matrix, _ = found.pop(name)
        if id(matrix) in done:
            continue
        done.add(id(matrix))
        if isinstance(matrix, Thin):
            entry.held.set_code({own: raw.numpy() for own, raw in matrix.code.items()})
        else:
            assign(entry.held, entry.layout.kept(matrix.numpy(), entry.shape))
    state.stored = found
    return variables


def _check(name: str, entry: "Entry", matrix: Thin | Raw, index: int, path: str) -> None:
    """ConfigError if a file's tensor cannot take the place of what there is."""
    shape = (list(matrix.parts.values())[index] if isinstance(matrix, Thin) else matrix).shape
    if shape != entry.layout.shape(entry.shape):
        raise ConfigError(f"{name} has shape {shape} in {path}, outputs first, but {entry.shape} here.")
    same = isinstance(entry.held, ThinWeight) == isinstance(matrix, Thin)
    if same and isinstance(matrix, Thin):
        held = entry.held
        same = (held.method, held.parts, entry.index) == (matrix.method, tuple(matrix.parts.values()), index)
    if not same:
        raise ConfigError(
            f"{path} stores {name} by another plan than it has here, which functions may have been traced with: load "
            "before anything is asked for, or use the rules of that file."
        )


def _by_name(stored: Contents) -> "dict[str, tuple[Thin | Raw, int]]":
    """What a file has under each name, that of a shared tensor too."""
    found: dict[str, tuple[Thin | Raw, int]] = {name: (raw, 0) for name, raw in stored.dense.items()}
    for thin in stored.thin.values():
        whole = Thin(thin.name, thin.method, upright(thin.parts), thin.code)
        found |= {name: (whole, index) for index, name in enumerate(thin.parts)}
    return found | {name: found[target] for name, target in stored.aliases.items()}
