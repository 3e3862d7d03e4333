"""Time DeepThin and its competitors in turn, in one run: ratios hold on a noisy machine, microseconds do not.

Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, Table 2, is what `tfkaldi` and `deepspeech` are drawn beside.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

import deepthin.torch as dt
from deepthin import kernels
from deepthin.method import BudgetError
from deepthin.methods.factor import Factor
from deepthin.methods.kmeans import KMeans
from deepthin.methods.scalar import Uniform
from deepthin.networks import WHOLE, Whole, Work, whole
from deepthin.report import table
from deepthin.storage import Part
from deepthin.torch.layers import make_thin
from deepthin.torch.weight import ThinWeight
from deepthin.trial import quantised

Shapes = Sequence[tuple[int, int]]
"""(outputs, inputs) of one linear layer after the other, rectified but for the last."""

CASES = ("linear", "tfkaldi", "train", *WHOLE, "tensorflow")
PAPER_RATIOS = (0.0195, 0.0129, 0.0099, 0.0057, 0.0040, 0.0027, 0.0020, 0.0014)
TFKALDI: Shapes = ((2048, 440), *[(2048, 2048)] * 5, (1952, 2048))
# Table 2: times faster than the uncompressed network on three machines, by the size of their last cache
PAPER = {
    "tfkaldi": {
        "paper, 6 MB cache": (3.80, 5.64, 6.47, 8.12, 8.53, 8.22, 7.43, 4.44),
        "paper, 25 MB cache": (2.51, 3.16, 3.88, 4.21, 5.69, 5.22, 4.56, 4.12),
        "paper, 45 MB cache": (2.46, 3.51, 4.09, 4.84, 5.32, 5.42, 4.58, 2.44),
    },
    "deepspeech": {
        "paper, 6 MB cache": (7.66, 10.66, 12.12, 13.69, 13.72, 13.04, 11.68, 8.72),
        "paper, 25 MB cache": (2.24, 3.09, 3.50, 3.89, 3.86, 3.65, 3.36, 2.57),
        "paper, 45 MB cache": (2.08, 2.77, 3.09, 3.67, 3.70, 3.46, 3.22, 2.42),
    },
}

_TURNS_BEFORE = 2  # calls right before the one that is timed, so that its data is where it would be in steady use
_BUSY_SECONDS = 0.005  # until another library's threads have stopped to wait, busily, for more work
_FLUSH_BYTES = 96 << 20  # more than the caches hold
_COLUMNS = {  # what is timed, and the name of its column
    "operator": "microseconds",
    "thin": "layer_microseconds",
    "dense": "dense_microseconds",
    "packed": "packed_microseconds",
    "int8": "int8_microseconds",
    "rank": "rank_microseconds",
    "csr": "csr_microseconds",
    "uniform": "uniform_8bit_microseconds",
    "kmeans": "kmeans_4bit_microseconds",
    "kept": "kept_microseconds",
    "xla": "xla_microseconds",
    "function": "function_microseconds",
    "generated": "generated_microseconds",
}


class Timing(NamedTuple):
    """What is run: which competitor, at which ratio (none: at any), as long as it takes."""

    name: str
    ratio: float | None
    work: Work


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
    timings = [*_dense_competitors(case, shapes, x)]
    if case == "linear":
        timings += _symbol_competitors(shapes[0], x)
    common = {"case": case, "rows": shapes[-1][0], "cols": shapes[0][1], "batch": batch, "rank": rank}
    rows: list[dict[str, Any]] = []
    for ratio in ratios:
        row = {**common, "ratio": ratio, "threads": threads, "isa": kernels.isa()}
        try:
            model, n = _thin(_network(shapes), ratio, rank)
        except BudgetError as error:
            rows.append({**row, "microseconds": None, "smallest_ratio": error.smallest_ratio})
            continue
        timings += _thin_competitors(case, shapes, x, model, ratio, threads)
        rows.append({**row, "n": n})
    with torch.set_grad_enabled(case == "train"):
        warm, cold = _interleaved(timings, repeats, cold=case != "train", progress=progress)
    for row in rows:
        for temperature, times in (("", warm), ("cold_", cold)) if "n" in row else ():
            values = {name: times.get((name, r)) for name, r in times if r in (None, row["ratio"])}
            if not values:
                continue
            if case != "linear" or "operator" not in values:
                values["operator"] = values["thin"]
            for name, value in values.items():
                row[temperature + _COLUMNS[name]] = value
            dense = [v for v in (values["dense"], values.get("packed")) if v is not None]
            row[temperature + "best_dense_microseconds"] = min(dense)
            row.setdefault(temperature + _COLUMNS["int8"], None)
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
        row |= {"threads": threads, "isa": kernels.isa()}
        try:
            model, n = _thin(network.build(), ratio, rank)
        except BudgetError as error:
            rows.append({**row, "microseconds": None, "smallest_ratio": error.smallest_ratio})
            continue
        timings.append(Timing("thin", ratio, network.work(model)))
        rows.append({**row, "n": n})
        with suppress(BudgetError):
            timings.append(Timing("rank", ratio, network.work(_thin(network.build(), ratio, 1, "rank")[0])))
    with torch.set_grad_enabled(network.trains):
        times, _ = _interleaved(timings, repeats, cold=False, progress=progress)
    for row in rows:
        if "n" in row:
            for name in ("dense", "int8", "rank", "thin"):
                row[_COLUMNS[name]] = times.get((name, None), times.get((name, row["ratio"])))
            row["microseconds"], row["best_dense_microseconds"] = row[_COLUMNS["thin"]], row[_COLUMNS["dense"]]
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
    from deepthin.bench_tensorflow import layers

    found = list(layers(shape, ratios, batch, rank, threads))
    timings = [Timing(name, ratio, work) for name, ratio, work, _ in found if name != "smallest"]
    times, _ = _interleaved(timings, repeats, cold=False, progress=progress)
    common = {"case": "tensorflow", "rows": shape[0], "cols": shape[1], "batch": batch, "rank": rank}
    rows: list[dict[str, Any]] = []
    for name, ratio, work, n in found:
        row = {**common, "ratio": ratio, "threads": threads, "isa": kernels.isa()}
        if name == "smallest":
            rows.append({**row, "microseconds": None, "smallest_ratio": work})
        elif name == "thin":
            own = {_COLUMNS[kind]: value for (kind, at), value in times.items() if at in (None, ratio)}
            best = min(times["dense", None], times["xla", None])
            rows.append({**row, "n": n, **own, "microseconds": times[name, ratio], "best_dense_microseconds": best})
    return rows


def _thin(model: nn.Module, ratio: float, rank: int, method: str = "deepthin") -> tuple[Any, int]:
    """The network made thin, and n of its largest matrix."""
    rule = {"method": method, **({"rank": rank} if method == "deepthin" else {})}
    report = dt.compress(model, {"model": {"ratio": ratio}, "rules": {"*": rule}}, init="scratch")
    return model, max(report.rows, key=lambda row: row.dense_bytes).n or 0


def _network(shapes: Shapes) -> nn.Sequential:
    layers: list[nn.Module] = []
    for rows, cols in shapes:
        layers += [nn.Linear(cols, rows), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _dense_competitors(case: str, shapes: Shapes, x: torch.Tensor) -> Iterable[Timing]:
    dense = _network(shapes)
    if case == "train":
        yield Timing("dense", None, _step(dense, x))
        return
    yield Timing("dense", None, _forward(dense, x))
    layers = [layer for layer in dense if isinstance(layer, nn.Linear)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), len(x)) for layer in layers]
    after = ["relu"] * (len(layers) - 1) + ["none"]

    def one_dnn(x: torch.Tensor) -> torch.Tensor:
        for weight, layer, activation in zip(packed, layers, after, strict=True):
            x = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, activation, [], "")
        return x

    yield Timing("packed", None, _forward(one_dnn, x))
    if torch.backends.quantized.engine in ("x86", "fbgemm", "qnnpack", "onednn"):
        integers = []
        for layer in layers:
            scale = layer.weight.detach().abs().max().item() / 127
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch announces that quantised tensors will leave it
                weight = torch.quantize_per_tensor(layer.weight.detach(), scale, 0, torch.qint8)
            integers.append(torch.ops.quantized.linear_prepack(weight, layer.bias.detach()))

        def int8(x: torch.Tensor) -> torch.Tensor:
            for weight, activation in zip(integers, after, strict=True):
                x = torch.ops.quantized.linear_dynamic(x, weight, True)
                x = x.relu_() if activation == "relu" else x
            return x

        yield Timing("int8", None, _forward(int8, x))


def _symbol_competitors(shape: tuple[int, int], x: torch.Tensor) -> Iterable[Timing]:
    """Layers whose weights are symbols at random, as they are after loading with ``frozen``."""
    uniform, kmeans = Uniform(shape, 8), KMeans(shape, min(16, math.prod(shape)))
    codes = {
        uniform: {"symbols": torch.randint(-127, 128, shape), "step": torch.full((1, 1), 0.001)},
        kmeans: {"symbols": torch.randint(0, kmeans.levels, shape), "centres": torch.randn(kmeans.levels)},
    }
    for name, method in (("uniform", uniform), ("kmeans", kmeans)):
        model = _network([shape]).requires_grad_(False)
        weight = ThinWeight(name, method, [Part(shape)], codes[method], frozen=True).requires_grad_(False)
        make_thin(model[0], {"weight": weight})
        yield Timing(name, None, _forward(model, x))
    yield Timing("kept", None, lambda: nn.functional.linear(x, weight(), cast(Any, model[0]).bias))


def _thin_competitors(
    case: str, shapes: Shapes, x: torch.Tensor, model: nn.Sequential, ratio: float, threads: int
) -> Iterable[Timing]:
    """DeepThin, and its rivals with as many bytes."""
    if case == "train":
        yield Timing("thin", ratio, _step(model, x))
    else:
        yield Timing("thin", ratio, _forward(model, x))
        if kernels.native_available:
            if case == "linear":
                yield Timing("operator", ratio, _operator(model, x, threads))
            yield Timing("csr", ratio, _sparse(shapes, x, ratio, threads))
    try:
        low, _ = _thin(_network(shapes), ratio, 1, method="rank")
    except BudgetError:
        return
    if case == "train":
        yield Timing("rank", ratio, _step(low, x))
    elif case == "linear" and kernels.native_available:
        yield Timing("rank", ratio, _operator(low, x, threads))
    else:
        yield Timing("rank", ratio, _forward(low, x))


def _forward(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Work:
    if isinstance(layer, nn.Sequential):
        layer = layer[0] if len(layer) == 1 else layer
        layer.eval()
    return lambda: layer(x)


def _step(layer: nn.Module, x: torch.Tensor) -> Work:
    layer.train()
    grad, own = torch.randn_like(layer(x)), x.clone().requires_grad_()

    def work() -> None:
        layer.zero_grad()
        own.grad = None
        layer(own).backward(grad)

    return work


def _operator(model: nn.Sequential, x: torch.Tensor, threads: int) -> Work:
    """The native product of a single layer, from arrays at hand to an array at hand."""
    layer = cast(Any, model[0])
    weight = layer.thin["weight"]
    method: Factor = weight.method
    y = torch.empty(len(x), method.shape[0])
    operands = [t.detach() for t in (x, weight.xf, weight.wf, layer.bias, y)]
    by_fft = weight.path(x) != "native-direct"
    plan = (*method.shape, method.n, method.rank, 0)
    arguments = (*plan, *(t.data_ptr() for t in operands), len(x), by_fft, False, threads)
    forward = kernels.native().forward
    return lambda: (forward(*arguments), operands)  # the arrays live as long as the closure


def _sparse(shapes: Shapes, x: torch.Tensor, ratio: float, threads: int) -> Work:
    """Sparse rows with 32 bits for a value and 32 for its column, at random places."""
    rng, inputs = np.random.default_rng(0), x.numpy()
    layers = []
    for rows, cols in shapes:
        entries = max(1, int(ratio * rows * cols / 2))
        places = np.sort(rng.choice(rows * cols, entries, replace=False))
        starts = np.searchsorted(places, np.arange(rows + 1) * cols).astype(np.int64)
        arrays = rng.standard_normal(entries).astype(np.float32), (places % cols).astype(np.int32), starts
        arrays += (np.zeros(rows, np.float32), np.empty((len(x), rows), np.float32))
        layers.append((rows, cols, entries, arrays))
    csr = kernels.native().csr

    def work() -> None:
        at = inputs
        for rows, cols, entries, (values, columns, starts, bias, y) in layers:
            at = at if at is inputs else np.maximum(at, 0, out=at)
            addresses = [array.ctypes.data for array in (values, columns, starts)]
            csr(*addresses, rows, cols, entries, bias.ctypes.data, at.ctypes.data, y.ctypes.data, len(x), threads)
            at = y

    return work


Times = dict[tuple[str, float | None], float]


def _interleaved(
    timings: Sequence[Timing], repeats: int, cold: bool, progress: Callable[[int, int], None]
) -> tuple[Times, Times]:
    """The median microseconds of each, all of them timed in every round: warm and, on request, cold."""
    found: list[dict[tuple[str, float | None], list[float]]] = [{}, {}]
    flush = np.zeros(_FLUSH_BYTES // 8) if cold else None
    for turn in range(repeats + 1):  # the first one warms up
        for name, ratio, work in timings:
            for warm, times in zip((True, False), found, strict=True):
                if warm:
                    began = time.perf_counter()
                    for _ in range(_TURNS_BEFORE):
                        work()
                    while torch.get_num_threads() > 1 and time.perf_counter() - began < _BUSY_SECONDS:
                        work()
                elif flush is None:
                    continue
                else:
                    flush += 1.0
                start = time.perf_counter_ns()
                work()
                if turn:
                    times.setdefault((name, ratio), []).append((time.perf_counter_ns() - start) / 1000)
        progress(turn + 1, repeats + 1)
    warm, cold_times = ({key: statistics.median(values) for key, values in times.items()} for times in found)
    return warm, cold_times


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of how many times faster DeepThin is than each competitor."""
    lines: list[tuple[str, ...]] = []
    rivals = ("dense", "best_dense", "int8", "rank", "csr", "uniform_8bit", "kmeans_4bit", "generated", "function")
    shown = [rival for rival in rivals if any(row.get(f"{rival}_microseconds") for row in rows)]
    cold = any(row.get("cold_microseconds") for row in rows)
    for row in rows:
        start = (str(row["batch"]), f"{row['ratio']:g}")
        if row["microseconds"] is None:
            lines.append((*start, "", f"smallest ratio {row['smallest_ratio']:.5f}", *[""] * (len(shown) + cold + 1)))
            continue
        own = row["microseconds"]
        line = [*start, str(row["n"]), f"{own:,.1f}", f"{row['layer_microseconds']:,.1f}"]
        line += [_times(row.get(f"{rival}_microseconds"), own) for rival in shown]
        if cold:
            line.append(_times(row.get("cold_best_dense_microseconds"), row.get("cold_microseconds")))
        lines.append(tuple(line))
    first = rows[0]
    heads = ["batch", "ratio", "n", "us", "as module", *(rival.replace("_", " ") for rival in shown)]
    title = (
        f"{first['case']} {first['rows']}x{first['cols']}, rank {first['rank']}, threads {first['threads']}, "
        f"instruction set {first['isa']}. Times faster than:"
    )
    heads += ["best dense, cold"] if cold else []
    return title + "\n" + table(tuple(heads), lines, right=tuple(range(len(heads))), total=False)


