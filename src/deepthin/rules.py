"""The one configuration: which matrix is stored by which method in how many bits.

A mapping, a TOML file and the command line say the same thing with the same keys (docs/configuration.md). This file
reads them, matches their patterns against tensor names, and shares a model's budget out over its matrices.
"""

import difflib
import fnmatch
import itertools
import math
import re
import tomllib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepthin.method import BudgetError, ConfigError, Method, round_up
from deepthin.methods import METHODS

DENSE = "dense"
ALLOCATIONS = ("flat", "uniform-bytes")
_MODEL_KEYS = ("ratio", "file_bytes", "ignore", "allocation")
_RULE_KEYS = ("method", "ratio", "bytes")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a model, as rules see it."""

    name: str  # dotted, as in the state dict: "encoder.fc1.weight"
    shape: tuple[int, ...]
    layer: str = "Linear"  # the type of the module that owns it
    covered: bool = True  # whether that module has a thin version
    also: tuple[str, ...] = ()  # further names under which the model shares this tensor


@dataclass(frozen=True, slots=True)
class Planned:
    """What becomes of one tensor. ``method`` is None for a matrix that stays dense."""

    tensor: Tensor
    name: str  # of the method, as users write it
    method: Method | None


@dataclass(frozen=True, slots=True)
class Rule:
    """One pattern, the method for what it matches, and at most one target of its own."""

    pattern: str
    method: str = "deepthin"
    ratio: float | None = None
    bytes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def own_target(self) -> bool:
        """Whether the rule itself says how large each of its matrices becomes."""
        sized = self.method in METHODS and METHODS[self.method].sized_by & self.options.keys()
        return self.ratio is not None or self.bytes is not None or bool(sized)

    def max_bits(self, shape: tuple[int, int]) -> int:
        """The rule's own target for one matrix, in bits."""
        if self.bytes is not None:
            return 8 * self.bytes
        dense_bits = 32 * shape[0] * shape[1]
        return int(self.ratio * dense_bits) if self.ratio is not None else 32 * dense_bits

    def fit(self, tensor: Tensor, max_bits: int) -> Method:
        """The method for one tensor; what cannot be done is said with the tensor's name."""
        named = METHODS[self.method]
        options = dict(self.options)
        if "seed" in named.preset:
            options.setdefault("seed", zlib.crc32(tensor.name.encode()))  # no two matrices share a table
        try:
            return named.fit(matrix_shape(tensor.shape), max_bits, **options)
        except BudgetError as error:
            raise BudgetError(
                f"{tensor.name}: {error}", smallest_bits=error.smallest_bits, smallest_ratio=error.smallest_ratio
            ) from None
        except ConfigError as error:
            raise ConfigError(f"rule {self.pattern!r}: {error}") from None

    def smallest_bits(self, tensor: Tensor) -> int:
        """The least that this rule's method needs for one tensor."""
        try:
            return self.fit(tensor, 0).bits()
        except BudgetError as error:
            return error.smallest_bits


