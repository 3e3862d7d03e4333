"""``load`` of any file into any model of the architecture: tensors thin or dense on either side, tied, grouped."""

import copy
import itertools

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.torch.exchange import THIN, thin_tensors
from deepthin.torch.generated import ThinLayer
from deepthin.torch.sequential import ThinSequential

pytestmark = pytest.mark.filterwarnings("ignore:The relative error of")


LAYERS = ("norm", "grouped", "batch1", "batch2", "batch3")
NORMS = ["root.weight", *[f"{layer}.{name}" for layer in LAYERS for name in ("weight", "bias")]]


class Everything(nn.Module):
    """Every layer, among them a chain, and a table that is tied to the output."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 24)
        self.bag = nn.EmbeddingBag(60, 24)
        self.conv1 = nn.Conv1d(24, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 5, padding=2)
        self.conv3 = nn.Conv3d(1, 4, 3, padding=1)
        self.turned1 = nn.ConvTranspose1d(24, 24, 3, padding=1)
        self.turned2 = nn.ConvTranspose2d(4, 1, 3, padding=1)
        self.turned3 = nn.ConvTranspose3d(4, 1, 3, padding=1)
        self.rnn = nn.RNN(24, 24, batch_first=True)
        self.gru = nn.GRU(24, 24, batch_first=True)
        self.lstm = nn.LSTM(24, 24, batch_first=True)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.chain = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU())
        self.out = nn.Linear(24, 60, bias=False)
        self.out.weight = self.table.weight
        self.norm, self.root, self.grouped = nn.LayerNorm(24), nn.RMSNorm(24), nn.GroupNorm(2, 6)
        self.batch1, self.batch2, self.batch3 = nn.BatchNorm1d(6), nn.BatchNorm2d(4), nn.BatchNorm3d(4)
        for name, value in self.named_parameters():
            if name in NORMS:
                nn.init.normal_(value, mean=1.0, std=0.1)

    def forward(self, words):
        x = self.table(words) + self.bag(words)[:, None]
        x = x + self.turned1(self.conv1(x.transpose(1, 2))).transpose(1, 2)
        x = x + self.turned2(self.batch2(self.conv2(x[:, None])))[:, 0]
        x = x + self.turned3(self.batch3(self.conv3(x[:, None, None])))[:, 0, 0]
        x = self.batch1(self.grouped(self.root(self.norm(x))))
        x = self.lstm(self.gru(self.rnn(x)[0])[0])[0]
        return self.out(self.chain(self.attention(x, x, x)[0]))


EACH = {"ratio": 0.4}
RULES = {
    "dense": None,
    "thin": {"rules": {"*weight*": EACH}},
    "biases too": {"rules": {"*": {"ratio": 0.8}}},
    "tables": {"rules": {"table.weight": EACH, "bag.weight": EACH}},
    "recurrent": {"rules": {"rnn.weight*": EACH, "lstm.weight_ih_l0": EACH}},
    "one of the chain": {"rules": {"chain.0.weight": EACH}},
    "rest": {
        "rules": {"*conv*.weight": EACH, "turned*.weight": EACH, "attention.*weight": EACH, "chain.2.weight": EACH}
    },
    "a group": {"rules": {"*.weight": {"ratio": 0.3, "group": "flat"}}},
    "another group": {"rules": {"chain.*.weight": {"ratio": 0.3, "group": "flat"}, "*.weight": EACH}},
    "rounded": {"rules": {"*.weight": {"ratio": 0.3, "then": {"method": "uniform", "bits": 8}}}},
    "symbols": {"rules": {"*.weight": {"method": "kmeans", "bits": 3}}},
    "vectors": {"model": {"biases": {"method": "uniform", "bits": 16}}, "rules": {"table.weight": EACH}},
    "normalisation": {"rules": {name: {"method": "uniform", "bits": 8} for name in NORMS}},
    "coded": {"rules": {"*.weight": {"method": "coded"}}},
}
LOST = 1e-4  # of the largest output: sums in another order, through all layers
WORDS = torch.arange(18).reshape(3, 6) * 3


def model(rule, seed=0):
    torch.manual_seed(seed)
    network = Everything().eval()
    if RULES[rule] is not None:
        dt.compress(network, RULES[rule], init="scratch")
    return network


def evaluated(network):
    with torch.no_grad():
        return network.eval()(WORDS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("pairs"), {}
    for rule in RULES:
        network = model(rule)
        path = folder / f"{len(found)}.thin"
        dt.save(network, path)
        found[rule] = path, evaluated(network), [name for name, _ in network.named_parameters()]
    return found


def test_the_network_has_every_layer():
    assert {type(module) for module in Everything().modules()} >= {k for k in THIN if k.__module__.startswith("torch.")}


@pytest.mark.parametrize(("into", "file"), [*itertools.product(RULES, RULES)])
def test_any_file_goes_into_any_model(into, file, files, tmp_path):
    path, want, names = files[file]
    network = model(into, seed=1)
    evaluated(network)  # so that caches and chains of what is replaced exist
    assert dt.load(network, path) is network
    torch.testing.assert_close(evaluated(network), want, rtol=0, atol=LOST * want.abs().max().item())
    held = thin_tensors(network)
    tied = (
        (held["table.weight"], held["out.weight"])
        if held.get("table.weight")
        else (network.table.weight, network.out.weight)
    )
    assert tied[0] == tied[1] if isinstance(tied[0], tuple) else tied[0] is tied[1]
    assert {name for name, _ in network.named_parameters()} == set(names)
    assert all(module.thin for module in network.modules() if isinstance(module, ThinLayer))
    in_chain = any(isinstance(module, ThinLayer) for module in network.chain)
    assert isinstance(network.chain, ThinSequential) == in_chain
    dt.save(network, tmp_path / "again.thin")
    assert (tmp_path / "again.thin").read_bytes() == path.read_bytes()
    network.train()(WORDS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    want = evaluated(network)  # running statistics have changed
    dense = dt.materialize(copy.deepcopy(network))
    torch.testing.assert_close(evaluated(dense), want, rtol=0, atol=LOST * want.abs().max().item())
    if file == "dense":
        assert [name for name, _ in network.named_parameters()] == names


def test_a_dense_table_takes_type_and_freedom_of_the_thin_one(files):
    path, want, _ = files["dense"]
    network = model("thin", 1).double().requires_grad_(False)
    dt.load(network, path)
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in network.parameters())
    torch.testing.assert_close(evaluated(network).float(), want, rtol=0, atol=LOST * want.abs().max().item())
    with torch.device("meta"):
        empty = Everything()
    dt.compress(empty, RULES["thin"], init="scratch")
    assert torch.equal(evaluated(dt.load(empty, path)), want)
