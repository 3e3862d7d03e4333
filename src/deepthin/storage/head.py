"""The header of version 2: names, methods and codings as few bytes, and back (docs/format.md is normative).

What is read is untrusted: only the shortest form is accepted, so that no two headers say the same.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from deepthin.coding.bits import packed_bytes, width_of
from deepthin.errors import ConfigError
from deepthin.method import Method
from deepthin.storage.arrays import ITEM_BYTES, Coding
from deepthin.storage.codings import FORMS, WAYS
from deepthin.storage.contents import Part, flat_shape, stacked_shape
from deepthin.storage.schemas import numbers_of, read_method, write_method
from deepthin.storage.varints import Reader, Writer

MAGIC = b"thin\x02"
"""The first bytes of a file; no file of version 1 begins with the first four, which would be a header of 1.8 GB."""
TYPES = ("F32", "F64", "F16", "BF16", "C64", "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_ALIAS, _MEMBER = 14, 15  # in the place of a type
_SHARED = 63  # most bytes that a name shares with the one before: bounds what a small header can declare
_NIBBLE = 15
WORDS = {0xFF: b"weight", 0xFE: b"bias"}
"""Words that names end with, as single bytes that do not occur in UTF-8."""
ALIGNED_BYTES = 1024
ALIGNMENT = 8
_THIN = 0x80
_SHORT_DENSE = 0x40
_ODD, _ALIKE = 0x08, 0x20  # of the byte of a matrix
_TRANSPOSED, _SCALED, _ZERO_ROW = 1, 2, 4
_MANY = 7  # dimensions that do not fit into three bits
_MOST_DIMENSIONS = 64  # what NumPy and torch can hold


@dataclass(frozen=True, slots=True)
class Item:
    """One array as it is stored: its type, its coding, and its bytes."""

    kind: str  # U8 for integers; BF16 for floats that are shortened
    coding: Coding | None
    bytes: int

    @property
    def aligned(self) -> bool:
        """Whether its place in the file is a multiple of 8."""
        is_stream = self.coding is not None and self.coding[0] not in ("short", "repeats")
        return self.bytes >= ALIGNED_BYTES and not is_stream


@dataclass(frozen=True, slots=True)
class Matrix:
    """A compressed matrix: its method, its tensors, and how each entry of its code is stored."""

    name: str
    method: Method
    parts: Mapping[str, Part]
    items: Mapping[str, Item]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that is stored as it is, or, of F32, without lower halves that are zero."""

    kind: str
    shape: tuple[int, ...]
    short: bool = False

    @property
    def item(self) -> Item:
        """How it is stored."""
        kind = "BF16" if self.short else self.kind
        return Item(kind, ("short", math.prod(self.shape)) if self.short else None, _bytes(kind, self.shape))


@dataclass(frozen=True, slots=True)
class Head:
    """All that the header says."""

    thin: Mapping[str, Matrix]
    dense: Mapping[str, Tensor]
    aliases: Mapping[str, str]

    def names(self) -> list[bytes]:
        """All names in order; ValueError if one stands twice."""
        parts = [part for matrix in self.thin.values() for part in matrix.parts]
        names = sorted(name.encode() for name in (*parts, *self.dense, *self.aliases))
        if (twice := next((a for a, b in itertools.pairwise(names) if a == b), None)) is not None:
            raise ValueError(f"Two tensors would have the name {twice.decode()!r} in the file: rename one.")
        return names

    def items(self) -> Iterator[tuple[str, str, Item]]:
        """All arrays in the order of the file: tensor, entry (empty for one that is stored as it is), and form."""
        for encoded in self.names():
            name = encoded.decode()
            if name in self.dense:
                yield name, "", self.dense[name].item
            elif name in self.thin:
                for entry in self.thin[name].method.code_shapes():
                    yield name, entry, self.thin[name].items[entry]


