"""Thin updates of a frozen base: they begin at zero, train, are saved without the base, and fit this base alone."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin.errors import BudgetError, ConfigError
from deepthin.torch.update import BASE, base_hash, base_tensors, updates

METHODS = [
    "deepthin",
    "shuffled",
    "kronecker",
    "tensor-train",
    "rank",
    "hashed",
    "pruned",
    "binary",
    "uniform",
    "kmeans",
]
CODED = {
    "model": {"file_bytes": 1500},
    "rules": {"*": {"method": "deepthin", "floats": 0.3, "then": {"method": "coded"}}},
}


def rules(method, ratio=0.2):
    return {"model": {"ratio": ratio}, "rules": {"*": {"method": method}}}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 6))


class Both(nn.Module):
    """A layer of each kind that has a matrix."""

    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.lstm = nn.LSTM(16, 16, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(32, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 12)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.convolution(self.table(ids).transpose(1, 2)).transpose(1, 2)
        x = self.gru(self.lstm(x)[0])[0]
        return self.head(self.attention(x, x, x)[0])


def both(tied=False):
    torch.manual_seed(1)
    return Both(tied)


IDS = torch.arange(20).reshape(2, 10) % 12
X = torch.linspace(-1, 1, 8 * 24).reshape(8, 24).sin()


def train(model, x, steps=25, target=None):
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
    first = None
    for _ in range(steps):
        loss = (model(x) - 0.5).square().mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        (loss if target is None else loss + target.penalty()).backward()
        optimizer.step()
        if target is not None:
            target.step()
    return first, (model(x) - 0.5).square().mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_an_update_begins_at_zero_trains_and_returns_from_its_file(method, tmp_path):
    base = mlp()
    model = copy.deepcopy(base)
    before = base_hash(model)
    dt.delta(model, rules(method))
    assert torch.equal(model(X), base(X))
    first, last = train(model, X)
    assert last < 0.9 * first
    assert base_hash(model) == before  # the base is frozen
    dt.save(model, tmp_path / "d.thin", only="delta")
    again = dt.load(copy.deepcopy(base), tmp_path / "d.thin")
    assert torch.equal(again(X), model(X))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    adapted = deepthin.load(tmp_path / "d.thin")  # NumPy: the updates, and the hash of their base
    assert bytes(adapted.pop(BASE)) == before
    for name, update in adapted.items():
        now = base.get_parameter(name).detach() + torch.from_numpy(update)
        assert torch.allclose(now, model.get_submodule(name.rpartition(".")[0]).weight, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_every_layer_is_adapted_copied_merged_and_apart_again(tied, tmp_path):
    base = both(tied).eval()
    model = copy.deepcopy(base)
    names = dt.delta(model, {"model": {"ratio": 0.3}, "rules": {"*": {"method": "deepthin"}}})
    assert {row.name for row in names.rows} >= {"lstm.weight_hh_l0_reverse", "gru.weight_ih_l0", "convolution.weight"}
    assert torch.equal(model(IDS), base(IDS))
    first, last = train(model, IDS)
    assert last < first
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    wanted = model(IDS).detach()
    assert torch.equal(copy.deepcopy(model)(IDS), wanted)
    assert dt.save(model, tmp_path / "d.thin", only="delta") == (tmp_path / "d.thin").stat().st_size
    loaded = dt.load(copy.deepcopy(base), tmp_path / "d.thin", frozen=True)
    assert torch.equal(loaded(IDS), wanted)
    assert not any(p.requires_grad for p in loaded.parameters())

    assert dt.merge(model) is model
    assert not updates(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.allclose(model(IDS), wanted, atol=1e-6)
    assert (model.head.weight is model.table.weight) is tied
    whole = dt.save(model, tmp_path / "whole.thin")
    assert whole > 10_000
    assert torch.equal(dt.load(both(tied).eval(), tmp_path / "whole.thin")(IDS), model(IDS))
    dt.unmerge(model)
    assert torch.equal(model(IDS), wanted)
    assert base_hash(model) == base_hash(base)
    assert {name for name, _ in model.named_modules()} == {name for name, _ in loaded.named_modules()}


def test_a_file_of_another_speaker_replaces_the_updates(tmp_path):
    base = mlp()
    outputs = []
    for target in (0.5, -0.5):
        model = copy.deepcopy(base)
        dt.delta(model, rules("rank"))
        optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
        for _ in range(10):
            optimizer.zero_grad()
            (model(X) - target).square().mean().backward()
            optimizer.step()
        dt.save(model, tmp_path / f"{target}.thin", only="delta")
        outputs.append(model(X))
    shared = copy.deepcopy(base)
    for _ in range(2):
        for target, y in zip((0.5, -0.5), outputs, strict=True):
            assert torch.equal(dt.load(shared, tmp_path / f"{target}.thin")(X), y)
    assert not torch.equal(*outputs)


def test_the_file_is_trained_to_its_size_and_resumes(tmp_path):
    model = mlp()
    report = dt.delta(model, CODED)
    assert {row.name for row in report.rows} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    target = dt.SizeTarget(model, steps=80)
    wanted = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)) * 3
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 3e-3))
    for _ in range(80):
        optimizer.zero_grad()
        ((model(X) - wanted).square().mean() + target.penalty()).backward()
        optimizer.step()
        target.step()
    size = dt.save(model, tmp_path / "d.thin", max_bytes=1500, only="delta")
    assert size <= 1500
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = mlp()
    dt.delta(fresh, CODED, seed=5)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X), model(X))


def test_the_base_of_a_file_is_checked(tmp_path):
    model = mlp()
    dt.delta(model, rules("deepthin"))
    train(model, X, 2)
    dt.save(model, tmp_path / "d.thin", only="delta")
    other = mlp()
    with torch.no_grad():
        other[0].bias[3] += 1e-6
    kept = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ConfigError, match="another base"):
        dt.load(other, tmp_path / "d.thin")
    assert all(torch.equal(value, kept[key]) for key, value in other.state_dict().items())
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(ConfigError, match="another base"):
        dt.load(nn.Sequential(nn.Linear(24, 32)), tmp_path / "d.thin")


def test_a_changed_base_is_not_saved(tmp_path):
    model = nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32), nn.Linear(32, 6))
    dt.delta(model, rules("deepthin"))
    model(X)  # in training mode the running statistics move
    with pytest.raises(ConfigError, match=r"running statistics[\s\S]*eval\(\)"):
        dt.save(model, tmp_path / "d.thin", only="delta")
    assert not (tmp_path / "d.thin").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, path: dt.save(model, path), r"save\(model, path, only='delta'\)"),
        (lambda model, path: dt.save(model, path, only="base"), "unknown"),
        (lambda model, path: dt.save(mlp(), path, only="delta"), "no updates"),
        (lambda model, path: dt.delta(model, rules("rank")), "has updates already"),
        (lambda model, path: dt.compress(model, rules("rank")), "merge"),
        (lambda model, path: dt.merge(mlp()), "no updates"),
        (lambda model, path: dt.unmerge(model), "No updates of the model are merged"),
        (lambda model, path: dt.delta(thin(), rules("rank")), "materialize"),
        (lambda model, path: dt.delta(mlp().to("meta"), rules("rank")), "trained weights"),
        (lambda model, path: dt.delta(mlp(), {"rules": {"nothing": {"method": "rank"}}}), "nothing"),
        (lambda model, path: dt.load(model, whole(path)), "whole network"),
    ],
)
def test_mistakes_have_a_message_and_change_nothing(call, message, tmp_path):
    model = mlp()
    dt.delta(model, rules("deepthin"))
    y = model(X)
    with pytest.raises(ConfigError, match=message):
        call(model, tmp_path / "d.thin")
    assert torch.equal(model(X), y)


def thin():
    model = mlp()
    dt.compress(model, rules("deepthin"), init="scratch")
    return model


def whole(path):
    dt.save(mlp(), path)
    return path


def test_a_size_out_of_reach_names_the_smallest():
    coded = copy.deepcopy(CODED)
    coded["model"]["file_bytes"] = 40
    with pytest.raises(BudgetError, match="file_bytes >= "):
        dt.delta(mlp(), coded)
    exact = {"model": {"file_bytes": 600, "ignore": ["2"]}, "rules": {"*": {"method": "rank"}}}
    report = dt.delta(model := mlp(), exact)
    assert report.total_bytes <= 600
    assert set(updates(model)) == {"0.weight"}


def test_names_and_values_of_the_base_stay(tmp_path):
    base = both(tied=True)
    model = copy.deepcopy(base)
    dt.delta(model, rules("rank", 0.5))
    assert base_tensors(model).keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in base_tensors(model).items())


def test_the_page(tmp_path, monkeypatch):
    page = Path(__file__).parent.parent / "docs" / "delta.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec("\n".join(blocks), names := {})
    assert (tmp_path / "speaker.thin").stat().st_size <= 2000
    assert torch.allclose(names["model"](names["inputs"]), names["base"](names["inputs"]), atol=1e-5)
