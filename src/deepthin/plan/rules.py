"""The one configuration: which matrix is stored by which method in how many bits (docs/configuration.md)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deepthin.errors import ConfigError, did_you_mean
from deepthin.methods import METHODS, PLUS, REST, THEN
from deepthin.plan.patterns import Names, reaches
from deepthin.plan.tensor import Tensor

DENSE = "dense"
ALLOCATIONS = {"flat": 1.0, "uniform-bytes": 0.0}  # the power of its size that a matrix's share goes by
SENSITIVITY = "sensitivity"  # the loss that each matrix costs is measured: deepthin.torch.allocate
IMPORTANCE = ("none", "hessian", "adam")
NO_LIMIT = 1 << 62
BIASES = "[model] biases"
SMALL = 0.01  # of the model: targets below it store biases in 16 bits, too


@dataclass(frozen=True, slots=True)
class Rule:
    """One pattern, and the method and target for the tensors that it matches.

    Attributes:
        pattern: A glob whose ``*`` also matches dots, or ``re:`` and a regular expression.
        method: Name of the method; ``"dense"`` stores the tensors as they are.
        ratio: Target for each matrix, stored bits / (32 bits a weight), in (0, 1]; None: no such target.
        bytes: Target for each matrix in bytes, instead of ``ratio``.
        options: Keyword arguments of the method's ``fit``.
        group: ``"flat"`` or ``"rows"``: one code for all matched tensors; None: one code each.
        then: The method, and its options, that quantises the floats of the code.
        projection: Of a group in rows by ``rank``: a pattern for the members whose projection all share.
        floats: With a ``then`` that learns its step: numbers of the first method's code over the weights, in (0, 1].
        apart: Whether the tensors do not count towards the model's ratio: ``[model] biases``.
        plus: The method, and its options and ``share``, whose code is added to that of ``method``.
    """

    pattern: str
    method: str = "deepthin"
    ratio: float | None = None
    bytes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    group: str | None = None  # "flat" or "rows": one code for all that the rule covers
    then: tuple[str, Mapping[str, Any]] | None = None  # a method, and its options, that stores the code's floats
    projection: str | None = None  # a pattern: of a group in rows by rank, the members whose projection all share
    floats: float | None = None
    apart: bool = False
    plus: tuple[str, Mapping[str, Any]] | None = None

    @property
    def summed(self) -> str:
        """Name of the method, with that of the one whose code is added."""
        return f"{self.method}{PLUS}{self.plus[0]}" if self.plus else self.method

    @property
    def has_rest(self) -> bool:
        """Whether all weights are added, whose size is known only after training."""
        return self.plus is not None and self.plus[0] == REST

    @property
    def learns_step(self) -> bool:
        """Whether the size is known only after training: symbols are coded whose step is learned."""
        name = self.then[0] if self.then else self.method
        return name in METHODS and METHODS[name].learns_step

    @property
    def name(self) -> str:
        """Name of the method, with that of the one that quantises its floats, as files and reports show it."""
        return f"{self.summed}{THEN}{self.then[0]}" if self.then else self.summed

    @property
    def own_target(self) -> bool:
        """Whether the rule itself fixes the size of each of its matrices, independent of the model's target."""
        sizes = METHODS[self.method].sized_by if self.method in METHODS and not self.then and not self.plus else ()
        sized = any(isinstance(self.options.get(option), int | float) for option in sizes)
        return self.ratio is not None or self.bytes is not None or sized

    def max_bits(self, dense_bits: int) -> int:
        """The rule's own target.

        Args:
            dense_bits: 32 times the number of weights in the matrix or group.

        Returns:
            The bits that its code may take; ``32 * dense_bits``, which never binds, if neither ratio nor bytes is
            given.
        """
        if self.bytes is not None:
            return 8 * self.bytes
        return bits_at(self.ratio, dense_bits) if self.ratio is not None else 32 * dense_bits


IN_16_BITS = Rule(BIASES, "uniform", options={"bits": 16}, apart=True)


