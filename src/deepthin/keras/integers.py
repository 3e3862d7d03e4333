"""Variables of exact integers, as symbols and positions are: averages of weights may not truncate them."""

from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from deepthin.errors import ConfigError
from deepthin.method import Integers

_TYPES = ("uint8", "int8", "int16", "int32", "int64")
_ROUNDINGS = 16  # roundings of a float that an average of equal integers may be off by
_LARGEST_ERROR = 0.25  # beyond it the nearest integer may be another one


def integer_type(kind: Integers) -> str:
    """The smallest dtype that holds every integer of a range.

    Args:
        kind: The range.

    Returns:
        Name of a dtype of 1, 2, 4 or 8 bytes.
    """
    least, most = kind.least, kind.least + kind.count - 1
    return next(name for name in _TYPES if np.iinfo(name).min <= least and most <= np.iinfo(name).max)


def exact(value: Any, kind: Integers, name: str) -> Any:
    """Integers for a variable, from numbers that an average may have made floats.

    Args:
        value: An array, or a tensor of the backend; in a graph, floats are rounded without checks.
        kind: Range of the integers.
        name: Name of the variable, for messages.

    Returns:
        An integer array, or an integer tensor in a graph.

    Raises:
        ConfigError: A number is no integer up to the rounding of its dtype, or is outside the range.
    """
    array = _values_of(value) if ops.is_tensor(value) else np.asarray(value)
    if array is None:
        floats = "float" in keras.backend.standardize_dtype(value.dtype)
        return ops.cast(ops.round(value), integer_type(kind)) if floats else value
    if not np.issubdtype(array.dtype, np.integer):
        eps = float(ml_dtypes.finfo(array.dtype).eps)
        wide = array.astype(np.float64)
        error = np.abs(wide - np.rint(wide))
        bound = _ROUNDINGS * eps * np.maximum(np.abs(wide), 1.0)
        if not ((error <= bound) & (bound <= _LARGEST_ERROR)).all():
            raise ConfigError(
                f"{name} takes the integers of a code, which have no average: copy them from one model, and average "
                "only floats, of models with equal integers."
            )
        array = np.rint(wide).astype(np.int64)
    least, most = kind.least, kind.least + kind.count - 1
    if array.size and not least <= int(array.min()) <= int(array.max()) <= most:
        raise ConfigError(
            f"{name} is assigned integers from {array.min()} to {array.max()}, but takes those from {least} to {most}: "
            "assign a code of the same method."
        )
    return array


def _values_of(tensor: Any) -> np.ndarray | None:
    """The values of a tensor; None within a graph, where they are not known yet.

    Keras does not say whether a tensor belongs to a graph. Reading one is a NotImplementedError in TensorFlow, and a
    TypeError (TracerArrayConversionError) in JAX.
    """
    try:
        return np.asarray(ops.convert_to_numpy(tensor))
    except (NotImplementedError, TypeError):
        return None


class IntegerVariable(keras.Variable):
    """A variable of exact integers, in the smallest dtype; not trained.

    ``numpy``, and so ``get_weights``, returns int64: sums do not overflow, and products with floats are float64.
    Assigned floats are rounded if they are integers up to rounding, as averages of equal integers are, else refused.

    Args:
        shape: Its shape; it begins with zeros.
        kind: Range of the integers.
        name: Name of the variable.
    """

    def __init__(self, shape: tuple[int, ...], kind: Integers, name: str) -> None:
        self.kind = kind
        super().__init__("zeros", shape, integer_type(kind), trainable=False, autocast=False, name=name)

    def numpy(self) -> np.ndarray:
        """The values.

        Returns:
            An int64 array.
        """
        return np.asarray(ops.convert_to_numpy(self.value)).astype(np.int64)

    def assign(self, value: Any) -> Any:
        """Set the values.

        Args:
            value: An array or tensor of the variable's shape.

        Returns:
            What Keras's ``assign`` returns.

        Raises:
            ConfigError: A number is no integer up to the rounding of its dtype, or is outside the range.
        """
        return super().assign(exact(value, self.kind, self.path))
