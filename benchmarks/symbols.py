"""Products by one-byte symbols, by kind and instruction set, beside torch's dense product.

    python benchmarks/symbols.py

One thread, batch 1, minima over rounds in which all are timed in turn. ``compared`` is the time to compare latents of
four bytes per weight with a copy, as a cache of symbols would have to. ``uniform`` multiplies by the symbols
themselves, ``16 values`` by those of a codebook of 16 centres.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F

from deepthin.kernels import products
from deepthin.torch.operators import same_values, symbol_linear

ROUNDS = 25


def measure(side: int) -> dict[str, float]:
    """Microseconds of each product for a square layer."""
    x, weight = torch.randn(1, side), torch.randn(side, side)
    copy, symbols = weight.clone(), torch.randint(0, 8, (side, side), dtype=torch.uint8)
    signed, step = symbols.to(torch.int8), torch.ones(1, 1)
    ways = {
        "dense": lambda: F.linear(x, weight),
        "compared": lambda: same_values(copy, weight),
        "uniform": lambda: symbol_linear(x, signed, None, step=step),
    }
    for levels in sorted(set(products.levels()) - {0}):
        centres = torch.randn(levels)
        ways[f"{levels} values"] = lambda centres=centres: symbol_linear(x, symbols, None, centres=centres)
    found = dict.fromkeys(ways, np.inf)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            way()
            start = time.perf_counter()
            way()
            found[name] = min(found[name], 1e6 * (time.perf_counter() - start))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for isa in products.isas():
        products.native().select(isa)
        for side in (1024, 2048, 4096):
            shown = ", ".join(f"{name} {value:,.0f}" for name, value in measure(side).items())
            print(f"{isa} {side} x {side}: {shown}")