def begun(head: Head) -> bytes:
    """The bytes before the arrays: what a file begins with, the length of the header, and the header.

    Args:
        head: What it says.

    Returns:
        The bytes.

    Raises:
        ConfigError: A method has fields that a file cannot hold.
        ValueError: Two tensors have one name.
    """
    to, names = Writer(), head.names()
    at = {name: place for place, name in enumerate(names)}
    to.number(len(names))
    before = b""
    for encoded in names:
        _write_name(to, before, encoded)
        before, name = encoded, encoded.decode()
        if name in head.thin:
            _write_matrix(to, name, head.thin[name], at)
        elif name in head.dense:
            _write_tensor(to, head.dense[name])
        elif name in head.aliases:
            to.byte(_ALIAS)
            to.number(at[head.aliases[name].encode()])
        else:
            to.byte(_MEMBER)
    length = Writer(bytearray(MAGIC))
    length.number(len(to.data))
    return bytes(length.data + to.data)


def read_head(data: bytes) -> Head:
    """Take the header apart.

    Args:
        data: The header, without what precedes it.

    Returns:
        What it says.

    Raises:
        KeyError, TypeError, ValueError, OverflowError, AttributeError: It is not what ``begun`` writes.
    """
    source = Reader(data)
    count = source.below(len(source))
    names: list[str] = []
    before = b""
    thin: dict[int, tuple[Matrix, list[int]]] = {}
    dense: dict[str, Tensor] = {}
    aliases: dict[int, int] = {}
    members: set[int] = set()
    for place in range(count):
        encoded = _read_name(source, before)
        if place and encoded <= before:
            raise ValueError(f"{encoded!r} is out of order")
        before = encoded
        names.append(encoded.decode())
        head = source.byte()
        if head & _THIN:
            try:
                thin[place] = _read_matrix(source, head, place, count)
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
                raise ValueError(f"{names[-1]}: {error}") from None
        elif head == _ALIAS:
            aliases[place] = source.below(count)
        elif head == _MEMBER:
            members.add(place)
        else:
            dense[names[-1]] = _read_tensor(source, head)
    if len(source):
        raise ValueError(f"{len(source)} bytes follow its last name")
    listed = [place for _, places in thin.values() for place in places]
    if sorted(listed) != sorted(members):
        raise ValueError("the tensors of its groups are not those that are listed")
    if wrong := [place for place, target in aliases.items() if target in aliases]:
        raise ValueError(f"the name {names[wrong[0]]} is declared to share {names[aliases[wrong[0]]]!r}, which shares")
    matrices: dict[str, Matrix] = {}
    for place, (matrix, places) in thin.items():
        own = zip((place, *places), matrix.parts.values(), strict=True)
        matrices[names[place]] = Matrix(matrix.name, matrix.method, {names[k]: part for k, part in own}, matrix.items)
    return Head(matrices, dense, {names[place]: names[target] for place, target in aliases.items()})


def places_of(head: Head, start: int) -> tuple[list[tuple[str, str, Item, int]], int]:
    """Where each array is.

    Args:
        head: What the header says.
        start: The place after the header.

    Returns:
        Tensor, entry, form and place of each array in order; and the place after the last one.
    """
    found: list[tuple[str, str, Item, int]] = []
    for name, entry, item in head.items():
        if item.aligned:
            start += -start % ALIGNMENT
        found.append((name, entry, item, start))
        start += item.bytes
    return found, start


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    return ITEM_BYTES[kind] * math.prod(shape)


# Names


def _write_name(to: Writer, before: bytes, name: bytes) -> None:
    shared = 0
    for a, b in zip(before[:_SHARED], name, strict=False):
        if a != b:
            break
        shared += 1
    rest = name[shared:]
    for byte, word in WORDS.items():
        rest = rest.replace(word, bytes([byte]))
    to.byte(min(shared, _NIBBLE) << 4 | min(len(rest), _NIBBLE))
    for length in (shared, len(rest)):
        if length >= _NIBBLE:
            to.number(length - _NIBBLE)
    to.data += rest


def _read_name(source: Reader, before: bytes) -> bytes:
    both = source.byte()
    lengths = [length + (source.number() if length == _NIBBLE else 0) for length in (both >> 4, both & 15)]
    if lengths[0] > min(_SHARED, len(before)):
        raise ValueError(f"a name shares {lengths[0]} bytes with {before!r}")
    rest = source.take(lengths[1])
    for byte, word in WORDS.items():
        rest = rest.replace(bytes([byte]), word)
    return before[: lengths[0]] + rest


