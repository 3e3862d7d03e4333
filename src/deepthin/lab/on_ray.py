"""Calls on Ray's workers: those of the cluster that RAY_ADDRESS names, else of a local one."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError, DeepThinError
from deepthin.lab.calls import GOES_ON, RETRIES, Call, Resources, died, limited

_LOOK_SECONDS = 10.0  # between two looks at the cluster, while nothing ends
_ANSWER_SECONDS = 20.0  # for the cluster's head to answer
_MISSING_SECONDS = 600.0  # without a machine that is large enough, until it is given up
_RECONNECT_SECONDS = 300  # after which Ray itself ends a process whose cluster has lost its head


@dataclass(eq=False)
class _Task:
    """A call on a worker of Ray, which may have to be begun again elsewhere."""

    call: Call
    reference: Any
    left: int = RETRIES


class Ray:
    """Ray's workers. A local cluster is started here and stopped by ``close``.

    Every worker needs the library, and the folder of the results under the same path. A call whose worker dies is
    started again ``RETRIES`` times, whatever the cluster's own rule is, which may be without end; a call whose machine
    goes away is started again as often as that happens.

    Args:
        jobs: Number of calls at once, >= 1. What the cluster has no room for waits, also for machines to come.
        resources: What each call needs.
        folder: Not used.

    Raises:
        ConfigError: Ray is not installed, or no machine of the cluster is large enough.
        DeepThinError: The cluster does not answer.
    """

    def __init__(self, jobs: int, resources: Resources, folder: Path | None = None) -> None:
        if find_spec("ray") is None:
            raise ConfigError("--engine ray needs Ray: pip install 'deepthin[ray]', or leave --engine out.")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_RECONNECT_SECONDS))
        import ray

        self.jobs, self._ray, self._resources = jobs, ray, resources
        self._shared: list[Any] = []
        self._needed = {"CPU": resources.cores, "GPU": resources.gpus, "memory": resources.memory_bytes or 0}
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:
                ray.init(**quiet)
            else:
                cores = max(int(jobs * resources.cores), 1)
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
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
        if why := self._too_small():
            ray.shutdown()
            raise ConfigError(why)
        options: dict[str, Any] = {"num_cpus": resources.cores, "num_gpus": resources.gpus}
        if resources.memory_bytes:
            options["memory"] = resources.memory_bytes
        self._remote = ray.remote(**options, max_retries=0, scheduling_strategy="SPREAD")(_on_ray)

    def share(self, call: Call) -> None:
        """Put a call into the object store, from which each worker makes it once.

        Args:
            call: A function and its arguments.
        """
        self._shared.append(self._ray.put(call))

    def start(self, call: Call) -> _Task:
        """Hand it to Ray.

        Args:
            call: A function that can be pickled, and its arguments.

        Returns:
            The task.
        """
        return _Task(call, self._submitted(call))

    def _submitted(self, call: Call) -> Any:
        # references within a list are not fetched before the call, but by a worker that lacks them
        return self._remote.remote(self._shared, self._resources.threads, self._resources.seconds, *call)

    def done(self, begun: list[_Task]) -> tuple[Any, Any]:
        """Wait for the first that ends.

        Args:
            begun: Tasks that ``start`` returned.

        Returns:
            The task, and its result or the exception that it raised.

        Raises:
            DeepThinError: The cluster's head does not answer, or no machine is large enough any more.
        """
        missing = 0.0
        while True:
            ended, _ = self._ray.wait([task.reference for task in begun], num_returns=1, timeout=_LOOK_SECONDS)
            if not ended:
                missing = 0.0 if self._some_machine_fits(self._machines()) else missing + _LOOK_SECONDS
                if missing >= _MISSING_SECONDS:
                    raise DeepThinError(
                        f"No machine of the cluster has {self._worded()} any more: add one, or use fewer "
                        f"--threads. {GOES_ON}"
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
            except self._ray.exceptions.NodeDiedError:  # no fault of the call
                task.reference = self._submitted(task.call)
            except self._ray.exceptions.RayError as error:
                if task.left == 0:
                    return task, died("Ray", error)
                task.left -= 1
                task.reference = self._submitted(task.call)

    def close(self) -> None:
        """Leave the cluster, or stop the local one."""
        self._ray.shutdown()

    def _machines(self) -> list[dict[str, float]]:
        """The resources of each machine; asked in a thread, since Ray waits without end for a head that is gone."""
        answers: list[list[dict[str, float]]] = []

        def ask() -> None:
            with suppress(Exception):  # Ray has no type of its own for what it raises then
                alive = [node for node in self._ray.nodes() if node.get("Alive")]
                answers.append([node.get("Resources", {}) for node in alive])

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ANSWER_SECONDS)
        if not answers:
            raise DeepThinError(
                f"The head of the cluster does not answer any more: start it again with `ray start --head`. {GOES_ON}"
            )
        return answers[0]

    def _some_machine_fits(self, machines: list[dict[str, float]]) -> bool:
        return any(all(machine.get(name, 0.0) >= need for name, need in self._needed.items()) for machine in machines)

    def _too_small(self) -> str | None:
        """Why no call could ever begin; None also as long as the cluster has no cores at all, but machines to come."""
        machines = self._machines()
        most = {name: max((machine.get(name, 0.0) for machine in machines), default=0.0) for name in self._needed}
        if self._some_machine_fits(machines) or most["CPU"] == 0:
            return None
        option = "--threads" if self._resources.cpus is None else "--cpus"
        for name, given, unit, limit in (
            ("CPU", f"{option} {self._needed['CPU']:g}", "cores", f"{option} {int(most['CPU'])}"),
            ("GPU", f"--gpus {self._needed['GPU']:g}", "GPUs", f"--gpus {most['GPU']:g}"),
            ("memory", f"--memory {self._needed['memory']}", "bytes", f"--memory {int(most['memory'])}"),
        ):
            if most[name] < self._needed[name]:
                return (
                    f"{given}: the largest machine of the cluster has {most[name]:.0f} {unit}, so that no trial would "
                    f"ever begin. Use {limit} or fewer."
                )
        return f"No machine of the cluster has {self._worded()} together, so that no trial would ever begin: use fewer."

    def _worded(self) -> str:
        words = [f"{self._needed['CPU']:g} cores"]
        words += [f"{self._needed['GPU']:g} GPUs"] if self._needed["GPU"] else []
        words += [f"{self._needed['memory']} bytes of memory"] if self._needed["memory"] else []
        return ", ".join(words)


_MADE: set[Any] = set()  # references of shared calls that this worker has made


def _on_ray(
    shared: list[Any], threads: int, seconds: float | None, function: Callable[..., Any], *arguments: Any
) -> Any:
    """What a worker of Ray does."""
    import torch

    torch.set_num_threads(threads)
    for reference in shared:
        if reference not in _MADE:
            import ray

            made, *given = ray.get(reference)
            made(*given)
            _MADE.add(reference)
    return limited(seconds, function, *arguments)
