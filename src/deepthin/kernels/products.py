"""The compiled product of inputs with a factored weight, for numpy arrays, and beside it the definition in numpy.

Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, section 3; docs/performance.md derives what csrc/ computes. One source
is compiled for several instruction sets; the best that the processor runs is taken at import, or the one that the
environment variable DEEPTHIN_ISA names (v2, v3, v4 for x86-64 levels; ``none`` for no native code at all). Without a
compiler at installation there is no native module: ``native_available`` is false, and torch operations serve instead.
"""

import os
from importlib import import_module
from types import ModuleType
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int8, UInt8, UInt16, UInt32

from deepthin.coding import huffman
from deepthin.errors import ConfigError
from deepthin.methods.factor import Factor

Correlation = Literal["direct", "fft"]
"""How the input is correlated with the rows of wf: by definition, or by fast Fourier transforms."""


def _load() -> tuple[ModuleType | None, str]:
    """The native module; or None, and why there is none."""
    asked = os.environ.get("DEEPTHIN_ISA", "")
    if asked == "none":
        return None, "DEEPTHIN_ISA=none"
    try:
        native = import_module("deepthin._native")
    except ModuleNotFoundError:
        return None, "deepthin was installed without a C++ compiler; install one, then deepthin again"
    except ImportError as error:
        return None, str(error)
    if not native.select(asked):
        raise ConfigError(f"DEEPTHIN_ISA={asked!r}: this machine runs {', '.join(native.isas())}, or none.")
    return native, ""


_native, why_not = _load()
native_available = _native is not None


def isa() -> str:
    """The instruction set in use.

    Returns:
        ``v2``, ``v3``, ``v4`` or ``baseline``; ``none`` without native code.
    """
    return "none" if _native is None else _native.isa()


def isas() -> tuple[str, ...]:
    """The compiled instruction sets that this machine can run.

    Returns:
        Their names; empty without native code.
    """
    return () if _native is None else tuple(_native.isas())


def levels() -> tuple[int, int]:
    """How many shared values ``symbol_linear`` can look up.

    Returns:
        The number that one look-up covers, and the most that it takes; (0, 0) where look-ups would not be faster than
        the dense product, or without native code.
    """
    return (0, 0) if _native is None else _native.levels()


def native() -> ModuleType:
    """The native module.

    Returns:
        ``deepthin._native``.

    Raises:
        RuntimeError: There is no native code; the message says why.
    """
    if _native is None:
        raise RuntimeError(f"deepthin has no native kernels here: {why_not}.")
    return _native


def linear(
    method: Factor,
    x: Float32[np.ndarray, "batch cols"],
    xf: Float32[np.ndarray, "m r"],
    wf: Float32[np.ndarray, "r n"],
    bias: Float32[np.ndarray, " rows"] | None = None,
    *,
    relu: bool = False,
    correlation: Correlation = "fft",
    offset: int = 0,
    threads: int = 1,
) -> Float32[np.ndarray, "batch rows"]:
    """``x @ W.T + bias``, rectified if asked, without building W.

    The error of an output is a few float32 roundings of sum |x| |W| with ``direct``; with ``fft`` it is relative to the
    largest input of the item. An item whose outputs are not all finite is computed entry by entry, so that NaN and
    infinity come out as from a dense product.

    Args:
        method: The plan: shape (rows, cols), n and rank; without a seed.
        x: Inputs, float32.
        xf: Left factor, float32, m x rank with m = ceil((offset + rows * cols) / n).
        wf: Right factor, float32, rank x n.
        bias: One float32 per output, or None.
        relu: Whether to rectify the outputs.
        correlation: How the input is correlated with the rows of wf.
        offset: Entry of the factors' product at which W begins, from 0 to n - 1.
        threads: Upper bound on the threads, from 1; the bits of the result do not depend on it.

    Returns:
        The outputs, float32.

    Raises:
        TypeError: An array is not float32, or is masked.
        ValueError: An array has the wrong shape, or the plan, the offset or the correlation is out of range.
        RuntimeError: There is no native code; the message says why.
    """
    x, xf, wf, bias = _checked(method, offset, correlation, x=x, xf=xf, wf=wf, bias=bias)
    y = np.empty((len(x), method.shape[0]), np.float32)
    native().forward(
        *_plan(method, offset), *map(_address, (x, xf, wf, bias, y)), len(x), correlation == "fft", relu, threads
    )
    return y


