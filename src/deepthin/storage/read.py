"""Bytes to contents. Reading trusts nothing: FormatError comes before anything large is allocated (docs/format.md)."""

import collections
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import safetensors

from deepthin.errors import ConfigError, FormatError
from deepthin.method import Method
from deepthin.methods import METHODS, THEN, with_fields
from deepthin.storage import head as compact
from deepthin.storage.arrays import FLOATS, ITEM_BYTES, Buffer, Coding, Raw, fits, largest, repeated, unpacked
from deepthin.storage.budget import Budget, count_integers, decode_bytes, named
from deepthin.storage.codings import extended, uncoded, widened
from deepthin.storage.contents import Contents, Part, Thin, flat_shape, stacked_shape
from deepthin.storage.pieces import OpenFile, Place, places_of
from deepthin.storage.report import Report, report_of
from deepthin.storage.varints import Reader
from deepthin.storage.write import CHECKSUM, CHECKSUM_BYTES, MAX_BYTES

IN_MEMORY_BYTES = 64 << 20
"""Larger files are not read as a whole: their tensors are read when they are asked for."""
_MOST_HEADER_BYTES = 100_000_000  # as safetensors
_MAGIC = compact.MAGIC[:-1]  # of versions from 2 on; the number of the version follows
_NO_HEADER = (
    "{} is a safetensors file, but no .thin file: it has no deepthin header. "
    "To compress such weights, run: deepthin compress --weights FILE."
)
_MOST_DIMENSIONS = 64  # what NumPy and torch can hold


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
    if data[: len(_MAGIC)] == _MAGIC:
        return _compact(data, where, Budget(max_bytes), finite, decoded)
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
    return _checked(header, tensors, where, Budget(max_bytes), finite, decoded)


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
    return _read(plans, tensors, header["aliases"], 1, budget, finite, decoded, codes)


def _read(
    plans: Mapping[str, "_Plan"],
    tensors: dict[str, Raw],
    aliases: Any,
    version: Literal[1, 2],
    budget: Budget,
    finite: bool,
    decoded: bool,
    codes: bool,
) -> Contents:
    """Contents of what a header of any version says; FormatError where that cannot be."""
    dense = [plan.dense_bytes() for plan in plans.values() if decoded]
    if sum(dense) > budget.limit:
        raise FormatError(
            f"it decodes to {sum(dense)} bytes, above the limit of {budget.limit}. "
            "If you trust the file, pass a larger max_bytes."
        )
    for name, plan in plans.items():
        _count(name, plan, budget, decoded, codes)
    thin: dict[str, Thin] = {}
    for name, plan in plans.items():
        with named(name):
            thin[name] = _thin(name, plan, version, codes)
    for name, raw in tensors.items():
        if finite and not math.isfinite(largest(raw)):
            raise FormatError(f"{name} holds NaN or infinity. If that is as it should be, pass finite=False.")
    known = set(tensors)
    for own in (own for entry in thin.values() for own in entry.parts):
        if own in known:
            raise FormatError(f"{own} is stored twice.")
        known.add(own)
    if not isinstance(aliases, dict):
        raise FormatError(f"the shared names are {aliases!r}.")
    shared = cast(dict[str, str], aliases)
    for name, target in shared.items():
        if name in known or target not in known:
            raise FormatError(f"the name {name} is declared to share {target!r}, which cannot be.")
    return Contents(thin, tensors, shared, version)


def _compact(data: bytes, where: str, budget: Budget, finite: bool, decoded: bool) -> Contents:
    """A file of version 2 that is held in memory."""
    end = len(data) - CHECKSUM_BYTES
    head, start = _compact_head(
        data[: len(compact.MAGIC) + 10], lambda first, count: data[first : first + count], end, where
    )
    if data[end:] != zlib.crc32(memoryview(data)[:end]).to_bytes(CHECKSUM_BYTES, "little"):
        raise FormatError(f"{where} is damaged: its checksum does not match.")
    places = _compact_places(head, start, end, where)
    at = start
    for _, _, item, first in places:
        _check_zeros(data[at:first], where)
        at = first + item.bytes
    view = memoryview(data)
    found = [bytearray(view[first : first + item.bytes]) for _, _, item, first in places]  # writable
    return _compact_contents(head, zip(places, found, strict=True), where, budget, finite, decoded, codes=True)


