"""The time of networks whose factors are rounded, over the same factors in fp32 and over the dense network.

    OMP_NUM_THREADS=1 python benchmarks/rounded.py [--ratio 0.0099] [--batch 1] [--repeats 201]

In evaluation, in `torch.inference_mode`: a layer of 2048 x 2048, and the network 440-6x2048-1952 as a `nn.Sequential`.
`fp32` has its factors in so many bytes; `uniform` and `coded` have factors of the same shapes, rounded to 8 bits and
to the symbols of a learned step; `thin biases` are 8-bit `uniform` as well; `same bytes` are 8-bit factors in as many
bytes as fp32, four times as many. Runs of all are interleaved; medians, one thread. Prints microseconds and speed-ups.
"""

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from torch import nn

import deepthin.torch as dt

NETWORKS = {"2048 x 2048": (2048, 2048), "440-6x2048-1952": (440, *[2048] * 6, 1952)}
UNIFORM: dict[str, Any] = {"method": "uniform", "bits": 8}


def network(widths: tuple[int, ...], rule: dict[str, Any] | None = None, bias: dict[str, Any] | None = None) -> Any:
    """Linear layers and rectifiers in evaluation, dense or with DeepThin's factors of rank 1."""
    layers = [m for cols, rows in itertools.pairwise(widths) for m in (nn.Linear(cols, rows), nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
    if rule is not None:
        rules = {"*weight": {"method": "deepthin", "rank": 1, **rule}, **({"*bias": bias} if bias else {})}
        dt.compress(model, {"rules": rules}, init="scratch")
    return model.eval() if len(model) > 1 else model.eval()[0]


def main() -> None:
    """Both networks, every kind of factors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ratio", type=float, default=0.0099, help="bytes of the fp32 factors over those of the weights"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=201)
    given = parser.parse_args()
    torch.set_num_threads(1)
    same = {"ratio": given.ratio / 4}  # a rule's ratio is of stored bits: 8 for each float
    for title, widths in NETWORKS.items():
        torch.manual_seed(0)
        x = torch.randn(given.batch, widths[0])
        models = {
            "dense": network(widths),
            "fp32": network(widths, {"ratio": given.ratio}),
            "uniform": network(widths, {**same, "then": UNIFORM}),
            "coded": network(widths, {**same, "then": {"method": "coded"}}),
            "uniform, thin biases": network(widths, {**same, "then": UNIFORM}, UNIFORM),
            "uniform, same bytes": network(widths, {"ratio": given.ratio, "then": UNIFORM}),
        }
        times: dict[str, list[float]] = {name: [] for name in models}
        with torch.inference_mode():
            for _ in range(given.repeats):
                for name, model in models.items():
                    for _ in range(2):  # caches as in steady use
                        model(x)
                    start = time.perf_counter()
                    model(x)
                    times[name].append(time.perf_counter() - start)
        medians = {name: 1e6 * statistics.median(each) for name, each in times.items()}
        for name, median in medians.items():
            floats = sum(p.numel() for n, p in models[name].named_parameters() if "bias" not in n)
            print(
                f"{title:16} {name:21} {floats:9} floats {median:8.1f} us, "
                f"{medians['dense'] / median:5.1f} times dense, {median / medians['fp32']:.2f} of fp32"
            )


if __name__ == "__main__":
    main()
