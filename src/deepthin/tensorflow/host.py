"""Values and names between TensorFlow and NumPy."""

from typing import Any

import numpy as np
import tensorflow as tf


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
