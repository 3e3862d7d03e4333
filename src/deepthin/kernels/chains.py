"""The native product of inputs with a chain of small cores, for numpy arrays, and beside it the definition in numpy.

Novikov, Podoprikhin, Osokin and Vetrov, 2015, "Tensorizing neural networks"; a sum of Kronecker products is a chain of
two cores. csrc/cores.h has the order of the products, docs/performance.md counts them.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float, Float32, Float64

from deepthin.kernels import products
from deepthin.method import Chain, Method

MOST_CORES = 8  # as csrc/kernels.h has it
Sizes = tuple[int, int, int, int]
"""Of a core: r_(k-1), R_k, Q_k, r_k."""


class Layout(NamedTuple):
    """A chain as native code reads it.

    Attributes:
        shape: (rows, cols) of the matrix.
        sizes: Those of each core.
        steps: How many entries lie from one to the next, along each axis of each core.
    """

    shape: tuple[int, int]
    sizes: tuple[Sizes, ...]
    steps: tuple[Sizes, ...]

    def numbers(self) -> list[int]:
        """Sizes and steps of each core in turn, in one list."""
        return [n for sizes, steps in zip(self.sizes, self.steps, strict=True) for n in (*sizes, *steps)]


@lru_cache(maxsize=1024)
def layout_of(method: Method) -> Layout | None:
    """How the entries of a method's code are the cores of a chain.

    Args:
        method: Any method.

    Returns:
        Its layout; None where it is no chain, where its cores are not the entries themselves, their axes permuted, or
        where there are more than native code takes.
    """
    if not isinstance(method, Chain):
        return None
    code: dict[str, Any] = {entry: np.empty(shape, np.float32) for entry, shape in method.code_shapes().items()}
    cores = cast(list[np.ndarray], method.cores(code, cast(Any, np)))
    if len(cores) != len(code) or len(cores) > MOST_CORES:
        return None
    for core, entry in zip(cores, code.values(), strict=True):
        if core.ndim != 4 or core.size != entry.size or core.ctypes.data != entry.ctypes.data:
            return None
    steps = [tuple(stride // core.itemsize for stride in core.strides) for core in cores]
    if any(_span(core.shape, step) != core.size for core, step in zip(cores, steps, strict=True)):
        return None
    return Layout(method.shape, cast(Any, tuple(core.shape for core in cores)), cast(Any, tuple(steps)))


def _span(shape: Sequence[int], steps: Sequence[int]) -> int:
    """From the first entry to behind the last one."""
    return 1 + sum((count - 1) * step for count, step in zip(shape, steps, strict=True))


@lru_cache(maxsize=1024)
def native_chain(layout: Layout) -> Any:
    """The native product of a chain.

    Args:
        layout: Sizes and steps of its cores.

    Returns:
        An object with ``forward`` and ``backward``, which take addresses.

    Raises:
        ValueError: The cores do not fit each other or the matrix.
        RuntimeError: There is no native code; the message says why.
    """
    return products.native().Cores(*layout.shape, layout.numbers())


def core_linear(
    shape: tuple[int, int],
    cores: Sequence[Float32[np.ndarray, "before rows cols after"]],
    x: Float32[np.ndarray, "batch cols"],
    bias: Float32[np.ndarray, " rows"] | None = None,
    *,
    threads: int = 1,
) -> Float32[np.ndarray, "batch rows"]:
    """``x @ W.T + bias`` without building W.

    The error of an output is a few float32 roundings of the sum of all products of magnitudes of x and of the cores. An
    item whose outputs are not all finite is computed by the weights themselves, so that NaN and infinity come out as
    from a dense product.

    Args:
        shape: (rows, cols) of W.
        cores: 1 to 8 arrays, float32, r_(k-1) x R_k x Q_k x r_k, with ranks of 1 at both ends; the products of the R_k
            and of the Q_k are at least rows and cols.
        x: Inputs, float32.
        bias: One float32 per output, or None.
        threads: Upper bound on the threads, from 1; the bits of the result do not depend on it, nor on the batch.

    Returns:
        The outputs, float32.

    Raises:
        TypeError: An array is not float32, or is masked.
        ValueError: Shapes do not fit.
        RuntimeError: There is no native code.
    """
    chain, addresses, _ = _checked(shape, cores)
    x = products.checked("x", x, (len(x), shape[1]))
    bias = None if bias is None else products.checked("bias", bias, shape[:1])
    y = np.empty((len(x), shape[0]), np.float32)
    chain.forward(
        addresses, x.ctypes.data, 0 if bias is None else bias.ctypes.data, y.ctypes.data, len(x), 1.0, threads
    )
    return y


def core_gradients(
    shape: tuple[int, int],
    cores: Sequence[Float32[np.ndarray, "before rows cols after"]],
    grad: Float32[np.ndarray, "batch rows"],
    x: Float32[np.ndarray, "batch cols"],
    *,
    threads: int = 1,
) -> tuple[Float32[np.ndarray, "batch cols"], list[Float32[np.ndarray, "before rows cols after"]]]:
    """The gradients of x and of the cores, without building W.

    Args:
        shape: (rows, cols) of W.
        cores: As ``core_linear`` takes them.
        grad: Gradient of the outputs.
        x: Inputs, float32.
        threads: Upper bound on the threads, from 1; the bits of the result do not depend on it.

    Returns:
        The gradient of x, and that of each core.

    Raises:
        TypeError: As ``core_linear``.
        ValueError: As ``core_linear``.
        RuntimeError: There is no native code.
    """
    chain, addresses, cores = _checked(shape, cores)
    x, grad = products.checked("x", x, (len(x), shape[1])), products.checked("grad", grad, (len(x), shape[0]))
    of_x, of_cores = np.empty_like(x), [np.empty_like(core) for core in cores]
    of_cores_at = [core.ctypes.data for core in of_cores]
    arrays = (a.ctypes.data for a in (x, grad, of_x))
    chain.backward(addresses, *arrays, of_cores_at, len(x), 1.0, threads)
    return of_x, of_cores


def core_reference(
    shape: tuple[int, int],
    cores: Sequence[Float[np.ndarray, "before rows cols after"]],
    x: Float[np.ndarray, "batch cols"],
    bias: Float[np.ndarray, " rows"] | None = None,
) -> Float64[np.ndarray, "batch rows"]:
    """The definition of ``core_linear`` in float64: the weight is built from its cores, then multiplied.

    Args:
        shape: (rows, cols) of W.
        cores: r_(k-1) x R_k x Q_k x r_k each.
        x: Inputs.
        bias: One number per output, or None.

    Returns:
        ``x @ W.T + bias`` for ``W[(i1..id), (j1..jd)] = g1[:, i1, j1, :] .. gd[:, id, jd, :]``, cut to rows x cols.
    """
    weight = np.ones((1, 1, 1))
    for core in cores:
        weight = np.einsum("ija,aklb->ikjlb", weight, core.astype(np.float64))
        weight = weight.reshape(math.prod(weight.shape[:2]), math.prod(weight.shape[2:4]), -1)
    return x.astype(np.float64) @ weight[: shape[0], : shape[1], 0].T + (0.0 if bias is None else bias)


def _checked(shape: tuple[int, int], cores: Sequence[np.ndarray]) -> tuple[Any, list[int], list[np.ndarray]]:
    """The native product, and the cores with their addresses."""
    cores = [products.checked(f"core {k}", core, core.shape) for k, core in enumerate(cores)]
    if any(core.ndim != 4 for core in cores):
        raise ValueError(f"Cores have four axes; these have {[core.ndim for core in cores]}.")
    steps = [tuple(stride // 4 for stride in core.strides) for core in cores]
    layout = Layout(shape, cast(Any, tuple(core.shape for core in cores)), cast(Any, tuple(steps)))
    return native_chain(layout), [core.ctypes.data for core in cores], cores
