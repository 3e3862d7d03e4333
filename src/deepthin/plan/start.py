"""How a matrix's code begins, in any framework: encoded from weights, or drawn by a seed. All of it in NumPy.

A start is the code and, where the method trains through its rounding, the latents: what the optimiser is shown.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from deepthin.coding.bits import PIECE
from deepthin.errors import NonFiniteError
from deepthin.method import Code, Method
from deepthin.methods.float_coding import FloatCoding
from deepthin.storage.contents import Part

_NUMPY = cast(Any, np)

Start = tuple[Code, Code | None]
"""The code, and the latents where it is not these that train."""


def joined(method: Method, parts: Sequence[Part], tensors: Sequence[np.ndarray], power: int = 1) -> np.ndarray:
    """The matrix that holds these tensors, each over its scale to this power, filled up with zeros."""
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
    """The code nearest to float32 tensors; ``importance`` has their shapes."""
    weight = joined(method, parts, tensors)
    # What is stored is the weight over its scale, so an error of it counts by the square of the scale
    weigh = None if importance is None else joined(method, parts, importance, power=-2)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused when it is decoded
        if method.trains == "codes":
            return method.encode(weight, _NUMPY, weigh), None
        floats = FloatCoding(method)
        latents = dict(floats.decoder.encode(weight, _NUMPY, weigh))
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
    """What draws the matrix whose first tensor has this name: the same numbers in every framework."""
    return np.random.default_rng([seed % 2**64, zlib.crc32(name.encode())])


def drawn(method: Method, rng: np.random.Generator, std: float) -> Start:
    """A from-scratch start whose weights have this standard deviation."""
    if method.trains == "codes":
        return method.init(rng, std), None
    floats = FloatCoding(method)
    latents = dict(floats.decoder.init(rng, std))  # not rounded: what is below a step may count in time
    return floats.encode(latents, _NUMPY), latents
