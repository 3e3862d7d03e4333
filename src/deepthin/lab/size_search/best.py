"""What a search leaves: the best file, its configuration, and the command that trains it longer."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepthin.torch as dt
from deepthin.lab.size_search.candidate import Candidate, Result
from deepthin.lab.size_search.configuration import to_toml
from deepthin.lab.size_search.halving import FACTOR
from deepthin.lab.size_search.problem import Problem
from deepthin.lab.size_search.space import OWN
from deepthin.lab.tasks.own import spelled
from deepthin.lab.trial import prepared
from deepthin.storage.atomic import write_atomically

FILE, CONFIGURATION, SUMMARY = "best.thin", "best.toml", "best.json"
LONGER = FACTOR  # times the steps, in the command that trains the best again


@dataclass(frozen=True)
class Best:
    """The best file of a search: the lowest development value, among those that keep the time for one item if any does.

    Attributes:
        file_bytes: Size of the file in bytes.
        development: The leading metric on development data, which chose.
        test: The leading metric on test data.
        microseconds: Time for one item on one thread.
        rules: The configuration, as ``compress`` takes it.
        metric: Name of the leading metric.
        metrics: Split -> metric -> value, for ``dev`` and ``test``.
        network: Name of the network: ``own``, or a factory of --also.
        lr: Learning rate of dense parameters.
        decay: Weight decay.
        teacher: Whether it learned from the teacher.
        steps: Steps of its training.
        seed: Seed of its training.
        trainings: Number of trainings of the search that have ended.
        keeps_microseconds: Whether the time for one item is within the bound; None without one.
        interrupted: Whether the search was interrupted from the keyboard.
        path: The file.
        command: The command that trains the configuration longer.
    """

    file_bytes: int
    development: float
    test: float
    microseconds: float
    rules: Mapping[str, Any]
    metric: str
    metrics: Mapping[str, Mapping[str, float]]
    network: str
    lr: float
    decay: float
    teacher: bool
    steps: int
    seed: int
    trainings: int
    keeps_microseconds: bool | None
    interrupted: bool
    path: Path
    command: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``best.json`` has them.

        Returns:
            All attributes; the path as text.
        """
        return {**asdict(self), "path": str(self.path)}


def chosen(candidates: Sequence[Candidate], microseconds: float | None) -> tuple[Candidate, Result]:
    """The best training.

    Args:
        candidates: All candidates, at least one of which has a value.
        microseconds: Upper bound on the time for one item; None: none.

    Returns:
        The candidate and its result with the lowest development value; of equal ones the longest training, then the
        first candidate. Those within the bound come before all others.
    """
    valued = [(c, r) for c in candidates for r in c.results.values() if r.value is not None]
    return min(valued, key=lambda pair: (*pair[1].rank(microseconds), -pair[1].steps, pair[0].number))


def write_best(problem: Problem, candidates: Sequence[Candidate], out: Path, interrupted: bool) -> Best:
    """Judge the best file on test data, and write ``best.thin``, ``best.toml`` and ``best.json``.

    Args:
        problem: What was searched.
        candidates: All candidates.
        out: The folder of the search.
        interrupted: Whether it was interrupted from the keyboard.

    Returns:
        The best file.

    Raises:
        OSError: A file cannot be written.
        FormatError: The best file has been damaged since.
    """
    bound = problem.wanted.microseconds
    candidate, result = chosen(candidates, bound)
    run = prepared(problem.setup(candidate, result.steps))
    file = out / str(result.file)
    model = dt.load(run.build(run.width), file).eval()
    test = run.task.evaluate(model, run.data, "test")
    settings, path = candidate.settings, out / FILE
    body = file.read_bytes()
    best = Best(
        file_bytes=len(body),
        development=float(next(iter(result.development.values()))),
        test=float(next(iter(test.values()))),
        microseconds=result.microseconds or 0.0,
        rules=problem.rules(candidate),
        metric=next(iter(test)),
        metrics={"dev": result.development, "test": test},
        network=str(settings["network"]),
        lr=float(settings["lr"]),
        decay=float(settings["decay"]),
        teacher=bool(settings["teacher"]),
        steps=result.steps,
        seed=problem.wanted.seed,
        trainings=sum(len(c.results) for c in candidates),
        keeps_microseconds=None if bound is None else result.over(bound) == 0,
        interrupted=interrupted,
        path=path,
        command=command(problem, candidate, LONGER * problem.run.steps, out / CONFIGURATION, out / "longer.thin"),
    )
    about = (
        f"The best of {best.trainings} trainings that deepthin search ran for {problem.run.task.name} at "
        f"{problem.wanted.file_bytes} bytes: {best.metric} {best.development:.4g}\non development data after "
        f"{best.steps} steps, in {best.file_bytes} bytes. Train it longer:\n{best.command}"
    )
    write_atomically(path, body)
    write_atomically(out / CONFIGURATION, to_toml(best.rules, about).encode())
    write_atomically(out / SUMMARY, json.dumps(best.to_dict(), indent=1).encode())
    return best


def command(problem: Problem, candidate: Candidate, steps: int, config: Path, file: Path) -> str:
    """The command that trains a candidate.

    Args:
        problem: What was searched.
        candidate: The candidate.
        steps: Number of steps.
        config: Its configuration.
        file: The file to write.

    Returns:
        A line for a shell.
    """
    setup, settings = problem.wanted.setup, candidate.settings
    network = str(settings["network"])
    factory = None if network == OWN else spelled(problem.also[network])
    words: list[Any] = ["deepthin", "train"]
    if setup.own is None:
        words += [setup.task] if factory is None else [setup.task, "--model", factory]
    else:
        own = map(spelled, setup.own)
        names = dict(zip(("--model", "--train", "--evaluate"), own, strict=True))
        names |= {} if factory is None else {"--model": factory}
        words += [word for pair in names.items() for word in pair]
    given = {"--data": setup.data, "--width": setup.width, "--depth": setup.depth, "--network": setup.network}
    if factory is not None:
        given = {"--data": setup.data}
    given |= {"--config": config, "--steps": steps, "--lr": settings["lr"], "--decay": settings["decay"] or None}
    given |= {"--seed": problem.wanted.seed or None, "--out": file}
    words += [word for option, value in given.items() if value is not None for word in (option, value)]
    if settings["teacher"] and setup.teacher is not None:
        teacher = setup.teacher
        words += ["--teacher", teacher.path, "--teacher-kind", teacher.kind, "--teacher-weight", teacher.weight]
        words += ["--temperature", teacher.temperature]
        words += [] if teacher.noise is None else ["--teacher-noise", teacher.noise.sigma]
    return shlex.join(map(str, words))
