"""A search as one HTML page that needs no other file: front, curves over time, what each choice was worth.

``search.html`` is the template; style and script are those of a comparison's page.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepthin.lab.report.parts import Cell, Table, asset, facts, number, template
from deepthin.lab.report.points import label
from deepthin.lab.size_search.best import CONFIGURATION, FILE, Best
from deepthin.lab.size_search.candidate import Candidate, Result
from deepthin.lab.size_search.clock import worded
from deepthin.lab.size_search.halving import rungs
from deepthin.lab.size_search.problem import Problem
from deepthin.lab.size_search.record import importances
from deepthin.lab.size_search.worth import described, falling, family, front, worth
from deepthin.storage.atomic import write_atomically
from deepthin.storage.read import inspect

PAGE = "search.html"
AXES = {
    "bytes": {"label": "bytes of the written file, thousands", "divide": 1000},
    "microseconds": {"label": "microseconds for one item", "divide": 1},
    "seconds": {"label": "seconds of the search", "divide": 1},
}
COLOURS = ("#2f7fd0", "#0f99a6", "#e07800", "#9467d0", "#2c9c3c", "#e0669a", "#a0764e", "#8f8a00", "#7f7f7f")
MARKS = ((24, 0, 0), (4, 0, 45), (3, 0, 0), (4, 0, 0), (5, 1, 0), (3, 0, 180), (4, 1, 0), (6, 0, 0))
LINE = "#dd2c2f"  # of the front, and of the best so far

Valued = tuple[Candidate, Result]


def write_search_page(
    problem: Problem, candidates: Sequence[Candidate], best: Best, out: Path, command: str = ""
) -> Path:
    """Write ``search.html``.

    Args:
        problem: What was searched.
        candidates: All candidates with their results.
        best: The best file.
        out: The folder of the search.
        command: The command line that ran it.

    Returns:
        The path of the page.
    """
    path = out / PAGE
    configuration = (out / CONFIGURATION).read_text(encoding="utf-8")
    page = render(problem, candidates, best, configuration, str(inspect(out / FILE)), command)
    write_atomically(path, page.encode(errors="backslashreplace"))
    return path


def render(
    problem: Problem, candidates: Sequence[Candidate], best: Best, configuration: str, plan: str, command: str
) -> str:
    """Make the page.

    Args:
        problem: What was searched.
        candidates: All candidates with their results.
        best: The best file.
        configuration: ``best.toml``.
        plan: The report of the best file's matrices, as text.
        command: The command line that ran it.

    Returns:
        The page, complete.
    """
    run, wanted = problem.run, problem.wanted
    valued = [(c, r) for c in candidates for r in c.results.values() if r.value is not None]
    metrics = [{"name": name, "label": label(name)} for name in best.metrics["dev"]]
    lengths = rungs(run.steps, wanted.least_steps)
    about = {
        "data": run.data.about,
        "size": f"{wanted.file_bytes:,} bytes",
        "time for one item": "no bound" if wanted.microseconds is None else f"at most {wanted.microseconds:g} µs",
        "budget": str(wanted.budget),
        "steps": " then ".join(f"{steps:,}" for steps in lengths),
        "seed": str(wanted.seed),
        "teacher": "none" if run.teacher is None else run.teacher[0].about(),
    }
    return template("search.html").render(
        title=f"deepthin search {run.task.name}",
        best=best,
        metric=label(best.metric).removesuffix(", %"),
        unit="%" if label(best.metric).endswith("%") else "",
        times=run.dense_bytes() / best.file_bytes,
        bound=wanted.microseconds,
        about=_about(problem, candidates, valued),
        metrics=metrics,
        worth=_worth(problem, candidates, lengths),
        trainings=_trainings(valued, candidates, metrics, best),
        configuration=configuration,
        plan=plan,
        command=command,
        facts=facts(about),
        network=str(run.build(run.width)),
        data={
            "metrics": metrics,
            "axes": AXES,
            "curves": _curves(valued, best.metric, lengths),
            "split": "development",
        },
        css=asset("page.css"),
        js=asset("page.js"),
    )


def _about(problem: Problem, candidates: Sequence[Candidate], valued: Sequence[Valued]) -> str:
    failed = sum(r.failed is not None for c in candidates for r in c.results.values())
    took = max((result.at for _, result in valued), default=0.0)
    text = f"{problem.run.data.about}. {len(valued)} trainings of {len(candidates)} candidates in {worded(took)}"
    text += f"; {failed} failed" if failed else ""
    return f"{text}. Every training ends at the asked size of the file; development data chose."


def _point(pair: Valued, xs: Mapping[str, float | None]) -> dict[str, Any]:
    """A result as the script draws it."""
    candidate, result = pair
    lines = [("settings", described(candidate)), ("from", candidate.origin), ("steps", f"{result.steps:,}")]
    lines += [(label(name), f"{value:.4g}") for name, value in result.development.items()]
    lines += [("file", f"{result.bytes:,} bytes"), ("one item", f"{result.microseconds:,.0f} µs")]
    return {
        "title": f"candidate {candidate.number}",
        "x": {"bytes": None, "microseconds": None, "seconds": None, **xs},
        "values": {name: (value, value, value) for name, value in result.development.items()},
        "lines": lines,
    }


def _curve(name: str, colour: str, marker: tuple[int, int, int], loose: bool, points: list[Any]) -> dict[str, Any]:
    look = {"colour": colour, "marker": marker, "open": False, "dashes": "", "loose": loose, "reference": False}
    return {"method": name, **look, "words": {}, "points": points}


def _curves(valued: Sequence[Valued], metric: str, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Fronts and all results by kind, against bytes and microseconds; and over the time of the search, by length."""
    longest = [(c, r) for c, r in valued if r is c.longest()]
    costs: dict[str, Callable[[Result], float]] = {
        "bytes": lambda result: float(result.bytes or 0),
        "microseconds": lambda result: result.microseconds or 0.0,
    }
    curves: list[dict[str, Any]] = []
    kinds = dict.fromkeys(family(candidate) for candidate, _ in longest)
    for place, kind in enumerate(kinds):
        points = [
            _point(pair, {"bytes": pair[1].bytes, "microseconds": pair[1].microseconds})
            for pair in longest
            if family(pair[0]) == kind
        ]
        curves.append(_curve(kind, COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)], True, points))
    for axis, cost in costs.items():
        points = [_point(pair, {axis: cost(pair[1])}) for pair in front(longest, cost)]
        curves.append(_curve(f"front, {axis}", LINE, MARKS[0], False, points))
    for place, steps in enumerate(lengths):
        points = [_point(pair, {"seconds": pair[1].at}) for pair in valued if pair[1].steps == steps]
        curves.append(_curve(f"{steps:,} steps", COLOURS[place], MARKS[place], True, points))
    points = [_point(pair, {"seconds": pair[1].at}) for pair in falling(valued)]
    curves.append(_curve("best so far", LINE, MARKS[0], False, points))
    return [curve for curve in curves if curve["points"]]


