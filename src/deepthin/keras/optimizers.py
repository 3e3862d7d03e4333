"""Keras's optimisers with a learning rate for each method: codes want a larger one than dense weights."""

from typing import Any

import keras
from keras import optimizers

_register = keras.saving.register_keras_serializable("deepthin")


class _Multiplied(optimizers.Optimizer):
    """The rate is what suits the dense network; codes, and the biases beside them, get their multiple of it.

    The multiples are those of ``deepthin.methods.learning_rate_multiplier``, found by experiment (docs/training.md).
    Weight decay goes by the rate itself, for all.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Keras's own, at the variable's rate."""
        trained = self._trainable_variables[self._get_variable_index(variable)]
        times = getattr(trained, "learning_rate_multiplier", 1.0)
        super().update_step(gradient, variable, learning_rate * times)


@_register
class Adam(_Multiplied, optimizers.Adam):
    """Adam with a rate for each method; ``learning_rate`` is what suits the dense network."""


@_register
class AdamW(_Multiplied, optimizers.AdamW):
    """AdamW with a rate for each method; ``learning_rate`` is what suits the dense network."""


@_register
class SGD(_Multiplied, optimizers.SGD):
    """Stochastic gradient descent with a rate for each method; ``learning_rate`` is what suits the dense network."""
