"""The rows of a comparison, for people: a table, a picture of error against size, and a page with both."""

import html
import json
import platform
import statistics
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deepthin.report import Report, table
from deepthin.storage import inspect, write_atomically

Rows = Sequence[Mapping[str, Any]]
_STYLES = {  # colour and marker of a method; those with rounded floats have its colour and broken lines
    "dense": ("#444444", ""),
    "deepthin": ("#d62728", "o"),
    "shuffled": ("#ff9896", "s"),
    "rank": ("#1f77b4", "^"),
    "same-size": ("#2ca02c", "D"),
    "hashed": ("#9467bd", "v"),
    "pruned": ("#8c564b", "P"),
    "kronecker": ("#17becf", "X"),
    "tensor-train": ("#bcbd22", "*"),
    "uniform": ("#7f7f7f", "h"),
}
# Average relative improvement of DeepThin over each rival, per cent: Sotoudeh and Baghsorkhi, 2018, Table 1; test word
# error rate of TFKaldi, test loss of DeepSpeech.
PAPER = {"rank": (60.08, 28.09), "pruned": (56.96, 27.21), "same-size": (23.40, 20.45), "hashed": (6.12, 12.16)}


def summary(rows: Rows) -> str:
    """One line for each method and size: mean test value over the seeds, its spread, and the bytes of the file."""
    metric = rows[0]["metric"].replace("_", " ")
    lines: list[tuple[str, ...]] = []
    for (method, ratio), group in _groups(rows).items():
        values = _values(group)
        if not values:
            smallest = group[0].get("smallest_ratio")
            lines.append((method, f"{ratio:g}", "", "", f"not reachable: smallest ratio {smallest:.5f}"))
            continue
        sizes = [row["bytes"] for row in group if row["split"] == "test"]
        spread = f"+-{(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        share = sizes[0] / group[0]["dense_bytes"]
        lines.append((method, f"{ratio:g}", f"{sizes[0]:,}", f"{share:.4f}", f"{statistics.mean(values):.2f} {spread}"))
    heads = ("method", "weights ratio", "file bytes", "of dense", f"test {metric} %")
    return table(heads, lines, right=(1, 2, 3), total=False)


def cuts(rows: Rows) -> str:
    """By how much DeepThin's test value is below each rival's: the mean over the sizes that both reach, in per cent.

    Empty where there is no DeepThin, or no rival.
    """
    means = {key: statistics.mean(_values(group)) for key, group in _groups(rows).items() if _values(group)}
    methods = list(dict.fromkeys(method for method, _ in means if method != "dense"))
    ours = [method for method in methods if method.split("-")[0] == "deepthin"]
    lines: list[tuple[str, ...]] = []
    for rival in methods:
        cells: list[str] = []
        for own in ours:
            sizes = [
                ratio
                for method, ratio in means
                if method == rival and (own, ratio) in means and means[rival, ratio] > 0
            ]
            shares = [1 - means[own, ratio] / means[rival, ratio] for ratio in sizes]
            cells.append(f"{100 * statistics.mean(shares):.1f}" if own != rival and shares else "")
        if any(cells):
            lines.append((rival, *cells, *(f"{value:.1f}" for value in PAPER.get(rival, ()))))
    if not lines:
        return ""
    heads = ("cut, % of the value of", *ours, "paper: TFKaldi", "DeepSpeech")
    return table(
        heads, [(*line, *[""] * (len(heads) - len(line))) for line in lines], range(1, len(heads)), total=False
    )


