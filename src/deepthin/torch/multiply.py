"""The ways to multiply inputs by a thin weight: which apply, what each is predicted to cost, how it runs.

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

from deepthin.kernels import chains, costs, products
from deepthin.kernels.chains import Layout
from deepthin.method import Chain, InTurn, Method, Sparse, Symbols
from deepthin.methods.factor import Window
from deepthin.torch.core_operators import core_linear, eager_core_linear
from deepthin.torch.host import array_of
from deepthin.torch.operators import eager_linear, linear, symbol_linear
from deepthin.torch.product import factor_linear, multiply_in_turn
from deepthin.torch.tracing import is_recorded

TYPICAL_BATCH = 32
_DENSITY = 0.05  # a product by sparse rows is faster than a dense one up to this density, at any batch (deepthin bench)


class Weight(Protocol):
    """What a way reads of a ThinWeight.

    Attributes:
        decoder: The method that decodes the floats.
        parts: One ``storage.contents.Part`` for each tensor: shape, scale, transposed, zero_row.
        plans: For each tensor its window in the factors' product; None where it must be decoded.
    """

    decoder: Method
    parts: Any
    plans: tuple[Window | None, ...]

    def __call__(self, index: int = 0) -> Tensor:
        """Decode a tensor; the result may be cached.

        Args:
            index: Which of the weight's tensors.

        Returns:
            The dense tensor.
        """
        ...

    def floats(self) -> dict[str, Tensor]:
        """The code that ``decoder`` takes.

        Returns:
            Entry -> tensor.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Parameters and stored integers.

        Returns:
            Entry -> tensor.
        """
        ...

    def sparse_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of a sparse matrix as compressed sparse rows.

        Returns:
            The column of each stored weight, and the index of each row's first one.
        """
        ...


class Case(NamedTuple):
    """What the choice of a way depends on.

    Attributes:
        method: The method that decodes the weight.
        window: Where the matrix lies in a product of two factors; None if it does not.
        batch: Number of items.
        dense_ready: The dense weight is cached, and the code needs no gradient.
        native: Native code can read all operands.
        whole: The code holds this matrix alone, as (outputs, inputs), and the input has the code's dtype.
        detached: Input and bias need no gradient, and native code can read both.
        direct: The stored symbols are available.
        traced: Recorded as a graph for this machine, in which the operator is predicted to be faster.
        levels: Look-up tables of the instruction set (``kernels.products.levels``), where symbols are stored.
        device: Type of the device, if ``kernels.costs`` predicts times for this precision there; otherwise another
            name, and the decoded weight is used.
    """

    method: Method
    window: Window | None
    batch: int
    dense_ready: bool
    native: bool = False
    whole: bool = False
    detached: bool = False
    direct: bool = False
    traced: bool = False
    levels: tuple[int, int] = (0, 0)
    device: str = "cpu"


class Way(Protocol):
    """One way to compute ``x @ W.T + bias``."""

    @property
    def name(self) -> costs.Path:
        """What ``ThinWeight.path`` and reports call it."""
        ...

    def applies(self, case: Case) -> bool:
        """Whether the way can compute this case.

        Args:
            case: The plan, the batch and the operands.

        Returns:
            True if ``run`` gives the product.
        """
        ...

    def cost(self, case: Case) -> float:
        """The predicted time.

        Args:
            case: A case to which the way applies.

        Returns:
            Nanoseconds, comparable between ways that apply to the same case.
        """
        ...

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """Compute the product.

        Args:
            weight: The thin weight.
            x: Inputs; the last dimension is the fan-in.
            index: Which of the weight's tensors is W.
            bias: One number per output, or None.

        Returns:
            The outputs, with the leading dimensions of x.
        """
        ...


class DenseWeight:
    """The product with the decoded weight; applies always."""

    name: costs.Path = "dense"

    def applies(self, case: Case) -> bool:
        """As ``Way.applies``: always."""
        return True

    def cost(self, case: Case) -> float:
        """As ``Way.cost``: of the product, and of decoding where the weight is not cached."""
        if case.window is not None:
            return _factored(case)["dense"]
        summands = case.method.summands() if isinstance(case.method, InTurn) else 1
        return costs.dense_cost(case.method.shape, summands, case.batch, case.dense_ready, case.device)

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """As ``Way.run``, by ``F.linear``; ``x`` may be a proxy of a tracer."""
        return self.multiply(weight, x, index, bias, weight(index))

    def multiply(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None, dense: Tensor) -> Tensor:
        """As ``run``, where the weight is decoded already.

        Args:
            weight: The thin weight.
            x: Inputs; the last dimension is the fan-in.
            index: Which of the weight's tensors is W.
            bias: One number per output, or None.
            dense: The decoded tensor.

        Returns:
            The outputs, with the leading dimensions of x.
        """
        if weight.parts[index].transposed:
            return x @ dense if bias is None else x @ dense + bias
        return F.linear(x, dense, bias)


