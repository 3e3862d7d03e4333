"""An acoustic network by get_variable: scores of phone states from frames of speech features, here random data.

python docs/tensorflow_acoustic.py
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

import deepthin.tensorflow as dtf

RULES = {"model": {"ratio": 0.02}, "rules": {"output": {"ratio": 0.2}, "*": {}}}  # or the path of a TOML file
SIZES = (429, 512, 512, 102)  # 11 frames of 39 features, two hidden layers, 102 states
NAMES = ("fc1", "fc2", "output")


def network(thin: dtf.Variables, frames: tf.Tensor) -> tf.Tensor:
    """The scores of the states: most kernels are generated; in TensorFlow 1, they were declared as variables."""
    x = frames
    for name, inputs, outputs in zip(NAMES, SIZES[:-1], SIZES[1:], strict=True):
        x = thin.product(x, f"{name}/kernel", (inputs, outputs)) + thin.get(f"{name}/bias", (outputs,))
        x = x if name == "output" else tf.nn.relu(x)
    return x


def main(path: Path, steps: int = 60) -> tuple[float, float, int]:
    """Return the loss before and after training, and the bytes of the file."""
    rng = np.random.default_rng(0)
    frames = tf.constant(rng.normal(size=(256, SIZES[0])).astype(np.float32))
    states = tf.constant(rng.integers(0, SIZES[-1], 256))
    thin = dtf.Variables(RULES, seed=0)
    network(thin, frames)  # creates the variables
    momentum = [tf.Variable(tf.zeros_like(variable)) for variable in thin.trainable_variables]

    @tf.function
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:  # the matrices are generated again in each step
            scores = network(thin, frames)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(states, scores))
        gradients = tape.gradient(loss, thin.trainable_variables)
        for variable, gradient, before in zip(thin.trainable_variables, gradients, momentum, strict=True):
            before.assign(0.9 * before + gradient)
            variable.assign_sub(0.05 * before)
        return loss

    losses = [float(step()) for _ in range(steps)]
    n_bytes = dtf.save(thin, path)
    print(thin.report())

    served = dtf.load(dtf.Variables(), path)  # no rules: the methods are in the file
    assert np.allclose(network(served, frames), network(thin, frames), atol=1e-4)
    return losses[0], losses[-1], n_bytes


if __name__ == "__main__":
    before, after, n_bytes = main(Path(sys.argv[1] if len(sys.argv) > 1 else "acoustic.thin"))
    print(f"loss {before:.2f}, then {after:.2f}; {n_bytes:,} bytes")
