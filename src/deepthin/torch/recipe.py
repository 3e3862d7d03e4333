"""One training that ends in a small file: train dense, thin step by step, train on, quantise codes, train on.

Deep Compression (Han, Mao and Dally, 2016, arXiv:1510.00149) with ``pruned`` then ``kmeans``; any methods can be used.
The thinning is DeepTwist's (``deepthin.torch.twist``); ``save`` codes what is stored.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from deepthin.errors import BudgetError, ConfigError
from deepthin.method import Method, as_matrix
from deepthin.methods import METHODS, THEN, fields, with_fields
from deepthin.methods.float_coding import FloatCoding, inner_of, outer_of
from deepthin.methods.then import Then
from deepthin.plan.file_limit import coded_bytes
from deepthin.plan.parse import Source, parse_rules, parse_then
from deepthin.plan.rules import NO_LIMIT, Stages
from deepthin.plan.shares import Planned, units_of
from deepthin.plan.tensor import Tensor as Named
from deepthin.storage.report import Report, report_of
from deepthin.storage.write import size_of
from deepthin.torch.allocation import allocate
from deepthin.torch.compress import aim, carry_out, materialize, plan_of
from deepthin.torch.exchange import make_thin, thin_tensors
from deepthin.torch.files import contents
from deepthin.torch.generated import ThinLayer
from deepthin.torch.importance import check_importance
from deepthin.torch.replaced import Watch, replacing
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

    Example:
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
        rules: Source,
        steps: int,
        loss: Callable[[nn.Module], float] | None = None,
        importance: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        check_plain(model, "Recipe(MODEL, rules, steps)", replaces=False)
        self.model, self.rules, self.loss, self.importance = model, parse_rules(rules), loss, importance
        stages = self.rules.stages or Stages()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"Recipe: steps = {steps!r} must be a whole number of optimiser steps, 1 or more.")
        begin, thin, quantize = (round(fraction * steps) for fraction in (*stages.thin, stages.quantize))
        self.thin_from = min(begin, steps - 1)  # however few steps there are, every stage is within them
        self.thin_to = min(max(thin, self.thin_from + 1), steps)
        self.quantize_from = min(max(quantize, self.thin_to), steps)
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
        self._quantizes = self._quantized = False
        self._watch: list[Watch] = []

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
            ConfigError: ``rules`` or the importance do not fit the model, or the optimiser was not built anew after
                the answer was True, so that nothing was trained; or parameters are to be replaced and the
                model is wrapped, and then the step is not counted.
            NonFiniteError: A weight or its importance has a NaN or an infinity.
        """
        check_plain(self.model, "recipe.step()", self.replaces_next)
        if self._watch and self._watch[0].stale:
            self._watch[0].refuse()
        self._watch = []
        with replacing(self.model, "recipe.step()") as watch:
            changed = self._step()
        self._watch = watch
        return changed

    def _step(self) -> bool:
        self.steps += 1
        if self.steps == max(self.thin_from, 1):
            self._begin()
        if self._twist is not None:
            self._twist.step()
            if self.steps == self.thin_to:
                self._thin()
                if not self._quantizes or self.quantize_from > self.thin_to:
                    return True
        if self._quantizes and self.steps == self.quantize_from:
            self._quantize()
            return True
        return False

    def finish(self) -> Report:
        """Go through the stages that are left at once, where a training ends before its last step.

        Parameter objects are replaced.

        Returns:
            What the file will hold.

        Raises:
            BudgetError: The file cannot be kept within ``file_bytes``.
            ConfigError: The model is wrapped.
        """
        check_plain(self.model, "recipe.finish()")
        with replacing(self.model, "recipe.finish()"):
            if self._twist is None and not self._plans:
                self._begin()
            if self._twist is not None:
                self._thin()
            if self._quantizes and not self._quantized:
                self._quantize()
        self.steps = max(self.steps, self.quantize_from)
        return report_of(contents(self.model))

    def state_dict(self) -> dict[str, Any]:
        """How far the recipe is, for a checkpoint: numbers, texts and lists, which ``torch.load`` takes as they are.

        Returns:
            The state, for ``load_state_dict``.
        """
        plans = [
            {"tensors": [t.name for t in plan.tensors], "method": plan.name, "fields": fields(plan.method)}
            for plan in self._plans
            if plan.method is not None
        ]
        stage = "quantized" if self._quantized else "dense" if self._twist is not None or not plans else "thin"
        return {"schedule": self._schedule(), "steps": self.steps, "stage": stage, "plans": plans}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring the recipe, and the layers of its model, to where a checkpoint was taken.

        The model becomes dense or thin as it was, with other values: load its own state afterwards, then build the
        optimiser and load its state.

            recipe.load_state_dict(saved["recipe"])
            model.load_state_dict(saved["model"])
            optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3, recipe.learning_rate_multiplier))
            optimizer.load_state_dict(saved["optimizer"])

        Args:
            state: What ``state_dict`` returned, of a recipe with the same model, rules and number of steps.

        Raises:
            ConfigError: The state is that of another recipe.
        """
        try:
            if (schedule := [int(number) for number in state["schedule"]]) != self._schedule():
                raise ConfigError(
                    f"Recipe.load_state_dict: the state is of a schedule {schedule}, but this recipe has "
                    f"{self._schedule()}: give the same [stages] and steps."
                )
            steps, stage, written = int(state["steps"]), state["stage"], list(state["plans"])
            saved = {tuple(plan["tensors"]): (plan["method"], plan["fields"]) for plan in written}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"Recipe.load_state_dict: this is no state of a recipe ({type(error).__name__}: {error}). Give what "
                "state_dict returned."
            ) from None
        with replacing(self.model, "recipe.load_state_dict()"):
            materialize(self.model)
            found, owners = tensors_of(self.model)
            self._plans, self._twist, self._quantized = self._planned(saved, found), None, stage == "quantized"
            self._quantizes = any(plan.method is not None and inner_of(plan.method) for plan in self._plans)
            self.steps = steps
            if stage == "dense" and self._plans:
                self._twist = self._twisting()
                self._twist.load_state_dict({"steps": steps - max(self.thin_from, 1) + 1})
            elif stage != "dense":
                plans = self._plans if self._quantized else [_first(plan) for plan in self._plans]
                carry_out(self.model, plans, owners, "scratch")

    def _planned(self, saved: Mapping[tuple[str, ...], tuple[str, Any]], found: list[Named]) -> list[Planned]:
        """The plans of a state for the tensors of this model; ConfigError if they are of other ones."""
        units = {tuple(tensor.name for tensor in unit.tensors): unit for unit in units_of(self.rules.match(found))}
        plans: list[Planned] = []
        for names, (name, written) in saved.items():
            unit = units.get(names)
            method = None if unit is None or unit.rule.name != name else with_fields(name, written)
            if unit is None or method is None or method.shape != unit.shape:
                raise ConfigError(
                    f"Recipe.load_state_dict: the state has {', '.join(names)} by {name}, which the rules of this "
                    "recipe do not: give the same model and rules."
                )
            plans.append(Planned(unit.tensors, name, method, unit.fit, unit.projecting))
        return plans

    def _schedule(self) -> list[int]:
        return [self.thin_from, self.thin_to, self.quantize_from, self.every]

    def _begin(self) -> None:
        """Make the plans, from measured losses if the rules ask for it, and start to thin by their first methods."""
        rules, (tensors, owners) = self.rules, tensors_of(self.model)
        if rules.allocation is None and self.loss is not None:
            rules = allocate(self.model, rules, self.loss)
        plans = [plan for plan in plan_of(self.model, rules, tensors, Encoded(owners)) if plan.method is not None]
        self._plans = plans
        self._quantizes = any(plan.method is not None and inner_of(plan.method) for plan in plans)
        self._twist = self._twisting()

    def _twisting(self) -> Twist:
        rising = Rising(0, self.thin_to - self.thin_from)
        return Twist(self.model, [_first(plan) for plan in self._plans], self.every, rising)

    def _thin(self) -> None:
        """Make the layers thin, by the first method of each plan."""
        self._plans = self._within_the_file(self._plans)
        Twist(self.model, [_first(plan) for plan in self._plans]).finish()
        self._twist = None

    def _within_the_file(self, plans: list[Planned]) -> list[Planned]:
        """The plans, made smaller until the file of the present weights keeps the configuration's limit."""
        limit, encoded = self.rules.file_bytes, Encoded(tensors_of(self.model)[1])
        while limit is not None and not _learn_steps(plans):
            size = coded_bytes(contents(self.model), plans, encoded.thin)
            if size <= limit:
                break
            smaller = [_smaller(plan, limit / size) for plan in plans]
            if _bits(smaller) >= _bits(plans):
                raise BudgetError(
                    f"The file cannot be kept within {limit} bytes: it has {size}, and no plan can be made smaller. "
                    f"Use [model] file_bytes >= {size}, or name more tensors.",
                    smallest_bits=8 * size,
                    smallest_ratio=size / contents(self.model).dense_bytes,
                )
            plans = smaller
        return plans

    def _quantize(self) -> None:
        """Store the floats of each code by the second method."""
        named = thin_tensors(self.model)
        plans = [(named[plan.tensors[0].name][0], plan) for plan in self._plans]
        wanted = {weight: (plan.name, plan.method) for weight, plan in plans if plan.method and inner_of(plan.method)}
        _store_floats(self.model, wanted, self.importance())
        limit, learned = self.rules.file_bytes, _learn_steps(self._plans)
        aim(self.model, limit)
        # The values have changed since the layers became thin
        if limit is not None and not learned and size_of(contents(self.model), bound=True) > limit:
            materialize(self.model)
            self._plans = self._within_the_file(self._plans)
            carry_out(self.model, self._plans, tensors_of(self.model)[1])
        self._quantized = True


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
    with replacing(model, "quantize_codes()"):
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


def _learn_steps(plans: list[Planned]) -> bool:
    """Whether training brings the file to its size, so that plans need not."""
    return any(plan.method is not None and FloatCoding(plan.method).steps() for plan in plans)


def _bits(plans: list[Planned]) -> int:
    return sum(plan.method.bits() for plan in plans if plan.method is not None)


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

    least = plan.method.bits()  # what the second method adds may be more than its floats take

    def outer(bits: int) -> Any:
        return outer_of(fit(max(bits, least)))

    return dataclasses.replace(plan, name=plan.name.partition(THEN)[0], method=outer_of(plan.method), fit=outer)
