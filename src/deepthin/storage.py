"""The ``.thin`` file: a valid safetensors file whose every byte is checked (docs/format.md is normative).

Writing is atomic, and the bytes depend on the contents alone. Reading trusts nothing: whatever is wrong with a file,
FormatError says so before anything large is allocated.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import secrets
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors

from deepthin.coding import FLOATS, ITEM_BYTES, LONGEST_NAME, Coding, Raw, packed, repeated, unpacked, without_repeats
from deepthin.method import BudgetError, FormatError, Method, Namespace
from deepthin.methods import METHODS, THEN, fields, with_fields
from deepthin.report import Report, Row, describe
from deepthin.rules import matrix_shape

VERSION = 1
MAX_BYTES = 4 << 30
_CHECKSUM = "__crc32__"
_STALE_SECONDS = 3600
_MOST_DIMENSIONS = 64  # what NumPy and torch can hold


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a decoded matrix: its share of the flattened entries, times ``scale``, in its own shape."""

    shape: tuple[int, ...]
    scale: float = 1.0
    transposed: bool = False  # stored (outputs, inputs), where the model keeps (inputs, outputs)
    zero_row: int | None = None  # a row that reads as zeros: the padding of an embedding

    def cut(self, flat: Any, xp: Namespace) -> Any:
        """The tensor from its entries, in any framework."""
        if self.scale != 1.0:
            flat = flat * self.scale
        tensor = flat.reshape(self.shape[::-1]).T if self.transposed else flat.reshape(self.shape)
        if self.zero_row is None:
            return tensor
        row, after = self.zero_row, self.zero_row + 1
        return xp.concatenate([tensor[:row], 0 * tensor[row:after], tensor[after:]])


@dataclass(frozen=True, slots=True)
class Thin:
    """A compressed matrix and the tensors that it holds, one after the other: several in a group, else one."""

    name: str  # of the method, as users write it
    method: Method
    parts: Mapping[str, Part]  # by the tensor's name, in order
    code: Mapping[str, Raw]  # integers as they are, not packed
    planned: bool = False  # whether there is no code yet: integers are then so many bytes, the most that they can take

    @classmethod
    def plan(cls, name: str, method: Method, parts: Mapping[str, Part], like: Raw) -> "Thin":
        """What takes at least the room of any code of this method whose floats have the type of ``like``."""
        integers, code = method.integers(), dict[str, Raw]()
        for entry, shape in method.code_shapes().items():
            count = math.prod(shape)
            if entry in integers:
                code[entry] = Raw("U8", (most := integers[entry].bytes(count),), bytes(most))
            else:
                code[entry] = Raw(like.dtype, shape, bytes(ITEM_BYTES[like.dtype] * count))
        return cls(name, method, parts, code, planned=True)

    def stored(self) -> dict[str, tuple[Raw, Coding | None]]:
        """Every entry as the file has it: floats, and integers as bytes; with how these are to be read."""
        integers = self.method.integers()
        if self.planned:
            return {entry: (raw, LONGEST_NAME if entry in integers else None) for entry, raw in self.code.items()}
        return {
            entry: packed(raw.numpy(), integers[entry]) if entry in integers else without_repeats(entry, raw)
            for entry, raw in self.code.items()
        }

    @property
    def bytes(self) -> int:
        """Of the stored tensors."""
        return sum(len(raw.data) for raw, _ in self.stored().values())

    @property
    def dense_bytes(self) -> int:
        """Of the dense tensors, in the type of the code."""
        return sum(self.item_bytes * math.prod(part.shape) for part in self.parts.values())

    @property
    def item_bytes(self) -> int:
        """Of one number of the code."""
        integers = self.method.integers()
        return ITEM_BYTES[next(raw.dtype for entry, raw in self.code.items() if entry not in integers)]

    def decode(self) -> dict[str, np.ndarray]:
        """The dense tensors by name; codes in half precision are decoded in float32."""
        code = {entry: raw.numpy() for entry, raw in self.code.items()}
        code = {entry: a.astype(np.float32) if a.dtype == np.float16 else a for entry, a in code.items()}
        flat = np.reshape(self.method.decode(code | self.method.derived(), cast(Any, np)), (-1,))
        ends = list(itertools.accumulate(math.prod(part.shape) for part in self.parts.values()))
        cuts = zip(self.parts.items(), [0, *ends], ends, strict=False)
        return {
            name: np.ascontiguousarray(part.cut(flat[start:end], cast(Any, np))) for (name, part), start, end in cuts
        }


