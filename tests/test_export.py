"""Files for other runtimes: small, right, without a dense weight; others are refused, and nothing is written."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.errors import ConfigError, ExportError
from deepthin.torch.export import run
from deepthin.torch.export.targets import TARGETS
from test_portable import RULES, Net, assert_same, ids, thin

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters, about themselves
USUAL = ("pruned", "deepthin then coded")  # decoded in the graph; single rows, structured products, integers
LARGE = ("shuffled", "hashed", "hashed then uniform")  # their tables are as large as the weight


def one_direction():
    return Net(both=False)


@pytest.mark.parametrize("rule", [r if r in USUAL else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_every_method_in_every_layer(rule, tmp_path):
    """An embedding, a convolution, an LSTM and linear layers; other batches and lengths than the example's."""
    model, path = thin(rule, one_direction), tmp_path / "m.onnx"
    if rule in LARGE:
        with pytest.raises(ExportError, match=r"hashed, shuffled|at most [\d,]+ are allowed"):
            dt.export(model, path, ids(1, 11))
        assert list(tmp_path.iterdir()) == []
        return
    made = dt.export(model, path, ids(1, 11))
    assert made.batches == (1, 3, 8)
    assert made.bytes == path.stat().st_size <= 1.25 * made.thin_bytes + 8192 * 6
    session = onnxruntime.InferenceSession(path)
    for shape in ((1, 1), (4, 30)):
        with torch.no_grad():
            here = model(ids(*shape))
        assert_same(here, torch.from_numpy(session.run(None, {session.get_inputs()[0].name: ids(*shape).numpy()})[0]))


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 40))
    dt.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.03}}}, init="scratch", seed=0)
    return model.eval()


OTHERS = {"openvino": "openvino", "executorch": "executorch", "litert": "litert_torch", "aoti": "torch"}


@pytest.mark.parametrize("to", [pytest.param(to, marks=pytest.mark.slow) for to in OTHERS])
def test_other_runtimes(mlp, to, tmp_path):
    pytest.importorskip(OTHERS[to])
    made = dt.export(mlp, tmp_path / f"m{TARGETS[to].suffix}", torch.randn(1, 200), to, compare=True)
    assert made.error <= 1e-5
    assert made.bytes <= 1.25 * made.thin_bytes + 8192 * 3 + TARGETS[to].code_bytes
    assert made.dense.bytes > 4 * 200 * 1024 + 4 * 1024 * 1024


