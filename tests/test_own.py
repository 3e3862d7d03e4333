"""The user's own network under `compare`: the example of the documentation, and what goes wrong first."""

import json
import re
import shutil
import sys
from dataclasses import replace
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


CALLABLES = """
import functools, operator
class Judge:
    def __init__(self, power=2):
        self.power, self.net, self.other = power, nn.Linear(1, 1), len
    def __call__(self, model, split):
        return (model(X) ** self.power).mean().item()
    def judge(self, model, split):
        return self(model, split)
    @staticmethod
    def judged(model, split):
        return Judge()(model, split)
    def train(self, model, training):
        fit(model, training)
class Net(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(nn.Linear(8, width))
def general(power, model, split):
    return (model(X) ** power).mean().item()
def wide(rows, width=8):
    return nn.Linear(rows, width)
def outer(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)
    return inner
partly, object_, method = functools.partial(general, 2), Judge(4), Judge(2).judge
nested, lambda_, static = functools.partial(partly), (lambda model, split: evaluate(model, split)), Judge.judged
wrapped, built_in = outer(evaluate), functools.partial(operator.call, evaluate)
builder, trainer, training_ = functools.partial(wide, 8, width=6), functools.partial(fit), Judge().train
compiled = eval("lambda model, split: evaluate(model, split)")
"""


@pytest.mark.parametrize("evaluate", "partly object_ method nested lambda_ static wrapped compiled built_in".split())
def test_every_kind_of_callable_judges(here, evaluate):
    setup = replace(nets(CALLABLES, here), own=("nets:build", "nets:fit", f"nets:{evaluate}"))
    abouts = []
    for _ in range(2):
        run = Run.prepare(setup)
        abouts.append(run.data.about)
        del sys.modules["nets"]
    assert abouts[0] == abouts[1]  # the same command goes on where it stopped
    assert " at 0x" not in abouts[0]


@pytest.mark.parametrize(("build", "train", "width"), [("builder", "trainer", 6), ("Net", "training_", 8)])
def test_every_kind_of_callable_builds_and_trains(here, build, train, width):
    setup = replace(nets(CALLABLES, here), own=(f"nets:{build}", f"nets:{train}", "nets:object_"))
    assert Run.prepare(setup).width == width
    rows = compare(Settings(setup, ("rank",), (0.7,)), here / "out")
    assert all(row.value is not None for row in rows if row.method == "rank"), rows


def test_what_a_callable_was_given_tells_runs_apart(here):
    setup = nets(CALLABLES, here)
    about = Run.prepare(replace(setup, own=("nets:builder", "nets:fit", "nets:object_"))).data.about
    assert about.startswith("nets:wide(8, width=6), nets:fit, nets:Judge(power=4, net=Linear, other=builtins:len), ")


def test_a_factory_whose_arguments_cannot_be_told_is_refused(here, command_line):
    (here / "nets.py").write_text("build = dict\ndef fit(): pass\ndef evaluate(): pass\n")
    for words in (
        "plan --model nets:build --ratio 0.1",
        "compare --model nets:build --train nets:fit --evaluate nets:evaluate",
    ):
        code, _, said = command_line(*words.split())
        assert code == 2
        assert said.startswith("error: --model ")
        assert "write a function around it" in said or "no torch.nn.Module" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("text", ["def build(:", "1 / 0", "raise RuntimeError('no')", "import nothing_of_this_name"])
def test_a_module_that_cannot_be_imported_is_told(here, command_line, text):
    (here / "nets.py").write_text(text + "\n")
    code, _, said = command_line("plan", "--model", "nets:build", "--ratio", "0.1")
    assert code == 2
    assert said.startswith("error: --model nets:build: ")


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
