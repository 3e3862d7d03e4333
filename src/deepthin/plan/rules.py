"""The one configuration: which matrix is stored by which method in how many bits (docs/configuration.md)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deepthin.errors import ConfigError, did_you_mean
from deepthin.methods import METHODS, THEN
from deepthin.plan.patterns import matcher, reaches
from deepthin.plan.tensor import Tensor

DENSE = "dense"
ALLOCATIONS = {"flat": 1.0, "uniform-bytes": 0.0}  # the power of its size that a matrix's share goes by
SENSITIVITY = "sensitivity"  # the loss that each matrix costs is measured: deepthin.torch.allocate
IMPORTANCE = ("none", "hessian", "adam")
NO_LIMIT = 1 << 62


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
        return bits_at(self.ratio, dense_bits) if self.ratio is not None else 32 * dense_bits


@dataclass(frozen=True, slots=True)
class Stages:
    """When a training that begins dense does what, in fractions of its steps (Han et al., 2016, arXiv:1510.00149).

    From ``thin[0]`` to ``thin[1]`` the rules' methods take away more and more, every so many steps; then the layers are
    thin and train on. From ``quantize`` on floats are stored by what ``then`` says, and train on; ``importance`` says
    what weighs their errors.
    """

    thin: tuple[float, float] = (0.2, 0.6)
    quantize: float = 0.8
    every: int = 50
    importance: Literal["none", "hessian", "adam"] = "none"
    learning_rate_multiplier: float | None = None  # of codes, times the dense one; None: that of each method

    def __post_init__(self) -> None:
        """Refuse what is no schedule; ConfigError."""
        if not 0 <= self.thin[0] < self.thin[1] <= self.quantize <= 1 or self.every < 1:
            raise ConfigError(
                f"[stages] thin = {list(self.thin)}, quantize = {self.quantize:g}, every = {self.every}: give "
                "fractions of the steps with 0 <= thin[0] < thin[1] <= quantize <= 1, and every from 1 on."
            )
        multiplier = self.learning_rate_multiplier
        if multiplier is not None and not 0 < multiplier < math.inf:
            raise ConfigError(
                f"[stages] learning_rate_multiplier = {multiplier!r} must be above 0: times the dense learning rate, "
                "for codes."
            )
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
        ignore = tuple(pattern for pattern in self.ignore if reaches(pattern, tensor))
        rules = tuple(rule for rule in self.rules if reaches(rule.pattern, tensor))
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

    def _reached(self, pattern: str, tensors: Sequence[Tensor], where: str) -> list[Tensor]:
        """The tensors that a pattern covers; ConfigError with the closest name if there are none."""
        hits = matcher(pattern)
        found = [tensor for tensor in tensors if reaches(pattern, tensor)]
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
        raise ConfigError(
            f"{where} pattern {pattern!r} matches nothing. {did_you_mean(pattern, sorted(modules | names))}"
        )


def bits_at(ratio: float, bits: int) -> int:
    """So many bits at a ratio; what is a whole number but for rounding stays one."""
    return math.floor(ratio * bits + 1e-6)


def _to_ignore(tensor: Tensor) -> str:
    """What to write in [model] ignore: the layer, but the tensor itself where patterns for layers do not reach it."""
    return (tensor.name.rpartition(".")[0] or tensor.name) if len(tensor.shape) > 1 else tensor.name
