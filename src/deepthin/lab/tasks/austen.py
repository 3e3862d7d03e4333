"""Jane Austen's six novels, out of Debian's package r-cran-janeaustenr, as words for a language model; R is not needed.

The package stores each novel as the lines of a book in R's lazy-load database: ``Rdata.rdx``, an RDS file, says where
in ``Rdata.rdb`` each object lies, a length and zlib's stream. What these hold, R's serialisation, the package rdata
reads.
"""

import gzip
import re
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError

INSTALLED = Path("/usr/lib/R/site-library/janeaustenr")
END = "<eos>"  # ends a paragraph

# A word has letters or digits, and may have apostrophes and hyphens inside; punctuation marks are words of their own.
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|--|[.,;:!?]")


def find(folder: Path) -> Path | None:
    """Find the package's own folder, the one that contains ``data``.

    Args:
        folder: That folder, its parent, or where ``dpkg -x`` unpacked the package.

    Returns:
        The folder, or None if there is no such package.
    """
    places = (folder, folder / "janeaustenr", folder / INSTALLED.relative_to("/"))
    return next((place for place in places if (place / "data" / "Rdata.rdx").exists()), None)


def read(root: Path) -> dict[str, list[str]]:
    """Read all novels of the package.

    Args:
        root: The package's folder, as `find` returns it.

    Returns:
        By the name of a novel its lines, an empty one between paragraphs.

    Raises:
        ConfigError: The database is damaged, or the package rdata is not installed.
    """
    if find_spec("rdata") is None:
        raise ConfigError("Jane Austen's novels are read by rdata: pip install 'deepthin[compare]'.")
    index = root / "data" / "Rdata.rdx"
    try:
        variables = unserialised(gzip.decompress(index.read_bytes()))["variables"]
        raw = index.with_suffix(".rdb").read_bytes()
        novels: dict[str, list[str]] = {}
        for name, (start, count) in sorted((str(name), map(int, place)) for name, place in variables.items()):
            (length,) = struct.unpack(">I", raw[start : start + 4])
            item = zlib.decompress(raw[start + 4 : start + count])
            if len(item) != length:
                raise ValueError(f"{name} has {len(item)} of {length} bytes")
            lines = unserialised(item)
            if not len(lines) or not all(isinstance(line, str) for line in lines):  # rdata reads short vectors as empty
                raise ValueError(f"{name} is not text")
            novels[name] = [str(line) for line in lines]
        return novels
    except Exception as error:  # damaged files make rdata raise exceptions of many classes
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"{index} is not an R database, or is damaged ({reason}): install the package again."
        ) from None


def words(lines: list[str]) -> list[str]:
    """Split text into tokens for a language model.

    Args:
        lines: Lines of a book, an empty one between paragraphs.

    Returns:
        Words in lower case and punctuation marks, each paragraph followed by `END`.
    """
    paragraphs = "\n".join(lines).split("\n\n")
    tokens = [WORD.findall(paragraph.lower()) for paragraph in paragraphs]
    return [word for paragraph in tokens if paragraph for word in (*paragraph, END)]


def unserialised(raw: bytes) -> Any:
    """Read one object that R serialised in its binary form.

    Args:
        raw: R's serialisation, uncompressed.

    Returns:
        A NumPy array for a vector, a mapping for a list with names.

    Raises:
        ValueError: The bytes are not in R's binary form.
    """
    import rdata

    if raw[:2] != b"X\n":
        raise ValueError("not in R's binary form")
    return rdata.conversion.convert(rdata.parser.parse_data(raw, extension=".rds"))
