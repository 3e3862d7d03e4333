"""Values and names between TensorFlow and NumPy."""

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable  # pyright: ignore[reportMissingImports]

from deepthin.keras.integers import exact
from deepthin.method import Integers


def numpy_of(variable: Any) -> np.ndarray:
    """Read a variable.

    Args:
        variable: A variable; one of a TensorFlow 1 graph is read in the default session.

    Returns:
        Its value.
    """
    return variable.numpy() if tf.executing_eagerly() else variable.eval()


def assign(variable: Any, value: np.ndarray) -> None:
    """Assign a variable.

    Args:
        variable: A variable; one of a TensorFlow 1 graph is assigned in the default session.
        value: Of its shape; cast to its dtype.
    """
    value = as_type(value, variable.dtype.base_dtype)
    if tf.executing_eagerly():
        variable.assign(value)
    else:
        variable.load(value, tf.compat.v1.get_default_session())


def as_type(array: Any, dtype: Any) -> np.ndarray:
    """Cast an array.

    Args:
        array: The values.
        dtype: A dtype of TensorFlow.

    Returns:
        An array of that dtype.
    """
    return np.asarray(array).astype(tf.as_dtype(dtype).as_numpy_dtype)


def dotted(name: str) -> str:
    """A variable's name as files and patterns have it.

    Args:
        name: With slashes or dots, maybe with ``:0`` at the end.

    Returns:
        The name with dots.
    """
    return name.removesuffix(":0").replace("/", ".")


class _Exact(ResourceVariable):
    """A variable of exact integers: ``deepthin.keras.integers.IntegerVariable``, for TensorFlow's own variables."""

    kind: Integers

    def numpy(self) -> np.ndarray:
        return super().numpy().astype(np.int64)

    def assign(self, value: Any, *args: Any, **options: Any) -> Any:
        return super().assign(exact(value, self.kind, self.name), *args, **options)


def exactly(variable: Any, kind: Integers) -> Any:
    """Let a variable keep exact integers: assigned floats are rounded if they are integers up to rounding, or refused.

    Args:
        variable: A variable of integers. Only TensorFlow's plain eager variables change; those of TensorFlow 1 graphs
            and of distribution strategies are left as they are.
        kind: Range of the integers.

    Returns:
        The variable.
    """
    if type(variable) is ResourceVariable:
        variable.__class__, variable.kind = _Exact, kind
    return variable
