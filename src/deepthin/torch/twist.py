"""DeepTwist: train dense weights, and every few steps replace them by their encoded and decoded values.

Lee, Kapoor and Kim, 2018, arXiv:1810.12823. Between two distortions training is unchanged: there are no masks and no
modified gradients. With magnitude pruning and a rising rate this is gradual pruning (Zhu and Gupta, 2017,
arXiv:1710.01878), except that a pruned weight may become non-zero again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.method import Method, Sparse
from deepthin.plan.file_limit import parts_of
from deepthin.plan.parse import Source, parse_rules
from deepthin.plan.shares import Planned
from deepthin.storage.report import Report
from deepthin.torch.compress import carry_out, plan_of
from deepthin.torch.importance import check_importance, importance_for
from deepthin.torch.replaced import replacing
from deepthin.torch.tensors import Encoded, check_finite, tensors_of
from deepthin.torch.weight import ThinWeight
from deepthin.torch.wrapped import check_plain


@dataclass(frozen=True, slots=True)
class Rising:
    """A schedule of DeepTwist: the fraction p that is removed rises from ``initial`` to what the rules ask for.

    ``p(t) = p_f + (p_i - p_f) (1 - (t - t_i) / (t_f - t_i))^E`` (Zhu and Gupta, 2017, arXiv:1710.01878, for E = 3). p
    is a fraction of the weights for pruning, and of the bits for other methods; p_f is that of the rules.

    Attributes:
        start: t_i, the first step with a distortion, >= 0.
        end: t_f, the step from which p is p_f, > ``start``.
        initial: p_i, the fraction that the first distortion removes, in [0, 1).
        power: The exponent E, > 0.

    Raises:
        ConfigError: A value is out of range.
    """

    start: int
    end: int
    initial: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        """Refuse values out of range with ConfigError."""
        if not 0 <= self.start < self.end or not 0 <= self.initial < 1 or not self.power > 0:
            raise ConfigError(f"{self} is invalid: give 0 <= start < end, 0 <= initial < 1 and a power above 0.")

    def share(self, step: int, final: float) -> float:
        """The fraction that is left at a step, ``1 - p``.

        Args:
            step: Optimiser steps so far, >= 0.
            final: The fraction that is left at the end, 0 to 1.

        Returns:
            1 before ``start``, then from ``1 - initial`` to ``final``.
        """
        if step < self.start:
            return 1.0
        left = max(0.0, 1 - (step - self.start) / (self.end - self.start)) ** self.power
        return final + (1 - self.initial - final) * left


class Twist:
    """Distorts dense weights in place every ``every`` optimiser steps; ``finish`` makes the layers thin.

    A distortion replaces each dense weight by its encoded and decoded value. The optimiser keeps its parameters and its
    state until ``finish``. DeepTwist: Lee, Kapoor and Kim, 2018, arXiv:1810.12823.

    In a training loop, for example:

        twist = Twist(model, rules, every=100)
        for inputs, targets in batches:
            ...
            optimizer.step()
            twist.step()
        twist.finish()

    Args:
        model: The dense network, changed in place.
        rules: A configuration as in ``compress``, or plans made from one; any method.
        every: Optimiser steps between distortions, >= 1 (the paper's S_D).
        schedule: How the ratio falls to its final value; without it each distortion is at the final ratio.
        importance: As in ``compress``, or a function that returns it, called at each distortion: ``lambda:
            adam_importance(optimizer, model)``.

    Raises:
        ConfigError: ``every`` < 1, rules or importance that do not fit the model, or a wrapped model.
        BudgetError: The target is smaller than the smallest plan.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Source | list[Planned],
        every: int = 100,
        schedule: Rising | None = None,
        importance: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every = {every}: the interval between distortions is at least 1 step.")
        check_plain(model, "Twist(MODEL, rules)", replaces=False)
        self.model, self.rules, self.every, self.schedule = model, rules, every, schedule
        self.importance = importance
        if not callable(importance):
            self._asked()  # raises now if it does not fit the model
        self.steps = 0
        tensors, self._owners = tensors_of(model)
        plans = rules if isinstance(rules, list) else plan_of(model, parse_rules(rules), tensors)
        self._planned = [planned for planned in plans if planned.method is not None]

    def step(self) -> bool:
        """Count an optimiser step, and distort when it is due.

        Returns:
            Whether the weights were distorted.

        Raises:
            ConfigError: The importance does not fit the model, or the model is sharded by FSDP.
            NonFiniteError: A weight, or its importance, has a NaN or an infinity.
        """
        self.steps += 1
        if self.steps % self.every or (self.schedule and self.steps < self.schedule.start):
            return False
        check_plain(self.model, "Twist(MODEL, rules)", replaces=False)
        importance = self._asked()
        for planned in self._planned:
            self._distort(planned, self._method(planned), importance)
        return True

    def finish(self) -> Report:
        """Distort once more, at the final ratio, and make the layers thin.

        Parameter objects are replaced: build a new optimiser.

        Returns:
            One row for each matrix and the totals of the file, as ``compress`` reports them.

        Raises:
            ConfigError: The importance does not fit the model, or the model is wrapped.
            NonFiniteError: A weight, or its importance, has a NaN or an infinity.
        """
        check_plain(self.model, "twist.finish()")
        importance = self._asked()
        for planned in self._planned:
            self._distort(planned, planned.method, importance)
        with replacing(self.model, "twist.finish()"):
            return carry_out(self.model, self._planned, self._owners, encoded=Encoded(self._owners, importance))

    def state_dict(self) -> dict[str, int]:
        """The number of steps so far, for a checkpoint; all else follows from the model and the arguments.

        Returns:
            The state, for ``load_state_dict``.
        """
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the number of steps from a checkpoint.

        Args:
            state: What ``state_dict`` returned.
        """
        self.steps = state["steps"]

    def _method(self, planned: Planned) -> Method | None:
        """The method of a distortion at this step; None where nothing would be removed."""
        method = planned.method
        if self.schedule is None or method is None or planned.fit is None:
            return method
        area = math.prod(method.shape)
        if isinstance(method, Sparse):
            count = round(area * self.schedule.share(self.steps, method.kept / area))
            return None if count >= area else method.with_kept(max(count, method.kept))
        ratio = self.schedule.share(self.steps, method.bits() / (32 * area))
        return None if ratio >= 1 else planned.fit(max(int(32 * area * ratio), method.bits()))

    def _asked(self) -> Mapping[str, Tensor]:
        """The present importance, checked."""
        importance = (self.importance() if callable(self.importance) else self.importance) or {}
        check_importance(self.model, importance)
        return importance

    def _distort(self, planned: Planned, method: Method | None, importance: Mapping[str, Tensor]) -> None:
        if method is None:
            return
        dense = [self._parameter(tensor.name) for tensor in planned.tensors]
        for tensor, values in zip(planned.tensors, dense, strict=True):
            check_finite(tensor.name, values)
        weigh = importance_for(planned, importance)
        weight = ThinWeight.encode(planned.name, method, parts_of(planned), dense, weigh)
        with torch.no_grad():
            for index, values in enumerate(dense):
                values.copy_(weight(index))

    def _parameter(self, name: str) -> Tensor:
        layer, parameter_name = self._owners[name][0]
        return getattr(layer, parameter_name)
