"""The upper bound ``bits()`` of each method and the bytes it writes, for the paper's network, 440-6x2048-1952, at .01.

python benchmarks/file_sizes.py [RATIO]
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import deepthin.torch as dt
from deepthin import METHODS, BudgetError
from deepthin.storage.read import read
from deepthin.storage.report import table

RATIO = float(sys.argv[1]) if len(sys.argv) > 1 else 0.01
EIGHT = {"method": "uniform", "bits": 8}
RULES = [{"method": name} for name in METHODS] + [
    {"method": name, "then": {**EIGHT, "bits": bits}}
    for name, bits in (("deepthin", 8), ("deepthin", 4), ("hashed", 8), ("rank", 8), ("pruned", 8), ("pruned", 4))
]


def network() -> nn.Sequential:
    """25.9 million weights."""
    widths = [440, *[2048] * 6, 1952]
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers)


def main() -> None:
    """A line for each method."""
    lines: list[tuple[str, ...]] = []
    for rule in RULES:
        torch.manual_seed(0)
        model = network()
        dense = sum(p.numel() for p in model.parameters())
        name = rule["method"] + (f" then {rule['then']['bits']} bits" if "then" in rule else "")
        try:
            dt.compress(model, {"model": {"ratio": RATIO}, "rules": {"*": rule}}, init="scratch")
        except BudgetError as error:
            lines.append((name, "", "", "", f"from a ratio of {error.smallest_ratio:.4f} on"))
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            written = dt.save(model, Path(folder) / "m.thin")
            middle = time.perf_counter()
            stored = read(Path(folder) / "m.thin").thin
            seconds = f"{middle - start:.3f} {time.perf_counter() - middle:.3f}"
        promised = sum(thin.method.bits() for thin in stored.values()) / 8
        held = sum(thin.bytes for thin in stored.values())
        lines.append((name, f"{promised / 4 / dense:.5f}", f"{promised:,.0f}", f"{held:,}", f"{written:,}", seconds))
    heads = ("method", "ratio", "bits() / 8", "bytes of codes", "bytes of the file", "seconds to save, read")
    print(table(heads, [(*line, *[""] * (6 - len(line))) for line in lines], right=range(1, 6), total=False))


if __name__ == "__main__":
    main()
