"""What a network is worth: raw pitch accuracy, bytes, microseconds; as a table and as a picture.

Raw pitch accuracy is the part of voiced frames whose pitch is within 50 cents (a quarter tone) of the true one.
"""

import ctypes
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from crepe import BINS, WINDOW, cents, normalised, pitch_of
from material import KINDS, LEVELS, Frames, frames, mixed
from numpy.typing import NDArray
from teacher import outputs
from torch import nn

JUDGED = ("tones", "speech")  # what has timbres or voices of its own in each set
Accuracy = dict[str, list[float]]  # kind -> percent at each of LEVELS


@dataclass
class Row:
    """A network in the table."""

    name: str
    bytes: int
    accuracy: Accuracy
    microseconds: dict[str, float] = field(default_factory=dict)  # runtime -> median CPU time of a run with one frame

    def average(self) -> float:
        """Of all kinds and levels, in percent."""
        return statistics.mean(statistics.mean(values) for values in self.accuracy.values())


class Judge:
    """The judged frames of a set: the same ones at each level of noise.

    Args:
        name: ``"dev"`` or ``"test"``.
        counts: Number of frames of each kind.
    """

    def __init__(self, name: str, counts: dict[str, int]) -> None:
        self.clean: Frames = frames(name, counts)
        self.truth: NDArray[np.floating] = cents(self.clean.hertz)
        self.sounds = [self.clean.sound if level is None else mixed(self.clean, level, name) for level in LEVELS]

    def accuracy(self, model: nn.Module) -> Accuracy:
        """Raw pitch accuracy.

        Args:
            model: Items x 1 x WINDOW -> items x BINS, without a sigmoid; in evaluation mode.

        Returns:
            Kind -> percent at each of LEVELS.
        """
        near = [abs(pitch_of(outputs(model, sound)) - self.truth) <= 50 for sound in self.sounds]
        return {
            kind: [100 * float(row[self.clean.kind == KINDS.index(kind)].mean()) for row in near] for kind in JUDGED
        }


def torch_microseconds(model: nn.Module, runs: int = 200) -> float:
    """Median CPU time of a frame in torch, by itself (a batch of one), on one thread."""
    frame = normalised(torch.randn(1, WINDOW))[:, None]
    with torch.inference_mode():
        return _median(lambda: model(frame), runs)


def onnx_microseconds(path: Path, runs: int = 200) -> float:
    """Median CPU time of a frame in ONNX Runtime, by itself, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: np.random.default_rng(0).normal(size=(1, 1, WINDOW)).astype(np.float32)}
    return _median(lambda: session.run(None, given), runs)


def c_microseconds(source: Path, runs: int = 200) -> float:
    """Median CPU time of a frame in the C program of ``dt.export``.

    Args:
        source: The ``.c`` file, with its header and the runtime beside it.
        runs: Number of runs.

    Returns:
        Microseconds.
    """
    library = source.with_suffix(".so")
    flags = ["-std=c99", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
    sources = [str(source), str(source.with_name("dt.c"))]
    subprocess.run(["cc", *flags, "-o", str(library), *sources, "-lm"], check=True)
    run = getattr(ctypes.CDLL(str(library.resolve())), f"{source.stem}_run")
    arena_bytes = int(re.findall(r"_ARENA_BYTES (\d+)", source.with_suffix(".h").read_text())[0])
    arena = np.zeros(arena_bytes // 8 + 8)
    aligned = arena[-(arena.ctypes.data // 8) % 8 :]  # 64 bytes
    arrays = [np.random.default_rng(0).normal(size=WINDOW).astype(np.float32), np.zeros(BINS, np.float32), aligned]
    given = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    return _median(lambda: run(*given), runs)


def _median(run: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs + runs // 10):
        begun = time.process_time()
        run()
        times.append(1e6 * (time.process_time() - begun))
    return statistics.median(times[runs // 10 :])


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown.

    Args:
        rows: One for each network.

    Returns:
        A table: bytes, accuracy in percent by kind and signal-to-noise ratio, microseconds of CPU time a frame.
    """
    runtimes = list(dict.fromkeys(runtime for row in rows for runtime in row.microseconds))
    levels = ["clean" if level is None else f"{level} dB" for level in LEVELS]
    heads = ["network", "bytes", *(f"{kind}, {level}" for kind in JUDGED for level in levels), "average"]
    lines = [heads + [f"µs, {runtime}" for runtime in runtimes]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        accuracies = [f"{value:.1f}" for kind in JUDGED for value in row.accuracy[kind]]
        times = [f"{row.microseconds[r]:,.0f}" if r in row.microseconds else "" for r in runtimes]
        lines.append([row.name, f"{row.bytes:,}", *accuracies, f"{row.average():.1f}", *times])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def picture(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against bytes.

    Args:
        rows: One for each network.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        given = row.name.startswith("CREPE")
        axes.plot(row.bytes, row.average(), "s" if given else "o", color="tab:gray" if given else "tab:blue")
        axes.annotate(
            row.name, (row.bytes, row.average()), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set(xscale="log", xlabel="bytes of the file", ylabel="raw pitch accuracy, test, %")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
