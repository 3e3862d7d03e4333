"""Fit the cost model of deepthin.kernels.costs to timings on this machine, and print its regret.

    python benchmarks/fit_costs.py [--convolutions | --chains]     (about two minutes, one core)

Prints the nanoseconds for each term that `costs.terms` counts, to be copied there, and the regret: the time of the way
to multiply that the fitted model chooses over that of the fastest one.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from deepthin import METHODS, BudgetError
from deepthin.kernels import costs
from deepthin.kernels.chains import Layout, layout_of
from deepthin.kernels.costs import NATIVE, Path, terms
from deepthin.method import InTurn, Method
from deepthin.methods.factor import Factor
from deepthin.storage.contents import Part
from deepthin.torch import convolution, multiply, operators
from deepthin.torch.core_operators import trained_core_linear
from deepthin.torch.weight import ThinWeight

SHAPES = ((2048, 2048), (1024, 1024), (512, 512), (300, 784), (128, 256), (2048, 440), (64, 64))
RATIOS = (0.2, 0.05, 0.0195, 0.0099, 0.004, 0.0014)
RANKS = (1, 4)
BATCHES = (1, 2, 8, 32, 128, 512)
CONVOLUTIONS: tuple[tuple[nn.Conv1d | nn.Conv2d, tuple[int, ...]], ...] = (
    (nn.Conv2d(1, 20, 5), (1, 1, 28, 28)),
    (nn.Conv2d(20, 50, 5), (1, 20, 12, 12)),
    (nn.Conv2d(20, 50, 5), (32, 20, 12, 12)),
    (nn.Conv2d(16, 16, 3, padding=1), (1, 16, 28, 28)),
    (nn.Conv2d(32, 32, 3, padding=1), (32, 32, 14, 14)),
    (nn.Conv2d(32, 64, 3, stride=2, padding=1), (1, 32, 14, 14)),
    (nn.Conv2d(32, 64, 3, stride=2, padding=1), (32, 32, 14, 14)),
    (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 7, 7)),
    (nn.Conv2d(64, 64, 3, padding=1), (32, 64, 7, 7)),
    (nn.Conv2d(128, 128, 3, padding=1), (1, 128, 28, 28)),
    (nn.Conv2d(256, 256, 3, stride=2, padding=1), (8, 256, 14, 14)),
    (nn.Conv2d(512, 512, 3, padding=1), (1, 512, 7, 7)),
    (nn.Conv2d(256, 1024, 1), (1, 256, 14, 14)),
    (nn.Conv1d(64, 64, 9), (1, 64, 100)),
    (nn.Conv1d(256, 512, 64), (1, 256, 71)),
    (nn.Conv1d(1024, 128, 64), (1, 1024, 127)),
)


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
            fast(x, {"xf": weight.xf, "wf": weight.wf}, bias)
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


def measure_convolution(
    layer: nn.Conv1d | nn.Conv2d, images: Tensor, ratio: float, rank: int
) -> list[tuple[bool, tuple[float, ...], float, Factor, int, float]]:
    """Both cases of one convolution: counts and time of the dense one, plan, items, time by factors."""
    rows, cols = layer.out_channels, layer.weight[0].numel()
    method = cast(Factor, METHODS["deepthin"].fit((rows, cols), int(32 * ratio * rows * cols), rank=rank))
    weight = ThinWeight.draw("w", method, [Part(tuple(layer.weight.shape))], images, np.random.default_rng(0), 1.0)
    window, made = weight.kernels[0], convolution.geometry(layer)
    assert window is not None
    x = images.clone().requires_grad_()
    grad = torch.randn_like(layer(images))
    items, area = grad.numel() // rows, rows * cols

    def dense() -> Tensor:
        return layer._conv_forward(x, weight(), None)

    def factors() -> Tensor:
        return cast(Tensor, convolution._Convolve.apply(x, weight.xf, weight.wf, None, made, window, 1.0))

    def step(way: Callable[[], Tensor]) -> None:
        x.grad = weight.xf.grad = weight.wf.grad = None
        way().backward(grad)

    trained = [median_ns(lambda way=way: step(way)) for way in (dense, factors)]
    weight.eval().requires_grad_(False)
    with torch.no_grad():
        judged = [median_ns(way) for way in (dense, factors)]
    return [
        (ready, (1, items * area, area, 0 if ready else area * rank), times[0], method, items, times[1])
        for ready, times in ((True, judged), (False, trained))
    ]


def fit_convolutions() -> None:
    """Measure, fit, print: the constants of ``costs.convolution_costs``. Those of products must be up to date."""
    found = []
    for (layer, shape), ratio, rank in itertools.product(CONVOLUTIONS, (0.1, 0.02), RANKS):
        try:
            found += measure_convolution(layer, torch.randn(shape), ratio, rank)
        except BudgetError:
            continue
    for ready in (True, False):
        cases = [case[1:] for case in found if case[0] == ready]
        times = np.array([case[1] for case in cases])
        dense, _ = nnls(np.array([counts for counts, *_ in cases]) / times[:, None], np.ones(len(times)))
        moved, rest, by_factors = [], [], []
        for _, _, plan, items, factors in cases:
            product = costs.windows_work(plan, items, ready)
            moved.append((1, items * sum(plan.shape)))
            rest.append(max(factors - product, 0))
            by_factors.append(factors)
        weigh = 1 / np.array(by_factors)
        windows, _ = nnls(np.array(moved) * weigh[:, None], np.array(rest) * weigh)
        print(f"convolutions, {'evaluation' if ready else 'training'}:")
        for name, fitted in (("dense", dense), ("windows", windows)):
            print(f"  {name:7}", ", ".join(f"{value:.3g}" for value in fitted))
        regret = []
        for (counts, dense_time, plan, items, factors), count in zip(cases, moved, strict=True):
            product = costs.windows_work(plan, items, ready)
            chosen = factors if product + np.dot(windows, count) < np.dot(dense, counts) else dense_time
            regret.append(chosen / min(dense_time, factors))
        print(f"  regret: mean {np.mean(regret):.3f}, worst {max(regret):.1f}")


def measure_chain(
    method: Method, batch: int
) -> list[tuple[bool, tuple[int, ...], float, float, float, tuple[int, ...], float]]:
    """Both cases of a chain of cores: its counts and times in native code and in torch; those of the decoded weight."""
    rows, cols = method.shape
    weight = ThinWeight.draw("w", method, [Part(method.shape)], torch.zeros(0), np.random.default_rng(0), 1.0)
    x, bias = torch.randn(batch, cols, requires_grad=True), nn.Parameter(torch.zeros(rows))
    grad, layout = torch.randn(batch, rows), cast(Layout, layout_of(method))
    fast, entries = cast(Any, weight.short_way(0)), weight.floats()
    fast.choose(batch, 1)

    def step(run: Callable[[], Tensor]) -> None:
        x.grad = bias.grad = None
        weight.zero_grad()
        run().backward(grad)

    native = lambda: trained_core_linear(layout, fast, list(entries.values()), x, bias)  # noqa: E731
    dense = lambda: multiply.DENSE.run(weight, x, 0, bias)  # noqa: E731
    in_turn = lambda: multiply.IN_TURN.run(weight, x, 0, bias)  # noqa: E731
    times = [median_ns(lambda run=run: step(run)) for run in (native, dense, in_turn)]
    weight.eval().requires_grad_(False)
    with torch.no_grad():
        judged = [median_ns(run) for run in (lambda: fast(x, entries, bias), dense, in_turn)]
    found = []
    for ready, (own, other, torchs) in ((True, judged), (False, times)):
        counts = costs.in_turn_terms(cast(InTurn, method), batch)
        predicted = multiply.DENSE.cost(multiply.Case(method, None, batch, ready))
        found.append((ready, costs.chain_terms(layout, batch), own, other, predicted, counts, torchs))
    return found


def fit_chains() -> None:
    """Measure, fit, print the constants of chains. Those of the decoded weight must be up to date."""
    found = []
    names, shapes = ("kronecker", "tensor-train"), (*SHAPES, (1024, 429), (429, 1024), (102, 1024))
    for name, shape, ratio, batch in itertools.product(names, shapes, (0.05, 0.0195, 0.0099, 0.004), BATCHES):
        with suppress(BudgetError):
            found += measure_chain(METHODS[name].fit(shape, int(32 * ratio * math.prod(shape))), batch)
    for ready in (True, False):
        cases = [case[1:] for case in found if case[0] == ready]
        title = f"chains, {'evaluation' if ready else 'training'}"
        for name, place, at in (("native", 0, 1), ("in torch", 4, 5)):
            times = np.array([case[at] for case in cases])
            fitted, _ = nnls(np.array([case[place] for case in cases]) / times[:, None], np.ones(len(times)))
            print(f"{title}, {name}:", ", ".join(f"{value:.3g}" for value in fitted))
            regret = []
            for case in cases:
                own, other = case[at], case[2]
                regret.append((own if np.dot(fitted, case[place]) < case[3] else other) / min(own, other))
            print(
                f"  regret: mean {np.mean(regret):.3f}, 95th percentile {np.percentile(regret, 95):.2f}, "
                f"worst {max(regret):.1f}"
            )


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
    if "--chains" in sys.argv:
        fit_chains()
        return
    if "--convolutions" in sys.argv:
        fit_convolutions()
        return
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
