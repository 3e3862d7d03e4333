"""What all trials of a comparison share: the task with its data, and the network and configuration of each method."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.errors import BudgetError, ConfigError
from deepthin.lab.compared import ALWAYS, CODED_OPTIONS, DENSE, PRUNED_CSR, PRUNING, SAME_SIZE, is_coded, split
from deepthin.lab.search import Choice
from deepthin.lab.tasks import TASKS
from deepthin.lab.tasks.own import Named, Own, built, resolved
from deepthin.lab.tasks.task import Task
from deepthin.lab.tasks.training import Training
from deepthin.lab.teacher import Teacher
from deepthin.plan.rules import ALLOCATIONS
from deepthin.plan.shares import BITS_OF_FLOAT
from deepthin.torch.tensors import tensors_of


@dataclass(frozen=True)
class Setup:
    """What all trials of a comparison share; None stands for the task's own default.

    Attributes:
        task: Name of the task, a key of ``TASKS``.
        data: Folder with its data.
        steps: Number of training steps.
        width: Width of the dense network.
        depth: Depth of the network.
        own: The user's factory, training and evaluation, instead of ``task``: functions, or their names as
            ``package.module:function``.
        teacher: A network that all but the dense one learn from.
        network: Name of the network, of a task that has several.
        factory: Another network for the same data and training: a function without arguments, or its name.
    """

    task: str
    data: Path | None = None
    steps: int | None = None
    width: int | None = None
    depth: int | None = None
    own: tuple[Named, Named, Named] | None = None
    teacher: Teacher | None = None
    network: str | None = None
    factory: Named | None = None


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
        run = cls(task, data, setup.steps or task.steps, width, build, taught, network)
        return run if setup.factory is None else run.with_factory(setup.factory)

    def with_factory(self, factory: Named) -> "Run":
        """Another network for the same data, training and evaluation.

        Args:
            factory: A function without arguments, or its name as ``package.module:function``.

        Returns:
            The run with that network, which has one width.

        Raises:
            ConfigError: The function cannot be found, needs arguments, or returns no module.
        """
        return replace(self, build=partial(built, resolved(factory, "--model")), width=1, network=None)

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
