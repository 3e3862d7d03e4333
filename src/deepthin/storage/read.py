"""Bytes to contents. Reading trusts nothing: FormatError comes before anything large is allocated (docs/format.md)."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors

from deepthin.errors import FormatError
from deepthin.method import matrix_shape
from deepthin.methods import METHODS, THEN, with_fields
from deepthin.storage.arrays import FLOATS, ITEM_BYTES, Raw, repeated, unpacked
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.report import Report, report_of
from deepthin.storage.write import CHECKSUM, MAX_BYTES, VERSION

_MOST_DIMENSIONS = 64  # what NumPy and torch can hold


def _possible_shapes(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Shapes of a matrix that can hold these tensors: one tensor's own; several flattened near-square, or stacked."""
    own = [matrix_shape(part.shape[::-1] if part.transposed else part.shape) for part in parts]
    if len(own) == 1:
        return own
    flat = matrix_shape((sum(math.prod(part.shape) for part in parts),))
    stacked = (sum(rows for rows, _ in own), own[0][1])
    return [flat, stacked] if len({cols for _, cols in own}) == 1 else [flat]


def from_bytes(data: bytes, where: str = "the file") -> Contents:
    """Parse a ``.thin`` file (docs/format.md). Nothing large is allocated before it has been checked.

    Args:
        data: The whole file.
        where: What messages call the file.

    Returns:
        The contents, which refer to ``data``.

    Raises:
        FormatError: Anything but an intact file of this format version.
    """
    try:
        views: list[tuple[str, Any]] = cast(Any, safetensors).deserialize(data)
        tensors = {name: Raw(view["dtype"], tuple(view["shape"]), view["data"]) for name, view in views}
        metadata: Any = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        header: Any = json.loads(metadata["deepthin"]) if "deepthin" in metadata else None
    except (safetensors.SafetensorError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise FormatError(f"{where} is damaged, or no .thin file: {error}.") from None
    if header is None:
        raise FormatError(
            f"{where} is a safetensors file, but no .thin file: it has no deepthin header. "
            "To compress such weights, run: deepthin compress --weights FILE."
        )
    if data[-4:] != zlib.crc32(memoryview(data)[:-4]).to_bytes(4, "little"):
        raise FormatError(f"{where} is damaged: the checksum of {_damaged(header, tensors)} does not match.")
    try:
        return _contents(header, tensors)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise FormatError(f"{where}: its header does not describe a model ({type(error).__name__}: {error}).") from None


def _damaged(header: Any, tensors: Mapping[str, Raw]) -> str:
    """Names of the tensors whose checksums do not match, as far as the header can still be read."""
    sums: Any = cast(Any, header).get("crc32") if isinstance(header, dict) else None
    sums = cast(Any, sums) if isinstance(sums, dict) else {}
    wrong = [name for name, raw in tensors.items() if name in sums and sums[name] != f"{zlib.crc32(raw.data):08x}"]
    return ", ".join(wrong) or "its header"


def _contents(header: Any, tensors: dict[str, Raw]) -> Contents:
    """Check the header, which is untrusted, against the tensors that are present."""
    if header["version"] != VERSION or type(header["version"]) is not int:
        raise FormatError(f"it is of format version {header['version']!r}; this deepthin reads version {VERSION}.")
    if set(header) != {"version", "thin", "aliases", "crc32"}:
        raise FormatError(f"its header has the keys {sorted(header)}.")
    if (checksum := tensors.pop(CHECKSUM, None)) is None or (checksum.dtype, checksum.shape) != ("U8", (4,)):
        raise FormatError("it has no checksum.")
    if header["crc32"] != {name: f"{zlib.crc32(raw.data):08x}" for name, raw in tensors.items()}:
        raise FormatError("the checksums in its header are not those of its tensors.")
    for name, raw in tensors.items():
        if raw.dtype not in ITEM_BYTES:
            raise FormatError(f"{name} is of type {raw.dtype}; known are {', '.join(ITEM_BYTES)}.")
        raw.numpy()  # a shape that NumPy cannot hold raises here
    thin: dict[str, Thin] = {}
    for name, entry in header["thin"].items():
        if set(entry) - {"parts", "codings"} != {"method", "fields"}:
            raise FormatError(f"the entry of {name} has the keys {sorted(entry)}.")
        if not isinstance(entry["method"], str) or any(n not in METHODS for n in entry["method"].split(THEN, 1)):
            raise FormatError(f"{name} is stored by method {entry['method']!r}; known are {', '.join(METHODS)}.")
        method = with_fields(entry["method"], entry["fields"])
        listed = entry.get("parts", [[name, {"shape": list(method.shape)}]])
        parts = {own: _part(own, written) for own, written in listed}
        if len(parts) < len(listed) or next(iter(parts), None) != name:
            raise FormatError(f"the tensors of {name} are {[own for own, _ in listed]}.")
        if method.shape not in _possible_shapes(list(parts.values())):
            shapes = " + ".join(str(part.shape) for part in parts.values())
            raise FormatError(f"{name} holds tensors of shape {shapes}, but its plan stores a {method.shape} matrix.")
        code: dict[str, Raw] = {}
        integers, codings = method.integers(), entry.get("codings", {})
        if not set(integers) <= set(codings) <= set(method.code_shapes()):
            raise FormatError(f"{name} has integers in {sorted(integers)}, but tells how to read {sorted(codings)}.")
        for key, expected in method.code_shapes().items():
            raw = tensors.pop(f"{name}/{key}", None)
            if key in integers:
                code[key] = unpacked(f"{name}/{key}", raw, codings[key], integers[key], expected)
                continue
            if key in codings:
                code[key] = repeated(f"{name}/{key}", raw, codings[key], expected)
                continue
            if raw is None or raw.shape != expected or raw.dtype not in FLOATS:
                found = "is missing" if raw is None else f"is {raw.dtype} {raw.shape}"
                raise FormatError(f"{name}/{key} must be floating numbers of shape {expected}, but {found}.")
            code[key] = raw
        if len(kinds := {raw.dtype for key, raw in code.items() if key not in integers}) > 1:
            raise FormatError(f"the code of {name} mixes the types {', '.join(sorted(kinds))}.")
        thin[name] = Thin(entry["method"], method, parts, code)
    known = set(tensors)
    for own in (own for entry in thin.values() for own in entry.parts):
        if own in known:
            raise FormatError(f"{own} is stored twice.")
        known.add(own)
    aliases: dict[str, str] = header["aliases"]
    if not isinstance(cast(object, aliases), dict):
        raise FormatError(f"the shared names are {aliases!r}.")
    for name, target in aliases.items():
        if name in known or target not in known:
            raise FormatError(f"the name {name} is declared to share {target!r}, which cannot be.")
    return Contents(thin, tensors, aliases)


def _part(name: str, written: dict[str, Any]) -> Part:
    """A part from the header; FormatError if a field has a wrong type or is out of range."""
    shape, scale, transposed = written.get("shape"), written.get("scale", 1.0), written.get("transposed", False)
    zero_row = written.get("zero_row")
    fine = (
        isinstance(shape, list)
        and shape != []
        and all(type(length) is int and length > 0 for length in cast(list[Any], shape))
    )
    if (
        not isinstance(cast(object, name), str)
        or not fine
        or len(cast(list[Any], shape)) > _MOST_DIMENSIONS
        or type(scale) is not float
        or not 0 < scale < math.inf
        or type(transposed) is not bool
        or not (zero_row is None or (type(zero_row) is int and 0 <= zero_row < cast(list[int], shape)[0]))
    ):
        raise FormatError(f"the tensor {name} is described as {written}.")
    if written.keys() - {"shape", "scale", "transposed", "zero_row"}:
        raise FormatError(f"the tensor {name} is described by the keys {sorted(written)}.")
    return Part(tuple(cast(list[int], shape)), scale, transposed, zero_row)


def read(path: str | Path) -> Contents:
    """Read and check a ``.thin`` file, without decoding it.

    Args:
        path: The file.

    Returns:
        The contents: thin tensors, dense tensors and shared names.

    Raises:
        FormatError: The file is damaged, or is no ``.thin`` file.
        OSError: The file cannot be read.
    """
    return from_bytes(Path(path).read_bytes(), str(path))


def load(path: str | Path, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """Read a ``.thin`` file as a dense state dict, decoded by NumPy; no framework is needed.

    Decoding a matrix temporarily takes up to twice its size, a shuffled one up to eight times (its permutation).

    Args:
        path: The file.
        max_bytes: Upper bound on the decoded bytes of all compressed matrices together (default 4 GiB), since a small
            file may declare huge matrices.

    Returns:
        Name -> array of the dense shape, sorted by name: every saved parameter and buffer, shared ones under each of
        their names.

    Raises:
        FormatError: The file is damaged or no ``.thin`` file, or decodes to more than ``max_bytes``.
        OSError: The file cannot be read.
    """
    contents = read(path)
    declared = sum(thin.dense_bytes for thin in contents.thin.values())
    if declared > max_bytes:
        raise FormatError(
            f"{path} decodes to {declared} bytes, above the limit of {max_bytes}. "
            "If you trust the file, pass a larger max_bytes."
        )
    arrays = {name: raw.numpy() for name, raw in contents.dense.items()}
    for thin in contents.thin.values():
        arrays |= thin.decode()
    arrays |= {name: arrays[target] for name, target in contents.aliases.items()}
    return dict(sorted(arrays.items()))


def inspect(path: str | Path) -> Report:
    """Report what a ``.thin`` file stores, without decoding it.

    Args:
        path: The file.

    Returns:
        One row for each matrix and the totals in bytes. Errors are NaN: the file does not have the dense weights.

    Raises:
        FormatError: The file is damaged, or is no ``.thin`` file.
        OSError: The file cannot be read.
    """
    return report_of(read(path))
