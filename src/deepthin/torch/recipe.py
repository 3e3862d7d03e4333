"""One training that ends in a small file: train dense, thin step by step, train on, quantise codes, train on.

Deep Compression (Han, Mao and Dally, 2016, arXiv:1510.00149) with ``pruned`` then ``kmeans``; any methods can be used.
The thinning is DeepTwist's (``deepthin.torch.twist``); ``save`` codes what is stored.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.method import Method, as_matrix
from deepthin.methods import METHODS, THEN
from deepthin.methods.float_coding import inner_of, outer_of
from deepthin.methods.then import Then
from deepthin.plan.file_limit import coded_bytes
from deepthin.plan.parse import parse_rules, parse_then
from deepthin.plan.rules import NO_LIMIT, Rules, Stages
from deepthin.plan.shares import Planned
from deepthin.storage.report import Report, report_of
from deepthin.storage.write import size_of
from deepthin.torch.allocation import allocate
from deepthin.torch.compress import carry_out, materialize, plan_of
from deepthin.torch.exchange import make_thin, thin_tensors
from deepthin.torch.files import contents
from deepthin.torch.generated import ThinLayer
from deepthin.torch.importance import check_importance
from deepthin.torch.sequential import make_sequential
from deepthin.torch.tensors import Encoded, tensors_of
from deepthin.torch.twist import Rising, Twist
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import check_plain


class Recipe:
    """Takes a dense model through the ``[stages]`` of a configuration in a training of ``steps`` steps.

    Deep Compression (Han, Mao and Dally, 2016, arXiv:1510.00149) with any methods.

    Args:
        model: The dense network, changed in place.
        rules: A configuration with ``[stages]``.
        steps: Optimiser steps of the whole training.
        loss: The mean loss of a model on calibration data, for ``allocation = "sensitivity"``.
        importance: Called when codes are quantised; returns importance by the names of the thin model's parameters:
            ``lambda: hessian_diagonal(model, batches, loss)``.

        recipe = dt.Recipe(model, "deep.toml", steps=20_000)
        optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
        for inputs, targets in batches:
            ...
            optimizer.step()
            if recipe.step():  # Parameter objects were replaced
                optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3, recipe.learning_rate_multiplier))
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Any] | str | Path | Rules,
        steps: int,
        loss: Callable[[nn.Module], float] | None = None,
        importance: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        check_plain(model, "Recipe(MODEL, rules, steps)", replaces=False)
        self.model, self.rules, self.loss, self.importance = model, parse_rules(rules), loss, importance
        stages = self.rules.stages or Stages()
        self.thin_from, self.thin_to, self.quantize_from = (
            round(fraction * steps) for fraction in (*stages.thin, stages.quantize)
        )
        self.thin_to = max(self.thin_to, self.thin_from + 1)
        self.quantize_from = max(self.quantize_from, self.thin_to)
        self.every, self.learning_rate_multiplier, self.steps = stages.every, stages.learning_rate_multiplier, 0
        if self.rules.allocation is None and loss is None:
            raise ConfigError(
                "[model] allocation = 'sensitivity' needs losses: give Recipe(..., loss=f), where f(model) is the loss "
                "on calibration data."
            )
        if self.rules.allocation is not None:
            plan_of(model, self.rules, tensors_of(model)[0])  # raises now if the rules do not fit the model
        self._plans: list[Planned] = []
        self._twist: Twist | None = None
        self._quantizes = False

    @property
    def done(self) -> bool:
        """Whether all stages are finished."""
        return self.steps >= (self.quantize_from if self._quantizes else self.thin_to)

    @property
    def replaces_next(self) -> bool:
        """Whether the next ``step`` replaces Parameter objects: delete a DistributedDataParallel wrapper before."""
        step = self.steps + 1
        return step == self.thin_to or (self._quantizes and step == self.quantize_from)

    def step(self) -> bool:
        """Count an optimiser step, and do what is due; to be called after each one.

        Returns:
            Whether Parameter objects were replaced: build a new optimiser then, as in the example of the class.

        Raises:
            BudgetError: The budget, or the limit of the file, cannot be met.
            ConfigError: ``rules`` or the importance do not fit the model, or parameters are to be replaced and the
                model is wrapped; then the step is not counted.
            NonFiniteError: A weight or its importance has a NaN or an infinity.
        """
        check_plain(self.model, "recipe.step()", self.replaces_next)
        self.steps += 1
        if self.steps == max(self.thin_from, 1):
            self._begin()
        if self._twist is not None:
            self._twist.step()
            if self.steps == self.thin_to:
                self._thin()
                self._twist = None
                if not self._quantizes or self.quantize_from > self.thin_to:
                    return True
        if self._quantizes and self.steps == self.quantize_from:
            self._quantize()
            return True
        return False

    def _begin(self) -> None:
        """Make the plans, from measured losses if the rules ask for it, and start to thin by their first methods."""
        rules, (tensors, owners) = self.rules, tensors_of(self.model)
        if rules.allocation is None and self.loss is not None:
            rules = allocate(self.model, rules, self.loss)
        plans = [plan for plan in plan_of(self.model, rules, tensors, Encoded(owners)) if plan.method is not None]
        self._plans = plans
        self._quantizes = any(plan.method is not None and inner_of(plan.method) for plan in plans)
        rising = Rising(0, self.thin_to - self.thin_from)
        self._twist = Twist(self.model, [_first(plan) for plan in plans], self.every, rising)

    def _thin(self) -> None:
        """Make the layers thin, by the first method of each plan."""
        self._plans = self._within_the_file(self._plans)
        Twist(self.model, [_first(plan) for plan in self._plans]).finish()

    def _within_the_file(self, plans: list[Planned]) -> list[Planned]:
        """The plans, made smaller until the file of the present weights keeps the configuration's limit."""
        limit, encoded = self.rules.file_bytes, Encoded(tensors_of(self.model)[1])
        while limit is not None:
            size = coded_bytes(contents(self.model), plans, encoded.thin)
            if size <= limit:
                break
            plans = [_smaller(plan, limit / size) for plan in plans]
        return plans

    def _quantize(self) -> None:
        """Store the floats of each code by the second method."""
        named = thin_tensors(self.model)
        plans = [(named[plan.tensors[0].name][0], plan) for plan in self._plans]
        wanted = {weight: (plan.name, plan.method) for weight, plan in plans if plan.method and inner_of(plan.method)}
        _store_floats(self.model, wanted, self.importance())
        limit = self.rules.file_bytes
        if (
            limit is not None and size_of(contents(self.model)) > limit
        ):  # the values have changed since the layers became thin
            materialize(self.model)
            self._plans = self._within_the_file(self._plans)
            carry_out(self.model, self._plans, tensors_of(self.model)[1])


