"""The array functions that methods may use, over keras.ops: for decoding, and for encoding while training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import backend, ops

from deepthin.method import Array

HALF = ("float16", "bfloat16")


class _Linalg:
    """Linear algebra that ``encode`` needs for methods that round while they train; others encode in NumPy."""

    def pinv(self, a: Array, *, rtol: float, hermitian: bool) -> Array:
        """The pseudo-inverse of symmetric matrices; eigenvalues of up to ``rtol`` times the largest count as zero."""
        if not hermitian:
            raise ValueError("Only symmetric matrices are inverted here: encode in NumPy.")
        values, vectors = ops.eigh(a)
        size = ops.abs(values)
        large = size > rtol * ops.max(size, axis=-1, keepdims=True)
        inverse = ops.where(large, 1 / ops.where(large, values, ops.ones_like(values)), ops.zeros_like(values))
        return ops.matmul(vectors * inverse[..., None, :], ops.swapaxes(vectors, -1, -2))


class KerasNamespace:
    """``deepthin.method.Namespace`` over keras.ops, in any backend.

    Arguments and results are tensors of the backend, with NumPy's meaning; int64 is int32.
    """

    linalg = _Linalg()
    int16, int32, float32, float64 = "int16", "int32", "float32", "float64"
    int64 = "int32"  # JAX has no int64, nor argsort elsewhere

    matmul = staticmethod(ops.matmul)
    reshape = staticmethod(ops.reshape)
    take = staticmethod(ops.take)
    moveaxis = staticmethod(ops.moveaxis)
    tile = staticmethod(ops.tile)
    zeros_like = staticmethod(ops.zeros_like)
    ones_like = staticmethod(ops.ones_like)
    amax = staticmethod(ops.max)
    amin = staticmethod(ops.min)
    sum = staticmethod(ops.sum)
    mean = staticmethod(ops.mean)
    cumsum = staticmethod(ops.cumsum)
    clip = staticmethod(ops.clip)
    round = staticmethod(ops.round)
    sqrt = staticmethod(ops.sqrt)
    exp = staticmethod(ops.exp)
    log = staticmethod(ops.log)
    where = staticmethod(ops.where)

    def concatenate(self, arrays: Sequence[Array], /) -> Array:
        """Concatenate along the first axis.

        Args:
            arrays: Of equal shapes but for the first axis.

        Returns:
            One array.
        """
        return ops.concatenate(list(arrays), axis=0)

    def stack(self, arrays: Sequence[Array], axis: int, /) -> Array:
        """Stack along a new axis.

        Args:
            arrays: Of equal shapes.
            axis: Index of the new axis in the result.

        Returns:
            One array.
        """
        return ops.stack(list(arrays), axis=axis)

    def asarray(self, a: Array, /, *, dtype: Any = None) -> Array:
        """Convert to a tensor of the backend.

        Args:
            a: An array or number.
            dtype: The result's dtype; by default that of ``a``.

        Returns:
            The tensor.
        """
        tensor = ops.convert_to_tensor(a)
        return tensor if dtype is None else ops.cast(tensor, backend.standardize_dtype(dtype))

    def bincount(self, index: Array, weights: Array, least: int, /) -> Array:
        """Sum the weights of each index.

        Args:
            index: Integers >= 0, one dimension.
            weights: A number for each index.
            least: The fewest entries of the result.

        Returns:
            For each integer from 0 on the sum of its weights.
        """
        return ops.bincount(index, weights=weights, minlength=least)

    def argsort(self, a: Array, /, *, stable: bool = False) -> Array:
        """The order that sorts an array.

        Args:
            a: The array; sorted along the last axis.
            stable: Ignored: the order of equal entries is the backend's.

        Returns:
            Indices, int32.
        """
        return ops.argsort(a)

    def bitwise_right_shift(self, a: Array, bits: int, /) -> Array:
        """Shift integers right.

        Args:
            a: Integers.
            bits: By how many bits, >= 0.

        Returns:
            Integers of the dtype of ``a``.
        """
        return ops.right_shift(a, ops.cast(bits, a.dtype))

    def finfo(self, kind: Any) -> Any:
        """Properties of a floating dtype.

        Args:
            kind: A dtype of the backend.

        Returns:
            NumPy's ``finfo``; for float16 and bfloat16 that of float16.
        """
        name = backend.standardize_dtype(kind)
        return np.finfo("float16" if name in HALF else name)


NAMESPACE = KerasNamespace()
