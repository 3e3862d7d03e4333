"""A comparison as one HTML page that needs no other file and no network: tables, and curves that a small script draws.

``page.html`` is the template, which jinja2 fills and escapes; ``page.css`` and ``page.js`` are put into it as they are.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepthin.lab.report.figures import draw
from deepthin.lab.report.parts import Cell, Key, Table, asset, facts, number, plain, template
from deepthin.lab.report.points import (
    DASHES,
    STYLES,
    UNCOMPRESSED,
    UNKNOWN,
    Point,
    Rows,
    base,
    best_thin,
    label,
    worded,
)
from deepthin.lab.report.points import metrics as metrics_of
from deepthin.lab.report.points import points as points_of
from deepthin.lab.report.tables import PAPER, PAPER_COLUMNS, compared, sizes
from deepthin.storage.atomic import write_atomically
from deepthin.storage.read import inspect

AXES = {
    "bytes": {"label": "bytes of the written file, thousands", "divide": 1000},
    "weights": {"label": "bytes of the weight matrices over dense, %", "divide": 0.01},
    "microseconds": {"label": "microseconds for one item", "divide": 1},
}


@dataclass(frozen=True)
class Headline:
    """One sentence at the top: a configuration with its error, its file and its speed."""

    title: str
    configuration: str
    metric: str
    unit: str
    value: str
    dense_value: str  # empty if the dense network was not measured by this metric
    dense_bytes: int | None
    point: Point


def render(rows: Rows, run: Mapping[str, Any], plans: Mapping[tuple[str, float], str], command: str) -> str:
    """Write a comparison as HTML.

    Args:
        rows: All rows of the comparison.
        run: The contents of ``run.json``: task, steps, data, network and, after a search, the settings it chose.
        plans: The report of a model's matrices as text, by method and ratio.
        command: The command line that made the comparison.

    Returns:
        The page, complete.
    """
    metrics, points = metrics_of(rows), points_of(rows)
    named = [{"name": metric, "label": label(metric)} for metric in metrics]
    about = f"{run['data']}. {run['steps']} training steps for every method. Sizes are bytes of the written file, "
    about += "biases and headers included" + (
        "; that of int8 is computed." if any(p.method == "int8" for p in points) else "."
    )
    return template("page.html").render(
        title=f"deepthin compare {rows[0].task}",
        headlines=list(_headlines(rows, points)),
        about=about,
        metrics=named,
        charts=_charts(points),
        results=_results(points, metrics),
        cuts=_cuts(points, metrics, rows[0].task),
        plans=_plans(plans),
        command=command,
        facts=facts(run),
        network=run.get("network"),
        chosen=_chosen(rows, run.get("chosen") or {}),
        data={"metrics": named, "axes": AXES, "curves": _curves(points, metrics)},
        css=asset("page.css"),
        js=asset("page.js"),
    )


def _headlines(rows: Rows, points: Sequence[Point]) -> Iterable[Headline]:
    """The best thin network by development value, then the best of DeepThin if that is another one."""
    of_deepthin = [row for row in rows if base(row.method)[0] == "deepthin"]
    candidates = {"Best compressed network": best_thin(rows), "Best of DeepThin": best_thin(of_deepthin)}
    by = {(p.method, p.ratio): p for p in points}
    dense = next((p for p in points if p.method == "dense"), None)
    told: set[tuple[str, float]] = set()
    for title, row in candidates.items():
        if row is None or row.metric not in (point := by[row.method, row.ratio]).test:
            continue
        metric, (name, unit) = row.metric, worded(row.metric)
        if (point.method, point.ratio) not in told:
            yield Headline(
                title,
                f"{point.method} at {point.ratio:g}",
                name,
                unit,
                _value(point, metric),
                _value(dense, metric) if dense and metric in dense.test else "",
                dense.file_bytes if dense else None,
                point,
            )
        told.add((point.method, point.ratio))


def _value(point: Point, metric: str) -> str:
    return point.test[metric].text(metric, "± ")


def _curves(points: Sequence[Point], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The data that the script draws, with all texts and exact numbers that it shows."""
    whole = next((p.weight_bytes for p in points if p.method == "dense"), None)
    curves: dict[str, dict[str, Any]] = {}
    for point in (p for p in points if p.test):
        name, bits = base(point.method)
        colour, marker = STYLES.get(name, UNKNOWN)
        over_dense = point.weight_bytes / whole if point.weight_bytes and whole else point.ratio
        lines = [(label(metric), _value(point, metric)) for metric in metrics if metric in point.test]
        lines.append(("seeds", str(point.seeds)))
        file = ""
        if point.file_bytes is not None:
            file = f" ({point.file_bytes / 1000:,.0f} kB)"
            lines.append(
                ("file", f"{point.file_bytes:,} bytes, {100 * point.file_bytes / point.dense_bytes:.3g} % of dense")
            )
        if point.weight_bytes is not None:
            lines.append(("weights", f"{point.weight_bytes:,} bytes, {100 * over_dense:.3g} % of dense"))
        if point.microseconds is not None:
            faster = f", {point.times_faster:.2f} times as fast" if point.times_faster else ""
            lines.append(("one item", f"{point.microseconds:,.0f} µs{faster}"))
        dashes = DASHES.get(bits, DASHES["8"]) if bits else (9, 3, 2, 3) if name == "int8" else ()
        curve = {
            "method": point.method,
            "colour": colour,
            "marker": marker,
            "open": bits != "",
            "dashes": " ".join(map(str, dashes)),
            "reference": point.method in UNCOMPRESSED,
            "words": {metric: f"{point.method} {_value(point, metric)}{file}" for metric in point.test},
            "points": [],
        }
        curves.setdefault(point.method, curve)["points"].append(
            {
                "title": f"{point.method} at {point.ratio:g}",
                "x": {"bytes": point.file_bytes, "weights": over_dense, "microseconds": point.microseconds},
                "values": {metric: (spread.mean, spread.low, spread.high) for metric, spread in point.test.items()},
                "lines": lines,
            }
        )
    return list(curves.values())


