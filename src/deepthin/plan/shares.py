"""Divide a budget of bits among the matrices of a model."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepthin.errors import BudgetError, ConfigError, round_up
from deepthin.method import FLOAT_BITS, Method, as_matrix, matrix_shape
from deepthin.methods import METHODS, PLUS, method_named
from deepthin.methods.then import Then
from deepthin.plan.patterns import Names
from deepthin.plan.rules import DENSE, NO_LIMIT, Rule, Rules, bits_at
from deepthin.plan.tensor import Tensor, matrix_of

BITS_OF_FLOAT = 2.0  # of a file trained to its size, for each number of the codes (docs/rate.md)
BESIDE_REST = 2.0  # times as many beside all weights, which take about half of the file


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan for a tensor, or for the members of a group together.

    Attributes:
        tensors: The tensor, or the members of the group in order.
        name: Name of the method, as users write it.
        method: The method with its settings; None for a matrix that stays dense.
        fit: The same method for another budget in bits; None where the size is fixed.
        projecting: For each tensor, whether the shared projection is computed from it; empty: from all.
    """

    tensors: tuple[Tensor, ...]
    name: str  # of the method, as users write it
    method: Method | None
    fit: Callable[[int], Method] | None = None  # the same method within other bits
    projecting: tuple[bool, ...] = ()  # for each tensor, whether the shared projection comes from it; empty: from all


@dataclass(frozen=True, slots=True)
class Unit:
    """What one code stores: a tensor, or the members of a group.

    Attributes:
        rule: The rule that matches them.
        tensors: The tensor, or the members of the group in order.
        projecting: For each tensor, whether the shared projection is computed from it; empty if the rule names none.
    """

    rule: Rule
    tensors: tuple[Tensor, ...]
    projecting: tuple[bool, ...] = ()

    @property
    def name(self) -> str:
        """Name of its first tensor."""
        return self.tensors[0].name

    @property
    def dense_bits(self) -> int:
        """32 bits for each weight."""
        return 32 * sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix that the method stores."""
        if self.rule.group == "rows":
            matrices = [matrix_of(tensor) for tensor in self.tensors]
            return sum(rows for rows, _ in matrices), matrices[0][1]
        return matrix_of(self.tensors[0]) if len(self.tensors) == 1 else matrix_shape((self.dense_bits // 32,))

    def fit(self, max_bits: int) -> Method:
        """Choose the method's settings for a budget.

        Args:
            max_bits: Upper bound on the stored bits, headers apart.

        Returns:
            The method with the largest code that fits.

        Raises:
            BudgetError: No setting fits; the message names the tensor.
            ConfigError: An option of the rule is invalid.
        """
        named = method_named(self.rule.summed)
        options = self._options(self.rule.method, self.rule.options, self.name)
        if self.rule.plus:
            of_second = dict(self.rule.plus[1])
            if "share" in of_second:
                options["share"] = of_second.pop("share")
            if not self.rule.has_rest:
                options["plus"] = self._options(self.rule.plus[0], of_second, f"{self.name}{PLUS}")
        then = self.rule.then

        def outer(bits: int) -> Method:
            return named.fit(self.shape, bits, **options)

        try:
            if then is None:
                return outer(max_bits)
            return Then.fit(outer, lambda shape: METHODS[then[0]].fit(shape, NO_LIMIT, **then[1]), max_bits)
        except BudgetError as error:
            raise BudgetError(
                f"{self.name}: {error}", smallest_bits=error.smallest_bits, smallest_ratio=error.smallest_ratio
            ) from None
        except ConfigError as error:
            raise ConfigError(f"rule {self.rule.pattern!r}: {error}") from None

    @staticmethod
    def _options(method: str, given: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Options of a method, with a seed of its own where it takes one: no two matrices share a table."""
        seed = {"seed": zlib.crc32(name.encode(errors="surrogatepass"))} if "seed" in METHODS[method].preset else {}
        return {**seed, **given}

    def trained(self, floats: float) -> "tuple[Unit, Method]":
        """The plan of a matrix whose size is known only after training.

        Args:
            floats: Numbers of the first method's code over the weights, if the rule does not say; at least as many as
                its smallest code has are used.

        Returns:
            The unit and its method. Where no code of the first method has fewer numbers than weights, the second one
            codes the weights themselves, and the unit's rule says so.

        Raises:
            BudgetError: The rule's own ``floats`` are too few.
            ConfigError: An option of the rule is invalid.
        """
        rule = self.rule
        if rule.then is None:
            return self, self.fit(NO_LIMIT)
        first = dataclasses.replace(self, rule=dataclasses.replace(rule, then=None, floats=None))
        wanted, least = bits_at(rule.floats or floats, self.dense_bits), first.smallest_bits()
        if rule.floats is None:
            wanted = max(wanted, least)
            if wanted >= self.dense_bits:
                alone = dataclasses.replace(rule, method=rule.then[0], options=rule.then[1], then=None, plus=None)
                return dataclasses.replace(self, rule=alone).trained(floats)
        inner = METHODS[rule.then[0]]
        shapes = first.fit(wanted)
        whole = {e: s for e, s in shapes.code_shapes().items() if e not in shapes.integers()}
        return self, Then(
            shapes, tuple((e, inner.fit(as_matrix(s), NO_LIMIT, **rule.then[1])) for e, s in whole.items())
        )

    def smallest_bits(self) -> int:
        """The bits of the smallest plan that the rule's method has for this matrix.

        Returns:
            Bits, headers apart.

        Raises:
            ConfigError: An option of the rule is invalid.
        """
        try:
            return self.fit(0).bits()
        except BudgetError as error:
            return error.smallest_bits


