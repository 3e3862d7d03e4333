"""The ways to multiply inputs by a thin weight, one table: which apply, what each is predicted to cost, how it runs.

A choice is a pure function of a ``Case``: shapes, plan, batch and what is installed. A reloaded model therefore takes
the same ways and computes the same bits.
"""

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepthin.kernels import costs, products
from deepthin.method import InTurn, Method, Sparse, Symbols
from deepthin.methods.factor import Window
from deepthin.torch.operators import eager_linear, linear, symbol_linear
from deepthin.torch.product import factor_linear, multiply_in_turn

TYPICAL_BATCH = 32
_DENSITY = 0.05  # a product by sparse rows is faster than a dense one up to this density, at any batch (deepthin bench)


class Weight(Protocol):
    """What a way reads of a ThinWeight."""

    decoder: Method
    parts: Any  # of storage: shape, scale, transposed, zero_row
    plans: tuple[Window | None, ...]

    def __call__(self, index: int = 0) -> Tensor:
        """A dense tensor, cached where that is allowed."""
        ...

    def decoded(self, index: int) -> Tensor:
        """A dense tensor in plain operations, whatever records them."""
        ...

    def floats(self) -> dict[str, Tensor]:
        """The code that ``decoder`` takes."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Parameters and stored integers."""
        ...

    def sparse_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Columns of the stored weights, and where each row of them begins."""
        ...


class Case(NamedTuple):
    """What the choice of a way goes by."""

    method: Method  # that makes the weight
    window: Window | None  # where the matrix lies in a product of two factors, if it does
    batch: int  # items
    dense_ready: bool  # the dense weight is cached, and no gradient is wanted of the code
    native: bool = False  # all operands are what native code reads
    whole: bool = False  # the code holds this matrix alone, (outputs, inputs), and the input is of the code's type
    detached: bool = False  # no gradient is wanted of the input or the bias, and native code reads both
    direct: bool = False  # the stored symbols are at hand
    traced: bool = False  # recorded as a graph for this machine, in which the operator pays
    levels: tuple[int, int] = (0, 0)  # look-up tables of the instruction set, where symbols are stored


class Way(Protocol):
    """One way to compute ``x @ W.T + bias``."""

    @property
    def name(self) -> costs.Path:
        """What ``ThinWeight.path`` and reports call it."""
        ...

    def applies(self, case: Case) -> bool:
        """Whether it can serve."""
        ...

    def cost(self, case: Case) -> float:
        """Predicted nanoseconds, comparable between the ways that apply."""
        ...

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """The product."""
        ...


class DenseWeight:
    """The decoded weight: serves always."""

    name: costs.Path = "dense"

    def applies(self, case: Case) -> bool:
        """Always."""
        return True

    def cost(self, case: Case) -> float:
        """Of the product, and of decoding where the weight is not cached."""
        if case.window is not None:
            return _factored(case)["dense"]
        summands = case.method.summands() if isinstance(case.method, InTurn) else 1
        return costs.dense_cost(case.method.shape, summands, case.batch, case.dense_ready)

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """By torch's product; ``x`` may be a proxy that records."""
        dense = weight(index) if isinstance(x, Tensor) else weight.decoded(index)
        if weight.parts[index].transposed:
            return x @ dense if bias is None else x @ dense + bias
        return F.linear(x, dense, bias)


class Factored:
    """The structured product of two factors in torch operations: in turn, or by a correlation."""

    def __init__(self, name: costs.Path) -> None:
        self.name: costs.Path = name

    def applies(self, case: Case) -> bool:
        """Where native code does not serve, and the plan has this way; the FFT library takes no empty batches."""
        return case.window is not None and not case.native and case.batch > 0 and self.name in _factored(case)

    def cost(self, case: Case) -> float:
        """As fitted to timings."""
        return _factored(case)[self.name]

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """In float32 under autocast."""
        window, scale = cast(Window, weight.plans[index]), weight.parts[index].scale
        floats = weight.floats()
        rows, wf = floats["xf"], floats["wf"]
        fused = bias if scale == 1.0 and self.name in costs.NATIVE else None
        autocast = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            x32, rows, wf = (x.float(), rows.float(), wf.float()) if autocast else (x, rows, wf)
            rows = rows if len(rows) == window.stop - window.first else rows[window.first : window.stop]
            y = self._product(weight, window, x32, rows, wf, fused, x)
        y = y.to(torch.get_autocast_dtype(x.device.type)) if autocast else y
        y = y if scale == 1.0 else y * scale
        return y if bias is None or fused is not None else y + bias.to(y.dtype)

    def _product(
        self, weight: Weight, window: Window, x32: Tensor, rows: Tensor, wf: Tensor, fused: Tensor | None, x: Tensor
    ) -> Tensor:
        return factor_linear(window.plan, x32, rows, wf, cast(Any, self.name), window.offset, weight)


