"""``x @ W.T`` without the weight W in TensorFlow: the native product, where it is faster than decoding the weight.

In a graph it is one call of Python, which passes the tensors' memory to deepthin.kernels. XLA cannot compile such a
call, a SavedModel cannot contain it, and other devices cannot access that memory: there, the weight is decoded.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import tensorflow as tf
from jaxtyping import Float
from numpy import ndarray
from tensorflow.python.ops.control_flow_util import (  # pyright: ignore[reportMissingImports]
    GraphOrParentsInXlaContext,
)
from tensorflow.python.saved_model.save_context import in_save_context  # pyright: ignore[reportMissingImports]

from deepthin.keras.weight import ThinWeight
from deepthin.kernels import products
from deepthin.kernels.costs import choose_native, work
from deepthin.methods.factor import Factor, Factored

_TYPICAL_BATCH = 32  # assumed where the batch is unknown
# Nanoseconds on one core: a call of Python; decoding an entry of the weight, for each rank; reading it; and a
# multiplication by it. (`deepthin bench tensorflow` compares the predictions with measured times.)
_CALL, _RANK, _ENTRY, _MULTIPLICATION = 5e4, 0.3, 1.5, 0.05

_portable = ContextVar("portable", default=False)
_REFUSAL = "not_portable_trace_this_function_within_deepthin.tensorflow.portable"
_unsaved: list[tf.Variable] = []  # one that no module tracks


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Trace graphs with decoded weights only, so that they can be saved, and compiled by XLA; a context.

    Needed for a function that is traced first, and exported or called by a function with ``jit_compile=True`` later.

    Yields:
        Nothing.
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def product(weight: ThinWeight, x: tf.Tensor, index: int = 0) -> tf.Tensor | None:
    """``x @ W.T`` for a tensor of a thin weight, by native code.

    Args:
        weight: The thin weight.
        x: Inputs, any number of leading dimensions.
        index: Which of the weight's tensors is W, (outputs, inputs).

    Returns:
        The outputs; None where the decoded weight must be used (for sparse and ragged inputs too) or is predicted to be
        faster (see ``fused``).
    """
    part, method = weight.parts[index], weight.decoder
    if isinstance(x, tf.SparseTensor | tf.RaggedTensor):
        return None
    if not isinstance(method, Factored) or len(part.shape) != 2 or part.transposed or part.zero_row is not None:
        return None
    window = method.window(weight.cuts[index][0], part.shape)
    if window is None or (window.is_rank and window.offset):
        return None
    floats = weight.floats()
    rows = floats["xf"][window.first : window.stop] if len(weight.parts) > 1 else floats["xf"]
    y = fused(window.plan, x, rows, floats["wf"], window.offset)
    return y if y is None or part.scale == 1.0 else y * part.scale


def fused(
    method: Factor,
    x: Float[tf.Tensor, "*batch cols"],
    xf: Float[tf.Tensor, "m r"],
    wf: Float[tf.Tensor, "r n"],
    offset: int = 0,
) -> Float[tf.Tensor, "*batch rows"] | None:
    """``x @ W.T`` by native code; W is the factors' product from entry ``offset`` on. Differentiable to any order.

    Args:
        method: The plan: shape of W, n and rank.
        x: Inputs, any number of leading dimensions, known or not.
        xf: Left factor, m x r.
        wf: Right factor, r x n.
        offset: Entry of the factors' product at which W begins, from 0 to n - 1.

    Returns:
        The outputs; None where decoding W is predicted to be faster, for shuffled weights, for other dtypes than
        float32, without native code, on other devices than this process' CPU, under ``jit_compile=True`` and in
        ``portable``.
    """
    x, xf, wf = (tf.convert_to_tensor(operand) for operand in (x, xf, wf))
    if not _serves(method, x, xf, wf):
        return None
    _forbid_saving()
    if x.shape.rank == 2:
        return _product(method, offset)(x, xf, wf)
    y = _product(method, offset)(tf.reshape(x, (-1, method.shape[1])), xf, wf)
    return tf.reshape(y, tf.concat([tf.shape(x)[:-1], [method.shape[0]]], 0))


def pays(method: Factor, batch: int) -> bool:
    """Whether the native product is predicted to be faster than decoding the weight.

    Args:
        method: The plan.
        batch: Number of items.

    Returns:
        The prediction; False for no items.
    """
    area = math.prod(method.shape)
    native = _CALL + work(method, batch, True)[choose_native(method, batch, False)]
    return batch > 0 and native < area * (_RANK * method.rank + _ENTRY + _MULTIPLICATION * batch)


def _serves(method: Factor, x: tf.Tensor, xf: tf.Tensor, wf: tf.Tensor) -> bool:
    if not products.native_available or method.seed is not None or _portable.get() or in_save_context():
        return False
    if any(operand.dtype != tf.float32 for operand in (x, xf, wf)) or x.shape.rank in (None, 0):
        return False
    if x.shape[-1] != method.shape[1] or not _is_local() or _is_compiled():
        return False
    batch = x.shape[:-1].num_elements()
    return pays(method, _TYPICAL_BATCH if batch is None else batch)


def _is_local() -> bool:
    """Whether operations run on this process' CPU, in one place."""
    others = [device for device in tf.config.list_logical_devices() if device.device_type != "CPU"]
    return not others and not tf.distribute.has_strategy()