def _charts(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Titles and notes of the charts, which the script draws."""
    note = "Click a name to hide or show its curve; the axes adapt. Solid: fp32. Dashed and hollow: quantised floats. "
    note += "Bars show the range over the seeds."
    charts: list[dict[str, Any]] = [{"title": "Error against size", "x": "bytes", "speed": False, "note": note}]
    if any(point.test and point.microseconds for point in points):
        note = (
            "Medians for one item, all networks timed in turn in one run on one thread: dense, int8 and every method "
            "at every size."
        )
        charts.append({"title": "Error against speed", "x": "microseconds", "speed": True, "note": note})
    return charts


def _results(points: Sequence[Point], metrics: Sequence[str]) -> Table:
    """One line for each point, without columns that would be empty."""
    best: dict[tuple[float, str], Point] = {}  # by ratio and metric
    for point in (p for p in points if p.method not in UNCOMPRESSED):
        for metric, spread in point.test.items():
            if spread.mean <= best.setdefault((point.ratio, metric), point).test[metric].mean:
                best[point.ratio, metric] = point
    sizes = ("method", "weights ratio", "weight bytes", "file bytes", "file over dense")
    heads = (*sizes, *(f"test {label(metric)}" for metric in metrics), "seeds", "µs for one item", "times faster")
    body: list[list[Cell]] = []
    for point in points:
        over_dense = None if point.file_bytes is None else point.file_bytes / point.dense_bytes
        cells = [
            _method(point.method),
            number(point.ratio, "g"),
            number(point.weight_bytes, ","),
            number(point.file_bytes, ","),
            number(over_dense, ".4f"),
        ]
        for metric in metrics:
            if (spread := point.test.get(metric)) is None:
                cells.append(Cell())
                continue
            mean, _, rest = _value(point, metric).partition(" ")
            leads = point.method not in UNCOMPRESSED and mean == _value(best[point.ratio, metric], metric).split()[0]
            cells.append(Cell(mean, repr(spread.mean), "best" if leads else "", rest))
        cells += [
            Cell(str(point.seeds), str(point.seeds), small=point.note) if point.seeds else Cell(),
            number(point.microseconds, ",.0f"),
            number(point.times_faster, ".2f"),
        ]
        body.append(cells)
    columns = [i for i in range(len(heads)) if any(cells[i].text for cells in body)]
    lines: list[list[Cell]] = []
    for point, cells in zip(points, body, strict=True):
        line = [cells[i] for i in columns]
        if not point.test:
            at = sum(i < len(sizes) for i in columns)
            line[at:] = [Cell(point.note, look="missing", span=len(columns) - at)]
        lines.append(line)
    return Table([heads[i] for i in columns], lines)


def _cuts(points: Sequence[Point], metrics: Sequence[str], task: str) -> list[Table]:
    """The paper's Table 1 beside ours, for every metric; its column for the corresponding task is highlighted."""
    tables: list[Table] = []
    for metric in metrics:
        if not (cuts := compared(points, metric)):
            continue
        variants = list(dict.fromkeys(variant for by in cuts.values() for variant in by))  # of DeepThin
        heads = ["rival"]
        heads += [head for variant in variants for head in (f"reduction by {variant}, %", "gap closed, %")] + ["sizes"]
        heads += [f"paper: {name}, {worded(what)[0]}, %" for name, _, what in PAPER_COLUMNS]
        looks = ["paper" if (task, metric) == (theirs, what) else "" for _, theirs, what in PAPER_COLUMNS]
        lines: list[list[Cell]] = []
        for rival, by in cuts.items():
            parts = [part for v in variants for part in ((by[v].cut, by[v].closed) if v in by else (None, None))]
            cells = [number(part and 100 * part, "z.1f", "behind" if part and part < 0 else "") for part in parts]
            paper = PAPER.get(rival, (None,) * len(PAPER_COLUMNS))
            cells += [Cell(sizes(by)), *map(number, paper, (".1f",) * len(paper), looks)]
            lines.append([_method(rival), *cells])
        tables.append(Table(heads, lines, worded(metric)[0]))
    return tables


def _plans(plans: Mapping[tuple[str, float], str]) -> list[dict[str, Any]]:
    """The reports of the first seed, by method, large ratios first."""
    return [
        {
            "method": method,
            "key": Key.of(method),
            "reports": sorted(((ratio, text) for (name, ratio), text in plans.items() if name == method), reverse=True),
        }
        for method in dict.fromkeys(method for method, _ in plans)
    ]


def _chosen(rows: Rows, chosen: Mapping[str, Mapping[str, Any]]) -> Table:
    """The settings of each method's training: those that a search chose, else those in the rows."""
    title = "Settings that the search chose on development data" if chosen else "Training settings of each method"
    settings = {method: dict(choice) for method, choice in chosen.items()}
    if not settings:
        for row in rows:
            for key, value in (("lr", row.lr), ("allocation", row.allocation)):
                if value is not None:
                    used = settings.setdefault(row.method, {}).setdefault(key, [])
                    used += [value] if value not in used else []
    keys = list(dict.fromkeys(key for choice in settings.values() for key in choice))
    lines = [
        [_method(method), *(Cell(plain(choice.get(key, ""))) for key in keys)] for method, choice in settings.items()
    ]
    return Table(["method", *keys], lines, title)


def _method(name: str) -> Cell:
    return Cell(name, key=Key.of(name))


def write_page(rows: Rows, out: Path, command: str) -> Path:
    """Write ``report.html``, a self-contained page, and the same figures as PNG files beside it.

    Args:
        rows: All rows of the comparison.
        out: Its folder, with ``run.json`` and the models.
        command: The command line that made it.

    Returns:
        The path of the page.
    """
    draw(rows, out)
    run = json.loads((out / "run.json").read_text())
    plans = {
        (row.method, row.ratio): str(inspect(out / row.model))
        for row in rows
        if row.seed == 0 and row.value is not None and row.model
    }
    path = out / "report.html"
    write_atomically(path, render(rows, run, plans, command).encode(errors="backslashreplace"))
    return path
