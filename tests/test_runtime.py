"""The C runtime: every method in every layer, every operator, streaming, and what it refuses; against torch."""

import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepthin.torch as dt
from deepthin.errors import ConfigError, ExportError
from deepthin.methods import METHODS
from deepthin.torch.export.c import check_folder
from deepthin.torch.export.native.flat import flat_file
from deepthin.torch.export.native.graph import HANDLERS
from deepthin.torch.export.native.operators import program_of
from deepthin.torch.export.native.program import Buffer, Place, Program, Space
from deepthin.torch.export.native.runtime import FlatModel

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the exporters, and of the errors of untrained codes
    pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler"),
]
TOLERANCE = 1e-5  # of the largest output, as the export promises
ONE_LANE = ("-DDT_LANES=1",)
CODES = {
    "fp32": {},
    "8 bits": {"then": {"method": "uniform", "bits": 8}},
    "coded": {"then": {"method": "coded"}},
}
ALONE = ("uniform", "kmeans", "ecsq", "binary", "coded")  # store integers already
PAIRS = [
    (method, code) for method in METHODS if method != "dense" for code in CODES if code == "fp32" or method not in ALONE
]
USUAL = {
    ("deepthin", "fp32"),
    ("deepthin", "coded"),
    ("rank", "8 bits"),
    ("hashed", "fp32"),
    ("kronecker", "coded"),
    ("pruned", "8 bits"),
    ("binary", "fp32"),
}


