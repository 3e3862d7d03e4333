"""The rows of a comparison, for people: tables, pictures of error against size and speed, and a page with both.

The seeds of one method at one size become one point, and everything shown is made of points.
"""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepthin.report import table
from deepthin.storage import inspect, write_atomically

Rows = Sequence[Mapping[str, Any]]
METRICS = {  # name and unit of the metrics that the tasks have; others go by the name they were given
    "error": ("error", "%"),
    "frame_error": ("frame error", "%"),
    "wer": ("WER", "%"),
    "wer_greedy": ("greedy WER", "%"),
    "loss": ("loss", "nats a character"),
}
STYLES = {  # colour and marker (corners, whether a star, angle); seen on white and on black, and with 8 and 4 bits
    "dense": ("#808080", (24, 0, 0)),
    "int8": ("#808080", (4, 0, 45)),
    "deepthin": ("#dd2c2f", (24, 0, 0)),
    "shuffled": ("#e0669a", (4, 0, 45)),
    "rank": ("#2f7fd0", (3, 0, 0)),
    "same-size": ("#2c9c3c", (4, 0, 0)),
    "hashed": ("#9467d0", (3, 0, 180)),
    "pruned": ("#a0764e", (4, 1, 0)),
    "pruned-csr": ("#e07800", (4, 1, 45)),
    "kronecker": ("#0f99a6", (5, 1, 0)),
    "tensor-train": ("#8f8a00", (6, 0, 0)),
    "uniform": ("#7f7f7f", (5, 0, 0)),
    "kmeans": ("#7f7f7f", (3, 0, 0)),
    "ecsq": ("#7f7f7f", (3, 0, 180)),
    "binary": ("#7f7f7f", (4, 0, 0)),
}
UNKNOWN = "#7f7f7f", (24, 0, 0)
DASHES = {"8": (6.0, 3.0), "4": (1.5, 2.5)}  # by the bits that floats are rounded to; others are drawn as with 8
UNCOMPRESSED = "dense", "int8"  # what is no thin network, and stands in a picture as a level line
# Average relative improvement of DeepThin over each rival, per cent: Sotoudeh and Baghsorkhi, 2018, Table 1.
PAPER = {"rank": (60.08, 28.09), "pruned-csr": (56.96, 27.21), "same-size": (23.40, 20.45), "hashed": (6.12, 12.16)}
PAPER_COLUMNS = ("TFKaldi", "acoustic", "wer"), ("DeepSpeech", "ctc", "loss")  # and the task and metric like theirs


@dataclass(frozen=True)
class Spread:
    """What the seeds gave for one metric."""

    mean: float
    low: float
    high: float
    seeds: int

    def text(self, metric: str, plus_minus: str = "+-") -> str:
        """Mean and half the range: two decimals for per cent, else four digits."""
        decimals = 2 if label(metric).endswith("%") else max(0, 3 - math.floor(math.log10(abs(self.mean) or 1)))
        spread = f" {plus_minus}{(self.high - self.low) / 2:.{decimals}f}" if self.seeds > 1 else ""
        return f"{self.mean:.{decimals}f}{spread}"


@dataclass(frozen=True)
class Point:
    """One method at one size. The bytes are those of the first seed's file; None is what was not measured."""

    method: str
    ratio: float  # of the weight matrices, as asked for
    test: Mapping[str, Spread]  # by metric; empty where the size cannot be reached
    file_bytes: int | None
    dense_bytes: int
    weight_bytes: int | None
    microseconds: float | None  # for one item
    dense_microseconds: float | None  # of the dense network in the same run
    smallest_ratio: float | None
    failed: tuple[str, ...] = ()  # why, of seeds that gave nothing

    @property
    def times_faster(self) -> float | None:
        """Than the dense network."""
        return self.dense_microseconds / self.microseconds if self.dense_microseconds and self.microseconds else None

    @property
    def seeds(self) -> int:
        """How many there were."""
        return max((spread.seeds for spread in self.test.values()), default=0)

    @property
    def note(self) -> str:
        """Why there is no value, or that a seed has none."""
        if self.test:
            return f"{len(self.failed)} failed" if self.failed else ""
        if self.failed:
            return f"failed: {self.failed[0]}"
        return "not reachable" + ("" if self.smallest_ratio is None else f": smallest ratio {self.smallest_ratio:.5f}")


def points(rows: Rows) -> list[Point]:
    """Methods in the order of their first appearance, larger ratios first."""
    groups: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(row["method"], {}).setdefault(row["ratio"], []).append(row)
    return [_point(groups[method][ratio]) for method in groups for ratio in sorted(groups[method], reverse=True)]


def _point(group: Rows) -> Point:
    values: dict[str, list[float]] = {}
    for row in group:
        if row["split"] == "test" and row["value"] is not None:
            values.setdefault(row["metric"], []).append(row["value"])
    first = min(group, key=lambda row: (row["bytes"] is None, row["seed"]))
    times = [[row[key] for row in group if row.get(key) is not None] for key in ("microseconds", "dense_microseconds")]
    own, dense = (statistics.median(found) if found else None for found in times)
    return Point(
        first["method"],
        first["ratio"],
        {name: Spread(statistics.mean(found), min(found), max(found), len(found)) for name, found in values.items()},
        first["bytes"],
        first["dense_bytes"],
        first.get("weight_bytes"),
        own,
        dense,
        next((row["smallest_ratio"] for row in group if row.get("smallest_ratio") is not None), None),
        tuple(row["failed"] for row in group if row.get("failed")),
    )


