"""Distillation: train a student on a trained network's outputs, as soft targets or logits, optionally with noise.

Soft targets: Hinton, Vinyals and Dean, 2015, arXiv:1503.02531. Logits: Ba and Caruana, 2014, arXiv:1312.6184. Noisy
teachers: Sau and Balasubramanian, 2016, arXiv:1610.09650.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.torch.units import at_rest


@dataclass(frozen=True, slots=True)
class Noise:
    """Gaussian noise on a teacher's logits (Sau and Balasubramanian, 2016, arXiv:1610.09650).

    A perturbed item's logits z become ``z (1 + xi)``, or ``z + xi`` if ``additive``, with xi drawn from N(0, sigma^2)
    for each class. One factor for all classes of an item would only change the temperature, never their order.

    Attributes:
        sigma: Standard deviation of xi, >= 0; the paper's sigma.
        share: Probability that an item is perturbed, 0 to 1; the paper's alpha.
        additive: Whether xi is added instead of multiplied.

    Raises:
        ConfigError: ``sigma`` or ``share`` is out of range.
    """

    sigma: float
    share: float = 0.5
    additive: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range with ConfigError."""
        if not 0 <= self.sigma < math.inf or not 0 <= self.share <= 1:
            raise ConfigError(f"{self} is invalid: sigma must be 0 or more and finite, share from 0 to 1.")

    def perturb(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Perturb logits.

        Args:
            logits: Tensor, items x classes; there may be more axes of items.
            generator: A generator on the CPU, which is advanced.

        Returns:
            A new tensor of the same shape, dtype and device; items that are not drawn keep their logits.
        """
        drawn = torch.rand(logits.shape[:-1], generator=generator) < self.share
        xi = self.sigma * torch.randn(logits.shape, generator=generator) * drawn[..., None]
        xi = xi.to(logits.device, logits.dtype)
        return logits + xi if self.additive else logits * (1 + xi)


class Distillation:
    """The loss of a student with teachers: ``(1 - weight) * hard_loss + weight * distance`` to their outputs.

    The distance is the mean over items of one of

    * ``"soft"``: ``T^2 KL(p || q)``, with p and q the softmax of the teacher's and of the student's logits over the
      ``temperature`` T; T^2 makes the scale of the gradients independent of T (Hinton, Vinyals and Dean, 2015).
    * ``"logits"``: half the squared distance of the logits, without temperature (Ba and Caruana, 2014).

    In a training loop, for example:

        distillation = Distillation(teacher, weight=0.9, temperature=4.0)
        for inputs, targets in batches:
            logits = student(inputs)
            loss = distillation(inputs, logits, cross_entropy(logits, targets))

    Args:
        teachers: One or several trained networks, dense or thin; evaluated in evaluation mode without gradients. The
            logits of several are averaged (the geometric mean of their soft targets).
        weight: Weight of the distance to the teachers, from 0 to 1.
        temperature: T of soft targets, > 0.
        kind: ``"soft"`` (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531) or ``"logits"`` (Ba and Caruana, 2014,
            arXiv:1312.6184).
        noise: Perturbs the teachers' logits (Sau and Balasubramanian, 2016, arXiv:1610.09650).
        seed: Seed of the noise's separate random generator.

    Raises:
        ConfigError: No teacher, or a setting out of range.
    """

    def __init__(
        self,
        teachers: nn.Module | Sequence[nn.Module],
        weight: float = 0.9,
        temperature: float = 4.0,
        kind: Literal["soft", "logits"] = "soft",
        noise: Noise | None = None,
        seed: int = 0,
    ) -> None:
        self.teachers = (teachers,) if isinstance(teachers, nn.Module) else tuple(teachers)
        if not self.teachers:
            raise ConfigError("Distillation needs a teacher: give a trained network, or several.")
        check_settings(weight, temperature, kind)
        self.weight, self.temperature, self.kind, self.noise = weight, temperature, kind, noise
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, inputs: Any, student_logits: Tensor, hard_loss: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            inputs: What the teachers take: one argument, or a tuple of several.
            student_logits: Tensor, items x classes; there may be more axes of items.
            hard_loss: Scalar: the student's loss on the labels.

        Returns:
            Scalar: ``(1 - weight) * hard_loss + weight * distance``, differentiable in the student.

        Raises:
            ConfigError: A teacher does not return a tensor of logits of the student's shape.
        """
        return (1 - self.weight) * hard_loss + self.weight * self.distance(self.targets(inputs), student_logits)

    def targets(self, inputs: Any) -> Tensor:
        """Evaluate the teachers, without gradients.

        Args:
            inputs: What the teachers take: one argument, or a tuple of several.

        Returns:
            The mean of the teachers' logits, perturbed anew at every call if there is noise: tensor, items x classes.

        Raises:
            ConfigError: A teacher does not return a tensor, or their shapes differ.
        """
        logits: list[Tensor] = []
        for teacher in self.teachers:
            with at_rest(teacher):
                logits.append(teacher(*inputs) if isinstance(inputs, tuple) else teacher(inputs))
            if not isinstance(logits[-1], Tensor) or logits[-1].shape != logits[0].shape:
                got = list(logits[-1].shape) if isinstance(logits[-1], Tensor) else type(logits[-1]).__name__
                raise ConfigError(f"{type(teacher).__name__}, a teacher, gives {got}: give logits of one shape.")
        mean = logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)
        return mean if self.noise is None else self.noise.perturb(mean, self.generator)

    def distance(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """The distance of a student's logits from the teachers', averaged over items.

        Args:
            teacher_logits: Tensor, items x classes, as ``targets`` returns it.
            student_logits: Tensor of the same shape.

        Returns:
            Scalar, >= 0: ``T^2 KL(p || q)`` of the softened distributions, or half the squared distance of the logits.

        Raises:
            ConfigError: The shapes differ.
        """
        if teacher_logits.shape != student_logits.shape:
            raise ConfigError(
                f"The teacher gives logits of shape {list(teacher_logits.shape)}, the student of "
                f"{list(student_logits.shape)}: both must judge the same items by the same classes."
            )
        if self.kind == "logits":
            return 0.5 * (student_logits - teacher_logits).square().sum(-1).mean()
        p = (teacher_logits / self.temperature).log_softmax(-1)
        q = (student_logits / self.temperature).log_softmax(-1)
        return self.temperature**2 * (p.exp() * (p - q)).sum(-1).mean()

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the noise's random generator, for a checkpoint; all else follows from the arguments.

        Returns:
            The state, for ``load_state_dict``.
        """
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the random generator from a checkpoint.

        Args:
            state: What ``state_dict`` returned.
        """
        self.generator.set_state(state["generator"])


def check_settings(weight: float, temperature: float, kind: str) -> None:
    """Check the settings of a distillation.

    Args:
        weight: Weight of the teachers, 0 to 1.
        temperature: Temperature of soft targets, > 0 and finite.
        kind: ``"soft"`` or ``"logits"``.

    Raises:
        ConfigError: A setting is out of range.
    """
    if kind not in ("soft", "logits"):
        raise ConfigError(f"kind = {kind!r} is unknown. Valid: soft, logits.")
    if not 0 <= weight <= 1 or not 0 < temperature < math.inf:
        raise ConfigError(
            f"weight = {weight:g}, temperature = {temperature:g}: the weight of the teacher is from 0 to 1, the "
            "temperature more than 0."
        )
