"""A model as WebAssembly: the runtime compiled by zig, a flat file, and a page of JavaScript."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.torch.export.native import runtime
from deepthin.torch.export.native.flat import OPERATORS, flat_file
from deepthin.torch.export.native.operators import program_of
from deepthin.torch.export.native.source import used
from deepthin.torch.export.written import Written

_FLAGS = (
    *(
        "-target",
        "wasm32-freestanding",
        "-std=c99",
        "-ffreestanding",
        "-Os",
        "-DDT_SANDBOX",
        "-msimd128",
        "-mbulk-memory",
        "-fno-math-errno",
    ),
    *("-nostdlib", "-Wl,--no-entry", "-Wl,--gc-sections", "-Wl,--strip-all", "-Wl,--export-memory"),
)
_EXPORTS = ("wasm_memory", "wasm_open", "wasm_input", "wasm_output", "wasm_floats", "wasm_reset", "wasm_run")


def write(
    model: nn.Module,
    example: Sequence[Tensor],
    path: Path,
    compact: bool = False,
    streaming: bool = False,
    sources: Sequence[Path] = (),
    exports: Sequence[str] = (),
) -> Written:
    """Export a model.

    Args:
        model: A thin or dense network.
        example: Its inputs; their shapes are fixed.
        path: The ``.wasm`` file: the runtime, with the operators that the model uses.
        compact: Not used: integers are stored once.
        streaming: Whether recurrent layers keep their states from one run to the next.
        sources: C files of the application, compiled into the same module.
        exports: Their functions that JavaScript calls.

    Returns:
        The ``.wasm`` file, the flat file ``.dtm`` and ``.mjs``, which loads both.
    """
    program = program_of(model, example, streaming)
    operators = sum(1 << OPERATORS.index(name) for name in {call.name for call in program.calls})
    compile_runtime(path, sources, exports, [*used(program).split(), f"-DDT_OPERATORS={operators}u"])
    flat, script = path.with_suffix(".dtm"), path.with_suffix(".mjs")
    flat.write_bytes(flat_file(program))
    shutil.copyfile(runtime.folder() / "dt.mjs", script)
    parts = ((path, "code"), (flat, "network"), (script, "JavaScript"))
    sizes = ", ".join(f"{file.stat().st_size:,} bytes of {what}" for file, what in parts)
    return Written.of(path, flat, script, forms=program.forms, notes=(sizes,))


def compile_runtime(
    path: Path, sources: Sequence[Path] = (), exports: Sequence[str] = (), flags: Sequence[str] = ()
) -> None:
    """Compile the runtime for WebAssembly with SIMD.

    Args:
        path: The ``.wasm`` file to write.
        sources: Further C files.
        exports: Further functions that JavaScript calls.
        flags: Further flags of the compiler.

    Raises:
        ConfigError: zig is not installed.
    """
    command = runtime.zig_compiler()
    if command is None:
        raise ConfigError("wasm needs zig's C compiler, which is not installed: pip install ziglang")
    folder = runtime.folder()
    every = [folder / "dt.c", folder / "dt_file.c", folder / "dt_wasm.c", *sources]
    named = [f"-Wl,--export={name}" for name in (*_EXPORTS, *exports)]
    runtime.run([*command, *_FLAGS, *flags, f"-I{folder}", *every, *named, "-o", path], "Compiling for WebAssembly")


def runner(path: Path) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Run a model in node.

    Args:
        path: The ``.wasm`` file; the others lie beside it.

    Returns:
        A function of the inputs; outputs have no shape but their size.

    Raises:
        ConfigError: node is not installed.
    """
    if shutil.which("node") is None:
        raise ConfigError("node checks what is written for wasm, and was not found: install Node.js.")

    return lambda inputs: _in_node(path, inputs)[0]


def measured_by_itself(path: Path, inputs: Sequence[np.ndarray]) -> tuple[float, float]:
    """Memory and time inside node, whose own start would hide them.

    Args:
        path: The ``.wasm`` file.
        inputs: What a run is given.

    Returns:
        Megabytes of WebAssembly's memory, and milliseconds of a run, the median.
    """
    _, megabytes, milliseconds = _in_node(path, inputs, seconds=1.0)
    return megabytes, milliseconds


def _in_node(path: Path, inputs: Sequence[np.ndarray], seconds: float = 0.0) -> tuple[list[np.ndarray], float, float]:
    """Outputs, megabytes, and the median milliseconds of runs for so many seconds, at least one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for at, array in enumerate(inputs):
            runtime.prepared(array).tofile(folder / f"input{at}")
        (folder / "run.mjs").write_text(_RUN)
        command = ["node", folder / "run.mjs", path.resolve(), folder, str(len(inputs)), str(seconds)]
        megabytes, milliseconds = map(float, runtime.run(command, "Running in node").split())
        outputs = sorted(folder.glob("output*"), key=lambda file: int(file.name.removeprefix("output")))
        return [np.fromfile(made, np.float32) for made in outputs], megabytes, milliseconds


_RUN = """
import { readFile, writeFile } from "node:fs/promises";
const [path, folder, count, seconds] = process.argv.slice(2);
const { load } = await import(path.replace(/wasm$/, "mjs"));
const network = await load(await readFile(path), await readFile(path.replace(/wasm$/, "dtm")));
const bytes = await Promise.all([...Array(+count).keys()].map((at) => readFile(`${folder}/input${at}`)));
const inputs = bytes.map((one) => new Float32Array(new Uint8Array(one).buffer));
const times = [], end = performance.now() + 1000 * seconds;
let outputs;
do {
  const begin = performance.now();
  outputs = network.run(...inputs);
  times.push(performance.now() - begin);
} while (performance.now() < end);
await Promise.all(outputs.map((one, at) => writeFile(`${folder}/output${at}`, one)));
console.log(network.c.memory.buffer.byteLength / 1e6, times.sort((a, b) => a - b)[times.length >> 1]);
"""