def _compact_head(begin: bytes, taken: Callable[[int, int], bytes], end: int, where: str) -> tuple[compact.Head, int]:
    """The header of version 2, and the place after it; FormatError if there is none."""
    version = begin[len(_MAGIC) : len(compact.MAGIC)]
    if version and version != compact.MAGIC[-1:]:
        raise FormatError(f"{where} is of format version {version[0]}; this deepthin reads versions 1 and 2.")
    source = Reader(begin[: max(end, 0)], len(compact.MAGIC))
    try:
        if len(begin) < source.at:
            raise ValueError("it ends within its first bytes")
        length = source.number()
        if length > min(_MOST_HEADER_BYTES, end - source.at):
            raise ValueError(f"its header would take {length} bytes")
        header = taken(source.at, length)
        head = compact.read_head(header)
        if compact.begun(head) != begin[: source.at] + header:
            raise ValueError("its header is not in the shortest form")
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, ConfigError) as error:
        raise FormatError(f"{where} is damaged, or no .thin file: {error}.") from None
    except MemoryError:
        raise FormatError(f"{where}: its header takes more memory than there is.") from None
    return head, source.at + length


def _compact_places(head: compact.Head, start: int, end: int, where: str) -> list[tuple[str, str, compact.Item, int]]:
    """Where the arrays of a file are; FormatError if they do not fill it."""
    places, after = compact.places_of(head, start)
    if after != end:
        raise FormatError(f"{where}: its arrays end at byte {after}, which should be {end}.")
    return places


def _check_zeros(data: bytes, where: str) -> None:
    if data.strip(b"\0"):
        raise FormatError(f"{where}: what precedes an aligned array is not zeros.")


