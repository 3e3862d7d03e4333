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
        """On the command line, and in rows."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `evaluate` returns, less being better; the leading one first."""
        ...

    @property
    def width(self) -> int:
        """Of the dense network."""
        ...

    @property
    def depth(self) -> int | None:
        """Of the network; None if there is none to choose, and ``build`` takes none."""
        ...

    @property
    def steps(self) -> int:
        """Of a training, if the user names no number."""
        ...

    @property
    def asks_teacher(self) -> bool:
        """Whether the training calls ``training.taught``."""
        ...

    @property
    def learning_rate(self) -> float:
        """Of the dense parameters, for methods that ``learning_rates`` does not name."""
        ...

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """By method, the rate that development data chose."""
        ...

    @property
    def decays(self) -> Mapping[str, float]:
        """By method, AdamW's weight decay, if any."""
        ...

    @property
    def allocation(self) -> float | str:
        """How bytes go to the matrices: ``[model] allocation`` of a configuration."""
        ...

    @property
    def allocations(self) -> Mapping[str, float | str]:
        """By method, where development data chose another allocation."""
        ...

    @property
    def options(self) -> Mapping[str, Mapping[str, Any]]:
        """By method, options of its rule."""
        ...

    @property
    def loss(self) -> Callable[[nn.Module, Any], float] | None:
        """From a network and the data, the mean loss on development data; None: the leading metric stands for it."""
        ...

    @property
    def calibration(self) -> Callable[[Any], tuple[Tensor, Tensor]] | None:
        """From the data, inputs and classes for second derivatives; None if items have no loss of their own."""
        ...

    def load(self, folder: Path | None, /) -> Any:
        """Load the data; ConfigError if ``folder`` does not have them."""
        ...

    def build(self, data: Any, width: int, /) -> nn.Module:
        """Build the dense network; a further argument is ``depth``, where there is one to choose."""
        ...

    def rules(self, rule: dict[str, Any], /) -> Rules:
        """Turn the rule of a method into the table ``rules``: the matrices that it is for."""
        ...

    def fit(self, model: nn.Module, data: Any, training: Training, /) -> None:
        """Train the network: one ``training.minimise`` for each of ``training.batches``."""
        ...

    def evaluate(self, model: nn.Module, data: Any, split: str, /) -> dict[str, float]:
        """Judge the network on ``dev`` or ``test``: a number for each of ``metrics``."""
        ...

    def example(self, data: Any, /) -> tuple[Any, ...]:
        """What the network is called with for one item."""
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
    asks_teacher: bool = False
    learning_rate: float
    learning_rates: Mapping[str, float] = field(default_factory=dict[str, float])
    decays: Mapping[str, float] = field(default_factory=dict[str, float])
    allocation: float | str = "uniform-bytes"
    allocations: Mapping[str, float | str] = field(default_factory=dict[str, float | str])
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
