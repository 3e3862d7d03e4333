"""How a matrix's code begins, in any framework: encoded from weights, or drawn by a seed. All of it in NumPy.

A start is the code and, where the method trains through its rounding, the latents that the optimiser updates.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from deepthin.method import Code, Method
from deepthin.methods.float_coding import FloatCoding
from deepthin.storage.contents import Part

_NUMPY = cast(Any, np)

Start = tuple[Code, Code | None]
"""The code, and the latents that train; None where the code itself trains."""


def joined(method: Method, parts: Sequence[Part], tensors: Sequence[np.ndarray], power: int = 1) -> np.ndarray:
    """The matrix that holds some tensors one after the other, padded with zeros.

    Args:
        method: The method, for the shape of the matrix.
        parts: How each tensor stands in it.
        tensors: The tensors, shaped as their parts.
        power: Each tensor is divided by its part's scale to this power.

    Returns:
        Array of the method's shape.
    """
    pieces = [
        (tensor.T if part.transposed else tensor).reshape(-1) / part.scale**power
        for part, tensor in zip(parts, tensors, strict=True)
    ]
    flat = np.concatenate(pieces)
    return np.pad(flat, (0, math.prod(method.shape) - flat.size)).reshape(method.shape)


def encoded(
    method: Method,
    parts: Sequence[Part],
    tensors: Sequence[np.ndarray],
    importance: Sequence[np.ndarray] | None = None,
) -> Start:
    """The code nearest to float32 tensors, as the method's ``encode`` finds it.

    Args:
        method: The method.
        parts: How each tensor stands in the matrix.
        tensors: The tensors, float32, finite.
        importance: For each tensor an array of its shape, entries >= 0: the weight of each squared error. None weighs
            all equally.

    Returns:
        The code; and the latents that train, where these are not the code itself, else None.
    """
    weight = joined(method, parts, tensors)
    # The matrix holds weights over their scale: squared errors count times the squared scale
    weigh = None if importance is None else joined(method, parts, importance, power=-2)
    if method.trains == "codes":
        return method.encode(weight, _NUMPY, weigh), None
    floats = FloatCoding(method)
    latents = dict(floats.decoder.encode(weight, _NUMPY, weigh))
    return floats.encode(latents, _NUMPY, floats.importance_of_floats(latents, _NUMPY, weigh)), latents


def generator(name: str, seed: int) -> np.random.Generator:
    """The random generator of one matrix: the same numbers in every framework.

    Args:
        name: Name of the matrix's first tensor.
        seed: The seed, modulo 2^64.

    Returns:
        NumPy's default generator (PCG64), seeded by both.
    """
    return np.random.default_rng([seed % 2**64, zlib.crc32(name.encode(errors="surrogatepass"))])


def drawn(method: Method, rng: np.random.Generator, std: float) -> Start:
    """Draw a code to train from scratch.

    Args:
        method: The method.
        rng: The only source of randomness.
        std: Standard deviation of the decoded weights, > 0; their mean is 0.

    Returns:
        The code; and the latents that train, where these are not the code itself, else None.
    """
    if method.trains == "codes":
        return method.init(rng, std), None
    floats = FloatCoding(method)
    latents = dict(floats.decoder.init(rng, std))  # latents are not rounded: differences below a step may grow
    return floats.encode(latents, _NUMPY), latents
