"""Fit the cost model of deepthin.kernels.costs to timings on this machine, and print its regret.

    python benchmarks/fit_costs.py      (about five minutes, one core)

Prints the nanoseconds for each term that `costs.terms` counts, to be copied there, and the regret: the time of the way
to multiply that the fitted model chooses over that of the fastest one.
"""

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from deepthin import METHODS, BudgetError
from deepthin.kernels.costs import NATIVE, Path, terms
from deepthin.methods.factor import Factor
from deepthin.storage.contents import Part
from deepthin.torch import multiply, operators
from deepthin.torch.weight import ThinWeight

SHAPES = ((2048, 2048), (1024, 1024), (512, 512), (300, 784), (128, 256), (2048, 440), (64, 64))
RATIOS = (0.2, 0.05, 0.0195, 0.0099, 0.004, 0.0014)
RANKS = (1, 4)
BATCHES = (1, 2, 8, 32, 128, 512)


Case = tuple[bool, dict[str, tuple[float, ...]], dict[str, float]]
"""Whether in evaluation, and for each way to multiply its counts and its nanoseconds."""


def median_ns(work: Callable[[], object], repeats: int = 5) -> float:
    """The median of several runs, after one to warm up."""
    times: list[int] = []
    for _ in range(repeats + 1):
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    return float(np.median(times[1:]))


def measure(method: Factor, batch: int) -> list[Case]:
    """Both cases of one plan and batch: evaluation with the dense weight cached, and a training step."""
    rows, cols = method.shape
    part = Part(method.shape)
    weight = ThinWeight.draw("w", method, [part], torch.zeros(0), np.random.default_rng(0), 1.0)
    x, bias = torch.randn(batch, cols, requires_grad=True), nn.Parameter(torch.zeros(rows))
    grad = torch.randn(batch, rows)

    counts, ways = terms(method, batch), {way.name: way for way in multiply.WAYS}

    def step(path: Path) -> None:
        x.grad = bias.grad = weight.xf.grad = weight.wf.grad = None
        ways[path].run(weight, x, 0, bias).backward(grad)

    def judge(path: Path) -> None:
        if path in NATIVE:
            fast(x, weight.xf, weight.wf, bias)
        else:
            ways[path].run(weight, x, 0, bias)

    trained, judged = {}, {}
    by_fft = operators._by_fft
    for path in counts:
        if path == "direct" and method.n >= 300:
            continue
        operators._by_fft = lambda method, x, correlation, training, path=path: path == "native-fft"
        trained[path] = median_ns(lambda path=path: step(path))
    operators._by_fft = by_fft
    weight.eval().requires_grad_(False)
    fast = weight.short_way(0)
    with torch.no_grad():
        for path in trained:
            if path in NATIVE:
                fast.choose(batch, 1 + (path == "native-fft"))
            judged[path] = median_ns(lambda path=path: judge(path))
    return [(True, counts, judged), (False, counts, trained)]


def measure_all() -> list[Case]:
    """Every shape, ratio, rank and batch for which a plan exists."""
    cases: list[Case] = []
    for shape, ratio, rank, batch in itertools.product(SHAPES, RATIOS, RANKS, BATCHES):
        try:
            method = METHODS["deepthin"].fit(shape, int(32 * ratio * shape[0] * shape[1]), rank=rank)
        except BudgetError:
            continue
        cases += measure(method, batch)
    return cases


def main() -> None:
    """Measure, fit each way by non-negative least squares on relative errors, print."""
    torch.set_num_threads(1)
    cases = measure_all()
    for ready in (True, False):
        own = [(counts, times) for is_ready, counts, times in cases if is_ready == ready]
        fitted = {}
        print("evaluation, dense weight cached:" if ready else "training:")
        for path in ("dense", "fft", "direct", "native-direct", "native-fft"):
            counts = np.array([c[path] for c, t in own if path in t])
            times = np.array([t[path] for c, t in own if path in t])
            fitted[path], _ = nnls(counts / times[:, None], np.ones(len(times)))
            print(f"  {path:7}", ", ".join(f"{value:.3g}" for value in fitted[path]))
        for native in (True, False):
            regret = []
            for counts, times in own:
                among = [p for p in times if p == "dense" or (p in NATIVE) == native]
                predicted = {path: float(np.dot(fitted[path], counts[path])) for path in among}
                regret.append(times[min(predicted, key=predicted.__getitem__)] / min(times[p] for p in among))
            print(
                f"  regret {'with native code' if native else 'in torch'}: mean {np.mean(regret):.3f}, "
                f"95th percentile {np.percentile(regret, 95):.2f}, worst {max(regret):.1f}"
            )


if __name__ == "__main__":
    main()
