"""Search the best file of a size: the call of ``deepthin search``, and of ``deepthin.torch.search``."""

from pathlib import Path
from typing import Any

from deepthin.lab.calls import resources_of
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
    three: tuple[Named, Named, Named],
    out: str | Path,
    steps: int | None,
    teacher: str | Path | None,
    told: Told,
    resources: tuple[float | None, float, str | None, str | float | None] = (None, 0.0, None, None),
    **wanted: Any,
) -> Best:
    """What ``deepthin.torch.search`` calls.

    Args:
        three: The user's factory, training and evaluation.
        out: The folder.
        steps: Steps of the longest trainings; None: 1,000.
        teacher: The file of a trained network.
        told: Called with each result.
        resources: The arguments of ``resources_of``.
        **wanted: Fields of ``Wanted``.

    Returns:
        The best file.

    Raises:
        DeepThinError: As ``run``.
    """
    taught = None if teacher is None else Teacher(Path(teacher).absolute())
    setup = Setup("", steps=steps, own=three, teacher=taught)
    return run(Wanted(setup, resources=resources_of(*resources), **wanted), Path(out), told=told)
