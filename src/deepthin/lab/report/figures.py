"""A comparison as PNGs: error against bytes, and against microseconds."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepthin.lab.report.points import (
    DASHES,
    STYLES,
    UNCOMPRESSED,
    UNKNOWN,
    Point,
    Rows,
    Spread,
    base,
    label,
    metrics,
    points,
    worded,
)


def draw(rows: Rows, out: Path) -> list[Path]:
    """Draw a comparison as PNGs: the leading metric against file size, each further metric, and latency if it was
    measured.

    ``TASK.png`` shows the leading metric against the bytes of the file, ``TASK-METRIC.png`` each further one, and
    ``TASK-latency.png`` the leading metric against the time for one item. Axes are logarithmic, bars span the seeds,
    and methods with quantised floats are dashed.

    Args:
        rows: All rows of the comparison, at least one.
        out: The folder to write to.

    Returns:
        The paths of the pictures.
    """
    names, drawn = metrics(rows), points(rows)
    task = file_name(rows[0].task)
    pictures = {f"{task}{'' if i == 0 else '-' + file_name(name)}.png": (name, False) for i, name in enumerate(names)}
    if any(point.test and point.microseconds for point in drawn):
        pictures[f"{task}-latency.png"] = names[0], True
    for file, (metric, latency) in pictures.items():
        _draw(drawn, metric, latency, rows[0].task, out / file)
    return [out / file for file in pictures]


def file_name(text: str) -> str:
    """Text as a file name: characters other than letters, digits, dots and hyphens become underscores.

    Args:
        text: Any text, such as the name of a task.

    Returns:
        The name.
    """
    return re.sub(r"[^\w.-]", "_", text)


def _draw(drawn: Sequence[Point], metric: str, latency: bool, task: str, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    curves: dict[str, list[tuple[float, Spread]]] = {}
    for point in drawn:
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