def metrics(rows: Rows) -> list[str]:
    """In the order of their first appearance: the first is the leading one."""
    return list(dict.fromkeys(row["metric"] for row in rows))


def worded(metric: str) -> tuple[str, str]:
    """Name and unit of a metric, for people."""
    return METRICS.get(metric, (metric.replace("_", " "), ""))


def label(metric: str) -> str:
    """For heads and axes: ``frame error, %``."""
    return ", ".join(filter(None, worded(metric)))


def base(method: str) -> tuple[str, str]:
    """A method and the bits that its floats are rounded to: ``deepthin-8bit`` is ("deepthin", "8")."""
    rounded = re.fullmatch(r"(.+)-(\d+)bit", method)
    return (rounded[1], rounded[2]) if rounded else (method, "")


def best_thin(rows: Rows) -> Mapping[str, Any] | None:
    """The row of the best thin file: of the configuration with the lowest mean development value, the best seed.

    Judged by the leading metric; the dense network and int8 are not thin. None if there is nothing to choose from.
    """
    judged: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        thin = row["method"] not in UNCOMPRESSED and row["metric"] == rows[0]["metric"]
        if thin and row["split"] == "dev" and row["value"] is not None:
            judged.setdefault((row["method"], row["ratio"]), []).append(row)
    groups = judged.values()
    best = min(groups, key=lambda group: statistics.mean(row["value"] for row in group), default=[])
    return min(best, key=lambda row: row["value"], default=None)


def summary(rows: Rows) -> str:
    """One line a method and size: bytes, mean test values over the seeds with half their range, and the speed."""
    names, found = metrics(rows), points(rows)
    lines: list[tuple[str, ...]] = []
    for point in found:
        cells = [point.method, f"{point.ratio:g}", "", "", ""]
        if point.weight_bytes is not None:
            cells[2] = f"{point.weight_bytes:,}"
        if point.file_bytes is not None:
            cells[3:] = f"{point.file_bytes:,}", f"{point.file_bytes / point.dense_bytes:.4f}"
        cells += [point.test[name].text(name) if name in point.test else "" for name in names]
        cells.append("" if point.microseconds is None else f"{point.microseconds:,.0f}")
        cells.append("" if point.times_faster is None else f"{point.times_faster:.2f}")
        lines.append((*cells, point.note))
    tests = [f"test {label(name)}" for name in names]
    heads = ("method", "weights ratio", "weight bytes", "file bytes", "of dense", *tests)
    heads += ("microseconds", "times faster", "note")
    kept = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    right = [at for at, i in enumerate(kept) if heads[i] not in ("method", "note", *tests)]
    return table([heads[i] for i in kept], [[line[i] for i in kept] for line in lines], right, total=False)


@dataclass(frozen=True)
class Cut:
    """By how much DeepThin's test value is below a rival's: means over the sizes that both reach."""

    cut: float  # 1 - ours / rival
    closed: float | None  # (rival - ours) / (rival - dense): of the rival's distance from dense; None if it has none
    sizes: int  # of how many it is the mean

    def texts(self) -> tuple[str, str]:
        """Both, in per cent."""
        return f"{100 * self.cut:z.1f}", "" if self.closed is None else f"{100 * self.closed:z.1f}"


def sizes(by: Mapping[str, Cut]) -> str:
    """Of how many sizes the cuts over one rival are means; more than one number where they differ."""
    return "/".join(dict.fromkeys(str(cut.sizes) for cut in by.values()))


def compared(found: Sequence[Point], metric: str) -> dict[str, dict[str, Cut]]:
    """For each rival, for each kind of DeepThin, the cut. The paper's rivals come first, rounded ones last."""
    means = {(p.method, p.ratio): p.test[metric].mean for p in found if metric in p.test}
    dense = next((value for (method, _), value in means.items() if method == "dense"), None)
    methods = [method for method in dict.fromkeys(method for method, _ in means) if method not in UNCOMPRESSED]
    rank = {name: position for position, name in enumerate(PAPER)}
    result: dict[str, dict[str, Cut]] = {}
    for rival in sorted(methods, key=lambda name: (base(name)[1] != "", rank.get(name, len(rank)))):
        for own in (name for name in methods if base(name)[0] == "deepthin" and name != rival):
            pairs = {
                ratio: (means[own, ratio], value)
                for (method, ratio), value in means.items()
                if method == rival and (own, ratio) in means and value > 0
            }
            if pairs:
                cut = statistics.mean(1 - ours / theirs for ours, theirs in pairs.values())
                gaps = [(r - ours) / (r - dense) for ours, r in pairs.values() if dense is not None and r > dense]
                closed = statistics.mean(gaps) if gaps else None
                result.setdefault(rival, {})[own] = Cut(cut, closed, len(pairs))
    return result


