"""The call in the place of ``tf.compat.v1.get_variable``, and the factory behind it."""

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

    The factors are made at the first call, held by ``variables()``, and the same in every call with that name, before
    which the ``tf.compat.v1.variable_scope`` around goes. In a graph of TensorFlow 1 they are its own variables, under
    its rules of reuse. All else is as in ``Variables.get``.
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
    """The factory behind ``get_variable``, but for graphs of TensorFlow 1: to train, save and load."""
    return _here


def getter(rules: Source, seed: int = 0, outputs_first: Sequence[str] = ()) -> Callable[..., Any]:
    """A ``custom_getter`` for ``tf.compat.v1.variable_scope``: that of a new ``Variables``."""
    return Variables(rules, seed, outputs_first=outputs_first).getter
