"""A weight that is generated: the optimiser sees the code's floats, the layer sees the matrix or its product."""

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepthin.method import Method
from deepthin.methods.factor import Factor
from deepthin.storage import Part
from deepthin.torch.operators import eager_linear, forward_mode, linear, product, takes
from deepthin.torch.product import NATIVE, Path, choose, factor_linear

_TYPICAL_BATCH = 32
_WAYS: dict[Path, int] = {"native-direct": 1, "native-fft": 2}


class ThinWeight(nn.Module):
    """One matrix in compressed form, and the tensors that it holds: one, or those of a group.

    Floating entries of the code are parameters, tables that follow from the method's fields are buffers that are not
    saved. ``forward(i)`` is the i-th dense tensor, ``product(x, i)`` is ``x @ W.T`` by the cheapest way.
    """

    _fast: "tuple[Any, ...] | None" = None  # a native product for each tensor, once there was a use for it
    _dense: "tuple[list[Tensor], dict[int, tuple[Tensor, int]]] | None" = None  # codes; tensors, and their versions

    def __init__(self, name: str, method: Method, parts: Sequence[Part], code: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.name, self.method, self.parts = name, method, tuple(parts)
        ends = list(itertools.accumulate(math.prod(part.shape) for part in parts))
        self._cuts = tuple(zip([0, *ends], ends, strict=False))
        self._entries = tuple(method.code_shapes())
        self._plans = tuple(self._plan(index) for index in range(len(self.parts)))
        self._operator_pays = tuple(
            plan is not None and choose(plan[0], _TYPICAL_BATCH, False, native=True) != "dense" for plan in self._plans
        )
        device = next(iter(code.values())).device
        for entry in self._entries:
            self.register_parameter(entry, nn.Parameter(code[entry]))
        for entry, table in method.derived().items():
            self.register_buffer(entry, torch.from_numpy(table).to(device), persistent=False)

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

        def matrix(tensors: Sequence[Tensor], scaled: bool) -> np.ndarray:
            pieces: list[np.ndarray] = []
            for part, tensor in zip(parts, tensors, strict=True):
                piece = tensor.detach().float().cpu().numpy()
                pieces.append((piece.T if part.transposed else piece).reshape(-1) / (part.scale if scaled else 1.0))
            flat = np.concatenate(pieces)
            return np.pad(flat, (0, math.prod(method.shape) - flat.size)).reshape(method.shape)

        weigh = None if importance is None else matrix(importance, scaled=False)
        code = method.encode(matrix(tensors, scaled=True), cast(Any, np), weigh)
        return cls(
            name, method, parts, {k: torch.from_numpy(np.ascontiguousarray(a)).to(tensors[0]) for k, a in code.items()}
        )

    @classmethod
    def draw(
        cls, name: str, method: Method, parts: Sequence[Part], like: Tensor, rng: np.random.Generator, std: float
    ) -> "ThinWeight":
        """A from-scratch start; the entries of a part then have standard deviation ``std`` times its scale."""
        code = {entry: torch.from_numpy(array).to(like) for entry, array in method.init(rng, std).items()}
        return cls(name, method, parts, code)

    def code(self) -> dict[str, Tensor]:
        """The stored entries."""
        return {entry: getattr(self, entry) for entry in self._entries}

    def forward(self, index: int = 0) -> Float[Tensor, "..."]:
        """A dense tensor.

        In evaluation, where no gradient is wanted, it is kept until an entry of the code changes in value.
        """
        if not self._keeps() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self._decode(index, self.code())
        code = list(self.code().values())
        if self._dense is None or not all(
            torch.equal(old, new) and old.dtype == new.dtype for old, new in zip(self._dense[0], code, strict=True)
        ):
            self._dense = ([entry.detach().clone() for entry in code], {})
        copies, kept = self._dense
        dense, version = kept.get(index, (None, 0))
        if dense is None or dense._version != version:  # someone wrote to what is only to be read
            with torch.inference_mode(False), torch.no_grad():  # it may serve a gradient of the input later
                # From the copies: another thread may write to the code now.
                dense = self._decode(index, dict(zip(self._entries, copies, strict=True)))
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
        path, plan, scale = self.path(x, index) if known else "dense", self._plans[index], self.parts[index].scale
        if path == "dense" or plan is None:
            weight = self(index) if known else self._decode(index, self.code())
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
        rows, wf = (cast(Tensor, entry) for entry in (self.xf, self.wf))
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

    def _short_way(self, x: Tensor, index: int, bias: Tensor | None) -> Tensor | None:
        """The native product in a single call, where nothing but its result is wanted and it was used before."""
        if self._fast is None or self.training or torch.compiler.is_compiling():
            return None
        fast, entries = self._fast[index], self._parameters
        return None if fast is None else fast(x, entries.get("xf"), entries.get("wf"), bias)

    def short_way(self, index: int) -> Any:
        """The native product of a tensor, which ``choose`` tells what it may be used for; or none."""
        if self._fast is None:
            self._fast = tuple(
                plan and product(plan[0], plan[1], plan[3], part.scale)
                for plan, part in zip(self._plans, self.parts, strict=True)
            )
        return self._fast[index]

    def path(self, x: Tensor, index: int = 0) -> Path:
        """The way in which ``product`` would multiply ``x`` now.

        The dense one while a graph is exported or a function transformed: the weight is then decoded in plain
        operations. Also for inputs that do not go with the code, to fail, or not, as a linear layer does.
        """
        plan = self._plans[index]
        if plan is None or x.is_meta or x.is_nested or x.shape[-1:] != plan[0].shape[1:]:
            return "dense"
        xf, wf = cast(Tensor, self.xf), cast(Tensor, self.wf)
        autocast = torch.is_autocast_enabled(x.device.type)
        if not x.is_floating_point() or (x.dtype != xf.dtype and not autocast):
            return "dense"
        native = takes(xf, wf) and (autocast or takes(x))
        if _is_traced(x):  # the batch may be a symbol there: one choice for all, the operator has another at run time
            compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            return "native-auto" if compiled and native and self._operator_pays[index] else "dense"
        return choose(plan[0], x.numel() // plan[0].shape[1], self._keeps(), native)

    def _plan(self, index: int) -> "tuple[Factor, int, int, int] | None":
        """A tensor's own plan, its rows of xf and the entry where it begins; none where the weight must be built."""
        method, part = self.method, self.parts[index]
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

    def _decode(self, index: int, code: Mapping[str, Tensor]) -> Tensor:
        (start, stop), part = self._cuts[index], self.parts[index]
        if isinstance(self.method, Factor) and self.method.seed is None:
            return part.cut(self.method.decode_flat({**code}, start, stop, cast(Any, torch)), cast(Any, torch))
        tables = dict(self.named_buffers(recurse=False))
        return part.cut(
            self.method.decode({**code, **tables}, cast(Any, torch)).reshape(-1)[start:stop], cast(Any, torch)
        )

    def _keeps(self) -> bool:
        """Whether the dense weight is worth keeping: on the CPU, in evaluation, with no gradient to its code."""
        code = self.code().values()
        wanted = torch.is_grad_enabled() and any(entry.requires_grad for entry in code)
        return not self.training and not wanted and all(entry.device.type == "cpu" for entry in code)

    def extra_repr(self) -> str:
        """The plan, for ``print(model)``."""
        return f"{self.name}, {' + '.join('x'.join(map(str, part.shape)) for part in self.parts)}, {self.method}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_dense", "_fast")}


def _is_traced(x: Tensor) -> bool:
    """Whether what is computed now is recorded as a graph or transformed by torch.func."""
    transformed = torch._C._are_functorch_transforms_active() or forward_mode()
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or transformed


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
