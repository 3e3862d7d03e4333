"""One trial: train the network of one method, ratio and seed, store it, load it again, and judge it."""

import copy
import math
import random
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.errors import BudgetError, ConfigError, DeepThinError, NonFiniteError
from deepthin.lab.rows import Row
from deepthin.lab.search import Choice
from deepthin.lab.tasks import TASKS
from deepthin.lab.tasks.own import Own
from deepthin.lab.tasks.task import Task
from deepthin.lab.tasks.training import Training
from deepthin.lab.teacher import Teacher
from deepthin.methods import METHODS
from deepthin.plan.rules import ALLOCATIONS
from deepthin.plan.shares import BITS_OF_FLOAT
from deepthin.storage.read import inspect
from deepthin.torch.exchange import thin_tensors
from deepthin.torch.tensors import tensors_of

DENSE, INT8, SAME_SIZE = "dense", "int8", "same-size"
ALWAYS = (DENSE, INT8)
SCALAR = [name for name, named in METHODS.items() if "bits" in named.options]  # they quantise the weights already
PRUNED_CSR = "pruned-csr"
ROUNDED = re.compile(r"(.+)-(\d+)bit")  # quantised floats: deepthin-8bit
CODED = "-coded"  # floats with learned steps, trained to the size of the file
CODED_OPTIONS: Mapping[str, Mapping[str, Any]] = {"deepthin": {"rank": 4}, "shuffled": {"rank": 4}}
COMPARED = (
    *ALWAYS,
    *(name for name, named in METHODS.items() if not named.learns_step),
    SAME_SIZE,
    PRUNED_CSR,
    *(f"{name}-{bits}bit" for bits in (8, 4) for name in (*METHODS, SAME_SIZE) if name not in SCALAR),
    *(f"{name}{CODED}" for name in (DENSE, *METHODS, SAME_SIZE) if name not in SCALAR),
)


@dataclass(frozen=True)
class Pruning:
    """When pruning happens: between two fractions of the training steps, in some number of rounds.

    Attributes:
        start: Fraction of the steps at which the sparsity begins to rise, 0 to 1.
        end: Fraction at which it is reached; from then on the layers are thin.
        times: Number of pruning rounds.
    """

    start: float
    end: float
    times: int


# pruned: gradual pruning from early in the training. pruned-csr: the paper's iterative pruning of a trained network
# (Han et al., 2015, arXiv:1506.02626, section 3), counted as compressed sparse rows.
PRUNING = {"pruned": Pruning(0.02, 0.15, 24), PRUNED_CSR: Pruning(0.4, 0.7, 6)}
INT8_RATIO = 0.25
QUANTISED = {nn.Linear, nn.LSTM, nn.GRU}  # exact types: torch quantises by type


@dataclass(frozen=True)
class Setup:
    """What all trials of a comparison share; None stands for the task's own default.

    Attributes:
        task: Name of the task, a key of ``TASKS``.
        data: Folder with its data.
        steps: Number of training steps.
        width: Width of the dense network.
        depth: Depth of the network.
        own: The user's factory, training and evaluation as ``package.module:function``, instead of ``task``.
        teacher: A network that all but the dense one learn from.
        network: Name of the network, of a task that has several.
    """

    task: str
    data: Path | None = None
    steps: int | None = None
    width: int | None = None
    depth: int | None = None
    own: tuple[str, str, str] | None = None
    teacher: Teacher | None = None
    network: str | None = None


@dataclass(frozen=True)
class Trial:
    """One method at one ratio with one seed.

    Attributes:
        method: Name of the method, one of ``COMPARED``.
        ratio: Bytes of the weight matrices over those of the dense network; of coded methods, bytes of the file over
            those of all parameters of the dense network.
        seed: Seed of the training.
        choice: Learning rate and allocation that a search chose; None: the task's.
    """

    method: str
    ratio: float
    seed: int
    choice: Choice | None = None

    @property
    def key(self) -> tuple[str, float, int]:
        """Method, ratio and seed: what identifies the trial."""
        return self.method, self.ratio, self.seed

    @property
    def name(self) -> str:
        """File name without its ending: ``deepthin-0.02-seed0``."""
        size = "" if self.method in ALWAYS else f"-{self.ratio}"
        return f"{self.method}{size}-seed{self.seed}"


