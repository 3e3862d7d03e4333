"""Values and names between TensorFlow and NumPy."""

from typing import Any

import numpy as np
import tensorflow as tf


def numpy_of(variable: Any) -> np.ndarray:
    """The value of a variable; of one in a graph of TensorFlow 1, in the default session."""
    return variable.numpy() if tf.executing_eagerly() else variable.eval()


def assign(variable: Any, value: np.ndarray) -> None:
    """Set a variable; one of a graph of TensorFlow 1, in the default session."""
    value = as_type(value, variable.dtype.base_dtype)
    if tf.executing_eagerly():
        variable.assign(value)
    else:
        variable.load(value, tf.compat.v1.get_default_session())


def as_type(array: Any, dtype: Any) -> np.ndarray:
    """The same values in a type of TensorFlow's."""
    return np.asarray(array).astype(tf.as_dtype(dtype).as_numpy_dtype)


def dotted(name: str) -> str:
    """A name as files and patterns have it."""
    return name.removesuffix(":0").replace("/", ".")
