"""Files that are there whole or not at all."""

import contextlib
import errno
import os
import secrets
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from deepthin.storage.arrays import Buffer

_STALE_SECONDS = 3600
_LEAST_BYTES = 1 << 20  # shortest write; shorter pieces are joined


def write_atomically(path: str | Path, data: Buffer) -> None:
    """Replace a file: after a crash or a full disk either the old or the new file is whole.

    Args:
        path: The file; see ``stream_atomically``.
        data: Its new bytes.

    Raises:
        OSError: The file cannot be written; the error names the path, and the old file is unchanged.
    """
    stream_atomically(path, (data,))


def stream_atomically(path: str | Path, pieces: Iterable[Buffer]) -> None:
    """Replace a file by pieces that are written one after the other.

    After a crash, a full disk, or an error of ``pieces``, either the old or the new file is whole. The bytes go to a
    temporary file in the same folder, are forced to disk, and take the name, and an old file's mode, in one step.
    Temporary files that an earlier crash left more than an hour ago are removed.

    Args:
        path: The file. A link is followed; a pipe or a device is written to directly.
        pieces: Buffers, asked for one by one.

    Raises:
        OSError: The file cannot be written; the error names the path, and the old file is unchanged.
    """
    try:
        path = Path(path).resolve()
    except RuntimeError:  # of Python before 3.13; later ones raise when they open it
        raise OSError(errno.ELOOP, f"could not write: {os.strerror(errno.ELOOP)}", str(path)) from None
    except ValueError:
        raise ValueError(f"{str(path)!r} is no name of a file: it has a null byte.") from None
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                file.writelines(_joined(pieces))
            return
        prefix = f".deepthin-{zlib.crc32(os.fsencode(path.name)):08x}-"
        for stale in path.parent.glob(f"{prefix}*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another process may clean up at the same time
                if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                    stale.unlink()
        temporary = path.parent / f"{prefix}{secrets.token_hex(8)}.tmp"
        try:
            mode = path.stat().st_mode & 0o777 if path.exists() else None
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if mode is not None:
                    os.fchmod(file, mode)
                for piece in _joined(pieces):
                    view = memoryview(piece)
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


def _joined(pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    """The same bytes, short pieces joined; long ones are not copied."""
    short = bytearray()
    for piece in pieces:
        if len(piece) >= _LEAST_BYTES:
            if short:
                yield short
                short = bytearray()
            yield piece
            continue
        short += piece
        if len(short) >= _LEAST_BYTES:
            yield short
            short = bytearray()
    if short:
        yield short
