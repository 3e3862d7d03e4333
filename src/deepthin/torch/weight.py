"""A weight that is generated: the optimiser sees the code's floats, the layer sees the matrix or its product."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepthin.method import Method
from deepthin.methods.factor import Factor
from deepthin.storage import Part
from deepthin.torch.product import Path, choose, factor_linear


class ThinWeight(nn.Module):
    """One matrix in compressed form, and the tensors that it holds: one, or those of a group.

    Floating entries of the code are parameters, tables that follow from the method's fields are buffers that are not
    saved. ``forward(i)`` is the i-th dense tensor, ``product(x, i)`` is ``x @ W.T`` by the cheapest way.
    """

    _dense: "tuple[list[Tensor], dict[int, tuple[Tensor, int]]] | None" = None  # codes; tensors, and their versions

    def __init__(self, name: str, method: Method, parts: Sequence[Part], code: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.name, self.method, self.parts = name, method, tuple(parts)
        ends = list(itertools.accumulate(math.prod(part.shape) for part in parts))
        self._cuts = tuple(zip([0, *ends], ends, strict=False))
        self._entries = tuple(method.code_shapes())
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
        if not self._keeps() or torch.compiler.is_compiling():
            return self._decode(index)
        code = list(self.code().values())
        if self._dense is None or not all(
            torch.equal(old, new) and old.dtype == new.dtype for old, new in zip(self._dense[0], code, strict=True)
        ):
            self._dense = ([entry.detach().clone() for entry in code], {})
        kept = self._dense[1]
        if index not in kept or kept[index][0]._version != kept[index][1]:  # someone wrote to what is only to be read
            with torch.inference_mode(False), torch.no_grad():  # it may serve a gradient of the input later
                dense = self._decode(index)
                kept[index] = (dense, dense._version)
        return kept[index][0]

    def product(self, x: Float[Tensor, "*batch cols"], index: int = 0) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T``, by the way whose predicted cost is least. Autocast: structured ways compute in float32."""
        path, method = self.path(x, index), self.method
        if path == "dense" or not isinstance(method, Factor):
            weight = self(index)
            return x @ weight if self.parts[index].transposed else F.linear(x, weight)
        (start, stop), code, scale = self._cuts[index], self.code(), self.parts[index].scale
        first = start // method.n
        plan = Factor(self._matrix(index), method.n, method.rank)
        rows, offset = code["xf"][first : -(-stop // method.n)], start - first * method.n
        if not torch.is_autocast_enabled(x.device.type):
            y = factor_linear(plan, x, rows, code["wf"], path, offset)
        else:
            with torch.autocast(x.device.type, enabled=False):
                y = factor_linear(plan, x.float(), rows.float(), code["wf"].float(), path, offset)
            y = y.to(torch.get_autocast_dtype(x.device.type))
        return y if scale == 1.0 else y * scale

    def path(self, x: Tensor, index: int = 0) -> Path:
        """The way in which ``product`` would multiply ``x`` now.

        The dense one while a graph is traced or a function transformed: the weight is then decoded in plain operations.
        Also for inputs that do not go with the code, to fail, or not, as a linear layer does.
        """
        method = self.method
        if not isinstance(method, Factor) or method.seed is not None or _is_traced(x):
            return "dense"
        kind = next(iter(self.code().values())).dtype
        shape = self._matrix(index)
        mixed = x.dtype != kind and not torch.is_autocast_enabled(x.device.type)
        if mixed or not x.is_floating_point() or x.shape[-1:] != shape[1:]:
            return "dense"
        if self.parts[index].zero_row is not None or (method.n == shape[1] and self._cuts[index][0] % method.n):
            return "dense"
        return choose(Factor(shape, method.n, method.rank), math.prod(x.shape[:-1]), self._keeps())

    def _matrix(self, index: int) -> tuple[int, int]:
        """(outputs, inputs) of a tensor of two dimensions."""
        rows, cols = self.parts[index].shape
        return (cols, rows) if self.parts[index].transposed else (rows, cols)

    def _decode(self, index: int) -> Tensor:
        (start, stop), part = self._cuts[index], self.parts[index]
        if isinstance(self.method, Factor) and self.method.seed is None:
            return part.cut(self.method.decode_flat(self.code(), start, stop, cast(Any, torch)), cast(Any, torch))
        tables = dict(self.named_buffers(recurse=False))
        return part.cut(
            self.method.decode({**self.code(), **tables}, cast(Any, torch)).reshape(-1)[start:stop], cast(Any, torch)
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
        return {key: value for key, value in self.__dict__.items() if key != "_dense"}


def _is_traced(x: Tensor) -> bool:
    """Whether what is computed now is recorded as a graph, transformed by torch.func, or has no values."""
    transformed = torch._C._are_functorch_transforms_active()
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or transformed or x.is_meta


class ThinPart(nn.Module):
    """One tensor of a group: stands where a ThinWeight of its own would."""

    def __init__(self, weight: ThinWeight, index: int) -> None:
        super().__init__()
        self.group, self.index = weight, index

    def forward(self) -> Float[Tensor, "..."]:
        """The dense tensor."""
        return self.group(self.index)

    def product(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T``."""
        return self.group.product(x, self.index)

    def extra_repr(self) -> str:
        """Which of the group's tensors."""
        return f"tensor {self.index} of the group"
