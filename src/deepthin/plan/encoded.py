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
        """The values of a plan's tensors.

        Args:
            planned: Tensors that share one matrix, and their method.

        Returns:
            One value for each tensor, in order.

        Raises:
            ConfigError: The tensors cannot share a code.
        """

    @abstractmethod
    def encode(self, planned: Planned, method: Method) -> tuple[Weight, Thin]:
        """Encode the tensors of a plan.

        Args:
            planned: Tensors that share one matrix.
            method: The method that stores it.

        Returns:
            The nearest code that the method finds, as the framework holds it and as a file does.

        Raises:
            NonFiniteError: A tensor has an entry that is not finite.
        """

    def __call__(self, planned: Planned) -> Weight:
        """The code of a plan's tensors as the framework holds it.

        Args:
            planned: Tensors that share one matrix, with the method that stores it.

        Returns:
            The encoded weight; the same object at every call.

        Raises:
            ValueError: The plan keeps its matrix dense.
            ConfigError: As ``dense``.
            NonFiniteError: As ``encode``.
        """
        return self._once(planned)[0]

    def thin(self, planned: Planned) -> Thin:
        """The code of a plan's tensors as a file has it.

        Args:
            planned: Tensors that share one matrix, with the method that stores it.

        Returns:
            The compressed matrix; the same object at every call.

        Raises:
            ValueError: The plan keeps its matrix dense.
            ConfigError: As ``dense``.
            NonFiniteError: As ``encode``.
        """
        return self._once(planned)[1]

    def _once(self, planned: Planned) -> tuple[Weight, Thin]:
        name, method = planned.tensors[0].name, planned.method
        if method is None:
            raise ValueError(f"{name} stays dense.")
        if (name, method) not in self._made:
            self._made[name, method] = self.encode(planned, method)
        return self._made[name, method]
