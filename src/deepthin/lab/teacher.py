"""The teacher of a comparison: a trained network of the same task, from its file, that all thin networks learn from.

How they learn: ``deepthin.torch.distill`` (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

import deepthin.torch as dt
from deepthin.errors import ConfigError
from deepthin.lab.tasks.task import Task
from deepthin.torch.distill import check_settings


@dataclass(frozen=True)
class Teacher:
    """The file of a trained network that is built like the dense one, and how others learn from it.

    Attributes:
        path: The ``.thin`` file.
        kind: ``"soft"``: softened class probabilities; ``"logits"``: squared errors of the scores.
        weight: Weight of the teacher's loss, 0 to 1.
        temperature: Temperature of soft targets, > 0.
        noise: Noise on the teacher's logits; None: none.
    """

    path: Path
    kind: Literal["soft", "logits"] = "soft"
    weight: float = 0.9
    temperature: float = 4.0
    noise: dt.Noise | None = None

    def __post_init__(self) -> None:
        """Refuse invalid settings with ConfigError."""
        check_settings(self.weight, self.temperature, self.kind)

    def load(self, task: Task, dense: Callable[[], nn.Module]) -> nn.Module:
        """Load the teacher's network.

        Args:
            task: The task that is trained.
            dense: Builds the dense network.

        Returns:
            The network, in evaluation.

        Raises:
            ConfigError: The task has no teacher's loss, or the file is missing or of another network.
            FormatError: The file is damaged.
        """
        if not task.asks_teacher:
            raise ConfigError(f"The task {task.name} has no teacher's loss: leave out --teacher.")
        if not self.path.is_file():
            raise ConfigError(
                f"--teacher {self.path}: there is no such file. Give the .thin file of a trained network."
            )
        try:
            return dt.load(dense(), self.path, frozen=True).eval()
        except ConfigError as error:
            raise ConfigError(
                f"--teacher {self.path.name} is not of this task, width and depth: {error} Give the same --width and "
                "--depth as in its training."
            ) from None

    def distillation(self, network: nn.Module, seed: int) -> dt.Distillation:
        """The loss of one training.

        Args:
            network: The teacher's network.
            seed: Seed of the noise.

        Returns:
            The distillation, which joins the teacher's loss to the task's.
        """
        return dt.Distillation(network, self.weight, self.temperature, self.kind, self.noise, seed)

    def about(self) -> str:
        """A description of all settings that results depend on; the file is identified by its SHA-256.

        Returns:
            One line.
        """
        how = f"soft targets at temperature {self.temperature:g}" if self.kind == "soft" else "logits"
        if self.noise is not None:
            kind = "added" if self.noise.additive else "relative"
            how += f" with {kind} noise of {self.noise.sigma:g} for {self.noise.share:g} of the items"
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[
            :16
        ]  # .thin files end in their CRC-32, so that the CRC of each whole file is the same
        return f"{self.path.name}, SHA-256 {digest}...; weight {self.weight:g} for its {how}"
