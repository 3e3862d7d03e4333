"""The reader of version 1 of the file: a safetensors file whose header, in JSON, has deepthin's as a string.

docs/format-1.md. A header is untrusted: everything that it says is checked.
"""

import collections
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, cast

import safetensors

from deepthin.errors import FormatError
from deepthin.methods import METHODS, THEN, with_fields
from deepthin.storage.arrays import ITEM_BYTES, Raw, fits
from deepthin.storage.budget import Budget
from deepthin.storage.checked import MOST_HEADER_BYTES, Plan, checked
from deepthin.storage.contents import Contents, Part, flat_shape, stacked_shape
from deepthin.storage.pieces import OpenFile, Place, places_of
from deepthin.storage.write import CHECKSUM

_NO_HEADER = (
    "{} is a safetensors file, but no .thin file: it has no deepthin header. "
    "To compress such weights, run: deepthin compress --weights FILE."
)
_MOST_DIMENSIONS = 64  # what NumPy and torch can hold


def in_memory(data: bytes, where: str, budget: Budget, finite: bool, decoded: bool) -> Contents:
    """Parse a file of version 1.

    Args:
        data: The whole file.
        where: What messages call the file.
        budget: What reading may take; counted before anything is allocated.
        finite: Whether tensors that are stored as they are must be finite.
        decoded: Whether to count what decoding takes, too.

    Returns:
        The contents; their tensors are writable.

    Raises:
        FormatError: The file is damaged, or takes more than the budget.
    """
    try:
        views: list[tuple[str, Any]] = cast(Any, safetensors).deserialize(data)
        tensors = {name: Raw(view["dtype"], tuple(view["shape"]), view["data"]) for name, view in views}
        index = _parsed(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata: Any = index.get("__metadata__") or {}
        header: Any = _parsed(metadata["deepthin"]) if "deepthin" in metadata else None
    except (safetensors.SafetensorError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise FormatError(f"{where} is damaged, or no .thin file: {error}.") from None
    except MemoryError:
        raise FormatError(f"{where}: its header takes more memory than there is.") from None
    if header is None:
        raise FormatError(_NO_HEADER.format(where))
    if data[-4:] != zlib.crc32(memoryview(data)[:-4]).to_bytes(4, "little"):
        raise FormatError(f"{where} is damaged: the checksum of {_damaged(header, tensors)} does not match.")
    return _checked(header, tensors, where, budget, finite, decoded)


def streamed(file: OpenFile, where: str, budget: Budget, finite: bool, decoded: bool, codes: bool) -> Contents:
    """Parse a file of version 1 that need not fit into memory.

    Args:
        file: The file.
        where: What messages call the file.
        budget: What reading may take; counted before anything is allocated.
        finite: Whether tensors that are stored as they are must be finite.
        decoded: Whether to count what decoding takes, too.
        codes: Whether to decode integers; else placeholders stand for them.

    Returns:
        The contents; their tensors are read when they are asked for.

    Raises:
        FormatError: The file is damaged, or takes more than the budget.
    """
    try:
        length = int.from_bytes(file.at(0, 8), "little")
        if length > min(MOST_HEADER_BYTES, file.bytes - 8):
            raise ValueError(f"its header would take {length} bytes")
        index = _parsed(file.at(8, length).decode())
        places = places_of(index, file.bytes - 8 - length)
        metadata: Any = index.get("__metadata__") or {}
        header: Any = _parsed(metadata["deepthin"]) if "deepthin" in metadata else None
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise FormatError(f"{where} is damaged, or no .thin file: {error}.") from None
    if header is None:
        raise FormatError(_NO_HEADER.format(where))
    tensors: dict[str, Raw] = {}
    whole = zlib.crc32(file.at(0, 8 + length))
    for name, (kind, shape, start, end) in places.items():  # in the order of the file
        checksum = 0
        for piece in file.pieces(8 + length + start, end - start - (4 if name == CHECKSUM else 0)):
            checksum, whole = zlib.crc32(piece, checksum), zlib.crc32(piece, whole)
        tensors[name] = Raw(kind, shape, Place(file, 8 + length + start, end - start, checksum))
    if file.at(file.bytes - 4, 4) != whole.to_bytes(4, "little"):
        raise FormatError(f"{where} is damaged: the checksum of {_damaged(header, tensors)} does not match.")
    return _checked(header, tensors, where, budget, finite, decoded, codes)


def _checked(
    header: Any, tensors: dict[str, Raw], where: str, budget: Budget, finite: bool, decoded: bool, codes: bool = True
) -> Contents:
    """Contents of a file whose structure and checksum are right; FormatError, which names the file, if they are not."""
    try:
        return _contents(header, tensors, budget, finite, decoded, codes)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{where}: its header does not describe a model ({type(error).__name__}: {error}).") from None
    except MemoryError:
        raise FormatError(f"{where} takes more memory than there is.") from None


def _parsed(text: bytes | str) -> Any:
    """JSON, in which no key may stand twice; ValueError if one does, or if a number is none of JSON's."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"{twice!r} stands twice in its header")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"its header has a number {name}")

    return json.loads(text, object_pairs_hook=unique, parse_constant=constant)


def _damaged(header: Any, tensors: Mapping[str, Raw]) -> str:
    """Names of the tensors whose checksums do not match, as far as the header can still be read."""
    sums: Any = cast(Any, header).get("crc32") if isinstance(header, dict) else None
    sums = cast(Any, sums) if isinstance(sums, dict) else {}
    wrong = [name for name, raw in tensors.items() if name in sums and sums[name] != f"{raw.checksum():08x}"]
    return ", ".join(wrong) or "its header"


def _contents(
    header: Any, tensors: dict[str, Raw], budget: Budget, finite: bool, decoded: bool, codes: bool
) -> Contents:
    """Check the header of version 1, which is untrusted, against the tensors that are present."""
    if header["version"] != 1 or type(header["version"]) is not int:
        raise FormatError(f"it is of format version {header['version']!r}; this deepthin reads versions 1 and 2.")
    if set(header) != {"version", "thin", "aliases", "crc32"}:
        raise FormatError(f"its header has the keys {sorted(header)}.")
    if (checksum := tensors.pop(CHECKSUM, None)) is None or (checksum.dtype, checksum.shape) != ("U8", (4,)):
        raise FormatError("it has no checksum.")
    if header["crc32"] != {name: f"{raw.checksum():08x}" for name, raw in tensors.items()}:
        raise FormatError("the checksums in its header are not those of its tensors.")
    for name, raw in tensors.items():
        if raw.dtype not in ITEM_BYTES:
            raise FormatError(f"{name} is of type {raw.dtype}; known are {', '.join(ITEM_BYTES)}.")
        if not fits(raw):
            raise FormatError(f"{name} has the shape {raw.shape}, which no array can have.")
    plans = {name: _plan(name, entry) for name, entry in header["thin"].items()}
    for name, plan in plans.items():
        for key in plan.method.code_shapes():
            if (raw := tensors.pop(f"{name}/{key}", None)) is not None:
                plan.entries[key] = raw
    return checked(plans, tensors, header["aliases"], 1, budget, finite, decoded, codes)


def _plan(name: str, entry: Any) -> Plan:
    """What the header says of a compressed matrix; FormatError where that cannot be."""
    if set(entry) - {"parts", "codings"} != {"method", "fields"}:
        raise FormatError(f"the entry of {name} has the keys {sorted(entry)}.")
    if not isinstance(entry["method"], str) or any(n not in METHODS for n in entry["method"].split(THEN, 1)):
        raise FormatError(f"{name} is stored by method {entry['method']!r}; known are {', '.join(METHODS)}.")
    try:
        method = with_fields(entry["method"], entry["fields"])
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise FormatError(
            f"its header does not describe a model: {name} has fields that {entry['method']} cannot have "
            f"({type(error).__name__}: {error})."
        ) from None
    listed = entry.get("parts", [[name, {"shape": list(method.shape)}]])
    parts = {own: _part(own, written) for own, written in listed}
    if len(parts) < len(listed) or next(iter(parts), None) != name:
        raise FormatError(f"the tensors of {name} are {[own for own, _ in listed]}.")
    if method.shape not in (flat_shape(whole := list(parts.values())), stacked_shape(whole)):
        shapes = " + ".join(str(part.shape) for part in parts.values())
        raise FormatError(f"{name} holds tensors of shape {shapes}, but its plan stores a {method.shape} matrix.")
    integers, codings = method.integers(), entry.get("codings", {})
    if not set(integers) <= set(codings) <= set(method.code_shapes()):
        raise FormatError(f"{name} has integers in {sorted(integers)}, but tells how to read {sorted(codings)}.")
    return Plan(entry["method"], method, parts, codings, {})


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
