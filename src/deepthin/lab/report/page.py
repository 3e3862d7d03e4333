"""A comparison as one HTML page that needs no other file and no network: tables, and curves that a small script draws.

``page.html`` is the frame, into which ``page.css`` and ``page.js`` are put. Whatever comes from rows is escaped here.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from deepthin.lab.report.figures import draw
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


def render(rows: Rows, run: Mapping[str, Any], plans: Mapping[tuple[str, float], str], command: str) -> str:
    """The page. ``run`` is what ``run.json`` holds, ``plans`` the text of a model's report by method and ratio."""
    metrics, points = metrics_of(rows), points_of(rows)
    data = {"metrics": [{"name": metric, "label": label(metric)} for metric in metrics], "axes": AXES}
    data["curves"] = _curves(points, metrics)
    about = f"{run['data']}. {run['steps']} training steps for every method. Sizes are bytes of the written file, "
    about += "biases and headers included" + (
        "; those of int8 are counted." if any(p.method == "int8" for p in points) else "."
    )
    frame = {
        "title": escape(f"deepthin compare {rows[0]['task']}"),
        "headlines": "\n".join(_headlines(rows, points)),
        "about": escape(about),
        "charts": _charts(points, metrics),
        "results": _results(points, metrics),
        "cuts": _cuts(points, metrics, rows[0]["task"]),
        "plans": "\n".join(_plans(plans)),
        "made": _made(rows, run, command),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "css": _asset("page.css"),
        "js": _asset("page.js"),
    }
    return Template(_asset("page.html")).substitute(frame)


def _asset(name: str) -> str:
    return files("deepthin.lab.report").joinpath(name).read_text(encoding="utf-8")


def _headlines(rows: Rows, points: Sequence[Point]) -> Iterable[str]:
    """The best thin network by development value, with its error, its file and its speed; then DeepThin's best."""
    ours = [row for row in rows if base(row["method"])[0] == "deepthin"]
    chosen = {"Best compressed network": best_thin(rows), "Best of DeepThin": best_thin(ours)}
    by = {(p.method, p.ratio): p for p in points}
    dense = next((p for p in points if p.method == "dense"), None)
    told: set[str] = set()
    for title, row in chosen.items():
        if row is None or row["metric"] not in (point := by[row["method"], row["ratio"]]).test:
            continue
        metric, (name, unit) = row["metric"], map(escape, worded(row["metric"]))
        against = f" (dense: {_value(dense, metric)})" if dense and metric in dense.test else ""
        sentence = (
            f"<b>{escape(point.method)} at {point.ratio:g}</b>: test {name} <b>{_value(point, metric)} {unit}</b>"
            f"{against} in a file of <b>{point.file_bytes:,} bytes</b>"
        )
        if dense and dense.file_bytes and point.file_bytes:
            sentence += (
                f", {dense.file_bytes / point.file_bytes:.0f} times smaller than dense ({dense.file_bytes:,} bytes)"
            )
        if point.times_faster:
            sentence += (
                f". The same file runs <b>{point.times_faster:.2f} times as fast</b> as dense: "
                f"{point.microseconds:,.0f} against {point.dense_microseconds:,.0f} µs for one item"
            )
        if sentence not in told:
            yield f"<p>{title} by development {name}: {sentence}.</p>"
        told.add(sentence)


def _value(point: Point, metric: str) -> str:
    return point.test[metric].text(metric, "± ")


def _curves(points: Sequence[Point], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """What the script draws; every word and every exact number that it shows is written here."""
    whole = next((p.weight_bytes for p in points if p.method == "dense"), None)
    curves: dict[str, dict[str, Any]] = {}
    for point in (p for p in points if p.test):
        name, bits = base(point.method)
        colour, marker = STYLES.get(name, UNKNOWN)
        share = point.weight_bytes / whole if point.weight_bytes and whole else point.ratio
        lines = [(label(metric), _value(point, metric)) for metric in metrics if metric in point.test]
        lines.append(("seeds", str(point.seeds)))
        file = ""
        if point.file_bytes is not None:
            file = f" ({point.file_bytes / 1000:,.0f} kB)"
            lines.append(
                ("file", f"{point.file_bytes:,} bytes, {100 * point.file_bytes / point.dense_bytes:.3g} % of dense")
            )
        if point.weight_bytes is not None:
            lines.append(("weights", f"{point.weight_bytes:,} bytes, {100 * share:.3g} % of dense"))
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
                "x": {"bytes": point.file_bytes, "weights": share, "microseconds": point.microseconds},
                "values": {metric: (spread.mean, spread.low, spread.high) for metric, spread in point.test.items()},
                "lines": lines,
            }
        )
    return list(curves.values())


