"""Contents to bytes, every one of which is checked (docs/format.md is normative; docs/format-1.md for version 1).

The bytes depend on the contents alone. Values are read twice when the file is written: once for their checksums, and
once to be written.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deepthin.errors import BudgetError, ConfigError, FormatError, NonFiniteError
from deepthin.methods import fields
from deepthin.storage.arrays import ITEM_BYTES, Buffer, Coding, Raw, largest
from deepthin.storage.atomic import stream_atomically
from deepthin.storage.codings import is_short, narrowed
from deepthin.storage.contents import VERSIONS, Contents, Part, Thin
from deepthin.storage.decoding import check_weights
from deepthin.storage.head import ALIGNMENT, Head, Item, Matrix, Tensor, begun, places_of

MAX_BYTES = 4 << 30
CHECKSUM = "__crc32__"
CHECKSUM_BYTES = 4


Version = Literal[1, 2]
"""A version of the format."""


def to_bytes(contents: Contents, version: Version | None = None) -> bytes:
    """Serialise a model. Equal contents give equal bytes, whatever the order of the dictionaries.

    Args:
        contents: Thin tensors, dense tensors and shared names.
        version: Version of the format; None: that of the contents.

    Returns:
        The whole file, as docs/format.md defines it.

    Raises:
        ConfigError: Integers of a code are such that ``read`` would refuse them.
        ValueError: A tensor's name is reserved or ambiguous in the file, or a tensor changed during the call.
    """
    return b"".join(stream(contents, version=version))


def size_of(contents: Contents, version: Version | None = None, *, bound: bool = False) -> int:
    """The size of the file, computed from names, shapes and codings; of dense tensors as little is read as shows that
    they cannot be shortened.

    Args:
        contents: Thin tensors, dense tensors and shared names.
        version: Version of the format; None: that of the contents.
        bound: Whether to count tensors that are stored as they are with the most bytes that any values need.

    Returns:
        Bytes: equal to ``len(to_bytes(contents))``; an upper bound where codes are planned, and with ``bound``.

    Raises:
        ValueError: A tensor's name is reserved or ambiguous in the file.
    """
    if _version(contents, version) == 1:
        tensors = _tensors(contents)
        head = _head(contents, tensors, dict.fromkeys(tensors, 0))  # placeholders of equal length
        return len(head) + sum(raw.bytes for raw in tensors.values()) + CHECKSUM_BYTES
    bound = bound or any(thin.planned for thin in contents.thin.values())
    return _bytes(head_of(contents, bound), bound)


def _bytes(head: Head, bound: bool) -> int:
    """The size of a file of version 2."""
    end = len(begun(head))
    if bound:  # zeros before an array that is aligned are as many as there can be
        sizes = [item.bytes + (ALIGNMENT - 1) * item.aligned for _, _, item in head.items()]
        return end + sum(sizes) + CHECKSUM_BYTES
    return places_of(head, end)[1] + CHECKSUM_BYTES


def _version(contents: Contents, version: Version | None) -> int:
    if version not in (None, *VERSIONS):
        raise ConfigError(f"format = {version!r}: a .thin file is of version {' or '.join(map(str, VERSIONS))}.")
    return version or contents.version


def head_of(contents: Contents, bound: bool = False) -> Head:
    """What the header of version 2 says of contents.

    Args:
        contents: Thin tensors, dense tensors and shared names.
        bound: Whether tensors that are stored as they are take the most bytes that any values need.

    Returns:
        The header.
    """
    thin = {
        name: Matrix(
            own.name,
            own.method,
            own.parts,
            {entry: _item(own, entry, raw, coding, bound) for entry, (raw, coding) in own.stored_as(2).items()},
        )
        for name, own in contents.thin.items()
    }
    dense = {name: Tensor(raw.dtype, raw.shape, not bound and is_short(raw)) for name, raw in contents.dense.items()}
    return Head(thin, dense, contents.aliases)


def _item(own: Thin, entry: str, raw: Raw, coding: Coding | None, bound: bool) -> Item:
    if not bound or coding is None or coding[0] != "short":
        return Item(raw.dtype, coding, raw.bytes)
    cut = coding[1] != math.prod(own.code[entry].shape)
    return Item("F32", ("repeats", coding[1]) if cut else None, ITEM_BYTES["F32"] * coding[1])


def stream(contents: Contents, finite: bool = False, version: Version | None = None) -> Iterator[Buffer]:
    """Serialise a model piece by piece, so that no copy of the whole is held in memory.

    Args:
        contents: Thin tensors, dense tensors and shared names. Every tensor is read twice: for its checksum, and to be
            written.
        finite: Whether to refuse NaN and infinity, which readers refuse.
        version: Version of the format; None: that of the contents.

    Yields:
        Buffers whose concatenation is the file.

    Raises:
        ConfigError: Integers of a code are such that ``read`` would refuse them.
        NonFiniteError: A tensor holds NaN or infinity, and ``finite``.
        ValueError: A tensor's name is reserved or ambiguous in the file, or a tensor changed between the two reads;
            discard what was written.
    """
    _check(contents)
    yield from _stream(contents, finite, _version(contents, version))


def _check(contents: Contents) -> None:
    for thin in contents.thin.values():
        thin.check()


def _stream(contents: Contents, finite: bool, version: int, head: Head | None = None) -> Iterator[Buffer]:
    if version == 1:
        tensors = _tensors(contents)
        checksums = {name: _checksum(name, raw, finite) for name, raw in tensors.items()}
        start = _head(contents, tensors, checksums)
        arrays = [(name, raw, checksums[name], 0) for name, raw in tensors.items()]
    else:
        head = head or head_of(contents)
        start, arrays = begun(head), list[tuple[str, Raw, int, int]]()
        for name, entry, _, place in places_of(head, len(start))[0]:
            label, raw = f"{name}/{entry}" if entry else name, _stored(contents, head, name, entry)
            arrays.append((label, raw, _checksum(label, raw, finite), place))
    yield start
    whole, at = zlib.crc32(start), len(start)
    for label, raw, known, place in arrays:
        if zeros := bytes(max(place - at, 0)):
            whole = zlib.crc32(zeros, whole)
            yield zeros
        checksum = 0
        for piece in raw.pieces():
            checksum, whole = zlib.crc32(piece, checksum), zlib.crc32(piece, whole)
            yield piece
        at += len(zeros) + raw.bytes
        if checksum != known:
            raise ValueError(f"{label} changed while it was written. Save while nothing trains the model.")
    yield whole.to_bytes(CHECKSUM_BYTES, "little")


def _stored(contents: Contents, head: Head, name: str, entry: str) -> Raw:
    if entry:
        return contents.thin[name].stored_as(2)[entry][0]
    raw = contents.dense[name]
    return narrowed(raw) if head.dense[name].short else raw


def write(
    contents: Contents,
    path: str | Path,
    max_bytes: int | None = None,
    *,
    finite: bool = False,
    version: Version | None = None,
) -> int:
    """Write a ``.thin`` file atomically: to a temporary name, which is then renamed.

    Args:
        contents: Thin tensors, dense tensors and shared names.
        path: The file to write; an existing one is replaced.
        max_bytes: Upper bound on the size of the file in bytes; None for no bound.
        finite: Whether to refuse NaN and infinity, which readers refuse.
        version: Version of the format; None: that of the contents.

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
    number = _version(contents, version)
    head = head_of(contents) if number != 1 else None
    bytes_ = size_of(contents, 1) if head is None else _bytes(head, bound=False)
    if max_bytes is not None and bytes_ > max_bytes:
        raise BudgetError(
            f"The file would have {bytes_} bytes, above the limit of {max_bytes}: nothing was written. "
            "Compress with [model] file_bytes to meet a limit.",
            smallest_bits=8 * bytes_,
            smallest_ratio=bytes_ / max(contents.dense_bytes, 1),
        )
    if finite:
        _check_decodes(contents)
    stream_atomically(path, _stream(contents, finite, number, head))
    return bytes_


