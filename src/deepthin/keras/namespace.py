"""The array functions that methods may use, over keras.ops: what decodes, and what encodes in every forward pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import backend, ops

from deepthin.method import Array

HALF = ("float16", "bfloat16")


class _Linalg:
    """What ``encode`` needs of methods that round while they train; the others encode in NumPy."""

    def pinv(self, a: Array, *, rtol: float, hermitian: bool) -> Array:
        """The pseudo-inverse of symmetric matrices; eigenvalues of up to ``rtol`` times the largest count as zero."""
        if not hermitian:
            raise ValueError("Only symmetric matrices are inverted here: encode in NumPy.")
        values, vectors = ops.eigh(a)
        size = ops.abs(values)
        kept = size > rtol * ops.max(size, axis=-1, keepdims=True)
        inverse = ops.where(kept, 1 / ops.where(kept, values, ops.ones_like(values)), ops.zeros_like(values))
        return ops.matmul(vectors * inverse[..., None, :], ops.swapaxes(vectors, -1, -2))


class KerasNamespace:
    """``deepthin.method.Namespace`` over keras.ops, in whatever backend. Arrays are its tensors; int64 is int32."""

    linalg = _Linalg()
    int16, int64, float32, float64 = "int16", "int32", "float32", "float64"  # JAX has no int64, nor argsort elsewhere

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
    where = staticmethod(ops.where)

    def concatenate(self, arrays: Sequence[Array], /) -> Array:
        """One below the other."""
        return ops.concatenate(list(arrays), axis=0)

    def stack(self, arrays: Sequence[Array], axis: int, /) -> Array:
        """Along a new axis."""
        return ops.stack(list(arrays), axis=axis)

    def asarray(self, a: Array, /, *, dtype: Any = None) -> Array:
        """A tensor of the backend."""
        tensor = ops.convert_to_tensor(a)
        return tensor if dtype is None else ops.cast(tensor, backend.standardize_dtype(dtype))

    def bincount(self, index: Array, weights: Array, least: int, /) -> Array:
        """Sums of the weights of each index."""
        return ops.bincount(index, weights=weights, minlength=least)

    def argsort(self, a: Array, /, *, stable: bool = False) -> Array:
        """As int32; where entries are equal, TensorFlow's order is its own."""
        return ops.argsort(a)

    def bitwise_right_shift(self, a: Array, bits: int, /) -> Array:
        """In the type of ``a``."""
        return ops.right_shift(a, ops.cast(bits, a.dtype))

    def finfo(self, kind: Any) -> Any:
        """NumPy's, of a type of the backend; that of float16 for all types of half precision."""
        name = backend.standardize_dtype(kind)
        return np.finfo("float16" if name in HALF else name)


NAMESPACE = KerasNamespace()