def linear_gradients(
    method: Factor,
    grad: Float32[np.ndarray, "batch rows"],
    x: Float32[np.ndarray, "batch cols"],
    xf: Float32[np.ndarray, "m r"],
    wf: Float32[np.ndarray, "r n"],
    *,
    correlation: Correlation = "fft",
    offset: int = 0,
    threads: int = 1,
) -> tuple[Float32[np.ndarray, "batch cols"], Float32[np.ndarray, "m r"], Float32[np.ndarray, "r n"]]:
    """The gradients of x, xf and wf, without building W.

    Args:
        method: The plan: shape (rows, cols), n and rank; without a seed.
        grad: Gradient of the outputs of ``linear``, before bias and rectifier.
        x: Inputs, float32.
        xf: Left factor, float32.
        wf: Right factor, float32.
        correlation: How the input is correlated with the rows of wf.
        offset: Entry of the factors' product at which W begins, from 0 to n - 1.
        threads: Upper bound on the threads, from 1; the bits of the result do not depend on it.

    Returns:
        The gradients of x, xf and wf, float32, each shaped as its operand.

    Raises:
        TypeError: As ``linear``.
        ValueError: As ``linear``.
        RuntimeError: There is no native code.
    """
    x, xf, wf, _ = _checked(method, offset, correlation, x=x, xf=xf, wf=wf, bias=None)
    grad = checked("grad", grad, (len(x), method.shape[0]))
    grads = np.empty_like(x), np.empty_like(xf), np.empty_like(wf)
    native().backward(
        *_plan(method, offset), *map(_address, (x, xf, wf, grad, *grads)), len(x), correlation == "fft", threads
    )
    return grads


def csr_linear(
    shape: tuple[int, int],
    values: Float32[np.ndarray, " entries"],
    columns: Int[np.ndarray, " entries"],
    starts: Int[np.ndarray, " starts"],
    x: Float32[np.ndarray, "batch cols"],
    bias: Float32[np.ndarray, " rows"] | None = None,
    *,
    threads: int = 1,
) -> Float32[np.ndarray, "batch rows"]:
    """``x @ W.T + bias`` for a sparse W in compressed rows: row j has ``values[starts[j]:starts[j + 1]]``.

    Comparisons use it as the product of pruned weights.

    Args:
        shape: Rows and cols of W.
        values: Nonzero weights, float32, row by row.
        columns: Column of each value, from 0 to cols - 1.
        starts: Index of each row's first value, rising from 0, and at the end the number of values: rows + 1 integers.
        x: Inputs, float32.
        bias: One float32 per output, or None.
        threads: Upper bound on the threads, from 1.

    Returns:
        The outputs, float32.

    Raises:
        TypeError: An array of numbers is not float32, or one of indices holds no integers.
        ValueError: Shapes do not fit, or an index lies outside the matrix.
        RuntimeError: There is no native code.
    """
    x = checked("x", x, (len(x), shape[1]))
    values = checked("values", values, (len(values),))
    if columns.shape != values.shape or starts.shape != (shape[0] + 1,):
        raise ValueError(
            f"{len(values)} values need as many columns, and {shape[0]} rows one start more; "
            f"there are {len(columns)} and {len(starts)}, of shapes {columns.shape} and {starts.shape}."
        )
    if columns.dtype.kind not in "iu" or starts.dtype.kind not in "iu":
        raise TypeError(f"Columns and starts must be integers; they are {columns.dtype} and {starts.dtype}.")
    if columns.size and not 0 <= int(columns.min()) <= int(columns.max()) < shape[1]:
        raise ValueError(f"Columns go from {columns.min()} to {columns.max()}; the matrix has {shape[1]}.")
    columns, starts = np.ascontiguousarray(columns, np.int32), np.ascontiguousarray(starts, np.int64)
    bias = None if bias is None else checked("bias", bias, shape[:1])
    y = np.empty((len(x), shape[0]), np.float32)
    arrays = map(_address, (bias, x, y))
    native().csr(*map(_address, (values, columns, starts)), *shape, len(values), *arrays, len(x), threads)
    return y


