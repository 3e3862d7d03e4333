"""What a user asks a search for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError
from deepthin.lab.calls import Resources
from deepthin.lab.run import Setup
from deepthin.lab.size_search.clock import seconds_of
from deepthin.lab.size_search.halving import LEAST_STEPS
from deepthin.lab.tasks.own import Named


@dataclass(frozen=True)
class Wanted:
    """A size, a time, and what may be tried.

    Attributes:
        setup: The task or the user's own functions, the data, the steps of the longest trainings, and a teacher.
        file_bytes: Size of the file in bytes.
        budget: Time for the search: seconds, or such as ``30m`` or ``2h``.
        microseconds: Upper bound on the time for one item on one thread; None: none.
        also: Factories of further networks, tried with coded weights.
        space: The user's file, or what it holds, that fixes or widens what is chosen.
        rounds: Upper bound on the rounds; None: as many as fit in the time.
        seed: Seed of the proposals and of all trainings.
        engine: Where trainings run, a key of ``ENGINES``.
        jobs: Number of trainings at once.
        threads: Number of threads of each.
        resources: What each training needs beside its threads: cores, GPUs and memory of a cluster, and a time limit.
        storage: Where the study is: the URL of a database, or a journal file in a folder that several machines share;
            None: ``search.db`` in the folder of the search.
        least_steps: Steps of the shortest training, at least.

    Raises:
        ConfigError: A value is out of range.
    """

    setup: Setup
    file_bytes: int
    budget: str | float = "2h"
    microseconds: float | None = None
    also: tuple[Named, ...] = ()
    space: Mapping[str, Any] | str | Path | None = None
    rounds: int | None = None
    seed: int = 0
    engine: str = "local"
    jobs: int = 1
    threads: int = 1
    resources: Resources = field(default_factory=Resources)
    storage: str | None = None
    least_steps: int = LEAST_STEPS

    def __post_init__(self) -> None:
        """Refuse values out of range with ConfigError."""
        seconds_of(self.budget)
        if type(self.file_bytes) is not int or self.file_bytes < 1:
            raise ConfigError(f"file_bytes = {self.file_bytes!r} must be a whole number of bytes, such as 30_000.")
        if self.microseconds is not None and not 0 < self.microseconds < float("inf"):
            raise ConfigError(f"microseconds = {self.microseconds!r} must be above 0: the time for one item.")
        if self.rounds is not None and self.rounds < 1:
            raise ConfigError(f"rounds = {self.rounds!r} must be 1 or more.")
        if self.setup.steps is not None and self.setup.steps < 1:
            raise ConfigError(f"steps = {self.setup.steps!r} must be 1 or more.")