def _times(other: float | None, own: float | None) -> str:
    return f"{other / own:.1f}x" if other and own else ""


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Times faster than nn.Linear against size; for ``tfkaldi`` beside the figures of the paper's Table 2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    case, reds = rows[0]["case"], ("#fcae91", "#fb6a4a", "#cb181d", "#67000d")
    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=150)
    series: list[tuple[str, str, dict[float, float]]] = []
    if case in PAPER:
        for (label, values), grey in zip(PAPER[case].items(), ("#d9d9d9", "#bdbdbd", "#969696"), strict=True):
            series.append((label, grey, dict(zip(PAPER_RATIOS, values, strict=True))))
    for number, batch in enumerate(dict.fromkeys(row["batch"] for row in rows)):
        own = {row["ratio"]: row for row in rows if row["batch"] == batch and row["microseconds"]}
        faster = {ratio: row["dense_microseconds"] / row["microseconds"] for ratio, row in own.items()}
        series.append((f"batch {batch}", reds[number % len(reds)], faster))
    ratios = sorted({row["ratio"] for row in rows}, reverse=True)
    width = 0.8 / len(series)
    for number, (label, colour, values) in enumerate(series):
        at = [place + (number - (len(series) - 1) / 2) * width for place in range(len(ratios))]
        axes.bar(at, [values.get(ratio, 0.0) for ratio in ratios], width, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_ylim(1, 4 * max(value for _, _, values in series for value in values.values()))  # room for the legend
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("size of the weights over dense")
    axes.set_ylabel(
        "times faster than the dense layer"
        if case in ("linear", "train", "tensorflow")
        else "times faster than the dense network"
    )
    threads = rows[0]["threads"]
    cores = "one thread" if threads == 1 else f"{threads} threads"
    axes.set_title(f"{case}, rank {rows[0]['rank']}, {cores}, {rows[0]['isa']}", fontsize=10)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return path
