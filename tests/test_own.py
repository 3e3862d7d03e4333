"""The user's own network under `compare`: the example of the documentation, and what goes wrong first."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from deepthin import ConfigError
from deepthin.lab.compare import Settings, compare
from deepthin.lab.tasks.own import Own
from deepthin.lab.tasks.training import Training
from deepthin.lab.trial import Run, Setup, Trial, _loaded

EXAMPLE = Path(__file__).parent.parent / "docs" / "own_network.py"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    for name in [name for name in sys.modules if name in ("own_network", "nets")]:
        del sys.modules[name]
    _loaded.cache_clear()
    return tmp_path


def test_the_example_of_the_documentation(here, command_line):
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    shutil.copy(EXAMPLE, here)
    words = re.search(r"deepthin (compare .*)", EXAMPLE.read_text())[1].split()
    code, printed, _ = command_line(
        *words, "--steps", "150", "--methods", "deepthin,rank,pruned,same-size,deepthin-8bit"
    )
    assert code == 0, printed
    rows = json.loads((here / "runs" / "build" / "results.json").read_text())
    found = {(row["method"], row["ratio"]): row for row in rows if row["split"] == "test"}
    assert found["dense", 1.0]["value"] < 6
    assert found["deepthin", 0.05]["value"] < 12
    assert found["same-size", 0.05]["bytes"] < 0.06 * found["dense", 1.0]["bytes"]
    assert all(row["microseconds"] > 0 for row in rows if row["value"] is not None)
    assert (here / "runs" / "build" / "report.html").stat().st_size > 10_000
    assert "build" in printed


def nets(text, folder):
    (folder / "nets.py").write_text(
        "import torch\nfrom torch import nn\nX = torch.randn(60, 8)\n"
        "def build():\n    return nn.Linear(8, 8)\n"
        "def fit(model, training):\n"
        "    for chosen in training.batches(60, 10):\n        training.minimise(model(X[chosen]).square().mean())\n"
        "def evaluate(model, split):\n    return model(X).square().mean().item()\n" + text
    )
    return Setup("", steps=4, own=("nets:build", "nets:fit", "nets:evaluate"))


def test_a_number_is_called_error_and_a_network_of_one_width_has_no_same_size(here):
    setup = nets("", here)
    rows = compare(Settings(setup, ("rank",), (0.5,)), here / "out")
    assert {row.metric for row in rows} == {"error"}
    assert all(row.value > 0 for row in rows)
    with pytest.raises(ConfigError, match="takes no width, so there is no same-size network"):
        compare(Settings(setup, ("same-size",), (0.5,)), here / "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build():\n    return 3\n", "returned int, not a torch.nn.Module"),
        ("def evaluate(model, split):\n    return 1.0\n", "--evaluate never calls the network"),
        ("def evaluate(model, split):\n    model(X)\n    return 'good'\n", "return a number, or a mapping"),
        ("def evaluate(model, split):\n    model(X)\n    return {}\n", "return a number, or a mapping"),
        ("def build(width):\n    return nn.Linear(width, 8)\n", "give width a default"),
        ("def build(depth):\n    return nn.Linear(depth, 8)\n", "must be callable without arguments"),
    ],
)
def test_what_is_no_use_is_said_before_the_training(here, text, message):
    setup = nets(text, here)
    with pytest.raises(ConfigError, match=message):
        Run.prepare(setup)


def test_a_batch_that_is_not_used_is_told(here):
    text = "def fit(model, training):\n    for chosen in training.batches(60, 10):\n        pass\n"
    run = Run.prepare(nets(text, here))
    with pytest.raises(ConfigError, match=r"A batch was not used: call training.minimise\(loss\) once for each"):
        run.train(Trial("dense", 1.0, 0), lambda _: None)
    with pytest.raises(ConfigError, match="training.minimise belongs into a loop"):
        Training(model=nn.Linear(1, 1), steps=1, lr=0.1).minimise(torch.zeros(()))


NAMED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.register_buffer("mask", torch.ones(8), persistent=False)
        self.scale = nn.Parameter(torch.ones(2, 8))
    def forward(self, x, other=None):
        y, state = self.rnn(x * self.mask * self.scale[0] + (0 if other is None else other[0]))
        return {"y": y, "state": state}
def build():
    return Net()
def fit(model, training):
    for chosen in training.batches(60, 10):
        training.minimise(model(x=X[chosen, None])["y"].square().mean())
def evaluate(model, split):
    return {"a": model(x=X[:, None], other=[X[:, None]])["y"].square().mean().item(), "b": LOSS}
LOSS = 1.0
"""


