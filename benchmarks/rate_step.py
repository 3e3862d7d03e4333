"""What a training step with the rate costs, beside the same step with 8-bit rounding: interleaved, one core.

python benchmarks/rate_step.py [ROUNDS]
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.storage.report import table

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
WIDTHS = (429, 1024, 1024, 1024, 1024, 102)  # the network of the task acoustic
BATCH = 128
FIRST = {
    "weights": None,
    "deepthin, rank 4, .04": {"method": "deepthin", "rank": 4},
    "kronecker, .04": {"method": "kronecker"},
}


def stepping(rule: dict[str, object], ratio: float | None, file_bytes: int | None) -> Callable[[], None]:
    """One training step of the network by a rule; with the penalty if there is a size."""
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(WIDTHS) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    size = {"ratio": ratio} if file_bytes is None else {"file_bytes": file_bytes}
    dt.compress(model, {"model": {**size, "biases": 32}, "rules": {"*": rule}}, init="scratch")
    optimizer = torch.optim.AdamW(dt.parameter_groups(model, 1e-3), fused=True)
    target = None if file_bytes is None else dt.SizeTarget(model, steps=1200)
    x, y = torch.randn(BATCH, WIDTHS[0]), torch.randint(WIDTHS[-1], (BATCH,))

    def step() -> None:
        loss = nn.functional.cross_entropy(model(x), y)
        if target is not None:
            loss = loss + target.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if target is not None:
            target.step()

    return step


def main() -> None:
    """A line for each first method."""
    torch.set_num_threads(1)
    lines: list[tuple[str, ...]] = []
    for name, first in FIRST.items():
        if first is None:
            rounded, coded = {"method": "uniform", "bits": 8}, {"method": "coded"}
        else:
            rounded = {**first, "then": {"method": "uniform", "bits": 8}}
            coded = {**first, "floats": 0.04, "then": {"method": "coded"}}
        steps = {
            "8 bits": stepping(rounded, 0.2501 if first is None else 0.01, None),
            "rate": stepping(coded, None, 400_000),
        }
        times: dict[str, list[float]] = {key: [] for key in steps}
        for _ in range(ROUNDS):
            for key, step in steps.items():
                start = time.perf_counter()
                step()
                times[key].append(1e3 * (time.perf_counter() - start))
        medians = {key: statistics.median(values[3:]) for key, values in times.items()}
        means = {key: statistics.fmean(values[3:]) for key, values in times.items()}
        ratio, mean_ratio = medians["rate"] / medians["8 bits"], means["rate"] / means["8 bits"]
        lines.append((name, *(f"{value:.1f}" for value in medians.values()), f"{ratio:.2f}", f"{mean_ratio:.2f}"))
    heads = ("floats", "ms a step, 8 bits", "with the rate", "ratio of medians", "of means, with measurements")
    print(table(heads, lines, right=range(1, 5), total=False))


if __name__ == "__main__":
    main()