def draw(rows: Rows, path: Path) -> Path:
    """Error against the size of the file, both axes logarithmic, one line a method, bars from seed to seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), dpi=150)
    by_method: dict[str, list[tuple[float, float, float, float]]] = {}
    for (method, _), group in _groups(rows).items():
        if values := _values(group):
            size = next(row["bytes"] for row in group if row["split"] == "test")
            by_method.setdefault(method, []).append((size / 1000, statistics.mean(values), min(values), max(values)))
    for method, points in by_method.items():
        name, _, bits = method.rpartition("-") if method.endswith("bit") else (method, "", "")
        colour, marker = _STYLES.get(name, (None, "o"))
        line = {"": "-", "8bit": "--"}.get(bits, ":")
        points.sort()
        sizes, means, lows, highs = (list(column) for column in zip(*points, strict=True))
        if method == "dense":
            axes.axhline(means[0], color=colour, linestyle="--", label=f"dense ({sizes[0]:,.0f} kB)")
            continue
        bars = [
            [m - low for m, low in zip(means, lows, strict=True)],
            [h - m for m, h in zip(means, highs, strict=True)],
        ]
        axes.errorbar(sizes, means, yerr=bars, color=colour, marker=marker, linestyle=line, capsize=3, label=method)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(plain)
    axes.tick_params(which="minor", labelsize=7)
    axes.set_xlabel("bytes of the written file, thousands")
    axes.set_ylabel(f"test {rows[0]['metric'].replace('_', ' ')}, %")
    axes.set_title(f"{rows[0]['task']}: {rows[0]['metric'].replace('_', ' ')} against size")
    axes.grid(True, which="both", alpha=0.25)
    if len(by_method) > 6:  # beside the lines, not over them
        figure.set_figwidth(9.5)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    else:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def write_page(rows: Rows, out: Path, command: str) -> Path:
    """``report.html``: the picture, the table, the plan of every model of the first seed; it needs no other file."""
    picture = b64encode(draw(rows, out / f"{rows[0]['task']}.png").read_bytes()).decode()
    run = json.loads((out / "run.json").read_text())
    plans = [
        f"<h3>{html.escape(row['method'])} at {row['ratio']:g}</h3><pre>{html.escape(str(_plan(out, row)))}</pre>"
        for row in rows
        if row["seed"] == 0 and row["split"] == "test" and row["value"] is not None
    ]
    versions = f"deepthin {version('deepthin')}, torch {version('torch')}, Python {platform.python_version()}"
    title, compared = f"deepthin compare {rows[0]['task']}", cuts(rows)
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.35 }}
img {{ max-width: 100% }}
</style>
<h1>{html.escape(title)}</h1>
<p>{html.escape(run["data"])}. {run["steps"]} training steps for every method.
Sizes are bytes of the written file, biases and headers included.</p>
<img alt="error against size" src="data:image/png;base64,{picture}">
<h2>Test results</h2>
<pre>{html.escape(summary(rows))}</pre>
{f"<h2>DeepThin against each rival</h2><pre>{html.escape(compared)}</pre>" if compared else ""}
<h2>What became of each matrix</h2>
{"".join(plans)}
<h2>How it was made</h2>
<pre>{html.escape(command)}</pre>
<p>{html.escape(versions)}</p>
</html>
"""
    path = out / "report.html"
    write_atomically(path, page.encode())
    return path


def best_thin(rows: Rows) -> Mapping[str, Any] | None:
    """The row with the lowest development value among those that are not dense."""
    judged = [row for row in rows if row["split"] == "dev" and row["value"] is not None and row["method"] != "dense"]
    return min(judged, key=lambda row: row["value"], default=None)


def _plan(out: Path, row: Mapping[str, Any]) -> Report:
    return inspect(out / row["model"])


def _groups(rows: Rows) -> dict[tuple[str, float], list[Mapping[str, Any]]]:
    """Rows by method and ratio, in the order of their first appearance, larger ratios first."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    keys = sorted({(row["method"], row["ratio"]) for row in rows}, key=lambda key: (methods.index(key[0]), -key[1]))
    return {key: [row for row in rows if (row["method"], row["ratio"]) == key] for key in keys}


def _values(group: Rows) -> list[float]:
    return [row["value"] for row in group if row["split"] == "test" and row["value"] is not None]