def _possible_shapes(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """The matrices that may hold these tensors: a single one's own, or for several near-square, or stacked."""
    own = [matrix_shape(part.shape[::-1] if part.transposed else part.shape) for part in parts]
    if len(own) == 1:
        return own
    flat = matrix_shape((sum(math.prod(part.shape) for part in parts),))
    stacked = (sum(rows for rows, _ in own), own[0][1])
    return [flat, stacked] if len({cols for _, cols in own}) == 1 else [flat]


@dataclass(frozen=True, slots=True)
class Contents:
    """All that a file holds: compressed matrices, tensors as they are, and names that share another name's tensor.

    ``thin`` is keyed by the name of each matrix's first tensor.
    """

    thin: Mapping[str, Thin]
    dense: Mapping[str, Raw] = field(default_factory=dict[str, Raw])
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])

    def report(self, errors: Mapping[str, float] | None = None) -> Report:
        """One row a tensor of two dimensions or compressed, and the totals of the file as ``to_bytes`` writes it.

        The tensors of a group share its bytes by their size.
        """
        rows: list[Row] = []
        stored = {key: thin.stored() for key, thin in self.thin.items()}
        for key, thin in self.thin.items():
            left, dense_left = sum(len(raw.data) for raw, _ in stored[key].values()), thin.dense_bytes
            plan = {**describe(thin.method), **_coding_of(thin, stored[key])}
            for name, part in thin.parts.items():
                dense = thin.item_bytes * math.prod(part.shape)
                share = left * dense // dense_left
                left, dense_left = left - share, dense_left - dense
                group = {"group": key} if len(thin.parts) > 1 else {}
                error = (errors or {}).get(name, math.nan)
                rows.append(Row(name, thin.name, part.shape, dense, share, error, {**plan, **group}))
        dense = {name: len(raw.data) for name, raw in self.dense.items()}
        matrices = [name for name, raw in self.dense.items() if len(raw.shape) > 1]
        rows += [Row(name, "dense", self.dense[name].shape, dense[name], dense[name]) for name in matrices]
        return Report(
            rows=tuple(sorted(rows, key=lambda row: row.name)),
            total_bytes=len(_file(self, stored)),
            dense_bytes=sum(dense.values()) + sum(thin.dense_bytes for thin in self.thin.values()),
            other_bytes=sum(bytes_ for name, bytes_ in dense.items() if name not in matrices),
        )


def to_bytes(contents: Contents) -> bytes:
    """The file. Equal contents give equal bytes, whatever the order of the dictionaries."""
    return _file(contents, {name: thin.stored() for name, thin in contents.thin.items()})


Stored = Mapping[str, tuple[Raw, Coding | None]]
"""The entries of a matrix as the file has them."""


def _coding_of(thin: Thin, stored: Stored) -> dict[str, str]:
    """How a matrix's integers are stored, as a report shows it: nothing where there are none."""
    if thin.planned or not (integers := thin.method.integers()):
        return {}
    ways: list[str] = []
    for entry in integers:
        raw, coding = stored[entry]
        bits = 8 * len(raw.data) / max(math.prod(thin.code[entry].shape), 1)
        ways.append(f"{entry + ' ' if len(integers) > 1 else ''}{coding[0] if coding else ''} {bits:.1f} bits")
    return {"coding": ", ".join(ways)}


