"""How a matrix's code begins, in any framework: encoded from weights, or drawn by a seed. All of it in NumPy.

A start is the code and, where the method trains through its rounding, the latents that the optimiser updates.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from deepthin.errors import NonFiniteError
from deepthin.method import Code, Method
from deepthin.methods.float_coding import FloatCoding
from deepthin.storage.contents import Part

_NUMPY = cast(Any, np)

PIECE = 1 << 15  # entries that are compared at a time: their copies in double precision are small

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
        (tensor.T if part.transposed else tensor).reshape(-1) for part, tensor in zip(parts, tensors, strict=True)
    ]
    if len(pieces) == 1 and parts[0].scale == 1 and pieces[0].size == math.prod(method.shape):
        return pieces[0].reshape(method.shape)  # not copied: encoding changes nothing
    flat, at = np.zeros(math.prod(method.shape), np.result_type(*pieces)), 0
    for part, piece in zip(parts, pieces, strict=True):
        np.divide(piece, part.scale**power, out=flat[at : at + piece.size])
        at += piece.size
    return flat.reshape(method.shape)


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
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused when it is decoded
        if method.trains == "codes":
            return method.encode(weight, _NUMPY, weigh), None
        floats = FloatCoding(method)
        latents = floats.started(dict(floats.decoder.encode(weight, _NUMPY, weigh)), _NUMPY)
        return floats.encode(latents, _NUMPY, floats.importance_of_floats(latents, _NUMPY, weigh)), latents


def relative_error(name: str, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """The relative error of a decoded tensor in the Frobenius norm.

    Args:
        name: Name of the tensor.
        pieces: Ranges of the tensor, each as it was and as it is decoded.

    Returns:
        ``||decoded - dense|| / ||dense||``, added up in double precision; 0 where the dense norm is.

    Raises:
        NonFiniteError: A decoded value has overflowed.
    """
    squares, whole = 0.0, 0.0
    for dense, decoded in pieces:
        if not np.isfinite(decoded).all():
            value = float(dense.reshape(-1)[np.flatnonzero(~np.isfinite(decoded))[0]])
            raise NonFiniteError(
                f"{name} has the value {value:g}, and what is decoded for it is not finite: sums of the code exceed "
                "the largest float of 32 bits. Scale the tensor down, or leave it dense."
            )
        wide = dense.astype(np.float64)
        whole += float(np.sum(wide * wide))
        wide -= decoded
        squares += float(np.sum(wide * wide))
    return math.sqrt(squares / whole) if whole > 0 else 0.0


def pieces_of(dense: np.ndarray, decoded: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ranges of two arrays of one shape, for ``relative_error``."""
    dense, decoded = dense.reshape(-1), decoded.reshape(-1)
    for first in range(0, dense.size, PIECE):
        yield dense[first : first + PIECE], decoded[first : first + PIECE]


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
    latents = floats.started(
        dict(floats.decoder.init(rng, std)), _NUMPY
    )  # latents are not rounded: differences below a step may grow
    return floats.encode(latents, _NUMPY), latents