def _charts(points: Sequence[Point], metrics: Sequence[str]) -> str:
    options = "".join(f'<option value="{escape(metric)}">{escape(label(metric))}</option>' for metric in metrics)
    across = (
        '<label>Across <select name="x"><option value="bytes">file bytes</option>'
        '<option value="weights">weights over dense</option></select></label>'
    )
    told = "Click a name to hide or show its curve; the axes follow. Solid: fp32. Dashed and hollow: rounded floats. "
    told += "Bars go from seed to seed."
    charts = [("Error against size", "bytes", across, "", told)]
    if any(point.test and point.microseconds for point in points):
        speed = (
            "Medians for one item, all networks in turn in one run, one thread; dense, int8 and every size of a method."
        )
        charts.append(("Error against speed", "microseconds", "", " data-links", speed))
    return "\n".join(
        f"""<section>
<h2>{title}</h2>
<figure data-x="{x}"{links}>
<div class="controls"><label>Metric <select name="metric">{options}</select></label>{more}<span>
<button type="button" name="all">show all</button> <button type="button" name="none">hide all</button></span></div>
<svg class="plot" role="img" aria-label="{title}; the table below has the numbers"></svg>
<ul class="legend"></ul>
</figure>
<p class="note">{note}</p>
</section>"""
        for title, x, more, links, note in charts
    )


def _results(points: Sequence[Point], metrics: Sequence[str]) -> str:
    """One line a point; columns that would be empty are left out."""
    best: dict[tuple[float, str], Point] = {}  # by ratio and metric
    for point in (p for p in points if p.method not in UNCOMPRESSED):
        for metric, spread in point.test.items():
            if spread.mean <= best.setdefault((point.ratio, metric), point).test[metric].mean:
                best[point.ratio, metric] = point
    sizes = ("method", "weights ratio", "weight bytes", "file bytes", "file over dense")
    heads = (*sizes, *(f"test {label(metric)}" for metric in metrics), "seeds", "µs for one item", "times faster")
    body: list[list[str]] = []
    for point in points:
        share = None if point.file_bytes is None else point.file_bytes / point.dense_bytes
        cells = [
            _method(point.method),
            _cell(point.ratio, "g"),
            _cell(point.weight_bytes, ","),
            _cell(point.file_bytes, ","),
        ]
        cells.append(_cell(share, ".4f"))
        for metric in metrics:
            if (spread := point.test.get(metric)) is None:
                cells.append("")
                continue
            mean, _, rest = _value(point, metric).partition(" ")
            leads = point.method not in UNCOMPRESSED and mean == _value(best[point.ratio, metric], metric).split()[0]
            shown = f"{mean} <small>{rest}</small>" if rest else mean
            cells.append(f'<td data-value="{spread.mean!r}"{" class=best" if leads else ""}>{shown}</td>')
        failed = f" <small>{escape(point.note)}</small>" if point.note else ""
        cells += [
            f'<td data-value="{point.seeds}">{point.seeds}{failed}</td>' if point.seeds else "",
            _cell(point.microseconds, ",.0f"),
            _cell(point.times_faster, ".2f"),
        ]
        body.append(cells)
    kept = [i for i in range(len(heads)) if any(cells[i] for cells in body)]
    lines: list[str] = []
    for point, cells in zip(points, body, strict=True):
        line = [cells[i] for i in kept]
        if not point.test:
            at = sum(i < len(sizes) for i in kept)
            line[at:] = [f'<td class="missing" colspan="{len(kept) - at}">{escape(point.note)}</td>']
        lines.append(_line(line))
    return _table([heads[i] for i in kept], lines, sortable=True)


