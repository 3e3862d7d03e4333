"""Decoding the matrices of a file, and refusing what overflows."""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from deepthin.errors import FormatError
from deepthin.method import InTurn
from deepthin.methods.factor import Factored
from deepthin.methods.float_coding import FloatCoding
from deepthin.storage.arrays import Raw, largest
from deepthin.storage.budget import named
from deepthin.storage.contents import Contents, Thin

_INPUTS = 16.0  # magnitude of the inputs with which products must be finite
_TIMES = " times inputs"  # ends the name of a product


def check_weights(contents: Contents, where: str, most: Mapping[str, float]) -> None:
    """Refuse matrices that do not decode to finite numbers. Most follow from the largest numbers of their codes.

    Args:
        contents: What was read.
        where: What the message calls the file.
        most: Name of a matrix -> the largest finite number of the type that it is decoded in.

    Raises:
        FormatError: A weight is NaN or infinite, or would be in that type.
    """
    for name, thin in contents.thin.items():
        if not thin.surely_within(most[name]):
            with named(name):
                decoded_within(name, thin, where, most[name])


def decoded_within(name: str, thin: Thin, where: str, most: float = math.inf) -> dict[str, np.ndarray]:
    """The dense tensors of a matrix.

    Args:
        name: The matrix.
        thin: Its code.
        where: What the message calls the file.
        most: The largest finite number of the type that it is decoded in.

    Returns:
        Tensor name -> array.

    Raises:
        FormatError: A number is not finite, or above ``most``.
    """
    if thin.surely_within(most):
        return thin.decode()
    with np.errstate(all="ignore"):
        arrays = thin.decode()
    found = {f"{name}/{entry}": largest(raw) for entry, raw in thin.code.items() if most < math.inf}
    found |= {own: largest(Raw.of(array)) for own, array in arrays.items()}
    if most < math.inf:
        found |= {f"{name}/{entry}{_TIMES}": value for entry, value in _products(thin).items()}
    single = max(most, float(np.finfo(np.float32).max))  # half precision is multiplied in single precision
    for own, value in found.items():
        if not (math.isfinite(value) and value <= (single if own.endswith(_TIMES) else most)):
            raise FormatError(
                f"{where}: the code of {name} decodes to NaN or infinity: {own} has numbers up to {value}."
            )
    return arrays


def _products(thin: Thin) -> dict[str, float]:
    """How large the products of inputs up to 16 with a factor can be, where layers multiply by factors."""
    coding = FloatCoding(thin.method)
    decoder = coding.decoder
    if not isinstance(decoder, InTurn | Factored):
        return {}
    code = {entry: raw.numpy() for entry, raw in thin.code.items()}
    with np.errstate(all="ignore"):
        floats = coding.decode(code | thin.method.derived(), cast(Any, np))
    terms = _INPUTS * max(decoder.shape)
    return {e: terms * float(np.abs(a).max(initial=0.0)) for e, a in floats.items() if a.dtype.kind == "f"}
