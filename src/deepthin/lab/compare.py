"""Compare methods: the same network, the same bytes, the same training for each.

First a search for each method, if one is asked for; then all trials; then the networks' speed. Each result is written
at once, so that an interrupted comparison resumes.
"""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepthin.errors import BudgetError, ConfigError, FormatError
from deepthin.lab.compared import ALWAYS, DENSE, INT8, SAME_SIZE, split
from deepthin.lab.calls import Resources, TrialTimeout
from deepthin.lab.engines import ENGINES, Chain, Engine, run_chains
from deepthin.lab.rows import Row, read_json, read_rows, write_rows
from deepthin.lab.run import Run, Setup, Trial
from deepthin.lab.search import Choice, Search, open_storage, search
from deepthin.lab.trial import INT8_RATIO, first_row, hold, judge, prepared, quantised, run_trial
from deepthin.storage.atomic import write_atomically
from deepthin.storage.read import inspect

LATENCY_ROUNDS, LATENCY_SECONDS = 15, 120.0  # upper bounds on the timing
_ABOUT = {"search": dict, "chosen": dict}  # types of the values in run.json
SEARCH_SEED = 1000  # seed of the search's trainings; trials have seeds from 0
Progress = Callable[[str, int, int], None]
"""Called with the name of what runs, the number of finished units, and of all."""


@dataclass(frozen=True)
class Settings:
    """What one comparison runs.

    Attributes:
        setup: What all trials share: the task, its data, steps and sizes.
        methods: Names of methods; the dense network and its 8-bit version are always added.
        ratios: Bytes of the weight matrices over those of the dense network, 0 to 1.
        seeds: Number of seeds, counted from 0.
        search: A search for each method's learning rate and allocation; None: the task's settings.
        engine: Where trials run, a key of ``ENGINES``.
        jobs: Number of trials at once.
        threads: Number of threads of each job.
        resources: What each trial needs beside its threads: cores, GPUs and memory of a cluster, and a time limit.
    """

    setup: Setup
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: int = 1
    search: Search | None = None
    engine: str = "local"
    jobs: int = 1
    threads: int = 1
    resources: Resources = Resources()


def compare(settings: Settings, out: Path, progress: Progress = lambda *_: None) -> list[Row]:
    """Run all trials that ``out`` does not hold yet; write ``results.json`` and the trained models.

    Args:
        settings: What to run.
        out: The folder of the comparison; created if missing.
        progress: Called with what runs, how far it is, and of how much.

    Returns:
        All rows, those of earlier runs included.

    Raises:
        ConfigError: ``out`` holds results of other steps, another network or other data, or a setting does not fit the
            task.
        DeepThinError: A process was killed, or a file does not hold what the trained network does.
    """
    out = out.absolute()
    run = prepared(settings.setup)
    methods = tuple(dict.fromkeys((*ALWAYS, *settings.methods)))
    about = {"task": run.task.name, "steps": run.steps, "data": run.data.about, "network": str(run.build(run.width))}
    if run.teacher is not None:
        about["teacher"] = run.teacher[0].about()
    if settings.search:
        about["search"] = asdict(settings.search)
    _check_widths(run, methods, settings.ratios)
    _check_same_run(about, out)
    results = out / "results.json"
    rows = read_rows(results) if results.exists() else []
    gone = {row.key for row in rows if not _still_there(row, out)}
    rows = [row for row in rows if row.key not in gone]
    engine = ENGINES[settings.engine](settings.jobs, replace(settings.resources, threads=settings.threads), out)
    try:
        engine.share((hold, settings.setup, run))
        choices = _search_all(settings, settings.search, methods, engine, out, progress) if settings.search else {}
        done = {row.key for row in rows}
        wanted = _trials(settings, methods, choices)
        trials = [trial for trial in wanted if trial.key not in done]
        count = [len(wanted) - len(trials), len(wanted)]
        for quantising in (False, True):  # int8 needs the file of the dense network
            chains = [
                _chain(settings, trial, out, progress, rows, count)
                for trial in trials
                if (trial.method == INT8) is quantising
            ]
            run_chains(engine, chains)
    finally:
        engine.close()
    order = {name: place for place, name in enumerate(methods)}
    rows.sort(key=lambda row: (row.seed, order.get(row.method, len(order)), -row.ratio))
    if any(row.value is not None and row.microseconds is None for row in rows):
        rows = _time_all(run, rows, out, progress)
    write_rows(rows, results)
    return rows


def _trials(settings: Settings, methods: tuple[str, ...], choices: dict[str, Choice]) -> list[Trial]:
    fixed = {DENSE: (1.0,), INT8: (INT8_RATIO,)}
    return [
        Trial(method, ratio, seed, choices.get(method))
        for seed in range(settings.seeds)
        for method in methods
        for ratio in fixed.get(method, settings.ratios)
    ]


def _chain(settings: Settings, trial: Trial, out: Path, progress: Progress, rows: list[Row], count: list[int]) -> Chain:
    """One trial; in this process its steps are told, else how many trials are done: ``count``, of how many."""
    if settings.engine == "local" and settings.jobs == 1:
        steps = prepared(settings.setup).steps
        result = yield run_trial, settings.setup, trial, out, lambda step: progress(trial.name, step, steps)
    else:
        result = yield run_trial, settings.setup, trial, out
    rows += result
    write_rows(rows, out / "results.json")
    count[0] += 1
    if settings.jobs > 1 or settings.engine != "local":
        progress("trials", *count)


