"""Time DeepThin and its competitors in turn, in one run: ratios hold on a noisy machine, microseconds do not.

Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, Table 2, is what `tfkaldi` and `deepspeech` are drawn beside.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from deepthin.errors import BudgetError
from deepthin.kernels import products
from deepthin.lab.bench.competitors import (
    TFKALDI,
    Shapes,
    _network,
    dense_competitors,
    symbol_competitors,
    thin_competitors,
    thin_network,
)
from deepthin.lab.bench.networks import WHOLE, Whole, whole
from deepthin.lab.bench.shown import COLUMNS
from deepthin.lab.bench.timing import Timing, interleaved
from deepthin.lab.trial import quantised

CASES = ("linear", "tfkaldi", "train", *WHOLE, "tensorflow")


def run(
    case: str,
    shape: tuple[int, int],
    ratios: Sequence[float],
    batches: Sequence[int],
    rank: int,
    threads: int,
    repeats: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """One row for each batch and ratio: medians in microseconds. ``shape`` is (outputs, inputs), of a single layer.

    ``linear`` is one layer in evaluation, ``tfkaldi`` the paper's network, ``train`` a forward and a backward pass of a
    layer with the gradients of input and parameters; ``lstm`` and ``gru`` are 5 layers over 100 steps, whose shape is
    (units, inputs), ``deepspeech`` the paper's other network over a second of speech, ``train-lstm`` a training step of
    the task ctc, ``tensorflow`` one layer in evaluation within ``tf.function`` (deepthin.bench_tensorflow says who
    competes). ``microseconds`` is the bare operator for ``linear``, the module as users have it for the others;
    ``layer_microseconds`` always the module. The competitors: ``dense`` torch's own layers, ``packed`` oneDNN with
    packed weights, ``int8`` dynamic quantisation, ``rank`` and ``csr`` the same bytes as a plain rank factorisation and
    as sparse rows, by kernels of the same library; ``best_dense`` is the faster of the first two. ``uniform_8bit`` and
    ``kmeans_4bit``, for ``linear``, are thin layers of a symbol a weight, at the bytes that these take, ``kept`` the
    latter by its decoded weight, as for large batches. Every competitor is called some times before its timing; for
    ``cold_...`` the caches are flushed instead.
    """
    torch.set_num_threads(threads)
    shapes = TFKALDI if case == "tfkaldi" else [shape]
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        step = lambda done, total, number=number: progress(number * total + done, len(batches) * total)  # noqa: E731
        if case == "tensorflow":
            rows += _measure_tensorflow(shape, ratios, batch, rank, threads, repeats, step)
        elif case in WHOLE:
            rows += _measure_whole(case, whole(case, shape, batch), ratios, batch, rank, threads, repeats, step)
        else:
            rows += _measure(case, shapes, ratios, batch, rank, threads, repeats, step)
    return rows


def _measure(
    case: str,
    shapes: Shapes,
    ratios: Sequence[float],
    batch: int,
    rank: int,
    threads: int,
    repeats: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(batch, shapes[0][1])
    timings = [*dense_competitors(case, shapes, x)]
    if case == "linear":
        timings += symbol_competitors(shapes[0], x)
    common = {"case": case, "rows": shapes[-1][0], "cols": shapes[0][1], "batch": batch, "rank": rank}
    rows: list[dict[str, Any]] = []
    for ratio in ratios:
        row = {**common, "ratio": ratio, "threads": threads, "isa": products.isa()}
        try:
            model, n = thin_network(_network(shapes), ratio, rank)
        except BudgetError as error:
            rows.append({**row, "microseconds": None, "smallest_ratio": error.smallest_ratio})
            continue
        timings += thin_competitors(case, shapes, x, model, ratio, threads)
        rows.append({**row, "n": n})
    with torch.set_grad_enabled(case == "train"):
        warm, cold = interleaved(timings, repeats, cold=case != "train", progress=progress)
    for row in rows:
        for temperature, times in (("", warm), ("cold_", cold)) if "n" in row else ():
            values = {name: times.get((name, r)) for name, r in times if r in (None, row["ratio"])}
            if not values:
                continue
            if case != "linear" or "operator" not in values:
                values["operator"] = values["thin"]
            for name, value in values.items():
                row[temperature + COLUMNS[name]] = value
            dense = [v for v in (values["dense"], values.get("packed")) if v is not None]
            row[temperature + "best_dense_microseconds"] = min(dense)
            row.setdefault(temperature + COLUMNS["int8"], None)
    return rows


def _measure_whole(
    case: str,
    network: Whole,
    ratios: Sequence[float],
    batch: int,
    rank: int,
    threads: int,
    repeats: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dense = network.build()
    timings = [Timing("dense", None, network.work(dense))]
    if not network.trains:
        inside = nn.Sequential(network.build()).eval()  # torch quantises what is in a module, not the module
        timings.append(Timing("int8", None, network.work(quantised(inside))))
    rows: list[dict[str, Any]] = []
    for ratio in ratios:
        row = {
            "case": case,
            "rows": network.shape[0],
            "cols": network.shape[1],
            "batch": batch,
            "rank": rank,
            "ratio": ratio,
        }
        row |= {"threads": threads, "isa": products.isa()}
        try:
            model, n = thin_network(network.build(), ratio, rank)
        except BudgetError as error:
            rows.append({**row, "microseconds": None, "smallest_ratio": error.smallest_ratio})
            continue
        timings.append(Timing("thin", ratio, network.work(model)))
        rows.append({**row, "n": n})
        with suppress(BudgetError):
            timings.append(Timing("rank", ratio, network.work(thin_network(network.build(), ratio, 1, "rank")[0])))
    with torch.set_grad_enabled(network.trains):
        times, _ = interleaved(timings, repeats, cold=False, progress=progress)
    for row in rows:
        if "n" in row:
            for name in ("dense", "int8", "rank", "thin"):
                row[COLUMNS[name]] = times.get((name, None), times.get((name, row["ratio"])))
            row["microseconds"], row["best_dense_microseconds"] = row[COLUMNS["thin"]], row[COLUMNS["dense"]]
    return rows


def _measure_tensorflow(
    shape: tuple[int, int],
    ratios: Sequence[float],
    batch: int,
    rank: int,
    threads: int,
    repeats: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    from deepthin.lab.bench.tensorflow import layers

    found = list(layers(shape, ratios, batch, rank, threads))
    timings = [Timing(name, ratio, work) for name, ratio, work, _ in found if name != "smallest"]
    times, _ = interleaved(timings, repeats, cold=False, progress=progress)
    common = {"case": "tensorflow", "rows": shape[0], "cols": shape[1], "batch": batch, "rank": rank}
    rows: list[dict[str, Any]] = []
    for name, ratio, work, n in found:
        row = {**common, "ratio": ratio, "threads": threads, "isa": products.isa()}
        if name == "smallest":
            rows.append({**row, "microseconds": None, "smallest_ratio": work})
        elif name == "thin":
            own = {COLUMNS[kind]: value for (kind, at), value in times.items() if at in (None, ratio)}
            best = min(times["dense", None], times["xla", None])
            rows.append({**row, "n": n, **own, "microseconds": times[name, ratio], "best_dense_microseconds": best})
    return rows
