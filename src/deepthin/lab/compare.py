"""Compare methods: the same network, the same bytes, the same training for each.

First a search for each method, if one is asked for; then all trials; then the networks' speed. Each result is written
at once, so that an interrupted comparison resumes.
"""

import json
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from deepthin.errors import BudgetError, ConfigError, FormatError
from deepthin.lab.calls import Resources, TrialTimeout, time_over
from deepthin.lab.compared import ALWAYS, DENSE, INT8, SAME_SIZE, split
from deepthin.lab.engines import ENGINES, Chain, Engine, run_chains
from deepthin.lab.results import Results
from deepthin.lab.rows import Row, read_json
from deepthin.lab.run import Run, Setup, Trial
from deepthin.lab.search import Choice, Search, open_storage, search
from deepthin.lab.trial import INT8_RATIO, first_row, hold, judge, prepared, quantised, run_trial
from deepthin.storage.atomic import write_atomically
from deepthin.storage.read import inspect

LATENCY_ROUNDS, LATENCY_SECONDS = 15, 120.0  # upper bounds on the timing
_ABOUT = {"search": dict, "chosen": dict}  # types of the values in run.json
_LOOK_SECONDS = 0.5  # between two looks at the work of other drivers
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
        storage: Where the studies of ``search`` are: the URL of a database, or a journal file in a folder that several
            machines share; None: ``search.db`` in the folder of the comparison.
    """

    setup: Setup
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: int = 1
    search: Search | None = None
    engine: str = "local"
    jobs: int = 1
    threads: int = 1
    resources: Resources = field(default_factory=Resources)
    storage: str | None = None


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
    results = Results(out)
    results.adopt()
    again = {
        row.key for row in results.rows() if not _still_there(row, out) or _stopped(row, settings.resources.seconds)
    }
    again |= {(INT8, INT8_RATIO, seed) for method, _, seed in again if method == DENSE}
    for key in again:
        results.file(Trial(*key)).unlink(missing_ok=True)
    engine = ENGINES[settings.engine](settings.jobs, replace(settings.resources, threads=settings.threads), out)
    try:
        engine.share((hold, settings.setup, run))
        choices = _search_all(settings, settings.search, methods, engine, results, progress) if settings.search else {}
        wanted = _trials(settings, methods, choices)
        for quantising in (False, True):  # int8 needs the file of the dense network
            trials = [trial for trial in wanted if (trial.method == INT8) is quantising]
            while missing := [trial for trial in trials if not results.file(trial).exists()]:
                run_chains(engine, [_chain(settings, trial, results, progress, wanted) for trial in missing])
                if any(map(results.claimed, missing)):  # other drivers run them
                    time.sleep(_LOOK_SECONDS)
    finally:
        engine.close()
    rows = results.merge(methods)
    if any(row.value is not None and row.microseconds is None for row in rows):
        results.put(_time_all(run, rows, out, progress))
        rows = results.merge(methods)
    return rows


def _trials(settings: Settings, methods: tuple[str, ...], choices: dict[str, Choice]) -> list[Trial]:
    fixed = {DENSE: (1.0,), INT8: (INT8_RATIO,)}
    return [
        Trial(method, ratio, seed, choices.get(method))
        for seed in range(settings.seeds)
        for method in methods
        for ratio in fixed.get(method, settings.ratios)
    ]


def _chain(settings: Settings, trial: Trial, results: Results, progress: Progress, wanted: Sequence[Trial]) -> Chain:
    """One trial, unless another driver runs it; in this process its steps are told, else how many of all are done."""
    if results.file(trial).exists() or results.claimed(trial):
        return
    inline = settings.engine == "local" and settings.jobs == 1
    run = prepared(settings.setup)
    report = (lambda step: progress(trial.name, step, run.steps)) if inline else None
    try:
        yield _kept_trial, settings.setup, trial, results, report
    except TrialTimeout as error:
        results.put([replace(first_row(run, trial), failed=str(error))])
    results.merge()
    if not inline:
        progress("trials", sum(results.file(one).exists() for one in wanted), len(wanted))


def _kept_trial(setup: Setup, trial: Trial, results: Results, progress: Callable[[int], None] | None) -> None:
    """Run a trial and write its rows, so that they are kept even if the driver is gone by then."""
    held = results.claim_free(trial.name)
    if held is None:  # another process runs it
        return
    with held:
        if not results.file(trial).exists():
            results.put(run_trial(setup, trial, results.out, progress))


def _search_all(
    settings: Settings, wanted: Search, methods: tuple[str, ...], engine: Engine, results: Results, progress: Progress
) -> dict[str, Choice]:
    """The choice for each method, and how it was found, in ``run.json``."""
    path, run = results.out / "run.json", prepared(settings.setup)
    storage = open_storage(results.out / "search.db", settings.storage)
    prefix = _study(read_json(path, dict, _ABOUT)) if settings.storage else ""
    setup = replace(settings.setup, steps=wanted.steps)
    choices: dict[str, tuple[Choice, float | None]] = {}
    searched = [method for method in methods if method != INT8]
    told = 0

    def chain(method: str) -> Chain:
        held = results.claim_free(f"search-{method}")
        if held is not None:
            with held:
                yield from searching(method)

    def searching(method: str) -> Chain:
        nonlocal told
        ratio = 1.0 if method == DENSE else wanted.ratio

        def call(choice: Choice) -> Any:
            return judge, setup, Trial(method, ratio, SEARCH_SEED, choice)

        allocates = method != DENSE and split(method)[0] != SAME_SIZE
        steps = search(storage, prefix + method, run.choice(method), allocates, wanted.trials, call)
        value: float | None = None
        while True:
            try:
                call_ = steps.send(value)
            except StopIteration as end:
                choices[method] = end.value
                return
            try:
                value = yield call_
            except TrialTimeout:
                value = None
            told += 1
            progress("searching", told, wanted.trials * len(searched))

    while missing := [method for method in searched if method not in choices]:
        run_chains(engine, map(chain, missing))
        if not choices.keys() >= set(missing):  # other drivers search them
            time.sleep(_LOOK_SECONDS)
    chosen = {name: {**asdict(choice), "value": value} for name, (choice, value) in choices.items()}
    with results.claim("run.json"):
        earlier = read_json(path, dict, _ABOUT)
        whole = {**earlier, "chosen": {**earlier.get("chosen", {}), **chosen}}
        write_atomically(path, json.dumps(whole, indent=1).encode())
    return {name: choice for name, (choice, _) in choices.items()}


def _study(about: Mapping[str, Any]) -> str:
    """What the studies of a comparison are called in a storage that several may share."""
    same = {name: value for name, value in about.items() if name != "chosen"}
    return f"{about['task']}-{zlib.crc32(json.dumps(same, sort_keys=True).encode()):08x}-"


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


def _stopped(row: Row, seconds: float | None) -> bool:
    """Whether a trial was stopped after another time limit than the present one; then it runs again."""
    return bool(row.failed and "(--trial-time)" in row.failed) and row.failed != time_over(seconds)


def _is_whole(path: Path) -> bool:
    """Whether a file's checksums match."""
    try:
        inspect(path)
    except (FormatError, OSError):
        return False
    return True


def _check_same_run(about: dict[str, Any], out: Path) -> None:
    """Results of different runs must not mix in one folder."""
    with Results(out).claim("run.json"):
        _compare_about(about, out)


def _compare_about(about: dict[str, Any], out: Path) -> None:
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
