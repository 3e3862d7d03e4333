"""Fit the cost model of deepthin.torch.product to timings on this machine, and say what a choice by it costs.

    python benchmarks/fit_costs.py      (about five minutes, one core)

Prints the nanoseconds for each count that `product.terms` names, to be copied there, and the regret: the time of the
way that the fitted model chooses over that of the fastest one.
"""

import itertools
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls

from deepthin import METHODS, BudgetError
from deepthin.methods.factor import Factor
from deepthin.torch.product import factor_linear, terms

SHAPES = ((2048, 2048), (1024, 1024), (512, 512), (300, 784), (128, 256), (2048, 440))
RATIOS = (0.2, 0.05, 0.0195, 0.0099, 0.004)
RANKS = (1, 4)
BATCHES = (1, 8, 32, 128, 512)


Case = tuple[bool, dict[str, tuple[float, ...]], dict[str, float]]
"""Whether in evaluation, and for each way its counts and its nanoseconds."""


def median_ns(work: Callable[[], object], repeats: int = 5) -> float:
    """The median of some runs after one to warm up."""
    times: list[int] = []
    for _ in range(repeats + 1):
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    return float(np.median(times[1:]))


def measure(method: Factor, batch: int, x: torch.Tensor, xf: torch.Tensor, wf: torch.Tensor) -> list[Case]:
    """Both cases of one plan and batch: evaluation with the dense weight at hand, and a training step."""
    grad = torch.randn(batch, method.shape[0])
    ready = method.decode({"xf": xf, "wf": wf}, torch).detach().contiguous()

    def forward(path: str, weight: torch.Tensor | None) -> torch.Tensor:
        if path != "dense":
            return factor_linear(method, x, xf, wf, path)
        return F.linear(x, method.decode({"xf": xf, "wf": wf}, torch) if weight is None else weight)

    def step(path: str) -> None:
        x.grad = xf.grad = wf.grad = None
        forward(path, None).backward(grad)

    counts = terms(method, batch)
    paths = [path for path in counts if path != "direct" or method.n < 300]
    trained = {path: median_ns(partial(step, path)) for path in paths}
    with torch.no_grad():
        judged = {path: median_ns(partial(forward, path, ready)) for path in paths}
    return [(True, counts, judged), (False, counts, trained)]


def measure_all() -> list[Case]:
    """Every shape, ratio, rank and batch that there is a plan for."""
    cases: list[Case] = []
    for shape, ratio, rank, batch in itertools.product(SHAPES, RATIOS, RANKS, BATCHES):
        try:
            method = METHODS["deepthin"].fit(shape, int(32 * ratio * shape[0] * shape[1]), rank=rank)
        except BudgetError:
            continue
        factors = (torch.randn(s, requires_grad=True) for s in method.code_shapes().values())
        cases += measure(method, batch, torch.randn(batch, shape[1], requires_grad=True), *factors)
    return cases


def main() -> None:
    """Measure, fit each way by non-negative least squares on relative errors, print."""
    torch.set_num_threads(1)
    cases = measure_all()
    for ready in (True, False):
        own = [(counts, times) for is_ready, counts, times in cases if is_ready == ready]
        fitted = {}
        print("evaluation, dense weight kept:" if ready else "training:")
        for path in ("dense", "fft", "direct"):
            counts = np.array([c[path] for c, t in own if path in t])
            times = np.array([t[path] for c, t in own if path in t])
            fitted[path], _ = nnls(counts / times[:, None], np.ones(len(times)))
            print(f"  {path:7}", ", ".join(f"{value:.3g}" for value in fitted[path]))
        regret = []
        for counts, times in own:
            predicted = {path: float(np.dot(fitted[path], counts[path])) for path in times}
            regret.append(times[min(predicted, key=predicted.__getitem__)] / min(times.values()))
        print(f"  regret: mean {np.mean(regret):.3f}, 95th percentile {np.percentile(regret, 95):.2f}")


if __name__ == "__main__":
    main()
