"""Calls as jobs of Slurm, submitted by submitit: those that begin together are one array."""

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError
from deepthin.lab.calls import RETRIES, Call, Resources, died, limited

_LOOK_SECONDS = 0.5  # between two looks at the jobs
_SPARE_MINUTES = 5  # of a job, beside the time limit of its call
_REQUEUES = 100  # of a job that is preempted


@dataclass(eq=False)
class _Job:
    """A call, and the job that makes it, once it is submitted."""

    call: Call
    job: Any = None
    left: int = RETRIES


class Slurm:
    """Jobs of Slurm; where there is no Slurm, submitit runs them as processes of this machine.

    Every job needs the library, and the data and the folder of the results under the same path. A job that Slurm
    preempts is queued again by submitit, one that dies is submitted again ``RETRIES`` times. Jobs go on when this
    process is killed; ``close`` cancels them. Slurm reads partition and account from ``SBATCH_PARTITION`` and
    ``SBATCH_ACCOUNT``.

    Args:
        jobs: Number of calls at once, >= 1.
        resources: What each call needs; with a time limit.
        folder: Folder that all machines share: scripts and logs go into ``jobs`` there.

    Raises:
        ConfigError: submitit is not installed, or the time limit is missing.
    """

    def __init__(self, jobs: int, resources: Resources, folder: Path | None = None) -> None:
        if find_spec("submitit") is None:
            raise ConfigError("--engine slurm needs submitit: pip install 'deepthin[slurm]', or leave --engine out.")
        if resources.seconds is None:
            raise ConfigError("--engine slurm needs --trial-time, such as 2h: Slurm asks how long a job may take.")
        if resources.gpus != int(resources.gpus):
            raise ConfigError(f"--gpus {resources.gpus:g}: Slurm gives whole GPUs only. Use --gpus 1.")
        self.jobs, self._resources = jobs, resources
        executor: Any = importlib.import_module("submitit").AutoExecutor(
            folder=(folder or Path()) / "jobs", slurm_max_num_timeout=_REQUEUES, local_max_num_timeout=_REQUEUES
        )
        executor.update_parameters(
            name="deepthin",
            timeout_min=math.ceil(resources.seconds / 60) + _SPARE_MINUTES,
            cpus_per_task=math.ceil(resources.cores),
            gpus_per_node=int(resources.gpus) or None,
            mem_gb=resources.memory_bytes / 2**30 if resources.memory_bytes else None,
            slurm_array_parallelism=jobs,
            slurm_additional_parameters={"requeue": True},
        )
        self._executor = executor
        self._submitted: list[_Job] = []

    def share(self, call: Call) -> None:
        """Nothing: each job is a process of its own, and reads the data from the folder that all machines share.

        Args:
            call: Not used.
        """

    def start(self, call: Call) -> _Job:
        """Note the call; it is submitted when ``done`` waits for it, with all others as one array.

        Args:
            call: A function that can be pickled, and its arguments.

        Returns:
            The job.
        """
        return _Job(call)

    def done(self, begun: list[_Job]) -> tuple[Any, Any]:
        """Wait for the first that ends.

        Args:
            begun: Jobs that ``start`` returned.

        Returns:
            The job, and its result or the exception that it raised.
        """
        while True:
            self._submit([one for one in begun if one.job is None])
            for one in begun:
                if not one.job.done():
                    continue
                try:
                    return one, one.job.result()
                except Exception as error:  # submitit's own: whatever the call raises is a result
                    if one.left == 0:
                        return one, died("Slurm", error)
                    one.left -= 1
                    one.job = None
            if all(one.job is not None for one in begun):
                time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Cancel jobs that still run."""
        for one in self._submitted:
            if one.job is not None and not one.job.done():
                one.job.cancel(check=False)

    def _submit(self, fresh: list[_Job]) -> None:
        if not fresh:
            return
        function = _Requeued(self._resources.threads, self._resources.seconds)
        for one, job in zip(fresh, self._executor.map_array(function, [one.call for one in fresh]), strict=True):
            one.job = job
        self._submitted = [one for one in self._submitted if not one.job or not one.job.done()] + fresh


@dataclass(frozen=True)
class _Requeued:
    """Makes a call in a job; one that is preempted is queued again with the same call."""

    threads: int
    seconds: float | None

    def __call__(self, call: Call) -> Any:
        """Its result, or the exception that it raised."""
        import torch

        torch.set_num_threads(self.threads)
        function: Callable[..., Any]
        function, *arguments = call
        try:
            return limited(self.seconds, function, *arguments)
        except Exception as error:
            return error

    def checkpoint(self, call: Call) -> Any:
        """What submitit queues again."""
        return importlib.import_module("submitit").helpers.DelayedSubmission(self, call)