class Factored:
    """The structured product of two factors in torch operations.

    Args:
        name: ``factors``, ``direct`` or ``fft``: one factor after the other, or a correlation.
    """

    def __init__(self, name: costs.Path) -> None:
        self.name: costs.Path = name

    def applies(self, case: Case) -> bool:
        """As ``Way.applies``: where the plan has this way and native code cannot read the operands, batch > 0."""
        return case.window is not None and not case.native and case.batch > 0 and self.name in _factored(case)

    def cost(self, case: Case) -> float:
        """As ``Way.cost``: fitted to timings."""
        return _factored(case)[self.name]

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """As ``Way.run``; computes in float32 under autocast."""
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
    """The structured product of two factors in native code, float32 on the CPU; the operator in a compiled graph."""

    def applies(self, case: Case) -> bool:
        """As ``Way.applies``: where the plan has this way and native code can read the operands; no empty batches."""
        return case.window is not None and case.native and case.batch > 0 and self.name in _factored(case)

    def _product(
        self, weight: Weight, window: Window, x32: Tensor, rows: Tensor, wf: Tensor, fused: Tensor | None, x: Tensor
    ) -> Tensor:
        outputs, offset = window.plan.shape[0], window.offset
        if is_recorded() or type(x) is not Tensor:
            return linear(x32, rows, wf, fused, rows=outputs, offset=offset, correlation="auto")
        return eager_linear(x32, rows, wf, fused, outputs, offset)


class FactorsInTurn:
    """The product with one factor after the other, for methods that can do so (``InTurn``)."""

    name: costs.Path = "factors"

    def applies(self, case: Case) -> bool:
        """As ``Way.applies``: one matrix alone in the code, which native code cannot take; no empty batches."""
        if case.window is not None or not case.whole or case.batch == 0 or not isinstance(case.method, InTurn):
            return False
        return not (case.native and chains.layout_of(case.method))

    def cost(self, case: Case) -> float:
        """As ``Way.cost``: fitted to timings."""
        return costs.in_turn_cost(cast(InTurn, case.method), case.batch, case.dense_ready, case.device)

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """As ``Way.run``."""
        y = multiply_in_turn(cast(Any, weight.decoder), weight.floats(), x) * weight.parts[index].scale
        return y if bias is None else y + bias


class NativeCores:
    """The product with a chain of cores in native code, float32 on the CPU; the operator in a compiled graph."""

    name: costs.Path = "native-cores"

    def applies(self, case: Case) -> bool:
        """As ``Way.applies``: where the code holds one matrix alone, and native code can read it; no empty batches."""
        fits = case.window is None and case.whole and case.native and case.batch > 0
        return fits and chains.layout_of(case.method) is not None

    def cost(self, case: Case) -> float:
        """As ``Way.cost``: fitted to timings."""
        return costs.chain_cost(cast(Layout, chains.layout_of(case.method)), case.batch, case.dense_ready)

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """As ``Way.run``."""
        method, floats, scale = cast(Chain, weight.decoder), weight.floats(), weight.parts[index].scale
        if is_recorded() or type(x) is not Tensor:
            cores = method.cores(dict(floats), cast(Any, torch))
            return core_linear(x, cores, bias, rows=method.shape[0], scale=scale)
        layout = cast(Layout, chains.layout_of(method))
        return eager_core_linear(layout, [floats[entry] for entry in method.code_shapes()], x, bias, scale)


class SparseRows:
    """The product with compressed sparse rows in native code, in evaluation."""

    name: costs.Path = "csr"

    def applies(self, case: Case) -> bool:
        """As ``Way.applies``: a single matrix of density up to 5 %, where no gradient is needed."""
        if not (isinstance(case.method, Sparse) and case.whole and case.native and case.detached):
            return False
        return case.dense_ready and case.batch > 0 and case.method.kept <= _DENSITY * math.prod(case.method.shape)

    def cost(self, case: Case) -> float:
        """As ``Way.cost``: that of dense, times the density divided by 10 %."""
        dense = costs.dense_cost(case.method.shape, 1, case.batch, case.dense_ready)
        return dense * cast(Sparse, case.method).kept / (2 * _DENSITY * math.prod(case.method.shape))

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """As ``Way.run``; copies operands that are not contiguous."""
        rows, cols = weight.decoder.shape
        columns, starts = weight.sparse_rows()
        values = weight.floats()["values"].detach() * weight.parts[index].scale
        items = x.detach().resolve_neg().reshape(-1, cols).contiguous()
        shift = None if bias is None else array_of(bias.resolve_neg().contiguous())
        threads = torch.get_num_threads()
        y = products.csr_linear(
            (rows, cols), array_of(values), columns, starts, array_of(items), shift, threads=threads
        )
        return torch.from_numpy(y).view(*x.shape[:-1], rows)


