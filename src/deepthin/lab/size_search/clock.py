"""The time of a search: the budget, what is spent of it, and how long a training is going to take."""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from deepthin.errors import ConfigError
from deepthin.lab.size_search.candidate import Candidate, Result

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(budget: str | float) -> float:
    """Parse a duration.

    Args:
        budget: Seconds, or a text such as ``90s``, ``30m``, ``2h`` or ``1h30m``.

    Returns:
        Seconds, > 0.

    Raises:
        ConfigError: It is no duration, or not above 0.
    """
    text = str(budget).replace(" ", "").replace("_", "")
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if isinstance(budget, str) and parts and "".join(map("".join, parts)) == text:
        total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    elif isinstance(budget, int | float) and not isinstance(budget, bool):
        total = float(budget)
    else:
        total = 0.0
    if not 0 < total < float("inf"):
        raise ConfigError(f"The budget {budget!r} is no duration: write such as 90s, 30m, 2h or 1h30m.")
    return total


def worded(seconds: float) -> str:
    """A duration for people.

    Args:
        seconds: Its length.

    Returns:
        Such as ``45 s``, ``12 min`` or ``2.5 h``.
    """
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass
class Clock:
    """Counts the seconds of a search, those of earlier runs included.

    Attributes:
        budget: Seconds of the whole search.
        earlier: Seconds that earlier runs of the same search took.
        now: Returns the time in seconds.
    """

    budget: float
    earlier: float = 0.0
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._began = self.now()

    def spent(self) -> float:
        """Seconds so far.

        Returns:
            Those of this run and of earlier ones.
        """
        return self.earlier + self.now() - self._began

    def left(self) -> float:
        """Seconds that are left.

        Returns:
            The budget without what is spent; below 0 when that is more.
        """
        return self.budget - self.spent()


@dataclass
class Forecast:
    """Predicts the seconds of trainings from those that have ended, or that were stopped.

    Attributes:
        step_seconds: Candidate's number -> seconds of a step.
        rest: The longest time of a training beside its steps: start, evaluation and timing.
    """

    step_seconds: dict[int, float] = field(default_factory=dict[int, float])
    rest: float = 0.0

    @classmethod
    def of(cls, candidates: Iterable[Candidate]) -> "Forecast":
        """What results of earlier trainings say.

        Args:
            candidates: All candidates so far.

        Returns:
            The forecast.
        """
        forecast = cls()
        for candidate in candidates:
            for result in candidate.results.values():
                forecast.learn(candidate.number, result)
        return forecast

    def learn(self, number: int, result: Result) -> None:
        """Take the time of a training into account.

        Args:
            number: The candidate's number.
            result: Its result; one without ``step_seconds`` says nothing.
        """
        if result.step_seconds:
            self.step_seconds[number] = max(result.step_seconds, self.step_seconds.get(number, 0.0))
            self.rest = max(self.rest, result.rest_seconds)

    def seconds(self, steps: int, number: int | None = None) -> float | None:
        """How long a training is going to take.

        Args:
            steps: Number of steps.
            number: The candidate; one that has not been trained, or None, is taken to be as slow as the slowest.

        Returns:
            Seconds; None if nothing has been measured.
        """
        if not self.step_seconds:
            return None
        slowest = max(self.step_seconds.values())
        return self.rest + steps * self.step_seconds.get(-1 if number is None else number, slowest)


def highest(forecast: Forecast, lengths: Sequence[int], left: float) -> int | None:
    """The longest training that still fits, after one of each shorter length.

    Args:
        forecast: The times.
        lengths: Steps of each rung, rising.
        left: Seconds that are left.

    Returns:
        Its place in ``lengths``; the last one as long as no time is known, None if not even the first fits.
    """
    total, found = 0.0, None
    for place, steps in enumerate(lengths):
        seconds = forecast.seconds(steps)
        if seconds is None:
            return len(lengths) - 1
        total += seconds
        if total > left:
            break
        found = place
    return found


def fits(forecast: Forecast, number: int, lengths: Sequence[int], left: float) -> bool:
    """Whether a training fits in the time, and after it one of each further length.

    Args:
        forecast: The times.
        number: The candidate.
        lengths: Steps of its training, then those to come after it.
        left: Seconds that are left.

    Returns:
        True if they do, or as long as no time is known.
    """
    seconds = [forecast.seconds(steps, number) for steps in lengths]
    return left > 0 and sum(s for s in seconds if s is not None) <= left
