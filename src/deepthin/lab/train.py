"""One network, one configuration, one file: trained thin from the start, or dense first and then by ``[stages]``."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.errors import ConfigError, DeepThinError
from deepthin.lab.checkpoint import Checkpoint
from deepthin.lab.run import Run, Setup, seeded
from deepthin.lab.tasks.training import Training
from deepthin.lab.trial import alike, prepared
from deepthin.plan.parse import parse_rules
from deepthin.plan.rules import Rules
from deepthin.storage.read import inspect
from deepthin.storage.report import Report

CHECKPOINTS = 50  # in a training, at most


@dataclass(frozen=True)
class Trained:
    """The result of one training: the written file, judged after loading it again.

    Attributes:
        report: Sizes of the file.
        values: Split -> metric -> value, for ``dev`` and ``test``.
        lr: Learning rate of dense parameters.
        steps: Number of training steps.
        seconds: Wall time of the training and the evaluation.
    """

    report: Report
    values: Mapping[str, Mapping[str, float]]  # split -> metric -> value
    lr: float
    steps: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON.

        Returns:
            ``values``, ``bytes``, ``dense_bytes``, the report's ``rows``, ``lr``, ``steps`` and ``seconds``.
        """
        rows = [row.to_dict() for row in self.report.rows]
        sizes = {"bytes": self.report.total_bytes, "dense_bytes": self.report.dense_bytes, "rows": rows}
        return {"values": self.values, **sizes, "lr": self.lr, "steps": self.steps, "seconds": self.seconds}


def train(
    setup: Setup,
    rules: Mapping[str, Any] | str | Path | Rules,
    path: Path,
    lr: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda step, steps: None,
    checkpoint: int | None = None,
    decay: float = 0.0,
) -> Trained:
    """Train the network of a task, or the user's own, by a configuration, and write it to a file.

    With ``[stages]`` the network is dense at first (``deepthin.torch.Recipe``), else thin from scratch. The file is
    loaded into a new model, and that is judged. Checkpoints are saved beside the file until it exists: the same call
    continues from the last one, to the same bytes, however the call before ended.

    Args:
        setup: The task, its data, steps and sizes.
        rules: The configuration: a mapping, a path to a TOML file, or parsed rules.
        path: The ``.thin`` file to write.
        lr: Learning rate of dense parameters, > 0; None: the task's.
        seed: Seed of the start, the batches and everything else that is drawn.
        progress: Called after each step with the number of steps so far and of all steps.
        checkpoint: Steps between two checkpoints; None: a fiftieth of all.
        decay: AdamW's weight decay of matrices and codes, >= 0.

    Returns:
        The sizes of the file, and the metrics of the network in it.

    Raises:
        ConfigError: The configuration or the setup is invalid; before anything is trained.
        BudgetError: The size cannot be reached; before anything is trained.
        NonFiniteError: The training diverged.
        DeepThinError: The file does not hold what the trained network does.
        OSError: The file cannot be written.
    """
    run, started = prepared(setup), time.perf_counter()
    rate: float = run.task.learning_rate if lr is None else lr
    loaded = train_file(run, rules, path, rate, seed, progress, checkpoint, decay)
    values = {split: run.task.evaluate(loaded, run.data, split) for split in ("dev", "test")}
    return Trained(inspect(path), values, rate, run.steps, round(time.perf_counter() - started, 1))


def train_file(
    run: Run,
    rules: Mapping[str, Any] | str | Path | Rules,
    path: Path,
    lr: float,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda step, steps: None,
    checkpoint: int | None = None,
    decay: float = 0.0,
) -> nn.Module:
    """Train and write as ``train`` does, without evaluating.

    Args:
        run: The task with its data, network, steps and teacher.
        rules: The configuration.
        path: The ``.thin`` file to write.
        lr: Learning rate of dense parameters, > 0.
        seed: Seed of everything that is drawn.
        progress: Called after each step with the number of steps so far and of all steps.
        checkpoint: Steps between two checkpoints; None: a fiftieth of all.
        decay: AdamW's weight decay of matrices and codes, >= 0.

    Returns:
        The network that is loaded from the file, in evaluation.

    Raises:
        DeepThinError: As ``train``.
        OSError: The file cannot be written.
    """
    rules = parse_rules(rules)
    seeded(seed)
    model = run.build(run.width)
    about = [
        f"torch {torch.__version__}",
        f"task {run.task.name}",
        f"data {run.data.about}",
        f"steps {run.steps}",
        f"width {run.width}",
        f"learning rate {lr!r}",
        f"seed {seed}",
        f"configuration {rules!r}",
        f"network {' '.join(str(model).split())}",
        *([f"decay {decay!r}"] if decay else []),
        *([] if run.teacher is None else [f"teacher {run.teacher[0].about()}"]),
    ]
    kept = Checkpoint(checkpoint_of(path), checkpoint or max(run.steps // CHECKPOINTS, 1), "\n".join(about))
    training = Training(
        model=model,
        steps=run.steps,
        lr=lr,
        decay=decay,
        seed=seed,
        distillation=None if run.teacher is None else run.teacher[0].distillation(run.teacher[1], seed),
        progress=lambda step: progress(step, run.steps),
        checkpoint=kept,
    )
    if rules.stages is None:
        dt.compress(model, rules, init="scratch", seed=seed)
    else:
        training.learning_rate_multiplier = rules.stages.learning_rate_multiplier
        importance = _importance(rules.stages.importance, run, training)
        training.recipe = dt.Recipe(model, rules, run.steps, lambda model: _loss(run, model), importance)
    run.fit(model, training)
    dt.save(model, path)
    loaded = dt.load(run.build(run.width), path).eval()
    if not alike(model.eval(), loaded, run.task.example(run.data)):
        raise DeepThinError(f"{path} does not hold what the trained model does: please report it.")
    kept.remove()
    return loaded


def checkpoint_of(path: Path) -> Path:
    """Where the state of the training of a file is kept."""
    return path.with_name(f"{path.name}.checkpoint")


def _importance(kind: str, run: Run, training: Training) -> Callable[[], Mapping[str, torch.Tensor]]:
    """The importance that a recipe uses; ConfigError for a Hessian where the task has no loss of single items."""
    if kind == "hessian":
        if run.task.calibration is None:
            raise ConfigError(
                f"[stages] importance = 'hessian': {run.task.name} has no loss of single items. Use 'adam'."
            )
        batch = run.task.calibration(run.data)
        return lambda: dt.hessian_diagonal(training.model, [batch], torch.nn.functional.cross_entropy)
    return training.importance if kind == "adam" else dict


def _loss(run: Run, model: torch.nn.Module) -> float:
    """The task's loss on development data, else its leading metric."""
    if run.task.loss is not None:
        return run.task.loss(model, run.data)
    return next(iter(run.task.evaluate(model, run.data, "dev").values()))


def summary(trained: Trained, path: Path) -> str:
    """The result for people: test metrics, and the size of the file.

    Args:
        trained: The result.
        path: The written file.

    Returns:
        Two lines.
    """
    numbers = ", ".join(
        f"{name.replace('_', ' ')} {value:.4g} (development {trained.values['dev'][name]:.4g})"
        for name, value in trained.values["test"].items()
    )
    times = trained.report.dense_bytes / trained.report.total_bytes
    return f"test {numbers}\n{path}: {trained.report.total_bytes:,} bytes, {times:.1f} times smaller than dense"
