"""The C runtime on this machine: its sources, a compiler, and flat files that run in this process."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from deepthin.errors import ConfigError, ExportError

SOURCES = ("dt.c", "dt.h", "dt_file.c")


def folder() -> Path:
    """Where the sources of the runtime are.

    Returns:
        A folder of the package, or of the repository that it is imported from.

    Raises:
        ConfigError: They are missing.
    """
    package = Path(__file__).parents[3]
    for place in (package / "runtime", package.parents[1] / "runtime"):
        if (place / "dt.c").is_file():
            return place
    raise ConfigError("The sources of the C runtime are missing: install deepthin again.")


def compiler() -> list[str]:
    """A C compiler for this machine.

    Returns:
        The command: that of the environment variable CC, or cc, gcc, clang, or that of the package ziglang.

    Raises:
        ConfigError: There is none.
    """
    if given := os.environ.get("CC"):
        return given.split()
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    if zig := zig_compiler():
        return zig
    raise ConfigError(
        "A C compiler checks what is written, and none was found: install gcc or clang, or pip install ziglang."
    )


def zig_compiler() -> list[str] | None:
    """Zig's C compiler, which has WebAssembly among its targets.

    Returns:
        The command; None if the package ziglang is not installed.
    """
    from importlib.util import find_spec

    return [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else None


def run(command: Sequence[str | Path], what: str) -> str:
    """Run a tool.

    Args:
        command: Its command line.
        what: What it is for, for the error.

    Returns:
        What it printed.

    Raises:
        ExportError: It failed; the message is its first error.
    """
    made = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if made.returncode:
        lines = [line for line in (made.stderr + made.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else str(made.returncode))
        raise ExportError(f"{what} failed: {first.strip()}")
    return made.stdout


@lru_cache(maxsize=8)
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The runtime as a shared library, compiled for this processor.

    Args:
        flags: Further flags, as ``-DDT_LANES=4``.

    Returns:
        The loaded library.
    """
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / "libdt.so"
        sources = [folder() / source for source in SOURCES if source.endswith(".c")]
        run([*compiler(), *NATIVE, *flags, *sources, "-o", made], "Compiling the runtime")
        loaded = ctypes.CDLL(str(made))
    loaded.dt_arena_bytes.restype = loaded.dt_scratch.restype = ctypes.c_size_t
    return loaded


NATIVE = ("-std=c99", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_ERRORS = {1: "its format is wrong", 2: "its version is unknown", 3: "its checksum is wrong", 4: "it is not aligned"}


class _Model(ctypes.Structure):
    _fields_ = (("file", ctypes.c_void_p), ("length", ctypes.c_uint32))


def aligned(size: int) -> np.ndarray:
    """Memory that begins at a multiple of 64 bytes.

    Args:
        size: Bytes.

    Returns:
        The bytes, zeros.
    """
    whole = np.zeros(size + 64, np.uint8)
    first = -whole.ctypes.data % 64
    return whole[first : first + size]


class FlatModel:
    """A flat file, ready to run by the C runtime.

    Args:
        data: The file's bytes.
        flags: Further flags of the compiler.

    Raises:
        ExportError: The runtime refuses the file.
    """

    def __init__(self, data: bytes, flags: tuple[str, ...] = ()) -> None:
        self._library, self._file = library(flags), aligned(len(data))
        self._file[:] = np.frombuffer(data, np.uint8)
        self._model = _Model()
        status = self._library.dt_open(
            ctypes.byref(self._model), ctypes.c_void_p(self._file.ctypes.data), ctypes.c_size_t(len(data))
        )
        if status:
            raise ExportError(f"The flat file cannot be read: {_ERRORS.get(status, status)}.")
        pointer = ctypes.byref(self._model)
        self.outputs = [
            self._library.dt_output_floats(pointer, index) for index in range(self._library.dt_outputs(pointer))
        ]
        self.arena_bytes = self._library.dt_arena_bytes(pointer)
        self._arena = aligned(max(self.arena_bytes, 16))
        self.reset()

    def reset(self) -> None:
        """Zero the states of recurrent layers."""
        self._library.dt_reset(ctypes.byref(self._model), ctypes.c_void_p(self._arena.ctypes.data))

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run once.

        Args:
            inputs: float32, or integers, of the sizes that the file was made for.

        Returns:
            Flat outputs.
        """
        given = [prepared(array) for array in inputs]
        made = [np.empty(count, np.float32) for count in self.outputs]
        pointers = [(ctypes.c_void_p * len(side))(*(array.ctypes.data for array in side)) for side in (given, made)]
        self._library.dt_run(ctypes.byref(self._model), *pointers, ctypes.c_void_p(self._arena.ctypes.data))
        return made


def prepared(array: np.ndarray) -> np.ndarray:
    """An input as C takes it.

    Args:
        array: Numbers.

    Returns:
        float32, or int32 where they are integers; contiguous.
    """
    return np.ascontiguousarray(array, np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32)
