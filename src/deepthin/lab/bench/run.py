"""Time DeepThin and its competitors in turn, in one run: ratios hold on a noisy machine, microseconds do not.

Charts of `tfkaldi` and `deepspeech` also show Table 2 of Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from deepthin.errors import BudgetError
from deepthin.kernels import products
from deepthin.lab.bench.competitors import (
    CODED,
    TFKALDI,
    Shapes,
    decoded_competitor,
    dense_competitors,
    method_competitor,
    network,
    symbol_competitors,
    thin_competitors,
    thin_network,
)
from deepthin.lab.bench.modules import ACOUSTIC, dense_modules, thin_modules
from deepthin.lab.bench.networks import WHOLE, Whole, whole
from deepthin.lab.bench.rows import BenchRow
from deepthin.lab.bench.shown import COLUMNS
from deepthin.lab.bench.timing import Times, Timing, interleaved
from deepthin.lab.trial import quantised

MODULES = ("modules", "acoustic")
METHODS = ("kronecker", "tensor-train")  # that can be timed beside
CASES = ("linear", *MODULES, "tfkaldi", "train", *WHOLE, "tensorflow")


def run(
    case: str,
    shape: tuple[int, int],
    ratios: Sequence[float],
    batches: Sequence[int],
    ranks: Sequence[int],
    threads: int,
    repeats: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    methods: Sequence[str] = (),
) -> list[BenchRow]:
    """Time DeepThin and its competitors: medians of interleaved calls, in microseconds.

    Cases: ``linear`` is one layer in evaluation, ``tfkaldi`` the paper's feed-forward network, ``train`` a forward and
    a backward pass of one layer with the gradients of input and parameters. ``modules`` is one layer as users call it,
    and ``acoustic`` the network of that task, both beside dense ones in bfloat16 and int8. ``lstm`` and ``gru`` are 5
    layers over 100 steps, ``deepspeech`` is the paper's recurrent network over one second of speech, ``train-lstm`` a
    training step of the task ctc without the optimiser, ``train-acoustic`` one of the task acoustic with Adam.
    ``tensorflow`` is one layer in evaluation within ``tf.function`` (``deepthin.lab.bench.tensorflow``
    lists its competitors).

    Columns: ``microseconds`` is the bare operator for ``linear``, the module for other cases; ``layer_microseconds`` is
    always the module. ``dense`` are torch's layers, ``packed`` oneDNN with packed weights, ``best_dense`` the faster of
    both, ``int8`` dynamic quantisation. ``rank`` and ``csr`` have as many bytes as DeepThin: a rank factorisation and
    sparse rows, by kernels of the same library. For ``linear``, ``uniform_8bit`` and ``kmeans_4bit`` are layers with
    one symbol for each weight, at the bytes that these take, and ``kept`` is the latter by its decoded weight, as for
    large batches. For ``linear`` and ``tfkaldi``, ``decoded`` are torch's layers with the weights decoded from DeepThin
    at the first ratio. ``thin_8bit`` and ``thin_coded`` have about as many factors, in 8 bits and with a learned step;
    ``bf16`` is the dense network in bfloat16, ``torchao_int8`` torchao's dynamic quantisation. Each competitor runs a
    few times before it is timed; for ``cold_...`` the caches are flushed instead.

    Args:
        case: One of ``CASES``.
        shape: (outputs, inputs) of a single layer; (units, inputs) of ``lstm`` and ``gru``.
        ratios: Bytes of the matrices over those of the dense ones, 0 to 1.
        batches: Numbers of items.
        ranks: Ranks of DeepThin's factors, >= 1.
        threads: Number of threads of torch and of the native kernels; it is set for the whole process.
        repeats: Timed calls of each competitor, >= 1.
        progress: Called with the number of finished rounds and of all rounds.
        methods: Of ``METHODS``, those that are timed beside, as modules at the same ratios; not for ``tensorflow``.

    Returns:
        One row for each rank, batch and ratio; one without times where the ratio cannot be reached. Those of one rank
        and batch are timed in turn.

    Raises:
        ConfigError: ``tensorflow`` without TensorFlow.
    """
    torch.set_num_threads(threads)
    shapes = {"tfkaldi": TFKALDI, "acoustic": ACOUSTIC}.get(case, [shape])
    rows: list[BenchRow] = []
    runs = list(itertools.product(ranks, batches))
    for number, (rank, batch) in enumerate(runs):
        step = lambda done, total, number=number: progress(number * total + done, len(runs) * total)  # noqa: E731
        if case == "tensorflow":
            rows += _measure_tensorflow(shape, ratios, batch, rank, threads, repeats, step)
        elif case in WHOLE:
            timed = whole(case, shape, batch)
            rows += _measure_whole(case, timed, ratios, batch, rank, threads, repeats, step, methods)
        else:
            rows += _measure(case, shapes, ratios, batch, rank, threads, repeats, step, methods)
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
    methods: Sequence[str] = (),
) -> list[BenchRow]:
    torch.manual_seed(0)
    x = torch.randn(batch, shapes[0][1])
    timings = [*(dense_modules(shapes, x) if case in MODULES else dense_competitors(case, shapes, x))]
    if case == "linear":
        timings += symbol_competitors(shapes[0], x)
    shape = shapes[-1][0], shapes[0][1]
    rows: list[BenchRow] = []
    for ratio in ratios:
        row = _row(case, shape, batch, rank, ratio, threads)
        try:
            model, n = thin_network(network(shapes), ratio, rank)
        except BudgetError as error:
            rows.append(replace(row, smallest_ratio=error.smallest_ratio))
            continue
        if case not in ("train", *MODULES) and not any(row.n for row in rows):
            timings.append(decoded_competitor(shapes, x, model))
        if case in MODULES:
            timings += thin_modules(shapes, x, model, ratio, rank)
        else:
            timings += thin_competitors(case, shapes, x, model, ratio, threads)
        for method in methods:
            with suppress(BudgetError):
                timings.append(method_competitor(case, shapes, x, ratio, method))
        rows.append(replace(row, n=n))
    with torch.set_grad_enabled(case == "train"):
        warm, cold = interleaved(timings, repeats, cold=case not in ("train", *MODULES), progress=progress)
    return [row if row.n is None else replace(row, times=_columns(case, row.ratio, warm, cold)) for row in rows]


def _row(case: str, shape: tuple[int, int], batch: int, rank: int, ratio: float, threads: int) -> BenchRow:
    """The row before timing: no times."""
    return BenchRow(
        case=case,
        rows=shape[0],
        cols=shape[1],
        batch=batch,
        rank=rank,
        ratio=ratio,
        threads=threads,
        isa=products.isa(),
    )


def _columns(case: str, ratio: float, warm: Times, cold: Times) -> dict[str, float | None]:
    """The times at one ratio, and those of competitors that have none, by column."""
    columns: dict[str, float | None] = {}
    for temperature, times in (("", warm), ("cold_", cold)):
        values = {name: time for (name, at), time in times.items() if at in (None, ratio)}
        if not values:
            continue
        if case != "linear" or "operator" not in values:
            values["operator"] = values["thin"]
        columns |= {temperature + COLUMNS[name]: time for name, time in values.items()}
        columns[temperature + "best_dense_microseconds"] = min(values["dense"], values.get("packed", values["dense"]))
        columns.setdefault(temperature + COLUMNS["int8"], None)
    return columns


def _measure_whole(
    case: str,
    timed: Whole,
    ratios: Sequence[float],
    batch: int,
    rank: int,
    threads: int,
    repeats: int,
    progress: Callable[[int, int], None],
    methods: Sequence[str] = (),
) -> list[BenchRow]:
    torch.manual_seed(0)
    dense = timed.build()
    timings = [Timing("dense", None, timed.work(dense))]
    if not timed.trains:
        inside = nn.Sequential(timed.build()).eval()  # torch quantises submodules, not the module itself
        timings.append(Timing("int8", None, timed.work(quantised(inside))))
    rows: list[BenchRow] = []
    for ratio in ratios:
        row = _row(case, timed.shape, batch, rank, ratio, threads)
        try:
            model, n = thin_network(timed.build(), ratio, rank)
        except BudgetError as error:
            rows.append(replace(row, smallest_ratio=error.smallest_ratio))
            continue
        timings.append(Timing("thin", ratio, timed.work(model)))
        rows.append(replace(row, n=n))
        with suppress(BudgetError):
            timings.append(Timing("rank", ratio, timed.work(thin_network(timed.build(), ratio, 1, "rank")[0])))
        for method in methods:
            with suppress(BudgetError):
                timings.append(Timing(method, ratio, timed.work(thin_network(timed.build(), ratio, 1, method)[0])))
        with suppress(BudgetError):
            if timed.trains:
                coded, _ = thin_network(timed.build(), ratio / 4, rank, then=CODED)
                timings.append(Timing("thin_coded", ratio, timed.work(coded)))
    with torch.set_grad_enabled(timed.trains):
        times, _ = interleaved(timings, repeats, cold=False, progress=progress)
    whole_rows: list[BenchRow] = []
    for row in rows:
        columns: dict[str, float | None] = {}
        if row.n is not None:
            for name in ("dense", "int8", "rank", "thin", "thin_coded", *methods):
                columns[COLUMNS[name]] = times.get((name, None), times.get((name, row.ratio)))
            columns |= {"microseconds": columns[COLUMNS["thin"]], "best_dense_microseconds": columns[COLUMNS["dense"]]}
        whole_rows.append(replace(row, times=columns))
    return whole_rows


def _measure_tensorflow(
    shape: tuple[int, int],
    ratios: Sequence[float],
    batch: int,
    rank: int,
    threads: int,
    repeats: int,
    progress: Callable[[int, int], None],
) -> list[BenchRow]:
    from deepthin.lab.bench.tensorflow import layers

    competitors = list(layers(shape, ratios, batch, rank, threads))
    timings = [Timing(name, ratio, work) for name, ratio, work, _ in competitors if name != "smallest"]
    times, _ = interleaved(timings, repeats, cold=False, progress=progress)
    rows: list[BenchRow] = []
    for name, ratio, work, n in competitors:
        if ratio is None:
            continue
        row = _row("tensorflow", shape, batch, rank, ratio, threads)
        if name == "smallest":
            rows.append(replace(row, smallest_ratio=work))
        elif name == "thin":
            columns = {COLUMNS[kind]: value for (kind, at), value in times.items() if at in (None, ratio)}
            columns |= {"microseconds": times[name, ratio]}
            columns |= {"best_dense_microseconds": min(times["dense", None], times["xla", None])}
            rows.append(replace(row, n=n, times=columns))
    return rows
