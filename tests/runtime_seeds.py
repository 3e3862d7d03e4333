"""Small valid flat files for the fuzzer of the C runtime: every operator, every form of a matrix and of its numbers."""

import functools
import itertools
import warnings

import numpy as np
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.torch.export.native.flat import flat_file
from deepthin.torch.export.native.matrix import Array, Core, Kind, Matrix, Use
from deepthin.torch.export.native.operators import program_of
from deepthin.torch.export.native.program import Buffer, Place, Program, Space
from deepthin.torch.export.native.stored import DIGITS, Stored, pack_bits

ROWS, COLS = 9, 7
FEW = 8  # times that a seed is taken which is no product of a matrix


def array(count, form, rng):
    """An array of each form: floats, a step, one for each row with a least value, tables, 16 bits; listed numbers."""
    if form == "floats":
        return Array(Stored(rng.standard_normal(count).astype(np.float32), count))
    bits = {"bits8": 8, "bits3": 3, "rows16": 16, "table": 4, "tables": 2, "listed": 5, "base3": 103, "base6": 106}[
        form
    ]
    levels = DIGITS[bits][0] if bits in DIGITS else 1 << bits
    row = 5 if form in ("rows16", "tables", "base6") else 0
    groups = -(-count // row) if row else 1
    floats = {}
    if form.startswith("table"):
        floats["table"] = rng.standard_normal(groups * levels).astype(np.float32)
    else:
        floats["step"] = rng.uniform(0.01, 0.1, groups).astype(np.float32)
    if form == "rows16":
        floats["least"] = rng.standard_normal(groups).astype(np.float32)
    if form == "listed":
        at = np.unique(rng.integers(0, count, 1 + count // 4)).astype(np.uint32)
        floats |= {"fix_at": at, "fix": rng.standard_normal(len(at)).astype(np.float32)}
    packed = pack_bits(rng.integers(0, levels, count), bits)
    return Array(Stored(packed, count, bits, zero=levels // 2, row=row, **floats))


FORMS = ("floats", "bits8", "bits3", "rows16", "table", "tables", "listed", "base3", "base6")


def matrix(kind, form, turned, rng):
    """A matrix of a kind whose numbers have a form."""
    common = {"rows": ROWS, "cols": COLS, "turned": turned, "scale": 0.5}
    if kind is Kind.DENSE:
        return Matrix(kind, a=array(ROWS * COLS, form, rng), **common)
    if kind is Kind.WINDOWS:
        n, rank, offset = 5, 2, 3
        m = -(-(offset + ROWS * COLS) // n)
        return Matrix(
            kind,
            a=array(m * rank, form, rng),
            b=array(rank * n, form, rng),
            n=n,
            rank=rank,
            offset=offset,
            m=m,
            **common,
        )
    if kind is Kind.TRAIN:
        sizes = ((1, 3, 2, 2), (2, 3, 4, 3), (3, 1, 1, 1))
        cores = tuple(Core(*size, array(int(np.prod(size)), form, rng)) for size in sizes)
        return Matrix(kind, cores=cores, **common)
    if kind is Kind.SPARSE:
        gaps = np.array([0, 3, 5, 1, 255, 9, 2, 1], np.uint8)[: 4 if form == "floats" else 8]
        return Matrix(kind, a=array(7, form, rng), gaps=gaps, n=gaps.size, m=7, **common)
    return Matrix(kind, a=array(13, form, rng), n=13, offset=4, seed=0x123456789ABCDEF, **common)


def product(kind, form, use, turned, rng):
    """A program of one product of a matrix, or of a look-up of its rows."""
    made, program, items = matrix(kind, form, turned, rng), Program(), 3
    bias = Buffer(made.outputs, Space.CONSTANT, data=rng.standard_normal(made.outputs).astype(np.float32))
    if use is Use.ROWS:
        x, y = Buffer(items, Space.INPUT), Buffer(items * COLS, Space.OUTPUT)
        arguments = [made, items, 2, Place(x), Place(y)]
    else:
        x, y = Buffer(items * made.inputs, Space.INPUT), Buffer(items * made.outputs, Space.OUTPUT)
        arguments = [made, Place(bias) if turned else None, items, int(use), Place(x), Place(y)]
    program.inputs, program.outputs, program.integers = [x], [y], [use is Use.ROWS]
    program.call("embedding" if use is Use.ROWS else "linear", arguments, scratch=made.scratch(use))
    program.place()
    return program


def products():
    """Every kind x form x use."""
    rng = np.random.default_rng(0)
    uses = ((Use.ONCE, False), (Use.PACKED, False), (Use.ROWS, False), (Use.ONCE, True))
    for kind, form, (use, turned) in itertools.product(Kind, FORMS, uses):
        name = f"{kind.name}-{form}-{'TURNED' if turned else use.name}".lower()
        yield name, product(kind, form, use, turned, rng)


def windowed(name, groups, use, rng):
    """A program of one convolution, or of one pooling layer."""
    program, kernel, channels, outputs = Program(), (2, 3), 4, 6 if name == "conv" else 4
    size, out = (5, 6), (3, 5)
    window = (channels, *size, outputs, *out, *kernel, 2, 1, 1, 1, 1, 1, groups)
    x, y = Buffer(channels * 30, Space.INPUT), Buffer(outputs * 15, Space.OUTPUT)
    program.inputs, program.outputs, program.integers = [x], [y], [False]
    if name == "pool":
        program.call("pool", [window, groups, 1, Place(x), Place(y)])
    else:
        cols = channels // groups * 6
        made = Matrix(Kind.DENSE, outputs, cols, a=array(outputs * cols, "bits3", rng))
        bias = Buffer(outputs, Space.CONSTANT, data=rng.standard_normal(outputs).astype(np.float32))
        scratch = made.scratch(Use.ROWS if groups > 1 else use) + cols + outputs
        program.call("conv", [window, made, Place(bias), 1, int(use), Place(x), Place(y)], scratch=scratch)
    program.place()
    return program


def convolutions():
    """Convolutions of one group and of two, means and maxima."""
    rng = np.random.default_rng(1)
    yield "conv", windowed("conv", 1, Use.ONCE, rng)
    yield "conv-packed", windowed("conv", 1, Use.PACKED, rng)
    yield "conv-groups", windowed("conv", 2, Use.ROWS, rng)
    yield "pool", windowed("pool", 1, Use.ONCE, rng)


def recurrent(cell, rng):
    """A program of one recurrent layer of a kind."""
    program, gates, steps, width, hidden = Program(), (1, 1, 3, 4)[cell], 3, 3, 4
    x, y = Buffer(steps * width, Space.INPUT), Buffer(steps * hidden, Space.OUTPUT)
    h, c = Buffer(hidden, kept=True), Buffer(hidden, kept=True)
    program.inputs, program.outputs, program.integers = [x], [y], [False]
    weights = [
        Matrix(Kind.DENSE, gates * hidden, cols, a=array(gates * hidden * cols, "bits8", rng))
        for cols in (width, hidden)
    ]
    arguments = [cell, *weights, None, None, steps, cell % 2, int(Use.ONCE), Place(x), width, Place(y), hidden]
    scratch = sum(weight.scratch(Use.ONCE) for weight in weights) + 2 * gates * hidden
    program.call("recurrent", [*arguments, Place(h), Place(c)], scratch=scratch)
    program.place()
    return program


def layers():
    """Recurrent layers of each kind."""
    for cell in range(4):
        yield f"recurrent-{cell}", recurrent(cell, np.random.default_rng(cell))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(4, 6, (1, 3), dilation=(1, 2), padding=(0, 2), groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.depthwise(self.first(x)), 2, ceil_mode=True)
        x = nn.functional.avg_pool2d(
            self.norm(nn.functional.relu6(self.wide(x))), 2, 1, padding=1, count_include_pad=False
        )
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return torch.log_softmax(self.out(x), 1)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 5, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 6, batch_first=True)
        self.tanh = nn.RNN(6, 5, batch_first=True)
        self.relu = nn.RNN(5, 4, nonlinearity="relu", batch_first=True)

    def forward(self, ids):
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        x = self.relu(self.tanh(self.gru(self.lstm(x)[0])[0])[0])[0]
        return torch.cat([x.mean(1), x.amax(1), x.amin(1), x.sum(1)], 1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Linear(8, 12)

    def forward(self, x):
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return nn.functional.gelu(self.inner(x)), torch.softmax(x, -1)


class Functions(nn.Module):
    """All functions of one number and of two, and what moves numbers about."""

    def forward(self, x, y):
        f = nn.functional
        made = [f.silu(x), torch.sigmoid(x), torch.tanh(x), f.gelu(x, approximate="tanh"), torch.exp(x), f.softplus(x)]
        made += [torch.log(x), torch.sqrt(x), torch.abs(x), x * x, 1 / x, 2 * x + 1, x.clamp(-1, 1), f.leaky_relu(x)]
        made += [f.elu(x), f.hardsigmoid(x), f.hardswish(x), f.gelu(x), x - y, x / y, torch.maximum(x, y)]
        made += [torch.relu(x), x.square(), torch.minimum(x, y), f.pad(x, (1, 1))[:, 1:-1], x[:, ::2].repeat(1, 2)]
        return torch.stack(made).permute(1, 0, 2), x.t() @ y.expand_as(x)


NETWORKS = {
    "images": (
        Images,
        [torch.linspace(-1, 1, 2 * 9 * 7).reshape(1, 2, 9, 7)],
        ("dense", "deepthin-coded", "kronecker"),
    ),
    "words": (Words, [torch.tensor([[3, 0, 11, 5]])], ("dense", "deepthin", "rank-8", "pruned")),
    "attention": (Attention, [torch.linspace(-1, 1, 24).reshape(1, 3, 8)], ("dense", "coded", "hashed")),
}
RULES = {
    "deepthin": {"method": "deepthin"},
    "coded": {"method": "coded"},
    "deepthin-coded": {"method": "deepthin", "then": {"method": "coded"}},
    "rank-8": {"method": "rank", "then": {"method": "uniform", "bits": 8}},
    "pruned": {"method": "pruned"},
    "kronecker": {"method": "kronecker"},
    "hashed": {"method": "hashed"},
}


def networks():
    """Small networks, dense and thin."""
    for name, (kind, example, rules) in NETWORKS.items():
        for rule in rules:
            torch.manual_seed(0)
            model = kind()
            if rule != "dense":
                plan = {"model": {"ratio": 0.5}, "rules": {"*": RULES[rule]}}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    dt.compress(model, plan, init="scratch")
            yield f"{name}-{rule}", program_of(model.eval(), example)
    x = torch.linspace(0.5, 2, 12).reshape(2, 6)
    yield "functions", program_of(Functions(), [x, x[:1]])
    torch.manual_seed(0)
    gru = nn.GRU(6, 5, batch_first=True)
    yield "streaming", program_of(gru.eval(), [torch.zeros(1, 1, 6)], streaming=True)


@functools.cache
def programs():
    """Name -> program."""
    return dict(itertools.chain(products(), convolutions(), layers(), networks()))


def write(folder):
    """Write all seeds to a folder.

    Args:
        folder: An existing one.

    Returns:
        Their paths; those of which there are few are given several times.
    """
    paths = []
    for name, program in programs().items():
        path = folder / f"{name}.dtm"
        path.write_bytes(flat_file(program))
        paths += [path] * (1 if name.split("-")[0].upper() in Kind.__members__ else FEW)
    return paths
