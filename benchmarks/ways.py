"""A call of a linear layer, over the fastest way to multiply by its factors, on a grid of sizes, ranks and batches.

    python benchmarks/ways.py [--sizes 128,512,2048,8192] [--ranks 1,4,max] [--batches 1,32,256,1024] [--repeats 5]

In evaluation, with the dense weight cached, in native code and without. With native code the layer is called as users
call it; without, the chosen way is run. Runs of all ways are interleaved, and the least time of each counts, since
other load only adds to it. Ways that are predicted to take 8 times as long as the least are not run. One thread. Prints
every case above the limit, the worst first, and how many there are.
"""

import argparse
import functools
import itertools
import time
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from deepthin import METHODS, BudgetError
from deepthin.kernels import products
from deepthin.storage.contents import Part
from deepthin.torch import multiply
from deepthin.torch.exchange import make_thin
from deepthin.torch.multiply import Case
from deepthin.torch.weight import ThinWeight

LIMIT, HOPELESS = 1.15, 8.0
NAMES = ("deepthin", "rank")


def measure(weight: ThinWeight, batch: int, native: bool, repeats: int) -> tuple[str, dict[str, float]]:
    """The way that is chosen, and the least seconds of each."""
    plan = weight.plans[0]
    case = Case(weight.decoder, plan, batch, True, native=native)
    ways = [way for way in multiply.WAYS if way.applies(case) and way.name != "native-auto"]
    costs = {way.name: way.cost(case) for way in ways}
    ways = [way for way in ways if costs[way.name] <= HOPELESS * min(costs.values())]
    x = torch.randn(batch, weight.decoder.shape[1])
    calls: dict[str, Any] = {way.name: functools.partial(way.run, cast(Any, weight), x, 0, None) for way in ways}
    chosen: str = multiply.choose(case).name
    if native:
        calls["layer"] = functools.partial(_layer(weight), x)
    seconds: dict[str, float] = {}
    for _ in range(repeats + 1):  # the first run fills caches
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            seconds[name] = min(seconds.get(name, took), took)
    if native:
        seconds[chosen] = seconds.pop("layer")
    return chosen, seconds


def _layer(weight: ThinWeight) -> nn.Module:
    """A linear layer of this weight, in evaluation."""
    rows, cols = weight.decoder.shape
    layer = nn.Linear(cols, rows, bias=False, device="meta")
    make_thin(layer, {"weight": weight})
    return layer.eval()


def main() -> None:
    """The grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="128,256,512,1024,2048,4096,8192", help="rows and columns")
    parser.add_argument("--ranks", default="1,4,max", help="of DeepThin; plain rank factorisation takes the largest")
    parser.add_argument("--ratios", default="0.05,0.01")
    parser.add_argument("--batches", default="1,8,32,128,256,1024,2048")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes, batches = (list(map(int, text.split(","))) for text in (given.sizes, given.batches))
    ranks = [rank if rank == "max" else int(rank) for rank in given.ranks.split(",")]
    found: list[tuple[float, str]] = []
    for size, ratio, (name, rank) in itertools.product(
        sizes, map(float, given.ratios.split(",")), [*(("deepthin", rank) for rank in ranks), ("rank", "max")]
    ):
        try:
            method = METHODS[name].fit((size, size), int(ratio * 32 * size * size), rank=rank)
        except BudgetError:
            continue
        parts = [Part(method.shape)]
        weight = ThinWeight.draw(name, method, parts, torch.zeros(0), np.random.default_rng(0), 1.0).eval()
        weight.requires_grad_(False)
        for batch, native in itertools.product(batches, [True, False] if products.native_available else [False]):
            with torch.no_grad():
                chosen, seconds = measure(weight, batch, native, given.repeats)
            best = min(seconds, key=lambda way: seconds[way])
            line = (
                f"{name} rank {rank}, {size} x {size}, ratio {ratio}, batch {batch}, "
                f"{'native' if native else 'torch'}: {chosen} {1e6 * seconds[chosen]:.0f} us, "
                f"{best} {1e6 * seconds[best]:.0f} us"
            )
            found.append((seconds[chosen] / seconds[best], line))
    found.sort(reverse=True)
    above = [(ratio, line) for ratio, line in found if ratio > LIMIT]
    for ratio, line in above:
        print(f"{ratio:.2f}  {line}")
    print(f"{len(above)} of {len(found)} choices take more than {LIMIT} times the fastest way")


if __name__ == "__main__":
    main()
