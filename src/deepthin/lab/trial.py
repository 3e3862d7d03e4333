"""One trial: train the network of one method, ratio and seed, store it, load it again, and judge it."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.errors import BudgetError, DeepThinError, NonFiniteError
from deepthin.lab.compared import DENSE, INT8
from deepthin.lab.rows import Row
from deepthin.lab.run import Run, Setup, Trial
from deepthin.storage.read import inspect
from deepthin.torch.exchange import thin_tensors

INT8_RATIO = 0.25
QUANTISED = {nn.Linear, nn.LSTM, nn.GRU}  # exact types: torch quantises by type


def prepared(setup: Setup) -> Run:
    """``Run.prepare``, cached, so that each process loads the data only once, or not at all after ``hold``.

    Args:
        setup: The task, its data, steps and sizes.

    Returns:
        The run.

    Raises:
        ConfigError: As ``Run.prepare``.
    """
    common = _common(setup)
    run = _HELD.get(common) or _loaded(common)
    run = replace(run, steps=setup.steps or run.steps)
    return run if setup.factory is None else run.with_factory(setup.factory)


def hold(setup: Setup, run: Run) -> None:
    """Have ``prepared`` take a run that another process has loaded.

    Args:
        setup: The setup of the run.
        run: The run.
    """
    _HELD.clear()
    _HELD[_common(setup)] = replace(run, steps=run.task.steps)


def _common(setup: Setup) -> Setup:
    """What all trainings of a setup have in common."""
    return replace(setup, steps=None, factory=None)


_HELD: dict[Setup, Run] = {}
_loaded = lru_cache(maxsize=1)(Run.prepare)


def judge(setup: Setup, trial: Trial) -> float | None:
    """Train the network of a trial and judge it on development data, as a search does.

    Args:
        setup: The task, its data, steps and sizes.
        trial: The method, the ratio and the seed.

    Returns:
        The leading metric, lower being better; None if the training diverges or the ratio cannot be reached.
    """
    run = prepared(setup)
    try:
        model = run.train(trial, lambda _: None)
        value = float(next(iter(run.task.evaluate(model.eval(), run.data, "dev").values())))
    except (NonFiniteError, BudgetError):
        return None
    return value if math.isfinite(value) else None


def run_trial(setup: Setup, trial: Trial, out: Path, progress: Callable[[int], None] | None = None) -> list[Row]:
    """Train one network, write its file, and judge the network that is loaded from that.

    Args:
        setup: What all trials of the comparison share.
        trial: The method, the size and the seed.
        out: The folder of the comparison; the file goes into ``models`` there.
        progress: Called after each step with the number of steps so far.

    Returns:
        A row for each split and metric; one without a value where the size is out of reach or the training diverges.

    Raises:
        DeepThinError: The loaded network does not do what the trained one does.
    """
    run = prepared(setup)
    row = first_row(run, trial)
    if trial.method == INT8:
        return _quantised(run, trial, row, out)
    started = time.perf_counter()
    try:
        model = run.train(trial, progress or (lambda _: None))
        if not all(torch.isfinite(t).all() for t in model.state_dict().values() if t.is_floating_point()):
            raise NonFiniteError("The training ended with weights that are not finite: use a smaller learning rate.")
        row = replace(row, seconds=round(time.perf_counter() - started, 2))
        path = out / "models" / f"{trial.name}.thin"
        path.parent.mkdir(exist_ok=True)
        written = dt.save(model, path)
        reloaded = run.load(path, trial.method, trial.ratio)
        if not alike(model.eval(), reloaded, run.task.example(run.data)):
            raise DeepThinError(f"{path} does not hold what the trained model does: please report it.")
        weight_bytes = sum(matrix.bytes for matrix in inspect(path).rows)
        stored = replace(row, model=f"models/{path.name}", bytes=written, weight_bytes=weight_bytes)
        return _judged(run, stored, reloaded)
    except BudgetError as error:
        return [replace(row, smallest_ratio=error.smallest_bits / 8 / run.weight_bytes())]
    except NonFiniteError as error:
        return [replace(row, failed=str(error))]


def first_row(run: Run, trial: Trial) -> Row:
    """What is known before a trial runs: a row without a value.

    Args:
        run: What all trials share.
        trial: The trial.

    Returns:
        The row, for the test split and the leading metric.
    """
    choice = trial.choice or run.choice(trial.method)
    return Row(
        task=run.task.name,
        method=trial.method,
        ratio=trial.ratio,
        bytes=None,
        dense_bytes=run.dense_bytes(),
        seed=trial.seed,
        split="test",
        teacher=run.teacher[0].about() if run.teaches(trial) and run.teacher is not None else None,
        metric=run.task.metrics[0],
        value=None,
        lr=choice.lr,
        allocation=choice.allocation,
    )


def quantised(model: nn.Module) -> nn.Module:
    """The dense network in int8: 8-bit weights, and activations quantised on the fly (torch's dynamic quantisation).

    Args:
        model: The dense network; not changed.

    Returns:
        The quantised copy.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has deprecated this module
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(copy.deepcopy(model), QUANTISED, dtype=torch.qint8)  # pyright: ignore[reportArgumentType]


def _quantised(run: Run, trial: Trial, row: Row, out: Path) -> list[Row]:
    """The rows of the dense network of the same seed, quantised after its training. Convolutions stay in fp32."""
    path = out / "models" / f"{DENSE}-seed{trial.seed}.thin"
    if not path.exists():
        return [replace(row, failed="the dense network of this seed failed")]
    dense = run.load(path, DENSE, 1.0)
    rounded = sum(
        p.numel() for m in dense.modules() if type(m) in QUANTISED for p in m.parameters(False) if p.dim() > 1
    )
    row = replace(row, weight_bytes=run.weight_bytes() - 3 * rounded, bytes=run.dense_bytes() - 3 * rounded)
    try:
        return _judged(run, row, quantised(dense))
    except Exception as error:  # torch cannot quantise every network on every processor
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return [replace(row, failed=f"torch cannot quantise it: {reason}")]


def alike(one: nn.Module, other: nn.Module, example: tuple[Any, ...]) -> bool:
    """Whether two networks have the same weights, decoded where they are thin, and the same outputs for one item.

    Args:
        one: A network in evaluation.
        other: Another one.
        example: Their positional arguments for one item.

    Returns:
        True if all bits agree.
    """
    held: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for model in (one, other):
            weights = [weight(index) for _, (weight, index) in sorted(thin_tensors(model).items())]
            plain = [t for n, t in sorted(model.state_dict().items()) if ".thin." not in f".{n}"]
            held.append([*weights, *plain, *_tensors(model(*example))])
    return len(held[0]) == len(held[1]) and all(map(torch.equal, *held))


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """All tensors in the outputs of a network: alone, or in lists, tuples and mappings."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _judged(run: Run, row: Row, model: nn.Module) -> list[Row]:
    """The rows of an evaluated network; NonFiniteError if a metric is not finite."""
    judgments = {name: run.task.evaluate(model, run.data, name) for name in ("dev", "test")}
    for name, values in judgments.items():
        if wrong := [metric for metric, value in values.items() if not math.isfinite(value)]:
            raise NonFiniteError(f"The {wrong[0]} on {name} data is {values[wrong[0]]}.")
    return [
        replace(row, split=name, metric=metric, value=value)
        for name, values in judgments.items()
        for metric, value in values.items()
    ]
