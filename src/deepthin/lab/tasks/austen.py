"""Jane Austen's six novels, out of Debian's package r-cran-janeaustenr, as words for a language model; R is not needed.

The package keeps each novel as the lines of a book in R's lazy-load database: ``Rdata.rdx`` says where in ``Rdata.rdb``
each object lies, and both hold R's serialisation (R Internals, section 1.8; XDR, big-endian), compressed by zlib.
"""

import gzip
import re
import struct
import zlib
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError

INSTALLED = Path("/usr/lib/R/site-library/janeaustenr")
END = "<eos>"  # of a paragraph

# A word has letters or digits, and may have apostrophes and hyphens inside; a mark stands alone; all else is left out.
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|--|[.,;:!?]")

# Types of R's items, in the low byte of the number before each.
_SYMBOL, _PAIRS, _CHARACTERS, _LOGICALS, _INTEGERS, _STRINGS, _LIST = 1, 2, 9, 10, 13, 16, 19
_NOTHING, _REFERENCE = 254, 255
_HAS_ATTRIBUTES, _HAS_TAG = 1 << 9, 1 << 10
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    struct.error,
    zlib.error,
)


def find(folder: Path) -> Path | None:
    """The package's own folder, the one with ``data``: the one given, or where ``dpkg -x`` puts it within."""
    places = (folder, folder / "janeaustenr", folder / INSTALLED.relative_to("/"))
    return next((place for place in places if (place / "data" / "Rdata.rdx").exists()), None)


def read(root: Path) -> dict[str, list[str]]:
    """By the name of a novel its lines, an empty one between paragraphs; ConfigError for what is no such database."""
    index = root / "data" / "Rdata.rdx"
    try:
        variables = unserialised(gzip.decompress(index.read_bytes()))["variables"]
        raw = index.with_suffix(".rdb").read_bytes()
        found: dict[str, list[str]] = {}
        for name, (start, count) in sorted(variables.items()):
            (length,) = struct.unpack(">I", raw[start : start + 4])
            item = zlib.decompress(raw[start + 4 : start + count])
            if len(item) != length:
                raise ValueError(f"{name} has {len(item)} of {length} bytes")
            found[name] = unserialised(item)
            if not isinstance(found[name], list) or not all(isinstance(line, str) for line in found[name]):
                raise ValueError(f"{name} is no text")
        return found
    except _DAMAGE as error:
        raise ConfigError(f"{index} is no database of R's, or damaged ({error}): install the package again.") from None


def words(lines: list[str]) -> list[str]:
    """Words in lower case and marks, each paragraph with its end."""
    paragraphs = "\n".join(lines).split("\n\n")
    found = [WORD.findall(paragraph.lower()) for paragraph in paragraphs]
    return [word for paragraph in found if paragraph for word in (*paragraph, END)]


def unserialised(raw: bytes) -> Any:
    """What R serialised: texts, lists, and mappings where there are names; ValueError for other types."""
    if raw[:2] != b"X\n":
        raise ValueError("not in R's binary form")
    version, _, _ = struct.unpack(">3i", raw[2:14])
    if version not in (2, 3):
        raise ValueError(f"version {version} of the form, not 2 or 3")
    skipped = 0 if version == 2 else 4 + struct.unpack(">i", raw[14:18])[0]  # the name of an encoding
    return _Items(raw, 14 + skipped).item()


class _Items:
    """R's items, one after another from a place on."""

    def __init__(self, raw: bytes, at: int) -> None:
        self._raw, self._at = raw, at
        self._symbols: list[Any] = []  # what later items refer to

    def item(self) -> Any:
        flags = self._integers(1)[0]
        kind = flags & 255
        if kind == _NOTHING:
            return None
        if kind == _SYMBOL:
            self._symbols.append(self.item())
            return self._symbols[-1]
        if kind == _REFERENCE:
            return self._symbols[(flags >> 8) - 1]
        if kind == _PAIRS:
            return self._pairs(flags)
        if kind == _CHARACTERS:
            length = self._integers(1)[0]
            return None if length == -1 else self._bytes(length).decode("latin-1" if flags & 1 << 14 else "utf-8")
        if kind not in (_LOGICALS, _INTEGERS, _STRINGS, _LIST):
            raise ValueError(f"type {kind} at byte {self._at}")
        count = self._integers(1)[0]
        if count < 0:
            raise ValueError(f"a length of {count} at byte {self._at}")
        found = self._integers(count) if kind in (_LOGICALS, _INTEGERS) else [self.item() for _ in range(count)]
        attributes = self.item() if flags & _HAS_ATTRIBUTES else {}
        return dict(zip(attributes["names"], found, strict=True)) if "names" in attributes else found

    def _pairs(self, flags: int) -> dict[Any, Any]:
        """By tag, to the end of the chain."""
        found: dict[Any, Any] = {}
        while flags & 255 == _PAIRS:
            if flags & _HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & _HAS_TAG else len(found)
            found[tag] = self.item()
            flags = self._integers(1)[0]
        if flags & 255 != _NOTHING:
            raise ValueError(f"a chain that ends in type {flags & 255} at byte {self._at}")
        return found

    def _integers(self, count: int) -> list[int]:
        return list(struct.unpack(f">{count}i", self._bytes(4 * count)))

    def _bytes(self, count: int) -> bytes:
        if not 0 <= count <= len(self._raw) - self._at:
            raise ValueError(f"{count} bytes at byte {self._at} of {len(self._raw)}")
        self._at += count
        return self._raw[self._at - count : self._at]