@dataclass(frozen=True, slots=True)
class Stages:
    """The schedule of a training that starts dense, in fractions of its steps (Han et al., 2016, arXiv:1510.00149).

    Attributes:
        thin: From the first fraction to the second, weights are replaced, every ``every`` steps, by what the methods
            make of them at a falling size; then the layers become thin and training goes on.
        quantize: From this fraction on, the floats of the codes are quantised by each rule's ``then``.
        every: Optimiser steps between two replacements, >= 1.
        importance: What weighs the errors of quantisation: ``"none"``, ``"hessian"`` or ``"adam"``.
        learning_rate_multiplier: Learning rate of codes / learning rate of dense weights, > 0; None: each method's own.

    Raises:
        ConfigError: Not ``0 <= thin[0] < thin[1] <= quantize <= 1``, or a value out of range.
    """

    thin: tuple[float, float] = (0.2, 0.6)
    quantize: float = 0.8
    every: int = 50
    importance: Literal["none", "hessian", "adam"] = "none"
    learning_rate_multiplier: float | None = None  # of codes, times the dense one; None: that of each method

    def __post_init__(self) -> None:
        """Refuse invalid schedules with ConfigError."""
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
    """A whole configuration.

    Attributes:
        rules: The rules; the first match wins.
        ratio: Target for all matched matrices together, stored bits / (32 bits a weight), in (0, 1].
        file_bytes: Target for the whole written file in bytes, instead of ``ratio``.
        ignore: Patterns of tensors that stay dense, whatever the rules say.
        allocation: Exponent, 0 to 1: the share of a matrix in the budget is proportional to (its dense size) to this
            power. 1 gives equal ratios, 0 equal bytes; None allocates by measured losses.
        stages: The schedule of ``deepthin.torch.Recipe``.
        biases: How vectors are stored that no other rule matches: a rule; None: as they are; ``"default"``: as
            ``bias_rule`` says.
    """

    rules: tuple[Rule, ...] = (Rule("*"),)
    ratio: float | None = None  # of all matched matrices together
    file_bytes: int | None = None  # of the whole written file
    ignore: tuple[str, ...] = ()
    allocation: float | None = 1.0  # the power of its size that a matrix's share goes by; None: by sensitivity
    stages: Stages | None = None
    biases: Rule | Literal["default"] | None = "default"

    def match(self, tensors: Sequence[Tensor]) -> dict[str, tuple[Tensor, Rule]]:
        """Match the rules to a model's tensors; the first match wins.

        The exact name of a tensor or module means that tensor or module only; anything else is a pattern. A pattern
        matches a matrix by its name, or by the name of a module that contains it. A tensor with fewer than two
        dimensions is matched by its exact name, or by a pattern that ends in ``bias``.

        Args:
            tensors: All tensors of the model.

        Returns:
            Name -> tensor and rule, for every tensor that a rule matches, in the order of ``tensors``.

        Raises:
            ConfigError: A pattern matches nothing, a rule matches a tensor that cannot be thin, or earlier rules match
                all tensors of a rule.
        """
        names = Names(tensors)
        ignored = {tensor.name for pattern in self.ignore for tensor in _reached(names, pattern, "[model] ignore")}
        matched: dict[str, Rule] = {}
        for rule in self.rules:
            reached = [t for t in _reached(names, rule.pattern, "[rules]") if t.name not in ignored]
            free = [tensor for tensor in reached if tensor.name not in matched]
            if reached and not free:
                raise ConfigError(_shadowed(rule, [matched[tensor.name] for tensor in reached]))
            if rule.method != DENSE and (uncovered := [tensor for tensor in free if tensor.uncovered]):
                raise ConfigError(_uncovered(rule, uncovered, names))
            matched |= {tensor.name: rule for tensor in free}
        if (vectors := self.bias_rule(tensors)) is not None:
            free = (t for t in tensors if len(t.shape) == 1 and not t.uncovered and t.name not in ignored)
            matched = {tensor.name: vectors for tensor in free} | matched
        return {tensor.name: (tensor, matched[tensor.name]) for tensor in tensors if tensor.name in matched}

    def bias_rule(self, tensors: Sequence[Tensor]) -> Rule | None:
        """How biases, and the weights and biases of normalisation, are stored if no rule of their own matches them.

        Args:
            tensors: All tensors of the model.

        Returns:
            What ``[model] biases`` says. By default, ``coded`` where training brings the file to its size, else 16 bits
            where the target is under one hundredth of the model (``within``: or else out of reach); None: as they are.
        """
        if self.biases != "default":
            return self.biases
        if self.file_bytes is not None and any(rule.learns_step for rule in self.rules):
            return Rule(BIASES, "coded", apart=True)
        share = self.ratio or 1.0
        if self.file_bytes is not None:
            share = self.file_bytes / max(4 * sum(math.prod(tensor.shape) for tensor in tensors), 1)
        return IN_16_BITS if share < SMALL else None

    def for_one(self, tensor: Tensor) -> "Rules":
        """The same rules for one tensor whose model is not known, without the patterns that do not match it.

        ``[model] ratio`` becomes the target of this tensor, unless its rule has a target of its own.

        Args:
            tensor: The tensor.

        Returns:
            Rules for a model of this tensor only.

        Raises:
            ConfigError: A group, or ``file_bytes``, needs the shapes of all tensors.
        """
        ignore = tuple(pattern for pattern in self.ignore if reaches(pattern, tensor))
        rule = next((rule for rule in self.rules if reaches(rule.pattern, tensor)), None)
        rules = () if rule is None else (rule,)
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


