"""A generated weight: the optimiser sees the latent floats, the layer sees the matrix or its product."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepthin.kernels import products
from deepthin.kernels.costs import Path
from deepthin.method import Code, Flat, Method, Stepped, Symbols
from deepthin.methods.factor import Factored, Window
from deepthin.methods.float_coding import LOG_STEP, FloatCoding, inner_of
from deepthin.plan.start import Start, drawn, encoded, generator
from deepthin.storage.contents import Part
from deepthin.torch import multiply
from deepthin.torch.cache import StateCache
from deepthin.torch.code_length import quantized
from deepthin.torch.evaluated import Evaluated, current, is_current, is_trusted, last_step, source
from deepthin.torch.multiply import Case
from deepthin.torch.operators import product, takes
from deepthin.torch.snapshot import Snapshot, are_parameters, is_exported, is_listed, unrecorded, warn_of_dense
from deepthin.torch.state import CodeState, smallest_type
from deepthin.torch.tracing import as_leaf, is_plain, is_portable, is_recorded
from deepthin.torch.wrapped import is_sharded

_GATHER = 4  # upper bound on the time of a row decoded alone over that of one among all (a training step)
_WAYS: dict[Path, int] = {"native-direct": 1, "native-fft": 2}
_ROUNDING = 1e-6  # of the largest float: two decodings of one code may differ by that
_TORCH = cast(Any, torch)


class ThinWeight(CodeState):
    """One matrix in compressed form, and the tensors that are cut from it: one, or those of a group.

    Parameters are the latent floats: those of the code or, where the method trains ``through`` its rounding and the
    weight is not ``frozen``, the floats before rounding. Integers of the code that do not follow from these, and tables
    that follow from the method's fields, are neither parameters nor buffers (``deepthin.torch.state``).

    A state dict holds the parameters, the integers and, of what is rounded, the code too: a loaded code may differ from
    what its floats give when they are encoded again.

    Args:
        name: Name of the method, as files and reports have it.
        method: The method, of the whole matrix's shape.
        parts: Shape and scale of each tensor, in the order in which they are cut from the flattened matrix.
        code: Entry -> tensor, all on one device; used without a copy.
        latents: Floats before rounding; by default those that the code decodes to.
        frozen: For inference: the state is the code itself, also of a method that rounds.

    Attributes:
        direct: Whether the parameters are the floats that ``decoder`` takes.
        rounds: Whether the parameters are rounded at every use, with a straight-through estimator.
        decoder: The method that decodes the floats, however these are stored.
        plans: For each tensor its window in the factors' product; None where it must be decoded.
    """

    # Of a start from scratch: name of the first tensor, seed, and standard deviation (None: a tenth of He's variance)
    origin: tuple[str, int, float | None] = ("", 0, None)
    file_bytes: int | None = None  # the size of the whole file that a rate-aware training is to reach
    _given: dict[str, Tensor] | None = None  # a code that was loaded: encoding again may give another
    _fast: "tuple[Any, ...] | None" = None  # native products by tensor, made at their first use
    _evaluated: Evaluated | None = None

    def __init__(
        self,
        name: str,
        method: Method,
        parts: Sequence[Part],
        code: Mapping[str, Tensor],
        latents: Mapping[str, Tensor] | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.method, self.parts = name, method, tuple(parts)
        self.rounds = method.trains == "through" and not frozen
        self._prepare()
        state = dict(code)
        if self.rounds:
            floats = latents or self._latents_of({**code, **_placed(method.derived(), code)})
            state = {entry: code[entry] for entry in self.decoder.integers()}
            state |= {entry: floats[entry] for entry in self._coding.latent_shapes()}
        self._register(state, method.integers())
        self._coded_entries = tuple(entry for entry in method.code_shapes() if self.rounds and entry not in state)
        self._prepare_tables()
        if self.rounds and latents is None:
            self._given = self._coded.put(self._copies(), dict(code))

    def _prepare(self) -> None:
        """Compute what follows from the method and the parts, and empty the caches."""
        self._coding = FloatCoding(self.method)
        self.direct = not self.rounds and not inner_of(self.method)  # the parameters are what ``decoder`` takes
        self.decoder = self.method if self.direct else self._coding.decoder  # takes floats, however they are stored
        ends = list(itertools.accumulate(math.prod(part.shape) for part in self.parts))
        self._cuts = tuple(zip([0, *ends], ends, strict=False))
        self._windows = tuple(self._window(index) for index in range(len(self.parts)))
        self.plans = tuple(
            None if window is None or part.zero_row is not None or (window.is_rank and window.offset) else window
            for window, part in zip(self._windows, self.parts, strict=True)
        )
        self._operator_pays = tuple(plan is not None and multiply.operator_pays(plan) for plan in self.plans)
        self._has_symbols = self.direct and isinstance(self.decoder, Symbols)
        self._indices = frozenset(entry for entry in self.method.integers() if not entry.endswith("symbols"))
        self._coded: StateCache[dict[str, Tensor]] = StateCache()
        self._snapshot = Snapshot()
        self._forget()
        self._sparse: StateCache[tuple[np.ndarray, np.ndarray]] = StateCache()

    @classmethod
    def encode(
        cls,
        name: str,
        method: Method,
        parts: Sequence[Part],
        tensors: Sequence[Tensor],
        importance: Sequence[Tensor] | None = None,
    ) -> "ThinWeight":
        """Encode dense tensors.

        Args:
            name: Name of the method, as files and reports have it.
            method: The method, of the whole matrix's shape.
            parts: Shape and scale of each tensor.
            tensors: The dense tensors, of the parts' shapes; the first gives device and dtype.
            importance: One tensor >= 0 for each dense one, of its shape: the weight of each squared error.

        Returns:
            The weight with the nearest code that the method finds.
        """
        arrays, weigh = (
            None if values is None else [tensor.detach().float().cpu().numpy() for tensor in values]
            for values in (tensors, importance)
        )
        return cls._begun(name, method, parts, tensors[0], encoded(method, parts, arrays or [], weigh))

    @classmethod
    def draw(
        cls, name: str, method: Method, parts: Sequence[Part], like: Tensor, rng: np.random.Generator, std: float
    ) -> "ThinWeight":
        """Draw a start from scratch.

        Args:
            name: Name of the method, as files and reports have it.
            method: The method, of the whole matrix's shape.
            parts: Shape and scale of each tensor.
            like: A tensor that gives device and dtype.
            rng: NumPy's generator, which is advanced.
            std: Standard deviation of the decoded entries, before they are multiplied by the scale of their part.

        Returns:
            The weight.
        """
        return cls._begun(name, method, parts, like, drawn(method, rng, std))

    @classmethod
    def _begun(cls, name: str, method: Method, parts: Sequence[Part], like: Tensor, start: Start) -> "ThinWeight":
        code, latents = start
        return cls(name, method, parts, _tensors(code, like), None if latents is None else _tensors(latents, like))

    def with_floats_stored(self, name: str, method: Method, importance: Mapping[str, Tensor]) -> "ThinWeight":
        """The same weight, whose floats a second method stores.

        Args:
            name: Name of both methods, ``pruned then kmeans`` say.
            method: Both methods: a ``Then`` of this weight's and the second.
            importance: Entry -> importance of its floats, >= 0, of the entry's shape.

        Returns:
            A new weight; it is trainable if this one is.
        """
        like = next(self.parameters())
        code = _arrays(self.code())
        stored = _tensors(FloatCoding(method).encode(code, cast(Any, np), _arrays(importance)), like)
        latents = (
            _tensors(FloatCoding(method).started(code, cast(Any, np)), like) if method.trains == "through" else None
        )
        if latents is not None and FloatCoding(method).steps():
            stored = FloatCoding(method).encode(latents, _TORCH)
        return type(self)(name, method, self.parts, stored, latents).requires_grad_(like.requires_grad)

    def code(self) -> dict[str, Tensor]:
        """The stored entries. A loaded code does not change until a latent changes in value.

        Returns:
            Entry -> tensor, as a file stores it; where nothing is rounded, the parameters and buffers themselves.
        """
        state = self.state()
        if not self.rounds:
            return state
        code = self._coded.get(state.values())
        if code is None:
            copies = self._copies()
            code = self._coded.put(copies, self._code_of(copies))
        return code

    def set_code(self, code: Mapping[str, Tensor]) -> None:
        """Load another code of the same method, in place; Parameter objects and ``requires_grad`` stay.

        Args:
            code: Entry -> tensor, of the present shapes.
        """
        device = self._device() or next(iter(code.values())).device
        code = {entry: tensor.to(device) for entry, tensor in code.items()}
        with torch.no_grad():
            new = {**code, **self._latents_of({**self._wide(code), **self._derived()})} if self.rounds else code
            self._fill(new)
        if self.rounds:
            self._given = self._coded.put(self._copies(), code)
        self._forget()

    def reset_parameters(self) -> None:
        """Draw new values, as torch's layers do; the same numbers for the same tensor name and seed.

        For weights that were allocated without values: a model built on the meta device, then ``to_empty``. A matrix
        has the spread of ``compress(init="scratch")``; a bias is zero, the scale of a normalisation one.
        """
        name, seed, std = self.origin
        if len(self.parts) == 1 and len(self.parts[0].shape) < 2:
            value = np.float32(name.endswith("weight"))  # of a normalisation: ones; biases are zero
            code, latents = encoded(self.method, self.parts, [np.full(self.parts[0].shape, value)])
        else:
            std = math.sqrt(0.2 / max(self.method.shape[1], 1)) if std is None else std
            code, latents = drawn(self.method, generator(name, seed), std)
        shown = code if latents is None or not self.rounds else {**code, **latents}
        with torch.no_grad():
            self._fill({entry: torch.from_numpy(np.ascontiguousarray(array)) for entry, array in shown.items()})
        self._empty = None
        self._forget()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        floats = [value for value in self._parameters.values() if value is not None]
        if (
            self._coded_entries and not floats and is_listed()
        ):  # torch.onnx makes inputs of the graph of these tensors themselves
            code = self._snapshot.latest or {}
            destination.update({prefix + entry: code[entry] for entry in self._coded_entries})
            return
        if not self._coded_entries or any(map(is_sharded, floats)):
            return
        integers, shapes = self.method.integers(), self.method.code_shapes()
        code = self.code() if self.has_values() else None
        for entry in self._coded_entries:
            kind = smallest_type(integers[entry]) if entry in integers else floats[0].dtype
            value = torch.empty(shapes[entry], dtype=kind, device="meta") if code is None else code[entry].to(kind)
            destination[prefix + entry] = value

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {entry: state_dict[prefix + entry] for entry in self._all_entries() if prefix + entry in state_dict}
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)
        known = {prefix + entry for entry in self._all_entries()}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in known]
        code = {entry: given[entry].detach() for entry in self.method.code_shapes() if entry in given}
        if error_msgs or len(code) < len(self.method.code_shapes()) or any(t.is_meta for t in code.values()):
            return
        floats = self.decoder.code_shapes().keys() - self.decoder.integers().keys()
        latents = self._coding.latent_shapes().keys() - self.decoder.integers().keys()
        if self.rounds and floats <= given.keys():  # a code whose floats these are, not one that has changed since
            device = self._device()
            code = {entry: value.to(device) for entry, value in code.items()}
            decoded = self._decode_floats(code)
            if all(_near(decoded[entry], cast(Tensor, self._parameters[entry])) for entry in floats):
                self._given = self._coded.put(self._copies(), code)
        elif self.rounds and not any(value is None or value.is_meta for value in self._parameters.values()):
            missing_keys[:] = [key for key in missing_keys if key.removeprefix(prefix) not in latents]
            self.set_code(code)  # of a frozen weight

    def train(self, mode: bool = True) -> "ThinWeight":
        """Set the mode. What evaluation has computed is computed anew at the next call.

        Args:
            mode: Whether to train; otherwise, to evaluate.

        Returns:
            This weight.
        """
        super().train(mode)
        self._forget()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "ThinWeight":
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _forget(self) -> None:
        self.__dict__.pop("_evaluated", None)

    def _now(self) -> Evaluated:
        """What follows from the present state, computed if need be; where it may be cached and needs no gradient."""
        held, state = self._evaluated, self.state()
        if held is not None and is_current(held, state, self.training):
            return held
        step, by_value = last_step(), self.direct or self.training
        sources = tuple(source(e, t, by_value or not is_trusted(self, e)) for e, t in state.items())
        with torch.inference_mode(False), torch.no_grad():
            floats = self._floats_of([one.alias.clone() if one.copy is None else one.copy for one in sources])
        self.__dict__["_evaluated"] = held = Evaluated(sources, step, floats, {})
        return held

    def _all_entries(self) -> set[str]:
        """Entries that a state dict of this weight may have, were it frozen or not."""
        return {*self._entries, *self.method.code_shapes(), *self._coding.latent_shapes()}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_coded_entries", ()):
            return self.code()[name]
        return super().__getattr__(name)

    def floats(self) -> dict[str, Tensor]:
        """The code that ``decoder`` takes: floats, rounded where the method rounds, and integers.

        Gradients pass the rounding unchanged (straight-through estimator; Bengio, Leonard and Courville, 2013,
        arXiv:1308.3432).

        Returns:
            Entry -> tensor; cached while the state is unchanged, if no gradient is needed.
        """
        if not self.direct and not torch.compiler.is_compiling() and (held := current(self.__dict__)) is not None:
            return held.floats
        if self.training and self._exact:
            self._follow_first_rank()
        state = self.state()
        if self.direct:
            return state
        if self.rounds and not self.training and is_exported() and (code := self._snapshot_of(state)) is not None:
            return self._decode_floats(code)
        may_cache = self._may_cache()
        if may_cache and not self._wants_gradient():
            return self._now().floats
        if not self.rounds:
            return self._decode_floats(state)
        with torch.no_grad():
            latents = {entry: t.detach() for entry, t in state.items()}
            # Encoding again may give another code: the present one stays until a latent changes.
            code = self._coded.get(latents.values()) if may_cache else None
        if may_cache and (coded := self._unrounded(state)) and (code is None or self._has_learned_steps(code)):
            return _entries_of(self.decoder, state) | {e: quantized(*entry) for e, entry in coded.items()}
        with torch.no_grad():
            rounded = self._decode_floats(self._coding.encode(latents, _TORCH) if code is None else code)
            if not may_cache:
                rounded = self._unless_given(latents, rounded)
        # The difference is 0, so the sum is exactly the rounded value; its gradient is that of the latent.
        passed = {
            e: (state[e] - state[e].detach()) + rounded[e] if state[e].is_floating_point() else state[e]
            for e in self.decoder.code_shapes()
        }
        return passed | {entry: passed[entry] + self._of_step(entry, rounded[entry]) for entry in self._coding.steps()}

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        """Those that an exporter may write: no floats of a weight that rounds, whose graph holds the code instead."""
        own = self.__dict__["_parameters"]
        if not own or not is_listed() or self.training or not self.__dict__.get("rounds"):
            return own
        return own if self._snapshot_of(cast("dict[str, Tensor]", own)) is None else {}

    @_parameters.setter
    def _parameters(  # pyright: ignore[reportIncompatibleVariableOverride] -- as nn.Module.__init__ sets it
        self, value: dict[str, nn.Parameter | None]
    ) -> None:
        self.__dict__["_parameters"] = value

    def _snapshot_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The code as constants for an exported graph; None where floats take the place of the parameters."""
        if torch.compiler.is_dynamo_compiling():  # it was taken when the parameters were listed
            return self._snapshot.latest
        if not are_parameters(*(t for t in state.values() if t.is_floating_point())):
            return None
        return unrecorded(lambda: self._snapshot.take(self.code()))

    def _of_step(self, entry: str, rounded: Tensor) -> Tensor:
        """Zero, with the gradient that a learned step has (Esser et al., 2020, arXiv:1902.08153, equation 3)."""
        latent, method = self._coding.steps()[entry]
        step = method.step(getattr(self, latent), _TORCH).reshape(())
        with torch.no_grad():
            slope = (rounded - getattr(self, entry)) / step
        return slope * (step - step.detach())

    def unrounded(self) -> dict[str, tuple[Tensor, Tensor, Stepped]]:
        """The floats whose step is learned, before rounding: what a rate-aware training codes.

        Returns:
            Entry -> latents, the logarithm of the step, and the method that rounds; empty for other methods and where
            nothing is rounded.
        """
        return self._unrounded(self.state()) if self.rounds and self._coding.steps() else {}

    def _unrounded(self, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Stepped]]:
        return {
            entry: (state[entry], state[latent], method) for entry, (latent, method) in self._coding.steps().items()
        }

    def _has_learned_steps(self, code: Mapping[str, Tensor]) -> bool:
        """Whether a code has just the steps that its latents give: then encoding these gives it again."""
        return all(
            torch.equal(code[latent.removesuffix(LOG_STEP) + "step"], method.step(getattr(self, latent), _TORCH))
            for latent, method in self._coding.steps().values()
        )

    def log_steps(self) -> list[Tensor]:
        """The logarithms of learned steps.

        Returns:
            Parameters of one entry each; none where nothing is rounded.
        """
        return [getattr(self, latent) for latent, _ in self._coding.steps().values()] if self.rounds else []

    def _latents_of(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The latents of a code with its tables: decoded floats, and the logarithms of learned steps."""
        return {**self._coding.decode(dict(code), _TORCH), **self._coding.log_steps(dict(code), _TORCH)}

    def _unless_given(self, latents: Mapping[str, Tensor], rounded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rounded floats, or those of the loaded code while the latents are as they were loaded.

        For graphs, which cannot look into the cache: encoding again may give another code than the loaded one.
        """
        copies, code = self._coded.held or ((), None)
        if code is None or code is not self._given:
            return rounded
        pairs = [(latents[entry], old) for entry, old in zip(self._entries, copies, strict=True)]
        pairs = [(now, old) for now, old in pairs if old.is_floating_point()]
        if any(now.dtype != old.dtype or now.device != old.device for now, old in pairs):
            return rounded
        same = torch.stack([(now == old).all() for now, old in pairs]).all()
        given = self._decode_floats(code)
        return {e: torch.where(same, given[e], t) if t.is_floating_point() else t for e, t in rounded.items()}

    def _copies(self) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return [entry.detach().clone() for entry in self.state().values()]

    def _code_of(self, copies: list[Tensor]) -> dict[str, Tensor]:
        """The stored entries for a state, without gradients."""
        state = dict(zip(self._entries, copies, strict=True))
        if not self.rounds:
            return state
        code = self._coded.get(copies)
        if code is not None:
            return code
        with torch.inference_mode(False), torch.no_grad():
            return self._coding.encode(state, _TORCH)

    def _floats_of(self, copies: list[Tensor]) -> dict[str, Tensor]:
        """The decoder's code for a state, without gradients."""
        code = self._code_of(copies)
        if self.direct:
            return code
        with torch.inference_mode(False), torch.no_grad():
            return self._decode_floats(code)

    def _decode_floats(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The decoder's code, from the stored entries."""
        return self._coding.decode({**self._wide(code), **self._derived()}, _TORCH)

    def _wide(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Integers that are no symbols in 64 bits, in which they index; symbols are widened by the methods."""
        return {
            entry: value.long() if entry in self._indices and not value.is_floating_point() else value
            for entry, value in code.items()
        }

    def forward(self, index: int = 0) -> Float[Tensor, "..."]:
        """Decode a tensor.

        Args:
            index: Which of the weight's tensors.

        Returns:
            The dense tensor, of its part's shape. On the CPU in evaluation, where the code needs no gradient, it is
            cached while the code is unchanged, and must not be written to.
        """
        if (leaf := as_leaf(self, index)) is not None:
            return cast(Any, leaf)
        held = None if torch.compiler.is_compiling() else current(self.__dict__)
        if held is None:
            if not self._keeps():
                return self._decode(index, self.floats())
            held = self._now()
        dense, version = held.dense.get(index, (None, 0))
        if dense is not None and dense._version != version:  # a caller wrote to it, and so perhaps to the floats
            self._forget()
            held, dense = self._now(), None
        if dense is None:
            with torch.inference_mode(False), torch.no_grad():  # a gradient of the input may need it later
                dense = self._decode(index, held.floats)  # of copies: another thread may write to the code
                held.dense[index] = (dense, dense._version)
        return dense

    def product(
        self, x: Float[Tensor, "*batch cols"], index: int = 0, bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T + bias`` by the way with the least predicted cost (``deepthin.torch.multiply``).

        Args:
            x: Inputs, any number of leading dimensions.
            index: Which of the weight's tensors is W.
            bias: One number per output, or None.

        Returns:
            The outputs, with the leading dimensions of x. Under autocast structured ways compute in float32.
        """
        y = self._short_way(x, index, bias)
        if y is not None:
            return y
        if not isinstance(x, Tensor):  # a tracer's proxy, or a caller's mistake, which raises
            return multiply.DENSE.run(self, x, index, bias)
        case = self._case(x, index, bias)
        way = multiply.choose(case)
        if way.name in _WAYS and not torch.compiler.is_compiling() and self._keeps():
            if (fast := self.short_way(index)) is not None:
                fast.choose(case.batch, _WAYS[way.name])
                self.floats()  # so that they are current
            y = self._short_way(x, index, bias)
            if y is not None:
                return y
        return way.run(self, x, index, bias)

    def rows_pay(self, places: Tensor, index: int = 0) -> bool:
        """Whether ``rows`` is predicted to be faster than decoding the whole matrix.

        Args:
            places: Row indices, of any shape.
            index: Which of the weight's tensors.

        Returns:
            True for few rows of a matrix in a product of two factors; in graphs always, where their number may be
            symbolic.
        """
        part = self.parts[index]
        if self._windows[index] is None or part.transposed:
            return False
        if places.dtype not in (torch.int32, torch.int64) or places.is_meta:
            return False
        return is_recorded() or places.numel() * _GATHER <= part.shape[0]

    def rows(self, places: Int[Tensor, "*batch"], index: int = 0) -> Float[Tensor, "*batch cols"]:
        """Decode single rows of a matrix in a product of two factors.

        Args:
            places: Row indices, int32 or int64, of any shape.
            index: Which of the weight's tensors.

        Returns:
            One row for each index, in the last dimension; padding rows are 0.

        Raises:
            IndexError: An index is out of range; not checked in graphs.
        """
        part, floats, n = self.parts[index], self.floats(), cast(Window, self._windows[index]).plan.n
        count, cols = part.shape
        if not is_recorded() and places.numel() and not 0 <= int(places.min()) <= int(places.max()) < count:
            raise IndexError(f"Rows go from {int(places.min())} to {int(places.max())}: the table has {count}.")
        start = self._cuts[index][0] + places.long() * cols
        blocks = (cols + n - 2) // n + 1  # rows of xf that a row of the matrix may touch; it may end before the last
        touched = (start // n)[..., None] + torch.arange(blocks, device=places.device)
        entries = (F.embedding(touched.clamp(max=len(floats["xf"]) - 1), floats["xf"]) @ floats["wf"]).flatten(-2)
        within = (start % n)[..., None] + torch.arange(cols, device=places.device)
        made = entries.gather(-1, within) * part.scale
        return made if part.zero_row is None else made * (places != part.zero_row)[..., None]

    def _short_way(self, x: Tensor, index: int, bias: Tensor | None) -> Tensor | None:
        """The native product in a single call; None where it does not apply or was not used for this batch before."""
        if self._fast is None or self.training or torch.compiler.is_compiling():
            return None
        fast, entries = self._fast[index], self.__dict__["_parameters"] or self.state()
        if fast is None:
            return None
        if not self.direct:
            held = current(self.__dict__)
            if held is None:
                return None
            entries = held.floats
        return fast(x, entries.get("xf"), entries.get("wf"), bias)

    def short_way(self, index: int) -> Any:
        """The native product of a tensor; its ``choose`` says for which batches it may be used.

        Args:
            index: Which of the weight's tensors.

        Returns:
            A callable as ``operators.product`` returns it; None without native code or a structured product.
        """
        if self._fast is None:
            self._fast = tuple(
                plan and product(plan[0], plan[1], plan[3], part.scale)
                for plan, part in zip(self.plans, self.parts, strict=True)
            )
        return self._fast[index]

    def path(self, x: Tensor, index: int = 0) -> Path:
        """The way by which ``product`` would multiply ``x`` now.

        Args:
            x: Inputs.
            index: Which of the weight's tensors.

        Returns:
            Its name. It is ``dense`` in exported or transformed graphs, where the weight is decoded in plain
            operations, and for inputs whose shape or dtype does not fit, which raise as in a linear layer.
        """
        return multiply.choose(self._case(x, index, None)).name

    def _case(self, x: Tensor, index: int, bias: Tensor | None) -> Case:
        """What the choice of a way depends on, for these operands."""
        window, part = self.plans[index], self.parts[index]
        dense = Case(self.decoder, None, 0, False)  # the decoded weight
        if x.is_meta or x.is_nested or x.shape[-1:] != (self._matrix(index)[1:] if len(part.shape) == 2 else ()):
            return dense
        floats = self.__dict__["_parameters"] if not torch.compiler.is_compiling() else None  # have the factors' dtype
        latents = tuple((floats or self.state()).values())
        like, autocast = latents[0], torch.is_autocast_enabled(x.device.type)
        if not x.is_floating_point() or (x.dtype != like.dtype and not autocast):
            return dense
        recorded = is_recorded()  # the batch may be a symbol there: one choice for all
        if window is not None:
            elsewhere = recorded and is_portable()  # where the floats before rounding must not even be looked at
            native = not elsewhere and takes(*latents) and (autocast or takes(x))
            if recorded:
                pays = native and self._operator_pays[index]
                return Case(self.decoder, window, 0, False, native=True, traced=True) if pays else dense
            return Case(self.decoder, window, x.numel() // window.plan.shape[1], self._keeps(), native=native)
        if recorded or autocast or len(self.parts) > 1 or part.transposed or part.zero_row is not None:
            return dense
        gradients = torch.is_grad_enabled()
        return Case(
            self.decoder,
            None,
            x.numel() // part.shape[1],
            self._keeps(),
            native=takes(x, like),
            whole=True,
            detached=not (gradients and x.requires_grad)
            and (bias is None or (takes(bias) and not (gradients and bias.requires_grad))),
            direct=self.direct,
            levels=products.levels() if self._has_symbols else (0, 0),
        )

    def sparse_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of a sparse matrix as compressed sparse rows; cached.

        Returns:
            The column of each stored weight, int32, and the index of each row's first one, rows + 1 numbers.
        """
        (rows, cols), positions = self.decoder.shape, self.floats()["positions"]
        csr = self._sparse.get([positions])
        if csr is None:
            with torch.inference_mode(False), torch.no_grad():
                positions = positions.clone() if self.direct else positions  # nobody writes to decoded ones
                wide = positions.long()
                starts = torch.searchsorted(wide, torch.arange(rows + 1) * cols)
                columns = (wide % cols).numpy().astype(np.int32)
                csr = self._sparse.put([positions], (columns, starts.numpy()))
        return csr

    def _window(self, index: int) -> Window | None:
        """Where a tensor lies in a product of two factors; None where the weight must be decoded."""
        part = self.parts[index]
        if not isinstance(self.decoder, Factored) or len(part.shape) != 2:
            return None
        return self.decoder.window(self._cuts[index][0], self._matrix(index))

    def _matrix(self, index: int) -> tuple[int, int]:
        """(outputs, inputs) of a two-dimensional tensor."""
        rows, cols = self.parts[index].shape
        return (cols, rows) if self.parts[index].transposed else (rows, cols)

    def _decode(self, index: int, floats: Mapping[str, Tensor]) -> Tensor:
        if is_exported() and len(self.parts[index].shape) > 1 and not torch.compiler.is_dynamo_compiling():
            warn_of_dense()
        (start, stop), decoder = self._cuts[index], self.decoder
        code, device = {**self._derived(), **self._wide(floats)}, next(iter(floats.values())).device.type
        # As a dense parameter: its type is the code's, which normalisation and the cache need, and layers cast it.
        cast_off = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if cast_off else nullcontext():
            if isinstance(decoder, Flat):
                flat = decoder.decode_flat(code, start, stop, _TORCH)
            else:
                flat = decoder.decode(code, _TORCH).reshape(-1)[start:stop]
            return self.parts[index].cut(flat, _TORCH)

    def is_trained(self) -> bool:
        """Whether any float of the state requires a gradient.

        Returns:
            False for a frozen weight.
        """
        return any(getattr(self, entry).requires_grad for entry in self._entries)

    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and self.is_trained()

    def _keeps(self) -> bool:
        """Whether the dense weight is cached: on the CPU, in evaluation, where the code needs no gradient."""
        if self.training or self._wants_gradient() or not self._may_cache():
            return False
        return all(getattr(self, entry).device.type == "cpu" for entry in self._entries)

    def _may_cache(self) -> bool:
        """Whether values may be looked up and stored: nobody records, and the state is of plain tensors."""
        return not is_recorded() and is_plain(*(getattr(self, entry) for entry in self._entries))

    def extra_repr(self) -> str:
        """The plan, for ``print(model)``.

        Returns:
            Name, shapes and method.
        """
        return f"{self.name}, {' + '.join('x'.join(map(str, part.shape)) for part in self.parts)}, {self.method}"

    def __getstate__(self) -> dict[str, Any]:
        """Without caches and what ``_prepare`` computes; but with a loaded code, which may not be reproducible."""
        derived = (
            "_evaluated",
            "_fast",
            "_sparse",
            "_windows",
            "_coding",
            "_held_tables",
            "_snapshot",
            "decoder",
            "plans",
            "direct",
            "_cuts",
        )
        return {key: value for key, value in self.__dict__.items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of version 0.1 have the loaded code as a tuple, and integers and tables as buffers."""
        super().__setstate__(state)
        coded = self.__dict__.get("_coded")
        self._prepare()
        if isinstance(coded, StateCache):
            self._coded = coded
        elif coded is not None:
            self._given = self._coded.put(*coded)
        if "_exact" not in self.__dict__:
            self.__dict__.pop("_tables", None)
            held = {entry: self._buffers.pop(entry) for entry in list(self._buffers)}
            floats = {entry: self._parameters.pop(entry) for entry in list(self._parameters)}
            entries = self.decoder.code_shapes() if self.rounds else self.method.code_shapes()
            values = {entry: floats[entry] if entry in floats else held[entry] for entry in entries}
            trainable = {entry for entry, value in floats.items() if value is not None and value.requires_grad}
            self._register({e: cast(Tensor, value).detach() for e, value in values.items()}, self.method.integers())
            for entry, parameter in self._parameters.items():
                cast(Tensor, parameter).requires_grad_(entry in trainable)
            self._coded_entries = tuple(e for e in self.method.code_shapes() if self.rounds and e not in values)
        self._prepare_tables()


def _entries_of(decoder: Method, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state that a decoder takes."""
    return {entry: state[entry] for entry in decoder.code_shapes()}


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether floats are equal up to the rounding of two devices or processors."""
    scale = other.detach().abs().max() if other.numel() else 0.0
    return one.shape == other.shape and bool(((one - other.detach()).abs() <= _ROUNDING * scale).all())


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """NumPy arrays of tensors, half precision widened to float32."""
    on_host = {entry: tensor.detach().cpu() for entry, tensor in tensors.items()}
    return {e: (t.float() if t.is_floating_point() else t).numpy() for e, t in on_host.items()}


def _tensors(arrays: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Tensors of arrays, on the device of ``like``, floats in its dtype."""
    made = {entry: torch.from_numpy(np.ascontiguousarray(array)) for entry, array in arrays.items()}
    return {e: t.to(like.device, like.dtype) if t.is_floating_point() else t.to(like.device) for e, t in made.items()}


def _placed(tables: Code, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables of a method, on the device of its code."""
    device = next(iter(code.values())).device
    return {entry: torch.from_numpy(table).to(device) for entry, table in tables.items()}


class ThinPart(nn.Module):
    """One tensor of a group, used like a ThinWeight of a single tensor.

    Args:
        weight: The weight of the group.
        index: Which of its tensors.
    """

    def __init__(self, weight: ThinWeight, index: int) -> None:
        super().__init__()
        self.group, self.index = weight, index

    def children(self) -> Iterator[nn.Module]:
        """The group; but none if FSDP manages it: ``fully_shard`` of a second layer would shard the shards.

        Yields:
            The group's ThinWeight.
        """
        if not getattr(self.group, "_is_fsdp_managed_module", False):
            yield self.group

    def _apply(self, fn: Any, recurse: bool = True) -> "ThinPart":  # these three reach the group in any case
        if recurse:
            self.group._apply(fn)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> "ThinPart":
        """Call a function with the group's modules, then with this one.

        Args:
            fn: The function.

        Returns:
            This module.
        """
        self.group.apply(fn)
        fn(self)
        return self

    def train(self, mode: bool = True) -> "ThinPart":
        """Set the mode of this module and of the group.

        Args:
            mode: Whether to train; otherwise, to evaluate.

        Returns:
            This module.
        """
        self.training = mode
        self.group.train(mode)
        return self

    def forward(self) -> Float[Tensor, "..."]:
        """Decode the tensor.

        Returns:
            The dense tensor.
        """
        return self.group(self.index)

    def product(
        self, x: Float[Tensor, "*batch cols"], *, bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T + bias``, as ``ThinWeight.product``.

        Args:
            x: Inputs, any number of leading dimensions.
            bias: One number per output, or None.

        Returns:
            The outputs, with the leading dimensions of x.
        """
        return self.group.product(x, self.index, bias)

    def extra_repr(self) -> str:
        """The index, for ``print(model)``.

        Returns:
            Which of the group's tensors it is.
        """
        return f"tensor {self.index} of the group"