def huffman_walk(
    data: UInt8[np.ndarray, " bytes"],
    start: int,
    lookup: UInt32[np.ndarray, " windows"],
    most: int,
    count: int,
    skip: int,
) -> tuple[UInt16[np.ndarray, " symbols"], int]:
    """``huffman.walk``, which is the definition, some fifty times faster where there is native code.

    Args:
        data: The stream, lowest bits first.
        start: Bit at which to begin, from 0.
        lookup: 2^width entries, 16 * symbol + bits of its code; width is from 1 to 15.
        most: Upper bound on the symbols that are read.
        count: Symbols other than ``skip`` to read.
        skip: The symbol that is not counted.

    Returns:
        The symbols, and the bit after the last code.

    Raises:
        ValueError: The stream ends too early, ``most`` is too small, or the table is invalid.
    """
    if _native is None:
        return huffman.walk(data, start, lookup, most, count, skip)
    data, lookup = np.ascontiguousarray(data, np.uint8), np.ascontiguousarray(lookup, np.uint32)
    symbols = np.empty(most, np.uint16)
    stream = _address(data), len(data), start, _address(lookup), len(lookup)
    read, end = _native.huffman_walk(*stream, _address(symbols), most, count, skip)
    if read < 0:
        raise ValueError(f"the bits end, or {most} symbols are read, before there are {count}")
    return symbols[:read], end


def symbol_linear(
    symbols: Int8[np.ndarray, "rows cols"] | UInt8[np.ndarray, "rows cols"],
    x: Float32[np.ndarray, "batch cols"],
    bias: Float32[np.ndarray, " rows"] | None = None,
    *,
    step: Float32[np.ndarray, "steps 1"] | None = None,
    least: Float32[np.ndarray, "steps 1"] | None = None,
    centres: Float32[np.ndarray, " levels"] | None = None,
    threads: int = 1,
) -> Float32[np.ndarray, "batch rows"]:
    """``x @ W.T + bias`` for a W of one byte a weight, which is not decoded: it is read where it lies.

    W is ``step * symbols`` (int8), ``least + step * symbols`` (uint8) or ``centres[symbols]`` (uint8). The error of an
    output is a few float32 roundings of sum |x| |W|, with least values of
    sum |x| (|least + 128 step| + step |symbols - 128|). NaN and infinity come out as from a dense product.

    Args:
        symbols: int8 with a step alone, else uint8.
        x: Inputs, float32.
        bias: One float32 per output, or None.
        step: float32: one for all rows, or one per row.
        least: float32, shaped as step; needs a step.
        centres: Shared values instead of a step, float32, 1 to ``levels()[1]`` of them.
        threads: Upper bound on the threads, from 1; the bits of the result do not depend on it.

    Returns:
        The outputs, float32.

    Raises:
        TypeError: An array has the wrong type.
        ValueError: Shapes do not fit, step and centres are both given or both missing, or a symbol has no centre.
        RuntimeError: There is no native code.
    """
    if symbols.ndim != 2 or (step is None) == (centres is None) or (least is not None and step is None):
        raise ValueError(
            f"A matrix of symbols has a step, or centres, and least values with a step; it is {symbols.shape}."
        )
    kind = np.int8 if centres is None and least is None else np.uint8
    if symbols.dtype != kind:
        raise TypeError(f"symbols are {symbols.dtype}: these weights have {np.dtype(kind)}.")
    (rows, cols), counts = symbols.shape, [a for a in (step, least) if a is not None]
    shape = (rows if step is not None and len(step) > 1 else 1, 1)
    steps = [checked(name, a, shape) for name, a in zip(("step", "least"), counts, strict=False)]
    steps += [None] * (2 - len(steps))
    if centres is not None:
        centres = checked("centres", centres, (centres.size,))
        if not 0 < len(centres) <= levels()[1]:
            raise ValueError(
                f"There are {len(centres)} centres: {isa()} looks up 1 to {levels()[1]}. Decode the weight."
            )
        if symbols.size and symbols.max() >= len(centres):
            raise ValueError(f"Symbols go up to {symbols.max()}; there are {len(centres)} centres.")
    symbols, x = np.ascontiguousarray(symbols), checked("x", x, (len(x), cols))
    bias = None if bias is None else checked("bias", bias, (rows,))
    y = np.empty((len(x), rows), np.float32)
    table = (_address(centres), 0 if centres is None else len(centres))
    arrays = map(_address, (bias, x, y))
    native().symbols(rows, cols, *map(_address, (symbols, *steps)), shape[0] > 1, *table, *arrays, len(x), threads)
    return y


