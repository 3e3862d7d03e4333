"""The same network, the same bytes, the same training: every method side by side, and what came out of it.

A trial is one method at one size with one seed. Its row and its trained model are written as soon as it ends, so that
an interrupted comparison goes on where it stopped.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.method import BudgetError, ConfigError, DeepThinError
from deepthin.methods import METHODS
from deepthin.storage import write_atomically
from deepthin.tasks import TASKS
from deepthin.tasks.training import predict, train

DENSE, SAME_SIZE = "dense", "same-size"
ROUNDED = re.compile(r"(.+)-(\d+)bit")  # a method whose floats are then stored in so many bits: deepthin-8bit
COMPARED = (
    DENSE,
    *METHODS,
    SAME_SIZE,
    *(f"{name}-{bits}bit" for bits in (8, 4) for name in METHODS if name != "uniform"),
)
PRUNED_OVER = 0.02, 0.15  # shares of the steps between which pruning rises; then the layers are thin, and trained on
PRUNED_EVERY = 10  # steps
Progress = Callable[[str, int, int], None]
"""Told the trial, its step and its steps."""


@dataclass(frozen=True)
class Settings:
    """What one comparison is about. ``ratios`` are those of the weight matrices; None is the task's own default."""

    task: str
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: int
    steps: int | None = None
    data: Path | None = None
    width: int | None = None
    depth: int | None = None


@dataclass(frozen=True)
class Run:
    """A task with its data, and the network and steps that all trials share."""

    task: ModuleType
    data: Any
    steps: int
    width: int
    build: Callable[[int], nn.Module]  # width -> the dense network

    @classmethod
    def prepare(cls, settings: Settings) -> "Run":
        """Load the task's data; ConfigError for a depth where the task's network has none to choose."""
        task = TASKS[settings.task]
        if settings.depth is not None and task.DEPTH is None:
            raise ConfigError(f"The network of {settings.task} has a fixed depth: leave out --depth.")
        data = task.load(settings.data)
        depth = {} if task.DEPTH is None else {"depth": settings.depth or task.DEPTH}
        build = partial(task.build, data, **depth)
        return cls(task, data, settings.steps or task.DEFAULT_STEPS, settings.width or task.WIDTH, build)

    def weight_bytes(self) -> int:
        """Of the dense network's matrices."""
        with torch.device("meta"):
            return sum(p.numel() * p.element_size() for p in self.build(self.width).parameters() if p.dim() > 1)

    def width_of(self, method: str, ratio: float) -> int:
        """The dense width, except for the same-size network."""
        return dt.same_size(self.build, int(ratio * self.weight_bytes())) if method == SAME_SIZE else self.width

    def model(self, method: str, ratio: float, seed: int) -> tuple[nn.Module, dt.Twist | None]:
        """The network by one method, untrained, its weight matrices within ``ratio`` of the dense ones'.

        Pruning starts from dense weights, which the second result makes thin on the way. Raises BudgetError.
        """
        torch.manual_seed(seed)
        model = self.build(self.width_of(method, ratio))
        if method in (DENSE, SAME_SIZE):
            return model, None
        rules = self.rules(method, ratio)
        if method.startswith("pruned"):
            start, end = (int(share * self.steps) for share in PRUNED_OVER)
            return model, dt.Twist(model, rules, every=PRUNED_EVERY, schedule=dt.Rising(start, max(end, start + 1)))
        dt.compress(model, rules, init="scratch", seed=seed)
        return model, None

    def rules(self, method: str, ratio: float) -> dict[str, Any]:
        """``task.ALLOCATION`` and ``task.OPTIONS`` hold what development data chose for each method."""
        rounded = ROUNDED.fullmatch(method)
        outer = rounded[1] if rounded else method
        rule = {"method": outer, **self.task.OPTIONS.get(method, self.task.OPTIONS.get(outer, {}))}
        if rounded:
            rule["then"] = {"method": "uniform", "bits": int(rounded[2])}
        return {"model": {"ratio": ratio, "allocation": self.task.ALLOCATION}, "rules": {"*": rule}}


@dataclass(frozen=True)
class Trial:
    """One method at one size with one seed."""

    method: str
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        """For files: ``deepthin-0.02-seed0``."""
        return (
            f"{self.method}-seed{self.seed}"
            if self.method == DENSE
            else f"{self.method}-{self.ratio:g}-seed{self.seed}"
        )


