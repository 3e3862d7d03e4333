"""Time a layer by every way to compute it, in turn, in one run: ratios hold on a noisy machine, microseconds do not."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.method import BudgetError
from deepthin.report import table
from deepthin.torch.layers import thin_tensors

CASES = ("linear", "train")
WARM_UPS = 3


def run(
    case: str,
    shape: tuple[int, int],
    ratios: tuple[float, ...],
    batches: tuple[int, ...],
    rank: int,
    threads: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row for each ratio and batch: medians in microseconds. ``shape`` is (outputs, inputs).

    ``linear`` is a forward pass in evaluation, ``train`` a forward and a backward pass with the gradients of input and
    parameters. ``microseconds`` is a ThinLinear as users have it, ``path`` the way that it chose, ``best_dense`` the
    faster of nn.Linear and oneDNN with packed weights (inference only).
    """
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for ratio in ratios:
        for batch in batches:
            row = {"case": case, "rows": shape[0], "cols": shape[1], "batch": batch, "ratio": ratio}
            torch.manual_seed(0)
            dense, thin = nn.Linear(shape[1], shape[0]), nn.Sequential(nn.Linear(shape[1], shape[0]))
            try:
                rule = {"rules": {"*": {"method": "deepthin", "ratio": ratio, "rank": rank}}}
                report = dt.compress(thin, rule, init="scratch")
            except BudgetError as error:
                rows.append({**row, "rank": rank, "microseconds": None, "smallest_ratio": error.smallest_ratio})
                continue
            x = torch.randn(batch, shape[1])
            times = _interleaved(_competitors(case, dense, thin, x), repeats)
            best = min(times[name] for name in times if name != "thin")
            path = next(iter(thin_tensors(thin).values()))[0].path(x)
            rows.append(
                row
                | {"n": report.rows[0].n, "rank": rank, "microseconds": times["thin"], "path": path}
                | {"dense_microseconds": times["dense"], "best_dense_microseconds": best, "threads": threads}
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """A table of ratios to dense."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        start = (row["case"], f"{row['rows']}x{row['cols']}", str(row["batch"]), f"{row['ratio']:g}")
        if row["microseconds"] is None:
            lines.append((*start, "", "", "", "", f"smallest ratio {row['smallest_ratio']:.5f}"))
            continue
        times = (row["microseconds"], row["dense_microseconds"])
        best = f"{row['best_dense_microseconds'] / times[0]:.1f}x"
        lines.append(
            (*start, str(row["n"]), f"{times[0]:,.0f}", f"{times[1]:,.0f}", f"{times[1] / times[0]:.1f}x", best)
        )
    heads = ("case", "layer", "batch", "ratio", "n", "us", "dense us", "over dense", "over best dense")
    return table(heads, lines, right=tuple(range(2, 9)), total=False)


def _competitors(case: str, dense: nn.Module, thin: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    if case == "train":
        grad = torch.randn(len(x), dense.out_features)  # pyright: ignore[reportArgumentType, reportCallIssue]
        x = x.requires_grad_()

        def step(layer: nn.Module) -> Callable[[], object]:
            def work() -> None:
                layer.zero_grad()
                x.grad = None
                layer(x).backward(grad)

            return work

        return {"thin": step(thin.train()), "dense": step(dense)}

    def forward(layer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def work() -> None:
            with torch.no_grad():
                layer(x)

        return work

    weight, bias = dense.weight.detach(), dense.bias.detach()  # pyright: ignore[reportCallIssue]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))  # pyright: ignore
    one_dnn = lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # noqa: E731
    return {"thin": forward(thin.eval()), "dense": forward(dense.eval()), "packed": forward(one_dnn)}


def _interleaved(competitors: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median microseconds of each, all of them timed in every round."""
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(WARM_UPS + repeats):
        for name, work in competitors.items():
            start = time.perf_counter_ns()
            work()
            if turn >= WARM_UPS:
                times[name].append((time.perf_counter_ns() - start) / 1000)
    return {name: statistics.median(values) for name, values in times.items()}