class Layers(nn.Module):
    """One layer of every kind; each gets inputs of its own, and all outputs are returned."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(90, 70)
        self.wide = nn.Linear(33, 64, bias=False)
        self.conv = nn.Conv2d(5, 16, 3, padding=1, stride=(2, 1))
        self.grouped = nn.Conv1d(12, 24, 5, padding="same", groups=3, dilation=2)
        self.lstm = nn.LSTM(20, 24, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(20, 28, num_layers=2)
        self.embedding = nn.Embedding(120, 18, padding_idx=4)

    def forward(self, row, rows, image, line, steps, ids):
        sequence, (last, cell) = self.lstm(steps)
        return (
            *(self.linear(row), self.wide(rows), self.conv(image), self.grouped(line), sequence, last, cell),
            *(*self.gru(steps), self.embedding(ids)),
        )


def given():
    torch.manual_seed(1)
    shapes = ((1, 90), (2, 9, 33), (1, 5, 8, 7), (2, 12, 11), (2, 6, 20))
    return (*(torch.randn(shape) for shape in shapes), torch.tensor([[0, 4, 119], [7, 8, 4]]))


def thin(model, method, code):
    rule = {"method": method, **CODES[code]}
    if code == "coded":
        rule["floats"] = 0.4
    elif method not in ALONE:
        rule["ratio"] = 0.4 if code == "fp32" else 0.3
    elif method != "coded":
        rule["bits"] = 3
    dt.compress(model, {"rules": {"*": rule}}, seed=0)
    return model.eval()


def assert_same(model, inputs, flags=(), streaming=False):
    """Outputs of the flat file against torch's."""
    program = program_of(model, inputs, streaming)
    with torch.no_grad():
        expected = model(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for flag in (flags, ONE_LANE):
        made = FlatModel(flat_file(program), flag)([one.numpy() for one in inputs])
        assert len(made) == len(expected)
        for there, here in zip(made, expected, strict=True):
            assert np.abs(there - here.numpy().ravel()).max() <= TOLERANCE * here.abs().max()
    return program


@pytest.mark.parametrize(
    ("method", "code"), [pair if pair in USUAL else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_every_method_in_every_layer(method, code):
    torch.manual_seed(0)
    program = assert_same(thin(Layers(), method, code), given())
    assert len(program.forms) == 13  # no matrix is forgotten
    structured = {
        "deepthin": "structured",
        "rank": "factors in turn",
        "kronecker": "factors in turn",
        "pruned": "sparse",
    }
    if method in structured:
        assert structured[method] in program.forms.values()


@pytest.mark.parametrize("group", ["flat", "rows"])
def test_matrices_of_one_code(group):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    dt.compress(model, {"rules": {"*weight": {"method": "deepthin", "ratio": 0.3, "group": group}}})
    program = assert_same(model.eval(), [torch.randn(3, 40)])
    stored = {id(matrix.a.stored) for matrix in program.matrices()}
    assert len(stored) == 1  # the code is in the file once


class Blocks(nn.Module):
    """Operators that networks consist of beside their layers."""

    def __init__(self, transformer):
        super().__init__()
        self.norm, self.batch, self.group = nn.LayerNorm(12), nn.BatchNorm1d(6), nn.GroupNorm(3, 6)
        self.rms, self.transformer = nn.RMSNorm(12), transformer
        for module in (self.batch, self.group):
            nn.init.normal_(module.weight)
        self.batch.running_mean.normal_()
        self.batch.running_var.uniform_(0.5, 2)

    def forward(self, x, y):  # 2 x 6 x 12
        return (
            *(self.norm(x), self.batch(x), self.group(x), self.rms(x)),
            *(f(x) for f in FUNCTIONS),
            *(
                x + y,
                x - 2 * y,
                x * y[:, :1],
                x / (2 + y.square()),
                torch.maximum(x, y),
                torch.minimum(x, y.mean(1, True)),
            ),
            *(x.softmax(1), x.log_softmax(2), x.mean((0, 2)), x.sum(1), x.amax(2), x.amin(0, keepdim=True)),
            *(
                x.transpose(0, 2),
                x.permute(2, 0, 1)[:, :1].expand(12, 3, 6),
                x[:, 1::2, 2:9],
                torch.cat([x, y[:, :2]], 1),
            ),
            *(torch.stack([x, y], 2), F.pad(x, (1, 2, 0, 1), value=0.5), x.repeat(1, 2, 3), *x.chunk(2, 2), x[..., 3]),
            *(F.avg_pool1d(x, 3, 2, 1), F.max_pool1d(x, 3, 2, 1), F.adaptive_avg_pool1d(x, 4), F.glu(x, 1)),
            *(F.avg_pool2d(x, 2, ceil_mode=True), F.max_pool2d(x, (2, 3), 2, 1), F.adaptive_avg_pool2d(x, (3, 4))),
            *(x @ y.transpose(1, 2), torch.einsum("bij,bkj->bik", x, y), x @ y[0].t()),
            *(F.scaled_dot_product_attention(x, y, x, is_causal=True), self.transformer(x)),
            *(x.flatten(1), x.reshape(3, 48).unsqueeze(1).squeeze(1), x),
        )


FUNCTIONS = (
    *(torch.relu, torch.sigmoid, torch.tanh, F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), torch.exp),
    *(lambda x: (x.abs() + 1e-3).log(), lambda x: x.abs().sqrt(), torch.square, lambda x: (x.abs() + 1).reciprocal()),
    *(lambda x: 3 - x, lambda x: x.clamp(-0.5, 0.7), lambda x: F.leaky_relu(x, 0.1), F.elu, F.hardsigmoid, F.hardswish),
    *(F.softplus, F.relu6, lambda x: (x.abs() + 1).rsqrt(), torch.neg, lambda x: F.hardtanh(x, -1, 0.5)),
    *(lambda x: x**3, lambda x: x**-1),
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.across = nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x, y):
        heads = x.unflatten(2, (6, 4)).transpose(1, 2)
        groups = y.unflatten(2, (6, 4)).transpose(1, 2)[:, :2]
        grouped = F.scaled_dot_product_attention(heads, groups, groups, enable_gqa=True)
        return self.across(x, y, y, need_weights=False)[0], grouped


def test_a_part_of_a_matrix_stays_thin():
    """Attention to another sequence takes rows of one matrix for queries, keys and values."""
    torch.manual_seed(0)
    model = thin(Attention(), "deepthin", "fp32")
    program = assert_same(model, (torch.randn(2, 5, 24), torch.randn(2, 7, 24)))
    assert set(program.forms.values()) == {"structured"}


def test_every_operator():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, activation="gelu", batch_first=True)
    model = Blocks(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).eval()
    assert_same(model, (torch.randn(2, 6, 12), torch.randn(2, 6, 12)))


class Words(nn.Module):
    """Frames to scores: two recurrent layers between linear ones."""

    def __init__(self, cell):
        super().__init__()
        self.front, self.sequence, self.out = nn.Linear(10, 16), cell(16, 24, 2, batch_first=True), nn.Linear(24, 5)

    def forward(self, x):
        return self.out(self.sequence(torch.relu(self.front(x)))[0]).log_softmax(2)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_stream_gives_the_same_answer_as_the_whole(cell):
    torch.manual_seed(0)
    model, x = thin(Words(cell), "deepthin", "fp32"), torch.randn(1, 30, 10)
    with torch.no_grad():
        whole = model(x)[0].numpy()
    network = FlatModel(flat_file(program_of(model, [x[:, :1]], streaming=True)))
    for _ in range(2):  # forgotten in between
        parts = [network([x[:, at : at + 1].numpy()])[0] for at in range(30)]
        assert np.abs(np.stack(parts) - whole).max() <= TOLERANCE * np.abs(whole).max()
        network.reset()


def test_streaming_needs_one_direction_and_a_target_with_memory(tmp_path):
    model = nn.Sequential(nn.LSTM(4, 5, bidirectional=True))
    with pytest.raises(ExportError, match="both directions"):
        program_of(model.eval(), [torch.randn(1, 1, 4)], streaming=True)
    with pytest.raises(ConfigError, match="streaming is for c and wasm"):
        dt.export(nn.Linear(3, 4), tmp_path / "m.onnx", streaming=True)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 256), nn.ReLU(), nn.Linear(256, 200), nn.ReLU(), nn.Linear(200, 40))
    return thin(model, "deepthin", "fp32"), torch.randn(1, 200)


