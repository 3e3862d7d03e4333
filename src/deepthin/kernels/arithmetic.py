"""Arithmetic coding in native code: the bytes of `deepthin.coding.arithmetic`, some hundred times faster.

Without native code, the reference serves instead.
"""

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from deepthin.coding import arithmetic
from deepthin.kernels import products

_KINDS = ("levels", "tree", "numbers")


def encode(
    kind: str, values: Int32[np.ndarray, " count"] | Int64[np.ndarray, " count"], parameter: int
) -> UInt8[np.ndarray, " bytes"]:
    """``arithmetic.encode``: to be given to ``encode_levels``, ``encode_tree`` or ``encode_numbers`` as their ``walk``.

    Args:
        kind: ``"levels"``, ``"tree"`` or ``"numbers"``.
        values: Integers within the range of that kind, of 32 or 64 bits.
        parameter: Stride of levels, width of a tree, 0 for numbers.

    Returns:
        The stream.
    """
    if not products.native_available:
        return arithmetic.encode(kind, values, parameter)
    values = np.ascontiguousarray(values)
    at, wide = values.ctypes.data, values.dtype == np.int64
    data = products.native().arithmetic_encode(_KINDS.index(kind), at, len(values), parameter, wide)
    return np.frombuffer(data, np.uint8)


def decode(
    kind: str, data: UInt8[np.ndarray, " bytes"], count: int, parameter: int, most: int
) -> Int64[np.ndarray, " count"] | None:
    """``arithmetic.decode``: to be given to ``decode_levels``, ``decode_tree`` or ``decode_numbers`` as their ``walk``.

    Args:
        kind: ``"levels"``, ``"tree"`` or ``"numbers"``.
        data: The stream, untrusted.
        count: How many integers there are.
        parameter: Stride of levels, width of a tree, 0 for numbers.
        most: The largest magnitude.

    Returns:
        The integers; None if the bytes are not what ``encode`` writes for any.
    """
    if not products.native_available:
        return arithmetic.decode(kind, data, count, parameter, most)
    data, values = np.ascontiguousarray(data, np.uint8), np.empty(count, np.int64)
    stream = data.ctypes.data, len(data), values.ctypes.data, count
    return values if products.native().arithmetic_decode(_KINDS.index(kind), *stream, parameter, most) else None
