"""The table and the chart of a benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepthin.lab.bench.rows import BenchRow
from deepthin.storage.report import table

PAPER_RATIOS = (0.0195, 0.0129, 0.0099, 0.0057, 0.0040, 0.0027, 0.0020, 0.0014)
# Table 2: times faster than the uncompressed network on three machines, by the size of their last cache
PAPER = {
    "tfkaldi": {
        "paper, 6 MB cache": (3.80, 5.64, 6.47, 8.12, 8.53, 8.22, 7.43, 4.44),
        "paper, 25 MB cache": (2.51, 3.16, 3.88, 4.21, 5.69, 5.22, 4.56, 4.12),
        "paper, 45 MB cache": (2.46, 3.51, 4.09, 4.84, 5.32, 5.42, 4.58, 2.44),
    },
    "deepspeech": {
        "paper, 6 MB cache": (7.66, 10.66, 12.12, 13.69, 13.72, 13.04, 11.68, 8.72),
        "paper, 25 MB cache": (2.24, 3.09, 3.50, 3.89, 3.86, 3.65, 3.36, 2.57),
        "paper, 45 MB cache": (2.08, 2.77, 3.09, 3.67, 3.70, 3.46, 3.22, 2.42),
    },
}
COLUMNS = {  # what is timed, and the name of its column
    "operator": "microseconds",
    "thin": "layer_microseconds",
    "dense": "dense_microseconds",
    "packed": "packed_microseconds",
    "int8": "int8_microseconds",
    "rank": "rank_microseconds",
    "csr": "csr_microseconds",
    "uniform": "uniform_8bit_microseconds",
    "kmeans": "kmeans_4bit_microseconds",
    "cached": "cached_microseconds",
    "decoded": "decoded_microseconds",
    "bf16": "bf16_microseconds",
    "torchao": "torchao_int8_microseconds",
    "thin_8bit": "thin_8bit_microseconds",
    "thin_coded": "thin_coded_microseconds",
    "kronecker": "kronecker_microseconds",
    "tensor-train": "tensor_train_microseconds",
    "xla": "xla_microseconds",
    "function": "function_microseconds",
    "generated": "generated_microseconds",
}


def summary(rows: Sequence[BenchRow]) -> str:
    """A table of how many times faster DeepThin is than each competitor.

    Args:
        rows: The rows of one run, at least one.

    Returns:
        Title and table as plain text.
    """
    lines: list[tuple[str, ...]] = []
    rivals = ("dense", "best_dense", "decoded", "bf16", "int8", "torchao_int8", "rank", "csr", "uniform_8bit")
    rivals += ("kmeans_4bit", "generated", "function")
    besides = ("thin_8bit", "thin_coded", "kronecker", "tensor-train")
    besides = [name for name in besides if any(row.times.get(COLUMNS[name]) for row in rows)]
    shown = [rival for rival in rivals if any(row.times.get(f"{rival}_microseconds") for row in rows)]
    cold = any(row.times.get("cold_microseconds") for row in rows)
    for row in rows:
        start = (str(row.rank), str(row.batch), f"{row.ratio:g}")
        if (thin := row.microseconds) is None:
            lines.append(
                (
                    *start,
                    "",
                    f"smallest ratio {row.smallest_ratio:.5f}",
                    *[""] * (len(besides) + len(shown) + cold + 1),
                )
            )
            continue
        line = [*start, str(row.n), f"{thin:,.1f}", f"{row.times['layer_microseconds']:,.1f}"]
        line += [f"{time:,.1f}" if (time := row.times.get(COLUMNS[name])) else "" for name in besides]
        line += [_times(row.times.get(f"{rival}_microseconds"), thin) for rival in shown]
        if cold:
            line.append(_times(row.times.get("cold_best_dense_microseconds"), row.times.get("cold_microseconds")))
        lines.append(tuple(line))
    first = rows[0]
    heads = ["rank", "batch", "ratio", "n", "us", "as module"]
    heads += [f"{name.removeprefix('thin_')}, us" for name in besides]
    heads += [rival.replace("_", " ") for rival in shown]
    title = (
        f"{first.case} {first.rows}x{first.cols}, threads {first.threads}, "
        f"instruction set {first.isa}. Times faster than:"
    )
    heads += ["best dense, cold"] if cold else []
    return title + "\n" + table(tuple(heads), lines, right=tuple(range(len(heads))), total=False)


def _times(other: float | None, thin: float | None) -> str:
    return f"{other / thin:.1f}x" if other and thin else ""


def draw(rows: Sequence[BenchRow], path: Path) -> Path:
    """Draw how many times faster DeepThin is than torch's dense layers, against the ratio.

    Bars of ``tfkaldi`` and ``deepspeech`` stand beside the figures of Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944,
    Table 2.

    Args:
        rows: The rows of one run, at least one with times.
        path: The picture to write; the ending chooses the format.

    Returns:
        ``path``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    case, reds = rows[0].case, ("#fcae91", "#fb6a4a", "#cb181d", "#67000d")
    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=150)
    series: list[tuple[str, Any, dict[float, float]]] = []
    if case in PAPER:
        for (label, values), grey in zip(PAPER[case].items(), ("#d9d9d9", "#bdbdbd", "#969696"), strict=True):
            series.append((label, grey, dict(zip(PAPER_RATIOS, values, strict=True))))
    ranks = list(dict.fromkeys(row.rank for row in rows))
    kinds = list(dict.fromkeys((row.rank, row.batch) for row in rows))
    colours = reds if len(kinds) <= len(reds) else pyplot.get_cmap("viridis")(np.linspace(0, 1, len(kinds)))
    for number, (rank, batch) in enumerate(kinds):
        reached = [
            (row.ratio, row.times.get("dense_microseconds"), row.microseconds)
            for row in rows
            if (row.rank, row.batch) == (rank, batch)
        ]
        faster = {ratio: dense / thin for ratio, dense, thin in reached if dense and thin}
        label = f"batch {batch}" if len(ranks) == 1 else f"rank {rank}, batch {batch}"
        series.append((label, colours[number], faster))
    ratios = sorted({row.ratio for row in rows}, reverse=True)
    width = 0.8 / len(series)
    for number, (label, colour, values) in enumerate(series):
        at = [place + (number - (len(series) - 1) / 2) * width for place in range(len(ratios))]
        axes.bar(at, [values.get(ratio, 0.0) for ratio in ratios], width, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_ylim(1, 4 * max(value for _, _, values in series for value in values.values()))  # room for the legend
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("size of the weights over dense")
    axes.set_ylabel(
        "times faster than the dense layer"
        if case in ("linear", "modules", "train", "tensorflow")
        else "times faster than the dense network"
    )
    threads = rows[0].threads
    cores = "one thread" if threads == 1 else f"{threads} threads"
    title = "rank" if len(ranks) == 1 else "ranks"
    axes.set_title(f"{case}, {title} {', '.join(map(str, ranks))}, {cores}, {rows[0].isa}", fontsize=10)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return path
