"""Thin convolutions against torch's: by the factors in native code, and by the decoded kernel.

    python benchmarks/convolutions.py [--ratio 0.02] [--rank 1] [--repeats 21] [--networks]

One thread. Dense, decoded and thin modules take turns in one run, and medians are shown, in milliseconds: of a call in
evaluation, and of a training step (forward and backward). `chosen` is the module as users have it, which takes the way
that is predicted to be faster. ``--networks``: whole networks too, CREPE (Kim et al., 2018, arXiv:1802.06182) with
drawn weights, and those of the task `conv`.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

import deepthin.torch as dt
from deepthin.lab.tasks import conv
from deepthin.torch import convolution

LAYERS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("512 x 256 x 64 taps, 8 positions", lambda: nn.Conv1d(256, 512, 64), (1, 256, 71)),
    ("128 x 1024 x 64 taps, 128 positions", lambda: nn.Conv1d(1024, 128, 64), (1, 1024, 191)),
    ("3x3, 512-512, 7 x 7", lambda: nn.Conv2d(512, 512, 3, padding=1), (1, 512, 7, 7)),
    ("3x3, 256-256, 14 x 14", lambda: nn.Conv2d(256, 256, 3, padding=1), (1, 256, 14, 14)),
    ("3x3, 128-128, 28 x 28", lambda: nn.Conv2d(128, 128, 3, padding=1), (1, 128, 28, 28)),
    ("3x3, 256-256, 14 x 14, batch 32", lambda: nn.Conv2d(256, 256, 3, padding=1), (32, 256, 14, 14)),
]


def crepe() -> nn.Module:
    """CREPE's convolutions and output layer, without its sigmoid."""
    layers: list[nn.Module] = []
    for i, (taken, given) in enumerate(pairwise([1, 1024, 128, 128, 128, 256, 512])):
        sides, width, stride = ((31, 32), 64, 1) if i else ((254, 254), 512, 4)
        layers += [nn.ZeroPad1d(sides), nn.Conv1d(taken, given, width, stride), nn.ReLU()]
        layers += [nn.BatchNorm1d(given, eps=0.001), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 360))


def networks() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """CREPE, LeNet-5 and ResNet-8 at batches 1 and 32."""
    yield "CREPE", crepe, (1, 1, 1024)
    for (name, depth), batch in itertools.product((("LeNet-5", 5), ("ResNet-8", 8)), (1, 32)):
        yield f"{name}, batch {batch}", lambda depth=depth: conv.build(None, 1000, depth), (batch, 1, 28, 28)


def measure(dense: nn.Module, x: Tensor, ratio: float, rank: int, repeats: int, train: bool) -> dict[str, float]:
    """Medians in milliseconds of ``dense``, ``decoded`` and ``chosen``."""
    thin = copy.deepcopy(dense)
    rules = {"model": {"ratio": ratio}, "rules": {"*": {"method": "deepthin", "rank": rank}}}
    dt.compress(thin, rules, init="scratch")
    models = {"dense": dense, "decoded": copy.deepcopy(thin), "chosen": thin}
    pays, times = convolution.pays, {name: [] for name in models}
    for model in models.values():
        model.train(train)  # once: at each change of mode, what evaluation holds is computed anew
    for _ in range(repeats + 1):
        for name, model in models.items():
            convolution.pays = (lambda *case: False) if name == "decoded" else pays
            for _ in range(2):  # the first run fills the caches, as the runs of a stream of images do
                start = time.perf_counter()
                if train:
                    model.zero_grad(set_to_none=True)
                    model(x).square().mean().backward()
                else:
                    model(x)
                took = time.perf_counter() - start
            times[name].append(took)
    convolution.pays = pays
    return {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.02, help="of the bytes of the matrices")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--networks", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| layer | call | dense | decoded | chosen | dense over chosen |\n|---|---|---|---|---|---|")
    for name, build, shape in [*LAYERS, *(networks() if given.networks else ())]:
        for train in (False, True):
            with torch.set_grad_enabled(train):
                found = measure(
                    nn.Sequential(build()), torch.randn(shape), given.ratio, given.rank, given.repeats, train
                )
            values = " | ".join(f"{value:.3g}" for value in found.values())
            gain = found["dense"] / found["chosen"]
            print(f"| {name} | {'training step' if train else 'evaluation'} | {values} | {gain:.2g}x |", flush=True)


if __name__ == "__main__":
    main()
