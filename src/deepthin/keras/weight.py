"""A weight that is generated: the optimiser sees the latent floats, the layer sees the tensor that they decode to."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import keras
import numpy as np
from jaxtyping import Float
from keras import ops

from deepthin.keras.namespace import NAMESPACE
from deepthin.method import Array, Code, Flat, Integers, Method, Namespace, Sparse
from deepthin.methods import fields, learning_rate_multiplier, with_fields
from deepthin.methods.float_coding import FloatCoding, drifts
from deepthin.plan.start import Start, drawn, encoded
from deepthin.storage.contents import Part

_OPS = cast(Namespace, NAMESPACE)
_ROUNDING = 1e-6  # of the largest: two decodings of one code may differ by that


@dataclass(frozen=True, slots=True)
class _Kept:
    """A code, and the latents that it stands for: it is the one to be stored as long as these do not change."""

    latents: Code
    code: Code


@keras.saving.register_keras_serializable("deepthin")
class ThinWeight(keras.layers.Layer):
    """One matrix in compressed form, and the tensors that it holds: one, or those of a group.

    Trainable variables are the latent floats: those of the code, or, where the method trains ``through`` its rounding,
    what it encodes. Integers that do not follow from these are variables too, not trainable. Tables that follow from
    the method's fields are constants. ``dense(i)`` is the i-th tensor as a file has it, (outputs, inputs), in the type
    of the latents, whatever type the layer around it computes in.

    A code that was loaded stays as it is until a latent changes in value. Of ``binary`` it is held beside the latents,
    since what its signs give, encoded again, need not be the same.
    """

    def __init__(
        self,
        method_name: str,
        method: Method,
        parts: Sequence[Part],
        start: Start | None = None,
        *,
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        """``start`` is as ``deepthin.start`` makes it; None: all zeros, until something is loaded."""
        super().__init__(dtype=dtype, **options)
        self.method_name, self.method, self.parts = method_name, method, tuple(parts)
        self._coding = FloatCoding(method)
        self.decoder = self._coding.decoder  # takes floats, however they are stored
        self.rounds = method.trains == "through"
        self.learning_rate_multiplier = learning_rate_multiplier(method_name, method)
        ends = list(itertools.accumulate(math.prod(part.shape) for part in parts))
        self.cuts = tuple(zip([0, *ends], ends, strict=False))
        self._kept: _Kept | None = None
        self.latents: dict[str, Any] = {}
        shown = self.decoder if self.rounds else method
        shapes, whole = shown.code_shapes(), shown.integers()
        for entry, shape in shapes.items():
            kind = _integer_type(whole[entry]) if entry in whole else self.variable_dtype
            options = {"trainable": entry not in whole, "autocast": False, "name": entry}
            self.latents[entry] = self.add_weight(shape, "zeros", kind, **options)
            self.latents[entry].learning_rate_multiplier = self.learning_rate_multiplier
        self.stored: dict[str, Any] = {}
        if self.rounds and drifts(method):
            whole = method.integers()
            for entry, shape in method.code_shapes().items():
                if entry in self.latents:
                    continue
                kind = _integer_type(whole[entry]) if entry in whole else self.variable_dtype
                options = {"trainable": False, "autocast": False, "name": entry}
                self.stored[entry] = self.add_weight(shape, "zeros", kind, **options)
        self.built = True
        if start is not None:
            self._set(*start)

    @classmethod
    def encode(
        cls,
        method_name: str,
        method: Method,
        parts: Sequence[Part],
        tensors: Sequence[np.ndarray],
        importance: Sequence[np.ndarray] | None = None,
        **options: Any,
    ) -> "ThinWeight":
        """The code nearest to float32 tensors in the file's layout; ``importance`` has their shapes."""
        return cls(method_name, method, parts, encoded(method, parts, tensors, importance), **options)

    @classmethod
    def draw(
        cls,
        method_name: str,
        method: Method,
        parts: Sequence[Part],
        rng: np.random.Generator,
        std: float,
        **options: Any,
    ) -> "ThinWeight":
        """A from-scratch start; the entries of a part then have standard deviation ``std`` times its scale.

        ``rng`` is that of ``deepthin.start.generator``.
        """
        return cls(method_name, method, parts, drawn(method, rng, std), **options)

    def code(self) -> Code:
        """The stored entries, as NumPy arrays."""
        now = _values(self.latents)
        if not self.rounds:
            return now
        kept = self._kept
        if kept is None or any(not np.array_equal(kept.latents[entry], now[entry]) for entry in now):
            self._kept = kept = _Kept(now, self._code_of(now))
        return kept.code

    def _code_of(self, latents: Code) -> Code:
        code = {**_values(self.stored), **{entry: a for entry, a in latents.items() if entry in self.method.integers()}}
        if self.stored and all(_near(latents[e], a, np) for e, a in self._coding.latents(code).items() if e in latents):
            return code
        code = self._coding.encode({entry: _wide(array) for entry, array in latents.items()}, cast(Namespace, np))
        kind = next(a.dtype for a in latents.values() if not np.issubdtype(a.dtype, np.integer))
        return {entry: a if entry in self.method.integers() else a.astype(kind) for entry, a in code.items()}

    def set_code(self, code: Mapping[str, np.ndarray]) -> None:
        """Take over another code of the same method, in place: optimisers, and what is frozen, stay as they are."""
        self._set(dict(code), None)

    def dense(self, index: int = 0) -> Float[Array, "..."]:
        """A tensor, differentiable in every latent; one of the backend's, in a graph too."""
        (start, stop), part, decoder, floats = self.cuts[index], self.parts[index], self.decoder, self.floats()
        tables = {entry: ops.convert_to_tensor(_narrow(table)) for entry, table in decoder.derived().items()}
        if isinstance(decoder, Flat):
            flat = decoder.decode_flat({**tables, **floats}, start, stop, _OPS)
        elif isinstance(decoder, Sparse):  # whose decode writes in place
            places = ops.cast(floats["positions"], "int32")[:, None]
            flat = ops.scatter(places, floats["values"], (math.prod(decoder.shape),))[start:stop]
        else:
            flat = ops.reshape(decoder.decode({**tables, **floats}, _OPS), (-1,))[start:stop]
        return _cut(flat, part)

    def floats(self) -> dict[str, Array]:
        """What ``decoder`` takes: its floats, rounded where the method rounds, and its integers.

        The gradient goes through rounding as if it were not there: the straight-through estimator of Bengio et al.,
        2013, arXiv:1308.3432.
        """
        state = _tensors(self.latents)
        if not self.rounds:
            return self._coding.decode(state, _OPS)
        fixed = {entry: ops.stop_gradient(tensor) for entry, tensor in state.items()}
        rounded = self._coding.decode(self._coding.encode(fixed, _OPS), _OPS)
        whole = self.decoder.integers()
        if self.stored:
            loaded = self._coding.decode({**_tensors(self.stored), **{entry: fixed[entry] for entry in whole}}, _OPS)
            near = ops.all(ops.stack([_near(t, loaded[e], ops) for e, t in fixed.items() if e not in whole]))
            rounded = {e: t if e in whole else ops.where(near, loaded[e], t) for e, t in rounded.items()}
        # The difference is 0, and the sum just what is rounded.
        return {e: t if e in whole else (t - fixed[e]) + ops.stop_gradient(rounded[e]) for e, t in state.items()}

    def _set(self, code: Code, latents: Code | None) -> None:
        whole, kind = self.method.integers(), np.dtype(self.variable_dtype)
        code = {entry: np.asarray(a) if entry in whole else np.asarray(a).astype(kind) for entry, a in code.items()}
        wide = {entry: _wide(array) for entry, array in code.items()}
        values = self._coding.latents(wide) if latents is None else latents
        for entry, variable in (*self.latents.items(), *self.stored.items()):
            variable.assign((values if entry in self.latents else code)[entry])
        if self.rounds and latents is None:
            self._kept = _Kept(_values(self.latents), code)

    def get_config(self) -> dict[str, Any]:
        """The method as a file has it, and the parts."""
        parts = [dataclasses.asdict(part) for part in self.parts]
        own = {"method": self.method_name, "fields": fields(self.method), "parts": parts}
        return {**super().get_config(), **json.loads(json.dumps(own))}  # lists, as JSON has no tuples

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "ThinWeight":
        """All zeros: whoever asks loads the variables."""
        rest = {key: value for key, value in config.items() if key not in ("method", "fields", "parts")}
        parts = [Part(**{**part, "shape": tuple(part["shape"])}) for part in config["parts"]]
        return cls(config["method"], with_fields(config["method"], config["fields"]), parts, **rest)


