"""A thin weight whose variables are TensorFlow's."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import tensorflow as tf

from deepthin.keras.integers import integer_type
from deepthin.keras.weight import ThinWeight
from deepthin.method import Code, Integers, Method, Namespace
from deepthin.methods.float_coding import FloatCoding
from deepthin.plan.start import Start
from deepthin.storage.contents import Part
from deepthin.tensorflow.host import as_type, assign, exactly

Make = Callable[[str, np.ndarray, bool], Any]
"""From an entry's name, its initial value and whether it is trainable to a variable."""


class Weight(ThinWeight):
    """A thin weight whose variables are TensorFlow's, made by a function.

    Args:
        make: Makes a variable for each entry.
        name: Name of the method, as files and reports have it.
        method: The method, of the whole matrix's shape.
        parts: Shape and scale of each tensor.
        begin: Code and latents.
        dtype: Dtype of the latents.
    """

    def __init__(self, make: Make, name: str, method: Method, parts: Sequence[Part], begin: Start, dtype: str) -> None:
        code, latents = begin
        self._make, self._values = make, {**code, **(FloatCoding(method).latents(code) if latents is None else latents)}
        super().__init__(name, method, parts, begin if tf.executing_eagerly() else None, dtype=dtype)

    def _variable(self, entry: str, shape: tuple[int, ...], whole: Integers | None, trainable: bool) -> Any:
        """The variable of an entry, with its initial value; Keras's constructor calls it."""
        kind = self._type(entry) if whole is None else integer_type(whole)
        variable = self._make(entry, as_type(self._values[entry], kind), trainable and whole is None)
        return variable if whole is None else exactly(variable, whole)

    def _add_rate(self) -> None:
        """No variables: no target is trained to here."""

    def code(self) -> Code:
        """The stored entries, as ``ThinWeight.code``; in a TensorFlow 1 graph read in the default session.

        Returns:
            Entry -> NumPy array, as a file stores it.
        """
        if tf.executing_eagerly():
            return super().code()
        live = self.latents, self.stored
        self.latents, self.stored = ({entry: variable.eval() for entry, variable in held.items()} for held in live)
        try:
            return super().code()
        finally:
            self.latents, self.stored = live

    def _encoded(self, latents: Code) -> Code:
        if tf.executing_eagerly():
            return super()._encoded(latents)
        return self._coding.encode(latents, cast(Namespace, np))

    def _set(self, code: Code, latents: Code | None) -> None:
        if tf.executing_eagerly():
            super()._set(code, latents)
            return
        values = self._coding.latents(code) if latents is None else latents
        for entry, variable in (*self.latents.items(), *self.stored.items()):
            assign(variable, (values if entry in self.latents else code)[entry])