def test_c_is_written_compiled_and_run(small, tmp_path):
    model, x = small
    made = dt.export(model, tmp_path / "net.c", x, compare=True)
    assert sorted(file.name for file in made.files) == ["Makefile", "dt.c", "dt.h", "main.c", "net.c", "net.h"]
    assert made.error <= TOLERANCE
    assert made.bytes <= 1.25 * made.thin_bytes + 3 * 8192 + 16_000
    assert made.thin.bytes < 0.5 * made.dense.bytes
    assert re.search(r"constants [\d,]+ bytes; arena [\d,]+ bytes of RAM", str(made))
    assert json.loads(made.to_json())["forms"]["0.weight"] == "structured"
    check_folder(tmp_path)  # its own files may be written again
    subprocess.run(["make", "-C", tmp_path, "CFLAGS=-std=c99 -pedantic -Wall -Wextra -Werror -O1"], check=True)
    x.numpy().tofile(tmp_path / "x")
    run = subprocess.run(["./net", "x", "y", "3"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert re.fullmatch(r"[\d.]+ us a run\n", run.stdout)
    expected = model(x).detach().numpy()
    assert np.abs(np.fromfile(tmp_path / "y", np.float32) - expected).max() <= TOLERANCE * np.abs(expected).max()
    (tmp_path / "x").write_bytes(b"short")
    assert subprocess.run(["./net", "x", "y"], cwd=tmp_path, check=False, capture_output=True).returncode == 1


def test_files_of_another_origin_stay(small, tmp_path):
    (tmp_path / "Makefile").write_text("all: mine\n")
    with pytest.raises(ExportError, match="a folder of its own"):
        dt.export(small[0], tmp_path / "net.c", small[1])
    assert [file.name for file in tmp_path.iterdir()] == ["Makefile"]


def test_wasm_runs_in_node(small, tmp_path):
    pytest.importorskip("ziglang")
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    made = dt.export(small[0], tmp_path / "net.wasm", small[1])
    assert [file.name for file in made.files] == ["net.wasm", "net.dtm", "net.mjs"]
    assert made.error <= TOLERANCE
    assert made.files[0].stat().st_size < 6000


@pytest.mark.parametrize("name", ["GPT2", pytest.param("Llama", marks=pytest.mark.slow)])
def test_language_models_of_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "GPT2":
        settings = transformers.GPT2Config(n_positions=16, n_embd=32, n_layer=2, n_head=4, vocab_size=60)
    else:
        settings = transformers.LlamaConfig(num_key_value_heads=2, intermediate_size=64, **sizes)
    settings.use_cache = False

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.AutoModelForCausalLM.from_config(settings)

        def forward(self, ids):
            return self.model(ids).logits

    torch.manual_seed(0)
    program = assert_same(thin(Scores(), "deepthin", "fp32"), [torch.randint(60, (1, 9))])
    assert "structured" in program.forms.values()


def test_the_page_lists_every_operator():
    text = (Path(__file__).parent.parent / "docs" / "runtime.md").read_text()
    listed = re.findall(r"`(\w+)`", text[text.index("## Operators") : text.index("Limits:")])
    assert [name for name in listed if name not in ("torch",)] == sorted(HANDLERS)


def test_what_the_runtime_lacks_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    with pytest.raises(ExportError, match="no operator cumsum"):
        dt.export(nn.Sequential(nn.Linear(4, 4), Odd()), tmp_path / "m.c", torch.randn(1, 4))
    with pytest.raises(ExportError, match="transposed"):
        dt.export(nn.ConvTranspose1d(3, 4, 2), tmp_path / "m.c", torch.randn(1, 3, 5))
    assert list(tmp_path.iterdir()) == []


def test_a_weight_whose_table_is_large_is_refused_where_c_has_no_form(tmp_path):
    model = nn.Sequential(nn.Linear(300, 300))
    dt.compress(model, {"rules": {"*": {"method": "shuffled", "ratio": 0.02}}})
    with pytest.raises(ExportError, match=r"at most [\d,]+ are allowed"):
        dt.export(model, tmp_path / "m.c", torch.randn(1, 300))
    model = nn.Sequential(nn.Linear(300, 300))
    dt.compress(model, {"rules": {"*": {"method": "hashed", "ratio": 0.02}}})
    assert dt.export(model, tmp_path / "m.c", torch.randn(1, 300)).forms["0.weight"] == "hashed at each run"


def changed(data, at, value):
    data = bytearray(data)
    struct.pack_into("<I", data, at, value)
    struct.pack_into("<I", data, len(data) - 4, zlib.crc32(bytes(data[:-4])))
    return bytes(data)


def test_damaged_files_are_refused(small):
    data = flat_file(program_of(*[small[0]], [small[1]]))
    FlatModel(data)
    for other, why in (
        (data[:-4], "format"),
        (data[:40], "format"),
        (b"dtm2" + data[4:], "format"),
        (data[:4] + b"\2" + data[5:], "version"),
        (data[:-40] + b"\1" + data[-39:], "checksum"),
        (changed(data, 12, 4), "format"),  # an arena that is too small
        (changed(data, 44, len(data)), "format"),  # data that begin at the end
    ):
        with pytest.raises(ExportError, match=why):
            FlatModel(other)


def test_places_do_not_overlap_while_both_are_needed():
    torch.manual_seed(0)
    chance = np.random.default_rng(0)
    for _ in range(30):
        program, buffers = Program(), [Buffer(int(size)) for size in chance.integers(1, 100, 12)]
        for buffer in buffers:
            read = [buffers[at] for at in chance.integers(0, 12, 2)]
            program.call("pair", [*map(Place, read), Place(buffer)], scratch=int(chance.integers(1, 50)))
        program.place()
        spans = {}
        for at, call in enumerate(program.calls):
            for buffer in {*call.reads, *call.writes}:
                spans.setdefault(buffer, []).append(at)
        assert max(buffer.at + buffer.floats for buffer in spans) <= program.arena
        for one, when in spans.items():
            for other, then in spans.items():
                if one is not other and when[0] <= then[-1] and then[0] <= when[-1]:
                    assert one.at + one.floats <= other.at or other.at + other.floats <= one.at


def test_a_chain_of_layers_takes_turns_in_memory():
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())])
    program = program_of(model.eval(), [torch.randn(1, 64)])
    assert program.arena <= 2 * 64 + 8  # two vectors, and a scratch of one number
    assert [buffer.space for buffer in program.outputs] == [Space.OUTPUT]
