"""How many bits symbols will take in a file, differentiable in the numbers that are rounded to them.

The same as ``deepthin.torch.code_length``, in keras.ops: frequencies are counted, and the gradient is that of the
linear interpolation between the lengths of the two symbols beside a number (after Oktay et al., 2020,
arXiv:1906.06624).
"""

import math

from keras import ops

from deepthin.method import Array
from deepthin.plan.steering import PRIOR


def code_length(symbols: Array, top: int) -> Array:
    """The bits that an adaptive code of zero order takes for rounded symbols.

    Args:
        symbols: Unrounded symbols, of any shape.
        top: The largest symbol, >= 1; larger numbers count as this one.

    Returns:
        Bits, a float32 scalar, differentiable in ``symbols``: for each the difference of the lengths of the symbols
        above and below it; 0 beyond the largest.
    """
    flat, count = ops.cast(ops.reshape(symbols, (-1,)), "float32"), 2 * top + 1
    fixed = ops.stop_gradient(flat)
    clipped = ops.clip(fixed, -top, top)
    ones = ops.ones_like(clipped, dtype="int32")
    places = ops.cast(ops.round(clipped), "int32") + top
    counts = ops.cast(ops.segment_sum(ones, places, num_segments=count), "float32")
    lengths = (ops.log(float(math.prod(flat.shape)) + PRIOR * count) - ops.log(counts + PRIOR)) / math.log(2)
    below = ops.cast(ops.clip(ops.floor(clipped), -top, top - 1), "int32") + top
    slopes = ops.take(lengths[1:] - lengths[:-1], below)
    slopes = ops.where(ops.abs(fixed) <= top, slopes, ops.zeros_like(slopes))
    # The second sum is 0; its gradient is that of the interpolation.
    return ops.stop_gradient(ops.sum(counts * lengths)) + ops.sum(ops.stop_gradient(slopes) * (flat - fixed))
