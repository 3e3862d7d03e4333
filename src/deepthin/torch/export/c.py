"""A model as C99: its calls and constants in one file, beside the runtime's sources, an example and a Makefile."""

import ctypes
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from deepthin.errors import ExportError
from deepthin.torch.export.native import runtime
from deepthin.torch.export.native.flat import bytes_of_constants, flat_file
from deepthin.torch.export.native.footprint import CORTEX_M4, footprint
from deepthin.torch.export.native.operators import program_of
from deepthin.torch.export.native.source import identifier, sources
from deepthin.torch.export.written import Written

_MARK = "deepthin export"
_OURS = ("main.c", "Makefile")


def write(
    model: nn.Module, example: Sequence[Tensor], path: Path, compact: bool = False, streaming: bool = False
) -> Written:
    """Export a model.

    Args:
        model: A thin or dense network.
        example: Its inputs; their shapes are fixed.
        path: The ``.c`` file; the others are written beside it.
        compact: Not used: integers are stored once.
        streaming: Whether recurrent layers keep their states from one run to the next.

    Returns:
        ``model.c``, ``model.h``, ``main.c``, ``Makefile``, ``dt.c``, ``dt.h``; bytes are those of constants and code.
    """
    program = program_of(model, example, streaming)
    written = [path]
    for name, text in sources(program, identifier(path.stem), path.stem).items():
        (path.parent / name).write_text(text)
        written += [path.parent / name] if name != path.name else []
    for name in ("dt.c", "dt.h"):
        shutil.copyfile(runtime.folder() / name, path.parent / name)
        written.append(path.parent / name)
    constants = bytes_of_constants(program)
    here, device = footprint(path), footprint(path, CORTEX_M4)
    notes = [f"constants {constants:,} bytes; arena {4 * program.arena:,} bytes of RAM"]
    for name, one in (("this machine", here), ("Cortex-M4", device)):
        if one is not None:
            stack = "" if one.stack is None else f", stack {one.stack:,}"
            notes.append(f"{name}: flash {one.flash:,} bytes, {one.flash - constants:,} of them code{stack}")
    return Written(tuple(written), constants if here is None else here.flash, program.forms, tuple(notes))


def check_folder(folder: Path) -> None:
    """Refuse a folder that has files of the same names and another origin.

    Args:
        folder: Where the files will be.

    Raises:
        ExportError: There are such files.
    """
    for name in _OURS:
        if (folder / name).is_file() and _MARK not in (folder / name).read_text(errors="replace")[:300]:
            raise ExportError(f"{folder / name} is not of an export and would be replaced: give a folder of its own.")


def runner(path: Path) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Compile a model for this machine and load it.

    Args:
        path: The ``.c`` file; or a flat file, ``.dtm``.

    Returns:
        A function of the inputs; outputs have no shape but their size.
    """
    if path.suffix == ".dtm":
        return runtime.FlatModel(path.read_bytes())
    header, name = path.with_suffix(".h").read_text(), identifier(path.stem)

    def found(what: str) -> list[int]:
        return [int(number) for number in re.findall(rf"_{what} (\d+)", header)]

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.so"
        flags = [flag for line in _makefile_flags(path) for flag in line.split()]
        source = [path, path.parent / "dt.c"]
        runtime.run([*runtime.compiler(), *runtime.NATIVE, *flags, *source, "-o", made], "Compiling the exported C")
        loaded = ctypes.CDLL(str(made))
    arena = runtime.aligned(max(found("ARENA_BYTES")[0], 16))
    outputs = found(r"OUTPUT\d*_FLOATS")
    getattr(loaded, f"{name}_reset")(ctypes.c_void_p(arena.ctypes.data))

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        given = [runtime.prepared(array) for array in inputs]
        results = [np.empty(count, np.float32) for count in outputs]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*given, *results, arena)]
        getattr(loaded, f"{name}_run")(*pointers)
        return results

    return run


def _makefile_flags(path: Path) -> list[str]:
    return re.findall(r"^USED = (.*)$", (path.parent / "Makefile").read_text(), re.MULTILINE)


def warm_up() -> None:
    """Nothing: there is no runtime to load."""


def write_dense(model: nn.Module, example: Sequence[Tensor], path: Path) -> Written:
    """The dense network for a comparison, as a flat file: as C its text would have hundreds of megabytes.

    Args:
        model: The dense network.
        example: Its inputs.
        path: The file; its suffix becomes ``.dtm``.

    Returns:
        The file.
    """
    path = path.with_suffix(".dtm")
    path.write_bytes(flat_file(program_of(model, example)))
    return Written.of(path)