def _cuts(points: Sequence[Point], metrics: Sequence[str], task: str) -> str:
    """The paper's Table 1 beside ours, for every metric; its column for the like of this task is set off."""
    tables: list[str] = []
    for metric in metrics:
        if not (found := compared(points, metric)):
            continue
        ours = list(dict.fromkeys(own for by in found.values() for own in by))
        heads = ["over", *(head for own in ours for head in (f"cut by {own}, %", "gap closed, %")), "sizes"]
        heads += [f"paper: {name}, {worded(what)[0]}, %" for name, _, what in PAPER_COLUMNS]
        looks = ["paper" if (task, metric) == (theirs, what) else "" for _, theirs, what in PAPER_COLUMNS]
        lines: list[str] = []
        for rival, by in found.items():
            shares = [share for own in ours for share in ((by[own].cut, by[own].closed) if own in by else (None, None))]
            cells = [_cell(share and 100 * share, "z.1f", "behind" if share and share < 0 else "") for share in shares]
            paper = PAPER.get(rival, (None,) * len(PAPER_COLUMNS))
            cells += [f"<td>{sizes(by)}</td>", *map(_cell, paper, (".1f",) * len(paper), looks)]
            lines.append(_line([_method(rival), *cells]))
        tables.append(f"<h3>Test {escape(worded(metric)[0])}</h3>\n{_table(heads, lines)}")
    if not tables:
        return ""
    about = """<section>
<h2>DeepThin over each rival, beside the paper's Table 1</h2>
<p>Cut: by how much DeepThin's value is below the rival's. Gap closed: the share of the rival's distance from dense that
DeepThin does away with; 100 is as good as dense. Both are means over the sizes that both reach; below 0 the rival is
better. The paper's figures (Sotoudeh and Baghsorkhi, 2018) are of other data; the column that is set off has a task and
a metric like these.</p>
"""
    return "\n".join([about, *tables, "</section>"])


def _plans(plans: Mapping[tuple[str, float], str]) -> Iterable[str]:
    """Those of the first seed, by method."""
    for method in dict.fromkeys(method for method, _ in plans):
        yield f"<details><summary>{_key(method)}{escape(method)}</summary>"
        for ratio in sorted((ratio for name, ratio in plans if name == method), reverse=True):
            yield f"<h3>{escape(method)} at {ratio:g}</h3>\n<pre>{escape(plans[method, ratio])}</pre>"
        yield "</details>"


def _made(rows: Rows, run: Mapping[str, Any], command: str) -> str:
    """What one needs to make it again."""
    import torch

    versions = ", ".join(f"{name} {version(name)}" for name in ("deepthin", "torch", "numpy"))
    facts = {
        "command": f'<pre class="wrap">{escape(command)}</pre>',
        "versions": escape(f"{versions}, Python {platform.python_version()}"),
        "processor": escape(f"{_processor()}; threads: {torch.get_num_threads()}"),
    }
    facts |= {key: escape(_plain(run[key])) for key in run if key not in ("task", "network", "chosen", *facts)}
    if "network" in run:
        facts["network"] = f"<details><summary>dense</summary><pre>{escape(str(run['network']))}</pre></details>"
    told = "".join(f"<dt>{escape(key)}</dt><dd>{text}</dd>\n" for key, text in facts.items())
    return f'<dl class="made">{told}</dl>\n{_chosen(rows, run.get("chosen") or {})}'


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _chosen(rows: Rows, chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings of each method's training: those that a search chose, else those in the rows."""
    title = "What the search chose on development data" if chosen else "What each method was trained with"
    settings = {method: dict(found) for method, found in chosen.items()}
    if not settings:
        for row in rows:
            for key in ("lr", "allocation"):
                if row.get(key) is not None:
                    used = settings.setdefault(row["method"], {}).setdefault(key, [])
                    used += [row[key]] if row[key] not in used else []
    keys = list(dict.fromkeys(key for found in settings.values() for key in found))
    lines = [
        _line([_method(method), *(f"<td>{escape(_plain(found.get(key, '')))}</td>" for key in keys)])
        for method, found in settings.items()
    ]
    return f"<h3>{title}</h3>\n{_table(['method', *keys], lines)}" if lines else ""


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_plain(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(heads: Sequence[str], lines: Sequence[str], sortable: bool = False) -> str:
    """``lines`` come from `_line`; a click on a head of a sortable table sorts by the cells' ``data-value``."""
    button = '<th scope="col" aria-sort="none"><button type="button">{}</button></th>'
    top = "".join((button if sortable else '<th scope="col">{}</th>').format(escape(head)) for head in heads)
    look = ' class="sortable" id="results"' if sortable else ""
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table{look}>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    )


def _line(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(cell or '<td></td>' for cell in cells)}</tr>"


def _cell(value: float | None, form: str, look: str = "") -> str:
    return "" if value is None else f'<td data-value="{value!r}"{f" class={look}" if look else ""}>{value:{form}}</td>'


def _method(name: str) -> str:
    return f'<th scope="row" data-value="{escape(name)}">{_key(name)}{escape(name)}</th>'


def _key(method: str) -> str:
    """A piece of the method's line."""
    name, bits = base(method)
    line = {"": "solid", "4": "dotted"}.get(bits, "dashed")
    return f'<i class="key" style="border-top: 3px {line} {STYLES.get(name, UNKNOWN)[0]}"></i>'


def write_page(rows: Rows, out: Path, command: str) -> Path:
    """``report.html``, which needs no other file, and the same pictures as PNG beside it."""
    from deepthin.lab.report.page import render

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
