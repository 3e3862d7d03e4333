"""The one configuration: which matrix is stored by which method in how many bits.

A mapping, a TOML file and the command line say the same thing with the same keys (docs/configuration.md). This file
reads them, matches their patterns against tensor names, and shares a model's budget out over its matrices.
"""

import dataclasses
import difflib
import fnmatch
import itertools
import math
import re
import tomllib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from deepthin.method import BudgetError, ConfigError, Method, Then, round_up
from deepthin.methods import METHODS, THEN

DENSE = "dense"
ALLOCATIONS = {"flat": 1.0, "uniform-bytes": 0.0}  # the power of its size that a matrix's share goes by
SENSITIVITY = "sensitivity"  # the loss that each matrix costs is measured: deepthin.torch.allocate
_MODEL_KEYS = ("ratio", "file_bytes", "ignore", "allocation")
_RULE_KEYS = ("method", "ratio", "bytes", "group", "then", "projection")
GROUPS = ("flat", "rows")
IMPORTANCE = ("none", "hessian", "adam")
NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a model, as rules see it."""

    name: str  # dotted, as in the state dict: "encoder.fc1.weight"
    shape: tuple[int, ...]
    uncovered: str = ""  # why it cannot be thin, if it cannot
    also: tuple[str, ...] = ()  # further names under which the model shares this tensor
    transposed: bool = False  # kept as (inputs, outputs)
    std: float = 1.0  # the standard deviation of a from-scratch start
    zero_row: int | None = None  # a row that stays zero: the padding of an embedding


@dataclass(frozen=True, slots=True)
class Planned:
    """What becomes of a tensor, or of a group together. ``method`` is None for a matrix that stays dense."""

    tensors: tuple[Tensor, ...]
    name: str  # of the method, as users write it
    method: Method | None
    fit: Callable[[int], Method] | None = None  # the same method within other bits
    projecting: tuple[bool, ...] = ()  # for each tensor, whether the shared projection comes from it; empty: from all


@dataclass(frozen=True, slots=True)
class Unit:
    """What one code is to hold: a tensor, or the members of a group."""

    rule: "Rule"
    tensors: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        """Of its first tensor."""
        return self.tensors[0].name

    @property
    def projecting(self) -> tuple[bool, ...]:
        """For each tensor, whether the rule takes the shared projection from it; empty if it does not say."""
        if self.rule.projection is None:
            return ()
        hits = _matcher(self.rule.projection)
        return tuple(any(map(hits, (tensor.name, *tensor.also))) for tensor in self.tensors)

    @property
    def dense_bits(self) -> int:
        """32 for each number."""
        return 32 * sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix to be stored."""
        if self.rule.group == "rows":
            matrices = [_matrix(tensor) for tensor in self.tensors]
            return sum(rows for rows, _ in matrices), matrices[0][1]
        return _matrix(self.tensors[0]) if len(self.tensors) == 1 else matrix_shape((self.dense_bits // 32,))

    def fit(self, max_bits: int) -> Method:
        """The method within a budget; what cannot be done is said with the tensor's name."""
        named = METHODS[self.rule.method]
        options = dict(self.rule.options)
        if "seed" in named.preset:
            options.setdefault("seed", zlib.crc32(self.name.encode()))  # no two matrices share a table
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

    def smallest_bits(self) -> int:
        """The least that the rule's method needs."""
        try:
            return self.fit(0).bits()
        except BudgetError as error:
            return error.smallest_bits


@dataclass(frozen=True, slots=True)
class Rule:
    """One pattern, the method for what it matches, and at most one target of its own."""

    pattern: str
    method: str = "deepthin"
    ratio: float | None = None
    bytes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    group: str | None = None  # "flat" or "rows": one code for all that the rule covers
    then: tuple[str, Mapping[str, Any]] | None = None  # a method, and its options, that stores the code's floats
    projection: str | None = None  # a pattern: of a group in rows by rank, the members whose projection all share

    @property
    def name(self) -> str:
        """Of the method, and of what stores its floats."""
        return f"{self.method}{THEN}{self.then[0]}" if self.then else self.method

    @property
    def own_target(self) -> bool:
        """Whether the rule itself says how large each of its matrices becomes."""
        sizes = METHODS[self.method].sized_by if self.method in METHODS and not self.then else ()
        sized = any(isinstance(self.options.get(option), int | float) for option in sizes)
        return self.ratio is not None or self.bytes is not None or sized

    def max_bits(self, dense_bits: int) -> int:
        """The rule's own target for one matrix, or for a whole group, in bits."""
        if self.bytes is not None:
            return 8 * self.bytes
        return _share_of(self.ratio, dense_bits) if self.ratio is not None else 32 * dense_bits


@dataclass(frozen=True, slots=True)
class Stages:
    """When a training that begins dense does what: shares of its steps (Han et al., 2016, arXiv:1510.00149, section 2).

    From ``thin[0]`` to ``thin[1]`` the rules' methods take away more and more, every so many steps; then the layers are
    thin and train on. From ``share`` on floats are stored by what ``then`` says, and train on; ``importance`` says what
    weighs their errors.
    """

    thin: tuple[float, float] = (0.2, 0.6)
    share: float = 0.8
    every: int = 50
    importance: Literal["none", "hessian", "adam"] = "none"
    rate: float | None = None  # of codes, times the dense one; None: that of each method

    def __post_init__(self) -> None:
        """Refuse what is no schedule; ConfigError."""
        if not 0 <= self.thin[0] < self.thin[1] <= self.share <= 1 or self.every < 1:
            raise ConfigError(
                f"[stages] thin = {list(self.thin)}, share = {self.share:g}, every = {self.every}: give shares of the "
                "steps with 0 <= thin[0] < thin[1] <= share <= 1, and every from 1 on."
            )
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ConfigError(f"[stages] rate = {self.rate!r} must be above 0: times the dense rate, for codes.")
        if self.importance not in IMPORTANCE:
            raise ConfigError(f"[stages] importance = {self.importance!r} is unknown. Valid: {', '.join(IMPORTANCE)}.")


@dataclass(frozen=True, slots=True)
class Rules:
    """A whole configuration."""

    rules: tuple[Rule, ...] = (Rule("*"),)
    ratio: float | None = None  # of all matched matrices together
    file_bytes: int | None = None  # of the whole written file
    ignore: tuple[str, ...] = ()
    allocation: float | None = 1.0  # the power of its size that a matrix's share goes by; None: by sensitivity
    stages: Stages | None = None

    @classmethod
    def parse(cls, source: "Mapping[str, Any] | str | Path | Rules") -> "Rules":
        """Rules from a mapping, a path to a TOML file, or Rules. ConfigError names the closest valid key or method."""
        if isinstance(source, Rules):
            return source
        if isinstance(source, str | Path):
            try:
                source = tomllib.loads(Path(source).read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise ConfigError(f"There is no configuration file {str(source)!r}.") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{source} is not valid TOML: {error}.") from None
        _check_keys(source, ("model", "rules", "stages"), "the configuration")
        model = _table(source, "model")
        _check_keys(model, _MODEL_KEYS, "[model]")
        ratio = _number(model, "ratio", float, "[model]")
        file_bytes = _number(model, "file_bytes", int, "[model]")
        if ratio is not None and file_bytes is not None:
            raise ConfigError("[model] has both ratio and file_bytes: give one target.")
        ignore = model.get("ignore", ())
        if not isinstance(ignore, list | tuple) or not all(isinstance(p, str) for p in cast(list[object], ignore)):
            raise ConfigError(f"[model] ignore = {ignore!r} must be a list of patterns, such as ['output'].")
        rules = tuple(_parse_rule(pattern, table) for pattern, table in _table(source, "rules").items())
        stages = _parse_stages(_table(source, "stages")) if "stages" in source else None
        allocation = _parse_allocation(model.get("allocation", "flat"))
        return cls(rules or (Rule("*"),), ratio, file_bytes, tuple(cast(list[str], ignore)), allocation, stages)

    def match(self, tensors: Sequence[Tensor]) -> dict[str, tuple[Tensor, Rule]]:
        """Every tensor that has a rule, and that rule; the first match wins.

        A pattern covers a matrix whose name, or whose module's name at any level, it matches. A tensor with fewer than
        two dimensions is reached by its exact name or by a pattern that ends in ``bias``. A pattern that matches
        nothing, and a rule that reaches what cannot be thin, raise ConfigError.
        """
        ignored: set[str] = set()
        for pattern in self.ignore:
            ignored |= {tensor.name for tensor in self._reached(pattern, tensors, "[model] ignore")}
        matched: dict[str, Rule] = {}
        for rule in self.rules:
            for tensor in self._reached(rule.pattern, tensors, "[rules]"):
                if tensor.name in ignored or tensor.name in matched:
                    continue
                if tensor.uncovered and rule.method != DENSE:
                    raise ConfigError(
                        f"rule {rule.pattern!r} reaches {tensor.name}: {tensor.uncovered}. Covered are the parameters "
                        "of linear, convolution, embedding, recurrent and attention layers of torch.nn. Add "
                        f"{_to_ignore(tensor)!r} to [model] ignore to keep it dense."
                    )
                matched[tensor.name] = rule
        return {tensor.name: (tensor, matched[tensor.name]) for tensor in tensors if tensor.name in matched}

    def for_one(self, tensor: Tensor) -> "Rules":
        """The same for a tensor that comes alone: without the patterns that do not reach it.

        [model] ratio is then that of this tensor, if its rule has no target of its own. ConfigError where a target or a
        group needs all tensors.
        """
        ignore = tuple(pattern for pattern in self.ignore if _reaches(pattern, tensor))
        rules = tuple(rule for rule in self.rules if _reaches(rule.pattern, tensor))
        rule = next(iter(rules), None)
        if rule is None or ignore or rule.method == DENSE:
            return dataclasses.replace(self, ignore=ignore, rules=rules)
        if rule.group or (self.file_bytes is not None and not rule.own_target):
            what = f"rule {rule.pattern!r} has a group" if rule.group else "[model] file_bytes is shared"
            raise ConfigError(
                f"{what}, which takes the shapes of all tensors, but {tensor.name} comes alone. Give them up front, "
                "deepthin.tensorflow.Variables(rules, shapes={name: shape}), or give a ratio instead."
            )
        ratio = None if rule.own_target else self.ratio
        return dataclasses.replace(self, ignore=ignore, rules=rules, ratio=ratio)

    def plan(self, tensors: Sequence[Tensor], model_bits: int | None = None) -> list[Planned]:
        """What becomes of every matrix and of every tensor that a rule names, in the order of ``tensors``.

        ``model_bits`` is the payload that all matched matrices share; None takes it from ``ratio``. Matrices whose
        rule has its own target keep that; the rest is shared out by ``allocation``. A matrix of the shared budget that
        no plan makes smaller stays dense. Raises BudgetError with the smallest reachable ratio.
        """
        units, methods, shared = self.split(tensors, model_bits is not None)
        if shared and self.allocation is None:
            raise ConfigError(
                "[model] allocation = 'sensitivity' goes by measured losses: deepthin.torch.allocate(model, rules, "
                "loss) returns rules with a share for every matrix; deepthin.torch.Recipe does so by itself."
            )
        if model_bits is not None or self.ratio is not None:
            budget = self.budget(units, methods, shared, model_bits)
            if shared:
                methods |= self._share(shared, budget)
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

    def split(
        self, tensors: Sequence[Tensor], limited: bool = False
    ) -> "tuple[list[Unit], dict[str, Method | None], list[Unit]]":
        """What each code is to hold; what becomes of those of a fixed size; and those that share the model's budget.

        ``limited``: there is such a budget, whatever the configuration says.
        """
        units = _units(self.match(tensors))
        methods: dict[str, Method | None] = {}
        shared: list[Unit] = []
        for unit in units:
            if unit.rule.method == DENSE or unit.dense_bits == 0:
                methods[unit.name] = None
            elif unit.rule.own_target:
                methods[unit.name] = unit.fit(unit.rule.max_bits(unit.dense_bits))
            elif self.ratio is None and self.file_bytes is None and not limited:
                pattern = unit.rule.pattern
                raise ConfigError(
                    f"rule {pattern!r} has no target: give it ratio or bytes, or [model] a ratio or file_bytes."
                )
            elif unit.smallest_bits() < unit.dense_bits:
                shared.append(unit)
            else:
                methods[unit.name] = None
        return units, methods, shared

    def budget(
        self,
        units: Sequence[Unit],
        methods: Mapping[str, Method | None],
        shared: Sequence[Unit],
        model_bits: int | None = None,
    ) -> int:
        """Bits that the shared ones have together, of ``ratio`` or ``model_bits``; BudgetError if they need more."""
        compared = sum(unit.dense_bits for unit in units if unit.rule.method != DENSE)
        if model_bits is None:
            model_bits = _share_of(self.ratio or 1.0, compared)
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

    def with_targets(self, tensors: Sequence[Tensor], bits: Mapping[str, int]) -> "Rules":
        """The same, but what shared the model's budget has targets of its own: ``bits`` by the name of each."""
        _, methods, shared = self.split(tensors)
        found: list[Rule] = []
        for rule in self.rules:  # what it covers, one by one, and then itself
            for unit in (unit for unit in shared if unit.rule is rule):
                pattern = rule.pattern if rule.group else unit.name
                found.append(dataclasses.replace(rule, pattern=pattern, bytes=-(-bits[unit.name] // 8)))
            found.append(rule)
        kept = [Rule(name, DENSE) for name, method in methods.items() if method is None]
        return dataclasses.replace(self, rules=(*kept, *found), ratio=None, file_bytes=None, allocation=1.0)

    def _share(self, units: Sequence[Unit], budget: int) -> dict[str, Method]:
        """Shares of one budget, by a power of the weight count, between what a method needs and the dense size.

        What the whole-number settings leave over is spent on some of them.
        """
        floors = [unit.smallest_bits() for unit in units]
        weights = [float(unit.dense_bits) ** (self.allocation or 0.0) for unit in units]

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

    def _reached(self, pattern: str, tensors: Sequence[Tensor], where: str) -> list[Tensor]:
        """The tensors that a pattern covers; ConfigError with the closest name if there are none."""
        hits = _matcher(pattern)
        found = [tensor for tensor in tensors if _reaches(pattern, tensor)]
        if found:
            return found
        names = {name for tensor in tensors for name in (tensor.name, *tensor.also)}
        modules = {name.rpartition(".")[0] for name in names} - {""}
        if not names:
            raise ConfigError(f"{where} pattern {pattern!r} matches nothing: the model has no matrices.")
        if any(hits(name) for name in names | modules):
            raise ConfigError(
                f"{where} pattern {pattern!r} matches no matrix, only tensors of one dimension. "
                "Name those exactly, or by a pattern that ends in 'bias'."
            )
        raise ConfigError(f"{where} pattern {pattern!r} matches nothing. {_closest(pattern, sorted(modules | names))}")


def _reaches(pattern: str, tensor: Tensor) -> bool:
    hits, names = _matcher(pattern), (tensor.name, *tensor.also)
    if len(tensor.shape) > 1:
        return any(hits(part) for name in names for part in itertools.accumulate(name.split("."), _dotted))
    return pattern in names or (pattern.endswith("bias") and any(map(hits, names)))


def _units(matched: Mapping[str, tuple[Tensor, Rule]]) -> list[Unit]:
    """Matched tensors one by one, those of a group together; ConfigError for a group that cannot be."""
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
            odd := next((t for t in members if _matrix(t)[1] != _matrix(members[0])[1]), None)
        ):
            raise ConfigError(
                f"rule {rule.pattern!r}: group = 'rows' stacks matrices of as many inputs, but {members[0].name} has "
                f"{_matrix(members[0])[1]} and {odd.name} has {_matrix(odd)[1]}. Use group = 'flat', or two rules."
            )
        unit = Unit(rule, tuple(members))
        if rule.projection is not None and len(set(unit.projecting)) != 2:
            matches = f"matches {'all' if all(unit.projecting) else 'none'} of {', '.join(t.name for t in members)}"
            raise ConfigError(
                f"rule {rule.pattern!r}: projection = {rule.projection!r} {matches}: name those whose projection the "
                "others are to share."
            )
        units.append(unit)
    return units


def spend(units: Sequence[Unit], methods: Mapping[str, Method], left: int) -> dict[str, Method]:
    """Plans, some of them larger: the bits that are left go to the matrices in turn, largest first."""
    found = dict(methods)
    for unit in sorted(units, key=lambda unit: -unit.dense_bits):
        larger = unit.fit(min(found[unit.name].bits() + left, unit.dense_bits))
        if larger.bits() > found[unit.name].bits():
            left -= larger.bits() - found[unit.name].bits()
            found[unit.name] = larger
    return found


def _matrix(tensor: Tensor) -> tuple[int, int]:
    return matrix_shape(tensor.shape[::-1] if tensor.transposed else tensor.shape)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) under which a tensor is stored: (outputs, all else), and near-square for a single dimension."""
    if len(shape) > 1:
        return shape[0], math.prod(shape[1:])
    cols = math.isqrt(max(math.prod(shape) - 1, 0)) + 1
    return -(-math.prod(shape) // cols), cols


def _share_of(ratio: float, bits: int) -> int:
    """Bits at a ratio; what is a whole number but for rounding stays one."""
    return math.floor(ratio * bits + 1e-6)


def _to_ignore(tensor: Tensor) -> str:
    """What to write in [model] ignore: the layer, but the tensor itself where patterns for layers do not reach it."""
    return (tensor.name.rpartition(".")[0] or tensor.name) if len(tensor.shape) > 1 else tensor.name


def _dotted(path: str, part: str) -> str:
    return f"{path}.{part}"


def _parse_allocation(allocation: Any) -> float | None:
    """The power of a word or number; None for "sensitivity"."""
    if allocation == SENSITIVITY:
        return None
    power = ALLOCATIONS.get(allocation, allocation) if isinstance(allocation, str) else allocation
    if isinstance(power, str):
        raise ConfigError(
            f"[model] allocation = {allocation!r} is unknown. {_closest(allocation, (*ALLOCATIONS, SENSITIVITY))} Or "
            "give a number from 0 (equal bytes) to 1 (equal ratios)."
        )
    if isinstance(power, bool) or not isinstance(power, int | float) or not 0 <= power <= 1:
        raise ConfigError(f"[model] allocation = {allocation!r} must be a word or a number from 0 to 1.")
    return float(power)


def _parse_stages(table: Mapping[str, Any]) -> Stages:
    usual = Stages()
    _check_keys(table, ("thin", "share", "every", "importance", "rate"), "[stages]")
    thin: Any = table.get("thin", usual.thin)
    pair = cast(list[Any], thin) if isinstance(thin, list | tuple) else []
    fine = len(pair) == 2 and all(type(n) in (int, float) for n in pair)
    share: Any = table.get("share", max(usual.share, *pair) if fine else 1.0)
    every: Any = table.get("every", usual.every)
    if not fine or type(share) not in (int, float) or type(every) is not int:
        raise ConfigError(
            f"[stages] thin = {thin!r}, share = {share!r}, every = {every!r}: write such as thin = [0.2, 0.6], "
            "share = 0.8, every = 50."
        )
    rate: float | None = _number(table, "rate", float, "[stages]", most=math.inf)
    importance: Any = table.get("importance", usual.importance)
    return Stages((float(pair[0]), float(pair[1])), float(share), every, importance, rate)


def _parse_rule(pattern: str, table: Any) -> Rule:
    where = f'[rules."{pattern}"]'
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table such as {{ method = 'deepthin', ratio = 0.01 }}, not {table!r}.")
    _matcher(pattern)
    settings = dict[str, Any](table)  # pyright: ignore[reportUnknownArgumentType] -- checked key by key below
    method = settings.get("method", "deepthin")
    if not isinstance(method, str) or (method != DENSE and method not in METHODS):
        raise ConfigError(f"{where} method = {method!r} is unknown. {_closest(method, (*METHODS, DENSE))}")
    options = METHODS[method].options if method in METHODS else ()
    if method == DENSE and (target := settings.keys() & {"ratio", "bytes", "group"}):
        raise ConfigError(f"{where} keeps its matrices dense, so {min(target)} has no meaning there: leave it out.")
    _check_keys(settings, (*_RULE_KEYS, *options), f"{where}, method {method}")
    ratio = _number(settings, "ratio", float, where)
    max_bytes = _number(settings, "bytes", int, where)
    if ratio is not None and max_bytes is not None:
        raise ConfigError(f"{where} has both ratio and bytes: give one target.")
    group = settings.get("group")
    if group is not None and group not in GROUPS:
        raise ConfigError(f"{where} group = {group!r} is unknown. {_closest(group, GROUPS)}")
    given = {key: settings[key] for key in options if key in settings}
    then = None if settings.get("then") is None else parse_then(method, settings["then"], where)
    projection = settings.get("projection")
    if projection is not None:
        if not isinstance(projection, str) or method != "rank" or group != "rows" or then is not None:
            raise ConfigError(
                f"{where} projection = {projection!r}: give a pattern, as '*weight_hh*', beside method = 'rank' and "
                "group = 'rows', and without then."
            )
        _matcher(projection)
    return Rule(pattern, method, ratio, max_bytes, given, group, then, projection)


def parse_then(method: str, table: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    """A method that stores another's floats, of a size that its options fix."""
    sized = [name for name, named in METHODS.items() if "bits" in named.sized_by]
    if method == DENSE or not isinstance(table, Mapping) or table.get("method") not in sized:  # pyright: ignore[reportUnknownMemberType]
        raise ConfigError(
            f"{where} then = {table!r}: give a method with a fixed number of bits for the floats of {method}, "
            f"such as {{ method = '{sized[0]}', bits = 8 }}. Valid methods: {', '.join(sized)}."
        )
    settings = dict[str, Any](table)  # pyright: ignore[reportUnknownArgumentType] -- checked key by key below
    name = settings.pop("method")
    _check_keys(settings, METHODS[name].options, f"{where} then, method {name}")
    if settings.get("bits") is None:
        raise ConfigError(f"{where} then = {table!r} has no bits: add how many for each number, such as bits = 8.")
    METHODS[name].fit((1, 1), 1 << 20, **settings)  # refuses what makes no sense
    return name, settings


def _matcher(pattern: str) -> Any:
    """A test for names: ``re:`` and a regular expression that must match whole, or a glob whose * crosses dots."""
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}.") from None


def _table(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = source.get(key, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{key} must be a table, not {table!r}.")
    return table  # pyright: ignore[reportUnknownVariableType] -- its keys are checked by the caller


def _check_keys(table: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
    for key in table:
        if key not in valid:
            raise ConfigError(f"{where} has no key {key!r}. {_closest(key, valid)}")


def _number(table: Mapping[str, Any], key: str, kind: type[int] | type[float], where: str, most: float = 1.0) -> Any:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ConfigError(f"{where} {key} = {value!r} must be {'a whole number' if kind is int else 'a number'}.")
    limit = math.inf if kind is int else most
    if not 0 < value < math.inf or value > limit:
        raise ConfigError(f"{where} {key} = {value!r} must be above 0{'' if limit > 1 else ' and at most 1'}.")
    return kind(value)


def _closest(word: object, valid: Iterable[str]) -> str:
    """What to write instead: the closest valid word, and all of them where they are few."""
    words = list(valid)
    best = difflib.get_close_matches(str(word), words, n=1, cutoff=0.0)[0]
    listed = f" Valid: {', '.join(words)}." if len(words) <= 12 else ""
    return f"Did you mean {best!r}?{listed}"
