"""A method of forty lines, registered by one: it obeys the laws and goes through the whole library as it stands."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin import METHODS, BudgetError
from deepthin.methods import Named
from deepthin.testing import INNER, Claims, check_method
from deepthin.torch.exchange import THIN
from tolerance import assert_close, largest


@dataclass(frozen=True, slots=True)
class Striped:
    """``W[r, c] = values[r mod stripes, c]``: rows take turns, and share their numbers."""

    shape: tuple[int, int]
    stripes: int
    trains = "codes"

    @classmethod
    def fit(cls, shape, max_bits):
        least = 32 * shape[1]
        if max_bits < least:
            raise BudgetError(f"{least} bits are the least.", smallest_bits=least, smallest_ratio=1 / shape[0])
        return cls(shape, min(max_bits // least, shape[0]))

    def bits(self):
        return 32 * self.stripes * self.shape[1]

    def code_shapes(self):
        return {"values": (self.stripes, self.shape[1])}

    def integers(self):
        return {}

    def derived(self):
        row, col = np.arange(self.shape[0])[:, None], np.arange(self.shape[1])
        return {"places": row % self.stripes * self.shape[1] + col}

    def init(self, rng, std):
        values = rng.normal(size=(self.stripes, self.shape[1]))
        rows = np.bincount(self.derived()["places"][:, 0] // self.shape[1])[:, None]
        values *= std * math.sqrt(self.shape[0] * self.shape[1] / (rows * values**2).sum())
        return {"values": values.astype(np.float32)}

    def encode(self, weight, xp, importance=None):
        means = [xp.mean(weight[first :: self.stripes], 0) for first in range(self.stripes)]
        return {"values": xp.stack(means, 0)}

    def decode(self, code, xp):
        return xp.take(code["values"], code["places"])


STRIPED = Named("striped", Striped, learning_rate_multiplier=3.0, about="rows that take turns")


@pytest.fixture
def striped(monkeypatch):
    monkeypatch.setitem(METHODS, "striped", STRIPED)  # in a package of one's own: METHODS["striped"] = STRIPED


@pytest.mark.parametrize(
    ("then", "examples"),
    [((), 30), (INNER, 10), pytest.param(INNER, 30, marks=pytest.mark.slow)],
    ids=["alone", "then another", "then another, 30 examples"],
)
def test_it_obeys_every_law(then, examples):
    check_method(STRIPED, claims=Claims(roundings=lambda method: 1), then=then, examples=examples)


def test_it_is_checked_without_a_name_or_claims_too():
    check_method(Striped)


LAYERS = {
    nn.Linear: (lambda: nn.Linear(24, 30), (4, 24)),
    nn.Conv1d: (lambda: nn.Conv1d(6, 12, 3), (2, 6, 9)),
    nn.Conv2d: (lambda: nn.Conv2d(3, 12, 3), (2, 3, 7, 7)),
    nn.Conv3d: (lambda: nn.Conv3d(2, 12, 2), (2, 2, 4, 4, 4)),
    nn.ConvTranspose1d: (lambda: nn.ConvTranspose1d(12, 6, 3), (2, 12, 5)),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(12, 3, 3), (2, 12, 4, 4)),
    nn.ConvTranspose3d: (lambda: nn.ConvTranspose3d(12, 2, 2), (2, 12, 3, 3, 3)),
    nn.Embedding: (lambda: nn.Embedding(40, 12, padding_idx=0), None),
    nn.EmbeddingBag: (lambda: nn.EmbeddingBag(40, 12), None),
    nn.MultiheadAttention: (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (2, 5, 16)),
    nn.RNN: (lambda: nn.RNN(12, 16, batch_first=True), (2, 5, 12)),
    nn.LSTM: (lambda: nn.LSTM(12, 16, batch_first=True), (2, 5, 12)),
    nn.GRU: (lambda: nn.GRU(12, 16, batch_first=True), (2, 5, 12)),
    nn.LayerNorm: (lambda: nn.LayerNorm(16), (6, 16)),
    nn.RMSNorm: (lambda: nn.RMSNorm(16), (6, 16)),
    nn.GroupNorm: (lambda: nn.GroupNorm(2, 16), (6, 16)),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(16), (6, 16)),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(16), (6, 16, 2, 2)),
    nn.BatchNorm3d: (lambda: nn.BatchNorm3d(16), (6, 16, 2, 2, 2)),
}
UNDER = {"NonDynamicallyQuantizableLinear", "Conv1D"}  # inside attention; Hugging Face's, once transformers is loaded


def test_the_list_of_layers_is_complete():
    assert {layer.__name__ for layer in THIN} - UNDER == {layer.__name__ for layer in LAYERS}


class Around(nn.Module):
    """One layer, and a tensor of what it gives."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        found = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return found[0] if isinstance(found, tuple) else found


def input_of(shape):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(0, 40, (6, 5), generator=generator) if shape is None else torch.randn(shape, generator=generator)
    )


@pytest.mark.parametrize("then", [None, {"method": "uniform", "bits": 8}], ids=["alone", "then 8 bits"])
@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_it_trains_in_every_layer_and_comes_back_from_a_file(striped, kind, then, tmp_path):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    network, x = Around(make()), input_of(shape)
    rule = {"method": "striped"} | ({"then": then} if then else {})
    vectors = [f"layer.{name}" for name, _ in network.layer.named_parameters() if "Norm" in kind.__name__]
    rules = {"model": {"ratio": 0.5}, "rules": dict.fromkeys(vectors or ["*"], rule)}
    planned = dt.plan(network, rules)
    report = dt.compress(network, rules, init="scratch")
    assert [row.method for row in planned.rows] == [row.method for row in report.rows]
    assert {row.method for row in report.rows} == {"striped then uniform" if then else "striped"}
    with torch.no_grad():
        goal = 0.5 * torch.randn(network(x).shape)
    optimizer, losses = torch.optim.Adam(dt.parameter_groups(network, 1e-3)), []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (network(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        want = network.eval()(x)
    assert dt.save(network, tmp_path / "a.thin") == (tmp_path / "a.thin").stat().st_size
    loaded = dt.load(Around(make()), tmp_path / "a.thin").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), want)
    dense = deepthin.load(tmp_path / "a.thin")
    plain = dt.materialize(copy.deepcopy(network)).state_dict()
    assert dense.keys() == plain.keys()
    for name, value in plain.items():
        assert_close(dense[name], value.numpy(), 4, largest(value))  # a product and a shift


def test_its_name_in_messages_and_reports(striped, tmp_path):
    network = Around(nn.Linear(24, 30))
    with pytest.raises(BudgetError, match="768 bits are the least"):
        dt.compress(network, {"rules": {"*": {"method": "striped", "ratio": 0.01}}})
    dt.compress(network, {"rules": {"*": {"method": "striped", "ratio": 0.2}}}, init="scratch")
    dt.save(network, tmp_path / "a.thin")
    (row,) = deepthin.inspect(tmp_path / "a.thin").rows
    assert (row.method, row.stripes, row.bytes) == ("striped", 6, 4 * 6 * 24)


def test_the_toy_is_a_toy():
    import inspect

    lines = [line for line in inspect.getsource(Striped).splitlines() if line.strip()]
    assert len(lines) <= 40
