"""What a new user types in the first hour works, or says what to write instead."""

import json
import warnings

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin import ConfigError


def network() -> nn.Sequential:
    """A small classifier, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def thin(rules=0.1, **options) -> nn.Sequential:
    model = network()
    dt.compress(model, rules, init="scratch", **options)
    return model


# ---- compress with a number -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["trained", "scratch"])
def test_a_ratio_is_what_the_configuration_says(init):
    asked = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = dt.compress(asked, {"model": {"ratio": 0.1}}, init=init)
        for give in (
            lambda m: dt.compress(m, 0.1, init=init),
            lambda m: dt.compress(m, init=init, ratio=0.1),
            lambda m: dt.compress(m, {"rules": {"*": {}}}, init=init, ratio=0.1),
        ):
            model = network()
            report = give(model)
            assert json.loads(report.to_json()) == json.loads(expected.to_json())
            for one, other in zip(model.parameters(), asked.parameters(), strict=True):
                assert torch.equal(one, other)


def test_the_size_of_the_file_alone(tmp_path):
    model = network()
    report = dt.compress(model, file_bytes=9_000, init="scratch")
    assert report.total_bytes <= 9_000
    assert report.to_json() == dt.compress(network(), {"model": {"file_bytes": 9_000}}, init="scratch").to_json()
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    assert 0.9 * 9_000 < dt.save(model, tmp_path / "m.thin") <= 9_000


def test_plan_takes_the_same():
    expected = dt.plan(network(), {"model": {"ratio": 0.1}}).to_json()
    assert dt.plan(network(), 0.1).to_json() == dt.plan(network(), ratio=0.1).to_json() == expected
    assert dt.plan(network(), file_bytes=9_000).total_bytes <= 9_000


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((), {}, "No size is given: add a ratio such as 0.02, file_bytes=60_000, or rules with a target."),
        (
            (60_000,),
            {},
            "60000 is no ratio, which is above 0 and at most 1. For a size in bytes write file_bytes=60000.",
        ),
        (
            (0.02,),
            {"file_bytes": 60_000},
            "The rules have a target for the whole model, and file_bytes is another: give one.",
        ),
        ((), {"ratio": 0.1, "file_bytes": 60_000}, "[model] has both ratio and file_bytes: give one target."),
        ((-0.1,), {}, "[model] ratio = -0.1 must be above 0 and at most 1."),
    ],
)
def test_targets_that_say_nothing_or_two_things(arguments, named, message):
    with pytest.raises(ConfigError) as raised:
        dt.compress(network(), *arguments, **named)
    assert str(raised.value) == message


@pytest.mark.parametrize("rules", [0.05, {"model": {"ratio": 0.1, "ignore": ["2"]}}, {"rules": {"0": {"ratio": 0.1}}}])
def test_compressing_twice_says_so(rules):
    model = thin({"model": {"ratio": 0.1, "ignore": ["2"]}} if isinstance(rules, dict) else 0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError) as raised:
        dt.compress(model, rules)
    message = str(raised.value)
    assert message.startswith("0.weight") and "cannot be compressed again: stored by deepthin already." in message
    assert "call deepthin.torch.materialize(model) first" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dt.compress(dt.materialize(model), rules, init="scratch")


def test_the_rest_of_a_model_can_be_compressed_later():
    model = thin({"rules": {"0": {"ratio": 0.1}}})
    assert [row.name for row in dt.compress(model, {"rules": {"2": {"ratio": 0.5}}}, init="scratch").rows] == [
        "0.weight",
        "2.weight",
    ]