def _reached(names: Names, pattern: str, where: str) -> list[Tensor]:
    """The tensors that a pattern matches; ConfigError with the closest name if there are none."""
    reached = names.reached(pattern)
    if reached:
        return reached
    if not names.tensors:
        raise ConfigError(f"{where} pattern {pattern!r} matches nothing: the model has no matrices.")
    if names.named(pattern):
        raise ConfigError(
            f"{where} pattern {pattern!r} matches no matrix, only tensors of one dimension. "
            "Name those exactly, or biases by a pattern such as '*bias*'."
        )
    valid = sorted(names.modules | names.tensors)
    raise ConfigError(f"{where} pattern {pattern!r} matches nothing. {did_you_mean(pattern, valid)}")


def refuse_twice(rules: Rules, tensors: Sequence[Tensor], thin: Mapping[str, str], framework: str) -> None:
    """Refuse rules that match only what is compressed already.

    Args:
        rules: The configuration.
        tensors: The dense tensors of the model.
        thin: Name of each thin tensor -> name of its method.
        framework: ``torch`` or ``keras``, for the message.

    Raises:
        ConfigError: A rule matches thin tensors, and no dense one that is not ignored.
    """
    if not thin:
        return
    dense, held = Names(tensors), Names([Tensor(name, (1, 1)) for name in thin])
    ignored = {tensor.name for pattern in rules.ignore for tensor in dense.reached(pattern)}
    for rule in rules.rules:
        again = [tensor.name for tensor in held.reached(rule.pattern)]
        if again and all(tensor.name in ignored for tensor in dense.reached(rule.pattern)):
            more = f" and {len(again) - 1} more" if len(again) > 1 else ""
            raise ConfigError(
                f"{again[0]}{more} cannot be compressed again: stored by {thin[again[0]]} already. For another size "
                f"or method call deepthin.{framework}.materialize(model) first, or compress the dense model."
            )


def _shadowed(rule: Rule, earlier: Sequence[Rule]) -> str:
    """The message for a rule whose tensors earlier rules have all matched."""
    patterns = list(dict.fromkeys(repr(other.pattern) for other in earlier))
    before = f"the rule {patterns[0]} before it matches" if len(patterns) == 1 else f"{', '.join(patterns)} match"
    return (
        f"rule {rule.pattern!r} has no effect: the first match wins, and {before} all of its tensors. "
        f"Move {rule.pattern!r} up, or leave it out."
    )


def bits_at(ratio: float, bits: int) -> int:
    """Bits at a ratio, rounded down, with a tolerance of 1e-6 bits for floating-point error.

    Args:
        ratio: Stored size / dense size.
        bits: Dense size in bits.

    Returns:
        ``floor(ratio * bits + 1e-6)``.
    """
    return math.floor(ratio * bits + 1e-6)


def _uncovered(rule: Rule, uncovered: Sequence[Tensor], names: Names) -> str:
    """The message for a rule that matches tensors which cannot be thin."""
    ignore = _to_ignore(uncovered, names)
    reasons: dict[str, list[str]] = {}
    for tensor in uncovered:
        reasons.setdefault(tensor.uncovered, []).append(tensor.name)
    told = "; ".join(f"{', '.join(held)}: {reason}" for reason, held in reasons.items())
    add = repr(ignore[0]) if len(ignore) == 1 else ", ".join(map(repr, ignore))
    return (
        f"rule {rule.pattern!r} reaches {told}. Covered are the parameters of linear, convolution, embedding, "
        f"recurrent and attention {uncovered[0].layers}. Add {add} to [model] ignore to keep "
        f"{'it' if len(uncovered) == 1 else 'them'} dense."
    )


def _to_ignore(uncovered: Sequence[Tensor], names: Names) -> list[str]:
    """Patterns for [model] ignore that match these tensors and no others: names of layers where these suffice."""
    wanted, patterns = {tensor.name for tensor in uncovered}, dict[str, None]()
    covered: set[str] = set()
    for tensor in uncovered:
        if tensor.name in covered:
            continue
        layer = tensor.name.rpartition(".")[0]
        reached = {other.name for other in names.reached(layer)} if layer and len(tensor.shape) > 1 else set[str]()
        pattern = layer if tensor.name in reached and reached <= wanted else tensor.name
        patterns[pattern] = None
        covered |= reached if pattern == layer else {tensor.name}
    return list(patterns)