def units_of(matched: Mapping[str, tuple[Tensor, Rule]]) -> list[Unit]:
    """Split matched tensors into units: the members of a group together, all others one by one.

    Args:
        matched: Name -> tensor and rule, as ``Rules.match`` returns them.

    Returns:
        The units, in the order of their first tensors.

    Raises:
        ConfigError: A group with a vector, rows of different lengths, or a ``projection`` of none or all members.
    """
    names = Names([tensor for tensor, _ in matched.values()])
    groups: dict[str, list[Tensor]] = {}
    for tensor, rule in matched.values():
        if rule.group:
            groups.setdefault(rule.pattern, []).append(tensor)
    units: list[Unit] = []
    for tensor, rule in matched.values():
        members = groups.get(rule.pattern, [tensor]) if rule.group else [tensor]
        if members[0] is not tensor:
            continue
        if rule.group and (vector := next((t for t in members if len(t.shape) < 2), None)):
            raise ConfigError(f"rule {rule.pattern!r}: {vector.name} has one dimension and cannot join a group.")
        if rule.group == "rows" and (
            odd := next((t for t in members if matrix_of(t)[1] != matrix_of(members[0])[1]), None)
        ):
            raise ConfigError(
                f"rule {rule.pattern!r}: group = 'rows' stacks matrices of as many inputs, but {members[0].name} has "
                f"{matrix_of(members[0])[1]} and {odd.name} has {matrix_of(odd)[1]}. Use group = 'flat', or two rules."
            )
        projecting: tuple[bool, ...] = ()
        if rule.projection is not None:
            reached = {tensor.name for tensor in names.reached(rule.projection)}
            projecting = tuple(tensor.name in reached for tensor in members)
            if len(set(projecting)) != 2:
                matches = f"matches {'all' if all(projecting) else 'none'} of {', '.join(t.name for t in members)}"
                raise ConfigError(
                    f"rule {rule.pattern!r}: projection = {rule.projection!r} {matches}: name those whose projection "
                    "the others are to share."
                )
        units.append(Unit(rule, tuple(members), projecting))
    return units


def spend(units: Sequence[Unit], methods: Mapping[str, Method], left: int) -> dict[str, Method]:
    """Spend left-over bits: each matrix in turn, largest first, gets the largest plan that the rest allows.

    Args:
        units: The units that share the budget.
        methods: Unit name -> present plan.
        left: Bits of the budget that are not used by ``methods``.

    Returns:
        Unit name -> plan, none smaller than before; together at most ``left`` bits more.
    """
    found = dict(methods)
    for unit in sorted(units, key=lambda unit: -unit.dense_bits):
        larger = unit.fit(min(found[unit.name].bits() + left, unit.dense_bits))
        if larger.bits() > found[unit.name].bits():
            left -= larger.bits() - found[unit.name].bits()
            found[unit.name] = larger
    return found


