"""A small acoustic net in Keras: ten frames in, phone classes out; compressed to 2 % and trained from scratch."""

import sys

import keras
import numpy as np

import deepthin
import deepthin.keras as dk

FRAMES, FEATURES, PHONES = 11, 40, 48


def utterances(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic frames: a pattern for each phone, with noise. Replace them by your features."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(1).normal(size=(PHONES, FRAMES * FEATURES))
    phones = rng.integers(0, PHONES, count)
    return (patterns[phones] + 2 * rng.normal(size=(count, FRAMES * FEATURES))).astype("float32"), phones


def build(width: int) -> keras.Model:
    """Frames with their context, two hidden layers."""
    return keras.Sequential(
        [
            keras.Input((FRAMES * FEATURES,)),
            keras.layers.Dense(width, activation="relu", name="fc1"),
            keras.layers.Dense(width, activation="relu", name="fc2"),
            keras.layers.Dense(PHONES, name="output"),
        ]
    )


def main(path: str = "acoustic.thin", width: int = 512, epochs: int = 8) -> float:
    """Train thin from scratch, write the file, load it into a dense network; return the frame accuracy."""
    keras.utils.set_random_seed(0)
    model = build(width)
    rules = {"model": {"ratio": 0.02, "ignore": ["output"]}}
    print(dk.compress(model, rules, init="scratch"))
    model.compile(
        dk.Adam(1e-3),  # the dense network's learning rate; that of codes is a multiple of it
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*utterances(4000), batch_size=64, epochs=epochs, verbose=0)
    print(f"{dk.save(model, path):,} bytes; {sorted(deepthin.load(path))}")

    thin = dk.load(build(width), path)
    thin.compile(loss=model.loss, metrics=["accuracy"])
    right = thin.evaluate(*utterances(1000, seed=2), verbose=0)[1]
    print(f"{100 * right:.1f} % of frames are right")
    return right


if __name__ == "__main__":
    main(*sys.argv[1:2])
