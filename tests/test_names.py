"""Names that look like patterns, through everything that takes names: they mean the layer that has them."""

import numpy as np
import pytest
import torch
from torch import nn

import deepthin.torch as dt

NAMES = ["fc[0]", "fc0", "re:fc?", "f*"]
pytestmark = pytest.mark.filterwarnings("ignore:The relative error of")  # nothing is trained here


class Net(nn.Module):
    """Layers of the same size one after the other, under names with characters of patterns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            self.add_module(name, nn.Linear(30, 30))

    def forward(self, x):
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def thin(model):
    return [name for name, layer in model.named_children() if "weight" not in dict(layer.named_parameters())]


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_and_ignore_mean_the_layer_of_that_name(name):
    for pattern in (name, f"{name}.weight"):
        model = Net()
        report = dt.compress(model, {"rules": {pattern: {"ratio": 0.3}}}, init="scratch")
        assert thin(model) == [name]
        assert [row.name for row in report.rows if row.method != "dense"] == [f"{name}.weight"]
        model = Net()
        dt.compress(model, {"model": {"ratio": 0.3, "ignore": [pattern]}}, init="scratch")
        assert thin(model) == [other for other in NAMES if other != name]


def test_allocated_targets_reach_the_layers_that_they_were_measured_for():
    inputs = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 30), np.float32))
    model = Net()
    wanted = model(inputs).detach()

    def loss(model):
        return float((model(inputs) - wanted).square().mean())

    rules = {"model": {"ratio": 0.5, "ignore": ["f*"]}, "rules": {"*": {"method": "pruned"}}}
    for found in (dt.allocate(model, rules, loss, sizes=3), dt.allocate_pruning(model, rules, "class-blind")):
        assert [rule.pattern for rule in found.rules] == [f"{name}.weight" for name in NAMES[:3]]
        copy = Net()
        report = dt.compress(copy, found)
        assert thin(copy) == NAMES[:3]
        sizes = {row.name: row.bytes for row in report.rows}
        for rule in found.rules:
            assert 0.9 * rule.bytes < sizes[rule.pattern] <= rule.bytes


def test_names_like_patterns_survive_a_file(tmp_path):
    model = Net()
    dt.compress(model, {"rules": {"fc[0]": {"ratio": 0.3}, "re:fc?": {"method": "rank", "rank": 3}}}, init="scratch")
    dt.save(model, tmp_path / "net.thin")
    inputs = torch.ones(3, 30)
    again = dt.load(Net(), tmp_path / "net.thin")
    assert torch.equal(again(inputs), model(inputs))
