"""Search the best file of a size: the call of ``deepthin search``, and of ``deepthin.torch.search``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepthin.lab.report.search_page import write_search_page
from deepthin.lab.run import Setup
from deepthin.lab.size_search.best import Best, write_best
from deepthin.lab.size_search.problem import Problem
from deepthin.lab.size_search.search import Progress, Told, run_search
from deepthin.lab.size_search.settings import Wanted
from deepthin.lab.tasks.own import Named
from deepthin.lab.teacher import Teacher


def run(
    wanted: Wanted,
    out: Path,
    command: str = "",
    told: Told = lambda *_: None,
    progress: Progress = lambda *_: None,
) -> Best:
    """Run a search, or go on with it, and write what it leaves.

    Args:
        wanted: What is searched.
        out: The folder; created if missing.
        command: The command line, for the page.
        told: Called with each result.
        progress: Called with the seconds so far, and those of the budget.

    Returns:
        The best file.

    Raises:
        ConfigError: What is wanted does not fit the task, ``out`` holds another search, or no training ended in time.
        BudgetError: No configuration reaches the size.
        DeepThinError: All trainings failed, or a process was killed.
    """
    out = out.absolute()
    problem = Problem.prepare(wanted)
    candidates, interrupted = run_search(problem, out, told, progress)
    best = write_best(problem, candidates, out, interrupted)
    write_search_page(problem, candidates, best, out, command)
    return best


def search(
    build: Named,
    fit: Named,
    evaluate: Named,
    *,
    file_bytes: int,
    budget: str | float = "2h",
    out: str | Path = "runs/search",
    microseconds: float | None = None,
    steps: int | None = None,
    also: Sequence[Named] = (),
    space: Mapping[str, Any] | str | Path | None = None,
    teacher: str | Path | Teacher | None = None,
    rounds: int | None = None,
    seed: int = 0,
    engine: str = "local",
    jobs: int = 1,
    threads: int = 1,
    told: Callable[..., None] = lambda *_: None,
) -> Best:
    """As ``deepthin.torch.search``.

    Args:
        build: Builds the dense network.
        fit: Trains it.
        evaluate: Judges it.
        file_bytes: Size of the file in bytes.
        budget: Time for the search.
        out: The folder.
        microseconds: Upper bound on the time for one item.
        steps: Steps of the longest trainings.
        also: Factories of further networks.
        space: What may be chosen.
        teacher: A trained network's file.
        rounds: Upper bound on the rounds.
        seed: Seed of the proposals and of all trainings.
        engine: Where trainings run.
        jobs: Number of trainings at once.
        threads: Number of threads of each.
        told: Called with each candidate and its result.

    Returns:
        The best file.

    Raises:
        DeepThinError: As ``deepthin.torch.search``.
    """
    taught = teacher if teacher is None or isinstance(teacher, Teacher) else Teacher(Path(teacher).absolute())
    setup = Setup("", steps=steps, own=(build, fit, evaluate), teacher=taught)
    wanted = Wanted(
        setup, file_bytes, budget, microseconds, tuple(also), space, rounds, seed, engine, jobs, threads
    )  # fmt: skip
    return run(wanted, Path(out), told=told)
