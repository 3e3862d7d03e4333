"""Contents to bytes: a valid safetensors file whose every byte is checked (docs/format.md is normative).

The bytes depend on the contents alone. Their number follows from names, shapes and codings: values are read twice when
the file is written, once for the checksums in its header and once for what follows it, and never before.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepthin.errors import BudgetError, NonFiniteError
from deepthin.methods import fields
from deepthin.storage.arrays import ITEM_BYTES, Buffer, Raw, largest
from deepthin.storage.atomic import stream_atomically
from deepthin.storage.contents import Contents, Part, Thin

VERSION = 1
MAX_BYTES = 4 << 30
CHECKSUM = "__crc32__"
CHECKSUM_BYTES = 4


def to_bytes(contents: Contents) -> bytes:
    """Serialise a model. Equal contents give equal bytes, whatever the order of the dictionaries.

    Args:
        contents: Thin tensors, dense tensors and shared names.

    Returns:
        The whole file, as docs/format.md defines it.

    Raises:
        ConfigError: Integers of a code are such that ``read`` would refuse them.
        ValueError: A tensor's name is reserved or ambiguous in the file, or a tensor changed during the call.
    """
    return b"".join(stream(contents))


def size_of(contents: Contents) -> int:
    """The size of the file, computed from names, shapes and codings; no dense tensor is read.

    Args:
        contents: Thin tensors, dense tensors and shared names.

    Returns:
        Bytes: equal to ``len(to_bytes(contents))``.

    Raises:
        ValueError: A tensor's name is reserved or ambiguous in the file.
    """
    tensors = _tensors(contents)
    head = _head(contents, tensors, dict.fromkeys(tensors, 0))  # placeholders of equal length
    return len(head) + sum(raw.bytes for raw in tensors.values()) + CHECKSUM_BYTES


def stream(contents: Contents, finite: bool = False) -> Iterator[Buffer]:
    """Serialise a model piece by piece, so that no copy of the whole is held in memory.

    Args:
        contents: Thin tensors, dense tensors and shared names. Every tensor is read twice: for the checksums in the
            header, and to be written.
        finite: Whether to refuse NaN and infinity, which readers refuse.

    Yields:
        Buffers whose concatenation is the file.

    Raises:
        ConfigError: Integers of a code are such that ``read`` would refuse them.
        NonFiniteError: A tensor holds NaN or infinity, and ``finite``.
        ValueError: A tensor's name is reserved or ambiguous in the file, or a tensor changed between the two reads;
            discard what was written.
    """
    _check(contents)
    yield from _stream(contents, finite)


def _check(contents: Contents) -> None:
    for thin in contents.thin.values():
        thin.check()


def _stream(contents: Contents, finite: bool) -> Iterator[Buffer]:
    tensors = _tensors(contents)
    checksums = {name: _checksum(name, raw, finite) for name, raw in tensors.items()}
    yield (head := _head(contents, tensors, checksums))
    whole = zlib.crc32(head)
    for name, raw in tensors.items():
        checksum = 0
        for piece in raw.pieces():
            checksum, whole = zlib.crc32(piece, checksum), zlib.crc32(piece, whole)
            yield piece
        if checksum != checksums[name]:
            raise ValueError(f"{name} changed while it was written. Save while nothing trains the model.")
    yield whole.to_bytes(CHECKSUM_BYTES, "little")


def write(contents: Contents, path: str | Path, max_bytes: int | None = None, *, finite: bool = False) -> int:
    """Write a ``.thin`` file atomically: to a temporary name, which is then renamed.

    Args:
        contents: Thin tensors, dense tensors and shared names.
        path: The file to write; an existing one is replaced.
        max_bytes: Upper bound on the size of the file in bytes; None for no bound.
        finite: Whether to refuse NaN and infinity, which readers refuse.

    Returns:
        The size of the file in bytes.

    Raises:
        BudgetError: The file would exceed ``max_bytes``. Nothing is written.
        ConfigError: Integers of a code are such that ``read`` would refuse them. Nothing is written.
        NonFiniteError: A tensor holds NaN or infinity, and ``finite``. Nothing is written.
        ValueError: A tensor's name is reserved or ambiguous in the file, or a tensor changed during the call.
        OSError: The file cannot be written.
    """
    _check(contents)
    bytes_ = size_of(contents)
    if max_bytes is not None and bytes_ > max_bytes:
        raise BudgetError(
            f"The file would have {bytes_} bytes, above the limit of {max_bytes}: nothing was written. "
            "Compress with [model] file_bytes to meet a limit.",
            smallest_bits=8 * bytes_,
            smallest_ratio=bytes_ / max(contents.dense_bytes, 1),
        )
    stream_atomically(path, _stream(contents, finite))
    return bytes_


def _tensors(contents: Contents) -> dict[str, Raw]:
    """All stored tensors in the order of the file; ValueError for reserved or ambiguous names."""
    tensors, count = dict(contents.dense), len(contents.dense)
    for name, thin in contents.thin.items():
        tensors |= {f"{name}/{entry}": raw for entry, (raw, _) in thin.stored.items()}
        count += len(thin.stored)
    if {CHECKSUM, "__metadata__"} & tensors.keys():
        raise ValueError(f"No tensor may be called {CHECKSUM} or __metadata__: rename it.")
    if len(tensors) < count:
        raise ValueError("Two tensors would have one name in the file: rename the tensor whose name contains a slash.")
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))  # largest types first: aligned
    return {name: tensors[name] for name in order}


def _checksum(name: str, raw: Raw, finite: bool) -> int:
    value = 0
    for piece in raw.pieces():
        if finite and not math.isfinite(largest(Raw(raw.dtype, (), piece))):
            raise NonFiniteError(
                f"{name} holds NaN or infinity: nothing was written. If that is as it should be, pass finite=False, "
                "here and to load, which refuses it in compressed matrices in any case."
            )
        value = zlib.crc32(piece, value)
    return value


def _head(contents: Contents, tensors: Mapping[str, Raw], checksums: Mapping[str, int]) -> bytes:
    """The bytes before the tensors: the length of the header, and the header."""
    header = {
        "version": VERSION,
        "thin": {key: _entry(key, thin) for key, thin in contents.thin.items()},
        "aliases": dict(contents.aliases),
        "crc32": {name: f"{checksum:08x}" for name, checksum in checksums.items()},
    }
    index: dict[str, Any] = {"__metadata__": {"deepthin": json.dumps(header, sort_keys=True, separators=(",", ":"))}}
    end = 0
    for name, raw in tensors.items():
        start, end = end, end + raw.bytes
        index[name] = {"dtype": raw.dtype, "shape": raw.shape, "data_offsets": [start, end]}
    index[CHECKSUM] = {"dtype": "U8", "shape": [CHECKSUM_BYTES], "data_offsets": [end, end + CHECKSUM_BYTES]}
    text = json.dumps(index, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(key: str, thin: Thin) -> dict[str, Any]:
    """The header's entry of a compressed matrix; fields with default values are left out."""
    entry: dict[str, Any] = {"method": thin.name, "fields": fields(thin.method)}
    if codings := {name: coding for name, (_, coding) in thin.stored.items() if coding}:
        entry["codings"] = codings
    if dict(thin.parts) != {key: Part(thin.method.shape)}:
        usual = dataclasses.asdict(Part(()))
        written = {name: dataclasses.asdict(part).items() for name, part in thin.parts.items()}
        entry["parts"] = [[name, {k: v for k, v in items if v != usual[k]}] for name, items in written.items()]
    return entry