class NativeFactored(Factored):
    """The same in native code: float32 on the CPU. Within a compiled graph, the operator."""

    def applies(self, case: Case) -> bool:
        """Where all operands are plain. The operator that chooses its correlation by itself serves graphs alone."""
        return case.window is not None and case.native and case.batch > 0 and self.name in _factored(case)

    def _product(
        self, weight: Weight, window: Window, x32: Tensor, rows: Tensor, wf: Tensor, fused: Tensor | None, x: Tensor
    ) -> Tensor:
        outputs, offset = window.plan.shape[0], window.offset
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(x) is not Tensor:
            return linear(x32, rows, wf, fused, rows=outputs, offset=offset, correlation="auto")
        return eager_linear(x32, rows, wf, fused, outputs, offset)


class FactorsInTurn:
    """The factors of a method that multiplies by them one after the other."""

    name: costs.Path = "factors"

    def applies(self, case: Case) -> bool:
        """To a matrix that is all of its code."""
        return case.window is None and case.whole and case.batch > 0 and isinstance(case.method, InTurn)

    def cost(self, case: Case) -> float:
        """As fitted to timings."""
        return costs.in_turn_cost(cast(InTurn, case.method), case.batch, case.dense_ready)

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """Then scaled."""
        y = multiply_in_turn(cast(Any, weight.decoder), weight.floats(), x) * weight.parts[index].scale
        return y if bias is None else y + bias


class SparseRows:
    """Compressed sparse rows in native code, in evaluation."""

    name: costs.Path = "csr"

    def applies(self, case: Case) -> bool:
        """To a whole sparse matrix of low density, where nothing but the result is wanted."""
        if not (isinstance(case.method, Sparse) and case.whole and case.native and case.detached):
            return False
        return case.dense_ready and case.batch > 0 and case.method.kept <= _DENSITY * math.prod(case.method.shape)

    def cost(self, case: Case) -> float:
        """Less than dense by as much as the density is below that at which both are even."""
        dense = costs.dense_cost(case.method.shape, 1, case.batch, case.dense_ready)
        return dense * cast(Sparse, case.method).kept / (2 * _DENSITY * math.prod(case.method.shape))

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """Of contiguous memory."""
        rows, cols = weight.decoder.shape
        columns, starts = weight.sparse_rows()
        values = weight.floats()["values"].detach() * weight.parts[index].scale
        items = x.detach().resolve_neg().reshape(-1, cols).contiguous()
        shift = None if bias is None else bias.detach().resolve_neg().contiguous().numpy()
        threads = torch.get_num_threads()
        y = products.csr_linear((rows, cols), values.numpy(), columns, starts, items.numpy(), shift, threads=threads)
        return torch.from_numpy(y).view(*x.shape[:-1], rows)


class SymbolLookUp:
    """Symbols of a byte in native code, which reads them where they lie: there is no copy that could be stale."""

    name: costs.Path = "symbols"

    def applies(self, case: Case) -> bool:
        """To a whole matrix of few items, where nothing but the result is wanted and look-ups are quick."""
        if not (isinstance(case.method, Symbols) and case.direct and case.whole and case.native and case.detached):
            return False
        return case.dense_ready and costs.symbols_pay(case.method, case.batch, case.levels)

    def cost(self, case: Case) -> float:
        """Measured where it applies: half of dense at the most."""
        return costs.dense_cost(case.method.shape, 1, case.batch, case.dense_ready) / 2

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """Steps or centres times the scale."""
        state, scale = weight.state(), weight.parts[index].scale
        floats = {e: t if scale == 1.0 else t * scale for e, t in state.items() if t.is_floating_point()}
        return symbol_linear(x, state["symbols"], bias, **floats)


DENSE = DenseWeight()
OPERATOR = NativeFactored("native-auto")
WAYS: tuple[Way, ...] = (
    DENSE,
    Factored("factors"),
    Factored("fft"),
    Factored("direct"),
    NativeFactored("native-direct"),
    NativeFactored("native-fft"),
    OPERATOR,
    FactorsInTurn(),
    SparseRows(),
    SymbolLookUp(),
)
"""Every way. A device, a kernel or a method is one more entry."""


def choose(case: Case) -> Way:
    """The way of least predicted cost, of those that apply; of equal ones the first."""
    if case.traced:  # graphs are recorded with what follows from the plan alone
        return OPERATOR
    return DENSE if case.window is None and not case.whole else _least(case)


@lru_cache(maxsize=4096)
def _least(case: Case) -> Way:
    return min((way for way in WAYS if way.applies(case)), key=lambda way: way.cost(case))


@lru_cache(maxsize=4096)
def _factored(case: Case) -> dict[costs.Path, float]:
    """Predicted nanoseconds of every way of a plan."""
    return costs.costs(cast(Window, case.window).plan, case.batch, case.dense_ready)


@lru_cache(maxsize=4096)
def operator_pays(window: Window) -> bool:
    """Whether a compiled graph holds the operator instead of the decoded weight: one choice for all batches."""
    return costs.choose(window.plan, TYPICAL_BATCH, False, native=True) != "dense"