@pytest.fixture(scope="module")
def exported(mlp, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    return dt.export(mlp, path, compare=True), path  # the input follows from the first layer


def test_what_is_shown(exported):
    made, path = exported
    text = str(made)
    assert re.search(r"onnx: [\d,]+ bytes \(\.thin: [\d,]+\); outputs within \d\.\de-\d\d", text)
    assert "3 structured" in text
    assert made.thin.bytes == path.stat().st_size < 0.1 * made.dense.bytes
    assert made.thin.milliseconds > 0
    assert json.loads(made.to_json())["forms"] == made.forms


def test_the_runtime_finds_no_dense_matrix_to_fold(exported, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(exported[1], options)
    largest = max(np.prod(tensor.dims) for tensor in onnx.load(tmp_path / "folded.onnx").graph.initializer)
    assert largest < 40 * 1024


def test_nothing_in_the_file_names_a_source_file(exported):
    assert b"site-packages" not in exported[1].read_bytes()
    assert b".py" not in exported[1].read_bytes()


def test_the_guard_sees_a_dense_constant(mlp, exported, tmp_path):
    model = onnx.load(exported[1])
    dense = mlp[2].thin["weight"]().detach().numpy()
    model.graph.initializer.append(onnx.numpy_helper.from_array(dense, "planted"))
    onnx.save(model, tmp_path / "planted.onnx")
    with pytest.raises(ExportError, match="planted"):
        run._check_constants(mlp, TARGETS["onnx"], TARGETS["onnx"].module(), tmp_path / "planted.onnx")


def test_the_guard_sees_factors_that_are_folded(mlp, tmp_path, monkeypatch):
    """The form that every exporter makes of a decoded weight: factors that the runtime multiplies when it loads."""
    from deepthin.torch.export import onnx as written

    monkeypatch.setattr(written, "portable", lambda model, *_: _decoded(model))
    with pytest.raises(ExportError, match="constants as large as a dense"):
        dt.export(mlp, tmp_path / "m.onnx", to="onnx")
    assert list(tmp_path.iterdir()) == []


def _decoded(model):
    class Decoded(nn.Module):
        def __init__(self, layer):
            super().__init__()
            floats = layer.thin["weight"].floats()
            self.shape, self.bias = layer.weight.shape, layer.bias
            self.xf, self.wf = (nn.Parameter(floats[entry].detach()) for entry in ("xf", "wf"))

        def forward(self, x):
            dense = (self.xf @ self.wf).flatten()[: self.shape[0] * self.shape[1]].view(self.shape)
            return nn.functional.linear(x, dense, self.bias)

    return nn.Sequential(*(Decoded(part) if isinstance(part, nn.Linear) else nn.ReLU() for part in model)).eval()


def test_the_guard_sees_other_outputs(mlp, exported):
    other = nn.Sequential(nn.Linear(200, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 40)).eval()
    with pytest.raises(ExportError, match="differ by"):
        run._check_outputs(other, TARGETS["onnx"], TARGETS["onnx"].module(), exported[1], [torch.randn(1, 200)])


def test_a_file_that_was_there_stays(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 512), nn.ReLU(), nn.Linear(512, 300))
    dt.compress(model, {"rules": {"*": {"method": "hashed", "ratio": 0.02}}}, init="scratch")
    with pytest.raises(ExportError, match="hashed"):
        dt.export(model, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


class Either(nn.Module):
    """Recurrent layers whose exporter would fix the number of steps."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layers = kind(24, 20, **options)

    def forward(self, x):
        y, last = self.layers(x)
        return (y, *last) if isinstance(last, tuple) else (y, last)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.GRU, {"batch_first": True, "num_layers": 2, "bidirectional": True}),
        pytest.param(nn.RNN, {"nonlinearity": "relu"}, marks=pytest.mark.slow),
        pytest.param(nn.RNN, {"bias": False, "bidirectional": True}, marks=pytest.mark.slow),
        pytest.param(nn.LSTM, {"num_layers": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("how", ["thin", "dense", pytest.param("in loops", marks=pytest.mark.slow)])
def test_recurrent_layers(kind, options, how, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Either(kind, **options)
    if how == "in loops":  # as layers of 384 units and more
        monkeypatch.setattr(sys.modules["deepthin.torch.portable"], "_UNITS", 1)
        monkeypatch.setattr(sys.modules["deepthin.torch.portable"], "_SMALL", 0)
    if how != "dense":
        dt.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.3}}}, init="scratch")
    dt.export(model.eval(), path := tmp_path / "m.onnx", torch.randn(2, 5, 24))
    session, x = onnxruntime.InferenceSession(path), torch.randn(4, 9, 24)
    with torch.no_grad():
        for here, there in zip(model(x), session.run(None, {session.get_inputs()[0].name: x.numpy()}), strict=True):
            assert_same(here, torch.from_numpy(there))


MISTAKES = {
    "format": ({"to": "onxx"}, "Did you mean 'onnx'"),
    "suffix": ({"path": "m.bin"}, "could be any format"),
    "example": ({"example": torch.randn(1, 7)}, "does not run on the example"),
    "no tensor": ({"example": (3,)}, "must be a tensor"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, mlp, tmp_path):
    given, message = MISTAKES[mistake]
    given = {"path": "m.onnx", **given}
    with pytest.raises(ConfigError, match=message):
        dt.export(mlp, tmp_path / given.pop("path"), **given)


def test_an_input_that_does_not_follow_from_the_layers_must_be_given(tmp_path):
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(ConfigError, match="give an example"):
        dt.export(Two(), tmp_path / "m.onnx")


def test_a_missing_package_is_named(mlp, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "onnx", TARGETS["onnx"].__class__("onnx", ".onnx", ("no_such_package",)))
    with pytest.raises(ConfigError, match="no_such_package, which is not installed: pip install"):
        dt.export(mlp, tmp_path / "m.onnx")


class Pair(nn.Module):
    """Takes a batch of two alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(200, 70)

    def forward(self, x):
        return self.layer(x).reshape(2, 70)


def test_a_model_of_one_batch_is_compared_at_that(tmp_path):
    torch.manual_seed(0)
    model = Pair()
    dt.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.1}}}, init="scratch")
    assert dt.export(model.eval(), tmp_path / "m.onnx", torch.randn(2, 200)).batches == (2,)
