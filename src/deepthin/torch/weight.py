"""A weight that is generated: the optimiser sees the latent floats, the layer sees the matrix or its product."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepthin.kernels import products
from deepthin.kernels.costs import Path
from deepthin.method import Flat, Method, Symbols
from deepthin.methods.factor import Factored, Window
from deepthin.methods.float_coding import FloatCoding, inner_of
from deepthin.plan.start import Start, drawn, encoded
from deepthin.storage.contents import Part
from deepthin.torch import multiply
from deepthin.torch.cache import StateCache
from deepthin.torch.multiply import Case
from deepthin.torch.operators import product, takes
from deepthin.torch.tracing import is_traced, is_transformed

_GATHER = 4  # the time of a row on its own over one among all of them, at most (a training step)
_WAYS: dict[Path, int] = {"native-direct": 1, "native-fft": 2}
_TORCH = cast(Any, torch)


class ThinWeight(nn.Module):
    """One matrix in compressed form, and the tensors that it holds: one, or those of a group.

    Parameters are the latent floats: those of the code, or, where the method trains ``through`` its rounding and the
    weight is not ``frozen``, what it encodes. Integers of the code that do not follow from these are buffers; tables
    that follow from the method's fields are buffers that are not saved. ``forward(i)`` is the i-th dense tensor,
    ``product(x, i)`` is ``x @ W.T`` by the cheapest way.
    """

    _fast: "tuple[Any, ...] | None" = None  # a native product for each tensor, once there was a use for it

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
        device, tables = next(iter(code.values())).device, method.derived()
        self._tables = tuple(tables)
        for entry, table in tables.items():
            self.register_buffer(entry, torch.from_numpy(table).to(device), persistent=False)
        state = dict(code)
        if self.rounds:
            state = {entry: code[entry] for entry in self.decoder.integers()}
            state |= latents or self._decode_floats(code)
        if self._has_symbols:
            state["symbols"] = state["symbols"].to(_symbol_type(method))
        self._entries = tuple(state)
        for entry, value in state.items():
            if value.is_floating_point():
                self.register_parameter(entry, nn.Parameter(value))
            else:
                self.register_buffer(entry, value)
        if self.rounds and latents is None:
            self._coded.put(self._copies(), dict(code))

    def _prepare(self) -> None:
        """All that follows from the method and the parts."""
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
        self._coded: StateCache[dict[str, Tensor]] = StateCache()
        self._floats: StateCache[dict[str, Tensor]] = StateCache()
        # Copies of the state, and by index each tensor with its version
        self._dense: StateCache[tuple[list[Tensor], dict[int, tuple[Tensor, int]]]] = StateCache()
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
        """The code nearest to dense tensors, on their device and in their type; ``importance`` has their shapes."""
        arrays, weigh = (
            None if values is None else [tensor.detach().float().cpu().numpy() for tensor in values]
            for values in (tensors, importance)
        )
        return cls._begun(name, method, parts, tensors[0], encoded(method, parts, arrays or [], weigh))

    @classmethod
    def draw(
        cls, name: str, method: Method, parts: Sequence[Part], like: Tensor, rng: np.random.Generator, std: float
    ) -> "ThinWeight":
        """A from-scratch start; the entries of a part then have standard deviation ``std`` times its scale."""
        return cls._begun(name, method, parts, like, drawn(method, rng, std))

    @classmethod
    def _begun(cls, name: str, method: Method, parts: Sequence[Part], like: Tensor, start: Start) -> "ThinWeight":
        code, latents = start
        return cls(name, method, parts, _tensors(code, like), None if latents is None else _tensors(latents, like))

    def with_floats_stored(self, name: str, method: Method, importance: Mapping[str, Tensor]) -> "ThinWeight":
        """The same matrix, whose floats a second method stores: ``method`` is both, this weight's and that one.

        ``importance``, by entry, weighs the errors of the floats.
        """
        like = next(self.parameters())
        code = _arrays(self.code())
        stored = _tensors(FloatCoding(method).encode(code, cast(Any, np), _arrays(importance)), like)
        latents = _tensors(code, like) if method.trains == "through" else None
        return type(self)(name, method, self.parts, stored, latents).requires_grad_(like.requires_grad)

    def code(self) -> dict[str, Tensor]:
        """The stored entries. A code that was loaded stays as it is until a latent changes in value."""
        state = self.state()
        if not self.rounds:
            return state
        code = self._coded.get(state.values())
        if code is None:
            copies = self._copies()
            code = self._coded.put(copies, self._code_of(copies))
        return code

    def set_code(self, code: Mapping[str, Tensor]) -> None:
        """Take over another code of the same method, in place: optimisers, and what is frozen, stay as they are."""
        state = self.state()
        like = next(iter(state.values()))
        code = {entry: tensor.to(like.device) for entry, tensor in code.items()}
        with torch.no_grad():
            new = {**code, **self._decode_floats(code)} if self.rounds else code
            for entry, now in state.items():
                now.copy_(new[entry])
        if self.rounds:
            self._coded.put(self._copies(), code)

    def floats(self) -> dict[str, Tensor]:
        """What ``decoder`` takes: its floats, rounded where the method rounds, and its integers.

        The gradient goes through rounding as if it were not there: the straight-through estimator of Bengio et al.,
        2013, arXiv:1308.3432.
        """
        state = self.state()
        if self.direct:
            return state
        may_cache = not torch.compiler.is_compiling() and not is_transformed()
        if may_cache and not self._wants_gradient():
            floats = self._floats.get(state.values())
            if floats is None:
                copies = self._copies()
                floats = self._floats.put(copies, self._floats_of(copies))
            return floats
        if not self.rounds:
            return self._decode_floats(state)
        with torch.no_grad():
            latents = {entry: t.detach() for entry, t in state.items()}
            # What is encoded again need not be the same: a code stays as it is until a latent changes.
            code = self._coded.get(latents.values()) if may_cache else None
            rounded = self._decode_floats(self._coding.encode(latents, _TORCH) if code is None else code)
        # The difference is 0, and the sum just what is rounded.
        return {e: (t - t.detach()) + rounded[e] if t.is_floating_point() else t for e, t in state.items()}

    def state(self) -> dict[str, Tensor]:
        """Latents and stored integers: what all else follows from."""
        return {entry: getattr(self, entry) for entry in self._entries}

    def _copies(self) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return [entry.detach().clone() for entry in self.state().values()]

    def _code_of(self, copies: list[Tensor]) -> dict[str, Tensor]:
        """The stored entries of a state, without gradients."""
        state = dict(zip(self._entries, copies, strict=True))
        if not self.rounds:
            return state
        code = self._coded.get(copies)
        if code is not None:
            return code
        with torch.inference_mode(False), torch.no_grad():
            return self._coding.encode(state, _TORCH)

    def _floats_of(self, copies: list[Tensor]) -> dict[str, Tensor]:
        """What the decoder takes of a state, without gradients."""
        code = self._code_of(copies)
        if self.direct:
            return code
        with torch.inference_mode(False), torch.no_grad():
            return self._decode_floats(code)

    def _decode_floats(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the decoder takes, of what is stored."""
        return self._coding.decode({**code, **self._derived()}, _TORCH)

    def _derived(self) -> dict[str, Tensor]:
        return {entry: getattr(self, entry) for entry in self._tables}

    def forward(self, index: int = 0) -> Float[Tensor, "..."]:
        """A dense tensor.

        In evaluation, where no gradient is wanted, it is cached while the code compares equal.
        """
        if not self._keeps() or torch.compiler.is_compiling() or is_transformed():
            return self._decode(index, self.floats())
        cached = self._dense.get(self.state().values())
        if cached is None:
            copies = self._copies()
            cached = self._dense.put(copies, (copies, {}))
        copies, tensors = cached
        dense, version = tensors.get(index, (None, 0))
        if dense is None or dense._version != version:  # someone wrote to what is only to be read
            with torch.inference_mode(False), torch.no_grad():  # it may serve a gradient of the input later
                dense = self._decode(index, self._floats_of(copies))  # another thread may write to the code now
                tensors[index] = (dense, dense._version)
        return dense

    def decoded(self, index: int) -> Float[Tensor, "..."]:
        """A dense tensor in plain operations, nothing of which is cached: for what records them."""
        state = self.state()
        return self._decode(index, state if self.direct or self.rounds else self._decode_floats(state))

    def product(
        self, x: Float[Tensor, "*batch cols"], index: int = 0, bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T + bias``, by the way whose predicted cost is least (``deepthin.torch.multiply``).

        Autocast: structured ways compute in float32.
        """
        y = self._short_way(x, index, bias)
        if y is not None:
            return y
        if not isinstance(x, Tensor):  # a proxy that records, for which there is no choice, or the caller's error
            return multiply.DENSE.run(self, x, index, bias)
        case = self._case(x, index, bias)
        way = multiply.choose(case)
        if way.name in _WAYS and not torch.compiler.is_compiling() and self._keeps():
            if (fast := self.short_way(index)) is not None:
                fast.choose(case.batch, _WAYS[way.name])
            y = self._short_way(x, index, bias)
            if y is not None:
                return y
        return way.run(self, x, index, bias)

    def rows_pay(self, places: Tensor, index: int = 0) -> bool:
        """Whether it is cheaper to make single rows of a matrix than all of it: while they are few, on any device.

        Graphs are recorded with single rows, since how many there will be may be unknown.
        """
        part = self.parts[index]
        if self._windows[index] is None or part.transposed:
            return False
        if places.dtype not in (torch.int32, torch.int64) or places.is_meta:
            return False
        return is_traced(places) or places.numel() * _GATHER <= part.shape[0]

    def rows(self, places: Int[Tensor, "*batch"], index: int = 0) -> Float[Tensor, "*batch cols"]:
        """Rows of a matrix, without the others: of the product of the factors, the rows that they lie in.

        IndexError where there is no such row.
        """
        part, floats, n = self.parts[index], self.floats(), cast(Window, self._windows[index]).plan.n
        count, cols = part.shape
        if not is_traced(places) and places.numel() and not 0 <= int(places.min()) <= int(places.max()) < count:
            raise IndexError(f"Rows go from {int(places.min())} to {int(places.max())}: the table has {count}.")
        start = self._cuts[index][0] + places.long() * cols
        blocks = (cols + n - 2) // n + 1  # rows of xf that a row of the matrix may touch; it may end before the last
        own = (start // n)[..., None] + torch.arange(blocks, device=places.device)
        entries = (F.embedding(own.clamp(max=len(floats["xf"]) - 1), floats["xf"]) @ floats["wf"]).flatten(-2)
        within = (start % n)[..., None] + torch.arange(cols, device=places.device)
        made = entries.gather(-1, within) * part.scale
        return made if part.zero_row is None else made * (places != part.zero_row)[..., None]

    def _short_way(self, x: Tensor, index: int, bias: Tensor | None) -> Tensor | None:
        """The native product in a single call, where nothing but its result is wanted and it was used before."""
        if self._fast is None or self.training or torch.compiler.is_compiling():
            return None
        fast, entries = self._fast[index], self._parameters
        if fast is None:
            return None
        if not self.direct:
            if not self._keeps() or is_transformed():
                return None
            entries = self.floats()
        return fast(x, entries.get("xf"), entries.get("wf"), bias)

    def short_way(self, index: int) -> Any:
        """The native product of a tensor, which ``choose`` tells what it may be used for; or none."""
        if self._fast is None:
            self._fast = tuple(
                plan and product(plan[0], plan[1], plan[3], part.scale)
                for plan, part in zip(self.plans, self.parts, strict=True)
            )
        return self._fast[index]

    def path(self, x: Tensor, index: int = 0) -> Path:
        """The way in which ``product`` would multiply ``x`` now.

        The dense one while a graph is exported or a function transformed: the weight is then decoded in plain
        operations. Also for inputs that do not go with the code, to fail, or not, as a linear layer does.
        """
        return multiply.choose(self._case(x, index, None)).name

    def _case(self, x: Tensor, index: int, bias: Tensor | None) -> Case:
        """What the choice of a way goes by."""
        window, part = self.plans[index], self.parts[index]
        dense = Case(self.decoder, None, 0, False)  # for which only the decoded weight serves
        if x.is_meta or x.is_nested or x.shape[-1:] != (self._matrix(index)[1:] if len(part.shape) == 2 else ()):
            return dense
        latents = tuple(cast("dict[str, Tensor]", self._parameters).values())  # of the type of the factors
        like, autocast = latents[0], torch.is_autocast_enabled(x.device.type)
        if not x.is_floating_point() or (x.dtype != like.dtype and not autocast):
            return dense
        traced = is_traced(x)  # the batch may be a symbol there: one choice for all
        if window is not None:
            native = takes(*latents) and (autocast or takes(x))
            if traced:
                compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
                pays = compiled and native and self._operator_pays[index]
                return Case(self.decoder, window, 0, False, native=True, traced=True) if pays else dense
            return Case(self.decoder, window, x.numel() // window.plan.shape[1], self._keeps(), native=native)
        if traced or autocast or len(self.parts) > 1 or part.transposed or part.zero_row is not None:
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
        """Columns of the stored weights of a sparse matrix, and where each row of them begins; cached."""
        (rows, cols), positions = self.decoder.shape, self.floats()["positions"]
        found = self._sparse.get([positions])
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                positions = positions.clone()
                starts = torch.searchsorted(positions, torch.arange(rows + 1) * cols)
                columns = (positions % cols).numpy().astype(np.int32)
                found = self._sparse.put([positions], (columns, starts.numpy()))
        return found

    def _window(self, index: int) -> Window | None:
        """Where a tensor lies in a product of two factors; none where the weight must be decoded."""
        part = self.parts[index]
        if not isinstance(self.decoder, Factored) or len(part.shape) != 2:
            return None
        return self.decoder.window(self._cuts[index][0], self._matrix(index))

    def _matrix(self, index: int) -> tuple[int, int]:
        """(outputs, inputs) of a tensor of two dimensions."""
        rows, cols = self.parts[index].shape
        return (cols, rows) if self.parts[index].transposed else (rows, cols)

    def _decode(self, index: int, floats: Mapping[str, Tensor]) -> Tensor:
        (start, stop), decoder = self._cuts[index], self.decoder
        code = {**self._derived(), **floats}
        if isinstance(decoder, Flat):
            flat = decoder.decode_flat(code, start, stop, _TORCH)
        else:
            flat = decoder.decode(code, _TORCH).reshape(-1)[start:stop]
        return self.parts[index].cut(flat, _TORCH)

    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(entry.requires_grad for entry in self.state().values())

    def _keeps(self) -> bool:
        """Whether the dense weight is worth keeping: on the CPU, in evaluation, with no gradient to its code."""
        on_cpu = all(entry.device.type == "cpu" for entry in self.state().values())
        return not self.training and not self._wants_gradient() and on_cpu

    def extra_repr(self) -> str:
        """The plan, for ``print(model)``."""
        return f"{self.name}, {' + '.join('x'.join(map(str, part.shape)) for part in self.parts)}, {self.method}"

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed anew, but for a loaded code, which is stored as long as no latent changes."""
        derived = (
            "_dense",
            "_floats",
            "_fast",
            "_sparse",
            "_windows",
            "_coding",
            "decoder",
            "plans",
            "direct",
            "_cuts",
        )
        return {key: value for key, value in self.__dict__.items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of version 0.1, which held the loaded code as a tuple."""
        super().__setstate__(state)
        coded = self.__dict__.get("_coded")
        self._prepare()
        if isinstance(coded, StateCache):
            self._coded = coded
        elif coded is not None:
            self._coded.put(*coded)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """On the host, half precision widened."""
    found = {entry: tensor.detach().cpu() for entry, tensor in tensors.items()}
    return {e: (t.float() if t.is_floating_point() else t).numpy() for e, t in found.items()}


def _tensors(arrays: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """On the device of ``like``, floats in its type."""
    made = {entry: torch.from_numpy(np.ascontiguousarray(array)) for entry, array in arrays.items()}
    return {e: t.to(like.device, like.dtype) if t.is_floating_point() else t.to(like.device) for e, t in made.items()}


def _symbol_type(method: Method) -> torch.dtype:
    """The smallest type that holds all symbols; a byte is what native code reads."""
    symbols = method.integers()["symbols"]
    if symbols.count > 256:
        return torch.int16 if symbols.least + symbols.count <= 1 << 15 else torch.int32
    return torch.int8 if symbols.least < 0 else torch.uint8


class ThinPart(nn.Module):
    """One tensor of a group: stands where a ThinWeight of its own would."""

    def __init__(self, weight: ThinWeight, index: int) -> None:
        super().__init__()
        self.group, self.index = weight, index

    def forward(self) -> Float[Tensor, "..."]:
        """The dense tensor."""
        return self.group(self.index)

    def product(
        self, x: Float[Tensor, "*batch cols"], *, bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T + bias``."""
        return self.group.product(x, self.index, bias)

    def extra_repr(self) -> str:
        """Which of the group's tensors."""
        return f"tensor {self.index} of the group"
