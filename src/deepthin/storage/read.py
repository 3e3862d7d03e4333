"""Bytes to contents. Reading trusts nothing: FormatError comes before anything large is allocated (docs/format.md)."""

from pathlib import Path

import numpy as np

from deepthin.storage import read_1, read_2
from deepthin.storage.budget import Budget, named
from deepthin.storage.contents import Contents
from deepthin.storage.decoding import decoded_within
from deepthin.storage.pieces import OpenFile
from deepthin.storage.report import Report, report_of
from deepthin.storage.write import MAX_BYTES

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
            arrays |= decoded_within(name, thin, str(path))
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
