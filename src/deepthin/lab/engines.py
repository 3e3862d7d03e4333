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
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from deepthin.errors import ConfigError, DeepThinError

RETRIES = 3  # of a call whose worker died
_LOOK_SECONDS = 10.0  # between two looks at the cluster, while nothing ends
_MISSING_SECONDS = 60.0  # without a machine that is large enough, until it is given up
_GOES_ON = "What is done is kept; the same command goes on where it stopped."

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


@dataclass(eq=False)
class _Task:
    """A call on a worker of Ray, which may have to be begun again elsewhere."""

    call: Call
    reference: Any
    left: int = RETRIES


class Ray:
    """Ray's workers: those of the cluster that RAY_ADDRESS names, else a local one, started here and stopped by
    ``close``.

    Every worker needs the library, and the data under the same path. A call whose worker dies is started again
    ``RETRIES`` times, whatever the cluster's own rule is, which may be without end.

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

        self.jobs, self._ray, self._threads = jobs, ray, threads
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:
                ray.init(**quiet)
            else:
                ray.init(address="local", num_cpus=jobs * threads, include_dashboard=False, **quiet)
        except Exception as error:  # Ray has no type of its own for what keeps it from starting
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            ray.shutdown()
            raise DeepThinError(
                f"No cluster answers at RAY_ADDRESS = {address} ({reason}): start it with `ray start --head`, or unset "
                "RAY_ADDRESS, so that workers are started here."
                if address
                else f"Ray did not start here ({reason}). Ask for fewer --jobs, or leave --engine out, which needs no "
                "Ray. The same command goes on where it stopped."
            ) from None
        if (most := self._most_cores()) < threads:
            ray.shutdown()
            raise ConfigError(
                f"--threads {threads}: the largest machine of the cluster has {most} cores, so that no trial would "
                f"ever begin. Use --threads {max(most, 1)} or fewer."
            )
        self._remote = ray.remote(num_cpus=threads, max_retries=0)(_on_ray)

    def start(self, call: Call) -> _Task:
        """Hand it to Ray."""
        return _Task(call, self._remote.remote(self._threads, *call))

    def done(self, begun: list[_Task]) -> tuple[Any, Any]:
        """The first that ends."""
        missing = 0.0
        while True:
            ended, _ = self._ray.wait([task.reference for task in begun], num_returns=1, timeout=_LOOK_SECONDS)
            if not ended:  # whether it ever can
                missing = missing + _LOOK_SECONDS if self._most_cores() < self._threads else 0.0
                if missing >= _MISSING_SECONDS:
                    raise DeepThinError(
                        f"No machine of the cluster has {self._threads} cores any more: add one, or use fewer "
                        f"--threads. {_GOES_ON}"
                    )
                continue
            task = next(task for task in begun if task.reference == ended[0])
            try:
                return task, self._ray.get(task.reference)
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                if cause is not error:
                    cause.__cause__ = error
                return task, cause
            except self._ray.exceptions.RayError as error:
                if task.left == 0:
                    return task, _died(error)
                task.left -= 1
                task.reference = self._remote.remote(self._threads, *task.call)

    def close(self) -> None:
        """Leave the cluster, or stop the local one."""
        self._ray.shutdown()

    def _most_cores(self) -> int:
        """Of the largest machine of the cluster."""
        alive = [node for node in self._ray.nodes() if node.get("Alive")]
        return max((int(node.get("Resources", {}).get("CPU", 0)) for node in alive), default=0)


def _died(error: Exception) -> DeepThinError:
    """Why a worker ended each time that a call was begun."""
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    memory = "memory" in f"{type(error).__name__} {error}".lower()
    why = "for want of memory" if memory else "perhaps for want of memory"
    return DeepThinError(
        f"A worker of Ray died {RETRIES + 1} times in the same trial, {why} ({type(error).__name__}: {reason}). Use "
        f"fewer --jobs, more --threads for each, or machines with more memory. {_GOES_ON}"
    )


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