# Tensors that are stored as they are


def _write_tensor(to: Writer, tensor: Tensor) -> None:
    dimensions = len(tensor.shape)
    to.byte(TYPES.index(tensor.kind) | min(dimensions, 3) << 4 | (_SHORT_DENSE if tensor.short else 0))
    if dimensions >= 3:
        to.number(dimensions - 3)
    for length in tensor.shape:
        to.number(length)


def _read_tensor(source: Reader, head: int) -> Tensor:
    kind, dimensions, short = head & 15, head >> 4 & 3, bool(head & _SHORT_DENSE)
    if kind >= len(TYPES) or (short and TYPES[kind] != "F32"):
        raise ValueError(f"a tensor begins with the byte {head:#04x}")
    if dimensions == 3:
        dimensions += source.below(_MOST_DIMENSIONS - 2)
    return Tensor(TYPES[kind], tuple(source.number() for _ in range(dimensions)), short)


# Compressed matrices


def _write_matrix(to: Writer, name: str, matrix: Matrix, at: Mapping[bytes, int]) -> None:
    outer, inner = numbers_of(matrix.name)
    to.byte(_THIN | outer << 3 | inner)
    integers, shapes = matrix.method.integers(), matrix.method.code_shapes()
    forms = [_form_of(matrix.items[entry], shapes[entry]) for entry in shapes if entry not in integers]
    mode = _mode_of(forms)
    parts, fields = list(matrix.parts.items()), Writer()
    flags = mode << 6 | (_ALIKE if write_method(fields, matrix.name, matrix.method) else 0)
    flat, stacked = (shape([part for _, part in parts]) for shape in (flat_shape, stacked_shape))
    if matrix.method.shape not in (flat, stacked):
        shapes = " + ".join(str(part.shape) for _, part in parts)
        raise ConfigError(
            f"{name} holds tensors of shape {shapes}, but its plan stores a {matrix.method.shape} matrix."
        )
    if len(parts) == 1:
        _write_part(to, parts[0][1], flags)
    else:
        to.byte(flags)
        to.number(len(parts) - 2 << 1 | (matrix.method.shape != flat))
        for own, part in parts:
            if own != name:
                to.number(at[own.encode()])
            _write_part(to, part, 0)
    to.data += fields.data
    if mode == 2:
        to.byte(forms[0])
    for entry in shapes:
        item = matrix.items[entry]
        if entry in integers:
            _write_way(to, item, integers[entry].rising)
        elif mode == 3:
            to.byte(form := _form_of(item, shapes[entry]))
            if form & 8:
                to.number(cast(Coding, item.coding)[1])


def _read_matrix(source: Reader, head: int, place: int, count: int) -> tuple[Matrix, list[int]]:
    """A matrix, its parts by their numbers instead of names, and the places of the names of all but the first."""
    first = source.byte()
    mode, places, parts, stacked = first >> 6, list[int](), list[Part](), 0
    if first & 0x1F:
        parts.append(_read_part(source, first & 0x1F))
    else:
        number = source.number()
        stacked = number & 1
        for k in range(2 + (number >> 1)):
            if k:
                places.append(source.below(count))
            parts.append(_read_part(source, source.byte()))
    if len({place, *places}) < len(parts):
        raise ValueError("its tensors are listed twice")
    shape = stacked_shape(parts) if stacked else flat_shape(parts)
    if shape is None:
        raise ValueError("its tensors cannot be stacked")
    name, method = read_method(source, (head >> 3 & 15, head & 7), shape, bool(first & _ALIKE))
    if method.shape != shape:
        shapes = " + ".join(str(part.shape) for part in parts)
        raise ValueError(f"holds tensors of shape {shapes}, but its plan stores a {method.shape} matrix")
    form = source.byte() if mode == 2 else mode
    items: dict[str, Item] = {}
    integers = method.integers()
    for entry, entry_shape in method.code_shapes().items():
        if entry in integers:
            kind = integers[entry]
            items[entry] = _read_way(source, entry_shape, kind.rising, width_of(kind.count))
        else:
            items[entry] = _read_form(source, source.byte() if mode == 3 else form, entry_shape)
    return Matrix(name, method, {str(k): part for k, part in enumerate(parts)}, items), places


