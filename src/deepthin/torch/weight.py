"""A weight that is generated: the optimiser sees the latent floats, the layer sees the matrix or its product."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepthin.kernels.costs import NATIVE, Path, choose, in_turn_pays, symbols_pay
from deepthin.kernels.products import csr_linear
from deepthin.method import Method
from deepthin.methods.ecsq import Ecsq
from deepthin.methods.factor import Factor
from deepthin.methods.kmeans import KMeans
from deepthin.methods.kronecker import Kronecker
from deepthin.methods.pruned import Pruned
from deepthin.methods.scalar import Uniform
from deepthin.methods.tensor_train import TensorTrain
from deepthin.methods.then import Then
from deepthin.plan.start import Start, drawn, encoded
from deepthin.storage.contents import Part
from deepthin.torch.operators import eager_linear, linear, product, same_values, symbol_linear, takes
from deepthin.torch.product import factor_linear, multiply_in_turn
from deepthin.torch.tracing import is_traced, is_transformed

_TYPICAL_BATCH = 32
_GATHER = 4  # the time of a row on its own over one among all of them, at most (a training step)
_SPARSE = 0.05  # a product by sparse rows is faster than a dense one up to this density, at any batch (deepthin bench)
_WAYS: dict[Path, int] = {"native-direct": 1, "native-fft": 2}
_TORCH = cast(Any, torch)


class ThinWeight(nn.Module):
    """One matrix in compressed form, and the tensors that it holds: one, or those of a group.

    Parameters are the latent floats: those of the code, or, where the method trains ``through`` its rounding and the
    weight is not ``frozen``, what it encodes. Integers of the code that do not follow from these are buffers; tables
    that follow from the method's fields are buffers that are not saved. ``forward(i)`` is the i-th dense tensor,
    ``product(x, i)`` is ``x @ W.T`` by the cheapest way.
    """

    _rows: "tuple[Tensor, np.ndarray, np.ndarray] | None" = None  # of a pruned matrix: positions, columns, row starts
    _fast: "tuple[Any, ...] | None" = None  # a native product for each tensor, once there was a use for it
    # All kept by value, with copies of the state that they follow from: the code; the floats that are decoded; and the
    # dense tensors with their versions.
    _coded: "tuple[list[Tensor], dict[str, Tensor]] | None" = None
    _floats: "tuple[list[Tensor], dict[str, Tensor]] | None" = None
    _dense: "tuple[list[Tensor], dict[int, tuple[Tensor, int]]] | None" = None

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
        self.decoder = method.outer if isinstance(method, Then) else method  # takes floats, however they are stored
        ends = list(itertools.accumulate(math.prod(part.shape) for part in parts))
        self._cuts = tuple(zip([0, *ends], ends, strict=False))
        self.plans = tuple(self._plan(index) for index in range(len(self.parts)))
        self._operator_pays = tuple(
            plan is not None and choose(plan[0], _TYPICAL_BATCH, False, native=True) != "dense" for plan in self.plans
        )
        self.rounds = method.trains == "through" and not frozen
        self.direct = not self.rounds and not isinstance(method, Then)  # the parameters are what ``decoder`` takes
        device, tables = next(iter(code.values())).device, method.derived()
        self._tables = tuple(tables)
        for entry, table in tables.items():
            self.register_buffer(entry, torch.from_numpy(table).to(device), persistent=False)
        own = dict(code)
        if self.rounds:
            whole = method.outer.integers() if isinstance(method, Then) else ()
            own = {entry: code[entry] for entry in whole} | dict(latents or self._decode_floats(code))
        if self.direct and isinstance(method, Uniform | KMeans | Ecsq):
            own["symbols"] = own["symbols"].to(_symbol_type(method))
        self._entries = tuple(own)
        for entry, value in own.items():
            if value.is_floating_point():
                self.register_parameter(entry, nn.Parameter(value))
            else:
                self.register_buffer(entry, value)
        if self.rounds and latents is None:
            self._coded = (self._copies(), dict(code))

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

    def with_floats_stored(self, name: str, method: Then, shares: Mapping[str, Tensor]) -> "ThinWeight":
        """The same matrix, whose code is that of ``method.outer``, with its floats stored by ``method.inner``.

        ``shares`` weigh the errors of the floats.
        """
        like = next(self.parameters())
        code, weigh = _arrays(self.code()), _arrays(shares)
        stored = _tensors(method.encode_floats(code, cast(Any, np), weigh), like)
        latents = _tensors(code, like) if method.trains == "through" else None
        return type(self)(name, method, self.parts, stored, latents).requires_grad_(like.requires_grad)

    def code(self) -> dict[str, Tensor]:
        """The stored entries. A code that was loaded stays as it is until a latent changes in value."""
        if not self.rounds:
            return self._state()
        kept = self._coded
        if kept is None or not _same(kept[0], self._state().values()):
            copies = self._copies()
            self._coded = kept = (copies, self._code_of(copies))
        return kept[1]

    def set_code(self, code: Mapping[str, Tensor]) -> None:
        """Take over another code of the same method, in place: optimisers, and what is frozen, stay as they are."""
        like = next(iter(self._state().values()))
        code = {entry: tensor.to(like.device) for entry, tensor in code.items()}
        with torch.no_grad():
            new = {**code, **self._decode_floats(code)} if self.rounds else code
            for entry, now in self._state().items():
                now.copy_(new[entry])
        if self.rounds:
            self._coded = (self._copies(), code)

    def floats(self) -> dict[str, Tensor]:
        """What ``decoder`` takes: its floats, rounded where the method rounds, and its integers.

        The gradient goes through rounding as if it were not there: the straight-through estimator of Bengio et al.,
        2013, arXiv:1308.3432.
        """
        state = self._state()
        if self.direct:
            return state
        if not self._wants_gradient() and not torch.compiler.is_compiling() and not is_transformed():
            kept = self._floats
            if kept is None or not _same(kept[0], state.values()):
                copies = self._copies()
                self._floats = kept = (copies, self._floats_of(copies))
            return kept[1]
        if not self.rounds:
            return self._decode_floats(state)
        with torch.no_grad():
            latents, kept = {entry: t.detach() for entry, t in state.items()}, self._coded
            loaded = kept is not None and not torch.compiler.is_compiling() and not is_transformed()
            # What is encoded again need not be the same: a code stays as it is until a latent changes.
            code = kept[1] if kept and loaded and _same(kept[0], latents.values()) else self._encode(latents)
            rounded = self._decode_floats(code)
        # The difference is 0, and the sum just what is rounded.
        return {e: (t - t.detach()) + rounded[e] if t.is_floating_point() else t for e, t in state.items()}

    def _state(self) -> dict[str, Tensor]:
        """Latents and stored integers: what all else follows from."""
        return {entry: getattr(self, entry) for entry in self._entries}

    def _copies(self) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return [entry.detach().clone() for entry in self._state().values()]

    def _code_of(self, copies: list[Tensor]) -> dict[str, Tensor]:
        """The stored entries of a state, without gradients."""
        state = dict(zip(self._entries, copies, strict=True))
        if not self.rounds:
            return state
        kept = self._coded
        if kept is not None and _same(kept[0], copies):
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            return self._encode(state)

    def _floats_of(self, copies: list[Tensor]) -> dict[str, Tensor]:
        """What the decoder takes of a state, without gradients."""
        code = self._code_of(copies)
        if self.direct:
            return code
        with torch.inference_mode(False), torch.no_grad():
            return self._decode_floats(code)

    def _encode(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored for latents, by a method that trains through its rounding."""
        if isinstance(self.method, Then):
            return self.method.encode_floats(dict(latents), _TORCH)
        return self.method.encode(latents["weight"], _TORCH)

    def _decode_floats(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the decoder takes, of what is stored."""
        whole = {**code, **self._derived()}
        if isinstance(self.method, Then):
            return self.method.decode_floats(whole, _TORCH)
        return {"weight": self.method.decode(whole, _TORCH)}

    def _derived(self) -> dict[str, Tensor]:
        return {entry: getattr(self, entry) for entry in self._tables}

    def forward(self, index: int = 0) -> Float[Tensor, "..."]:
        """A dense tensor.

        In evaluation, where no gradient is wanted, it is kept until the code changes in value.
        """
        if not self._keeps() or torch.compiler.is_compiling() or is_transformed():
            return self._decode(index, self.floats())
        held = self._dense
        if held is None or not _same(held[0], self._state().values()):
            self._dense = held = (self._copies(), {})
        copies, kept = held
        dense, version = kept.get(index, (None, 0))
        if dense is None or dense._version != version:  # someone wrote to what is only to be read
            with torch.inference_mode(False), torch.no_grad():  # it may serve a gradient of the input later
                dense = self._decode(index, self._floats_of(copies))  # another thread may write to the code now
                kept[index] = (dense, dense._version)
        return dense

    def product(
        self, x: Float[Tensor, "*batch cols"], index: int = 0, bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T + bias``, by the way whose predicted cost is least.

        Autocast: structured ways compute in float32.
        """
        y = self._short_way(x, index, bias)
        if y is not None:
            return y
        known = isinstance(x, Tensor)  # else a proxy that records, for which there is no choice, or the caller's error
        path, plan, scale = self.path(x, index) if known else "dense", self.plans[index], self.parts[index].scale
        if path in ("csr", "symbols"):
            if bias is None or (takes(bias) and not (torch.is_grad_enabled() and bias.requires_grad)):
                return self._by_rows(x, bias) if path == "csr" else self._by_symbols(x, bias)
            path = "dense"
        if path == "factors" and plan is None:
            y = multiply_in_turn(cast(Any, self.decoder), self.floats(), x) * scale
            return y if bias is None else y + bias
        if path == "dense" or plan is None:
            if known:
                weight = self(index)
            else:
                state = self._state()
                weight = self._decode(index, state if self.direct or self.rounds else self._decode_floats(state))
            if self.parts[index].transposed:
                return x @ weight if bias is None else x @ weight + bias
            return F.linear(x, weight, bias)
        method, first, stop, offset = plan
        if path in _WAYS and not torch.compiler.is_compiling() and self._keeps():
            if (fast := self.short_way(index)) is not None:
                fast.choose(x.numel() // method.shape[1], _WAYS[path])
            y = self._short_way(x, index, bias)
            if y is not None:
                return y
        floats = self.floats()
        rows, wf = floats["xf"], floats["wf"]
        fused = bias if scale == 1.0 and path in NATIVE else None
        autocast = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            x32, rows, wf = (x.float(), rows.float(), wf.float()) if autocast else (x, rows, wf)
            rows = rows if len(rows) == stop - first else rows[first:stop]
            if path in NATIVE:
                if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(x) is not Tensor:
                    y = linear(x32, rows, wf, fused, rows=method.shape[0], offset=offset, correlation="auto")
                else:
                    y = eager_linear(x32, rows, wf, fused, method.shape[0], offset)
            else:
                y = factor_linear(method, x32, rows, wf, cast(Any, path), offset)
        y = y.to(torch.get_autocast_dtype(x.device.type)) if autocast else y
        y = y if scale == 1.0 else y * scale
        return y if bias is None or fused is not None else y + bias.to(y.dtype)

    def rows_pay(self, places: Tensor, index: int = 0) -> bool:
        """Whether it is cheaper to make single rows of a matrix than all of it: while they are few, on any device.

        Graphs are recorded with single rows, since how many there will be may be unknown.
        """
        part, decoder = self.parts[index], self.decoder
        if not isinstance(decoder, Factor) or decoder.seed is not None or len(part.shape) != 2 or part.transposed:
            return False
        if places.dtype not in (torch.int32, torch.int64) or places.is_meta:
            return False
        return is_traced(places) or places.numel() * _GATHER <= part.shape[0]

    def rows(self, places: Int[Tensor, "*batch"], index: int = 0) -> Float[Tensor, "*batch cols"]:
        """Rows of a matrix, without the others: of the product of the factors, the rows that they lie in.

        IndexError where there is no such row.
        """
        part, floats, n = self.parts[index], self.floats(), cast(Factor, self.decoder).n
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
        plan = self.plans[index]
        if plan is None:
            return self._whole_path(x)
        if x.is_meta or x.is_nested or x.shape[-1:] != plan[0].shape[1:]:
            return "dense"
        latents = cast(
            tuple[Tensor, ...], tuple(self._parameters.values())
        )  # of the type of the factors, however these follow from them
        autocast = torch.is_autocast_enabled(x.device.type)
        if not x.is_floating_point() or (x.dtype != latents[0].dtype and not autocast):
            return "dense"
        native = takes(*latents) and (autocast or takes(x))
        if is_traced(x):  # the batch may be a symbol there: one choice for all, the operator has another at run time
            compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            return "native-auto" if compiled and native and self._operator_pays[index] else "dense"
        return choose(plan[0], x.numel() // plan[0].shape[1], self._keeps(), native)

    def _whole_path(self, x: Tensor) -> Path:
        """The same for codes that are no two factors: these hold one matrix, and x must be as plain as can be."""
        decoder, part = self.decoder, self.parts[0]
        if len(self.parts) > 1 or len(part.shape) != 2 or part.transposed or part.zero_row is not None:
            return "dense"
        if is_traced(x) or x.is_meta or x.is_nested or x.shape[-1:] != part.shape[1:]:
            return "dense"
        if torch.is_autocast_enabled(x.device.type):
            return "dense"
        like, batch = next(self.parameters()), x.numel() // part.shape[1]
        if isinstance(decoder, Kronecker | TensorTrain) and x.dtype == like.dtype:
            return "factors" if in_turn_pays(decoder, batch, self._keeps()) else "dense"
        if isinstance(decoder, Pruned) and decoder.kept <= _SPARSE * math.prod(decoder.shape) and takes(x, like):
            wanted = torch.is_grad_enabled() and x.requires_grad
            return "csr" if batch and self._keeps() and not wanted else "dense"
        if self.direct and isinstance(decoder, Uniform | KMeans | Ecsq) and symbols_pay(decoder, batch):
            wanted = torch.is_grad_enabled() and x.requires_grad
            return "symbols" if takes(x, like) and self._keeps() and not wanted else "dense"
        return "dense"

    def _by_rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with a pruned matrix in compressed sparse rows, in native code."""
        floats, decoder, kept = self.floats(), cast(Pruned, self.decoder), self._rows
        rows, cols = decoder.shape
        if kept is None or not torch.equal(kept[0], floats["positions"]):
            with torch.inference_mode(False), torch.no_grad():
                positions = floats["positions"].clone()
                starts = torch.searchsorted(positions, torch.arange(rows + 1) * cols)
                self._rows = kept = (positions, (positions % cols).numpy().astype(np.int32), starts.numpy())
        values = floats["values"].detach() * self.parts[0].scale
        items = x.detach().resolve_neg().reshape(-1, cols).contiguous()
        shift = None if bias is None else bias.detach().resolve_neg().contiguous().numpy()
        threads = torch.get_num_threads()
        y = csr_linear((rows, cols), values.numpy(), kept[1], kept[2], items.numpy(), shift, threads=threads)
        return torch.from_numpy(y).view(*x.shape[:-1], rows)

    def _by_symbols(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with symbols of a byte, in native code, which reads them where they lie: no copy can be stale."""
        state, scale = self._state(), self.parts[0].scale
        floats = {e: t if scale == 1.0 else t * scale for e, t in state.items() if t.is_floating_point()}
        return symbol_linear(x, state["symbols"], bias, **floats)

    def _plan(self, index: int) -> "tuple[Factor, int, int, int] | None":
        """A tensor's own plan, its rows of xf and the entry where it begins; none where the weight must be built."""
        method, part = self.decoder, self.parts[index]
        if not isinstance(method, Factor) or method.seed is not None or part.zero_row is not None:
            return None
        (start, stop), n = self._cuts[index], method.n
        if len(part.shape) != 2 or (n == self._matrix(index)[1] and start % n):
            return None
        first = start // n
        return Factor(self._matrix(index), n, method.rank), first, -(-stop // n), start - first * n

    def _matrix(self, index: int) -> tuple[int, int]:
        """(outputs, inputs) of a tensor of two dimensions."""
        rows, cols = self.parts[index].shape
        return (cols, rows) if self.parts[index].transposed else (rows, cols)

    def _decode(self, index: int, floats: Mapping[str, Tensor]) -> Tensor:
        (start, stop), part, decoder = self._cuts[index], self.parts[index], self.decoder
        if isinstance(decoder, Factor) and decoder.seed is None:
            flat = decoder.decode_flat(dict(floats), start, stop, _TORCH)
        elif self.rounds and not isinstance(self.method, Then):
            flat = floats["weight"].reshape(-1)[start:stop]
        else:
            flat = decoder.decode({**self._derived(), **floats}, _TORCH).reshape(-1)[start:stop]
        return part.cut(flat, _TORCH)

    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(entry.requires_grad for entry in self._state().values())

    def _keeps(self) -> bool:
        """Whether the dense weight is worth keeping: on the CPU, in evaluation, with no gradient to its code."""
        on_cpu = all(entry.device.type == "cpu" for entry in self._state().values())
        return not self.training and not self._wants_gradient() and on_cpu

    def extra_repr(self) -> str:
        """The plan, for ``print(model)``."""
        return f"{self.name}, {' + '.join('x'.join(map(str, part.shape)) for part in self.parts)}, {self.method}"

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_dense", "_floats", "_fast", "_rows")
        }


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """On the host, half precision widened."""
    found = {entry: tensor.detach().cpu() for entry, tensor in tensors.items()}
    return {e: (t.float() if t.is_floating_point() else t).numpy() for e, t in found.items()}


def _tensors(arrays: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """On the device of ``like``, floats in its type."""
    made = {entry: torch.from_numpy(np.ascontiguousarray(array)) for entry, array in arrays.items()}
    return {e: t.to(like.device, like.dtype) if t.is_floating_point() else t.to(like.device) for e, t in made.items()}


def _symbol_type(method: Uniform | KMeans | Ecsq) -> torch.dtype:
    """A byte, where the symbols have room in it: as native code reads them."""
    whole = method.integers()["symbols"]
    return torch.int16 if whole.count > 256 else torch.int8 if whole.least < 0 else torch.uint8


def _same(kept: Sequence[Tensor], now: Iterable[Tensor]) -> bool:
    return all(
        old.dtype == new.dtype and old.device == new.device and not new.is_meta and same_values(old, new)
        for old, new in zip(kept, now, strict=True)
    )


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
