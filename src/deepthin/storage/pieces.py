"""Tensors of a file that is not held in memory: their places, and their bytes, read in pieces when needed."""

import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deepthin.errors import FormatError
from deepthin.storage.arrays import ITEM_BYTES, PIECE_BYTES


class OpenFile:
    """A file whose bytes are read in pieces, whenever they are asked for; closed when nothing refers to it."""

    def __init__(self, path: str | Path) -> None:
        self.path, self._file = str(path), Path(path).open("rb")  # noqa: SIM115 -- closed with the object
        self.bytes = os.fstat(self._file.fileno()).st_size

    def at(self, first: int, count: int) -> bytes:
        """Bytes from a place on; FormatError if the file has become shorter."""
        data = os.pread(self._file.fileno(), count, first)
        if len(data) < count:
            raise FormatError(f"{self.path} changed while it was read.")
        return data

    def pieces(self, first: int, count: int) -> Iterator[bytes]:
        """Bytes in pieces."""
        for at in range(first, first + count, PIECE_BYTES):
            yield self.at(at, min(PIECE_BYTES, first + count - at))

    def __del__(self) -> None:
        if (file := self.__dict__.get("_file")) is not None:
            file.close()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes are in a file, and their checksum: what is read later must be what was checked."""

    file: OpenFile
    first: int
    count: int
    checksum: int

    def __call__(self) -> Iterator[bytes]:
        """The bytes in pieces; FormatError at their end if they have changed."""
        value = 0
        for piece in self.file.pieces(self.first, self.count):
            value = zlib.crc32(piece, value)
            yield piece
        if value != self.checksum:
            raise FormatError(f"{self.file.path} changed while it was read.")


def places_of(index: Any, data_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Type, shape and place of each tensor, in order; ValueError unless they fill the data, one after the other."""
    places: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for name, entry in index.items():
        if name == "__metadata__":
            continue
        kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if kind not in ITEM_BYTES or type(start) is not int or type(end) is not int:
            raise ValueError(f"{name} is described as {entry}")
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in cast(list[Any], shape)):
            raise ValueError(f"{name} has the shape {shape}")
        sizes = cast(list[int], shape)
        if not 0 <= start <= end or end - start != ITEM_BYTES[kind] * math.prod(sizes):
            raise ValueError(f"{name} of shape {shape} and type {kind} cannot have {end - start} bytes")
        places[name] = kind, tuple(sizes), start, end
    at = 0
    places = dict(sorted(places.items(), key=lambda item: item[1][2:]))
    for name, (_, _, start, end) in places.items():
        if start != at:
            raise ValueError(f"{name} begins at byte {start} of the data, not at {at}")
        at = end
    if at != data_bytes:
        raise ValueError(f"its tensors have {at} bytes, but the data {data_bytes}")
    return places
