"""Thin layers beside dense ones on a GPU: the table of docs/performance.md, and results beside those of the CPU.

    PYTHONPATH=src DEEPTHIN_ISA=none python benchmarks/gpu.py                  (a card; less than two minutes)
    PYTHONPATH=src DEEPTHIN_ISA=none python benchmarks/gpu.py --fit            (times for kernels/costs.py)
    PYTHONPATH=src DEEPTHIN_ISA=none python benchmarks/gpu.py --host           (operations, without a card)
    PYTHONPATH=src DEEPTHIN_ISA=none python benchmarks/gpu.py --device cpu --small

One file that needs the package and torch, no native code. Prints microseconds, dense / thin, for every layer: inference
(no gradients) and a training step (forward and backward, no optimiser), as called from Python and replayed as a CUDA
graph; ``--compile`` adds torch.compile, which takes minutes more. Dense and thin runs are interleaved, and the least
mean of several counts. The last column is the largest difference from the same layer on the CPU, over its largest
number: of outputs, and of the gradients of the factors.
"""

import argparse
import copy
import itertools
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import deepthin.torch as dt
from deepthin import METHODS
from deepthin.kernels import costs
from deepthin.methods import binary_rows
from deepthin.storage.contents import Part
from deepthin.torch import accelerated, multiply
from deepthin.torch.weight import ThinWeight

RATIO, SMALL_RATIO = 0.01, 0.4
CHECKED = 64  # items of a batch that are computed on the CPU too


@dataclass(frozen=True)
class Row:
    """A layer of the table.

    Attributes:
        title: What the table calls it.
        make: Makes the dense layer.
        inputs: Makes a batch on the CPU; the first dimension is cut for the comparison with the CPU.
        method: Name of the method.
        autocast: Whether it runs under autocast to bfloat16.
        axis: The dimension of the items in the inputs.
    """

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    method: str = "deepthin"
    autocast: bool = False
    axis: int = 0


def linear(size: int, batch: int, **options: Any) -> Row:
    """A square linear layer."""
    title = f"Linear {size}, {batch}" + "".join(
        f", {text}" for text in (options.get("method"), "bf16" if options.get("autocast") else None) if text
    )
    return Row(title, lambda: nn.Linear(size, size), lambda: torch.randn(batch, size), **options)


def rows_of(small: bool) -> list[Row]:
    """The rows of the table, or the same layers of a few units."""
    if small:
        return [
            linear(48, 4),
            linear(48, 4, autocast=True),
            linear(48, 4, method="binary"),
            Row("LSTM", lambda: nn.LSTM(16, 12, 2, bidirectional=True), lambda: torch.randn(5, 3, 16), axis=1),
            Row("Conv2d", lambda: nn.Conv2d(8, 12, 3, padding=1), lambda: torch.randn(2, 8, 6, 6)),
            Row("Embedding", lambda: nn.Embedding(60, 16), lambda: torch.randint(60, (3, 5))),
            Row("encoder layer", lambda: encoder(16), lambda: torch.randn(2, 5, 16)),
        ]
    sizes = [(1024, 32), (1024, 256), (2048, 1), (2048, 256), (4096, 1), (4096, 256), (4096, 4096)]
    return [
        *(linear(size, batch) for size, batch in sizes),
        linear(2048, 256, autocast=True),
        Row(
            "LSTM 2x512, both directions, T 50, 16",
            lambda: nn.LSTM(512, 512, 2, bidirectional=True),
            lambda: torch.randn(50, 16, 512),
            axis=1,
        ),
        Row("Conv2d 128-256, 28 x 28, 16", lambda: nn.Conv2d(128, 256, 3), lambda: torch.randn(16, 128, 28, 28)),
        Row(
            "Embedding 20,000 x 256, 16 x 128",
            lambda: nn.Embedding(20_000, 256),
            lambda: torch.randint(20_000, (16, 128)),
        ),
        Row("encoder layer 256, T 64, 16", lambda: encoder(256), lambda: torch.randn(16, 64, 256)),
        linear(1024, 32, method="binary"),
        linear(2048, 256, method="binary"),
    ]


def encoder(width: int) -> nn.Module:
    """An encoder layer of a transformer, four heads."""
    return nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)


def thin_of(row: Row, dense: nn.Module, ratio: float) -> nn.Module:
    """The layer with generated weights."""
    model = copy.deepcopy(dense)
    rule = {"method": row.method, **({"bits": 2} if row.method == "binary" else {"ratio": ratio})}
    dt.compress(model, {"rules": {"*": rule}}, init="scratch")
    return model


