"""Claims: files by whose locks processes, also on several machines, divide work among them.

The system frees a lock when its process ends, however it ends.
"""

import errno
import fcntl
from pathlib import Path
from typing import IO

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


def claim(path: Path) -> IO[bytes]:
    """Claim a file, after waiting until no other process holds it.

    Args:
        path: The file; created if missing, with its folder. It stays.

    Returns:
        What holds the claim until it is closed. On a file system without locks, nobody is kept out.

    Raises:
        OSError: The file cannot be opened.
    """
    return _locked(path, fcntl.LOCK_EX)


def claim_free(path: Path) -> IO[bytes] | None:
    """Claim a file if no other process holds it.

    Args:
        path: As for ``claim``.

    Returns:
        What holds the claim until it is closed; None if another process holds it.

    Raises:
        OSError: The file cannot be opened.
    """
    try:
        return _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def claimed(path: Path) -> bool:
    """Whether a process holds a claim.

    Args:
        path: The file.

    Returns:
        True if one does.
    """
    if not path.exists():
        return False
    held = claim_free(path)
    if held is not None:
        held.close()
    return held is None


def _locked(path: Path, how: int) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, how)
    except BaseException as error:
        if not isinstance(error, OSError) or error.errno not in _NO_LOCKS:
            file.close()
            raise
    return file