def _is_compiled() -> bool:
    """Whether what is traced now will be compiled by XLA."""
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _forbid_saving() -> None:
    """Make TensorFlow refuse to save the graph, by capturing an untracked variable: Python calls cannot be saved."""
    with tf.init_scope():
        if not _unsaved:
            _unsaved.append(tf.Variable(tf.zeros(()), trainable=False, name=_REFUSAL))
    if not tf.executing_eagerly():
        graph: Any = tf.compat.v1.get_default_graph()
        if tf.compat.v1.executing_eagerly_outside_functions():
            graph.capture(_unsaved[0].handle)


@lru_cache(maxsize=4096)
def _product(method: Factor, offset: int) -> Any:
    """The product of x, xf and wf. Its gradient is native too; second derivatives go by way of the weight."""

    def forward(x: ndarray, xf: ndarray, wf: ndarray) -> list[ndarray]:
        way: Any = choose_native(method, len(x), False).removeprefix("native-")
        return [products.linear(method, x, xf, wf, correlation=way, offset=offset, threads=_threads())]

    def backward(grad: ndarray, x: ndarray, xf: ndarray, wf: ndarray) -> list[ndarray]:
        way: Any = choose_native(method, len(x), True).removeprefix("native-")
        grads = products.linear_gradients(method, grad, x, xf, wf, correlation=way, offset=offset, threads=_threads())
        return list(grads)

    @tf.custom_gradient
    def gradients(grad: tf.Tensor, *operands: tf.Tensor) -> Any:
        first = _call(backward, (grad, *operands), [operand.shape for operand in operands])

        def second(by_x: tf.Tensor, by_xf: tf.Tensor, by_wf: tf.Tensor) -> Any:
            x, xf, wf = operands
            change = _weight(method, tf.concat([by_xf, xf], 1), tf.concat([wf, by_wf], 0), offset)
            back, through = _spread(method, grad, x, offset), _spread(method, grad, by_x, offset)
            return (
                tf.matmul(by_x, _weight(method, xf, wf, offset), transpose_b=True)
                + tf.matmul(x, change, transpose_b=True),
                tf.matmul(grad, change),
                tf.matmul(through, wf, transpose_b=True) + tf.matmul(back, by_wf, transpose_b=True),
                tf.matmul(xf, through, transpose_a=True) + tf.matmul(by_xf, back, transpose_a=True),
            )

        return first, second

    @tf.autograph.experimental.do_not_convert
    @tf.custom_gradient
    def product(*operands: tf.Tensor) -> Any:
        (y,) = _call(forward, operands, [(operands[0].shape[0], method.shape[0])])
        return y, lambda grad: gradients(grad, *operands)

    return product


def _weight(method: Factor, xf: tf.Tensor, wf: tf.Tensor, offset: int) -> Float[tf.Tensor, "rows cols"]:
    """The weight that factors of any rank decode to."""
    entries = tf.reshape(tf.matmul(xf, wf), (-1,))[offset : offset + math.prod(method.shape)]
    return tf.reshape(entries, method.shape)


def _spread(method: Factor, grad: tf.Tensor, x: tf.Tensor, offset: int) -> Float[tf.Tensor, "m n"]:
    """The gradient of ``xf @ wf``."""
    entries = tf.reshape(tf.matmul(grad, x, transpose_a=True), (-1,))
    after = -(offset + math.prod(method.shape)) % method.n
    return tf.reshape(tf.pad(entries, [[offset, after]]), (-1, method.n))


def _call(function: Any, operands: Sequence[tf.Tensor], shapes: Sequence[Any]) -> list[tf.Tensor]:
    """Call a function of arrays; its float32 results get the given, possibly partial, shapes."""
    tensors = tf.nest.flatten(tf.numpy_function(function, operands, [tf.float32] * len(shapes), stateful=False))
    for tensor, shape in zip(tensors, shapes, strict=True):
        tensor.set_shape(shape)
    return tensors


def _threads() -> int:
    """The number of threads that TensorFlow uses for one operation."""
    return tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1
