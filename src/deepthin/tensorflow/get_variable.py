"""A replacement for ``tf.compat.v1.get_variable``, and the factory behind it."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from deepthin.errors import ConfigError
from deepthin.plan.parse import parse_rules
from deepthin.tensorflow.variables import Source, Variables

_here = Variables()  # what get_variable has made


def get_variable(
    name: str,
    shape: Sequence[int] | None = None,
    rules: Source | None = None,
    seed: int = 0,
    dtype: Any = None,
    *,
    initializer: Any = None,
    trainable: bool = True,
) -> tf.Tensor:
    """A tensor that small trainable factors generate: the call in the place of ``tf.compat.v1.get_variable``.

    The first call with a name creates the factors; later calls generate the tensor from their current values. In eager
    TensorFlow ``variables()`` holds them; in a graph of TensorFlow 1 they are variables of the graph, under its rules
    of reuse. DeepThin, arXiv:1802.06944, section 4.

    Args:
        name: Of the variable, prefixed by the current ``tf.compat.v1.variable_scope``.
        shape: Of the generated tensor; may be left out once the variable exists.
        rules: A configuration: a mapping or the path of a TOML file.
        seed: Of the factors' initial values.
        dtype: As in ``Variables.get``.
        initializer: As in ``Variables.get``.
        trainable: As in ``Variables.get``.

    Returns:
        The generated tensor.

    Raises:
        ConfigError: No rules, or invalid ones.
    """
    if rules is None:
        raise ConfigError("get_variable needs rules: a mapping, or the path of a TOML file.")
    if not tf.compat.v1.executing_eagerly_outside_functions():
        return tf.compat.v1.get_variable(
            name,
            shape,
            dtype,
            initializer=initializer,
            trainable=trainable,
            custom_getter=getter(rules, seed),
        )
    scope = tf.compat.v1.get_variable_scope().name
    full = f"{scope}/{name}" if scope else name
    return _here._entry(full, shape, dtype, initializer, trainable, (parse_rules(rules), seed)).value()


def variables() -> Variables:
    """The factory behind ``get_variable`` in eager TensorFlow: for training, saving and loading.

    Returns:
        The factory; in graphs of TensorFlow 1 it has no part.
    """
    return _here


def getter(rules: Source, seed: int = 0, outputs_first: Sequence[str] = ()) -> Callable[..., Any]:
    """A ``custom_getter`` for ``tf.compat.v1.variable_scope``, of a new ``Variables``.

    Args:
        rules: A configuration: a mapping, the path of a TOML file, or ``Rules``.
        seed: As in ``Variables``.
        outputs_first: As in ``Variables``.

    Returns:
        ``Variables(rules, seed, outputs_first=outputs_first).getter``.

    Raises:
        ConfigError: The rules are invalid.
    """
    return Variables(rules, seed, outputs_first=outputs_first).getter
