"""Bytes to contents. Reading trusts nothing: FormatError comes before anything large is allocated (docs/format.md)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from deepthin.errors import FormatError
from deepthin.method import InTurn
from deepthin.methods.factor import Factored
from deepthin.methods.float_coding import FloatCoding
from deepthin.storage import read_1, read_2
from deepthin.storage.arrays import Raw, largest
from deepthin.storage.budget import Budget, named
from deepthin.storage.contents import Contents, Thin
from deepthin.storage.pieces import OpenFile
from deepthin.storage.report import Report, report_of
from deepthin.storage.write import MAX_BYTES

_TIMES = " times inputs"  # ends the name of a product
_INPUTS = 16.0  # magnitude of the inputs with which products must be finite
IN_MEMORY_BYTES = 64 << 20
"""Larger files are not read as a whole: their tensors are read when they are asked for."""


def from_bytes(
    data: bytes,
    where: str = "the file",
    max_bytes: int = MAX_BYTES,
    *,
    finite: bool = True,
    decoded: bool = False,
) -> Contents:
    """Parse a ``.thin`` file (docs/format.md). Nothing large is allocated before it has been checked and counted.

    Args:
        data: The whole file.
        where: What messages call the file.
        max_bytes: Upper bound on the memory that reading takes beyond a few times the file, in bytes.
        finite: Whether tensors that are stored as they are must be finite. Codes must be, in any case.
        decoded: Whether to count what decoding takes: the dense tensors, derived tables and work space.

    Returns:
        The contents; their tensors are writable.

    Raises:
        FormatError: Anything but an intact file of a known format version, or one that takes more than ``max_bytes``.
    """
    reader = read_2 if data[: len(read_2.MAGIC)] == read_2.MAGIC else read_1
    return reader.in_memory(data, where, Budget(max_bytes), finite, decoded)


def read(path: str | Path, max_bytes: int = MAX_BYTES, *, finite: bool = True, decoded: bool = False) -> Contents:
    """Read and check a ``.thin`` file, without decoding it.

    Args:
        path: The file.
        max_bytes: Upper bound on the memory that reading takes beyond a few times the file, in bytes.
        finite: Whether tensors that are stored as they are must be finite. Codes must be, in any case.
        decoded: Whether to count what decoding takes, too.

    Returns:
        The contents: thin tensors, dense tensors and shared names.

    Raises:
        FormatError: The file is damaged, is no ``.thin`` file, or takes more than ``max_bytes``.
        OSError: The file cannot be read.
    """
    if Path(path).stat().st_size > IN_MEMORY_BYTES:
        return _streamed(path, max_bytes, finite, decoded)
    return from_bytes(Path(path).read_bytes(), str(path), max_bytes, finite=finite, decoded=decoded)


def _streamed(path: str | Path, max_bytes: int, finite: bool, decoded: bool, codes: bool = True) -> Contents:
    """As ``from_bytes``, of a file that need not fit into memory: its tensors are read when they are asked for."""
    file = OpenFile(path)
    reader = read_2 if file.at(0, len(read_2.MAGIC)) == read_2.MAGIC else read_1
    return reader.streamed(file, str(path), Budget(max_bytes), finite, decoded, codes)


def check_weights(contents: Contents, where: str, most: Mapping[str, float]) -> None:
    """Refuse matrices that do not decode to finite numbers. Most follow from the largest numbers of their codes.

    Args:
        contents: What was read.
        where: What the message calls the file.
        most: Name of a matrix -> the largest finite number of the type that it is decoded in.

    Raises:
        FormatError: A weight is NaN or infinite, or would be in that type.
    """
    for name, thin in contents.thin.items():
        if not thin.surely_within(most[name]):
            with named(name):
                _decoded(name, thin, where, most[name])


def _decoded(name: str, thin: Thin, where: str, most: float = math.inf) -> dict[str, np.ndarray]:
    """The dense tensors of a matrix; FormatError if a number is not finite, or above ``most``."""
    if thin.surely_within(most):
        return thin.decode()
    with np.errstate(all="ignore"):
        arrays = thin.decode()
    found = {f"{name}/{entry}": largest(raw) for entry, raw in thin.code.items() if most < math.inf}
    found |= {own: largest(Raw.of(array)) for own, array in arrays.items()}
    if most < math.inf:
        found |= {f"{name}/{entry}{_TIMES}": value for entry, value in _products(thin).items()}
    single = max(most, float(np.finfo(np.float32).max))  # half precision is multiplied in single precision
    for own, value in found.items():
        if not (math.isfinite(value) and value <= (single if own.endswith(_TIMES) else most)):
            raise FormatError(
                f"{where}: the code of {name} decodes to NaN or infinity: {own} has numbers up to {value}."
            )
    return arrays


def _products(thin: Thin) -> dict[str, float]:
    """How large the products of inputs up to 16 with a factor can be, where layers multiply by factors."""
    coding = FloatCoding(thin.method)
    decoder = coding.decoder
    if not isinstance(decoder, InTurn | Factored):
        return {}
    code = {entry: raw.numpy() for entry, raw in thin.code.items()}
    with np.errstate(all="ignore"):
        floats = coding.decode(code | thin.method.derived(), cast(Any, np))
    terms = _INPUTS * max(decoder.shape)
    return {e: terms * float(np.abs(a).max(initial=0.0)) for e, a in floats.items() if a.dtype.kind == "f"}


def load(path: str | Path, max_bytes: int = MAX_BYTES, *, finite: bool = True) -> dict[str, np.ndarray]:
    """Read a ``.thin`` file as a dense state dict, decoded by NumPy; no framework is needed.

    Args:
        path: The file.
        max_bytes: Upper bound on the memory that reading takes beyond a few times the file (default 4 GiB), in bytes:
            the decoded tensors, and the work space of the one that needs most. It is counted before anything is
            allocated, since a small file may declare huge matrices (docs/format.md).
        finite: Whether to refuse NaN and infinity in tensors that are stored as they are. In compressed ones they are
            refused in any case.

    Returns:
        Name -> array of the dense shape, sorted by name: every saved parameter and buffer, shared ones under each of
        their names.

    Raises:
        FormatError: The file is damaged or no ``.thin`` file, takes more than ``max_bytes``, or is not finite.
        OSError: The file cannot be read.
    """
    contents = read(path, max_bytes, finite=finite, decoded=True)
    arrays = {name: raw.numpy() for name, raw in contents.dense.items()}
    for name, thin in contents.thin.items():
        with named(name):
            arrays |= _decoded(name, thin, str(path))
    arrays |= {name: arrays[target] for name, target in contents.aliases.items()}
    return dict(sorted(arrays.items()))


def inspect(path: str | Path, max_bytes: int = MAX_BYTES) -> Report:
    """Report what a ``.thin`` file stores, without decoding it.

    Args:
        path: The file.
        max_bytes: Upper bound on the memory that this takes beyond a few times the file (default 4 GiB), in bytes.

    Returns:
        One row for each matrix and the totals in bytes. Errors are NaN: the file does not have the dense weights.

    Raises:
        FormatError: The file is damaged, is no ``.thin`` file, or takes more than ``max_bytes``.
        OSError: The file cannot be read.
    """
    if Path(path).stat().st_size > IN_MEMORY_BYTES:
        return report_of(_streamed(path, max_bytes, finite=False, decoded=False, codes=False))
    return report_of(read(path, max_bytes, finite=False))
