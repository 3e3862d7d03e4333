"""Bit allocation by sensitivity: losses at several sizes are measured, and bits go where they reduce the loss most.

A Lagrangian split along the lower convex hull of each matrix' measurements (Shoham and Gersho, 1988, "Efficient bit
allocation for an arbitrary set of quantizers"). Losses of matrices compressed one at a time are taken to add up.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepthin.method import Method
from deepthin.plan.file_limit import coded_bytes
from deepthin.plan.parse import Source, parse_rules
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned, Unit, shared_budget, spend, split_units, with_targets
from deepthin.torch.compress import plan_of
from deepthin.torch.files import contents
from deepthin.torch.importance import check_importance
from deepthin.torch.tensors import Encoded, tensors_of

_TRIES = 4  # at a larger plan for a matrix that uses up the rest of a file
SIZES = 8  # at which each matrix is tried, from the smallest possible to what the budget can spare


@dataclass(frozen=True)
class Point:
    """One measurement of a matrix.

    Attributes:
        method: The plan that it was stored by.
        bits: Its size in bits.
        loss: The loss of the model where this matrix alone is stored by the plan.
    """

    method: Method
    bits: int
    loss: float


def allocate(
    model: nn.Module,
    rules: Source,
    loss: Callable[[nn.Module], float],
    importance: Mapping[str, Tensor] | None = None,
    sizes: int = SIZES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rules:
    """Divide the model's budget among matrices by measured losses (sensitivity; Shoham and Gersho, 1988).

    Each matrix alone is stored at ``sizes`` sizes. Bits go where they reduce the loss most; losses of single matrices
    are assumed to add up. The result and the flat allocation are then measured whole, and the better one is returned.

    Args:
        model: The trained dense network; evaluated in evaluation mode and left as it was.
        rules: A configuration with ``ratio`` (a matrix costs ``Method.bits``) or ``file_bytes`` (a matrix costs its
            coded bytes in a file).
        loss: The mean loss of a model on calibration data; called ``sizes`` times for each matrix and twice at the end.
        importance: As in ``compress``.
        sizes: Sizes to try for each matrix.
        progress: Called with the number of measurements done and their total.

    Returns:
        The rules with a target for every matrix that shares the budget.

    Raises:
        BudgetError: The budget cannot be reached.
        ConfigError: Invalid rules or importance.
        NonFiniteError: A weight is NaN or infinite.
    """
    rules = parse_rules(rules)
    flat = dataclasses.replace(rules, allocation=1.0 if rules.allocation is None else rules.allocation)
    tensors, owners = tensors_of(model)
    check_importance(model, importance := importance or {})
    plans = {plan.tensors[0].name: plan for plan in plan_of(model, flat, tensors)}
    units, fixed, shared = split_units(flat, tensors)
    if not shared:
        return flat
    measured, methods = flat.file_bytes is not None, {unit.name: plans[unit.name].method for unit in shared}
    at_first = {name: method for name, method in methods.items() if method is not None}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            trial = _Trial(model, loss, Encoded(owners, importance), measured)
            if measured:
                taken = coded_bytes(contents(model), list(plans.values()), trial.encoded.thin)
                budget = 8 * ((flat.file_bytes or 0) - taken) + sum(trial.cost(u, at_first[u.name]) for u in shared)
            else:
                budget = shared_budget(flat, units, fixed, shared)
            floors = {unit.name: unit.smallest_bits() for unit in shared}
            curves: dict[str, list[Point]] = {}
            for number, unit in enumerate(shared):
                most = min(unit.dense_bits, budget - sum(floors.values()) + floors[unit.name])
                curves[unit.name] = trial.curve(unit, at_first[unit.name], floors[unit.name], most, sizes)
                progress(number + 1, len(shared))
            chosen = _split(shared, curves, budget)
            left = budget - sum(trial.cost(unit, chosen[unit.name]) for unit in shared)
            chosen = trial.spend(shared, chosen, left) if measured else spend(shared, chosen, left)
            best = min((chosen, at_first), key=lambda methods: trial.judged(methods, shared))
    finally:
        model.train(training)
    return with_targets(flat, tensors, {name: method.bits() for name, method in best.items()})


class _Trial:
    """Measures the loss of a model with some matrices replaced by their stored values, then restores them."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], float], encoded: Encoded, measured: bool) -> None:
        self.model, self.loss, self.encoded, self.measured = model, loss, encoded, measured

    def curve(self, unit: Unit, usual: Method, least: int, most: int, sizes: int) -> list[Point]:
        """Measurements of ``usual``, the flat plan, and of plans from ``least`` to ``most`` bits; by rising bits.

        The sizes rise by equal factors; equal plans are measured once.
        """
        steps = max(sizes - 2, 1)
        asked = [round(least * (max(most, least) / least) ** (step / steps)) for step in range(steps + 1)]
        methods = dict.fromkeys([usual, *(unit.fit(max(bits, least)) for bits in asked)])
        points = [Point(m, self.cost(unit, m), self.judged({unit.name: m}, [unit])) for m in methods]
        return sorted(points, key=lambda point: (point.bits, point.loss))

    def cost(self, unit: Unit, method: Method) -> int:
        """Bits of the matrix in a file; an upper bound where training changes the symbols."""
        if not self.measured or method.trains == "through":
            return method.bits()
        return 8 * self.encoded.thin(_planned(unit, method)).bytes

    def spend(self, units: list[Unit], methods: Mapping[str, Method], left: int) -> dict[str, Method]:
        """As ``plan.shares.spend`` with measured costs: each try for a larger plan scales the last one by its miss."""
        chosen = dict(methods)
        for unit in sorted(units, key=lambda unit: -unit.dense_bits):
            method, cost = chosen[unit.name], self.cost(unit, chosen[unit.name])
            wanted = method.bits() * (1 + left / cost)
            for _ in range(_TRIES):
                larger = unit.fit(min(max(int(wanted), method.bits()), unit.dense_bits))
                more = self.cost(unit, larger) - cost
                if more <= left:
                    chosen[unit.name], left = larger, left - more
                    break
                wanted = method.bits() + (wanted - method.bits()) * 0.99 * left / more
        return chosen

    def judged(self, methods: Mapping[str, Method], units: list[Unit]) -> float:
        """The loss with these matrices stored; infinite if it is not finite."""
        plans = [_planned(unit, methods[unit.name]) for unit in units]
        weights, dense = [self.encoded(plan) for plan in plans], [self.encoded.dense(plan) for plan in plans]
        saved = [[values.clone() for values in tensors] for tensors in dense]
        try:
            for weight, tensors in zip(weights, dense, strict=True):
                for index, values in enumerate(tensors):
                    values.copy_(weight(index))
            loss = float(self.loss(self.model))
        finally:
            for tensors, before in zip(dense, saved, strict=True):
                for values, old in zip(tensors, before, strict=True):
                    values.copy_(old)
        return loss if math.isfinite(loss) else math.inf


