"""One training of a candidate: train to the size, write the file, judge and time the network that is loaded from it."""

import json
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepthin.errors import BudgetError, ConfigError, NonFiniteError
from deepthin.lab.claims import claim_free
from deepthin.lab.run import Setup
from deepthin.lab.size_search.candidate import Result
from deepthin.lab.train import checkpoint_of, train_file
from deepthin.lab.trial import prepared
from deepthin.storage.atomic import write_atomically
from deepthin.storage.read import inspect

CHECKPOINTS = 5  # in a training
TIMED_CALLS, TIMED_SECONDS = 31, 5.0  # upper bounds
_SURE = 0.25  # of the steps: by then the time of the training is known
_MARGIN = 1.1  # of the prediction
_WARM = threading.Event()  # set once a process has begun a training: data are loaded then, and modules imported


@dataclass(frozen=True, eq=False)  # engines use jobs as keys
class Job:
    """A training, as an engine sends it to a worker.

    Attributes:
        setup: The task, its data, the number of steps, the network and the teacher.
        rules: The configuration.
        lr: Learning rate of dense parameters.
        decay: Weight decay.
        taught: Whether it learns from the teacher.
        seed: Seed of everything that is drawn.
        folder: The folder of the search.
        file: The file to write, relative to it.
        seconds: Time for the training; it is stopped when it would overrun.
        identity: All that the result depends on, as text.
    """

    setup: Setup
    rules: Mapping[str, Any]
    lr: float
    decay: float
    taught: bool
    seed: int
    folder: Path
    file: str
    seconds: float
    identity: str = ""

    @property
    def claim(self) -> Path:
        """What the process that trains it holds."""
        return self.folder / "locks" / f"{Path(self.file).stem}.lock"


class OutOfTime(Exception):
    """A training that would not end in time."""


class Pace:
    """Follows the steps of a training: how long each takes, and whether the training ends in time.

    Args:
        seconds: Time for the training.
        now: Returns the time in seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._until = now, now() + seconds
        self._first: tuple[int, float] | None = None  # the first step that was seen, and when
        self.last = now()
        self.step_seconds = 0.0

    @property
    def first(self) -> float:
        """When the first step was seen; now, before it."""
        return self._now() if self._first is None else self._first[1]

    def step(self, step: int, steps: int) -> None:
        """Note a step.

        Args:
            step: Number of steps so far.
            steps: Number of all steps.

        Raises:
            OutOfTime: The time is over; or, after a quarter of the steps, it will not suffice.
        """
        self.last = now = self._now()
        if self._first is None:
            self._first = step, now
        elif step > self._first[0]:
            self.step_seconds = (now - self._first[1]) / (step - self._first[0])
        rest = (steps - step) * self.step_seconds
        late = now > self._until or (step >= _SURE * steps and now + rest / _MARGIN > self._until)
        if late and step < steps:
            raise OutOfTime


def train_candidate(job: Job, progress: Callable[[int, int], None] | None = None) -> Result | None:
    """Train, write, load, judge and time one network, unless that was done before: the result has a file of its own.

    A training that was interrupted goes on from its last checkpoint.

    Args:
        job: What to train.
        progress: Called after each step with the number of steps so far and of all steps.

    Returns:
        The result; without a value and without ``failed`` where the training was stopped because of the time. None if
        another process trains it now.

    Raises:
        ConfigError: The task cannot be trained so.
        DeepThinError: The file does not hold what the trained network does.
    """
    held = claim_free(job.claim)
    if held is None:
        return None
    with held:
        kept = (job.folder / job.file).with_suffix(".json")
        if (earlier := _read(kept, job.identity)) is not None:
            return earlier
        result = _trained(job, progress)
        if result.value is not None or result.failed is not None:
            write_atomically(kept, json.dumps({"identity": job.identity, "result": result.to_json()}).encode())
    return result


def _read(path: Path, identity: str) -> Result | None:
    """The result that a file has; None without one of the same identity."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Result(**stored["result"]) if stored["identity"] == identity else None
    except (OSError, ValueError, TypeError, KeyError):  # missing, or of no use: it is trained again
        return None


def _trained(job: Job, progress: Callable[[int, int], None] | None) -> Result:
    began, warm = time.monotonic(), _WARM.is_set()
    _WARM.set()
    run = prepared(job.setup)
    if not job.taught:
        run = replace(run, teacher=None)
    pace, path, steps = Pace(job.seconds), job.folder / job.file, run.steps
    path.parent.mkdir(parents=True, exist_ok=True)

    def tick(step: int, steps: int) -> None:
        if progress is not None:
            progress(step, steps)
        pace.step(step, steps)

    def result(**more: Any) -> Result:
        now = time.monotonic()
        rest = now - pace.last + (pace.first - began if warm else 0.0)
        times = {"seconds": now - began, "step_seconds": pace.step_seconds, "rest_seconds": rest}
        return Result(**{"steps": steps, "value": None, **times, **more})

    try:
        every = max(steps // CHECKPOINTS, 1)
        loaded = train_file(run, job.rules, path, job.lr, job.seed, tick, every, job.decay)
        metrics = run.task.evaluate(loaded, run.data, "dev")
        value = float(next(iter(metrics.values())))
        if not math.isfinite(value):
            raise NonFiniteError(f"The {next(iter(metrics))} on development data is {value}.")
    except OutOfTime:
        return result()
    except (NonFiniteError, BudgetError) as error:
        checkpoint_of(path).unlink(missing_ok=True)
        smallest = -(-error.smallest_bits // 8) if isinstance(error, BudgetError) else None
        return result(failed=str(error), smallest_bytes=smallest)
    return result(
        value=value,
        bytes=inspect(path).total_bytes,
        microseconds=microseconds_of(loaded, run.task.example(run.data)),
        file=job.file,
        development=metrics,
    )


def microseconds_of(model: nn.Module, example: tuple[Any, ...]) -> float:
    """How long a network takes for one item, on one thread.

    Args:
        model: The network, in evaluation.
        example: Its arguments for one item.

    Returns:
        The median of up to 31 calls, in microseconds.

    Raises:
        ConfigError: The network cannot be called so.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: list[int] = []
    began = time.monotonic()
    try:
        with torch.inference_mode():
            model(*example)
            while len(times) < TIMED_CALLS and (not times or time.monotonic() - began < TIMED_SECONDS):
                start = time.perf_counter_ns()
                model(*example)
                times.append(time.perf_counter_ns() - start)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"The network cannot be called with one item of the task: {error}.") from error
    finally:
        torch.set_num_threads(threads)
    return round(statistics.median(times) / 1000, 1)
