"""Codes of a model's matrices by their plans: each is made once, and measured once, whoever asks for it."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from deepthin.method import Method
from deepthin.plan.shares import Planned
from deepthin.storage.contents import Thin

Values = TypeVar("Values")
Weight = TypeVar("Weight")


class EncodedOnce(ABC, Generic[Values, Weight]):
    """Matrices of a model by their plans. A framework says what its values are, and how it encodes them."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, Method], tuple[Weight, Thin]] = {}

    @abstractmethod
    def dense(self, planned: Planned) -> list[Values]:
        """The values of its tensors; ConfigError if these cannot share a code."""

    @abstractmethod
    def encode(self, planned: Planned, method: Method) -> tuple[Weight, Thin]:
        """The code nearest to its tensors, and the same as a file has it; NonFiniteError for what has none."""

    def __call__(self, planned: Planned) -> Weight:
        """The code nearest to its tensors; what ``encode`` raises, and ValueError for a matrix that stays dense."""
        return self._once(planned)[0]

    def thin(self, planned: Planned) -> Thin:
        """The same code, as a file has it."""
        return self._once(planned)[1]

    def _once(self, planned: Planned) -> tuple[Weight, Thin]:
        name, method = planned.tensors[0].name, planned.method
        if method is None:
            raise ValueError(f"{name} stays dense.")
        if (name, method) not in self._made:
            self._made[name, method] = self.encode(planned, method)
        return self._made[name, method]
