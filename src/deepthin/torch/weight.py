"""A weight that is generated: the optimiser sees the code's floats, the layer sees the matrix or its product."""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepthin.method import Method
from deepthin.methods.factor import Factor
from deepthin.rules import matrix_shape
from deepthin.torch.product import Path, choose, factor_linear


class ThinWeight(nn.Module):
    """One tensor in compressed form.

    Floating entries of the code are parameters, tables that follow from the method's fields are buffers that are not
    saved. ``forward()`` is the dense tensor, ``product(x)`` is ``x @ W.T`` by the cheapest way. ``shape`` is that of
    the tensor; one of a single dimension is stored as the near-square matrix ``method.shape`` and cut to length.
    """

    _dense: "tuple[list[Tensor], Tensor] | None" = None  # codes, and the weight that they decode to

    def __init__(self, name: str, method: Method, shape: tuple[int, ...], code: Mapping[str, Tensor]) -> None:
        super().__init__()
        if matrix_shape(shape) != method.shape:
            raise ValueError(f"A tensor of shape {shape} is stored as {matrix_shape(shape)}, not as {method.shape}.")
        self.name, self.method, self.shape = name, method, tuple(shape)
        self._entries = tuple(method.code_shapes())
        device = next(iter(code.values())).device
        for entry in self._entries:
            self.register_parameter(entry, nn.Parameter(code[entry]))
        for entry, table in method.derived().items():
            self.register_buffer(entry, torch.from_numpy(table).to(device), persistent=False)

    @classmethod
    def encode(cls, name: str, method: Method, weight: Tensor, importance: Tensor | None = None) -> "ThinWeight":
        """The code nearest to a dense tensor, on its device and in its type; ``importance`` has the tensor's shape."""
        rows, cols = method.shape

        def matrix(tensor: Tensor) -> np.ndarray:
            flat = tensor.detach().float().cpu().numpy().reshape(-1)
            return np.pad(flat, (0, rows * cols - flat.size)).reshape(rows, cols)

        code = method.encode(matrix(weight), cast(Any, np), None if importance is None else matrix(importance))
        tensors = {entry: torch.from_numpy(np.ascontiguousarray(array)).to(weight) for entry, array in code.items()}
        return cls(name, method, tuple(weight.shape), tensors)

    @classmethod
    def draw(cls, name: str, method: Method, like: Tensor, rng: np.random.Generator, std: float) -> "ThinWeight":
        """A from-scratch start whose decoded entries have standard deviation ``std``."""
        code = {entry: torch.from_numpy(array).to(like) for entry, array in method.init(rng, std).items()}
        return cls(name, method, tuple(like.shape), code)

    def code(self) -> dict[str, Tensor]:
        """The stored entries."""
        return {entry: getattr(self, entry) for entry in self._entries}

    def forward(self) -> Float[Tensor, "..."]:
        """The dense tensor.

        In evaluation, where no gradient is wanted, it is kept until an entry of the code changes in value.
        """
        if not self._keeps() or torch.compiler.is_compiling():
            return self._decode()
        if self._dense is not None:
            old, dense = self._dense
            new = self.code().values()
            if all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(old, new, strict=True)):
                return dense
        with torch.inference_mode(False), torch.no_grad():  # what is kept may serve a gradient of the input later
            self._dense = ([entry.detach().clone() for entry in self.code().values()], self._decode())
        return self._dense[1]

    def _decode(self) -> Tensor:
        tables = dict(self.named_buffers(recurse=False))
        flat = self.method.decode({**self.code(), **tables}, cast(Any, torch)).reshape(-1)
        return flat[: math.prod(self.shape)].view(self.shape)

    def _keeps(self) -> bool:
        """Whether the dense weight is worth keeping: on the CPU, in evaluation, with no gradient to its code."""
        code = self.code().values()
        wanted = torch.is_grad_enabled() and any(entry.requires_grad for entry in code)
        return not self.training and not wanted and all(entry.device.type == "cpu" for entry in code)

    def product(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T``, by the way whose predicted cost is least. Autocast: structured ways compute in float32."""
        path, method = self.path(x), self.method
        if path == "dense" or not isinstance(method, Factor):
            return F.linear(x, self())
        code = self.code()
        if not torch.is_autocast_enabled(x.device.type):
            return factor_linear(method, x, code["xf"], code["wf"], path)
        with torch.autocast(x.device.type, enabled=False):
            y = factor_linear(method, x.float(), code["xf"].float(), code["wf"].float(), path)
        return y.to(torch.get_autocast_dtype(x.device.type))

    def path(self, x: Tensor) -> Path:
        """The way in which ``product`` would multiply ``x`` now."""
        if not isinstance(self.method, Factor):
            return "dense"
        return choose(self.method, x.numel() // max(x.shape[-1], 1), self._keeps())

    def extra_repr(self) -> str:
        """The plan, for ``print(model)``."""
        return f"{self.name}, {'x'.join(map(str, self.shape))}, {self.method}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_dense"}
