"""Time and peak memory of encoding one matrix by every method, as sizes grow.

    python benchmarks/encoding.py [--sizes 2048,4096] [--methods rank,kronecker] [--ratio 0.01]

Each line is a process of its own; OMP_NUM_THREADS=1 gives steady times.
``encode``: ``Method.encode`` of a float32 NumPy matrix of
normal numbers. ``compress``: ``deepthin.torch.compress`` of a linear layer with that weight, its report (for which the
codes are serialised) included. ``memory``: the peak of resident memory (VmHWM) above what the process holds with the
matrix, once a small matrix has been through the same call, over the bytes of the matrix; the matrix itself is not
counted. What is freed goes back to the system at once (MALLOC_MMAP_THRESHOLD_). Methods that store something for every
weight take the smallest size that they can. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from typing import Any, cast

import numpy as np
from planning import resident

BITS = {"uniform": 8, "kmeans": 5, "ecsq": 3, "binary": 2, "coded": 8}
SPECIAL = {
    "rank max": ("deepthin", {"rank": "max"}),
    "tensor-train 2": ("tensor-train", {"order": 2}),
    "tensor-train 4": ("tensor-train", {"order": 4}),
    "pruned 16": ("pruned", {"balance": 16}),
    "uniform row affine": ("uniform", {"bits": 8, "per": "row", "affine": True}),
    "uniform 16 affine": ("uniform", {"bits": 16, "affine": True}),
}
CALLS = ("encode", "compress")


def options_of(case: str) -> tuple[str, dict[str, Any]]:
    """The name of the method of a case, and its options."""
    if case in SPECIAL:
        return SPECIAL[case]
    return case, {"bits": BITS[case]} if case in BITS else {}


def once(case: str, call: str, size: int, ratio: float) -> tuple[float, float, float]:
    """Seconds, memory over the matrix, and the relative error of one call."""
    from deepthin.methods import METHODS

    name, options = options_of(case)
    bits = 64 * 32 * size * size if "bits" in options else int(ratio * 32 * size * size)
    method: Any = METHODS[name].fit((size, size), bits, **options)
    weight = np.random.default_rng(0).standard_normal((size, size), np.float32)
    if call == "encode":
        before, start = resident(), time.perf_counter()
        code = method.encode(weight, cast(Any, np))
        seconds, memory = time.perf_counter() - start, resident("VmHWM") - before
        error = np.linalg.norm(method.decode({**code, **method.derived()}, cast(Any, np)) - weight)
        return seconds, memory / weight.nbytes, float(error / np.linalg.norm(weight))
    import torch
    from torch import nn

    import deepthin.torch as dt

    layer = nn.Linear(size, size, bias=False)
    layer.weight.data = torch.from_numpy(weight)
    rule = {"method": name, **options} | ({} if "bits" in options else {"ratio": ratio})
    before, start = resident(), time.perf_counter()
    report = dt.compress(layer, {"rules": {"*": rule}})
    seconds, memory = time.perf_counter() - start, resident("VmHWM") - before
    return seconds, memory / weight.nbytes, report.rows[0].error


def main() -> None:
    """Every case in its process, and the table."""
    from deepthin.methods import METHODS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2048,4096", help="rows and columns of the matrices")
    parser.add_argument("--methods", default=",".join([*METHODS, *SPECIAL]), help="cases, by commas")
    parser.add_argument("--calls", default=",".join(CALLS), help="encode, compress")
    parser.add_argument("--ratio", type=float, default=0.01, help="size of the code over that of the matrix")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case, call, size = json.loads(given.case)
        warnings.simplefilter("ignore")
        once(case, call, 256, max(given.ratio, 0.1))
        print(json.dumps(once(case, call, size, given.ratio)))
        return
    print(f"{'method':<20}{'call':<10}{'size':>6}{'seconds':>9}{'memory':>8}{'error':>9}")
    for case in given.methods.split(","):
        for call in given.calls.split(","):
            for size in map(int, given.sizes.split(",")):
                arguments = ["--ratio", str(given.ratio), "--case", json.dumps([case, call, size])]
                found = subprocess.run(
                    [sys.executable, __file__, *arguments],
                    check=True,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
                )
                seconds, memory, error = json.loads(found.stdout)
                print(f"{case:<20}{call:<10}{size:>6}{seconds:>9.2f}{memory:>8.1f}{error:>9.4f}", flush=True)


if __name__ == "__main__":
    main()
