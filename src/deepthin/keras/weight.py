"""A generated weight: the optimiser sees the latent floats, the layer sees the tensor that they decode to."""

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import keras
import numpy as np
from jaxtyping import Float
from keras import ops

from deepthin.keras.integers import IntegerVariable
from deepthin.keras.namespace import HALF, NAMESPACE
from deepthin.method import Array, Code, Flat, Integers, Method, Namespace, Sparse
from deepthin.methods import fields, learning_rate_multiplier, with_fields
from deepthin.methods.float_coding import LOG_STEP, STEP_MULTIPLIER, FloatCoding, drifts
from deepthin.plan.start import Start, drawn, encoded
from deepthin.storage.contents import Part

_OPS = cast(Namespace, NAMESPACE)
EXPORTED: ContextVar[Any] = ContextVar("exported", default=None)
"""While a graph is traced for another runtime: its ``deepthin.keras.tensorflow_portable.Graph``."""
_ROUNDING = 1e-6  # upper bound on the difference of two decodings of one code, relative to the largest entry


@dataclass(frozen=True, slots=True)
class _Coded:
    """A code, and the latents that it was computed from or loaded with: valid while these do not change."""

    latents: Code
    code: Code


@keras.saving.register_keras_serializable("deepthin")
class ThinWeight(keras.layers.Layer):
    """One matrix in compressed form, and the tensors that are cut from it: one, or those of a group.

    Trainable variables are the latent floats: those of the code or, where the method trains ``through`` its rounding,
    the floats before rounding. Integers that do not follow from these are variables too, not trainable. Tables that
    follow from the method's fields are constants. A learned step (``coded``) is trained by its logarithm.

    A loaded code does not change until a latent changes in value. ``binary`` stores its code beside the latents, since
    encoding the decoded weight again may give another code.

    Args:
        method_name: Name of the method, as files and reports have it.
        method: The method, of the whole matrix's shape.
        parts: Shape and scale of each tensor, in the order in which they are cut from the flattened matrix.
        start: Code and latents, as ``deepthin.plan.start`` makes them; None for zeros, to be loaded.
        dtype: Dtype of the latents.
        std: Standard deviation of the entries of a copy that begins anew (``from_config``); None for a tenth of He's
            variance.
        file_bytes: The size of the whole file that a rate-aware training is to reach (``SizeTarget``).
        options: Further arguments of ``keras.layers.Layer``.
    """

    def __init__(
        self,
        method_name: str,
        method: Method,
        parts: Sequence[Part],
        start: Start | None = None,
        *,
        dtype: str = "float32",
        std: float | None = None,
        file_bytes: int | None = None,
        **options: Any,
    ) -> None:

        super().__init__(dtype=dtype, **options)
        self.file_bytes = file_bytes
        self.method_name, self.method, self.parts = method_name, method, tuple(parts)
        self.std = math.sqrt(0.2 / max(math.prod(self.parts[0].shape[1:]), 1)) if std is None else std
        self._coding = FloatCoding(method)
        self.decoder = self._coding.decoder  # takes floats, however they are stored
        self.rounds = method.trains == "through"
        self.learning_rate_multiplier = learning_rate_multiplier(method_name, method)
        ends = list(itertools.accumulate(math.prod(part.shape) for part in parts))
        self.cuts = tuple(zip([0, *ends], ends, strict=False))
        self._coded: _Coded | None = None
        self.latents: dict[str, Any] = {}
        shapes, whole = method.code_shapes(), method.integers()
        if self.rounds:
            shapes, whole = self._coding.latent_shapes(), self.decoder.integers()
        for entry, shape in shapes.items():
            self.latents[entry] = self._variable(entry, shape, whole.get(entry), True)
            self.latents[entry].learning_rate_multiplier = self.learning_rate_multiplier
        self.steps = self._coding.steps() if self.rounds else {}  # of each float: name of its learned step, and method
        for latent, _ in self.steps.values():
            self.latents[latent].learning_rate_multiplier = STEP_MULTIPLIER
        self._add_rate()
        self.stored: dict[str, Any] = {}
        if self.rounds and drifts(method):
            whole = method.integers()
            for entry, shape in method.code_shapes().items():
                if entry not in self.latents:
                    self.stored[entry] = self._variable(entry, shape, whole.get(entry), False)
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
        """Encode dense tensors.

        Args:
            method_name: Name of the method, as files and reports have it.
            method: The method, of the whole matrix's shape.
            parts: Shape and scale of each tensor.
            tensors: The dense tensors in the file's layout, float32, of the parts' shapes.
            importance: One array >= 0 for each tensor, of its shape: the weight of each squared error.
            options: Further arguments of the class.

        Returns:
            The weight with the nearest code that the method finds.
        """
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
        """Draw a start from scratch.

        Args:
            method_name: Name of the method, as files and reports have it.
            method: The method, of the whole matrix's shape.
            parts: Shape and scale of each tensor.
            rng: NumPy's generator, such as ``deepthin.plan.start.generator`` makes; it is advanced.
            std: Standard deviation of the decoded entries, before they are multiplied by the scale of their part.
            options: Further arguments of the class.

        Returns:
            The weight.
        """
        return cls(method_name, method, parts, drawn(method, rng, std), std=std, **options)

    def _variable(self, entry: str, shape: tuple[int, ...], whole: Integers | None, trainable: bool) -> Any:
        """A variable of zeros for an entry, tracked; of exact integers, if it has their range."""
        if whole is None:
            options = {"trainable": trainable, "autocast": False, "name": entry}
            return self.add_weight(shape, "zeros", self._type(entry), **options)
        with keras.name_scope(self.name, caller=self):
            variable = IntegerVariable(shape, whole, entry)
        self._track_variable(variable)
        return variable

    def _add_rate(self) -> None:
        """Variables for ``SizeTarget``, always there, so that files of weights fit. One weight's serve the model."""
        options = {"dtype": "float32", "trainable": False, "autocast": False, "aggregation": "only_first_replica"}
        if self.steps:
            self.bit_weight = self.add_weight((), "zeros", name="bit_weight", **options)  # 0 but in a training step
            self.code_bits = self.add_weight((), "zeros", name="code_bits", **options)  # as the last step saw them

    def _type(self, entry: str) -> str:
        """The dtype of a floating variable; logarithms of steps need more than half precision."""
        return "float32" if entry.endswith(LOG_STEP) and self.variable_dtype in HALF else self.variable_dtype

    def code(self) -> Code:
        """The stored entries. A loaded code does not change until a latent changes in value.

        Returns:
            Entry -> NumPy array, as a file stores it.
        """
        now = _values(self.latents)
        if not self.rounds:
            return now
        coded = self._coded
        if coded is None or any(not np.array_equal(coded.latents[entry], now[entry]) for entry in now):
            self._coded = coded = _Coded(now, self._code_of(now))
        return coded.code

    def _code_of(self, latents: Code) -> Code:
        code = {**_values(self.stored), **{entry: a for entry, a in latents.items() if entry in self.method.integers()}}
        if self.stored and all(_near(latents[e], a, np) for e, a in self._coding.latents(code).items() if e in latents):
            return code
        code = self._encoded(latents)
        kind = next(a.dtype for a in latents.values() if not np.issubdtype(a.dtype, np.integer))
        return {entry: a if entry in self.method.integers() else a.astype(kind) for entry, a in code.items()}

    def _encoded(self, latents: Code) -> Code:
        """The code of latents by the operations of ``floats``: NumPy's could break ties otherwise."""
        code = self._coding.encode(self._widened(latents), _OPS)
        return {entry: np.array(ops.convert_to_numpy(a)) for entry, a in code.items()}

    def set_code(self, code: Mapping[str, np.ndarray]) -> None:
        """Load another code of the same method, in place; the variables stay, and whether they are trainable.

        Args:
            code: Entry -> array, of the present shapes.
        """
        self._set(dict(code), None)

    def dense(self, index: int = 0) -> Float[Array, "..."]:
        """Decode a tensor.

        Args:
            index: Which of the weight's tensors.

        Returns:
            A tensor of the backend in the file's layout and the latents' dtype, differentiable in every latent.
        """
        graph = EXPORTED.get()
        return self.dense_of(self.floats(), index) if graph is None else graph.weights[id(self)].dense(index, graph)

    def dense_of(self, floats: Mapping[str, Array], index: int = 0) -> Float[Array, "..."]:
        """Decode a tensor from given floats.

        Args:
            floats: What ``floats`` returns.
            index: Which of the weight's tensors.

        Returns:
            A tensor of the backend in the file's layout.
        """
        (start, stop), part, decoder = self.cuts[index], self.parts[index], self.decoder
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
        """The code that ``decoder`` takes: floats, rounded where the method rounds, and integers.

        Gradients pass the rounding unchanged (straight-through estimator; Bengio, Leonard and Courville, 2013,
        arXiv:1308.3432); that of a learned step is the difference in steps (Esser et al., 2020, arXiv:1902.08153,
        equation 3).

        Returns:
            Entry -> tensor of the backend.
        """
        if not self.rounds:
            return self._coding.decode(_tensors(self.latents), _OPS)
        state = self._widened(self.latents)
        fixed = {entry: ops.stop_gradient(tensor) for entry, tensor in state.items()}
        rounded = self._coding.decode(self._coding.encode(fixed, _OPS), _OPS)
        whole = self.decoder.integers()
        if self.stored:
            loaded = self._coding.decode({**_tensors(self.stored), **{entry: fixed[entry] for entry in whole}}, _OPS)
            near = ops.all(ops.stack([_near(fixed[e], t, ops) for e, t in loaded.items() if e not in whole]))
            rounded = {e: t if e in whole else ops.where(near, loaded[e], t) for e, t in rounded.items()}
        rounded = {e: ops.stop_gradient(ops.cast(t, fixed[e].dtype)) for e, t in rounded.items()}
        floats = {entry: state[entry] for entry in self.decoder.code_shapes()}
        # The difference is 0, so the sum is exactly the rounded value; its gradient is that of the latent.
        floats = {e: t if e in whole else (t - fixed[e]) + rounded[e] for e, t in floats.items()}
        for entry, (latent, method) in self.steps.items():
            step = ops.reshape(method.step(state[latent], _OPS), ())  # whatever the shape of the floats
            slope = ops.stop_gradient((rounded[entry] - fixed[entry]) / step)
            floats[entry] = floats[entry] + slope * (step - ops.stop_gradient(step))
        return {e: t if e in whole else ops.cast(t, self.variable_dtype) for e, t in floats.items()}

    def _widened(self, latents: Mapping[str, Any]) -> Code:
        """Latents as tensors; beside a learned step in single precision at least."""
        tensors, whole = _tensors(latents), self.decoder.integers()
        if not self.steps or self.variable_dtype not in HALF:
            return tensors
        return {entry: t if entry in whole else ops.cast(t, "float32") for entry, t in tensors.items()}

    def unrounded(self) -> dict[str, tuple[Array, int]]:
        """The symbols before rounding, of the floats whose step is learned: what a rate-aware training codes.

        Returns:
            Entry -> latents over the step, differentiable in both, and the largest symbol; empty for other methods.
        """
        state = self._widened(self.latents) if self.steps else {}
        return {
            entry: (state[entry] / ops.reshape(method.step(state[latent], _OPS), ()), method.top())
            for entry, (latent, method) in self.steps.items()
        }

    def _set(self, code: Code, latents: Code | None) -> None:
        whole, kind = self.method.integers(), np.dtype(self.variable_dtype)
        code = {entry: np.asarray(a) if entry in whole else np.asarray(a).astype(kind) for entry, a in code.items()}
        wide = {entry: _wide(array) for entry, array in code.items()}
        values = self._coding.latents(wide) if latents is None else latents
        for entry, variable in (*self.latents.items(), *self.stored.items()):
            variable.assign((values if entry in self.latents else code)[entry])
        if self.rounds and latents is None:
            self._coded = _Coded(_values(self.latents), code)

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration, with the method's fields and the parts.

        Returns:
            A mapping that JSON can hold.
        """
        parts = [dataclasses.asdict(part) for part in self.parts]
        added = {"method": self.method_name, "fields": fields(self.method), "parts": parts, "std": self.std}
        if self.file_bytes is not None:
            added["file_bytes"] = self.file_bytes
        return {**super().get_config(), **json.loads(json.dumps(added))}  # lists, as JSON has no tuples

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "ThinWeight":
        """Build a weight from its configuration. It begins anew, as Keras's layers do, until its variables are loaded.

        Matrices are drawn, by a seed that ``keras.utils.set_random_seed`` determines; vectors are zero.

        Args:
            config: What ``get_config`` returned.
            custom_objects: Ignored; Keras passes it.

        Returns:
            The weight.
        """
        rest = {key: value for key, value in config.items() if key not in ("method", "fields", "parts")}
        parts = [Part(**{**part, "shape": tuple(part["shape"])}) for part in config["parts"]]
        weight = cls(config["method"], with_fields(config["method"], config["fields"]), parts, **rest)
        if len(parts[0].shape) > 1:
            weight._set(*drawn(weight.method, np.random.default_rng(random.getrandbits(64)), weight.std))
        else:
            weight._set(*encoded(weight.method, parts, [np.zeros(part.shape, np.float32) for part in parts]))
        return weight


def _near(a: Array, b: Array, xp: Any) -> Array:
    """Whether arrays are equal up to rounding; ``xp`` is NumPy or keras.ops."""
    return xp.max(xp.abs(a - b)) <= _ROUNDING * xp.max(xp.abs(b))


def _values(variables: Mapping[str, Any]) -> Code:
    return {entry: np.array(ops.convert_to_numpy(variable)) for entry, variable in variables.items()}


def _tensors(variables: Mapping[str, Any]) -> Code:
    return {entry: ops.convert_to_tensor(variable) for entry, variable in variables.items()}


def _wide(array: np.ndarray) -> np.ndarray:
    """Half precision as float32."""
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.float32)


def _cut(flat: Array, part: Part) -> Array:
    """``Part.cut`` in keras.ops."""
    if part.scale != 1.0:
        flat = flat * part.scale
    tensor = ops.transpose(ops.reshape(flat, part.shape[::-1])) if part.transposed else ops.reshape(flat, part.shape)
    if part.zero_row is None:
        return tensor
    row, after = part.zero_row, part.zero_row + 1
    return ops.concatenate([tensor[:row], 0 * tensor[row:after], tensor[after:]], axis=0)


def _narrow(table: np.ndarray) -> np.ndarray:
    """Tables of indices as int32, as JAX has no int64."""
    return table.astype(np.int32) if table.dtype == np.int64 else table