def plan_tensors(rules: Rules, tensors: Sequence[Tensor], model_bits: int | None = None) -> list[Planned]:
    """Plan every matrix of a model, and every other tensor that a rule names.

    Units whose rule has its own target get that; the others share the budget by ``rules.allocation``. A matrix of the
    shared budget that no plan makes smaller stays dense.

    Args:
        rules: The configuration.
        tensors: All tensors of the model.
        model_bits: Budget of all matched matrices together, in bits, headers apart; None: from ``rules.ratio``.

    Returns:
        The plans, in the order of ``tensors``; a group appears once, at its first member.

    Raises:
        ConfigError: A pattern matches nothing, a rule has no target, a group cannot be formed, or the allocation is by
            sensitivity, which needs measured losses.
        BudgetError: The smallest plans exceed the budget; it carries the smallest reachable ratio.
    """
    units, methods, shared = split_units(rules, tensors, model_bits is not None)
    if shared and rules.allocation is None:
        raise ConfigError(
            "[model] allocation = 'sensitivity' goes by measured losses: deepthin.torch.allocate(model, rules, "
            "loss) returns rules with a share for every matrix; deepthin.torch.Recipe does so by itself."
        )
    if model_bits is not None or rules.ratio is not None:
        budget = shared_budget(rules, units, methods, shared, model_bits)
        if shared:
            methods |= share_out(rules, shared, budget)
    names = {unit.name: unit for unit in units}
    within = {tensor.name for unit in units for tensor in unit.tensors}
    planned: list[Planned] = []
    for tensor in tensors:
        method = methods.get(tensor.name)
        if tensor.name in names and method is not None:
            unit = names[tensor.name]
            planned.append(Planned(unit.tensors, unit.rule.name, method, unit.fit, unit.projecting))
        elif len(tensor.shape) > 1 and (tensor.name not in within or tensor.name in names):
            planned.append(Planned((tensor,), DENSE, None))
    return planned


def split_units(
    rules: Rules, tensors: Sequence[Tensor], limited: bool = False
) -> tuple[list[Unit], dict[str, Method | None], list[Unit]]:
    """Split the units into those of fixed size and those that share the model's budget.

    Args:
        rules: The configuration.
        tensors: All tensors of the model.
        limited: Whether there is a budget even if ``rules`` have neither ratio nor file_bytes.

    Returns:
        All units; unit name -> plan of those of fixed size (None: dense); and the units that share the budget.

    Raises:
        ConfigError: As for ``plan_tensors``.
        BudgetError: A rule's own target is smaller than its smallest plan.
    """
    units = units_of(rules.match(tensors))
    methods: dict[str, Method | None] = {}
    default = default_floats(rules, units)
    for place, unit in enumerate(units):
        known = unit.rule.floats is not None or (rules.ratio is None and (default or unit.rule.then is None))
        if unit.rule.learns_step and not unit.rule.own_target and unit.dense_bits and known:
            units[place], methods[unit.name] = unit.trained(default or 0.0)
    shared: list[Unit] = []
    failed: list[tuple[Unit, BudgetError]] = []
    for unit in units:
        if unit.name in methods:
            continue
        if unit.rule.method == DENSE or unit.dense_bits == 0:
            methods[unit.name] = None
        elif unit.rule.own_target:
            try:
                methods[unit.name] = unit.fit(unit.rule.max_bits(unit.dense_bits))
            except BudgetError as error:
                failed.append((unit, error))
        elif rules.ratio is None and rules.file_bytes is None and not limited:
            pattern = unit.rule.pattern
            raise ConfigError(
                f"rule {pattern!r} has no target: give it ratio or bytes, or [model] a ratio or file_bytes."
            )
        elif unit.smallest_bits() < unit.dense_bits:
            shared.append(unit)
        else:
            methods[unit.name] = None
    if failed:
        raise _smallest_of_all(failed)
    return units, methods, shared


def default_floats(rules: Rules, units: Sequence[Unit]) -> float | None:
    """How many numbers the first methods get where ``then`` codes them and no rule says so.

    Args:
        rules: The configuration.
        units: All units of the model.

    Returns:
        Numbers over weights, such that the file has two bits for each of them beside the first methods' integers; None
        without ``file_bytes``, or where no first method gets its numbers so.
    """
    trained = [u for u in units if u.rule.learns_step and u.rule.then and not u.rule.own_target and not u.rule.floats]
    if rules.file_bytes is None or not trained:
        return None

    def bits(floats: float) -> float:
        total = 0.0
        for unit in trained:
            first, shapes = unit.trained(floats)[1], dict[str, tuple[int, ...]]()
            if isinstance(first, Then):
                shapes = first.outer.code_shapes()
                total += sum(8 * kind.bytes(math.prod(shapes[e])) for e, kind in first.outer.integers().items())
            for_each = BITS_OF_FLOAT * (BESIDE_REST if unit.rule.has_rest else 1)
            total += for_each * floats * unit.dense_bits / FLOAT_BITS
        return total

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if bits(middle) <= 8 * rules.file_bytes else (low, middle)
    return max(low, 1 / 4096)


def _smallest_of_all(failed: Sequence[tuple[Unit, BudgetError]]) -> BudgetError:
    """One error for all matrices that their rules' targets are too small for: with what it names, none fails again."""
    unit, worst = max(failed, key=lambda pair: pair[1].smallest_bits / pair[0].dense_bits)
    bits, ratio = max(error.smallest_bits for _, error in failed), worst.smallest_bits / unit.dense_bits
    message = str(worst)
    if len(failed) > 1 or len(unit.tensors) > 1 or unit.rule.then:
        way = f"ratio >= {round_up(ratio)}" if ratio <= 1 else "method = 'dense'"
        message += (
            f" All {len(failed)} matrices whose own targets are too small can be stored with {way}, or with bytes >= "
            f"{-(-bits // 8)}."
        )
    return BudgetError(message, smallest_bits=bits, smallest_ratio=ratio)


