"""The predicted time of each way to multiply inputs by a compressed weight, and which is least: pure functions.

The counts are those of docs/performance.md; the times were fitted to one machine. A framework adds the overhead of its
calls.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from deepthin.kernels.chains import Layout, Sizes, layout_of
from deepthin.method import InTurn, Symbols
from deepthin.methods.factor import Factor

Path = Literal[
    "dense", "factors", "direct", "fft", "native-direct", "native-fft", "native-auto", "native-cores", "csr", "symbols"
]
"""Multiply by the decoded weight, its factors in turn, structured in torch or in native code, sparse rows, symbols."""

NATIVE: tuple[Path, ...] = ("native-direct", "native-fft", "native-auto")
NEAR, FAR = 1 << 15, 2.5  # correlations of so many positions and filters stay in the caches; others take times as long
PIECE, LEAST_PIECE = 4096, 2048  # inputs that native code takes at a time, as csrc/linear.cpp has them
LANES, FEW = 8, 3  # native code takes one item per SIMD lane; a remainder of at most FEW items goes one by one

# Nanoseconds for each of `terms`, on one core in single precision, fitted by benchmarks/fit_costs.py to timings: of a
# product with nothing to record, the dense weight at hand, and of a training step, the dense weight to be made.
# A choice by them takes 1 % longer than the best one with native code (training: 3 %), 3 to 6 % in torch, on average.
_NANOSECONDS: dict[bool, dict[str, tuple[float, ...]]] = {
    True: {
        "dense": (7.43e3, 0.0243, 0.0974, 0.0),
        "factors": (1.3e4, 0.04, 0.2),
        "fft": (2.14e5, 0.253, 0.0252, 3.41, 1.19, 87.1),
        "direct": (1.2e5, 0.068, 0.622, 0.0469, 2.89, 1.25, 345.0),
        "native-direct": (4.78e3, 0.024, 0.0905, 2.11, 0.12, 0.168),
        "native-fft": (4.75e3, 1.08, 0.076, 1.32, 0.591, 0.16),
    },
    False: {
        "dense": (1.85e5, 0.0769, 1.28, 0.327),
        "factors": (1.2e5, 0.12, 0.6),
        "fft": (5.47e5, 0.566, 0.0851, 11.0, 3.53, 172.0),
        "direct": (4.13e5, 0.198, 1.25, 0.111, 8.2, 7.03, 1560.0),
        "native-direct": (1.73e5, 0.243, 0.809, 10.4, 0.525, 0.698),
        "native-fft": (1.61e5, 12.6, 0.651, 3.16, 3.26, 0.636),
    },
}

# Of torch's convolution: a call, a multiplication, an entry of the kernel, and a summand of an entry that is decoded;
# of one by factors: a call of the module, and an entry of a window or of outputs that is moved (fit_costs.py).
_CONVOLUTION = {True: (2.77e4, 0.0199, 1.06, 0.0), False: (1.27e5, 0.0675, 8.83, 0.345)}
_WIDEST = 16  # lanes of the widest instruction set
_WINDOWS = {True: (6e4, 0.136), False: (1.5e5, 1.19)}
# The same on a CUDA device, in full single precision; `python benchmarks/gpu.py --fit` fits them. These follow from
# timings on an H100 (docs/performance.md): a call from the smaller layers, a multiplication from 4096 x 4096 by 4096
# items, an entry from 2048 x 2048 and 4096 x 4096 by one item. What 4096 items took longer than 256 by FFT is divided
# evenly among its three counts, which one plan cannot tell apart. In training, the passes over a decoded weight are
# added at the speed of memory. A way that is not listed is not taken there.
_ON_CUDA: dict[bool, dict[str, tuple[float, ...]]] = {
    True: {
        "dense": (1.2e4, 3.96e-5, 0.0012, 0.0),
        "fft": (4.4e5, 4.3e-4, 2.6e-4, 0.0, 0.0054, 0.0),
    },
    False: {
        "dense": (2.5e5, 1.15e-4, 0.0078, 1.2e-4),
        "fft": (1.9e6, 4.8e-4, 2.9e-4, 0.0, 0.006, 0.0),
    },
}

_NO_TIMES: dict[str, tuple[float, ...]] = {"dense": (0.0, 0.0, 0.0, 0.0)}  # elsewhere only the decoded weight is taken

_SYMBOL_ITEMS, _SYMBOL_AREA = 8, 1 << 21
_IN_TURN = {
    "cpu": {True: (2.68e4, 0.0345, 0.83), False: (1.18e5, 0.153, 4.57)},
    "cuda": {
        True: (2.2e5, 1.6e-4, 0.0),
        False: (9.5e5, 4.6e-4, 0.0),
    },  # not measured: as by FFT, 4 times a dense product's
}  # of Kronecker sums and tensor trains in a framework's operations, for `in_turn_terms`
_CHAIN = {
    True: (2.81e3, 0.0192, 0.239, 0.0795),
    False: (1.04e5, 0.102, 1.05, 1.17),
}  # of the same in native code: `chain_terms`


def terms(method: Factor, batch: int) -> dict[Path, tuple[int | float, ...]]:
    """The counts that the time of each way to multiply depends on.

    Args:
        method: The factored weight: shape (rows, cols), n and rank.
        batch: Number of items, >= 1.

    Returns:
        For every way that applies, its counts: 1 for the call, then multiplications and entries moved
        (docs/performance.md), in the order of the fitted times.
    """
    (rows, cols), n, rank = method.shape, method.n, method.rank
    area = rows * cols
    counts: dict[Path, tuple[int | float, ...]] = {"dense": (1, batch * area, area, area * rank)}
    if method.seed is not None:
        return counts
    counts |= _native_terms(rows, cols, n, rank, batch)
    if n == cols:
        return {**counts, "factors": (1, batch * rank * (rows + cols), rank * (rows + cols))}
    if math.gcd(n, cols) > 1:
        return counts
    length = n * -(-(cols + n - 1) // n)
    points = fft_length(length)
    taps = rows * length // n * rank  # multiplications for one item, and entries gathered once for all
    phases = (batch * taps, taps, batch * (rank * length + rows), n)
    transforms = batch * points * math.log2(points) * (1 + rank)
    windows = (batch * rank * length * n, batch * rank * length)
    return {**counts, "fft": (1, transforms, *phases), "direct": (1, *windows, *phases)}


def _native_terms(rows: int, cols: int, n: int, rank: int, batch: int) -> dict[Path, tuple[int | float, ...]]:
    """What docs/performance.md counts: both stages, for items computed one by one and for one item per SIMD lane."""
    alone = batch % LANES if batch % LANES <= FEW else 0
    blocks = -(-(batch - alone) // LANES)
    moved = blocks * (rows + cols)
    terms_of_output = -(-(cols + n - 1) // n) * rank
    taps = rows * terms_of_output
    if n == cols:
        multiplies = rank * (rows + cols)
        return {"native-direct": (1, alone * multiplies, 0, moved, blocks * multiplies, 0)}
    window = rank * n * (cols + n)
    padded = rows * LANES * -(-terms_of_output // LANES)  # whole vectors
    least = max(PIECE // rank, LEAST_PIECE, 8 * n)
    pieces = cols // least if cols >= 2 * least else 1
    points, points1 = fft_length((-(-cols // pieces) + n) // 2), fft_length(-(-(cols + n - 1) // (2 * LANES)))
    transforms = (1 + rank) * pieces * points * math.log2(points)
    if rank * (-(-cols // pieces) + n) > NEAR:
        transforms *= FAR
    transforms1 = points1 * ((1 + rank) * math.log2(points1) + rank * LANES)
    return {
        "native-direct": (1, alone * window, alone * padded, moved, blocks * window, blocks * taps),
        "native-fft": (1, alone * transforms1, alone * padded, moved, blocks * transforms, blocks * taps),
    }


def _times(dense_ready: bool, device: str) -> dict[str, tuple[float, ...]]:
    if device == "cpu":
        return _NANOSECONDS[dense_ready]
    return _ON_CUDA[dense_ready] if device == "cuda" else _NO_TIMES


def costs(method: Factor, batch: int, dense_ready: bool, device: str = "cpu") -> dict[Path, float]:
    """Predicted time of each way to multiply.

    Args:
        method: The factored weight.
        batch: Number of items, >= 1.
        dense_ready: Whether the dense weight is cached, and no gradient is wanted.
        device: Type of the device, as torch calls it: ``cpu`` is one core.

    Returns:
        Nanoseconds, for every way that applies and whose times on the device are known: elsewhere the decoded weight
        alone, as 0.
    """
    weights = _times(dense_ready, device)
    return {
        path: sum(w * c for w, c in zip(weights[path], counts, strict=True))
        for path, counts in terms(method, batch).items()
        if path in weights
    }


def work(method: Factor, batch: int, dense_ready: bool) -> dict[Path, float]:
    """Predicted time of each way to multiply, without the fixed time of a call.

    Args:
        method: The factored weight.
        batch: Number of items, >= 1.
        dense_ready: Whether the dense weight is cached, and no gradient is wanted.

    Returns:
        Nanoseconds on one core that grow with the product, for every way that applies.
    """
    return {path: cost - _NANOSECONDS[dense_ready][path][0] for path, cost in costs(method, batch, dense_ready).items()}


@lru_cache(maxsize=4096)
def choose(method: Factor, batch: int, dense_ready: bool, native: bool = False) -> Path:
    """The way to multiply with the least predicted time.

    A pure function of its arguments, so that a reloaded model computes the same bits.

    Args:
        method: The factored weight.
        batch: Number of items, >= 0.
        dense_ready: Whether the dense weight is cached, and no gradient is wanted.
        native: Whether to choose between the dense way and those in native code, instead of those in torch.

    Returns:
        The way; ``"dense"`` for an empty batch.
    """
    if batch == 0:
        return "dense"  # FFT libraries refuse empty batches
    predicted = costs(method, batch, dense_ready)
    return min(
        (path for path in predicted if path == "dense" or (path in NATIVE) == native), key=lambda p: predicted[p]
    )


def repeated_dense_work(shape: tuple[int, int], summands: int, items: int, calls: int, dense_ready: bool) -> float:
    """Predicted nanoseconds of so many products of ``items`` each by one decoded weight, made once if it is not ready.

    Without what each call takes, as ``work``. Every product reads the weight, whoever made it.
    """
    _, multiplication, entry, summand = _NANOSECONDS[dense_ready]["dense"]
    reading = _NANOSECONDS[True]["dense"][2]
    made = 0.0 if dense_ready else entry + summand * summands
    return math.prod(shape) * (calls * (multiplication * items + reading) + made)


def dense_cost(shape: tuple[int, int], summands: int, batch: int, dense_ready: bool, device: str = "cpu") -> float:
    """Predicted time of a product by the decoded weight.

    Args:
        shape: (rows, cols) of the weight.
        summands: Products that are summed for each weight when it is decoded.
        batch: Number of items.
        dense_ready: Whether the dense weight is cached, and no gradient is wanted.
        device: Type of the device.

    Returns:
        Nanoseconds; 0 where the times of the device are not known.
    """
    area = math.prod(shape)
    counts = (1, batch * area, area, area * summands)
    return sum(w * c for w, c in zip(_times(dense_ready, device)["dense"], counts, strict=True))


def convolution_costs(method: Factor, groups: int, items: int, dense_ready: bool) -> tuple[float, float]:
    """Predicted times of a convolution: by the decoded kernel, and by the factors in native code.

    Args:
        method: The factors of one group's kernel: outputs x (inputs * taps).
        groups: Groups of channels.
        items: Positions of all images of outputs.
        dense_ready: Whether the dense weight is cached, and no gradient is wanted.

    Returns:
        Nanoseconds on one core.
    """
    (rows, cols), area = method.shape, groups * math.prod(method.shape)
    counts = (1, items * area, area, 0 if dense_ready else area * method.rank)
    dense = sum(w * c for w, c in zip(_CONVOLUTION[dense_ready], counts, strict=True))
    call, entry = _WINDOWS[dense_ready]
    return dense, call + groups * (windows_work(method, items, dense_ready) + entry * items * (rows + cols))


def windows_work(method: Factor, items: int, dense_ready: bool) -> float:
    """Predicted time of the native product of windows, without the call and what is moved: its last lanes may be empty.

    Args:
        method: The factors of one group's kernel.
        items: Positions of all images of outputs.
        dense_ready: Whether the dense weight is cached, and no gradient is wanted.

    Returns:
        Nanoseconds on one core.
    """
    predicted = work(method, -(-items // _WIDEST) * _WIDEST, dense_ready)
    return min(cost for path, cost in predicted.items() if path in NATIVE)


def in_turn_cost(method: InTurn, batch: int, dense_ready: bool, device: str = "cpu") -> float:
    """Predicted time of a product by the factors one after the other.

    Args:
        method: The method, which has factors to multiply by.
        batch: Number of items.
        dense_ready: Whether the dense weight is cached, and no gradient is wanted.
        device: Type of the device.

    Returns:
        Nanoseconds; infinite where the times of the device are not known.
    """
    if device not in _IN_TURN:
        return math.inf
    return sum(w * c for w, c in zip(_IN_TURN[device][dense_ready], in_turn_terms(method, batch), strict=True))


def in_turn_terms(method: InTurn, batch: int) -> tuple[int, int, int]:
    """The counts that the time of a product by one factor after the other depends on, in operations of a framework.

    Args:
        method: The method, which has factors to multiply by.
        batch: Number of items.

    Returns:
        Factors, multiplications, and entries of the arrays between them.
    """
    layout = layout_of(method)
    moved = min(_chain_work(layout.sizes), _chain_work(_mirrored(layout.sizes)))[1] if layout else method.inputs()
    return len(method.code_shapes()), batch * method.multiplies(), batch * moved


def chain_terms(layout: Layout, batch: int) -> tuple[int, int, int, int]:
    """The counts that the time of the native product with a chain of cores depends on.

    Args:
        layout: Its cores.
        batch: Number of items, >= 1.

    Returns:
        1 for the call, multiplications of whole vectors, entries of the arrays between steps, entries of the cores.
    """
    multiplies, moved = min(_chain_work(layout.sizes), _chain_work(_mirrored(layout.sizes)))
    return 1, batch * multiplies, batch * moved, sum(math.prod(sizes) for sizes in layout.sizes)


def _mirrored(sizes: Sequence[Sizes]) -> list[Sizes]:
    return [(after, rows, cols, rank) for rank, rows, cols, after in sizes[::-1]]


def _chain_work(sizes: Sequence[Sizes]) -> tuple[int, int]:
    """Multiplications of whole vectors and entries of the arrays between steps, from the first core to the last."""
    rest, done = math.prod(cols for _, _, cols, _ in sizes), 1
    multiplies, moved = 0, rest
    for rank, rows, cols, after in sizes:
        multiplies += done * rest * rank * -(-rows * after // LANES) * LANES
        rest, done = rest // cols, done * rows
        moved += rest * done * after
    return multiplies, moved


@lru_cache(maxsize=4096)
def chain_cost(layout: Layout, batch: int, dense_ready: bool) -> float:
    """Predicted time of the native product with a chain of cores.

    Args:
        layout: Its cores.
        batch: Number of items, >= 1.
        dense_ready: Whether no gradient is wanted.

    Returns:
        Nanoseconds on one core.
    """
    return sum(w * c for w, c in zip(_CHAIN[dense_ready], chain_terms(layout, batch), strict=True))


def chain_work(layout: Layout, items: int, calls: int, dense_ready: bool) -> float:
    """Predicted time of so many native products with a chain of cores, which are packed once.

    Args:
        layout: The cores.
        items: Items of each product, >= 1.
        calls: Number of products.
        dense_ready: Whether no gradient is wanted.

    Returns:
        Nanoseconds on one core, without what each call takes.
    """
    _, multiplication, moved, packed = _CHAIN[dense_ready]
    _, multiplies, entries, floats = chain_terms(layout, items)
    return calls * (multiplication * multiplies + moved * entries) + packed * floats


def symbols_pay(method: Symbols, batch: int, levels: tuple[int, int]) -> bool:
    """Whether native code that reads symbols of one byte is faster than the cached dense weight.

    Measured (docs/performance.md): for few items, where table look-ups are quick. Tables that take two look-ups and a
    choice gain on matrices that do not fit the nearer caches.

    Args:
        method: The method, with one symbol for each weight.
        batch: Number of items.
        levels: How many table entries the instruction set looks up at once, and the most that it looks up at all
            (``products.levels``).

    Returns:
        True if the symbols should be multiplied as they are.
    """
    once, most = levels
    if not 0 < batch <= _SYMBOL_ITEMS or most == 0:
        return False
    table = method.table_levels()
    if table is None:
        return method.integers()["symbols"].count <= 256
    return table <= (most if math.prod(method.shape) >= _SYMBOL_AREA else once)


@lru_cache(maxsize=4096)
def choose_native(method: Factor, batch: int, training: bool) -> Path:
    """The faster of the correlations that native code has, by predicted time.

    Args:
        method: The factored weight, without a seed.
        batch: Number of items, >= 1.
        training: Whether a gradient is wanted.

    Returns:
        One of ``NATIVE``.
    """
    predicted = costs(method, batch, dense_ready=not training)
    return min((path for path in predicted if path in NATIVE), key=lambda path: predicted[path])


def fft_length(least: int) -> int:
    """The smallest even number of the form 2^a 3^b 5^c that is at least ``least``: a length that transforms fast.

    Args:
        least: Lower bound, >= 1.

    Returns:
        The length.
    """
    best = 1 << max(least - 1, 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = max(2, 1 << (-(-least // three) - 1).bit_length())
            best = min(best, three * two)
            three *= 3
        five *= 5
    return best
