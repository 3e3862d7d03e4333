"""Where trials run: in this process, in several on this machine, on Ray's workers, or as jobs of Slurm.

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
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError, DeepThinError
from deepthin.lab.calls import GOES_ON, Call, Engine, Resources, TrialTimeout, limited
from deepthin.lab.on_ray import Ray
from deepthin.lab.on_slurm import Slurm

Chain = Generator[Call, Any, None]


class Inline:
    """One call after another in this process.

    Args:
        seconds: Time limit of a call; None: none.
    """

    jobs = 1

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds

    def share(self, call: Call) -> None:
        """Nothing: this process has made it.

        Args:
            call: Not used.
        """

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
        try:
            return begun[0], limited(self._seconds, *begun[0])
        except Exception as error:
            return begun[0], error

    def close(self) -> None:
        """Nothing to free."""


class Processes:
    """Several processes on this machine, which end when this one does, however it ends.

    Args:
        jobs: Number of processes, >= 1.
        threads: Number of torch's threads in each.
        seconds: Time limit of a call; None: none.
    """

    def __init__(self, jobs: int, threads: int, seconds: float | None = None) -> None:
        import multiprocessing

        self.jobs, self._seconds = jobs, seconds
        self._pool = ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(os.getpid(), threads)
        )

    def share(self, call: Call) -> None:
        """Nothing: each process reads the data of this machine.

        Args:
            call: Not used.
        """

    def start(self, call: Call) -> Future[Any]:
        """Submit a call to the pool.

        Args:
            call: A function that can be pickled, and its arguments.

        Returns:
            Its future.
        """
        return self._pool.submit(limited, self._seconds, *call)

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
                f"A process was ended from outside, perhaps for want of memory: use fewer --jobs. {GOES_ON}"
            ) from None
        return first, error or first.result()

    def close(self) -> None:
        """Stop the processes, whatever they do."""
        for process in list((getattr(self._pool, "_processes", None) or {}).values()):
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _local(jobs: int, resources: Resources, folder: Path) -> Engine:
    if resources.cpus is not None or resources.gpus or resources.memory_bytes:
        raise ConfigError(
            "--cpus, --gpus and --memory reserve parts of a cluster: leave them out, or use --engine ray or slurm."
        )
    return Inline(resources.seconds) if jobs == 1 else Processes(jobs, resources.threads, resources.seconds)


ENGINES: dict[str, Callable[[int, Resources, Path], Engine]] = {"local": _local, "ray": Ray, "slurm": Slurm}
"""Name -> what makes an engine: the number of calls at once, what each needs, the folder of the results."""


def run_chains(engine: Engine, chains: Iterable[Chain]) -> None:
    """Run all chains to their ends, as many calls at once as the engine has jobs.

    Each result goes to its chain as soon as it is there. After an exception no further call begins; those that run may
    end, and their chains record them, before it is raised. A chain begins when there is a job for it: one that ends
    without a call has nothing to do. A call that took too long raises ``TrialTimeout`` in its chain.

    Args:
        engine: Where the calls run.
        chains: Generators that yield calls and are sent their results.

    Raises:
        Exception: The first one that a call raised.
        DeepThinError: The engine has failed.
    """
    waiting: deque[tuple[Chain, Call | None]] = deque((chain, None) for chain in chains)  # None: it has yet to begin
    running: dict[Any, Chain] = {}
    failure: Exception | None = None
    while running or (waiting and failure is None):
        while waiting and failure is None and len(running) < engine.jobs:
            chain, call = waiting.popleft()
            if call is not None or (call := next(chain, None)) is not None:
                running[engine.start(call)] = chain
        if not running:
            continue
        begun, result = engine.done(list(running))
        chain = running.pop(begun)
        if isinstance(result, Exception) and not isinstance(result, TrialTimeout):
            failure = failure or result
            continue
        try:
            call = chain.throw(result) if isinstance(result, TrialTimeout) else chain.send(result)
            waiting.append((chain, call))
        except StopIteration:
            continue
        except TrialTimeout as error:
            failure = failure or error
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
