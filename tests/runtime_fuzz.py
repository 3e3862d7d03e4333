"""Fuzzes the reader of flat files under sanitizers: ``python tests/runtime_fuzz.py --files 1000000 --seed 0``.

runtime/fuzz.c changes the files of runtime_seeds.py and runs those that dt_open accepts, without vectors and with
those of this processor. What ends its process is written to ``--findings``; files in tests/corpus-runtime are tests
for ever.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import runtime_seeds
from deepthin.torch.export.native.runtime import compiler

RUNTIME = Path(__file__).parents[1] / "runtime"  # fuzz.c is not installed
CORPUS = Path(__file__).parent / "corpus-runtime"
FLAGS = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-g", "-O1")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LANES = {"without vectors": ("-DDT_LANES=1",), "with vectors": ()}


def compiled(target, flags=(), source=None):
    """Compile the fuzzer.

    Args:
        target: The program's path.
        flags: Further flags.
        source: A folder of the runtime's sources; None: the runtime's own.

    Returns:
        What the compiler says, nothing if it succeeds.
    """
    source = source or RUNTIME
    command = [*compiler(), *FLAGS, *SANITIZERS, *flags, source / "fuzz.c", source / "dt.c", "-o", target, "-lm"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def fuzzed(program, files, seed, findings, seeds, symbols=True):
    """Run the fuzzer.

    Args:
        program: Its path.
        files: Changed files; 0: the given ones as they are.
        seed: Of the changes.
        findings: Folder of what it finds.
        seeds: Valid files.
        symbols: Whether reports name functions and lines, which takes seconds for each.

    Returns:
        The finished process, with its output.
    """
    command = [program, str(files), str(seed), findings, *seeds]
    quick = {"ASAN_OPTIONS": "symbolize=0", "UBSAN_OPTIONS": "symbolize=0"} if not symbols else {}
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **quick})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("runs/runtime-fuzz"))
    given = parser.parse_args()
    given.findings.mkdir(parents=True, exist_ok=True)
    status = 0
    with tempfile.TemporaryDirectory() as name:
        seeds = runtime_seeds.write(Path(name))
        for lanes, flags in LANES.items():
            program = Path(name) / "fuzz"
            if errors := compiled(program, flags):
                sys.exit(f"The fuzzer does not compile with the sanitizers: {errors}")
            made = fuzzed(program, given.files, given.seed, given.findings, seeds)
            print(f"{lanes}: {made.stderr}{made.stdout}", end="", flush=True)
            status |= made.returncode
    sys.exit(status)


if __name__ == "__main__":
    main()