def _compact_contents(
    head: compact.Head,
    arrays: Iterable[tuple[tuple[str, str, compact.Item, int], Buffer | Place]],
    where: str,
    budget: Budget,
    finite: bool,
    decoded: bool,
    codes: bool,
) -> Contents:
    """Contents of a file of version 2 whose structure and checksum are right; FormatError if they cannot be."""
    plans: dict[str, _Plan] = {}
    for name, own in head.thin.items():
        codings = {entry: item.coding for entry, item in own.items.items() if item.coding}
        plans[name] = _Plan(own.name, own.method, dict(own.parts), codings, {})
    tensors: dict[str, Raw] = {}
    try:
        for (name, entry, item, _), source in arrays:
            if entry:
                shape = plans[name].method.code_shapes()[entry]
                if item.bytes != ITEM_BYTES[item.kind] * math.prod(shape) or item.kind == "U8":
                    shape = (item.bytes // ITEM_BYTES[item.kind],)
                plans[name].entries[entry] = Raw(item.kind, shape, source)
            else:
                raw = Raw(item.kind, head.dense[name].shape, source)
                if not fits(raw):
                    raise FormatError(f"{name} has the shape {raw.shape}, which no array can have.")
                tensors[name] = widened(raw) if head.dense[name].short else raw
        return _read(plans, tensors, dict(head.aliases), 2, budget, finite, decoded, codes)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{where}: its header does not describe a model ({type(error).__name__}: {error}).") from None
    except MemoryError:
        raise FormatError(f"{where} takes more memory than there is.") from None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the header says of a compressed matrix, and its stored entries."""

    name: str  # of the method
    method: Method
    parts: dict[str, Part]
    codings: Mapping[str, Any]
    entries: dict[str, Raw]

    def item_bytes(self) -> int:
        """Of a decoded number."""
        return 8 if "F64" in {raw.dtype for raw in self.entries.values()} else 4

    def dense_bytes(self) -> int:
        """Of the decoded tensors."""
        return self.item_bytes() * sum(math.prod(part.shape) for part in self.parts.values())


def _plan(name: str, entry: Any) -> _Plan:
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
    return _Plan(entry["method"], method, parts, codings, {})


def _count(name: str, plan: _Plan, budget: Budget, decoded: bool, codes: bool) -> None:
    """Count what a matrix takes; FormatError if that is too much."""
    method, integers, item_bytes = plan.method, plan.method.integers(), plan.item_bytes()
    for key, shape in method.code_shapes().items():
        own, numbers, raw = f"{name}/{key}", math.prod(shape), plan.entries.get(key)
        stored_bytes = 0 if raw is None else raw.bytes
        if key in integers and codes:
            count_integers(budget, own, plan.codings[key], integers[key], numbers, stored_bytes)
            continue
        if key in plan.codings:
            budget.count(own, 2 * item_bytes * numbers)
    if decoded:
        copied = [math.prod(part.shape) for part in plan.parts.values() if part != Part(part.shape)]
        work = decode_bytes(method, item_bytes)
        # The result of decode is what is kept, unless a tensor is scaled or turned.
        work += item_bytes * (2 * max(copied) if copied else -math.prod(method.shape))
        budget.count(name, plan.dense_bytes(), work)


def _thin(name: str, plan: _Plan, version: Literal[1, 2], codes: bool) -> Thin:
    """A compressed matrix, taken from its entries; FormatError if these are not what its plan demands.

    Without ``codes``, integers stay as the file has them, unread, and placeholders stand for them.
    """
    method, integers, codings = plan.method, plan.method.integers(), plan.codings
    whole, cut = (unpacked, repeated) if version == 1 else (uncoded, extended)
    code: dict[str, Raw] = {}
    stored: dict[str, tuple[Raw, Coding | None]] = {}
    for key, expected in method.code_shapes().items():
        raw = plan.entries.get(key)
        if key in integers and not codes and raw is not None:
            code[key] = Raw.zeros("I64", expected)
        elif key in integers:
            code[key] = whole(f"{name}/{key}", raw, codings[key], integers[key], expected)
        elif key in codings:
            code[key] = cut(f"{name}/{key}", raw, codings[key], expected)
        elif raw is None or raw.shape != expected or raw.dtype not in FLOATS:
            found = "is missing" if raw is None else f"is {raw.dtype} {raw.shape}"
            raise FormatError(f"{name}/{key} must be floating numbers of shape {expected}, but {found}.")
        else:
            code[key] = raw
        if raw is not None:
            stored[key] = raw, tuple(codings[key]) if key in codings else None
        if key not in integers and not math.isfinite(largest(code[key])):
            raise FormatError(f"{name}/{key} holds NaN or infinity: a code must be finite.")
    if len(kinds := {raw.dtype for key, raw in code.items() if key not in integers}) > 1:
        raise FormatError(f"the code of {name} mixes the types {', '.join(sorted(kinds))}.")
    return Thin(plan.name, method, plan.parts, code, read=(version, stored))


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
    file, where = OpenFile(path), str(path)
    if file.at(0, len(_MAGIC)) == _MAGIC:
        return _streamed_compact(file, where, Budget(max_bytes), finite, decoded, codes)
    try:
        length = int.from_bytes(file.at(0, 8), "little")
        if length > min(_MOST_HEADER_BYTES, file.bytes - 8):
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
    return _checked(header, tensors, where, Budget(max_bytes), finite, decoded, codes)


def _streamed_compact(file: OpenFile, where: str, budget: Budget, finite: bool, decoded: bool, codes: bool) -> Contents:
    """As ``_streamed``, of version 2."""
    end = file.bytes - CHECKSUM_BYTES
    begin = file.at(0, min(len(compact.MAGIC) + 10, file.bytes))
    head, start = _compact_head(begin, file.at, end, where)
    places = _compact_places(head, start, end, where)
    whole, at, found = zlib.crc32(file.at(0, start)), start, list[Place]()
    for _, _, item, first in places:
        zeros, checksum = file.at(at, first - at), 0
        _check_zeros(zeros, where)
        whole = zlib.crc32(zeros, whole)
        for piece in file.pieces(first, item.bytes):
            checksum, whole = zlib.crc32(piece, checksum), zlib.crc32(piece, whole)
        found.append(Place(file, first, item.bytes, checksum))
        at = first + item.bytes
    if file.at(end, CHECKSUM_BYTES) != whole.to_bytes(CHECKSUM_BYTES, "little"):
        raise FormatError(f"{where} is damaged: its checksum does not match.")
    return _compact_contents(head, zip(places, found, strict=True), where, budget, finite, decoded, codes)


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
    for own, value in found.items():
        if not (math.isfinite(value) and value <= most):
            raise FormatError(
                f"{where}: the code of {name} decodes to NaN or infinity: {own} has numbers up to {value}."
            )
    return arrays


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
