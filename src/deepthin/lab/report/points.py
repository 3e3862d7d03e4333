"""The rows of a comparison as points: the seeds of one method at one size become one point."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deepthin.lab.rows import Row

Rows = Sequence[Row]
METRICS = {  # name and unit of the tasks' metrics; others are shown by their name
    "error": ("error", "%"),
    "frame_error": ("frame error", "%"),
    "wer": ("WER", "%"),
    "wer_greedy": ("greedy WER", "%"),
    "loss": ("loss", "nats a character"),
}
STYLES = {  # colour and marker (corners, whether a star, angle), visible on white and on black
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
DASHES = {"8": (6.0, 3.0), "4": (1.5, 2.5)}  # by the bits of quantised floats; others are drawn as 8 bits
UNCOMPRESSED = "dense", "int8"  # drawn as horizontal lines


@dataclass(frozen=True)
class Spread:
    """Statistics of one metric over the seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    def text(self, metric: str, plus_minus: str = "+-") -> str:
        """Mean, and half the range if there are several seeds.

        Args:
            metric: The metric, which fixes the number of digits: two decimals for per cent, else four significant
                digits.
            plus_minus: What separates both.

        Returns:
            The text, such as ``12.34 +-0.05``.
        """
        decimals = 2 if label(metric).endswith("%") else max(0, 3 - math.floor(math.log10(abs(self.mean) or 1)))
        spread = f" {plus_minus}{(self.high - self.low) / 2:.{decimals}f}" if self.seeds > 1 else ""
        return f"{self.mean:.{decimals}f}{spread}"


@dataclass(frozen=True)
class Point:
    """One method at one size. Bytes are those of the first seed's file; None: not measured."""

    method: str
    ratio: float  # of the weight matrices, as asked for
    test: Mapping[str, Spread]  # by metric; empty where the size cannot be reached
    file_bytes: int | None
    dense_bytes: int
    weight_bytes: int | None
    microseconds: float | None  # for one item
    dense_microseconds: float | None  # of the dense network in the same run
    smallest_ratio: float | None
    failed: tuple[str, ...] = ()  # reasons of failed seeds

    @property
    def times_faster(self) -> float | None:
        """Time of the dense network over that of this one; None if either was not measured."""
        return self.dense_microseconds / self.microseconds if self.dense_microseconds and self.microseconds else None

    @property
    def seeds(self) -> int:
        """Number of seeds with a value."""
        return max((spread.seeds for spread in self.test.values()), default=0)

    @property
    def note(self) -> str:
        """Why there is no value, or how many seeds failed."""
        if self.test:
            return f"{len(self.failed)} failed" if self.failed else ""
        if self.failed:
            return f"failed: {self.failed[0]}"
        return "not reachable" + ("" if self.smallest_ratio is None else f": smallest ratio {self.smallest_ratio:.5f}")


def points(rows: Rows) -> list[Point]:
    """Join the seeds of each method and ratio.

    Args:
        rows: The rows of a comparison.

    Returns:
        Points by method in the order of first appearance, larger ratios first.
    """
    groups: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row.method, {}).setdefault(row.ratio, []).append(row)
    return [_point(groups[method][ratio]) for method in groups for ratio in sorted(groups[method], reverse=True)]


def _point(group: Rows) -> Point:
    values: dict[str, list[float]] = {}
    for row in group:
        if row.split == "test" and row.value is not None:
            values.setdefault(row.metric, []).append(row.value)
    first = min(group, key=lambda row: (row.bytes is None, row.seed))
    return Point(
        first.method,
        first.ratio,
        {name: Spread(statistics.mean(seeds), min(seeds), max(seeds), len(seeds)) for name, seeds in values.items()},
        first.bytes,
        first.dense_bytes,
        first.weight_bytes,
        _median(row.microseconds for row in group),
        _median(row.dense_microseconds for row in group),
        next((row.smallest_ratio for row in group if row.smallest_ratio is not None), None),
        tuple(row.failed for row in group if row.failed),
    )


def _median(measured: Iterable[float | None]) -> float | None:
    values = [value for value in measured if value is not None]
    return statistics.median(values) if values else None


def metrics(rows: Rows) -> list[str]:
    """The metrics of a comparison.

    Args:
        rows: The rows of a comparison.

    Returns:
        Names in the order of first appearance: the first is the leading one.
    """
    return list(dict.fromkeys(row.metric for row in rows))


def worded(metric: str) -> tuple[str, str]:
    """Name and unit of a metric, for people.

    Args:
        metric: The metric, as in ``results.json``.

    Returns:
        (name, unit); the unit is empty if the metric has none.
    """
    return METRICS.get(metric, (metric.replace("_", " "), ""))


def label(metric: str) -> str:
    """A metric for table heads and axes.

    Args:
        metric: The metric, as in ``results.json``.

    Returns:
        Its name and unit, such as ``frame error, %``.
    """
    return ", ".join(filter(None, worded(metric)))


def base(method: str) -> tuple[str, str]:
    """Split the name of a compared method.

    Args:
        method: The name, such as ``deepthin-8bit``.

    Returns:
        The method, and the bits of its quantised floats: ``("deepthin", "8")``; empty bits without quantisation.
    """
    rounded = re.fullmatch(r"(.+)-(\d+)bit", method)
    return (rounded[1], rounded[2]) if rounded else (method, "")


def best_thin(rows: Rows) -> Row | None:
    """The row of the best thin file: the best seed of the configuration with the lowest mean development value.

    Judged by the leading metric; the dense network and int8 are not thin.

    Args:
        rows: The rows of a comparison.

    Returns:
        The row; None if no thin network has a development value.
    """
    judged: dict[tuple[str, float], list[tuple[float, Row]]] = {}
    for row in rows:
        thin = row.method not in UNCOMPRESSED and row.metric == rows[0].metric
        if thin and row.split == "dev" and row.value is not None:
            judged.setdefault((row.method, row.ratio), []).append((row.value, row))
    groups = judged.values()
    best = min(groups, key=lambda group: statistics.mean(value for value, _ in group), default=[])
    return min(best, key=lambda judgment: judgment[0], default=(0.0, None))[1]
