"""Words at equal bytes: a small BC-ResNet, or a large network that is thin? The table of docs/results.md.

    python benchmarks/keywords.py --data wakewords=DIR --data an4=DIR --out DIR [--seeds 3] [--networks cnn] [--table]

Runs a comparison (``deepthin compare keywords``) for each data set and network into a folder of its own: seed 0 of all,
then seed 1, and so on. The same command resumes an interrupted run; runs of different ``--networks`` may go on at the
same time. All files of a column have the same size, apart from the running statistics of batch normalisation, four
bytes each, which a deployed network does not have: they are part of the scales and shifts before them. ``--table``
times all networks of a data set in turn, and prints the tables.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from deepthin.lab.compare import Settings, compare
from deepthin.lab.compared import SAME_SIZE, is_coded
from deepthin.lab.rows import Row, read_rows
from deepthin.lab.trial import DENSE, Run, Setup, prepared

SIZES = (36_928, 18_340, 9_232, 4_616)  # 9,232 and 4,585 floats, as the two smallest published; 9,232 bytes, and half
CODED = ("dense-coded", "deepthin-coded", "kronecker-coded", "hashed-coded", "pruned-coded")
ALL = {SAME_SIZE: SIZES, **dict.fromkeys(CODED, SIZES)}
NETWORKS = {
    "cnn": ALL,
    "bc-resnet": {SAME_SIZE: SIZES[1:], "dense-coded": SIZES[2:]},  # dense, it has the first size
    "gru": ALL,
    "ds-cnn-m": ALL,
}
STEPS = {"an4": 800, "wakewords": 400}
ROUNDS = 31


def statistics_bytes(model: nn.Module) -> int:
    """Bytes of the running statistics.

    Args:
        model: The dense network.

    Returns:
        Four for each number.
    """
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def ratio_of(run: Run, method: str, size: int) -> float:
    """The ratio of a trial whose file takes some bytes, apart from running statistics.

    Args:
        run: The task with its data and network.
        method: ``same-size`` or a coded method.
        size: Bytes.

    Returns:
        Of a coded method, the ratio of the file; of ``same-size``, that of the matrices of the widest network whose
        parameters take at most ``size``.
    """
    if is_coded(method):
        return round((size + statistics_bytes(run.build(run.width))) / run.dense_bytes(), 6)

    def numbers(width: int, dims: int) -> int:
        with torch.device("meta"):
            return sum(4 * p.numel() for p in run.build(width).parameters() if p.dim() >= dims)

    low, high = 1, run.width + 1  # the answer is at least low and below high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if numbers(middle, 0) <= size else (low, middle)
    return round((numbers(low, 2) + 2) / run.weight_bytes(), 6)


def train(setup: Setup, seeds: int, out: Path) -> None:
    """Run what is missing of a comparison.

    Args:
        setup: The data and the network.
        seeds: Number of seeds.
        out: The folder of the comparison.
    """
    run, sizes = prepared(setup), NETWORKS[str(setup.network)]
    for methods in ((SAME_SIZE,), tuple(method for method in CODED if method in sizes)):
        ratios = tuple(ratio_of(run, methods[0], size) for size in sizes[methods[0]])
        compare(Settings(setup, methods, ratios, seeds), out)
        print(f"{time.strftime('%H:%M:%S')} {out.name}: {seeds} seeds of {', '.join(methods)}", flush=True)


def timed(runs: dict[str, Run], out: Path, data: str) -> dict[tuple[str, str, float], float]:
    """CPU time for a single word: medians of one interleaved run of all networks of a data set, on one thread.

    Args:
        runs: Network -> its run.
        out: The folder of all comparisons.
        data: Name of the data set.

    Returns:
        (network, method, ratio) -> microseconds.
    """
    models: dict[tuple[str, str, float], nn.Module] = {}
    for network, run in runs.items():
        folder = out / f"{data}-{network}"
        for row in read_rows(folder / "results.json"):
            if row.model and row.seed == 0 and row.split == "test":
                models[network, row.method, row.ratio] = run.load(folder / row.model, row.method, row.ratio)
    example = next(iter(runs.values())).task.example(next(iter(runs.values())).data)
    times: dict[tuple[str, str, float], list[int]] = {key: [] for key in models}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for key, model in models.items():
                model(*example)
                start = time.thread_time_ns()  # other jobs of the machine do not count
                model(*example)
                times[key].append(time.thread_time_ns() - start)
    return {key: statistics.median(values) / 1000 for key, values in times.items()}


def cell(rows: list[Row], microseconds: float | None) -> str:
    """Test error, its spread and the time of a method at a size.

    Args:
        rows: A row for each seed, of the test split.
        microseconds: The time of seed 0.

    Returns:
        ``5.2 ± 0.3, 410 µs``; why there is none, otherwise.
    """
    values = [row.value for row in rows if row.value is not None]
    if not values:
        return "cannot be reached" if rows and rows[0].smallest_ratio else "failed" if rows else "not run"
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" + (f", {microseconds:,.0f} µs" if microseconds else "")


def tables(data: str, folder: Path, out: Path) -> None:
    """Print the table of a data set.

    Args:
        data: Its name.
        folder: Where it is.
        out: The folder of all comparisons.
    """
    networks = [network for network in NETWORKS if (out / f"{data}-{network}" / "results.json").exists()]
    runs = {network: Run.prepare(Setup("keywords", folder, STEPS[data], network=network)) for network in networks}
    times = timed(runs, out, data)
    lines: list[list[str]] = []
    for network, run in runs.items():
        rows = [row for row in read_rows(out / f"{data}-{network}" / "results.json") if row.split == "test"]
        dense = [row for row in rows if row.method == DENSE]
        numbers = run.dense_bytes() // 4
        print(f"{network}: {numbers:,} parameters, dense {cell(dense, times.get((network, DENSE, 1.0)))}")
        for method, sizes in NETWORKS[network].items():
            found = {}
            for size in sizes:
                ratio = ratio_of(run, method, size)
                some = [row for row in rows if (row.method, row.ratio) == (method, ratio)]
                found[size] = cell(some, times.get((network, method, ratio)))
            lines.append([network, method, *(found.get(size, "") for size in SIZES)])
    heads = ["network", "method", *(f"{size:,}" for size in SIZES)]
    for line in (heads, ["---"] * len(heads), *lines):
        print("|", " | ".join(line), "|")


def main() -> None:
    """Train what is missing, or print the tables of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=DIR", help=f"NAME: {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/keywords"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="which to train, comma-separated")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders = {name: Path(folder).absolute() for name, folder in (one.split("=", 1) for one in options.data)}
    if options.table:
        for name, folder in folders.items():
            print(f"\n{name}")
            tables(name, folder, options.out)
        return
    for seeds in range(1, options.seeds + 1):
        for network in options.networks.split(","):
            for name, folder in folders.items():
                setup = Setup("keywords", folder, STEPS[name], network=network)
                train(setup, seeds, options.out / f"{name}-{network}")


if __name__ == "__main__":
    main()