class Runs:
    """Inference and a training step of one layer on one device."""

    def __init__(self, row: Row, model: nn.Module, x: Tensor, grad: Tensor | None = None) -> None:
        self.model, self.x = model, x.requires_grad_(x.is_floating_point())
        self.autocast, self.device = row.autocast, x.device
        self.parameters = [*model.parameters(), *([x] if x.is_floating_point() else [])]
        with torch.no_grad():
            y = self.outputs()
        self.grad = torch.ones_like(y) / y.numel() if grad is None else grad.to(y)

    def outputs(self) -> Tensor:
        """Of the layer; of a recurrent one, of all steps."""
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            y = self.model(self.x)
        return y[0] if isinstance(y, tuple) else y

    def inference(self) -> None:
        """Without gradients."""
        with torch.no_grad():
            self.outputs()

    def training(self) -> None:
        """Forward and backward."""
        for parameter in self.parameters:
            parameter.grad = None
        self.outputs().backward(self.grad)

    def mode(self, training: bool) -> Callable[[], None]:
        """What is timed."""
        self.model.train(training)
        return self.training if training else self.inference

    def graph(self, training: bool) -> Callable[[], None]:
        """The same as a CUDA graph, replayed."""
        run = self.mode(training)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(cast(Any, stream)):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            run()
        return recorded.replay

    def compiled(self, training: bool) -> Callable[[], None]:
        """The same by torch.compile."""
        torch.compiler.reset()
        run = Runs.__new__(Runs)
        run.__dict__.update(self.__dict__, model=torch.compile(self.model))
        work = run.mode(training)
        work()
        return work


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def microseconds(works: list[Callable[[], None]], device: torch.device, seconds: float) -> list[float]:
    """The least mean time of each, in turn; host and device together."""
    best, counts = [float("inf")] * len(works), [0] * len(works)
    for turn in range(6):
        for place, work in enumerate(works):
            wait(device)
            start = time.perf_counter()
            for _ in range(max(counts[place], 1)):
                work()
            wait(device)
            took = (time.perf_counter() - start) / max(counts[place], 1)
            if turn == 0:  # it warms up
                counts[place] = 1
            elif turn == 1:
                counts[place] = min(max(int(seconds / 4 / max(took, 1e-7)), 1), 200)
            else:
                best[place] = min(best[place], 1e6 * took)
    return best


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of numbers, over the largest number."""
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(one, other, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def compared(row: Row, thin: nn.Module, x: Tensor, device: torch.device) -> tuple[float, float]:
    """The differences from the CPU: of outputs, and of gradients of the thin weights."""
    x = x.narrow(row.axis, 0, min(CHECKED, x.shape[row.axis]))
    here, there = copy.deepcopy(thin).cpu(), copy.deepcopy(thin)
    runs = Runs(row, here, x.clone())
    grad = torch.randn(runs.grad.shape, generator=torch.Generator().manual_seed(1))
    results: list[tuple[list[Tensor], list[Tensor]]] = []
    for model, inputs in ((here, x.clone()), (there, x.clone().to(device))):
        run = Runs(row, model, inputs, grad)
        model.eval()
        with torch.no_grad():
            y = run.outputs()
        run.mode(True)()
        results.append(([y.float()], [cast(Tensor, value.grad) for value in model.parameters()]))
    return difference(results[1][0], results[0][0]), difference(results[1][1], results[0][1])


def measured(row: Row, device: torch.device, ratio: float, seconds: float, compiles: bool) -> list[str]:
    """The cells of a row."""
    torch.manual_seed(0)
    dense = row.make()
    thin, x = thin_of(row, dense, ratio), row.inputs()
    errors = compared(row, copy.deepcopy(thin).to(device), x, device)
    pair = [Runs(row, model.to(device), x.clone().to(device)) for model in (dense, thin)]
    cells: list[str] = []
    ways = ["mode", *(["graph"] if device.type == "cuda" else []), *(["compiled"] if compiles else [])]
    for training, way in itertools.product((False, True), ways):
        try:
            times = microseconds([getattr(runs, way)(training) for runs in pair], device, seconds)
            cells.append(f"{times[0]:,.0f} / {times[1]:,.0f} ({times[1] / times[0]:.2f})")
        except RuntimeError as error:  # the table goes on; the cell says what a layer cannot do
            cells.append(f"{type(error).__name__}: {str(error).splitlines()[0][:60]}")
    cells.append(f"{errors[0]:.0e}, {errors[1]:.0e}")
    return cells


def table(device: torch.device, small: bool, seconds: float, compiles: bool, only: str) -> None:
    """Print the table."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    ratio = SMALL_RATIO if small else RATIO
    print(f"{name}, torch {torch.__version__}, ratio {ratio}, microseconds dense / thin (thin over dense)\n")
    ways = ["eager", *(["CUDA graph"] if device.type == "cuda" else []), *(["compiled"] if compiles else [])]
    heads = ["layer, batch", *(f"{kind}, {way}" for kind in ("inference", "training") for way in ways), "difference"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in rows_of(small):
            if only in row.title:
                print(
                    "| " + " | ".join([row.title, *measured(row, device, ratio, seconds, compiles)]) + " |", flush=True
                )
    for text in sorted({str(warning.message).splitlines()[0] for warning in caught}):
        print(f"warning: {text}")


# What each way to multiply takes -----------------------------------------------------------------------------------


def fitted(counts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Non-negative times of the counts with the least relative errors: the best of all subsets of the counts."""
    rows, terms = counts / times[:, None], counts.shape[1]
    best, least = np.zeros(terms), float("inf")
    for subset in itertools.chain.from_iterable(itertools.combinations(range(terms), k) for k in range(1, terms + 1)):
        part, *_ = np.linalg.lstsq(rows[:, subset], np.ones(len(times)), rcond=None)
        error = float(np.square(rows[:, subset] @ part - 1).sum())
        if (part >= 0).all() and error < least:
            best, least = np.zeros(terms), error
            best[list(subset)] = part
    return best


def times_of(weight: ThinWeight, batch: int, training: bool, device: torch.device, seconds: float) -> dict[str, float]:
    """Nanoseconds of each way to multiply."""
    weight.train(training)
    rows, cols = weight.decoder.shape
    x = torch.randn(batch, cols, device=device, requires_grad=training)
    bias = torch.zeros(rows, device=device, requires_grad=training)
    grad = torch.randn(batch, rows, device=device)
    weight._decoding_pays[0, x.numel(), not training, None] = True
    structured = [way for way in multiply.WAYS if way.name == "fft"]
    works: dict[str, Callable[[], Tensor]] = {"dense": lambda: weight.product(x, 0, bias)}
    works |= {way.name: lambda way=way: way.run(cast(Any, weight), x, 0, bias) for way in structured}

    def run(work: Callable[[], Tensor]) -> None:
        for tensor in (x, bias, *weight.parameters()):
            tensor.grad = None
        with torch.set_grad_enabled(training):
            y = work()
        if training:
            y.backward(grad)

    taken = microseconds([lambda work=work: run(work) for work in works.values()], device, seconds)
    return {name: 1e3 * value for name, value in zip(works, taken, strict=True)}


def fit(device: torch.device, small: bool, seconds: float) -> None:
    """Print times for ``kernels.costs``, and what a choice by them loses."""
    sizes, ranks = ((48, 64), (1,)) if small else ((512, 1024, 2048, 4096), (1, 4))
    batches = (1, 8) if small else (1, 32, 256, 1024, 4096)
    for training in (False, True):
        cases: list[tuple[dict[str, tuple[float, ...]], dict[str, float]]] = []
        for size, rank, batch in itertools.product(sizes, ranks, batches):
            ratio = SMALL_RATIO if small else RATIO * rank
            method = METHODS["deepthin"].fit((size, size), int(32 * ratio * size * size), rank=rank)
            weight = ThinWeight.draw("w", method, [Part(method.shape)], torch.zeros(0), np.random.default_rng(0), 1.0)
            times = times_of(weight.to(device), batch, training, device, seconds)
            cases.append((cast(Any, costs.terms(cast(Any, method), batch)), times))
        print(f"{not training}: {{")
        tables: dict[str, np.ndarray] = {}
        for way in ("dense", "fft"):
            tables[way] = fitted(np.array([c[way] for c, _ in cases], float), np.array([t[way] for _, t in cases]))
            print(f'    "{way}": ({", ".join(f"{value:.3g}" for value in tables[way])}),')
        losses = [t[min(t, key=lambda way: float(np.dot(tables[way], c[way])))] / min(t.values()) for c, t in cases]
        print(
            f"}},  # a choice takes {np.mean(losses):.3f} of the best on average, {max(losses):.2f} at most", flush=True
        )


# What the host does ------------------------------------------------------------------------------------------------

RULES: dict[str, dict[str, Any]] = {
    "deepthin": {"method": "deepthin", "ratio": 0.05},
    "8 bits": {"method": "deepthin", "ratio": 0.05, "then": {"method": "uniform", "bits": 8}},
    "binary": {"method": "binary", "bits": 2},
}
COUNTED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(1024, 1024), lambda: torch.randn(32, 1024)),
    "LSTM": (lambda: nn.LSTM(64, 64, 2, bidirectional=True), lambda: torch.randn(5, 4, 64)),
    "Conv2d": (lambda: nn.Conv2d(32, 64, 3), lambda: torch.randn(2, 32, 8, 8)),
    "Embedding": (lambda: nn.Embedding(2000, 64), lambda: torch.randint(2000, (8, 16))),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True),
        lambda: torch.randn(2, 8, 64),
    ),
}
READS = ("aten::_local_scalar_dense", "aten::equal")
# Operations of torch that neither compute nor copy
FREE = (
    "aten::view",
    "aten::reshape",
    "aten::slice",
    "aten::t",
    "aten::transpose",
    "aten::permute",
    "aten::as_strided",
    "aten::detach",
    "aten::expand",
    "aten::unsqueeze",
    "aten::narrow",
    "aten::select",
    "aten::alias",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::result_type",
    "aten::resolve_conj",
    "aten::resolve_neg",
    "aten::_reshape_alias",
    "aten::unfold",
    "aten::flatten",
    "aten::squeeze",
)


def operations(run: Runs, training: bool) -> tuple[int, int]:
    """How many operations compute or copy, and how many read a value, after the parameters have changed."""
    work = run.mode(training)
    for _ in range(3):
        work()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(0.999 if training else 1)
    if not training:
        work()
    with torch.autograd.profiler.profile() as profile:
        work()
    events = [event for event in cast(Any, profile).function_events if event.name.startswith("aten::")]

    def counts(event: Any) -> bool:
        return event.name not in FREE and not any(
            child.name.startswith("aten::") and child.name not in FREE for child in event.cpu_children
        )

    return sum(map(counts, events)), sum(event.name in READS for event in events)


def host() -> None:
    """Operations on the CPU by the ways of an accelerator, and the time of the host where they take next to none."""
    accelerated.on_accelerator = lambda tensor: not tensor.is_meta
    multiply.timed_device = lambda x: "unknown"
    binary_rows.is_taken = lambda weight: isinstance(weight, Tensor)
    print("| layer | mode | dense | " + " | ".join(RULES) + " |\n|" + "---|" * (3 + len(RULES)))
    for title, (make, inputs) in COUNTED.items():
        for training in (True, False):
            cells: list[str] = []
            for rule in (None, *RULES.values()):
                torch.manual_seed(0)
                model = make()
                if rule is not None:
                    dt.compress(model, {"rules": {"*": rule}}, init="scratch")
                count, reads = operations(Runs(Row(title, make, inputs), model, inputs()), training)
                cells.append(f"{count} + {reads} reads" if reads else str(count))
            print(f"| {title} | {'training' if training else 'inference'} | " + " | ".join(cells) + " |", flush=True)
    row = linear(24, 4)
    dense = row.make()
    pair = [Runs(row, model, row.inputs()) for model in (dense, thin_of(row, dense, SMALL_RATIO))]
    for training in (True, False):
        ratios: list[float] = []
        works = [run.mode(training) for run in pair]
        for _ in range(60):
            taken: list[int] = []
            for work in works:
                start = time.process_time_ns()
                for _ in range(100):
                    work()
                taken.append(time.process_time_ns() - start)
            ratios.append(taken[1] / taken[0])
        print(f"host, {'training' if training else 'inference'}: thin over dense {np.median(ratios):.2f}")


def main() -> None:
    """The table, or the fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="layers of a few units, to try the script")
    parser.add_argument("--fit", action="store_true", help="print times for kernels/costs.py instead")
    parser.add_argument("--host", action="store_true", help="count the operations that the host starts, on the CPU")
    parser.add_argument("--compile", action="store_true", help="also by torch.compile")
    parser.add_argument("--only", default="", help="rows whose title contains this")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each cell")
    given = parser.parse_args()
    device = torch.device("cpu" if given.host else given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: give --device cpu --small to try the script")
    if device.type == "cpu":
        torch.set_num_threads(1)
    if given.host:
        host()
    elif given.fit:
        fit(device, given.small, given.seconds)
    else:
        table(device, given.small, given.seconds, given.compile, given.only)


if __name__ == "__main__":
    main()
