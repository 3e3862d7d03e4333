"""What a search may choose: for each choice its values or a range; and how settings are drawn from them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deepthin.lab.size_search.candidate import Value
from deepthin.methods import METHODS

OWN = "own"  # the network of the task, among those of --also
RANKED = ("deepthin", "shuffled")
BITS = 2.0, 4.0  # of the file for each number of the codes: the centre of the range of floats, and its half width
METHODS_OF = {  # by group; others as "first"
    "first": ("deepthin", "kronecker", "coded"),
    "recurrent": ("deepthin", "kronecker", "hashed", "coded"),
    "convolution": ("coded", "deepthin", "kronecker"),
}
SEARCHED = tuple(n for n, named in METHODS.items() if named.learns_step or "bits" not in named.options)
RANKS = (1, 2, 4, 8)
DECAYS = (0.0, 0.03, 0.1, 0.3)
RATES = 0.25, 4.0  # bounds of the learning rate, over the task's own


@dataclass(frozen=True)
class Choice:
    """One choice: some values, or all numbers of a range.

    Attributes:
        values: The values; empty for a range.
        low: Lower bound of the range, > 0.
        high: Upper bound. Ranges are searched by their logarithms.
    """

    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def fixed(self) -> bool:
        """Whether there is only one value."""
        return len(self.values) == 1 or (not self.values and self.low == self.high)

    @property
    def only(self) -> Value:
        """The value of a fixed choice."""
        return self.values[0] if self.values else self.low

    def nearest(self, value: Value) -> Value:
        """The closest value that may be chosen.

        Args:
            value: Any value.

        Returns:
            ``value`` itself if it may be chosen; of numbers the closest one, else the first value.
        """
        if not self.values:
            return min(max(float(value), self.low), self.high)
        if value in self.values:
            return value
        numbers = [v for v in self.values if isinstance(v, int | float) and not isinstance(v, bool)]
        if isinstance(value, int | float) and not isinstance(value, bool) and numbers:
            return min(numbers, key=lambda number: abs(number - value))
        return self.values[0]


@dataclass(frozen=True)
class Group:
    """Matrices that share their settings.

    Attributes:
        name: Name of the group.
        matrices: Names of its matrices.
        choices: ``method``, ``floats`` and ``rank``.
    """

    name: str
    matrices: tuple[str, ...]
    choices: Mapping[str, Choice]


@dataclass(frozen=True)
class Space:
    """All that may be chosen.

    Attributes:
        training: ``network``, ``lr``, ``decay`` and ``teacher``.
        groups: The groups of the task's network.
    """

    training: Mapping[str, Choice]
    groups: tuple[Group, ...]


def default_floats(file_bytes: int, weights: int) -> float:
    """How many numbers the codes have, such that the file has two bits for each.

    Args:
        file_bytes: Size of the file.
        weights: Number of weights in all matrices.

    Returns:
        Numbers over weights, at most 1.
    """
    return min(8 * file_bytes / (BITS[0] * max(weights, 1)), 1.0)


def default_group(name: str, matrices: tuple[str, ...], floats: float) -> Group:
    """What may be chosen for a group if the user says nothing.

    Args:
        name: Name of the group.
        matrices: Names of its matrices.
        floats: The centre of the range of floats.

    Returns:
        The group.
    """
    low, high = floats / BITS[1], min(floats * BITS[1], 1.0)
    methods = METHODS_OF.get(name, METHODS_OF["first"])
    choices = {"method": Choice(methods), "floats": Choice(low=_three(low), high=_three(high)), "rank": Choice(RANKS)}
    return Group(name, matrices, choices)


def _three(number: float) -> float:
    """Three significant digits: what a person would write."""
    return float(f"{number:.3g}")


def default_training(lr: float, networks: tuple[str, ...], teacher: bool) -> dict[str, Choice]:
    """What may be chosen of a training if the user says nothing.

    Args:
        lr: The task's own learning rate.
        networks: Names of the networks, the task's first.
        teacher: Whether there is a teacher to learn from.

    Returns:
        Name -> choice.
    """
    return {
        "network": Choice(networks),
        "lr": Choice(low=_three(lr * RATES[0]), high=_three(lr * RATES[1])),
        "decay": Choice(DECAYS),
        "teacher": Choice((True, False) if teacher else (False,)),
    }


def draw(space: Space, pick: Callable[[str, Choice], Value]) -> dict[str, Value]:
    """Make settings: only what matters for what was chosen before is asked for.

    Args:
        space: What may be chosen.
        pick: Name and choice -> value; called where there is more than one.

    Returns:
        Settings; numbers of ranges have three significant digits.
    """
    settings: dict[str, Value] = {}

    def take(name: str, choice: Choice) -> Value:
        value = choice.only if choice.fixed else pick(name, choice)
        settings[name] = value if choice.values else min(max(_three(float(value)), choice.low), choice.high)
        return settings[name]

    network = take("network", space.training["network"])
    for name in ("lr", "decay", "teacher"):
        take(name, space.training[name])
    for group in space.groups if network == OWN else ():
        method = take(f"{group.name}.method", group.choices["method"])
        if not isinstance(method, str) or method == "dense" or METHODS[method].learns_step:
            continue
        take(f"{group.name}.floats", group.choices["floats"])
        if method in RANKED:
            take(f"{group.name}.rank", group.choices["rank"])
    return settings


def finite(value: Value) -> bool:
    """Whether a value is no infinite number and no NaN.

    Args:
        value: The value.

    Returns:
        True if it is finite, or no number.
    """
    return not isinstance(value, float) or math.isfinite(value)