def _file(contents: Contents, stored: Mapping[str, Stored]) -> bytes:
    tensors = dict(contents.dense)
    codings: dict[str, dict[str, Coding]] = {}
    for name, entries in stored.items():
        tensors |= {f"{name}/{entry}": raw for entry, (raw, _) in entries.items()}
        codings[name] = {entry: coding for entry, (_, coding) in entries.items() if coding}
    if {_CHECKSUM, "__metadata__"} & tensors.keys():
        raise ValueError(f"No tensor may be called {_CHECKSUM} or __metadata__: rename it.")
    if len(tensors) < len(contents.dense) + sum(len(t.code) for t in contents.thin.values()):
        raise ValueError("Two tensors would have one name in the file: rename the tensor whose name contains a slash.")
    header = {
        "version": VERSION,
        "thin": {key: _entry(key, thin, codings[key]) for key, thin in contents.thin.items()},
        "aliases": dict(contents.aliases),
        "crc32": {name: f"{zlib.crc32(raw.data):08x}" for name, raw in tensors.items()},
    }
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))  # aligned, however many
    index: dict[str, Any] = {"__metadata__": {"deepthin": json.dumps(header, sort_keys=True, separators=(",", ":"))}}
    end = 0
    for name in order:
        start, end = end, end + len(tensors[name].data)
        index[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [start, end]}
    index[_CHECKSUM] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
    text = json.dumps(index, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join([len(text).to_bytes(8, "little"), text, *(tensors[name].data for name in order)])
    return body + zlib.crc32(body).to_bytes(4, "little")


def _entry(key: str, thin: Thin, codings: Mapping[str, Coding]) -> dict[str, Any]:
    """A compressed matrix as the header has it: what is as usual is left out."""
    entry: dict[str, Any] = {"method": thin.name, "fields": fields(thin.method)}
    if codings:
        entry["codings"] = codings
    if dict(thin.parts) != {key: Part(thin.method.shape)}:
        usual = dataclasses.asdict(Part(()))
        written = {name: dataclasses.asdict(part).items() for name, part in thin.parts.items()}
        entry["parts"] = [[name, {k: v for k, v in items if v != usual[k]}] for name, items in written.items()]
    return entry


def from_bytes(data: bytes, where: str = "the file") -> Contents:
    """The contents of a file; FormatError, naming ``where``, for anything but an intact file of this version."""
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
    """Which tensors a damaged file has got wrong, as far as what is left of its header tells."""
    sums: Any = cast(Any, header).get("crc32") if isinstance(header, dict) else None
    sums = cast(Any, sums) if isinstance(sums, dict) else {}
    wrong = [name for name, raw in tensors.items() if name in sums and sums[name] != f"{zlib.crc32(raw.data):08x}"]
    return ", ".join(wrong) or "its header"


def _contents(header: Any, tensors: dict[str, Raw]) -> Contents:
    """Check a header that an attacker may have written against the tensors that are really there."""
    if header["version"] != VERSION or type(header["version"]) is not int:
        raise FormatError(f"it is of format version {header['version']!r}; this deepthin reads version {VERSION}.")
    if set(header) != {"version", "thin", "aliases", "crc32"}:
        raise FormatError(f"its header has the keys {sorted(header)}.")
    if (checksum := tensors.pop(_CHECKSUM, None)) is None or (checksum.dtype, checksum.shape) != ("U8", (4,)):
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
    """A part from the header; FormatError if its fields are not what they must be."""
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
    """The contents of the file at ``path``; OSError if it cannot be read, FormatError if it is not intact."""
    return from_bytes(Path(path).read_bytes(), str(path))


def write(contents: Contents, path: str | Path, max_bytes: int | None = None) -> int:
    """Write a file atomically and return its size in bytes; BudgetError, nothing written, if above ``max_bytes``."""
    data = to_bytes(contents)
    if max_bytes is not None and len(data) > max_bytes:
        raise BudgetError(
            f"The file would have {len(data)} bytes, above the limit of {max_bytes}: nothing was written. "
            "Compress with [model] file_bytes to meet a limit.",
            smallest_bits=8 * len(data),
            smallest_ratio=len(data) / max(contents.report().dense_bytes, 1),
        )
    write_atomically(path, data)
    return len(data)


def load(path: str | Path, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """The dense state dict, decoded by NumPy: the same names, biases and buffers included.

    ``max_bytes`` caps the decoded size, since a small file may declare a huge matrix; FormatError above it. Decoding
    one matrix takes up to twice its size besides, a shuffled one up to eight times (its permutation).
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
    """What a file holds, without decoding anything."""
    return read(path).report()


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace the file at ``path`` by ``data``: after a crash or a full disk either the old or the new file is whole.

    The bytes go to a temporary file beside it, are forced to disk, and take the name, and an old file's mode, in one
    step. Temporary files that an earlier crash left more than an hour ago are removed. A link is followed; a pipe or a
    device is written to. OSError names the path; then the old file still stands.
    """
    path = Path(path).resolve()
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        prefix = f".deepthin-{zlib.crc32(path.name.encode()):08x}-"
        for stale in path.parent.glob(f"{prefix}*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another save may clean up as well
                if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                    stale.unlink()
        temporary = path.parent / f"{prefix}{secrets.token_hex(8)}.tmp"
        try:
            mode = path.stat().st_mode & 0o777 if path.exists() else None
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if mode is not None:
                    os.fchmod(file, mode)
                view = memoryview(data)
                while view:
                    view = view[os.write(file, view) :]
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise OSError(error.errno, f"could not write: {os.strerror(error.errno or 0)}", str(path)) from error
