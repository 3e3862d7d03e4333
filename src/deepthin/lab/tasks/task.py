"""What a comparison asks of a task: data, a network, a training, metrics, and settings of each method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from deepthin.lab.tasks.training import Training

Rules = dict[str, dict[str, Any]]
"""The table ``rules`` of a configuration: by pattern, what becomes of the matrices."""


class Task(Protocol):
    """A task. ``data`` is whatever its ``load`` returns, with a text ``about``: results of other data do not mix."""

    @property
    def name(self) -> str:
        """Name of the task on the command line and in rows."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values that ``evaluate`` returns, lower being better; the leading one first."""
        ...

    @property
    def width(self) -> int:
        """Width of the dense network."""
        ...

    @property
    def depth(self) -> int | None:
        """Depth of the network; None if it is fixed: ``build`` then takes no depth."""
        ...

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks to choose from; empty if there is one: ``build`` then takes no network."""
        ...

    @property
    def network(self) -> str | None:
        """The network, if the user names none; None if there is no choice."""
        ...

    @property
    def steps(self) -> int:
        """Number of training steps, if the user gives none."""
        ...

    @property
    def asks_teacher(self) -> bool:
        """Whether the training calls ``training.taught``."""
        ...

    @property
    def learning_rate(self) -> float:
        """Learning rate of dense parameters, for methods that ``learning_rates`` lacks."""
        ...

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """Method -> learning rate of dense parameters that development data chose."""
        ...

    @property
    def network_rates(self) -> Mapping[str, Mapping[str, float]]:
        """Network -> method -> learning rate that development data chose; instead of ``learning_rates``."""
        ...

    @property
    def decays(self) -> Mapping[str, float]:
        """Method -> AdamW's weight decay; 0 for others."""
        ...

    @property
    def allocation(self) -> float | str:
        """How bytes are allocated to the matrices: ``[model] allocation`` of a configuration."""
        ...

    @property
    def allocations(self) -> Mapping[str, float | str]:
        """Method -> another allocation that development data chose."""
        ...

    @property
    def options(self) -> Mapping[str, Mapping[str, Any]]:
        """Method -> options of its rule."""
        ...

    @property
    def loss(self) -> Callable[[nn.Module, Any], float] | None:
        """(network, data) -> mean loss on development data; None: the leading metric serves instead."""
        ...

    @property
    def calibration(self) -> Callable[[Any], tuple[Tensor, Tensor]] | None:
        """Data -> inputs and classes for second derivatives; None if items have no loss of their own."""
        ...

    def load(self, folder: Path | None, /) -> Any:
        """Load the data of all splits.

        Args:
            folder: The folder that the user gave; None without one.

        Returns:
            Data with a text ``about``, which identifies them.

        Raises:
            ConfigError: The folder lacks the data.
        """
        ...

    def build(self, data: Any, width: int, /) -> nn.Module:
        """Build the dense network. Where ``depth`` or ``network`` is not None, it is a further keyword argument.

        Args:
            data: What ``load`` returned.
            width: Width of the network, >= 1.

        Returns:
            The network.

        Raises:
            ConfigError: There is no network of that width or depth.
        """
        ...

    def rules(self, rule: dict[str, Any], /) -> Rules:
        """The table ``rules`` of a configuration for the matrices that this task compresses.

        Args:
            rule: Method and options.

        Returns:
            Pattern -> rule.
        """
        ...

    def fit(self, model: nn.Module, data: Any, training: Training, /) -> None:
        """Train the network: call ``training.minimise`` once for each of ``training.batches``.

        Args:
            model: The network, dense or thin; changed in place.
            data: What ``load`` returned.
            training: Batches, optimiser and number of steps.

        Raises:
            NonFiniteError: The training diverges.
        """
        ...

    def evaluate(self, model: nn.Module, data: Any, split: str, /) -> dict[str, float]:
        """Judge the network.

        Args:
            model: The network.
            data: What ``load`` returned.
            split: ``"dev"`` or ``"test"``.

        Returns:
            A value for each of ``metrics``, lower being better.
        """
        ...

    def example(self, data: Any, /) -> tuple[Any, ...]:
        """The arguments with which the network is called for one item.

        Args:
            data: What ``load`` returned.

        Returns:
            Positional arguments.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ModuleTask:
    """A task whose functions are those of a module; `Task` says what each is."""

    name: str
    about: str  # one line, for people
    metrics: tuple[str, ...]
    width: int
    depth: int | None
    steps: int
    load: Callable[[Path | None], Any]
    build: Callable[..., nn.Module]
    rules: Callable[[dict[str, Any]], Rules]
    fit: Callable[[nn.Module, Any, Training], None]
    evaluate: Callable[[nn.Module, Any, str], dict[str, float]]
    example: Callable[[Any], tuple[Any, ...]]
    loss: Callable[[nn.Module, Any], float] | None = None
    calibration: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    networks: tuple[str, ...] = ()
    network: str | None = None
    asks_teacher: bool = False
    learning_rate: float
    learning_rates: Mapping[str, float] = field(default_factory=dict[str, float])
    network_rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    decays: Mapping[str, float] = field(default_factory=dict[str, float])
    allocation: float | str = "uniform-bytes"
    allocations: Mapping[str, float | str] = field(default_factory=dict[str, float | str])
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
