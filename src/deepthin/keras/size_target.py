"""Training a Keras model to a file of a given size: a callback, and a penalty among the model's losses."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from deepthin.keras.code_length import code_length
from deepthin.keras.files import contents
from deepthin.keras.namespace import NAMESPACE
from deepthin.keras.tree import walk
from deepthin.keras.weight import ThinWeight
from deepthin.method import Array
from deepthin.methods.float_coding import LOG_STEP
from deepthin.plan import steering
from deepthin.plan.steering import Rounded, Steered, Steering
from deepthin.storage.write import size_of

_OPS: Any = NAMESPACE


class _Penalty:
    """The code length of all symbols times the weight of a bit, as the regulariser of a learned step.

    Args:
        weights: The coded weights; the first holds the weight of a bit, and is told the code length.
    """

    def __init__(self, weights: Sequence[ThinWeight]) -> None:
        self.weights = weights

    def __call__(self, _: Any) -> Array:
        lengths = [code_length(*pair) for weight in self.weights for pair in weight.unrounded().values()]
        bits, first = ops.sum(ops.stack(lengths)), self.weights[0]
        first.code_bits.assign(ops.stop_gradient(bits))
        return ops.convert_to_tensor(first.bit_weight) * bits


class SizeTarget(Steered, keras.callbacks.Callback):
    """Steers a training so that the written file ends within a number of bytes, and not far below.

        target = SizeTarget(model, steps=1200)
        model.fit(x, y, epochs=epochs, callbacks=[target])

    The penalty is the code length of all symbols of methods that learn their step (``coded``), times a weight that is
    the same for the whole model: bits go where they help the loss most. It is one of ``model.losses``, and 0 outside
    of training steps. The weight is raised while the file is above its intended size and lowered while it is below: in
    the first quarter of the steps this falls from the present size to the target. What is steered by is the size of the
    file as it would be written, measured up to forty times, and the code length in between.

    In the last step the symbols are fixed: should the file still be too large, the symbols that are nearest to the next
    smaller one are moved there. Save the model before it trains any further. In a training loop of your own, add
    ``sum(model.losses)`` to the loss, and call ``on_train_batch_begin(0)`` and ``on_train_batch_end(0)`` around each
    step.

    Args:
        model: A model with coded weights, as ``compress`` makes it.
        steps: Number of optimiser steps, >= 1, in one call of ``fit`` or in several.
        file_bytes: The target in bytes; None: the ``[model] file_bytes`` that the model was compressed with.

    Attributes:
        steps: Number of steps.
        file_bytes: The target in bytes.
        steps_done: Number of steps so far.
        weight: The weight of a bit, in units of the loss.
        bytes: Predicted size of the file.

    Raises:
        ConfigError: The model has no coded weights, or there is no target.
        BudgetError: The target is below the size of the file if all symbols were zero.
    """

    def __init__(self, model: keras.Model, steps: int, file_bytes: int | None = None) -> None:
        super().__init__()
        self._target, self._weights, self._begun_at = model, coded_weights(model), 0
        self._steering = Steering(steps, file_bytes, [w.file_bytes for w in self._weights], contents(model))
        self._penalty = _Penalty(self._weights)
        self._attach(self._penalty)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the weight of a bit for a training step.

        Args:
            batch: Index of the batch; with ``steps_per_execution`` that of the first.
            logs: Ignored; Keras passes it.
        """
        if self.steps_done >= self.steps:
            return
        self._sync()
        self._begun_at = batch
        if not self._steering.begun:
            self._steering.begin(*self._measured())
        self._weights[0].bit_weight.assign(self.weight)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Steer; after the last step, fix the symbols.

        Args:
            batch: Index of the batch; with ``steps_per_execution`` that of the last.
            logs: Ignored; Keras passes it.
        """
        if self.steps_done >= self.steps:
            return
        self._sync()
        first, finer = self._weights[0], 0.0
        first.bit_weight.assign(0.0)
        self._steering.bits = float(ops.convert_to_numpy(first.code_bits))
        for _ in range(min(batch - self._begun_at + 1, self.steps - self.steps_done)):
            if self._steering.due():
                self._steering.measured(*self._measured())
            finer += self._steering.advance()
        if finer > 0:
            for weight in self._weights:
                for latent, _ in weight.steps.values():
                    weight.latents[latent].assign_sub(finer)
        if self.steps_done >= self.steps:
            self.finish()

    def finish(self) -> int:
        """Fix the symbols now: should the file be too large, move the nearest symbols to the next smaller ones.

        It is called after the last step. Call it if a training ends earlier.

        Returns:
            The size of the file in bytes, at most ``file_bytes``.

        Raises:
            BudgetError: The file is larger even with every symbol zero: tensors have been added to the model.
        """
        self._sync()
        coded = [(weight, entry) for weight in self._weights for entry in weight.steps]

        def put(arrays: Sequence[np.ndarray]) -> None:
            for (weight, entry), array in zip(coded, arrays, strict=True):
                weight.latents[entry].assign(array)

        rounded = [(*pair, *pair[0].steps[pair[1]]) for pair in coded]
        now = [(w.latents[e], w.latents[latent], method) for w, e, latent, method in rounded]

        def read() -> list[Rounded]:
            return [
                Rounded(
                    np.asarray(ops.convert_to_numpy(latents)).astype(np.float64),
                    float(ops.convert_to_numpy(method.step(ops.convert_to_tensor(log_step), _OPS))[0, 0]),
                    method.top(),
                )
                for latents, log_step, method in now
            ]

        return steering.fit_to(self.file_bytes, lambda: contents(self._target), read, put)

    def on_train_end(self, logs: Any = None) -> None:
        """Take the penalty out of the model's losses once all steps are done.

        Args:
            logs: Ignored; Keras passes it.
        """
        if self.steps_done >= self.steps:
            self._attach(None)

    def _attach(self, penalty: _Penalty | None) -> None:
        """Make the penalty one of the model's losses, or remove it; compiled functions are made anew."""
        first = self._weights[0]
        latent, _ = next(iter(first.steps.values()))
        first.latents[latent].regularizer = penalty
        for function in ("train_function", "test_function"):
            if getattr(self._target, function, None) is not None:
                setattr(self._target, function, None)

    def _sync(self) -> None:
        """With JAX, ``fit`` keeps the values of variables elsewhere: write them back."""
        if hasattr(self._target, "jax_state_sync"):
            self._target.jax_state_sync()

    def _measured(self) -> tuple[float, int]:
        """The code length in bits, and the size of the file in bytes."""
        bits = 0.0
        for weight in self._weights:
            code = weight.code()
            for latent, method in weight.steps.values():
                symbols = code[latent.removesuffix(LOG_STEP) + "symbols"].astype(np.int64)
                bits += float(steering.symbol_lengths(symbols, method.top())[symbols + method.top()].sum())
        return bits, size_of(contents(self._target))


def coded_weights(model: keras.Model) -> list[ThinWeight]:
    """The weights whose symbols a training codes.

    Args:
        model: Any model.

    Returns:
        Those that learn their steps and are trainable, each once, in the order of the model's layers.
    """
    layers = {id(layer): layer for _, layer in walk(model)}.values()
    return [layer for layer in layers if isinstance(layer, ThinWeight) and layer.steps and layer.trainable_variables]
