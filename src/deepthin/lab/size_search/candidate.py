"""A candidate of a search: its settings, and the results of its trainings by their number of steps."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Value = str | float | int | bool
Settings = Mapping[str, Value]
"""Name of a choice, such as ``lr`` or ``first.method``, -> its value."""


@dataclass(frozen=True)
class Result:
    """What one complete training gave.

    Attributes:
        steps: Number of its steps.
        value: The leading metric on development data, lower being better; None if it failed.
        failed: Why there is no value.
        bytes: Size of the written file.
        microseconds: Median time for one item of the network that was loaded from the file, on one thread.
        seconds: Wall time of the training, the evaluation and the timing.
        step_seconds: Of one training step.
        rest_seconds: Of what comes before the first step and after the last, but for what a process does only once.
        file: The file, relative to the folder of the search.
        development: Metric -> value on development data.
        at: Seconds of the search at which it ended.
        smallest_bytes: The smallest file that the candidate can have, if ``file_bytes`` is below it.
    """

    steps: int
    value: float | None
    failed: str | None = None
    bytes: int | None = None
    microseconds: float | None = None
    seconds: float = 0.0
    step_seconds: float = 0.0
    rest_seconds: float = 0.0
    file: str | None = None
    development: Mapping[str, float] = field(default_factory=dict[str, float])
    at: float = 0.0
    smallest_bytes: int | None = None

    def over(self, microseconds: float | None) -> float:
        """By how much the network is too slow.

        Args:
            microseconds: Upper bound on the time for one item; None: none.

        Returns:
            Microseconds above the bound, 0 if it is kept.
        """
        if microseconds is None:
            return 0.0
        return math.inf if self.microseconds is None else max(self.microseconds - microseconds, 0.0)

    def rank(self, microseconds: float | None) -> tuple[float, float]:
        """A key by which better results sort first.

        Args:
            microseconds: Upper bound on the time for one item; None: none.

        Returns:
            What exceeds the bound, and the value: infinite if it failed.
        """
        return self.over(microseconds), math.inf if self.value is None else self.value

    def to_json(self) -> dict[str, Any]:
        """Plain values.

        Returns:
            A mapping with all attributes.
        """
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """Settings that a search tries.

    Attributes:
        number: Place in the order of all candidates, from 0.
        round: The round in which it was proposed, from 0.
        place: Place in the round, from 0.
        settings: The settings.
        results: Steps -> result.
        origin: Where the settings come from: the name of a known configuration, ``"TPE"`` or ``"near"``.
    """

    number: int
    round: int
    place: int
    settings: Settings
    results: dict[int, Result] = field(default_factory=dict[int, Result])
    origin: str = ""

    def at(self, steps: int) -> Result | None:
        """The result of the training of one length.

        Args:
            steps: Number of steps.

        Returns:
            The result; None if there was no such training.
        """
        return self.results.get(steps)

    def longest(self) -> Result | None:
        """The result of the longest training.

        Returns:
            The result; None before the first.
        """
        return self.results[max(self.results)] if self.results else None
