"""Where trials run: in this process, in several on this machine, or on Ray's workers.

An engine starts work and hands back results as they come. What is to be done in what order is the business of
``run_chains``: a chain is a generator that yields a call and is sent its result, on which its next call may depend.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from typing import Any, Protocol

from deepthin.errors import ConfigError, DeepThinError

Call = tuple[Any, ...]
"""A function that can be pickled, and its arguments."""
Chain = Generator[Call, Any, None]


class Engine(Protocol):
    """Runs calls, at most ``jobs`` at once."""

    jobs: int

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
            The handle of a call that has ended, and its result or the exception that it raised.

        Raises:
            DeepThinError: The engine itself has failed: none of the calls will end.
        """
        ...

    def close(self) -> None:
        """Stop calls that still run, and free the engine's resources."""
        ...


class Inline:
    """One call after another in this process."""

    jobs = 1

    def start(self, call: Call) -> Any:
        """Note the call; it runs when ``done`` waits for it.

        Args:
            call: A function and its arguments.

        Returns:
            The call itself.
        """
        return call

    def done(self, begun: list[Any]) -> tuple[Any, Any]:
        """Run the first of the calls.

        Args:
            begun: Calls that ``start`` returned.

        Returns:
            That call, and its result or the exception that it raised.
        """
        function, *arguments = begun[0]
        try:
            return begun[0], function(*arguments)
        except Exception as error:
            return begun[0], error

    def close(self) -> None:
        """Nothing to free."""


class Processes:
    """Several processes on this machine, which end when this one does, however it ends.

    Args:
        jobs: Number of processes, >= 1.
        threads: Number of torch's threads in each.
    """

    def __init__(self, jobs: int, threads: int) -> None:
        import multiprocessing

        self.jobs = jobs
        self._pool = ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(os.getpid(), threads)
        )

    def start(self, call: Call) -> Future[Any]:
        """Submit a call to the pool.

        Args:
            call: A function that can be pickled, and its arguments.

        Returns:
            Its future.
        """
        return self._pool.submit(*call)

    def done(self, begun: list[Future[Any]]) -> tuple[Any, Any]:
        """Wait until one of the begun calls has ended.

        Args:
            begun: Futures that ``start`` returned.

        Returns:
            The future of a call that has ended, and its result or the exception that it raised.

        Raises:
            DeepThinError: A process was killed from outside, so that no call will end.
        """
        first = next(iter(wait(begun, return_when=FIRST_COMPLETED).done))
        error = first.exception()
        if isinstance(error, BrokenProcessPool):  # the pool is unusable: no other call will end
            raise DeepThinError(
                "A process was ended from outside, perhaps for want of memory: use fewer --jobs. The same command goes "
                "on where it stopped."
            ) from None
        return first, error or first.result()

    def close(self) -> None:
        """Stop the processes, whatever they do."""
        for process in list((getattr(self._pool, "_processes", None) or {}).values()):
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


class Ray:
    """Ray's workers: those of the cluster that RAY_ADDRESS names, else a local one, started here and stopped by
    ``close``.

    Every worker needs the library, and the data under the same path.

    Args:
        jobs: Number of calls at once, >= 1.
        threads: Number of torch's threads in each.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, jobs: int, threads: int) -> None:
        if find_spec("ray") is None:
            raise ConfigError("--engine ray needs Ray: pip install 'deepthin[ray]', or leave --engine out.")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
        import ray

        self.jobs, self._ray = jobs, ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(address="local", num_cpus=jobs * threads, include_dashboard=False, **quiet)
        self._remote = ray.remote(num_cpus=threads, max_retries=3)(_on_ray)
        self._threads = threads

    def start(self, call: Call) -> Any:
        """Submit a call to Ray.

        Args:
            call: A function that can be pickled, and its arguments.

        Returns:
            Ray's reference to the result.
        """
        return self._remote.remote(self._threads, *call)

    def done(self, begun: list[Any]) -> tuple[Any, Any]:
        """Wait until one of the begun calls has ended.

        Args:
            begun: References that ``start`` returned.

        Returns:
            The reference of a call that has ended, and its result or the exception that it raised.
        """
        (first, *_), _ = self._ray.wait(begun, num_returns=1)
        try:
            return first, self._ray.get(first)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            cause.__cause__ = error
            return first, cause

    def close(self) -> None:
        """Leave the cluster, or stop the local one."""
        self._ray.shutdown()


ENGINES: dict[str, Callable[[int, int], Engine]] = {
    "local": lambda jobs, threads: Inline() if jobs == 1 else Processes(jobs, threads),
    "ray": Ray,
}


def run_chains(engine: Engine, chains: Iterable[Chain]) -> None:
    """Run all chains to their ends, as many calls at once as the engine has jobs.

    Each result goes to its chain as soon as it is there. After an exception no further call begins; those that run may
    end, and their chains record them, before it is raised.

    Args:
        engine: Where the calls run.
        chains: Generators that yield calls and are sent their results.

    Raises:
        Exception: The first one that a call raised.
        DeepThinError: The engine has failed.
    """
    waiting = deque((chain, call) for chain in chains if (call := next(chain, None)) is not None)
    running: dict[Any, Chain] = {}
    failure: Exception | None = None
    while running or (waiting and failure is None):
        while waiting and failure is None and len(running) < engine.jobs:
            chain, call = waiting.popleft()
            running[engine.start(call)] = chain
        begun, result = engine.done(list(running))
        chain = running.pop(begun)
        if isinstance(result, Exception):
            failure = failure or result
            continue
        try:
            waiting.append((chain, chain.send(result)))
        except StopIteration:
            continue
    if failure is not None:
        raise failure


def _begin(parent: int, threads: int) -> None:
    """Set up a worker: its threads, no keyboard interrupts, and an exit once the parent is gone."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)

    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    import torch

    torch.set_num_threads(threads)
    return function(*arguments)
