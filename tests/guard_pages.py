"""Arrays between pages that may be neither read nor written, for scripts that tests run: a touch ends the process."""

import ctypes
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
KEPT: list[mmap.mmap] = []  # the memory of all copies


def guarded(array, at_end):
    """A copy that ends where a forbidden page begins, or begins where one ends."""
    pages = -(-max(array.nbytes, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    KEPT.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert _libc.mprotect(base + page * PAGE, PAGE, 0) == 0
    start = (pages + 1) * PAGE - array.nbytes if at_end else PAGE
    copy = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    copy[:] = array
    return copy