def _planned(unit: Unit, method: Method) -> Planned:
    return Planned(unit.tensors, unit.rule.name, method, projecting=unit.projecting)


def _split(units: list[Unit], curves: Mapping[str, list[Point]], budget: int) -> dict[str, Method]:
    """From the cheapest plans on, steps along the hulls in the order of what they save for a bit, while they fit."""
    hulls = {name: _hull(points) for name, points in curves.items()}
    left = budget - sum(hull[0].bits for hull in hulls.values())
    steps = [
        ((before.loss - after.loss) / (after.bits - before.bits), unit.name, place + 1)
        for unit in units
        for place, (before, after) in enumerate(zip(hulls[unit.name], hulls[unit.name][1:], strict=False))
    ]
    at, stopped = dict.fromkeys(hulls, 0), set[str]()
    for _, name, place in sorted(steps, key=lambda step: -step[0]):  # along a hull they fall, so its order is kept
        more = hulls[name][place].bits - hulls[name][place - 1].bits
        if name in stopped or more > left:
            stopped.add(name)
            continue
        at[name], left = place, left - more
    return {name: hull[at[name]].method for name, hull in hulls.items()}


def _hull(points: list[Point]) -> list[Point]:
    """The lower convex hull from the cheapest point to that of the lowest loss."""
    hull: list[Point] = []
    for point in points:
        if hull and point.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) > _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: Point, other: Point) -> float:
    if math.isinf(one.loss):
        return -math.inf
    return (other.loss - one.loss) / max(other.bits - one.bits, 1)