def _write_part(to: Writer, part: Part, flags: int) -> None:
    dimensions = len(part.shape)
    odd = _TRANSPOSED * part.transposed | _SCALED * (part.scale != 1.0) | _ZERO_ROW * (part.zero_row is not None)
    to.byte(flags | min(dimensions, _MANY) | (_ODD if odd else 0))
    if dimensions >= _MANY:
        to.number(dimensions - _MANY)
    for length in part.shape:
        to.number(length)
    if odd:
        to.byte(odd)
        if odd & _SCALED:
            to.float(part.scale)
        if part.zero_row is not None:
            to.number(part.zero_row)


def _read_part(source: Reader, first: int) -> Part:
    dimensions = first & 7
    if first & ~0x0F or not dimensions:
        raise ValueError(f"a tensor is described by the byte {first:#04x}")
    if dimensions == _MANY:
        dimensions += source.below(_MOST_DIMENSIONS - _MANY + 1)
    shape = tuple(source.number() for _ in range(dimensions))
    odd = source.byte() if first & _ODD else 0
    if odd > 7:
        raise ValueError(f"a tensor has the options {odd:#04x}")
    scale = source.float() if odd & _SCALED else 1.0
    zero_row = source.number() if odd & _ZERO_ROW else None
    if min(shape) < 1 or not 0 < scale < math.inf or not (zero_row is None or zero_row < shape[0]):
        raise ValueError(f"a tensor has the shape {shape}, the scale {scale} and the row of zeros {zero_row}")
    return Part(shape, scale, bool(odd & _TRANSPOSED), zero_row)


def _form_of(item: Item, shape: tuple[int, ...]) -> int:
    """The byte of an entry of floats."""
    way, kept = item.coding or ("", 0)
    form = FORMS.index("short" if way == "short" else item.kind)
    return form | 8 if way == "repeats" or (way == "short" and kept != math.prod(shape)) else form


def _mode_of(forms: list[int]) -> int:
    """0: all are F32; 1: shortened; 2: of one form, which follows; 3: each has its own."""
    if not forms or set(forms) == {0}:
        return 0
    if len(set(forms)) > 1 or forms[0] & 8:
        return 3
    return 1 if forms[0] == 1 else 2


def _read_form(source: Reader, form: int, shape: tuple[int, ...]) -> Item:
    way = FORMS[form & ~8] if form & ~8 < len(FORMS) else None
    if way is None:
        raise ValueError(f"floats have the form {form:#04x}")
    kept = source.number() if form & 8 else math.prod(shape)
    kind = "BF16" if way == "short" else way
    coding = ("short", kept) if way == "short" else ("repeats", kept) if form & 8 else None
    return Item(kind, coding, ITEM_BYTES[kind] * kept)


def _write_way(to: Writer, item: Item, rising: bool) -> None:
    way, width = cast(Coding, item.coding)
    if way == "levels" and width:
        way = "rows"
    length = 0 if way == "packed" else item.bytes
    to.number(length << 3 | WAYS.index(way))
    if rising and way in ("gaps", "huffman", "planned"):
        to.byte(width)


def _read_way(source: Reader, shape: tuple[int, ...], rising: bool, width: int) -> Item:
    number = source.number()
    way, length = WAYS[number & 7], number >> 3
    if way == "packed":
        if length:
            raise ValueError(f"packed integers of {length} bytes, whose number follows from the method")
        return Item("U8", (way, width), packed_bytes(math.prod(shape), width))
    if way == "rows":
        return Item("U8", ("levels", shape[-1]), length)
    if way in ("gaps", "huffman"):
        width = source.byte() if rising else width
    return Item("U8", (way, width if way in ("gaps", "huffman", "tree") else 0), length)