def _largest_float(thin: Thin) -> float:
    """The largest number of the type of a code's floats."""
    integers = thin.method.integers()
    kind = next(raw.dtype for entry, raw in thin.code.items() if entry not in integers)
    return float(np.finfo(np.float16 if kind == "F16" else np.float64 if kind == "F64" else np.float32).max)


def _check_decodes(contents: Contents) -> None:
    """Refuse a code that readers refuse since its numbers overflow together, each being finite."""
    known = {name: thin for name, thin in contents.thin.items() if not thin.planned}
    most = {name: _largest_float(thin) for name, thin in known.items()}
    try:
        check_weights(dataclasses.replace(contents, thin=known), "This model", most)
    except FormatError as error:
        raise NonFiniteError(
            f"{error} Readers would refuse the file, so nothing was written. Train with smaller steps, or pass "
            "finite=False to write it."
        ) from error


def _tensors(contents: Contents) -> dict[str, Raw]:
    """All stored tensors in the order of the file; ValueError for reserved or ambiguous names."""
    tensors, count = dict(contents.dense), len(contents.dense)
    for name, thin in contents.thin.items():
        tensors |= {f"{name}/{entry}": raw for entry, (raw, _) in thin.stored_as(1).items()}
        count += len(thin.code)
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
        "version": 1,
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
    if codings := {name: coding for name, (_, coding) in thin.stored_as(1).items() if coding}:
        entry["codings"] = codings
    if dict(thin.parts) != {key: Part(thin.method.shape)}:
        usual = dataclasses.asdict(Part(()))
        written = {name: dataclasses.asdict(part).items() for name, part in thin.parts.items()}
        entry["parts"] = [[name, {k: v for k, v in items if v != usual[k]}] for name, items in written.items()]
    return entry