def compare(settings: Settings, out: Path, progress: Progress = lambda *_: None) -> list[dict[str, Any]]:
    """Run all trials that ``out`` does not hold yet, write ``results.json`` and the trained models, return all rows.

    ConfigError if ``out`` holds results that other steps, another network or other data gave.
    """
    run = Run.prepare(settings)
    shape = str(run.build(run.width))
    about = {"task": settings.task, "steps": run.steps, "data": run.data.about, "network": shape}
    _check_same_run(about, out)
    results = out / "results.json"
    rows: list[dict[str, Any]] = _read(results, list) if results.exists() else []
    done = {Trial(row["method"], row["ratio"], row["seed"]) for row in rows}
    for trial in _trials(settings):
        if trial not in done:
            rows += _run(run, trial, out, progress)
            write_atomically(results, json.dumps(rows, indent=1).encode())
    return rows


def _trials(settings: Settings) -> list[Trial]:
    return [
        Trial(method, ratio, seed)
        for seed in range(settings.seeds)
        for method in settings.methods
        for ratio in ((1.0,) if method == DENSE else settings.ratios)
    ]


def _run(run: Run, trial: Trial, out: Path, progress: Progress) -> list[dict[str, Any]]:
    """One row for each split that is judged; a single row without a value where the size cannot be reached.

    What is judged is the file: it is loaded into a new model, which must predict what the trained one does.
    """
    task, data = run.task, run.data
    with torch.device("meta"):
        dense_bytes = sum(p.numel() * p.element_size() for p in run.build(run.width).parameters())
    row: dict[str, Any] = {"task": task.NAME, "method": trial.method, "ratio": trial.ratio, "bytes": None}
    row |= {"dense_bytes": dense_bytes, "seed": trial.seed, "split": "test", "metric": task.METRIC, "value": None}
    try:
        model, twist = run.model(trial.method, trial.ratio, trial.seed)
    except BudgetError as error:
        return [{**row, "smallest_ratio": error.smallest_bits / 8 / run.weight_bytes()}]
    started = time.perf_counter()
    train(
        model,
        data.inputs["train"],
        data.targets["train"],
        steps=run.steps,
        batch=task.BATCH,
        lr=task.LEARNING_RATES.get(trial.method, task.LEARNING_RATE),
        seed=trial.seed,
        progress=lambda step: progress(trial.name, step, run.steps),
        judge=lambda: task.metric(predict(model, data.inputs["dev"]), data.targets["dev"]),
        judgments=task.JUDGMENTS,
        twist=twist,
        thin_from=PRUNED_OVER[1],
    )
    row |= {"seconds": round(time.perf_counter() - started, 2), "model": f"models/{trial.name}.thin"}
    (out / "models").mkdir(exist_ok=True)
    row["bytes"] = dt.save(model, out / row["model"])
    with torch.device("meta"):
        reloaded = run.build(run.width_of(trial.method, trial.ratio))
    dt.load(reloaded, out / row["model"])
    rows: list[dict[str, Any]] = []
    for split in ("dev", "test"):
        predicted = predict(reloaded, data.inputs[split])
        if not torch.equal(predicted, predict(model, data.inputs[split])):
            raise DeepThinError(f"{out / row['model']} does not predict what the trained model does: please report it.")
        rows.append({**row, "split": split, "value": task.metric(predicted, data.targets[split])})
    return rows


def _read(path: Path, kind: type) -> Any:
    """What an earlier run wrote; ConfigError if it is damaged."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it to begin anew.") from None
    if not isinstance(found, kind):
        raise ConfigError(f"{path} is damaged (it holds no {kind.__name__}): remove it to begin anew.")
    return found


def _check_same_run(run: dict[str, Any], out: Path) -> None:
    """Results of different runs must not mix in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.json"
    if path.exists() and (earlier := _read(path, dict)) != run:
        changed = [f"{key} = {earlier.get(key)!r}, now {run[key]!r}" for key in run if earlier.get(key) != run[key]]
        raise ConfigError(f"{out} holds results of another run ({'; '.join(changed)}): choose another --out.")
    write_atomically(path, json.dumps(run, indent=1).encode())
