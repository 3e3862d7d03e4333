"""A classifier is trained to a file of 1,500 bytes, a ninth of its dense size; NumPy reads the file."""

import sys

import keras
import numpy as np
from keras import layers

import deepthin
import deepthin.keras as dk


def main(path: str, epochs: int = 16, file_bytes: int = 1500) -> tuple[float, int]:
    """Train, save and read back.

    Args:
        path: The file to write.
        epochs: How often all examples are seen.
        file_bytes: The size to train to, in bytes.

    Returns:
        The fraction of examples that are classified correctly, and the size of the file in bytes.
    """
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, 32)).astype(np.float32)
    y = np.argmax(x @ rng.normal(size=(32, 8)), axis=1)

    model = keras.Sequential([keras.Input((32,)), layers.Dense(80, "relu", name="fc"), layers.Dense(8, name="out")])
    rules = {"model": {"file_bytes": file_bytes}, "rules": {"*.kernel": {"method": "coded"}}}
    dk.compress(model, rules)
    model.compile(dk.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    target = dk.SizeTarget(model, steps=epochs * len(x) // 128)
    model.fit(x, y, batch_size=128, epochs=epochs, callbacks=[target], verbose=0)

    n_bytes = dk.save(model, path, max_bytes=file_bytes)
    weights = deepthin.load(path)
    scores = np.maximum(x @ weights["fc.kernel"].T + weights["fc.bias"], 0) @ weights["out.kernel"].T
    right = float(np.mean(np.argmax(scores + weights["out.bias"], axis=1) == y))
    print(f"{n_bytes} bytes, {right:.1%} correct")
    return right, n_bytes


if __name__ == "__main__":
    main(*sys.argv[1:])