def symbol_reference(
    symbols: Int[np.ndarray, "rows cols"],
    x: Float[np.ndarray, "batch cols"],
    bias: Float[np.ndarray, " rows"] | None = None,
    *,
    step: Float[np.ndarray, "steps 1"] | None = None,
    least: Float[np.ndarray, "steps 1"] | None = None,
    centres: Float[np.ndarray, " levels"] | None = None,
) -> Float64[np.ndarray, "batch rows"]:
    """The definition of ``symbol_linear`` in float64: the weight is decoded, then multiplied.

    Args:
        symbols: One integer for each weight.
        x: Inputs.
        bias: One number per output, or None.
        step: Distance of neighbouring levels: one for all rows, or one per row.
        least: Weight of the symbol 0, shaped as ``step``; None for 0.
        centres: Shared values, indexed by the symbols, instead of ``step`` and ``least``.

    Returns:
        ``x @ W.T + bias``.
    """
    if centres is not None:
        weight = centres.astype(np.float64)[symbols]
    else:
        weight = (1.0 if step is None else step.astype(np.float64)) * symbols + (0.0 if least is None else least)
    return x.astype(np.float64) @ weight.T + (0.0 if bias is None else bias)


def linear_reference(
    method: Factor,
    x: Float[np.ndarray, "batch cols"],
    xf: Float[np.ndarray, "m r"],
    wf: Float[np.ndarray, "r n"],
    bias: Float[np.ndarray, " rows"] | None = None,
    *,
    relu: bool = False,
    offset: int = 0,
) -> Float64[np.ndarray, "batch rows"]:
    """The definition of ``linear`` in float64: the weight is built from its factors, then multiplied.

    Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, section 3.

    Args:
        method: The plan: shape (rows, cols), n and rank; without a seed.
        x: Inputs.
        xf: Left factor, m x rank with m = ceil((offset + rows * cols) / n).
        wf: Right factor, rank x n.
        bias: One number per output, or None.
        relu: Whether to rectify the outputs.
        offset: Entry of the factors' product at which W begins, from 0 to n - 1.

    Returns:
        ``x @ W.T + bias``, rectified if asked.
    """
    rows, cols = method.shape
    product = xf.astype(np.float64) @ wf.astype(np.float64)
    weight = product.reshape(-1)[offset : offset + rows * cols].reshape(rows, cols)
    y = x.astype(np.float64) @ weight.T + (0.0 if bias is None else bias)
    return np.maximum(y, 0.0) if relu else y


def _plan(method: Factor, offset: int) -> tuple[int, int, int, int, int]:
    return *method.shape, method.n, method.rank, offset


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def _checked(
    method: Factor,
    offset: int,
    correlation: str,
    x: np.ndarray,
    xf: np.ndarray,
    wf: np.ndarray,
    bias: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """All operands as the native code reads them."""
    rows, cols = method.shape
    if correlation not in ("direct", "fft"):
        raise ValueError(f"correlation={correlation!r} must be 'direct' or 'fft'.")
    if method.seed is not None:
        raise ValueError("A shuffled weight has no product without the weight: decode it.")
    if not 0 <= offset < method.n:
        raise ValueError(f"The offset {offset} must be at least 0 and below n = {method.n}.")
    m = -(-(offset + rows * cols) // method.n)
    return (
        checked("x", x, (len(x), cols)),
        checked("xf", xf, (m, method.rank)),
        checked("wf", wf, (method.rank, method.n)),
        None if bias is None else checked("bias", bias, (rows,)),
    )


def checked(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An operand as native code reads it.

    Args:
        name: What it is called in messages.
        array: The operand.
        shape: Its shape.

    Returns:
        The array, row-major.

    Raises:
        TypeError: It is not float32, or is masked.
        ValueError: It has another shape.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: fill it first.")
    if array.dtype != np.float32:
        raise TypeError(f"{name} is {array.dtype}: the native kernels compute in float32.")
    if array.shape != shape:
        raise ValueError(f"{name} is {array.shape}: this plan needs {shape}.")
    return np.ascontiguousarray(array)