def quantize_codes(model: nn.Module, then: Mapping[str, Any], importance: Mapping[str, Tensor] | None = None) -> Report:
    """Store the floats of a model's codes by another method, in place: ``{"method": "kmeans", "bits": 5}``.

    The result is that of a rule's ``then``; codes that are quantised already do not change. Parameter objects are
    replaced: build a new optimiser.

    Args:
        model: A model with thin layers, changed in place.
        then: The second method and its options, as in a rule.
        importance: Numbers >= 0 by the names of the thin model's parameters, as weights of squared errors.

    Returns:
        One row for each matrix, with its bytes in the file; and the totals of the file.

    Raises:
        ConfigError: No thin layer has floats that are stored directly, ``then`` is invalid, or the model is wrapped.
    """
    check_plain(model, "quantize_codes(MODEL, then)")
    weights = {weight for weight, _ in thin_tensors(model).values() if weight.direct}
    if not weights:
        raise ConfigError(
            "quantize_codes: no thin layer stores its floats directly: compress the model first, without 'then'."
        )
    wanted: dict[ThinWeight, tuple[str, Method]] = {}
    for weight in weights:
        name, options = parse_then(weight.name, then, "quantize_codes:")
        floats = [(e, s) for e, s in weight.method.code_shapes().items() if e not in weight.method.integers()]
        inner = tuple((e, METHODS[name].fit(as_matrix(shape), NO_LIMIT, **options)) for e, shape in floats)
        wanted[weight] = f"{weight.name}{THEN}{name}", Then(weight.method, inner)
    _store_floats(model, wanted, importance or {})
    return report_of(contents(model))


def _store_floats(
    model: nn.Module, wanted: Mapping[ThinWeight, tuple[str, Method]], importance: Mapping[str, Tensor]
) -> None:
    """Replace weights by others that store their floats by a second method: weight -> (name, both methods)."""
    check_importance(model, importance)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[ThinWeight, ThinWeight] = {}
    for weight, (name, method) in wanted.items():
        entries = {entry: names[id(parameter)] for entry, parameter in weight.named_parameters()}
        by_entry = {entry: importance[name] for entry, name in entries.items() if name in importance}
        made[weight] = weight.with_floats_stored(name, method, by_entry)
    for layer in [layer for layer in model.modules() if isinstance(layer, ThinLayer)]:
        for parameter, thin in list(layer.thin.items()):
            if isinstance(thin, ThinPart) and thin.group in made:
                make_thin(layer, {parameter: ThinPart(made[thin.group], thin.index)})
            elif isinstance(thin, ThinWeight) and thin in made:
                make_thin(layer, {parameter: made[thin]})
    make_sequential(model)


def _smaller(plan: Planned, fraction: float) -> Planned:
    """The plan refitted to a little less than ``fraction`` of its bits; unchanged if it cannot be refitted."""
    if plan.method is None or plan.fit is None:
        return plan
    return dataclasses.replace(plan, method=plan.fit(int(plan.method.bits() * fraction * 0.998)))


def _first(plan: Planned) -> Planned:
    """The plan without the rule's ``then``: its first method alone."""
    if plan.method is None or not inner_of(plan.method) or plan.fit is None:
        return plan
    fit = plan.fit

    def outer(bits: int) -> Any:
        return outer_of(fit(bits))

    return dataclasses.replace(plan, name=plan.name.partition(THEN)[0], method=outer_of(plan.method), fit=outer)
