"""Generated variables to ``.thin`` files and back; the matrices outputs first, as every file has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deepthin.errors import ConfigError, closest
from deepthin.keras.files import upright
from deepthin.keras.weight import ThinWeight
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents, Thin
from deepthin.storage.decoding import check_weights
from deepthin.storage.names import renamed
from deepthin.storage.read import read
from deepthin.storage.write import MAX_BYTES, Version, write
from deepthin.tensorflow.entries import contents
from deepthin.tensorflow.host import assign, dotted

if TYPE_CHECKING:
    from deepthin.tensorflow.entries import Entry
    from deepthin.tensorflow.variables import Variables


def save(
    variables: "Variables",
    path: str | Path,
    max_bytes: int | None = None,
    *,
    finite: bool = True,
    format: Version = 2,
) -> int:
    """Write all variables of a factory to a ``.thin`` file, matrices as (outputs, inputs).

    The file is written to a temporary name and renamed, so that an interrupted call leaves no partial file. Variables
    of a TensorFlow 1 graph are read in the default session.

    Args:
        variables: The factory.
        path: The file to write; an existing one is replaced.
        max_bytes: Upper bound on the size of the file in bytes; None for no bound.
        finite: Whether to refuse NaN and infinity, as ``load`` does.
        format: Version of the file's format. Version 1, which is larger, is for readers that know no other.

    Returns:
        The size of the file in bytes.

    Raises:
        BudgetError: The file would exceed ``max_bytes``. Nothing is written.
        ConfigError: Integers of a code are such that ``load`` would refuse them. Nothing is written.
        NonFiniteError: A tensor holds NaN or infinity, and ``finite``. Nothing is written.
        ValueError: A tensor's name is reserved or ambiguous in the file, or a variable changed during the call.
        OSError: The file cannot be written.
    """
    return write(contents(variables._state), path, max_bytes, finite=finite, version=format)


def load(
    variables: "Variables",
    path: str | Path,
    names: Mapping[str, str] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    finite: bool = True,
) -> "Variables":
    """Load a ``.thin`` file into a factory, in place.

    Existing variables are assigned. Others are created from the file when they are first asked for, by the file's
    method, which takes precedence over the factory's rules.

    Args:
        variables: The factory.
        path: The file.
        names: Name in the file -> name in the factory, for names that differ.
        max_bytes: Upper bound on the memory that the file may take beyond a few times its size (default 4 GiB), in
            bytes (docs/format.md).
        finite: Whether to refuse NaN and infinity in tensors that are stored as they are. In compressed ones they are
            refused in any case.

    Returns:
        The same factory.

    Raises:
        ConfigError: The file lacks an existing variable, or stores it in another shape or by another plan. The factory
            is unchanged.
        FormatError: The file is damaged, is not a ``.thin`` file, takes more than ``max_bytes``, or is not finite.
        OSError: The file cannot be read.
    """
    contents = read(path, max_bytes, finite=finite, decoded=True)
    check_weights(contents, str(path), dict.fromkeys(contents.thin, float(np.finfo(np.float32).max)))
    stored = renamed(contents, {name: dotted(target) for name, target in (names or {}).items()}, str(path))
    state, unread = variables._state, _by_name(stored)
    if missing := sorted(state.entries.keys() - unread.keys()):
        raise ConfigError(
            f"{path} lacks {missing[0]!r}.{closest(missing[0], unread)} Pass names={{file name: name here}}, or "
            "load into a new Variables()."
        )
    for name, entry in state.entries.items():
        _check(name, entry, *unread[name], str(path))
    done: set[int] = set()
    for name, entry in state.entries.items():
        matrix, _ = unread.pop(name)
        if id(matrix) in done:
            continue
        done.add(id(matrix))
        if isinstance(matrix, Thin):
            entry.held.set_code({code_entry: raw.numpy() for code_entry, raw in matrix.code.items()})
        else:
            assign(entry.held, entry.layout.restored(matrix.numpy(), entry.shape))
    state.stored = unread
    return variables


def _check(name: str, entry: "Entry", matrix: Thin | Raw, index: int, path: str) -> None:
    """ConfigError if a file's tensor cannot be assigned to the existing variable."""
    shape = (list(matrix.parts.values())[index] if isinstance(matrix, Thin) else matrix).shape
    if shape != entry.layout.shape(entry.shape):
        raise ConfigError(f"{name} has shape {shape} in {path}, outputs first, but {entry.shape} here.")
    same = isinstance(entry.held, ThinWeight) == isinstance(matrix, Thin)
    if same and isinstance(matrix, Thin):
        held = entry.held
        same = (held.method, held.parts, entry.index) == (matrix.method, tuple(matrix.parts.values()), index)
    if not same:
        raise ConfigError(
            f"{path} stores {name} by another plan than the present variable's, which traced functions may use: load "
            "the file before the first get, or use its rules."
        )


def _by_name(stored: Contents) -> "dict[str, tuple[Thin | Raw, int]]":
    """What a file stores under each name, including further names of shared tensors."""
    matrices: dict[str, tuple[Thin | Raw, int]] = {name: (raw, 0) for name, raw in stored.dense.items()}
    for thin in stored.thin.values():
        whole = Thin(thin.name, thin.method, upright(thin.parts), thin.code)
        matrices |= {name: (whole, index) for index, name in enumerate(thin.parts)}
    return matrices | {name: matrices[target] for name, target in stored.aliases.items()}
