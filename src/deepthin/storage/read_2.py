"""The reader of version 2 of the file (docs/format.md): a compact header, the arrays, a checksum."""

import math
import zlib
from collections.abc import Callable, Iterable

from deepthin.errors import ConfigError, FormatError
from deepthin.storage import head as compact
from deepthin.storage.arrays import ITEM_BYTES, Buffer, Raw, fits
from deepthin.storage.budget import Budget
from deepthin.storage.checked import MOST_HEADER_BYTES, Plan, checked
from deepthin.storage.codings import widened
from deepthin.storage.contents import Contents
from deepthin.storage.pieces import OpenFile, Place
from deepthin.storage.varints import Reader
from deepthin.storage.write import CHECKSUM_BYTES

MAGIC = compact.MAGIC[:-1]  # of versions from 2 on; the number of the version follows


def in_memory(data: bytes, where: str, budget: Budget, finite: bool, decoded: bool) -> Contents:
    """Parse a file of version 2.

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
    end = len(data) - CHECKSUM_BYTES
    head, start = _head(data[: len(compact.MAGIC) + 10], lambda first, count: data[first : first + count], end, where)
    if data[end:] != zlib.crc32(memoryview(data)[:end]).to_bytes(CHECKSUM_BYTES, "little"):
        raise FormatError(f"{where} is damaged: its checksum does not match.")
    places = _places(head, start, end, where)
    at = start
    for _, _, item, first in places:
        _check_zeros(data[at:first], where)
        at = first + item.bytes
    view = memoryview(data)
    found = [bytearray(view[first : first + item.bytes]) for _, _, item, first in places]  # writable
    return _contents(head, zip(places, found, strict=True), where, budget, finite, decoded, codes=True)


def streamed(file: OpenFile, where: str, budget: Budget, finite: bool, decoded: bool, codes: bool) -> Contents:
    """Parse a file of version 2 that need not fit into memory.

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
    end = file.bytes - CHECKSUM_BYTES
    begin = file.at(0, min(len(compact.MAGIC) + 10, file.bytes))
    head, start = _head(begin, file.at, end, where)
    places = _places(head, start, end, where)
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
    return _contents(head, zip(places, found, strict=True), where, budget, finite, decoded, codes)


def _head(begin: bytes, taken: Callable[[int, int], bytes], end: int, where: str) -> tuple[compact.Head, int]:
    """The header of version 2, and the place after it; FormatError if there is none."""
    version = begin[len(MAGIC) : len(compact.MAGIC)]
    if version and version != compact.MAGIC[-1:]:
        raise FormatError(f"{where} is of format version {version[0]}; this deepthin reads versions 1 and 2.")
    source = Reader(begin[: max(end, 0)], len(compact.MAGIC))
    try:
        if len(begin) < source.at:
            raise ValueError("it ends within its first bytes")
        length = source.number()
        if length > min(MOST_HEADER_BYTES, end - source.at):
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


def _places(head: compact.Head, start: int, end: int, where: str) -> list[tuple[str, str, compact.Item, int]]:
    """Where the arrays of a file are; FormatError if they do not fill it."""
    places, after = compact.places_of(head, start)
    if after != end:
        raise FormatError(f"{where}: its arrays end at byte {after}, which should be {end}.")
    return places


def _check_zeros(data: bytes, where: str) -> None:
    if data.strip(b"\0"):
        raise FormatError(f"{where}: what precedes an aligned array is not zeros.")


def _contents(
    head: compact.Head,
    arrays: Iterable[tuple[tuple[str, str, compact.Item, int], Buffer | Place]],
    where: str,
    budget: Budget,
    finite: bool,
    decoded: bool,
    codes: bool,
) -> Contents:
    """Contents of a file of version 2 whose structure and checksum are right; FormatError if they cannot be."""
    plans: dict[str, Plan] = {}
    for name, own in head.thin.items():
        codings = {entry: item.coding for entry, item in own.items.items() if item.coding}
        plans[name] = Plan(own.name, own.method, dict(own.parts), codings, {})
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
        return checked(plans, tensors, dict(head.aliases), 2, budget, finite, decoded, codes)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{where}: its header does not describe a model ({type(error).__name__}: {error}).") from None
    except MemoryError:
        raise FormatError(f"{where} takes more memory than there is.") from None
