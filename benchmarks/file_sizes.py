"""The upper bound ``bits()`` of each method and the bytes it writes, for the paper's network, 440-6x2048-1952, at .01.

python benchmarks/file_sizes.py [RATIO]
python benchmarks/file_sizes.py FILE.thin ...

Files are measured in both versions of the format. The entropy is that of the integers of each entry, by their
frequencies in it (of positions: of the gaps between them); the overhead is what version 2 has beside its arrays.
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import deepthin.torch as dt
from deepthin import METHODS, BudgetError
from deepthin.storage.contents import Contents
from deepthin.storage.read import read
from deepthin.storage.report import table
from deepthin.storage.write import head_of, size_of

FILES = [Path(word) for word in sys.argv[1:] if word.endswith(".thin")]
RATIO = float(sys.argv[1]) if len(sys.argv) > 1 and not FILES else 0.01
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


def entropy(contents: Contents) -> float:
    """Bytes that the integers of all codes take by their frequencies."""
    bits = 0.0
    for thin in contents.thin.values():
        for entry, kind in thin.method.integers().items():
            values = thin.code[entry].numpy().reshape(-1)
            counts = np.unique(np.diff(values, prepend=-1) if kind.rising else values, return_counts=True)[1]
            bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits / 8


def measured(contents: Contents) -> tuple[str, ...]:
    """Bytes in version 1 and 2, of the entropy, and beside the arrays of version 2."""
    head = head_of(contents)
    held = sum(item.bytes for _, _, item in head.items())
    first, second = size_of(contents, 1), size_of(contents, 2)
    return f"{first:,}", f"{second:,}", f"{entropy(contents):,.0f}", f"{second - held:,}"


MEASURED = ("version 1", "version 2", "entropy of integers", "overhead of version 2")


def main() -> None:
    """A line for each file, or each method."""
    if FILES:
        lines = [(path.name, *measured(read(path))) for path in FILES]
        print(table(("file", *MEASURED), lines, right=range(1, 5), total=False))
        return
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
            found = read(Path(folder) / "m.thin")
            seconds = f"{middle - start:.3f} {time.perf_counter() - middle:.3f}"
        promised = sum(thin.method.bits() for thin in found.thin.values()) / 8
        sizes = measured(found)
        assert sizes[1] == f"{written:,}"
        lines.append((name, f"{promised / 4 / dense:.5f}", f"{promised:,.0f}", *sizes, seconds))
    heads = ("method", "ratio", "bits() / 8", *MEASURED, "seconds to save, read")
    print(table(heads, [(*line, *[""] * (len(heads) - len(line))) for line in lines], right=range(1, 8), total=False))


if __name__ == "__main__":
    main()
