"""The same network, the same bytes, the same training: every method side by side, and what came out of it.

A trial is one method at one size with one seed. Its row and its trained model are written as soon as it ends, so that
an interrupted comparison goes on where it stopped.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
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
COMPARED = (DENSE, *METHODS, SAME_SIZE)
Progress = Callable[[str, int, int], None]
"""Told the trial, its step and its steps."""


@dataclass(frozen=True)
class Settings:
    """What one comparison is about. ``ratios`` are those of the weight matrices, biases apart."""

    task: str
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: int
    steps: int
    data: Path | None = None


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

    ConfigError if ``out`` holds results that other steps or other data gave.
    """
    task = TASKS[settings.task]
    data = task.load(settings.data)
    _check_same_run({"task": settings.task, "steps": settings.steps, "data": data.about}, out)
    results = out / "results.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    done = {Trial(row["method"], row["ratio"], row["seed"]) for row in rows}
    for trial in _trials(settings):
        if trial not in done:
            rows += _run(task, data, trial, settings.steps, out, progress)
            write_atomically(results, json.dumps(rows, indent=1).encode())
    return rows


def _trials(settings: Settings) -> list[Trial]:
    return [
        Trial(method, ratio, seed)
        for seed in range(settings.seeds)
        for method in settings.methods
        for ratio in ((1.0,) if method == DENSE else settings.ratios)
    ]


def thin_model(task: ModuleType, method: str, ratio: float, seed: int) -> nn.Module:
    """The task's network by one method, untrained, its weight matrices within ``ratio`` of the dense ones'.

    Raises BudgetError. ``task.ALLOCATION`` and ``task.OPTIONS`` hold what development data chose for each method.
    """
    torch.manual_seed(seed)
    model = task.build(_width(task, method, ratio))
    if method in METHODS:
        rule = {"method": method, **task.OPTIONS.get(method, {})}
        rules = {"model": {"ratio": ratio, "allocation": task.ALLOCATION}, "rules": {"*": rule}}
        dt.compress(model, rules, init="scratch", seed=seed)
    return model


def _width(task: ModuleType, method: str, ratio: float) -> int:
    """The dense width, except for the same-size network."""
    return dt.same_size(task.build, int(ratio * _weight_bytes(task))) if method == SAME_SIZE else task.WIDTH


def _weight_bytes(task: ModuleType) -> int:
    with torch.device("meta"):
        return sum(p.numel() * p.element_size() for p in task.build(task.WIDTH).parameters() if p.dim() > 1)


def _run(task: ModuleType, data: Any, trial: Trial, steps: int, out: Path, progress: Progress) -> list[dict[str, Any]]:
    """One row for each split that is judged; a single row without a value where the size cannot be reached.

    What is judged is the file: it is loaded into a new model, which must predict what the trained one does.
    """
    with torch.device("meta"):
        dense_bytes = sum(p.numel() * p.element_size() for p in task.build(task.WIDTH).parameters())
    row: dict[str, Any] = {"task": task.NAME, "method": trial.method, "ratio": trial.ratio, "bytes": None}
    row |= {"dense_bytes": dense_bytes, "seed": trial.seed, "split": "test", "metric": task.METRIC, "value": None}
    try:
        model = thin_model(task, trial.method, trial.ratio, trial.seed)
    except BudgetError as error:
        return [{**row, "smallest_ratio": error.smallest_bits / 8 / _weight_bytes(task)}]
    started = time.perf_counter()
    train(
        model,
        data.inputs["train"],
        data.targets["train"],
        steps=steps,
        batch=task.BATCH,
        lr=task.LEARNING_RATES.get(trial.method, task.LEARNING_RATE),
        seed=trial.seed,
        progress=lambda step: progress(trial.name, step, steps),
    )
    row |= {"seconds": round(time.perf_counter() - started, 2), "model": f"models/{trial.name}.thin"}
    (out / "models").mkdir(exist_ok=True)
    row["bytes"] = dt.save(model, out / row["model"])
    with torch.device("meta"):
        reloaded = task.build(_width(task, trial.method, trial.ratio))
    dt.load(reloaded, out / row["model"])
    rows: list[dict[str, Any]] = []
    for split in ("dev", "test"):
        predicted = predict(reloaded, data.inputs[split])
        if not torch.equal(predicted, predict(model, data.inputs[split])):
            raise DeepThinError(f"{out / row['model']} does not predict what the trained model does: please report it.")
        rows.append({**row, "split": split, "value": task.metric(predicted, data.targets[split])})
    return rows


def _check_same_run(run: dict[str, Any], out: Path) -> None:
    """Results of different runs must not mix in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.json"
    if path.exists() and (earlier := json.loads(path.read_text())) != run:
        changed = [f"{key} = {earlier.get(key)!r}, now {run[key]!r}" for key in run if earlier.get(key) != run[key]]
        raise ConfigError(f"{out} holds results of another run ({'; '.join(changed)}): choose another --out.")
    write_atomically(path, json.dumps(run, indent=1).encode())
