"""Pruning schemes: one threshold for all classes, one fraction for each class, or thresholds relative to the spread.

See, Luong and Manning, 2016, arXiv:1606.09274, section 3.2. A class is all matrices of one rule.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from deepthin.errors import ConfigError
from deepthin.method import Method, Sparse
from deepthin.methods.float_coding import inner_of, outer_of
from deepthin.plan.parse import Source, parse_rules
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned, Unit, shared_budget, split_units, with_targets
from deepthin.torch.compress import plan_of
from deepthin.torch.tensors import Encoded, tensors_of

SCHEMES = ("class-blind", "class-uniform", "class-distribution")
_HALVINGS = 60  # of the range of the threshold


def allocate_pruning(model: nn.Module, rules: Source, scheme: str) -> Rules:
    """Divide ``[model] ratio`` among pruned matrices by the magnitudes of a dense model's weights.

    Pruning schemes of See, Luong and Manning (2016, arXiv:1606.09274). A class is all matrices of one rule.

    * ``class-blind``: one magnitude threshold for all classes.
    * ``class-uniform``: each class keeps the same fraction of its weights.
    * ``class-distribution``: a class's threshold is a common multiple of its standard deviation.

    The bits of positions count. The budget is used up to one value a matrix, or up to about 5 % where ``then`` stores
    the values, since their bits are estimated. Each matrix keeps at least one weight.

    Args:
        model: The trained dense network; it does not change.
        rules: A configuration with ``[model] ratio`` and the method ``pruned``.
        scheme: One of the three above.

    Returns:
        The rules with a target for every matrix that shares the budget.

    Raises:
        ConfigError: Another scheme, another method in the budget, or no ratio.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme = {scheme!r} is unknown. Valid: {', '.join(SCHEMES)}.")
    rules = dataclasses.replace(parse_rules(rules), allocation=1.0)
    if rules.ratio is None:
        raise ConfigError(f"{scheme} shares out a budget: give [model] a ratio.")
    tensors, owners = tensors_of(model)
    plans = {plan.tensors[0].name: plan for plan in plan_of(model, rules, tensors)}
    units, fixed, shared = split_units(rules, tensors)
    encoded = Encoded(owners)
    sizes: dict[str, np.ndarray] = {}
    for unit in shared:
        method = plans[unit.name].method
        if method is None or not isinstance(outer_of(method), Sparse):
            raise ConfigError(
                f"{scheme} is for pruning, and {unit.name} is stored by {unit.rule.name}: use dt.allocate."
            )
        dense = [abs(values.detach().float()).flatten() for values in encoded.dense(plans[unit.name])]
        sizes[unit.name] = np.sort(torch.cat(dense).cpu().numpy())
    budget = shared_budget(rules, units, fixed, shared)
    threshold = _thresholds(scheme, shared, sizes)

    def bits(level: float) -> dict[str, int]:
        limits, needed = threshold(level), dict[str, int]()
        for unit in shared:
            magnitudes = sizes[unit.name]
            removed = int(np.searchsorted(magnitudes, limits[unit.rule.pattern], side="right"))
            needed[unit.name] = max(_bits(unit, plans[unit.name], len(magnitudes) - removed), unit.smallest_bits())
        return needed

    low, high = 0.0, 1.0  # levels: 0 keeps all weights, 1 none
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(bits(middle).values()) <= budget else (middle, high)
    return with_targets(rules, tensors, bits(high))


def _thresholds(
    scheme: str, units: list[Unit], sizes: Mapping[str, Float[np.ndarray, " weights"]]
) -> Callable[[float], dict[str, float]]:
    """From a level, 0 (keep all weights) to 1 (remove all), to the threshold above which each class keeps weights."""
    classes = {
        rule: np.sort(np.concatenate([sizes[unit.name] for unit in units if unit.rule.pattern == rule]))
        for rule in {unit.rule.pattern for unit in units}
    }
    if scheme == "class-uniform":
        return lambda level: {
            rule: -1.0 if level == 0 else float(magnitudes[max(math.ceil(level * len(magnitudes)) - 1, 0)])
            for rule, magnitudes in classes.items()
        }
    scales = {rule: 1.0 if scheme == "class-blind" else _spread(magnitudes) for rule, magnitudes in classes.items()}
    most = max(float(magnitudes[-1]) / scales[rule] for rule, magnitudes in classes.items())
    return lambda level: {rule: level * most * scale for rule, scale in scales.items()}


def _spread(magnitudes: np.ndarray) -> float:
    """The root mean square, as the standard deviation of weights of mean 0; 1 if all are 0."""
    return float(np.sqrt(np.mean(np.square(magnitudes, dtype=np.float64)))) or 1.0


def _bits(unit: Unit, planned: Planned, count: int) -> int:
    """Bits of a matrix with ``count`` weights left; interpolated linearly where another method stores their values."""
    method = cast(Method, planned.method)
    outer = cast(Sparse, outer_of(method))
    if not inner_of(method):
        return outer.with_kept(count).bits() if count else 0
    least = unit.fit(unit.smallest_bits())
    fixed, one = least.bits(), cast(Sparse, outer_of(least)).kept
    return fixed + (method.bits() - fixed) * (count - one) // max(outer.kept - one, 1)
