"""Contents to bytes: a valid safetensors file whose every byte is checked (docs/format.md is normative).

The bytes depend on the contents alone.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepthin.errors import BudgetError
from deepthin.methods import fields
from deepthin.storage.arrays import ITEM_BYTES, Coding, Raw
from deepthin.storage.atomic import write_atomically
from deepthin.storage.contents import Contents, Part, Thin

VERSION = 1
MAX_BYTES = 4 << 30
CHECKSUM = "__crc32__"


def to_bytes(contents: Contents) -> bytes:
    """The file. Equal contents give equal bytes, whatever the order of the dictionaries."""
    return file_of(contents, {name: thin.stored() for name, thin in contents.thin.items()})


Stored = Mapping[str, tuple[Raw, Coding | None]]
"""The entries of a matrix as the file has them."""


def file_of(contents: Contents, stored: Mapping[str, Stored]) -> bytes:
    """The file, from entries that are coded already."""
    tensors = dict(contents.dense)
    codings: dict[str, dict[str, Coding]] = {}
    for name, entries in stored.items():
        tensors |= {f"{name}/{entry}": raw for entry, (raw, _) in entries.items()}
        codings[name] = {entry: coding for entry, (_, coding) in entries.items() if coding}
    if {CHECKSUM, "__metadata__"} & tensors.keys():
        raise ValueError(f"No tensor may be called {CHECKSUM} or __metadata__: rename it.")
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
    index[CHECKSUM] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
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


def write(contents: Contents, path: str | Path, max_bytes: int | None = None) -> int:
    """Write a file atomically and return its size in bytes; BudgetError, nothing written, if above ``max_bytes``."""
    data = to_bytes(contents)
    if max_bytes is not None and len(data) > max_bytes:
        raise BudgetError(
            f"The file would have {len(data)} bytes, above the limit of {max_bytes}: nothing was written. "
            "Compress with [model] file_bytes to meet a limit.",
            smallest_bits=8 * len(data),
            smallest_ratio=len(data) / max(contents.dense_bytes, 1),
        )
    write_atomically(path, data)
    return len(data)
