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
    """A comparison as a table: bytes, mean test values over the seeds with half their range, and speed.

    Args:
        rows: The rows of a comparison.

    Returns:
        One line for each method and ratio; columns without any value are left out.
    """
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
    """By how much DeepThin's test value is below a rival's: means over the sizes that both reach.

    Attributes:
        cut: ``1 - ours / rival``.
        closed: ``(rival - ours) / (rival - dense)``: the part of the rival's gap to dense that is closed; None where
            the rival has no gap.
        sizes: Number of sizes.
    """

    cut: float
    closed: float | None
    sizes: int

    def texts(self) -> tuple[str, str]:
        """Both figures in per cent.

        Returns:
            ``cut`` and ``closed`` as text; empty where ``closed`` is None.
        """
        return f"{100 * self.cut:z.1f}", "" if self.closed is None else f"{100 * self.closed:z.1f}"


def sizes(by: Mapping[str, Cut]) -> str:
    """How many sizes the cuts over one rival are means of.

    Args:
        by: Variant of DeepThin -> its cut.

    Returns:
        The number; several, separated by slashes, where variants differ.
    """
    return "/".join(dict.fromkeys(str(cut.sizes) for cut in by.values()))


def compared(listed: Sequence[Point], metric: str) -> dict[str, dict[str, Cut]]:
    """The cuts of each variant of DeepThin over each rival.

    Args:
        listed: The points of a comparison.
        metric: The metric, lower being better.

    Returns:
        Rival -> variant -> cut. The paper's rivals come first, those with quantised floats last.
    """
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

    The paper's are those of Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, Table 1.

    Args:
        rows: The rows of a comparison.

    Returns:
        The tables as plain text; empty where there is no DeepThin, or no rival.
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
