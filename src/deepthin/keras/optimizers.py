"""Keras's optimisers with a learning-rate multiplier for each method: codes need a larger rate than dense weights."""

from typing import Any

import keras
from keras import optimizers

_register = keras.saving.register_keras_serializable("deepthin")


class _Multiplied(optimizers.Optimizer):
    """Multiplies the learning rate for codes and biases of thin layers; weight decay uses the rate itself.

    The multipliers are those of ``deepthin.methods.learning_rate_multiplier``, found by experiment (docs/training.md).
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Keras's update of a variable, at its rate.

        Args:
            gradient: The gradient of the variable.
            variable: The variable.
            learning_rate: The rate that suits the dense network.
        """
        trained = self._trainable_variables[self._get_variable_index(variable)]
        times = getattr(trained, "learning_rate_multiplier", 1.0)
        super().update_step(gradient, variable, learning_rate * times)


@_register
class Adam(_Multiplied, optimizers.Adam):
    """Adam with a rate for each method.

    Args:
        learning_rate: The rate that suits the dense network.

    All further arguments are those of ``keras.optimizers.Adam``.
    """


@_register
class AdamW(_Multiplied, optimizers.AdamW):
    """AdamW with a rate for each method.

    Args:
        learning_rate: The rate that suits the dense network; weight decay uses it for all variables.

    All further arguments are those of ``keras.optimizers.AdamW``.
    """


@_register
class SGD(_Multiplied, optimizers.SGD):
    """Stochastic gradient descent with a rate for each method.

    Args:
        learning_rate: The rate that suits the dense network.

    All further arguments are those of ``keras.optimizers.SGD``.
    """