def _near(a: Array, b: Array, xp: Any) -> Array:
    """Whether arrays are the same but for rounding, by NumPy or keras.ops."""
    return xp.max(xp.abs(a - b)) <= _ROUNDING * xp.max(xp.abs(b))


def _values(variables: Mapping[str, Any]) -> Code:
    return {entry: np.array(ops.convert_to_numpy(variable)) for entry, variable in variables.items()}


def _tensors(variables: Mapping[str, Any]) -> Code:
    return {entry: ops.convert_to_tensor(variable) for entry, variable in variables.items()}


def _wide(array: np.ndarray) -> np.ndarray:
    """Half precision as float32."""
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.float32)


def _cut(flat: Array, part: Part) -> Array:
    """``Part.cut``, by functions."""
    if part.scale != 1.0:
        flat = flat * part.scale
    tensor = ops.transpose(ops.reshape(flat, part.shape[::-1])) if part.transposed else ops.reshape(flat, part.shape)
    if part.zero_row is None:
        return tensor
    row, after = part.zero_row, part.zero_row + 1
    return ops.concatenate([tensor[:row], 0 * tensor[row:after], tensor[after:]], axis=0)


def _narrow(table: np.ndarray) -> np.ndarray:
    """Tables of places as int32: JAX has no other."""
    return table.astype(np.int32) if table.dtype == np.int64 else table


def _integer_type(kind: Integers) -> str:
    """The narrowest that holds them."""
    most = kind.least + kind.count - 1
    if kind.least >= 0:
        return "uint8" if most < 1 << 8 else "int16" if most < 1 << 15 else "int32"
    return "int8" if kind.least >= -(1 << 7) and most < 1 << 7 else "int16"
