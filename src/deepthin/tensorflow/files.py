"""Generated variables to ``.thin`` files and back; the matrices outputs first, as every file has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from deepthin import storage
from deepthin.coding import Raw
from deepthin.keras.files import raw_code, raw_of, upright
from deepthin.keras.weight import ThinWeight
from deepthin.method import ConfigError
from deepthin.names import closest, renamed
from deepthin.storage import Contents, Thin

if TYPE_CHECKING:
    from deepthin.tensorflow.variables import Entry, Variables


def save(variables: "Variables", path: str | Path, max_bytes: int | None = None) -> int:
    """Write all variables of a factory, atomically, and return the bytes written; the matrices outputs first.

    Those of a graph of TensorFlow 1 are read in the default session. BudgetError, with nothing written, above
    ``max_bytes``.
    """
    return storage.write(contents(variables), path, max_bytes)


def load(variables: "Variables", path: str | Path, names: Mapping[str, str] | None = None) -> "Variables":
    """Put a file's tensors into a factory; returns it.

    What it has already takes the values over, in place; what it has not is made from the file when it is asked for, by
    the file's method, whatever the rules say. ``names`` maps names in the file to names here. ConfigError, before
    anything is touched, where the file lacks a variable, or has it in another shape or by another plan; FormatError for
    a damaged file.
    """
    stored = renamed(storage.read(path), {name: dotted(own) for name, own in (names or {}).items()}, str(path))
    state, found = variables._state, _by_name(stored)
    if missing := sorted(state.entries.keys() - found.keys()):
        raise ConfigError(
            f"{path} holds no {missing[0]!r}.{closest(missing[0], found)} Pass names={{file name: name here}}, or "
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


def contents(variables: "Variables") -> Contents:
    """All that a factory would save, and what of a file nobody asked for yet."""
    state, first = variables._state, dict[object, str]()
    thin: dict[str, Thin] = {}
    dense: dict[str, Raw] = {}
    aliases: dict[str, str] = {}
    for name, entry in sorted(state.entries.items()):
        if (kept := first.setdefault((id(entry.held), entry.index), name)) != name:
            aliases[name] = kept
        elif not isinstance(entry.held, ThinWeight):
            dense[name] = raw_of(entry.layout.stored(_numpy(entry.held)))
    for weight in {id(e.held): e.held for e in state.entries.values() if isinstance(e.held, ThinWeight)}.values():
        parts = {first[id(weight), index]: part for index, part in enumerate(weight.parts)}
        thin[next(iter(parts))] = Thin(weight.method_name, weight.method, parts, raw_code(weight))
    for name, (matrix, index) in sorted(state.stored.items()):
        if (kept := first.setdefault((id(matrix), index), name)) != name:
            aliases[name] = kept
        elif isinstance(matrix, Raw):
            dense[name] = matrix
        else:
            parts = list(matrix.parts)
            thin[parts[0]] = matrix
    return Contents(thin, dense, aliases)


def _numpy(variable: Any) -> np.ndarray:
    return variable.numpy() if tf.executing_eagerly() else variable.eval()


def assign(variable: Any, value: np.ndarray) -> None:
    """Set a variable; one of a graph of TensorFlow 1, in the default session."""
    value = as_type(value, variable.dtype.base_dtype)
    if tf.executing_eagerly():
        variable.assign(value)
    else:
        variable.load(value, tf.compat.v1.get_default_session())


def as_type(array: Any, dtype: Any) -> np.ndarray:
    """The same values in a type of TensorFlow's."""
    return np.asarray(array).astype(tf.as_dtype(dtype).as_numpy_dtype)


def dotted(name: str) -> str:
    """A name as files and patterns have it."""
    return name.removesuffix(":0").replace("/", ".")
