"""LeNet-5 or LeNet-300-100 on MNIST, trained to the size of the file: bytes, times smaller, accuracy.

python benchmarks/lenet.py --data DIR [--depth 5] [--bytes 2460] [--steps 12000] [--first 0] [--seeds 1] [--batch 128]
    [--shift 0] [--all] [--fast]

``--first``: the first seed. ``--shift``: augmentation, each image is moved by up to so many pixels in each direction,
anew in every step. ``--all``: the development images are trained on too, as in the published trainings.
``--fast``: convolutions with channels last and, where the processor supports it, products of dense weights in bfloat16;
the accuracy is that of the file in float32.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

import deepthin.torch as dt
from deepthin.lab.tasks import lenet
from deepthin.lab.tasks.ctc import precision
from deepthin.lab.tasks.training import Training
from deepthin.storage.read import inspect

CODED: dict[str, Any] = {"method": "coded"}
LARGE = {"5": {"method": "deepthin", "rank": 4, "floats": 0.04, "then": CODED}}  # nine tenths of LeNet-5's weights
RULES = {3: {"*": CODED}, 5: {**LARGE, "*": CODED}}
BYTES = {3: 4600, 5: 2460}


def shifted(images: Tensor, most: int, seed: int) -> Callable[[Tensor], Tensor]:
    """Draws the images of a batch, each moved by up to ``most`` pixels in each direction; the border is background."""
    generator = torch.Generator().manual_seed(seed)
    padded, side = pad(images, (most,) * 4, value=images.min().item())[:, 0], torch.arange(images.shape[-1])

    def draw(chosen: Tensor) -> Tensor:
        rows, cols = torch.randint(2 * most + 1, (2, len(chosen), 1), generator=generator) + side
        return padded[chosen[:, None, None], rows[:, :, None], cols[:, None, :]][:, None]

    return draw


def main() -> None:
    """A line for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    defaults = {"depth": 5, "bytes": 0, "steps": 12_000, "first": 0, "seeds": 1, "batch": 128, "shift": 0}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("all", "fast"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = lenet.load(given.data)
    splits = ("train", "dev") if given.all else ("train",)
    images, classes = (torch.cat([part[split] for split in splits]) for part in (data.inputs, data.targets))
    file_bytes = given.bytes or BYTES[given.depth]
    for seed in range(given.first, given.first + given.seeds):
        torch.manual_seed(seed)
        model = lenet.build(data, 1000, given.depth)
        rules = {"model": {"file_bytes": file_bytes}, "rules": RULES[given.depth]}
        dt.compress(model, rules, init="scratch", seed=seed)
        training = Training(model=model, steps=given.steps, lr=1e-3, seed=seed)
        draw = shifted(images, given.shift, seed)
        for chosen in training.batches(len(images), given.batch):
            batch = draw(chosen)
            if given.fast:
                with precision():
                    scores = model(batch.contiguous(memory_format=torch.channels_last))
            else:
                scores = model(batch)
            training.minimise(cross_entropy(scores.float(), classes[chosen]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lenet.thin"
            dt.save(model, path, max_bytes=file_bytes)
            loaded, report = dt.load(lenet.build(data, 1000, given.depth), path).eval(), inspect(path)
        right = {split: 100 - lenet.evaluate(loaded, data, split)["error"] for split in ("dev", "test")}
        development = "trained on" if given.all else f"{right['dev']:.2f} %"
        times = report.dense_bytes / report.total_bytes
        print(
            f"seed {seed}: {report.total_bytes} bytes ({report.header_bytes} names and checksum), {times:.0f} times "
            f"smaller, {right['test']:.2f} % right (development {development})",
            flush=True,
        )


if __name__ == "__main__":
    main()
