"""What compiled C takes: flash by a linker that drops what is not called, and the deepest stack by gcc's call graph."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deepthin.torch.export.native.source import identifier

CORTEX_M4 = (
    "arm-none-eabi-gcc",
    *("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16", "--specs=nosys.specs", "-nostartfiles"),
)
_COMMON = (
    *("-std=c99", "-O2", "-fno-math-errno", "-fno-asynchronous-unwind-tables"),
    *("-ffunction-sections", "-fdata-sections", "-fcallgraph-info=su"),
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes on one kind of machine.

    Attributes:
        flash: Bytes of code and constants.
        stack: Bytes of the deepest chain of calls; None if the compiler does not tell.
    """

    flash: int
    stack: int | None


def footprint(path: Path, compiler: tuple[str, ...] | None = None) -> Footprint | None:
    """Compile a model and measure it.

    Args:
        path: The ``.c`` file of an export.
        compiler: A gcc with flags of the target; None: this machine's.

    Returns:
        What it takes; None where the compiler is missing, or is no gcc.
    """
    command = compiler or ("gcc",)
    if shutil.which(command[0]) is None:
        return None
    path, name = path.resolve(), identifier(path.stem)  # the compiler runs elsewhere
    used = re.findall(r"^USED = (.*)$", (path.parent / "Makefile").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in (path, path.parent / "dt.c"):
            made = Path(folder) / f"{source.stem}.o"
            given = [*command, *_COMMON, *used[0].split(), "-c", str(source), "-o", str(made)]
            if subprocess.run(given, capture_output=True, check=False, cwd=folder).returncode:
                return None
            objects.append(str(made))
        whole = str(Path(folder) / "whole")
        kept = [f"-Wl,-u,{name}_run", f"-Wl,-u,{name}_reset", f"-Wl,-e,{name}_run"]
        link = [*command, "-Wl,--gc-sections", *kept, *objects, "-o", whole]
        link += [] if compiler else ["-nostdlib", "-static", "-Wl,--unresolved-symbols=ignore-all"]
        if subprocess.run(link, capture_output=True, check=False).returncode:
            return None
        sizes = command[0].replace("gcc", "size") if compiler else "size"
        printed = (
            subprocess.run([sizes, whole], capture_output=True, text=True, check=True).stdout.splitlines()[1].split()
        )
        graphs = [graph.read_text() for graph in Path(folder).glob("*.ci")]
        return Footprint(int(printed[0]) + int(printed[1]), _deepest("\n".join(graphs), f"{name}_run"))


def _deepest(graph: str, start: str) -> int | None:
    """Bytes of stack of the deepest chain of calls from a function on."""
    own = {
        title: int(count)
        for title, count in re.findall(
            r'node: \{ title: "([^"]+)" label: "[^"]*?(\d+) bytes \((?:static|dynamic,bounded)\)', graph
        )
    }
    calls: dict[str, set[str]] = {}
    for source, target in re.findall(r'edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)"', graph):
        calls.setdefault(source, set()).add(target)
    if start not in own or "(dynamic)" in graph:
        return None

    def depth(name: str) -> int:
        return own.get(name, 0) + max((depth(one) for one in calls.get(name, ())), default=0)

    return depth(start)
