"""How the floats that make a weight are stored: as they are, or rounded, by the method itself or by a second one.

Frameworks ask this instead of telling methods apart. ``FloatCoding.decoder`` makes the weight of floats; ``encode``
and ``decode`` lead from these floats to what is stored, and back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from deepthin.method import FLOAT_BITS, Array, Code, Drifting, Integers, Method, Namespace, Trains
from deepthin.methods.then import Then


@dataclass(frozen=True, slots=True)
class Dense:
    """The matrix as it is: what makes the weight where a method rounds the weights themselves."""

    shape: tuple[int, int]  # (rows, cols)

    @property
    def trains(self) -> Trains:
        """The weights."""
        return "codes"

    def bits(self) -> int:
        """32 bits a weight."""
        return FLOAT_BITS * math.prod(self.shape)

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``weight``."""
        return {"weight": self.shape}

    def integers(self) -> dict[str, Integers]:
        """None."""
        return {}

    def derived(self) -> Code:
        """Nothing."""
        return {}

    def init(self, rng: Generator, std: float) -> Code:
        """Normal weights."""
        return {"weight": rng.normal(scale=std, size=self.shape).astype(np.float32)}

    def encode(self, weight: Array, xp: Namespace, importance: Array | None = None) -> Code:
        """The weight."""
        return {"weight": weight}

    def importance_of(self, code: Code, importance: Array, xp: Namespace) -> Code:
        """That of the weights."""
        return {"weight": importance}

    def decode(self, code: Code, xp: Namespace) -> Array:
        """The weight."""
        return code["weight"]

    def decode_flat(self, code: Code, start: int, stop: int, xp: Namespace) -> Array:
        """A range of its entries."""
        return xp.reshape(code["weight"], (-1,))[start:stop]


@dataclass(frozen=True, slots=True)
class FloatCoding:
    """The floats of a method, and how they are stored.

    ``method.trains == "codes"``: the optimiser is shown the floats of the stored code. ``"through"``: it is shown the
    floats that ``decoder`` takes, the latents, and these are rounded (``decode`` of ``encode``) in every forward pass.
    """

    method: Method

    @property
    def decoder(self) -> Method:
        """What makes the weight of floats, however these are stored."""
        if isinstance(self.method, Then):
            return self.method.outer
        return self.method if self.method.trains == "codes" else Dense(self.method.shape)

    def encode(self, floats: Code, xp: Namespace, importance: Mapping[str, Array] | None = None) -> Code:
        """What is stored for a code of ``decoder``; ``importance``, by entry, weighs the errors of its floats."""
        if isinstance(self.method, Then):
            return self.method.encode_floats(floats, xp, importance)
        if self.method.trains == "codes":
            return floats
        return self.method.encode(floats["weight"], xp, (importance or {}).get("weight"))

    def decode(self, code: Code, xp: Namespace) -> Code:
        """The code of ``decoder`` from what is stored, and from the derived tables of the method."""
        if isinstance(self.method, Then):
            return self.method.decode_floats(code, xp)
        return code if self.method.trains == "codes" else {"weight": self.method.decode(code, xp)}

    def importance_of_floats(self, floats: Code, xp: Namespace, importance: Array | None) -> Code:
        """The importance of the floats, by entry, from that of the weights; nothing where it cannot be told."""
        if isinstance(self.method, Then):
            return self.method.importance_of_floats(floats, xp, importance)
        return {} if importance is None else {"weight": importance}

    def latents(self, code: Code) -> Code:
        """What the optimiser is shown of a stored NumPy code, with the integers that are not rounded."""
        if self.method.trains == "codes":
            return code
        numpy: Any = np
        floats = self.decode({**code, **self.method.derived()}, numpy)
        return {entry: floats[entry] for entry in self.decoder.code_shapes()}


def outer_of(method: Method) -> Method:
    """The first of two methods, which makes the weights; the method itself if nothing else stores its floats."""
    return method.outer if isinstance(method, Then) else method


def inner_of(method: Method) -> tuple[Method, ...]:
    """The methods that store the floats of the first one, by entry; none if they are stored as they are."""
    return tuple(stored for _, stored in method.inner) if isinstance(method, Then) else ()


def drifts(method: Method) -> bool:
    """Whether a decoded code, encoded again, may be another one by more than rounding."""
    return isinstance(method, Drifting) and method.drifts()
