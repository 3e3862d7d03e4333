"""Memory and time of exported files, in a process of its own: `python -m deepthin.torch.export.measure`."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepthin.torch.export.targets import TARGETS

_SECONDS = 1.0  # of a measurement of time
_RUNS = 1000


def measured(target: str, paths: Sequence[Path], inputs: Sequence[np.ndarray], folder: Path) -> list[dict[str, float]]:
    """Memory and time of files, on one thread.

    Args:
        target: A name in ``TARGETS``.
        paths: The files; their runs take turns.
        inputs: What a run is given.
        folder: An existing folder for the inputs.

    Returns:
        For each file ``megabytes``, the memory of the process after loading and running it over that before, and
        ``milliseconds``, the median of a run.

    Raises:
        RuntimeError: A runtime failed; the message is its last line.
    """
    np.savez(given := folder / "inputs.npz", *inputs)
    own = getattr(TARGETS[target].module(), "measured_by_itself", None)
    if own is not None:
        each = [own(path, inputs) for path in paths]
        return [{"megabytes": memory, "milliseconds": time_} for memory, time_ in each]
    apart = [_child([target, str(given), "memory", str(path)]) for path in paths]
    together = _child([target, str(given), "time", *map(str, paths)])
    return [{"megabytes": memory[0], "milliseconds": time_} for memory, time_ in zip(apart, together, strict=True)]


def _child(arguments: list[str]) -> list[float]:
    made = subprocess.run(
        [sys.executable, "-m", "deepthin.torch.export.measure", *arguments], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise RuntimeError((made.stderr.strip().splitlines() or [f"exit code {made.returncode}"])[-1])
    return json.loads(made.stdout.strip().splitlines()[-1])


def _resident() -> float:
    """Megabytes of this process in main memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main(target: str, given: str, what: str, *paths: str) -> None:
    """Print a JSON list of one number for each file."""
    with np.load(given) as stored:
        inputs = [stored[name] for name in stored.files]
    chosen = TARGETS[target].module()
    if what == "memory":
        chosen.warm_up()
        before = _resident()
        run = chosen.runner(Path(paths[0]))
        run(inputs)
        print(json.dumps([_resident() - before]))
        return
    runs = [chosen.runner(Path(path)) for path in paths]
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + _SECONDS * len(runs)
    while not times[0] or (time.perf_counter() < end and len(times[0]) < _RUNS):
        for run, taken in zip(runs, times, strict=True):
            begun = time.perf_counter()
            run(inputs)
            taken.append(1000 * (time.perf_counter() - begun))
    print(json.dumps([float(np.median(taken)) for taken in times]))


if __name__ == "__main__":
    main(*sys.argv[1:])
