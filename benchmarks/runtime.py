"""The C runtime beside this library's own kernels and dense torch: microseconds of a whole network, one item.

python benchmarks/runtime.py [--networks mlp,ctc] [--codes fp32,8,coded] [--lanes 8,16] [--runs 100]

One thread; runs take turns. Networks and codes are those of benchmarks/export.py. Each number is the median, then the
least.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from export import dense, thin

from deepthin.torch.export.native.flat import flat_file
from deepthin.torch.export.native.operators import program_of
from deepthin.torch.export.native.runtime import FlatModel


def main() -> None:
    """A line for each network and code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="mlp,ctc")
    parser.add_argument("--codes", default="fp32,8,coded")
    parser.add_argument("--lanes", default="8,16")
    parser.add_argument("--runs", type=int, default=100)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lanes = given.lanes.split(",")
    print(f"| network | native | {' | '.join(f'C, {lane} lanes' for lane in lanes)} | torch, dense |")
    print(f"|---|---|{'---|' * len(lanes)}---|", flush=True)
    for name in given.networks.split(","):
        plain, x = dense(name)
        for code in given.codes.split(","):
            model = thin(name, code)[0]
            data, inputs = flat_file(program_of(model, [x])), [x.numpy()]
            files = [FlatModel(data, (f"-DDT_LANES={lane}",)) for lane in lanes]
            runs = [partial(model, x), *(partial(file, inputs) for file in files), partial(plain, x)]
            print(f"| {name}, {code} | {' | '.join(interleaved(runs, given.runs))} |", flush=True)


def interleaved(runs: list[Callable[[], object]], count: int) -> list[str]:
    """Median and least microseconds of each function; they take turns."""
    times: list[list[float]] = [[] for _ in runs]
    with torch.inference_mode():
        for _ in range(count):
            for run, taken in zip(runs, times, strict=True):
                begun = time.perf_counter()
                run()
                taken.append(1e6 * (time.perf_counter() - begun))
    return [f"{statistics.median(taken):,.0f} ({min(taken):,.0f})" for taken in times]


if __name__ == "__main__":
    main()