@dataclass(frozen=True)
class Run:
    """A task with its data, and the network and steps that all trials share.

    Attributes:
        task: The task.
        data: What the task has loaded.
        steps: Number of training steps.
        width: Width of the dense network.
        build: Width -> the dense network.
        teacher: The teacher and its network; None without one.
        network: Name of the network; None if the task has only one.
    """

    task: Task
    data: Any
    steps: int
    width: int
    build: Callable[[int], nn.Module]
    teacher: tuple[Teacher, nn.Module] | None = None
    network: str | None = None

    @classmethod
    def prepare(cls, setup: Setup) -> "Run":
        """Load the task's data, and the teacher if there is one.

        Args:
            setup: The task, its data, steps and sizes.

        Returns:
            The run.

        Raises:
            ConfigError: The data are missing, a depth or a network is given where there is none to choose, or the
                teacher does not fit.
        """
        task: Task = Own.find(*setup.own) if setup.own else TASKS[setup.task]
        if setup.depth is not None and task.depth is None:
            raise ConfigError(f"The network of {task.name} has a fixed depth: leave out --depth.")
        if setup.network is not None and setup.network not in task.networks:
            choice = f"use one of {', '.join(task.networks)}" if task.networks else "leave out --network"
            raise ConfigError(f"{task.name} has no network {setup.network!r}: {choice}.")
        data = task.load(setup.data)
        chosen: dict[str, Any] = {} if task.depth is None else {"depth": setup.depth or task.depth}
        network = setup.network or task.network
        if network is not None:
            chosen["network"] = network
        build = partial(task.build, data, **chosen)
        width, teacher = setup.width or task.width, setup.teacher
        taught = None if teacher is None else (teacher, teacher.load(task, lambda: build(width)))
        return cls(task, data, setup.steps or task.steps, width, build, taught, network)

    def weight_bytes(self) -> int:
        """Size of the dense network's weight matrices.

        Returns:
            Bytes of its parameters with two or more dimensions.
        """
        return self._bytes(lambda p: p.dim() > 1)

    def dense_bytes(self) -> int:
        """Size of the dense network.

        Returns:
            Bytes of all its parameters.
        """
        return self._bytes(lambda p: True)

    def _bytes(self, counts: Callable[[nn.Parameter], bool]) -> int:
        with torch.device("meta"):
            return sum(p.numel() * p.element_size() for p in self.build(self.width).parameters() if counts(p))

    def width_of(self, method: str, ratio: float) -> int:
        """The width at which a method's network is built.

        Args:
            method: Name of the method.
            ratio: Bytes of the weight matrices over those of the dense network.

        Returns:
            The dense width. For ``same-size`` the largest width whose matrices fit the bytes: with quantised weights
            there is room for more of them.

        Raises:
            BudgetError: No width of ``same-size`` is small enough.
        """
        outer, bits = split(method)
        if outer != SAME_SIZE:
            return self.width
        if is_coded(method):
            return dt.same_size(self.build, int(4 * self.file_bytes(ratio) * 8 / BITS_OF_FLOAT))
        budget = int(ratio * self.weight_bytes())
        if bits is None:
            return dt.same_size(self.build, budget)
        dense_bytes, matrices = self._never_thin()
        apart = 4 * matrices + dense_bytes  # steps of the quantiser, and what stays in float32
        try:
            return dt.same_size(self.build, (budget - apart) * 32 // bits + dense_bytes)
        except BudgetError as error:
            smallest = error.smallest_bits * bits // 32 + 8 * apart
            raise BudgetError(str(error), smallest_bits=smallest, smallest_ratio=error.smallest_ratio) from None

    def file_bytes(self, ratio: float) -> int:
        """The size to which a coded network is trained.

        Args:
            ratio: Bytes of the file over those of the dense network.

        Returns:
            Bytes.
        """
        return int(ratio * self.dense_bytes())

    def _never_thin(self) -> tuple[int, int]:
        """Bytes of the dense network's matrices that have no thin version, and how many matrices have one."""
        with torch.device("meta"):
            tensors = [tensor for tensor in tensors_of(self.build(self.width))[0] if len(tensor.shape) > 1]
        dense_bytes = sum(4 * math.prod(tensor.shape) for tensor in tensors if tensor.uncovered)
        return dense_bytes, sum(not tensor.uncovered for tensor in tensors)

    def choice(self, method: str) -> Choice:
        """The task's own learning rate and allocation for a method, which development data chose.

        Args:
            method: Name of the method.

        Returns:
            The choice.
        """
        outer, _ = split(method)
        rates = {**self.task.learning_rates, **self.task.network_rates.get(self.network or "", {})}
        allocations = self.task.allocations
        allocation = allocations.get(method, allocations.get(outer, self.task.allocation))
        rate = rates.get(method, rates.get(outer, self.task.learning_rate))
        return Choice(rate, float(ALLOCATIONS[allocation] if isinstance(allocation, str) else allocation))

    def model(self, trial: Trial) -> tuple[nn.Module, dict[str, Any]]:
        """Build the untrained network of a trial, its weight matrices within the ratio.

        Args:
            trial: The method, the ratio and the seed.

        Returns:
            The network, and further arguments of its ``Training``: pruning starts from dense weights and has a
            ``recipe`` that makes the network thin during the training.

        Raises:
            BudgetError: The ratio cannot be reached.
        """
        width = self.width_of(trial.method, trial.ratio)
        seeded(trial.seed)
        model = self.build(width)
        outer, _ = split(trial.method)
        if trial.method in (*ALWAYS, SAME_SIZE):
            return model, {}
        rules = self.rules(trial.method, trial.ratio, (trial.choice or self.choice(trial.method)).allocation)
        rules["model"]["ignore"] = [t.name for t in tensors_of(model)[0] if t.uncovered and len(t.shape) > 1]
        if rules["model"]["ignore"] and "ratio" in rules["model"]:  # their bytes count towards the ratio
            dense_bytes, whole = self._never_thin()[0], self.weight_bytes()
            if trial.ratio * whole <= dense_bytes:
                raise BudgetError(
                    f"{', '.join(rules['model']['ignore'])} have no thin version and "
                    f"take {dense_bytes} of {whole} bytes.",
                    smallest_bits=8 * dense_bytes,
                    smallest_ratio=dense_bytes / whole,
                )
            rules["model"]["ratio"] = (trial.ratio * whole - dense_bytes) / (whole - dense_bytes)
        if outer in PRUNING:
            over = PRUNING[outer]
            every = max(int((over.end - over.start) * self.steps) // over.times, 1)
            rules["stages"] = {"thin": [over.start, over.end], "quantize": over.end, "every": every}
            return model, {"recipe": dt.Recipe(model, rules, self.steps)}
        dt.compress(model, rules, init="scratch", seed=trial.seed)
        return model, {}

    def rules(self, method: str, ratio: float, allocation: float) -> dict[str, Any]:
        """The configuration of a method.

        Args:
            method: Name of the method.
            ratio: Bytes of the weight matrices over those of the dense network.
            allocation: The power of their size by which bytes go to the matrices: 0 equal bytes, 1 equal ratios.

        Returns:
            A mapping as ``compress`` takes it.
        """
        outer, bits = split(method)
        if outer == SAME_SIZE and not is_coded(method):
            return {"model": {}, "rules": self.task.rules({"method": "uniform", "bits": bits})}
        options = self.task.options.get(method, self.task.options.get(outer, {}))
        if is_coded(method):
            plain = outer in (DENSE, SAME_SIZE)
            first = {} if plain else {"method": outer, **CODED_OPTIONS.get(outer, options), "then": {"method": "coded"}}
            return {
                "model": {"file_bytes": self.file_bytes(ratio)},
                "rules": self.task.rules(first or {"method": "coded"}),
            }
        rule = {"method": outer, **options}
        if outer == PRUNED_CSR:
            rule |= {"method": "pruned", "index": "csr"}
        if bits:
            rule["then"] = {"method": "uniform", "bits": bits}
        return {"model": {"ratio": ratio, "allocation": allocation}, "rules": self.task.rules(rule)}

    def teaches(self, trial: Trial) -> bool:
        """Whether a trial learns from the teacher. The dense network and int8, the references, never do.

        Args:
            trial: The trial.

        Returns:
            True if it does.
        """
        return self.teacher is not None and trial.method not in ALWAYS

    def train(self, trial: Trial, progress: Callable[[int], None]) -> nn.Module:
        """Train the network of a trial.

        Args:
            trial: The method, the ratio and the seed.
            progress: Called after each step with the number of steps so far.

        Returns:
            The trained network.

        Raises:
            BudgetError: The ratio cannot be reached.
            NonFiniteError: The training diverged.
            ConfigError: The training made another number of steps.
        """
        model, recipe = self.model(trial)
        lr, decays = (trial.choice or self.choice(trial.method)).lr, self.task.decays
        decay = decays.get(trial.method, decays.get(split(trial.method)[0], 0.0))
        if self.teaches(trial) and self.teacher is not None:
            teacher, network = self.teacher
            recipe["distillation"] = teacher.distillation(network, trial.seed)
        training = Training(
            model=model,
            steps=self.steps,
            lr=lr,
            decay=decay,
            seed=trial.seed,
            progress=progress,
            **recipe,
        )
        self.fit(model, training)
        return model

    def fit(self, model: nn.Module, training: Training) -> None:
        """Run the task's training, and check its number of steps.

        Args:
            model: The network; changed in place.
            training: The training.

        Raises:
            ConfigError: The training made another number of steps.
            NonFiniteError: The training diverged.
        """
        self.task.fit(model, self.data, training)
        if training.step != self.steps:
            raise ConfigError(
                f"The training of {self.task.name} made {training.step} of {self.steps} steps: it must call "
                "training.minimise once for each batch of training.batches(...)."
            )

    def load(self, path: Path, method: str, ratio: float) -> nn.Module:
        """Load a trained network from its file.

        Args:
            path: The ``.thin`` file.
            method: Name of the method.
            ratio: The ratio of the trial.

        Returns:
            The network, in evaluation.

        Raises:
            ConfigError: The file is of another network.
            FormatError: The file is damaged.
        """
        return dt.load(self.build(self.width_of(method, ratio)), path).eval()


def seeded(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy, from which the start and a user's training draw.

    Args:
        seed: The seed.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def split(method: str) -> tuple[str, int | None]:
    """Split the name of a compared method.

    Args:
        method: The name, such as ``deepthin-8bit``.

    Returns:
        The method, and the bits of its quantised floats; None without quantisation, or where they are coded.
    """
    rounded = ROUNDED.fullmatch(method)
    return (rounded[1], int(rounded[2])) if rounded else (method.removesuffix(CODED), None)


def is_coded(method: str) -> bool:
    """Whether a compared method is trained to the size of its file.

    Args:
        method: The name, such as ``deepthin-coded``.

    Returns:
        True if it is.
    """
    return method.endswith(CODED)


def prepared(setup: Setup) -> Run:
    """``Run.prepare``, cached, so that each process loads the data only once.

    Args:
        setup: The task, its data, steps and sizes.

    Returns:
        The run.

    Raises:
        ConfigError: As ``Run.prepare``.
    """
    run = _loaded(replace(setup, steps=None))
    return replace(run, steps=setup.steps or run.steps)


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
