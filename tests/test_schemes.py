"""Pruning by one threshold, by equal shares of classes, and by their spread (See et al., 2016)."""

import numpy as np
import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:The relative error of")  # nothing is trained here
RULES = {"model": {"ratio": 0.2}, "rules": {"0.*": {"method": "pruned"}, "*": {"method": "pruned"}}}


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 60))
    with torch.no_grad():
        for layer, scale in zip(made, (0.3, 1.0, 3.0), strict=True):
            layer.weight.normal_().mul_(scale)
    return made


def kept(model: nn.Module, rules: object) -> dict[str, np.ndarray]:
    """Which weights of each matrix stay."""
    dt.compress(model, rules)  # pyright: ignore[reportArgumentType]
    return {name: (layer.weight != 0).numpy() for name, layer in model.named_children()}


def magnitudes(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: layer.weight.detach().abs().numpy().copy() for name, layer in model.named_children()}


def size(rules: object, model: nn.Module) -> int:
    return 8 * sum(row.bytes for row in dt.plan(model, rules).rows)  # pyright: ignore[reportArgumentType]


def test_class_blind_keeps_what_is_above_one_threshold(model):
    before = magnitudes(model)
    stays = kept(model, dt.allocate_pruning(model, RULES, "class-blind"))
    assert stays["0"].sum() == 1  # below the threshold, but a matrix keeps one
    least = min(before[name][stays[name]].min() for name in "12")
    gone = np.sort(np.concatenate([before[name][~stays[name]] for name in before]))
    assert (gone > least).sum() <= 3  # a budget leaves each matrix with one weight more or less
    shares = [stays[name].mean() for name in before]
    assert shares[0] < 0.02 < shares[1] < 0.3 < shares[2]


def test_class_uniform_keeps_the_same_share_of_each_class(model):
    before = magnitudes(model)
    stays = kept(model, dt.allocate_pruning(model, RULES, "class-uniform"))
    first = stays["0"].mean()
    others = np.concatenate([stays["1"].ravel(), stays["2"].ravel()]).mean()
    assert abs(first - others) < 0.001
    rest = np.concatenate([before[n][~stays[n]] for n in "12"])  # within the class one threshold
    assert (rest > min(before[n][stays[n]].min() for n in "12")).sum() <= 2


def test_class_distribution_goes_by_the_spread_of_each_class(model):
    before = magnitudes(model)
    stays = kept(model, dt.allocate_pruning(model, RULES, "class-distribution"))
    classes = {"0": ["0"], "1": ["1", "2"]}
    multiples = []
    for names in classes.values():
        weights = np.concatenate([before[n].ravel() for n in names]).astype("f8")
        least = min(before[n][stays[n]].min() for n in names)
        multiples.append(least / np.sqrt(np.mean(weights**2)))
    assert abs(multiples[0] / multiples[1] - 1) < 0.01


@pytest.mark.parametrize("scheme", ["class-blind", "class-uniform", "class-distribution"])
@pytest.mark.parametrize("then", [None, {"method": "kmeans", "bits": 5}])
def test_the_budget_is_kept_and_nearly_used(model, scheme, then):
    rule = {"method": "pruned"} | ({"then": then} if then else {})
    rules = {"model": {"ratio": 0.1}, "rules": {"0.*": rule, "*": rule}}
    found = dt.allocate_pruning(model, rules, scheme)
    budget = 0.1 * 32 * sum(layer.weight.numel() for layer in model)
    taken = size(found, model)
    assert taken <= budget + 16 * 3  # targets are whole bytes, and so is what a row tells
    assert taken > (0.99 if then is None else 0.94) * budget  # what values stored otherwise take is estimated
    assert kept(model, found)


def test_what_it_refuses(model):
    with pytest.raises(ConfigError, match="scheme = 'blind' is unknown. Valid: class-blind, class-uniform, class-dist"):
        dt.allocate_pruning(model, RULES, "blind")
    with pytest.raises(ConfigError, match="give .model. a ratio"):
        dt.allocate_pruning(model, {"rules": {"*": {"method": "pruned", "ratio": 0.1}}}, "class-blind")
    with pytest.raises(ConfigError, match="0.weight is stored by deepthin: use dt.allocate"):
        dt.allocate_pruning(model, {"model": {"ratio": 0.1}}, "class-blind")


def test_zeros_alone_and_equal_weights(model):
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.fill_(1.0)
    for scheme in ("class-blind", "class-uniform", "class-distribution"):
        assert size(dt.allocate_pruning(model, RULES, scheme), model) <= 0.2 * 32 * 7400 + 48
