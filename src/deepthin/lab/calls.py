"""Calls that an engine runs, what each of them needs, and how long it may take."""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from deepthin.errors import ConfigError, DeepThinError
from deepthin.lab.size_search.clock import seconds_of

RETRIES = 3  # of a call whose worker died
GOES_ON = "What is done is kept; the same command goes on where it stopped."
_REPEATED_SECONDS = 1.0  # between two attempts to stop a call

_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Call = tuple[Any, ...]
"""A function that can be pickled, and its arguments."""


class TrialTimeout(DeepThinError):
    """A call that took longer than its time limit."""


def time_over(seconds: float | None) -> str:
    """Why a call was stopped.

    Args:
        seconds: Its time limit; None: none.

    Returns:
        The message.
    """
    return f"It was stopped after the time limit of {seconds or 0:g} s (--trial-time)."


@dataclass(frozen=True)
class Resources:
    """What one call needs.

    Attributes:
        threads: Number of torch's threads.
        cpus: Cores that a cluster reserves; None: as many as ``threads``.
        gpus: GPUs that a cluster reserves; Ray also takes fractions.
        memory_bytes: Memory that a cluster reserves; None: not counted.
        seconds: Time limit; None: none.
    """

    threads: int = 1
    cpus: float | None = None
    gpus: float = 0.0
    memory_bytes: int | None = None
    seconds: float | None = None

    @property
    def cores(self) -> float:
        """Cores to reserve."""
        return self.threads if self.cpus is None else self.cpus


def resources_of(
    cpus: float | None = None, gpus: float = 0.0, memory: str | None = None, trial_time: str | float | None = None
) -> Resources:
    """What each trial needs, as users write it.

    Args:
        cpus: Cores that a cluster reserves; None: as many as threads.
        gpus: GPUs that a cluster reserves.
        memory: Memory that a cluster reserves, such as ``500MB`` or ``4GB``.
        trial_time: Time limit: seconds, or such as ``90s`` or ``2h``.

    Returns:
        The resources.

    Raises:
        ConfigError: ``memory`` is no size, or ``trial_time`` no duration.
    """
    bytes_ = None
    if memory is not None:
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", memory.strip().upper())
        if not parts or not float(parts[1]):
            raise ConfigError(f"--memory {memory!r} is no size: write such as 500MB or 4GB.")
        bytes_ = int(float(parts[1]) * _BYTES.get(parts[2], 1))
    return Resources(
        cpus=cpus, gpus=gpus, memory_bytes=bytes_, seconds=None if trial_time is None else seconds_of(trial_time)
    )


class Engine(Protocol):
    """Runs calls, at most ``jobs`` at once."""

    jobs: int

    def share(self, call: Call) -> None:
        """Have a call made once in each worker on another machine, before its first one.

        Args:
            call: A function, and arguments that are sent to each machine once, such as data.
        """
        ...

    def start(self, call: Call) -> Any:
        """Begin a call.

        Args:
            call: A function that can be pickled, and its arguments.

        Returns:
            A handle, which ``done`` takes.
        """
        ...

    def done(self, begun: list[Any]) -> tuple[Any, Any]:
        """Wait until one of the begun calls has ended.

        Args:
            begun: Handles that ``start`` returned.

        Returns:
            The handle of a call that has ended, and its result or the exception that it raised: ``TrialTimeout`` if it
            took too long.

        Raises:
            DeepThinError: The engine itself has failed: none of the calls will end.
        """
        ...

    def close(self) -> None:
        """Stop calls that still run, and free the engine's resources."""
        ...


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Stop a block that takes too long: in the main thread, between two instructions of Python.

    Args:
        seconds: The limit; None: none.

    Raises:
        TrialTimeout: The block took longer.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    armed = True

    def stop(*_: Any) -> None:
        if armed:
            raise TrialTimeout(time_over(seconds))

    earlier = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _REPEATED_SECONDS)  # again: the block may catch the first
        try:
            yield
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def limited(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Make a call within a time limit.

    Args:
        seconds: The limit; None: none.
        function: The function.
        *arguments: Its arguments.

    Returns:
        Its result.

    Raises:
        TrialTimeout: It took longer.
    """
    with time_limit(seconds):
        return function(*arguments)


def died(what: str, error: Exception) -> DeepThinError:
    """Why a worker ended each time that a call was begun.

    Args:
        what: Whose worker: ``"Ray"`` or ``"Slurm"``.
        error: What the engine knows of it.

    Returns:
        The error with the ways out.
    """
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    memory = "memory" in f"{type(error).__name__} {error}".lower()
    why = "for want of memory" if memory else "perhaps for want of memory"
    return DeepThinError(
        f"A worker of {what} died {RETRIES + 1} times in the same trial, {why} ({type(error).__name__}: {reason}). Use "
        f"fewer --jobs, more --threads for each, or machines with more memory. {GOES_ON}"
    )