def _worth(problem: Problem, candidates: Sequence[Candidate], lengths: Sequence[int]) -> Table:
    """What each choice was worth; the best value of each choice is marked."""
    rows = worth(problem.space, candidates, lengths)
    shares = importances(problem.space, list(candidates))
    lowest = {(row.choice, steps): row.best[steps] for row in rows for steps in row.best}
    for row in rows:
        for steps, value in row.best.items():
            lowest[row.choice, steps] = min(lowest[row.choice, steps], value)
    heads = ["choice", "value", "candidates", *(f"best after {steps:,} steps" for steps in lengths)]
    lines: list[list[Cell]] = []
    for row in rows:
        cells = [Cell(row.choice, row.choice, "text"), Cell(row.value, row.value), number(row.candidates, "d")]
        for steps in lengths:
            value = row.best.get(steps)
            cells.append(number(value, ".4g", "best" if value == lowest.get((row.choice, steps)) else ""))
        if shares:
            cells.append(number(shares.get(row.choice), ".2f"))
        lines.append(cells)
    return Table([*heads, *(["importance"] if shares else [])], lines)


def _trainings(
    valued: Sequence[Valued], candidates: Sequence[Candidate], metrics: Sequence[Mapping[str, str]], best: Best
) -> Table:
    """All trainings, the best first, then those that failed."""
    heads = ["candidate", "steps", *(f"development {metric['label']}" for metric in metrics)]
    heads += ["file bytes", "µs for one item", "seconds", "from", "settings"]
    lines: list[list[Cell]] = []
    for candidate, result in sorted(valued, key=lambda pair: (pair[1].value, -pair[1].steps)):
        is_best = (result.value, result.steps, result.bytes) == (best.development, best.steps, best.file_bytes)
        cells = [number(candidate.number, "d", "text"), number(result.steps, ",")]
        cells += [
            number(result.development.get(metric["name"]), ".4g", "best" if is_best else "") for metric in metrics
        ]
        cells += [number(result.bytes, ","), number(result.microseconds, ",.0f"), number(result.seconds, ",.1f")]
        lines.append([*cells, _left(candidate.origin), _left(described(candidate))])
    for candidate in candidates:
        for result in candidate.results.values():
            if result.failed:
                cells = [number(candidate.number, "d", "text"), number(result.steps, ",")]
                cells.append(Cell(f"failed: {result.failed}", look="missing", span=len(metrics) + 3))
                lines.append([*cells, _left(candidate.origin), _left(described(candidate))])
    return Table(heads, lines)


def _left(text: str) -> Cell:
    return Cell(text, text, "left")
