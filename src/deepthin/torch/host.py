"""Tensors of main memory as NumPy arrays, for native code."""

import numpy as np
from torch import Tensor


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor as an array that shares its memory, for the duration of a call.

    ``Tensor.numpy()`` would fix the size of the tensor's storage for ever, which FSDP frees after each use.

    Args:
        tensor: A strided tensor in main memory, of a type that NumPy has; its gradient is not followed.

    Returns:
        The array; it must not be written to.
    """
    return np.from_dlpack(tensor.detach())
