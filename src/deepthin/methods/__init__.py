"""Every method by the name that users write: the one table from names to classes.

A name is a class together with the options that the name fixes, so that one class can serve under several names.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepthin.method import Method
from deepthin.methods.factor import Factor


@dataclass(frozen=True)
class Named:
    """A method as users name it."""

    name: str
    cls: type[Method]
    preset: Mapping[str, Any] = field(default_factory=dict[str, Any])  # options of ``cls.fit`` that the name fixes
    sized_by: frozenset[str] = frozenset()  # options that fix the size by themselves, so that no target is needed
    learning_rate: float = 1.0  # times what suits the dense network (docs/training.md); found by experiment
    about: str = ""

    @property
    def options(self) -> tuple[str, ...]:
        """The options that a rule may give."""
        keywords = inspect.signature(self.cls.fit).parameters.values()
        return tuple(p.name for p in keywords if p.kind is p.KEYWORD_ONLY)

    def fit(self, shape: tuple[int, int], max_bits: int, **options: Any) -> Method:
        """``cls.fit`` with the name's own options below the given ones."""
        return self.cls.fit(shape, max_bits, **{**self.preset, **options})

    def __call__(self, **fields: Any) -> Method:
        """The method with exactly these fields, as a file stores them."""
        return self.cls(**fields)


METHODS: dict[str, Named] = {
    named.name: named
    for named in (
        Named("deepthin", Factor, learning_rate=20.0, about="two factors, re-laid out so that the symmetry breaks"),
        Named("shuffled", Factor, {"seed": 0}, learning_rate=20.0, about="the same factors, scattered at random"),
        Named(
            "rank",
            Factor,
            {"n": "fan-in", "rank": "max"},
            sized_by=frozenset({"rank"}),
            learning_rate=10.0,
            about="plain low-rank factorisation",
        ),
    )
}
