"""How the floats from which a weight is computed are stored: in 32 bits, or quantised by the method or by a second one.

Frameworks use ``FloatCoding`` instead of distinguishing methods. Its ``decoder`` computes the weight from floats;
``encode`` and ``decode`` convert between these floats and the stored code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from deepthin.method import FLOAT_BITS, Array, Code, Drifting, Integers, Method, Namespace, StartsSteps, Stepped, Trains
from deepthin.methods.then import Then

LOG_STEP = "log_step"
STEP_MULTIPLIER = 10.0  # learning rate of its latents: with Adam, .01 is a hundredth of the step an update


@dataclass(frozen=True, slots=True)
class Dense:
    """The matrix as it is: the decoder of methods that quantise the weights themselves."""

    shape: tuple[int, int]  # (rows, cols)

    @property
    def trains(self) -> Trains:
        """The weights."""
        return "codes"

    def bits(self) -> int:
        """32 bits for each weight.

        Returns:
            Upper bound on the stored bits of the matrix, headers apart.
        """
        return FLOAT_BITS * math.prod(self.shape)

    def code_shapes(self) -> dict[str, tuple[int, ...]]:
        """``weight``: rows x cols.

        Returns:
            Entry name -> shape.
        """
        return {"weight": self.shape}

    def integers(self) -> dict[str, Integers]:
        """No integers.

        Returns:
            An empty mapping.
        """
        return {}

    def derived(self) -> Code:
        """No tables.

        Returns:
            An empty mapping.
        """
        return {}

    def init(self, rng: Generator, std: float) -> Code:
        """Normal weights.

        Args:
            rng: The only source of randomness.
            std: Standard deviation of the decoded weights, > 0; their mean is 0.

        Returns:
            NumPy arrays of ``code_shapes``; floats are float32.
        """
        return {"weight": rng.normal(scale=std, size=self.shape).astype(np.float32)}

    def encode(self, weight: Array, xp: Namespace, importance: Array | None = None) -> Code:
        """Keep the weight.

        Args:
            weight: Array, rows x cols.
            xp: The namespace of ``weight``.
            importance: Not used.

        Returns:
            ``weight`` itself, not a copy.
        """
        return {"weight": weight}

    def importance_of(self, code: Code, importance: Array, xp: Namespace) -> Code:
        """The importance of the weights.

        Args:
            code: Stored entries and those of ``derived``.
            importance: Array, rows x cols, entries >= 0.
            xp: The namespace of the arrays.

        Returns:
            Entry name -> array of the entry's shape, for each floating entry.
        """
        return {"weight": importance}

    def decode(self, code: Code, xp: Namespace) -> Array:
        """The weight.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            Array, rows x cols.
        """
        return code["weight"]

    def decode_flat(self, code: Code, start: int, stop: int, xp: Namespace) -> Array:
        """A range of its entries.

        Args:
            code: Stored entries and those of ``derived``.
            start: First entry, >= 0.
            stop: Entry after the last, at most ``rows * cols``.
            xp: The namespace of the arrays.

        Returns:
            Array of ``stop - start`` entries.
        """
        return xp.reshape(code["weight"], (-1,))[start:stop]


@dataclass(frozen=True, slots=True)
class FloatCoding:
    """The floats of a method, and how they are stored.

    With ``method.trains == "codes"`` the optimiser updates the floats of the stored code. With ``"through"`` it updates
    latents, the floats that ``decoder`` takes; these are quantised (``decode`` of ``encode``) in every forward pass.
    Where the step is learned (``Stepped``), its logarithm is a latent too: ``xf_log_step`` beside ``xf``.

    Attributes:
        method: Any method.
    """

    method: Method

    @property
    def decoder(self) -> Method:
        """The method that computes the weight from unquantised floats."""
        if isinstance(self.method, Then):
            return self.method.outer
        return self.method if self.method.trains == "codes" else Dense(self.method.shape)

    def steps(self) -> dict[str, tuple[str, Stepped]]:
        """The floats whose step is learned.

        Returns:
            Entry of the decoder's code -> name of the latent with the logarithm of its step, and the method.
        """
        if isinstance(self.method, Then):
            return {e: (f"{e}_{LOG_STEP}", m) for e, m in self.method.inner if isinstance(m, Stepped)}
        return {"weight": (LOG_STEP, self.method)} if isinstance(self.method, Stepped) else {}

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of ``latents``, with ``trains == "through"``.

        Returns:
            Entry -> shape: the code of ``decoder``, and the learned steps.
        """
        return self.decoder.code_shapes() | {latent: (1, 1) for latent, _ in self.steps().values()}

    def started(self, floats: Code, xp: Namespace) -> Code:
        """The latents with which a training starts.

        Args:
            floats: A code of ``decoder``.
            xp: The namespace of the arrays.

        Returns:
            The floats, and learned steps that suit them.
        """
        learned = self.steps().items()
        like = floats
        if learned and isinstance(self.decoder, StartsSteps):
            tables = {entry: xp.asarray(table) for entry, table in self.decoder.derived().items()}
            like = floats | self.decoder.start_of_steps({**floats, **tables}, xp)
        return floats | {latent: m.start(xp.reshape(like[e], m.shape), xp) for e, (latent, m) in learned}

    def encode(self, floats: Code, xp: Namespace, importance: Mapping[str, Array] | None = None) -> Code:
        """Encode the floats.

        Args:
            floats: A code of ``decoder``, or latents: then with their learned steps.
            xp: The namespace of the arrays.
            importance: Entry name -> weight of each squared error; None weighs all equally.

        Returns:
            The code that is stored.
        """
        steps = self.steps()
        if steps and all(latent in floats for latent, _ in steps.values()):
            made = {entry: floats[entry] for entry in self.decoder.integers()}
            for entry, (latent, method) in steps.items():
                code = method.quantize(xp.reshape(floats[entry], method.shape), floats[latent], xp)
                made |= {latent.removesuffix(LOG_STEP) + key: array for key, array in code.items()}
            return made
        if isinstance(self.method, Then):
            return self.method.encode_floats(floats, xp, importance)
        if self.method.trains == "codes":
            return floats
        return self.method.encode(floats["weight"], xp, (importance or {}).get("weight"))

    def decode(self, code: Code, xp: Namespace) -> Code:
        """Decode the floats.

        Args:
            code: Stored entries and those of ``derived``.
            xp: The namespace of the arrays.

        Returns:
            A code of ``decoder``.
        """
        if isinstance(self.method, Then):
            return self.method.decode_floats(code, xp)
        return code if self.method.trains == "codes" else {"weight": self.method.decode(code, xp)}

    def importance_of_floats(self, floats: Code, xp: Namespace, importance: Array | None) -> Code:
        """The importance of the floats, from that of the weights.

        Args:
            floats: A code of ``decoder``.
            xp: The namespace of the arrays.
            importance: Array, rows x cols; None: no importance.

        Returns:
            Entry name -> array; empty without importance, or where a float's importance is not a sum of the weights'.
        """
        if isinstance(self.method, Then):
            return self.method.importance_of_floats(floats, xp, importance)
        return {} if importance is None else {"weight": importance}

    def latents(self, code: Code) -> Code:
        """What the optimiser updates, with the integers that are not quantised.

        Args:
            code: Stored entries, as NumPy arrays.

        Returns:
            The code itself with ``trains == "codes"``, else the decoded floats, the integers of ``decoder``, and the
            logarithms of learned steps.
        """
        if self.method.trains == "codes":
            return code
        numpy: Any = np
        floats = self.decode({**code, **self.method.derived()}, numpy)
        return {entry: floats[entry] for entry in self.decoder.code_shapes()} | self.log_steps(code, numpy)

    def log_steps(self, code: Code, xp: Namespace) -> Code:
        """The learned steps of a stored code.

        Args:
            code: Stored entries.
            xp: The namespace of the arrays.

        Returns:
            Name of the latent -> natural logarithm of the step, 1 x 1.
        """
        return {latent: xp.log(code[latent.removesuffix(LOG_STEP) + "step"]) for latent, _ in self.steps().values()}


def outer_of(method: Method) -> Method:
    """The method that computes the weights.

    Args:
        method: Any method.

    Returns:
        The outer method of a ``Then``; any other method itself.
    """
    return method.outer if isinstance(method, Then) else method


def inner_of(method: Method) -> tuple[Method, ...]:
    """The methods that quantise the floats.

    Args:
        method: Any method.

    Returns:
        The inner methods of a ``Then``, one for each floating entry; empty for any other method.
    """
    return tuple(stored for _, stored in method.inner) if isinstance(method, Then) else ()


def stored_by(method: Method, entry: str) -> Method | None:
    """The method that quantises one floating entry.

    Args:
        method: Any method.
        entry: Entry of the code of ``outer_of(method)``.

    Returns:
        The inner method of a ``Then`` for this entry; None for any other method.
    """
    return dict(method.inner).get(entry) if isinstance(method, Then) else None


def drifts(method: Method) -> bool:
    """Whether encoding a decoded code may change it by more than floating-point rounding.

    Args:
        method: Any method.

    Returns:
        True if it may.
    """
    return isinstance(method, Drifting) and method.drifts()