def _search_all(
    settings: Settings, wanted: Search, methods: tuple[str, ...], engine: Engine, out: Path, progress: Progress
) -> dict[str, Choice]:
    """The choice for each method, and how it was found, in ``run.json``."""
    storage, run = open_storage(out / "search.db"), prepared(settings.setup)
    setup = replace(settings.setup, steps=wanted.steps)
    choices: dict[str, tuple[Choice, float | None]] = {}
    searched = [method for method in methods if method != INT8]
    told = 0

    def chain(method: str) -> Chain:
        nonlocal told
        ratio = 1.0 if method == DENSE else wanted.ratio

        def call(choice: Choice) -> Any:
            return judge, setup, Trial(method, ratio, SEARCH_SEED, choice)

        allocates = method != DENSE and split(method)[0] != SAME_SIZE
        steps = search(storage, method, run.choice(method), allocates, wanted.trials, call)
        value: float | None = None
        while True:
            try:
                value = yield steps.send(value)
            except StopIteration as end:
                choices[method] = end.value
                return
            told += 1
            progress("searching", told, wanted.trials * len(searched))

    run_chains(engine, map(chain, searched))
    chosen = {name: {**asdict(choice), "value": value} for name, (choice, value) in choices.items()}
    path = out / "run.json"
    earlier = read_json(path, dict, _ABOUT)
    whole = {**earlier, "chosen": {**earlier.get("chosen", {}), **chosen}}
    write_atomically(path, json.dumps(whole, indent=1).encode())
    return {name: choice for name, (choice, _) in choices.items()}


def _time_all(run: Run, rows: list[Row], out: Path, progress: Progress) -> list[Row]:
    """The rows with the ``microseconds`` of a single item: medians of one interleaved run, one thread each.

    The files of the first seed that has one serve for all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    example = run.task.example(run.data)
    models: dict[tuple[str, float], torch.nn.Module] = {}
    for row in rows:
        key = row.method, row.ratio
        if key not in models and row.model:
            models[key] = run.load(out / row.model, *key)
    dense = models.get((DENSE, 1.0))
    if dense is not None and any(row.method == INT8 and row.value is not None for row in rows):
        models[INT8, INT8_RATIO] = quantised(dense)
    times: dict[tuple[str, float], list[int]] = {key: [] for key in models}
    began = time.perf_counter()
    with torch.inference_mode():
        for turn in range(LATENCY_ROUNDS):
            for key, model in models.items():
                model(*example)
                start = time.perf_counter_ns()
                model(*example)
                times[key].append(time.perf_counter_ns() - start)
            progress("timing", turn + 1, LATENCY_ROUNDS)
            if time.perf_counter() - began > LATENCY_SECONDS:
                break
    torch.set_num_threads(threads)
    medians = {key: statistics.median(values) / 1000 for key, values in times.items()}
    of_dense = None if dense is None else round(medians[DENSE, 1.0], 1)
    return [
        row
        if row.value is None
        else replace(row, microseconds=round(medians[row.method, row.ratio], 1), dense_microseconds=of_dense)
        for row in rows
    ]


def searched_ratio(out: Path) -> float | None:
    """The ratio at which an earlier run searched.

    Args:
        out: The folder of the comparison.

    Returns:
        The ratio; None if no run searched there.

    Raises:
        ConfigError: ``run.json`` is damaged.
    """
    path = out / "run.json"
    ratio = read_json(path, dict, _ABOUT).get("search", {}).get("ratio") if path.exists() else None
    if ratio is not None and not isinstance(ratio, float | int):
        raise ConfigError(f"{path} is damaged (the ratio of search is no number): remove it to begin anew.")
    return ratio


def _still_there(row: Row, out: Path) -> bool:
    """Whether the model file of a trial still exists and is whole; otherwise the trial runs again."""
    if row.value is None:
        return True
    model = f"models/{DENSE}-seed{row.seed}.thin" if row.method == INT8 else row.model
    if model is None:
        return False
    bytes_ = None if row.method == INT8 else row.bytes
    return _is_whole(out / model) and (bytes_ is None or (out / model).stat().st_size == bytes_)


def _is_whole(path: Path) -> bool:
    """Whether a file's checksums match."""
    try:
        inspect(path)
    except (FormatError, OSError):
        return False
    return True


def _check_same_run(about: dict[str, Any], out: Path) -> None:
    """Results of different runs must not mix in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.json"
    begun = (out / "results.json").exists() or (out / "search.db").exists()
    earlier = read_json(path, dict, _ABOUT) if begun and path.exists() else {}
    keys = {*about, *earlier} - {"chosen"}
    changed = [
        f"{k} = {earlier.get(k)!r}, now {about.get(k)!r}" for k in sorted(keys) if earlier.get(k) != about.get(k)
    ]
    if earlier and changed:
        raise ConfigError(f"{out} holds results of another run ({'; '.join(changed)}): choose another --out.")
    write_atomically(path, json.dumps({**earlier, **about}, indent=1).encode())


def _check_widths(run: Run, methods: tuple[str, ...], ratios: tuple[float, ...]) -> None:
    """Said before the training, not after hours of it."""
    for method in methods:
        if split(method)[0] == SAME_SIZE:
            with torch.device("meta"):
                run.build(run.width + 1)
            for ratio in ratios:
                with suppress(BudgetError):  # which becomes a row
                    run.width_of(method, ratio)
