"""Multiples of a learned step in native code, one pass over memory each (reference: deepthin.torch.code_length)."""

import numpy as np
from jaxtyping import Float32, Int64

from deepthin.kernels import products


def quantize(
    latents: Float32[np.ndarray, "..."], step: float, top: int
) -> tuple[Float32[np.ndarray, "..."], Float32[np.ndarray, "..."]]:
    """Round to multiples of a step, ties to even.

    Args:
        latents: Contiguous array.
        step: The step, > 0.
        top: The largest symbol, 1 to 127.

    Returns:
        The multiples; and for each number the rounded symbol less the unrounded one. Both of the shape of ``latents``.
    """
    values, residual = np.empty_like(latents), np.empty_like(latents)
    products.native().quantize(latents.ctypes.data, latents.size, step, top, values.ctypes.data, residual.ctypes.data)
    return values, residual


def count_symbols(latents: Float32[np.ndarray, "..."], step: float, top: int) -> Int64[np.ndarray, " symbols"]:
    """How often each symbol occurs.

    Args:
        latents: Contiguous array.
        step: The step, > 0.
        top: The largest symbol, 1 to 127.

    Returns:
        2 top + 1 counts: of the symbols from -top to top.
    """
    counts = np.empty(2 * top + 1, np.int64)
    products.native().count_symbols(latents.ctypes.data, latents.size, step, top, counts.ctypes.data)
    return counts


def code_slopes(
    latents: Float32[np.ndarray, "..."], step: float, top: int, rise: Float32[np.ndarray, " rises"], scale: float
) -> tuple[Float32[np.ndarray, "..."], float]:
    """The gradient of the code length, interpolated between two symbols.

    Args:
        latents: Contiguous array.
        step: The step, > 0.
        top: The largest symbol, 1 to 127.
        rise: 2 top numbers: the length of each symbol from 1 - top on less that of the one below it.
        scale: Gradient of what depends on the length.

    Returns:
        The gradient of the latents, of their shape; and that of the logarithm of the step.
    """
    slopes, rise = np.empty_like(latents), np.ascontiguousarray(rise, np.float32)
    total = products.native().code_slopes(
        latents.ctypes.data, latents.size, step, top, rise.ctypes.data, scale, slopes.ctypes.data
    )
    return slopes, -total