@dataclass(frozen=True, slots=True)
class Rules:
    """A whole configuration."""

    rules: tuple[Rule, ...] = (Rule("*"),)
    ratio: float | None = None  # of all matched matrices together
    file_bytes: int | None = None  # of the whole written file
    ignore: tuple[str, ...] = ()
    allocation: str = "flat"

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
        _check_keys(source, ("model", "rules"), "the configuration")
        model = _table(source, "model")
        _check_keys(model, _MODEL_KEYS, "[model]")
        ratio = _number(model, "ratio", float, "[model]")
        file_bytes = _number(model, "file_bytes", int, "[model]")
        if ratio is not None and file_bytes is not None:
            raise ConfigError("[model] has both ratio and file_bytes: give one target.")
        ignore = model.get("ignore", ())
        if isinstance(ignore, str) or not all(isinstance(pattern, str) for pattern in ignore):
            raise ConfigError(f"[model] ignore = {ignore!r} must be a list of patterns, such as ['output'].")
        allocation = model.get("allocation", "flat")
        if allocation not in ALLOCATIONS:
            raise ConfigError(f"[model] allocation = {allocation!r} is unknown. {_closest(allocation, ALLOCATIONS)}")
        rules = tuple(_parse_rule(pattern, table) for pattern, table in _table(source, "rules").items())
        return cls(rules or (Rule("*"),), ratio, file_bytes, tuple(ignore), allocation)

    def match(self, tensors: Sequence[Tensor]) -> dict[str, Rule]:
        """The rule of every tensor that has one; the first match wins.

        A pattern covers a matrix whose name, or whose module's name at any level, it matches. A tensor with fewer than
        two dimensions is reached by its exact name or by a pattern that ends in ``bias``. A pattern that matches
        nothing, and a rule that reaches a layer without a thin version, raise ConfigError.
        """
        ignored: set[str] = set()
        for pattern in self.ignore:
            ignored |= {tensor.name for tensor in self._reached(pattern, tensors, "[model] ignore")}
        matched: dict[str, Rule] = {}
        for rule in self.rules:
            for tensor in self._reached(rule.pattern, tensors, "[rules]"):
                if tensor.name in ignored or tensor.name in matched:
                    continue
                if not tensor.covered and rule.method != DENSE:
                    raise ConfigError(
                        f"rule {rule.pattern!r} reaches {tensor.name}, a parameter of {tensor.layer}, which has no "
                        f"thin version. Covered are the parameters of Linear. Add "
                        f"{tensor.name.rpartition('.')[0] or tensor.name!r} to [model] ignore to keep it dense."
                    )
                matched[tensor.name] = rule
        return {tensor.name: matched[tensor.name] for tensor in tensors if tensor.name in matched}

    def plan(self, tensors: Sequence[Tensor], model_bits: int | None = None) -> list[Planned]:
        """What becomes of every matrix and of every tensor that a rule names, in the order of ``tensors``.

        ``model_bits`` is the payload that all matched matrices share; None takes it from ``ratio``. Matrices whose
        rule has its own target keep that; the rest is shared out by ``allocation``. A matrix of the shared budget that
        no plan makes smaller stays dense. Raises BudgetError with the smallest reachable ratio.
        """
        matched = self.match(tensors)
        chosen = {tensor.name: tensor for tensor in tensors if tensor.name in matched}
        dense_bits = {name: 32 * math.prod(tensor.shape) for name, tensor in chosen.items()}
        methods: dict[str, Method | None] = {}
        shared: dict[str, int] = {}  # name -> the least its method needs
        for name, rule in matched.items():
            if rule.method == DENSE:
                methods[name] = None
            elif rule.own_target:
                methods[name] = rule.fit(chosen[name], rule.max_bits(matrix_shape(chosen[name].shape)))
            elif self.ratio is None and self.file_bytes is None and model_bits is None:
                raise ConfigError(
                    f"rule {rule.pattern!r} has no target: give it ratio or bytes, or [model] a ratio or file_bytes."
                )
            elif (least := rule.smallest_bits(chosen[name])) < dense_bits[name]:
                shared[name] = least
            else:
                methods[name] = None
        if shared:
            compared = sum(bits for name, bits in dense_bits.items() if matched[name].method != DENSE)
            if model_bits is None:
                model_bits = int((self.ratio or 1.0) * compared)
            taken = sum(
                dense_bits[name] if method is None else method.bits()
                for name, method in methods.items()
                if matched[name].method != DENSE
            )
            smallest = taken + sum(shared.values())
            if smallest > model_bits:
                raise BudgetError(
                    f"The matched matrices cannot be stored in {max(model_bits, 0) // 8} bytes: the smallest plans "
                    f"together need {smallest // 8}. Use [model] ratio >= {round_up(smallest / compared)}, "
                    "another method, or [model] ignore.",
                    smallest_bits=smallest,
                    smallest_ratio=smallest / compared,
                )
            tensors_shared = {name: chosen[name] for name in shared}
            methods |= self._share(tensors_shared, matched, shared, dense_bits, model_bits - taken)
        return [
            Planned(tensor, DENSE if method is None else matched[tensor.name].method, method)
            for tensor in tensors
            if (method := methods.get(tensor.name)) is not None or len(tensor.shape) > 1
        ]

    def _share(
        self,
        tensors: Mapping[str, Tensor],
        matched: Mapping[str, Rule],
        floors: Mapping[str, int],
        dense_bits: Mapping[str, int],
        budget: int,
    ) -> dict[str, Method]:
        """Shares of one budget: by weight count or equal, between what a method needs and the dense size.

        What the whole-number settings leave over goes to the matrices in turn, largest first.
        """
        weights = {name: float(dense_bits[name]) if self.allocation == "flat" else 1.0 for name in tensors}

        def shares(level: float) -> dict[str, float]:
            return {n: min(max(level * weights[n], floors[n]), dense_bits[n]) for n in tensors}

        low, high = 0.0, max(dense_bits[name] / weights[name] for name in tensors)
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(shares(middle).values()) <= budget else (low, middle)
        methods = {name: matched[name].fit(tensors[name], int(share)) for name, share in shares(low).items()}
        left = budget - sum(method.bits() for method in methods.values())
        for name in sorted(tensors, key=lambda name: -dense_bits[name]):
            larger = matched[name].fit(tensors[name], min(methods[name].bits() + left, dense_bits[name]))
            if larger.bits() > methods[name].bits():
                left -= larger.bits() - methods[name].bits()
                methods[name] = larger
        return methods

    def _reached(self, pattern: str, tensors: Sequence[Tensor], where: str) -> list[Tensor]:
        """The tensors that a pattern covers; ConfigError with the closest name if there are none."""
        hits = _matcher(pattern)
        found: list[Tensor] = []
        for tensor in tensors:
            names = (tensor.name, *tensor.also)
            if len(tensor.shape) > 1:
                reached = any(hits(part) for name in names for part in itertools.accumulate(name.split("."), _dotted))
            else:
                reached = pattern in names or (pattern.endswith("bias") and any(map(hits, names)))
            if reached:
                found.append(tensor)
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


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) under which a tensor is stored: (outputs, all else), and near-square for a single dimension."""
    if len(shape) > 1:
        return shape[0], math.prod(shape[1:])
    cols = math.isqrt(max(math.prod(shape) - 1, 0)) + 1
    return -(-math.prod(shape) // cols), cols


def _dotted(path: str, part: str) -> str:
    return f"{path}.{part}"


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
    _check_keys(settings, (*_RULE_KEYS, *options), f"{where}, method {method}")
    ratio = _number(settings, "ratio", float, where)
    max_bytes = _number(settings, "bytes", int, where)
    if ratio is not None and max_bytes is not None:
        raise ConfigError(f"{where} has both ratio and bytes: give one target.")
    return Rule(pattern, method, ratio, max_bytes, {key: settings[key] for key in options if key in settings})


def _matcher(pattern: str) -> Any:
    """A test for names: ``re:`` and a regular expression that must match whole, or a glob whose * crosses dots."""
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)).fullmatch
    except re.error as error:
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


def _number(table: Mapping[str, Any], key: str, kind: type[int] | type[float], where: str) -> Any:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ConfigError(f"{where} {key} = {value!r} must be {'a whole number' if kind is int else 'a number'}.")
    if not 0 < value < math.inf or (kind is float and value > 1):
        raise ConfigError(f"{where} {key} = {value!r} must be above 0{'' if kind is int else ' and at most 1'}.")
    return kind(value)


def _closest(word: object, valid: Iterable[str]) -> str:
    """What to write instead: the closest valid word, and all of them where they are few."""
    words = list(valid)
    best = difflib.get_close_matches(str(word), words, n=1, cutoff=0.0)[0]
    listed = f" Valid: {', '.join(words)}." if len(words) <= 12 else ""
    return f"Did you mean {best!r}?{listed}"