def cuts(rows: Rows) -> str:
    """For every metric a table: how far DeepThin is below each rival, in per cent, beside the paper's figures.

    Empty where there is no DeepThin, or no rival.
    """
    told: list[str] = []
    for metric in metrics(rows):
        if not (found := compared(points(rows), metric)):
            continue
        ours = list(dict.fromkeys(own for by in found.values() for own in by))
        lines: list[tuple[str, ...]] = []
        for rival, by in found.items():
            cells = [text for own in ours for text in (by[own].texts() if own in by else ("", ""))]
            paper = [f"{value:.1f}" for value in PAPER.get(rival, ())] or [""] * len(PAPER_COLUMNS)
            lines.append((rival, *cells, sizes(by), *paper))
        heads = ("over", *(head for own in ours for head in (own, "gap")), "sizes")
        heads += tuple(f"paper: {name} {worded(like)[0]}" for name, _, like in PAPER_COLUMNS)
        about = (
            f"Cut of test {worded(metric)[0]} over each rival, %, and how much of the rival's gap to dense it closes, %"
        )
        told.append(f"{about}\n{table(heads, lines, range(1, len(heads)), total=False)}")
    return "\n\n".join(told)


def draw(rows: Rows, out: Path) -> list[Path]:
    """``TASK.png``: the leading metric against the bytes of the file; ``TASK-METRIC.png`` for each further one.

    ``TASK-latency.png``, if speed was measured: the leading metric against the time for one item. Axes are logarithmic,
    bars go from seed to seed, and what is rounded is dashed.
    """
    names, found = metrics(rows), points(rows)
    task = _file_name(rows[0]["task"])
    pictures = {f"{task}{'' if i == 0 else '-' + _file_name(name)}.png": (name, False) for i, name in enumerate(names)}
    if any(point.test and point.microseconds for point in found):
        pictures[f"{task}-latency.png"] = names[0], True
    for file, (metric, latency) in pictures.items():
        _draw(found, metric, latency, rows[0]["task"], out / file)
    return [out / file for file in pictures]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)


def _draw(found: Sequence[Point], metric: str, latency: bool, task: str, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    curves: dict[str, list[tuple[float, Spread]]] = {}
    for point in found:
        across = point.microseconds if latency else point.file_bytes and point.file_bytes / 1000
        if across and metric in point.test:
            curves.setdefault(point.method, []).append((across, point.test[metric]))
    figure = Figure(figsize=(9.5, max(5.4, 0.25 * len(curves) + 2)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for method, curve in curves.items():
        name, bits = base(method)
        colour, marker = STYLES.get(name, UNKNOWN)
        across, spreads = zip(*sorted(curve, key=lambda at: at[0]), strict=True)
        means = [spread.mean for spread in spreads]
        if method in UNCOMPRESSED and not latency:
            line = axes.axhline(means[0], color=colour, linestyle="-" if method == "dense" else "-.", linewidth=1)
            line.set_label(f"{method} ({across[0]:,.0f} kB)")
            continue
        bars = [[s.mean - s.low for s in spreads], [s.high - s.mean for s in spreads]]
        dashes = (0, DASHES.get(bits, DASHES["8"])) if bits else "-"
        look: dict[str, Any] = {"marker": marker, "markersize": 6, "markerfacecolor": "white" if bits else colour}
        axes.plot(across, means, color=colour, linestyle=dashes, linewidth=1.4, label=method, **look)
        axes.errorbar(across, means, yerr=bars, fmt="none", color=colour, capsize=2.5, elinewidth=1)
    positive = all(low > 0 for low in (spread.low for curve in curves.values() for _, spread in curve))
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis, logarithmic in ((axes.xaxis, True), (axes.yaxis, positive)):
        if logarithmic:
            axes.set(**{f"{axis.axis_name}scale": "log"})
            low, high = axis.get_view_interval()
            steps = (1, 2, 5) if high / low > 12 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
            narrow = high / low < 2.5
            axis.set_major_locator(
                MaxNLocator(8, steps=[1, 2, 5, 10]) if narrow else LogLocator(subs=steps, numticks=40)
            )
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(plain)
    axes.set_xlabel("microseconds for one item" if latency else "bytes of the written file, thousands")
    axes.set_ylabel(f"test {label(metric)}")
    axes.set_title(f"{task}: {worded(metric)[0]} against {'latency' if latency else 'size'}", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, handlelength=3.2)
    figure.savefig(path)


def write_page(rows: Rows, out: Path, command: str) -> Path:
    """``report.html``, which needs no other file, and the same pictures as PNG beside it."""
    from deepthin.page import render

    draw(rows, out)
    run = json.loads((out / "run.json").read_text())
    plans = {
        (row["method"], row["ratio"]): str(inspect(out / row["model"]))
        for row in rows
        if row["seed"] == 0 and row["value"] is not None and row.get("model")
    }
    path = out / "report.html"
    write_atomically(path, render(rows, run, plans, command).encode())
    return path
