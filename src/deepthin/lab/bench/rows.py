"""The rows of a benchmark: one for each batch and ratio."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """Medians of one interleaved run, of DeepThin at one ratio and of its competitors, in microseconds."""

    case: str
    rows: int  # outputs, or units of a recurrent layer
    cols: int  # inputs
    batch: int
    rank: int
    ratio: float  # bytes of the weights over dense
    threads: int
    isa: str  # instruction set of the native kernels
    n: int | None = None  # DeepThin's, of the largest matrix; None if the ratio cannot be reached
    smallest_ratio: float | None = None  # if the ratio cannot be reached
    times: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    """Column, such as ``dense_microseconds`` -> median; None for a competitor that this machine lacks."""

    @property
    def microseconds(self) -> float | None:
        """DeepThin's time; None if the ratio cannot be reached."""
        return self.times.get("microseconds")

    def to_json(self) -> dict[str, Any]:
        """The row as the benchmark's file stores it.

        Returns:
            One flat mapping, the times by their columns.
        """
        mapping = asdict(self)
        times = mapping.pop("times")
        if self.n is None:
            return {name: value for name, value in mapping.items() if name != "n"} | {"microseconds": None}
        del mapping["smallest_ratio"]
        return mapping | times
