"""A comparison as plain text: every method at every size, and by how much DeepThin reduces its rivals' error."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepthin.lab.report.points import UNCOMPRESSED, Point, Rows, base, label, metrics, points, worded
from deepthin.storage.report import table

# Average relative improvement of DeepThin over each rival, per cent: Sotoudeh and Baghsorkhi, 2018, Table 1.
PAPER = {"rank": (60.08, 28.09), "pruned-csr": (56.96, 27.21), "same-size": (23.40, 20.45), "hashed": (6.12, 12.16)}
PAPER_COLUMNS = ("TFKaldi", "acoustic", "wer"), ("DeepSpeech", "ctc", "loss")  # with the corresponding task and metric


def summary(rows: Rows) -> str:
    """One line for each method and size: bytes, mean test values over the seeds with half their range, and speed."""
    names, listed = metrics(rows), points(rows)
    lines: list[tuple[str, ...]] = []
    for point in listed:
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
    columns = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    right = [at for at, i in enumerate(columns) if heads[i] not in ("method", "note", *tests)]
    return table([heads[i] for i in columns], [[line[i] for i in columns] for line in lines], right, total=False)


@dataclass(frozen=True)
class Cut:
    """The reduction of the test value by DeepThin relative to a rival: means over the sizes that both reach."""

    cut: float  # 1 - ours / rival
    closed: float | None  # (rival - ours) / (rival - dense), the fraction of the rival's gap to dense; None if no gap
    sizes: int  # number of sizes that the means are over

    def texts(self) -> tuple[str, str]:
        """Both, in percent."""
        return f"{100 * self.cut:z.1f}", "" if self.closed is None else f"{100 * self.closed:z.1f}"


def sizes(by: Mapping[str, Cut]) -> str:
    """The number of sizes over which the reductions for one rival are averaged; several numbers if they differ."""
    return "/".join(dict.fromkeys(str(cut.sizes) for cut in by.values()))


def compared(listed: Sequence[Point], metric: str) -> dict[str, dict[str, Cut]]:
    """For each rival, the reduction by each variant of DeepThin. The paper's rivals come first, quantised ones last."""
    means = {(p.method, p.ratio): p.test[metric].mean for p in listed if metric in p.test}
    dense = next((value for (method, _), value in means.items() if method == "dense"), None)
    methods = [method for method in dict.fromkeys(method for method, _ in means) if method not in UNCOMPRESSED]
    rank = {name: position for position, name in enumerate(PAPER)}
    result: dict[str, dict[str, Cut]] = {}
    for rival in sorted(methods, key=lambda name: (base(name)[1] != "", rank.get(name, len(rank)))):
        for variant in (name for name in methods if base(name)[0] == "deepthin" and name != rival):
            pairs = {
                ratio: (means[variant, ratio], value)
                for (method, ratio), value in means.items()
                if method == rival and (variant, ratio) in means and value > 0
            }
            if pairs:
                cut = statistics.mean(1 - ours / theirs for ours, theirs in pairs.values())
                gaps = [(r - ours) / (r - dense) for ours, r in pairs.values() if dense is not None and r > dense]
                closed = statistics.mean(gaps) if gaps else None
                result.setdefault(rival, {})[variant] = Cut(cut, closed, len(pairs))
    return result


def cuts(rows: Rows) -> str:
    """For every metric a table: the reduction by DeepThin relative to each rival, beside the paper's figures.

    Empty if there is no DeepThin, or no rival.
    """
    told: list[str] = []
    for metric in metrics(rows):
        if not (rivals := compared(points(rows), metric)):
            continue
        variants = list(dict.fromkeys(variant for by in rivals.values() for variant in by))  # of DeepThin
        lines: list[tuple[str, ...]] = []
        for rival, by in rivals.items():
            cells = [text for v in variants for text in (by[v].texts() if v in by else ("", ""))]
            paper = [f"{value:.1f}" for value in PAPER.get(rival, ())] or [""] * len(PAPER_COLUMNS)
            lines.append((rival, *cells, sizes(by), *paper))
        heads = ("rival", *(head for variant in variants for head in (variant, "gap")), "sizes")
        heads += tuple(f"paper: {name} {worded(like)[0]}" for name, _, like in PAPER_COLUMNS)
        about = (
            f"Reduction of test {worded(metric)[0]} by DeepThin relative to each rival, %, "
            "and the part of the rival's gap to dense that this closes, %"
        )
        told.append(f"{about}\n{table(heads, lines, range(1, len(heads)), total=False)}")
    return "\n\n".join(told)
