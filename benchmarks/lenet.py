"""LeNet-5 or LeNet-300-100 on MNIST, trained to the size of the file: bytes, times smaller, accuracy.

python benchmarks/lenet.py --data DIR [--depth 5] [--bytes 2460] [--steps 12000] [--seeds 1] [--batch 128]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import deepthin.torch as dt
from deepthin.lab.tasks import lenet
from deepthin.lab.tasks.training import Training
from deepthin.storage.read import inspect

CODED: dict[str, Any] = {"method": "coded"}
LARGE = {"5": {"method": "deepthin", "rank": 4, "floats": 0.04, "then": CODED}}  # nine tenths of LeNet-5's weights
RULES = {3: {"*": CODED}, 5: {**LARGE, "*": CODED}}
BYTES = {3: 4600, 5: 2460}


def main() -> None:
    """A line for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    for name, value in (("depth", 5), ("bytes", 0), ("steps", 12_000), ("seeds", 1), ("batch", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = lenet.load(given.data)
    images, classes = data.inputs["train"], data.targets["train"]
    file_bytes = given.bytes or BYTES[given.depth]
    for seed in range(given.seeds):
        torch.manual_seed(seed)
        model = lenet.build(data, 1000, given.depth)
        rules = {"model": {"file_bytes": file_bytes}, "rules": RULES[given.depth]}
        dt.compress(model, rules, init="scratch", seed=seed)
        training = Training(model=model, steps=given.steps, lr=1e-3, seed=seed)
        for chosen in training.batches(len(images), given.batch):
            training.minimise(cross_entropy(model(images[chosen]), classes[chosen]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lenet.thin"
            dt.save(model, path, max_bytes=file_bytes)
            loaded, report = dt.load(lenet.build(data, 1000, given.depth), path).eval(), inspect(path)
        right = {split: 100 - lenet.evaluate(loaded, data, split)["error"] for split in ("dev", "test")}
        times = report.dense_bytes / report.total_bytes
        print(
            f"seed {seed}: {report.total_bytes} bytes ({report.header_bytes} names and checksum), {times:.0f} times "
            f"smaller, {right['test']:.2f} % right (development {right['dev']:.2f} %)",
            flush=True,
        )


if __name__ == "__main__":
    main()