def test_networks_of_other_forms(here):
    """Named arguments, nested inputs and outputs, a buffer that is not saved, a matrix without a thin version."""
    setup = nets(NAMED, here)
    rows = compare(Settings(setup, ("rank", "deepthin-8bit"), (0.6,)), here / "out")
    assert {(row.method, row.metric) for row in rows} == {
        (method, metric) for method in ("dense", "int8", "rank", "deepthin-8bit") for metric in "ab"
    }
    assert all(row.microseconds > 0 for row in rows)
    whole = next(row.weight_bytes for row in rows if row.method == "dense")
    assert all(row.weight_bytes <= 0.6 * whole for row in rows if row.method in ("rank", "deepthin-8bit"))
    (here / "nets.py").write_text((here / "nets.py").read_text().replace("LOSS = 1.0", "LOSS = 2.0"))
    del sys.modules["nets"]
    _loaded.cache_clear()
    with pytest.raises(ConfigError, match="holds results of another run .data = 'nets:build, nets:fit, nets:evaluate"):
        compare(Settings(setup, ("rank",), (0.6,)), here / "out")


def test_what_is_no_number_is_a_row_that_failed(here):
    text = NAMED.replace('"b": LOSS', '"b": float("nan") if split == "test" else 1.0')
    rows = compare(Settings(nets(text, here), ("rank",), (0.6,)), here / "out")
    assert [row.value for row in rows] == [None, None, None]
    by = {row.method: row.failed for row in rows}
    assert by["rank"] == by["dense"] == "The b on test data is nan."
    assert "quantise" in by["int8"]


def test_a_network_that_diverges_is_a_row_that_failed(here):
    text = "def build():\n    return nn.Linear(8, 8)\ndef fit(model, training):\n" + (
        "    for chosen in training.batches(60, 10):\n        training.minimise(model(X[chosen]).square().mean())\n"
        "    with torch.no_grad():\n        model.bias.fill_(float('nan'))\n"
    )
    rows = compare(Settings(nets(text, here), ("rank",), (0.6,)), here / "out")
    by = {row.method: row.failed for row in rows}
    assert by["rank"] == "The training ended with weights that are not finite: use a smaller learning rate."
    assert by["int8"] == "the dense network of this seed failed"


def test_a_training_that_skips_steps_is_told(here):
    setup = nets("def fit(model, training):\n    pass\n", here)
    with pytest.raises(ConfigError, match="made 0 of 4 steps: it must call training.minimise once for each batch"):
        Run.prepare(setup).train(Trial("dense", 1.0, 0), lambda _: None)


def test_functions_that_are_not_there_are_named(here):
    nets("", here)
    with pytest.raises(ConfigError, match=r"--train nets:fitt: write package.module:function; 'nets' has no 'fitt'"):
        Own.find("nets:build", "nets:fitt", "nets:evaluate")
    with pytest.raises(ConfigError, match="--evaluate nots:evaluate: cannot import 'nots'"):
        Own.find("nets:build", "nets:fit", "nots:evaluate")


def test_a_matrix_without_a_thin_version_stays_dense(here):
    text = (
        "class Scale(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.scale = nn.Parameter(torch.ones(1, 8))\n"
        "    def forward(self, x):\n        return x * self.scale\n"
        "def build():\n    return nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8), Scale())\n"
    )
    model, _ = Run.prepare(nets(text, here)).model(Trial("deepthin", 0.5, 0))
    assert isinstance(model[2].scale, nn.Parameter)
    assert "thin" in model[0]._modules