class SymbolLookUp:
    """The product with one-byte symbols in native code, which reads the stored tensor; a packed copy could be stale."""

    name: costs.Path = "symbols"

    def applies(self, case: Case) -> bool:
        """As ``Way.applies``: a single matrix, few items, no gradient, and a processor with fast look-ups."""
        if not (isinstance(case.method, Symbols) and case.direct and case.whole and case.native and case.detached):
            return False
        return case.dense_ready and costs.symbols_pay(case.method, case.batch, case.levels)

    def cost(self, case: Case) -> float:
        """As ``Way.cost``: half of dense, an upper bound measured where the way applies."""
        return costs.dense_cost(case.method.shape, 1, case.batch, case.dense_ready) / 2

    def run(self, weight: Weight, x: Tensor, index: int, bias: Tensor | None) -> Tensor:
        """As ``Way.run``; the part's scale is multiplied into the steps or centres."""
        state, scale = weight.state(), weight.parts[index].scale
        floats = {e: t if scale == 1.0 else t * scale for e, t in state.items() if t.is_floating_point()}
        return symbol_linear(x, state["symbols"], bias, **floats)


DENSE, IN_TURN = DenseWeight(), FactorsInTurn()
OPERATOR, CORES = NativeFactored("native-auto"), NativeCores()
WAYS: tuple[Way, ...] = (
    DENSE,
    Factored("factors"),
    Factored("fft"),
    Factored("direct"),
    NativeFactored("native-direct"),
    NativeFactored("native-fft"),
    OPERATOR,
    IN_TURN,
    CORES,
    SparseRows(),
    SymbolLookUp(),
)
"""Every way; among equal costs the first is chosen."""


def timed_device(x: Tensor) -> str:
    """The device of a product, as a ``Case`` has it.

    Args:
        x: The inputs.

    Returns:
        Its type; ``reduced`` on an accelerator whose matrix units multiply in less than single precision, which only
        the decoded weight can use: by the type of x, by autocast, or by TensorFloat-32.
    """
    device = x.device.type
    if device == "cpu":
        return device
    exact = x.dtype is torch.float32 and not torch.is_autocast_enabled(device)
    return device if exact and _is_exact() else "reduced"


def _is_exact() -> bool:
    """Whether products of float32 are computed in float32 on CUDA devices."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch says so where only the newer setting was made
        return torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")


def choose(case: Case) -> Way:
    """The way with the least predicted cost.

    Args:
        case: The plan, the batch and the operands.

    Returns:
        The first of the cheapest ways in ``WAYS`` that apply; the operator in a compiled graph.
    """
    if case.traced:  # the batch may be symbolic, so the choice depends on the plan alone
        return CORES if case.window is None else OPERATOR
    return DENSE if case.window is None and not case.whole else _least(case)


@lru_cache(maxsize=4096)
def _least(case: Case) -> Way:
    return min((way for way in WAYS if way.applies(case)), key=lambda way: way.cost(case))


@lru_cache(maxsize=4096)
def _factored(case: Case) -> dict[costs.Path, float]:
    """Predicted nanoseconds of every way for a plan."""
    return costs.costs(cast(Window, case.window).plan, case.batch, case.dense_ready, case.device)


@lru_cache(maxsize=4096)
def operator_pays(window: Window) -> bool:
    """Whether a compiled graph uses the operator instead of the decoded weight: one choice for all batches.

    Args:
        window: The plan of the factors, and where the matrix begins in their product.

    Returns:
        Whether the operator is predicted to be faster for 32 items.
    """
    return costs.choose(window.plan, TYPICAL_BATCH, False, native=True) != "dense"


@lru_cache(maxsize=4096)
def chain_pays(method: Method) -> bool:
    """Whether a compiled graph uses the operator of chains instead of the decoded weight: one choice for all batches.

    Args:
        method: The method that decodes the weight.

    Returns:
        Whether it is a chain, for which the operator is predicted to be faster for 32 items.
    """
    layout = chains.layout_of(method)
    if layout is None:
        return False
    return CORES.cost(case := Case(method, None, TYPICAL_BATCH, False)) < DENSE.cost(case)