def shared_budget(
    rules: Rules,
    units: Sequence[Unit],
    methods: Mapping[str, Method | None],
    shared: Sequence[Unit],
    model_bits: int | None = None,
) -> int:
    """Bits for the units that share the budget, after those of fixed size are subtracted.

    Args:
        rules: The configuration.
        units: All units of the model.
        methods: Unit name -> plan of those of fixed size; None for dense ones, which count unless a rule keeps them so.
        shared: The units that share the budget.
        model_bits: Budget of all matched matrices together, in bits; None: from ``rules.ratio``.

    Returns:
        Bits, headers apart.

    Raises:
        BudgetError: The smallest plans exceed the budget; it carries the smallest reachable ratio.
    """
    units = [unit for unit in units if not unit.rule.apart]
    compared = sum(unit.dense_bits for unit in units if unit.rule.method != DENSE)
    if model_bits is None:
        model_bits = bits_at(rules.ratio or 1.0, compared)
    taken = 0
    for unit in units:
        if unit.rule.method != DENSE and unit.name in methods:
            method = methods[unit.name]
            taken += unit.dense_bits if method is None else method.bits()
    smallest = taken + sum(unit.smallest_bits() for unit in shared)
    if smallest > model_bits:
        raise BudgetError(
            f"The matched matrices cannot be stored in {max(model_bits, 0) // 8} bytes: the smallest plans, "
            f"and what the rules' own targets fix, need {smallest // 8}. Use [model] ratio >= "
            f"{round_up(smallest / compared)}, another method, or [model] ignore.",
            smallest_bits=smallest,
            smallest_ratio=smallest / compared,
        )
    return model_bits - taken


def with_targets(rules: Rules, tensors: Sequence[Tensor], bits: Mapping[str, int]) -> Rules:
    """Replace the model's target by one target for each unit that shared it.

    Args:
        rules: The configuration.
        tensors: All tensors of the model.
        bits: Unit name -> budget in bits, rounded up to whole bytes.

    Returns:
        Rules with the same plans for all other units, and without ``ratio`` and ``file_bytes``.

    Raises:
        ConfigError: As for ``plan_tensors``.
        BudgetError: A rule's own target is smaller than its smallest plan.
    """
    units, methods, shared = split_units(rules, tensors)
    sharing = {unit.name for unit in shared}
    targets = [Rule(t.name, DENSE) for unit in units if methods.get(unit.name, unit) is None for t in unit.tensors]
    for rule in rules.rules:  # one rule for each unit that shared the budget, then the rule for the rest that it covers
        covered = [unit for unit in units if unit.rule is rule]
        for unit in covered:
            if unit.name in sharing:
                pattern = rule.pattern if rule.group else unit.name
                targets.append(dataclasses.replace(rule, pattern=pattern, bytes=-(-bits[unit.name] // 8)))
        if any(methods.get(unit.name) is not None for unit in covered):
            targets.append(rule)
    return dataclasses.replace(rules, rules=tuple(targets), ratio=None, file_bytes=None, allocation=1.0)


def share_out(rules: Rules, units: Sequence[Unit], budget: int) -> dict[str, Method]:
    """Divide a budget among units, in proportion to (dense size) to the power ``rules.allocation``.

    Each share is clipped to the range from the smallest plan to the dense size; the common factor is found by
    bisection. Bits that the integer settings leave over are then spent, largest matrix first.

    Args:
        rules: The configuration; ``allocation`` is from 0 (equal bytes) to 1 (equal ratios).
        units: The units that share the budget.
        budget: Bits for all of them, headers apart; at least the sum of their smallest plans.

    Returns:
        Unit name -> plan.
    """
    floors = [unit.smallest_bits() for unit in units]
    weights = [float(unit.dense_bits) ** (rules.allocation or 0.0) for unit in units]

    def shares(level: float) -> list[float]:
        return [
            min(max(level * weight, floor), unit.dense_bits)
            for unit, weight, floor in zip(units, weights, floors, strict=True)
        ]

    low, high = 0.0, max(unit.dense_bits / weight for unit, weight in zip(units, weights, strict=True))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) <= budget else (low, middle)
    methods = {unit.name: unit.fit(int(share)) for unit, share in zip(units, shares(low), strict=True)}
    return spend(units, methods, budget - sum(method.bits() for method in methods.values()))
