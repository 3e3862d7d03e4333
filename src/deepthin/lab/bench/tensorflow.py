"""What `deepthin bench tensorflow` times: one layer in ``tf.function``, without its weight, with it, and dense."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deepthin.errors import BudgetError, ConfigError


def layers(
    shape: tuple[int, int], ratios: Sequence[float], batch: int, rank: int, threads: int
) -> Iterator[tuple[str, float | None, Any, int]]:
    """The competitors of one layer in ``tf.function``.

    ``dense`` is ``x @ kernel`` as users write it, ``xla`` the same with ``jit_compile=True``, ``function`` a function
    that adds 1: the fixed time of a call. At each ratio ``thin`` is ``Variables.product``, ``generated`` the same with
    the weight computed in every call.

    Args:
        shape: (outputs, inputs) of the layer.
        ratios: Bytes of the matrix over those of the dense one, 0 to 1.
        batch: Number of items.
        rank: Rank of DeepThin's factors, >= 1.
        threads: Number of TensorFlow's threads.

    Yields:
        (name, ratio, work, n): the ratio is None and n is 0 for dense competitors. Where a ratio cannot be reached, the
        name is ``smallest`` and ``work`` the smallest ratio.

    Raises:
        ConfigError: TensorFlow or Keras is not installed.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf

        import deepthin.tensorflow as dtf
    except ModuleNotFoundError as error:
        raise ConfigError(f"This case needs {error.name}: pip install 'deepthin[tensorflow]'.") from None
    for read, write in (
        (tf.config.threading.get_intra_op_parallelism_threads, tf.config.threading.set_intra_op_parallelism_threads),
        (tf.config.threading.get_inter_op_parallelism_threads, tf.config.threading.set_inter_op_parallelism_threads),
    ):
        if read() != threads:
            write(threads)
    rows, cols = shape
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(batch, cols)).astype(np.float32))
    kernel: Any = tf.Variable(tf.constant(rng.normal(size=(cols, rows)), tf.float32))
    yield "dense", None, _calls(tf.function(lambda x: x @ kernel), x), 0
    yield "xla", None, _calls(tf.function(lambda x: x @ kernel, jit_compile=True), x), 0
    yield "function", None, _calls(tf.function(lambda x: x + 1), x), 0
    for ratio in ratios:
        thin = dtf.Variables({"model": {"ratio": ratio}, "rules": {"*": {"method": "deepthin", "rank": rank}}})
        try:
            thin.get("kernel", (cols, rows))
        except BudgetError as error:
            yield "smallest", ratio, error.smallest_ratio, 0
            continue
        n = thin.report().rows[0].n
        yield "thin", ratio, _calls(tf.function(lambda x, thin=thin: thin.product(x, "kernel")), x), n
        with dtf.portable():
            yield "generated", ratio, _calls(tf.function(lambda x, thin=thin: thin.product(x, "kernel")), x), n


def _calls(function: Any, x: Any) -> Any:
    """Trace the function now, under the present settings, and return the call."""
    function(x)
    return lambda: function(x)
