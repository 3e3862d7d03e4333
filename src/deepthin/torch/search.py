"""``search``: the best file of a size. The search itself is ``deepthin.lab``'s, which is built on this package.

It is looked up by name when it is called: the one place where this package uses what is built on it.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

_SEARCH = "deepthin.lab.size_search.api"


def search(
    build: Callable[[], nn.Module],
    fit: Callable[[nn.Module, Any], None],
    evaluate: Callable[[nn.Module, str], float | Mapping[str, float]],
    *,
    file_bytes: int,
    budget: str | float = "2h",
    out: str | Path = "runs/search",
    microseconds: float | None = None,
    steps: int | None = None,
    also: Sequence[Callable[[], nn.Module]] = (),
    space: Mapping[str, Any] | str | Path | None = None,
    teacher: str | Path | None = None,
    rounds: int | None = None,
    seed: int = 0,
    engine: str = "local",
    jobs: int = 1,
    threads: int = 1,
    cpus: float | None = None,
    gpus: float = 0.0,
    memory: str | None = None,
    trial_time: str | float | None = None,
    storage: str | None = None,
    told: Callable[..., None] = lambda *_: None,
) -> Any:
    """Search methods, floats, ranks, rates and decay for the best file of a size, in a given time (docs/search.md).

        best = dt.search(build, fit, evaluate, file_bytes=30_000, budget="2h", out="runs/search")

    Writes ``best.thin``, ``best.toml``, ``best.json`` and ``search.html`` into ``out``. The same call goes on where an
    interrupted one stopped.

    Args:
        build: Builds the dense network, without arguments.
        fit: Trains a network: ``fit(model, training)`` calls ``training.minimise(loss)`` for each of
            ``training.batches(count, batch)``.
        evaluate: Judges a network: ``evaluate(model, split)`` returns a number for ``"dev"`` or ``"test"``, or several
            by name, the leading one first; lower is better.
        file_bytes: Size of the file in bytes.
        budget: Time for the search: seconds, or such as ``"90s"``, ``"30m"`` or ``"2h"``.
        out: The folder; created if missing.
        microseconds: Upper bound on the time for one item on one thread: slower networks are chosen only if no other
            was found.
        steps: Steps of the longest trainings; None: 1,000.
        also: Factories of further networks, such as small architectures, tried with coded weights at the same size.
        space: What may be chosen: a TOML file, or what it holds.
        teacher: The ``.thin`` file of a trained network of ``build``; learning from it is then one of the choices.
        rounds: Upper bound on the rounds of nine candidates; None: as many as fit in the time.
        seed: Seed of the proposals and of all trainings.
        engine: ``"local"``, ``"ray"`` or ``"slurm"`` (docs/distributed.md).
        jobs: Number of trainings at once. With more than one, Ray or Slurm, the functions must be importable.
        threads: Number of threads of each training.
        cpus: Cores that Ray or Slurm reserves for each training; None: as many as ``threads``.
        gpus: GPUs that Ray or Slurm reserves for each.
        memory: Memory that Ray or Slurm reserves for each, such as ``"4GB"``.
        trial_time: Time limit of each training: seconds, or such as ``"30m"``.
        storage: Where the study is, if several processes search together: a journal file in a shared folder, or the URL
            of a database; None: ``search.db`` in ``out``.
        told: Called with each candidate and its result.

    Returns:
        The best file: an object with ``file_bytes``, ``development``, ``test``, ``microseconds``, ``rules``, ``path``,
        ``command`` and more, as in ``best.json``.

    Raises:
        ConfigError: A function or option cannot be used, ``out`` holds another search, or no training ended in time.
        BudgetError: No configuration reaches ``file_bytes``; it carries the smallest possible size.
        DeepThinError: All trainings failed, or a process was killed.
    """
    return importlib.import_module(_SEARCH).search(
        (build, fit, evaluate),
        out,
        steps,
        teacher,
        told,
        file_bytes=file_bytes,
        budget=budget,
        microseconds=microseconds,
        also=tuple(also),
        space=space,
        rounds=rounds,
        seed=seed,
        engine=engine,
        jobs=jobs,
        threads=threads,
        resources=(cpus, gpus, memory, trial_time),
        storage=storage,
    )
