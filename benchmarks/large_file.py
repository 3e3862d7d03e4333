"""A file of 5 GiB written, read and inspected, each in a process that may not allocate more than 1 GiB (RLIMIT_AS).

    python benchmarks/large_file.py

The file holds one thin matrix and 20 dense tensors of 256 MiB, whose values are computed while they are written. Linux.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import deepthin
from deepthin.methods import METHODS
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.read import read
from deepthin.storage.write import write

LIMIT = 1 << 30
TENSORS, NUMBERS = 20, 1 << 26


def contents() -> Contents:
    """The model."""
    plan = METHODS["deepthin"].fit((4096, 4096), 1 << 20)
    code = {entry: Raw.of(array) for entry, array in plan.init(np.random.default_rng(0), 0.02).items()}
    thin = {"thin.weight": Thin("deepthin", plan, {"thin.weight": Part((4096, 4096))}, code)}

    def numbers() -> Iterator[bytes]:
        for first in range(0, NUMBERS, 1 << 20):
            yield np.sin(np.arange(first, first + (1 << 20), dtype=np.float32)).tobytes()

    return Contents(thin, {f"dense.{k}": Raw("F32", (NUMBERS // 8192, 8192), numbers) for k in range(TENSORS)})


def step(name: str, path: Path) -> dict[str, float]:
    """One step, in this process, below the limit.

    Args:
        name: ``write``, ``read`` or ``inspect``.
        path: The file.

    Returns:
        Seconds, and the peak of resident memory in bytes.
    """
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    start = time.perf_counter()
    if name == "write":
        write(contents(), path)
    elif name == "read":
        found = read(path, decoded=False)
        assert sum(raw.checksum() > 0 for raw in found.dense.values()) == TENSORS
    else:
        assert deepthin.inspect(path).total_bytes == path.stat().st_size
    return {
        "seconds": time.perf_counter() - start,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main() -> None:
    """Run each step in a process of its own, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the file is written (default: a temporary folder)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--step", choices=("write", "read", "inspect"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.step, args.folder / "large.thin")))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = {
            name: json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--step", name, "--folder", folder],
                    capture_output=True, text=True, check=True,
                ).stdout
            )
            for name in ("write", "read", "inspect")
        }  # fmt: skip
        size = (Path(folder) / "large.thin").stat().st_size
    if args.json:
        print(json.dumps({"bytes": size, "peak_bytes": {name: row["peak"] for name, row in figures.items()}}))
        return
    print(f"file: {size / 2**30:.2f} GiB; each process may allocate {LIMIT / 2**30:.0f} GiB")
    for name, row in figures.items():
        print(f"{name:8} {row['seconds']:6.1f} s   peak {row['peak'] / 2**20:6.0f} MiB")


if __name__ == "__main__":
    main()
