"""One training that ends in a small file, and the shares of the budget that sensitivity gives."""

import copy
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import deepthin
import deepthin.torch as dt
from deepthin.cli.main import app
from deepthin.errors import BudgetError, ConfigError
from deepthin.methods.then import Then
from deepthin.plan.parse import parse_rules
from deepthin.plan.shares import plan_tensors
from deepthin.storage.write import to_bytes
from deepthin.torch.exchange import thin_tensors
from deepthin.torch.files import contents
from deepthin.torch.tensors import tensors_of

DEEP = {
    "model": {"ratio": 0.03, "allocation": 0.5},
    "rules": {"*": {"method": "pruned", "then": {"method": "kmeans", "bits": 3}}},
    "stages": {"thin": [0.25, 0.5], "quantize": 0.75, "every": 2},
}


pytestmark = pytest.mark.filterwarnings("ignore:The relative error of")  # what the sizes here are like


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy((images / 16).astype(np.float32)), torch.from_numpy(labels)


def network():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


def train(model, data, steps, step=lambda: False, lr=3e-3):
    """Ends with the optimiser's steps; what ``step`` makes new is given to another one."""
    inputs, targets = data
    optimizer = torch.optim.Adam(dt.parameter_groups(model, lr))
    for i in range(steps):
        chosen = torch.arange(i * 64, i * 64 + 64) % len(inputs)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
        if step():
            optimizer = torch.optim.Adam(dt.parameter_groups(model, lr))
    return model


def loss_of(data):
    return lambda model: nn.functional.cross_entropy(model(data[0]), data[1]).item()


# ---- The recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_goes_through_its_stages(digits, tmp_path):
    model, seen = network(), []
    recipe = dt.Recipe(model, DEEP, steps=80)

    def step():
        changed = recipe.step()
        weight = thin_tensors(model).get("0.weight", (None, 0))[0]
        zeros = int((model[0].weight == 0).sum())
        seen.append((changed, recipe.done, weight.name if weight else "dense", zeros))
        return changed

    train(model, digits, 80, step)
    assert [i + 1 for i, (changed, *_) in enumerate(seen) if changed] == [40, 60]
    assert [name for _, _, name, _ in seen] == ["dense"] * 39 + ["pruned"] * 20 + ["pruned then kmeans"] * 21
    assert [done for _, done, _, _ in seen] == [False] * 59 + [True] * 21
    zeros = [zero for *_, zero in seen]
    assert not any(zeros[:20])
    assert zeros[39] == max(zeros) > 2500  # of 3,072
    assert set(zeros[40:]) == {zeros[39]}
    dt.save(model, tmp_path / "deep.thin")
    loaded = dt.load(network(), tmp_path / "deep.thin")
    assert torch.equal(loaded(digits[0]), model(digits[0]))
    assert loss_of(digits)(model) < 0.7  # of 2.3 before


def test_sharing_keeps_positions_and_moves_values_to_their_centres(digits):
    model = network()
    recipe = dt.Recipe(model, DEEP, steps=40)
    train(model, digits, 29, recipe.step)
    before = {name: weight.code() for name, (weight, _) in thin_tensors(model).items()}
    before = {name: {entry: t.detach().clone() for entry, t in code.items()} for name, code in before.items()}
    assert recipe.step()
    for name, (weight, _) in thin_tensors(model).items():
        assert isinstance(weight.method, Then)
        code = weight.code()
        assert torch.equal(code["positions"], before[name]["positions"])
        centres, symbols = code["values_centres"], code["values_symbols"].long().flatten()
        nearest = (before[name]["values"][:, None] - centres[None]).abs().min(1).values
        assert torch.equal((before[name]["values"] - centres[symbols]).abs(), nearest)


def test_values_are_shared_at_once_where_the_stages_say_so(digits):
    rules = {**DEEP, "stages": {"thin": [0.0, 0.5], "quantize": 0.5, "every": 1}}
    model = network()
    recipe = dt.Recipe(model, rules, steps=10)
    assert [recipe.step() for _ in range(10)] == [False] * 4 + [True] + [False] * 5
    assert thin_tensors(model)["0.weight"][0].name == "pruned then kmeans"


def test_a_recipe_without_then_ends_when_the_layers_are_thin():
    model = network()
    recipe = dt.Recipe(model, {"model": {"ratio": 0.2}}, steps=10)
    assert [recipe.step() for _ in range(10)] == [False] * 5 + [True] + [False] * 4
    assert recipe.done
    assert thin_tensors(model)["4.weight"][0].name == "deepthin"


def test_a_recipe_thins_shared_layers_and_groups():
    model = network()
    model.append(nn.ReLU()).append(nn.Linear(10, 48))
    model[6].weight.data.normal_()
    tied = nn.ModuleDict({"a": model, "b": model[0]})
    rules = {
        "rules": {
            "a.0": {"method": "pruned", "ratio": 0.2, "then": {"method": "kmeans", "bits": 2}},
            "*": {"method": "pruned", "ratio": 0.2, "group": "flat", "then": {"method": "kmeans", "bits": 2}},
        }
    }
    recipe = dt.Recipe(tied, rules, steps=10)
    for _ in range(10):
        recipe.step()
    named = thin_tensors(tied)
    assert named["b.weight"] == named["a.0.weight"]
    assert named["a.2.weight"][0] is named["a.4.weight"][0] is named["a.6.weight"][0]
    assert {weight.name for weight, _ in named.values()} == {"pruned then kmeans"}


@pytest.mark.parametrize("then", [{}, {"then": {"method": "kmeans", "bits": 3}}])
@pytest.mark.parametrize("allocation", ["flat", "sensitivity"])
def test_a_file_in_bytes_is_never_exceeded(allocation, then, digits, tmp_path):
    """What coding saves is measured before weights are taken away; the file is what training made of them."""
    limit = 1500 if then else 4500  # in 3 bits all weights take 2800
    rules = {
        "model": {"file_bytes": limit, "allocation": allocation},
        "rules": {"*": {"method": "pruned", **then}},
        "stages": {"thin": [0.3, 0.6], "quantize": 0.8, "every": 1},
    }
    model = network()
    recipe = dt.Recipe(model, rules, steps=40, loss=loss_of(digits))
    train(model, digits, 40, recipe.step)
    assert 0.8 * limit < dt.save(model, tmp_path / "x.thin") <= limit


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"thin": [0.5, 0.2]},
            "[stages] thin = [0.5, 0.2], quantize = 0.8, every = 50: give fractions of the steps with 0 <= "
            "thin[0] < thin[1] <= quantize <= 1, and every from 1 on.",
        ),
        (
            {"thin": 0.5},
            "[stages] thin = 0.5, quantize = 1.0, every = 50: write such as thin = [0.2, 0.6], quantize = 0.8, every = "
            "50.",
        ),
        (
            {"thinn": 1},
            "[stages] has no key 'thinn'. Did you mean 'thin'? Valid: thin, quantize, every, "
            "importance, learning_rate_multiplier.",
        ),
        (
            {"importance": "fisher"},
            "[stages] importance = 'fisher' is unknown. Valid: none, hessian, adam.",
        ),
        ({"importance": 1}, None),
        ({"learning_rate_multiplier": 0}, "[stages] learning_rate_multiplier = 0 must be above 0."),
        ({"every": 0}, None),
        ({"every": 1.5}, None),
        ({"quantize": True}, None),
        ({"thin": [0.1, "x"]}, None),
    ],
)
def test_wrong_stages_are_refused(stages, message):
    with pytest.raises(ConfigError, match=re.escape(message) if message else "stages"):
        parse_rules({**DEEP, "stages": stages})


def test_what_cannot_be_done_is_said_before_the_training():
    with pytest.raises(BudgetError):
        dt.Recipe(network(), {**DEEP, "model": {"ratio": 1e-4}}, steps=10)
    rules = {**DEEP, "model": {"ratio": 0.1, "allocation": "sensitivity"}}
    with pytest.raises(ConfigError, match=re.escape("needs losses: give Recipe(..., loss=f)")):
        dt.Recipe(network(), rules, steps=10)
    with pytest.raises(ConfigError, match=re.escape("deepthin.torch.allocate(model, rules, loss)")):
        dt.compress(network(), rules)


def test_codes_of_a_trained_network_may_have_a_rate_of_their_own():
    model = network()
    dt.compress(model, {"model": {"ratio": 0.2}, "rules": {"0": {"method": "pruned"}}})
    assert {group["name"]: group["lr"] for group in dt.parameter_groups(model, 1e-3, 2.0)} == {
        "dense": 1e-3,
        "pruned": 2e-3,
    }
    assert parse_rules({**DEEP, "stages": {"learning_rate_multiplier": 4}}).stages.learning_rate_multiplier == 4.0


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 99])
@pytest.mark.parametrize(
    "stages",
    [
        {"thin": [0.99, 1.0], "quantize": 1.0},
        {"thin": [0.999, 1.0]},
        {"thin": [0.0, 0.001]},
        {"thin": [0.0, 1.0]},
        {"thin": [0.5, 0.50001], "quantize": 0.50002, "every": 1000},
        {},
    ],
)
def test_a_recipe_ends_thin_in_however_few_steps(stages, steps):
    model = network()
    recipe = dt.Recipe(model, {**DEEP, "stages": stages}, steps=steps)
    changed = [recipe.step() for _ in range(steps)]
    assert recipe.done
    assert 1 <= sum(changed) <= 2
    assert {weight.name for weight, _ in thin_tensors(model).values()} == {"pruned then kmeans"}


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None, float("nan")])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(ConfigError, match="must be a whole number of optimiser steps, 1 or more"):
        dt.Recipe(network(), DEEP, steps=steps)


def test_a_file_that_no_plan_can_be_made_for_ends_with_an_error(digits):
    """Every matrix has a size of its own that does not shrink: nothing to search for."""
    rules = {
        "model": {"file_bytes": 24_000},
        "rules": {"*": {"method": "dense"}},
        "stages": {"thin": [0.0, 0.5], "quantize": 0.5},
    }
    model = network()
    recipe = dt.Recipe(model, rules, steps=4)
    recipe.step()
    model.append(nn.Linear(10, 100))  # which was not planned
    with pytest.raises(BudgetError, match="no plan can be made smaller. Use .model. file_bytes >= "):
        recipe.finish()


@pytest.mark.parametrize("at", [0, 10, 25, 39, 40, 45, 60, 75])
def test_a_recipe_that_ends_early_finishes(at, digits):
    model = network()
    recipe = dt.Recipe(model, DEEP, steps=80)
    train(model, digits, at, recipe.step)
    report = recipe.finish()
    assert recipe.done
    assert {row.method for row in report.rows} == {"pruned then kmeans"}
    assert recipe.step() is False


METHOD_STAGES = [
    ({"method": "pruned", "then": {"method": "kmeans", "bits": 3}}, "flat"),
    ({"method": "pruned", "then": {"method": "uniform", "bits": 4}}, "sensitivity"),
    ({"method": "deepthin", "then": {"method": "binary", "bits": 2}}, "flat"),
    ({"method": "hashed"}, "flat"),
    ({"method": "pruned", "then": {"method": "ecsq", "bits": 3}, "group": "flat"}, "flat"),
    ({"method": "uniform"}, "flat"),
]


@pytest.mark.parametrize(("rule", "allocation"), METHOD_STAGES)
def test_a_recipe_goes_on_from_a_checkpoint_to_the_same_bytes(rule, allocation, digits, tmp_path):
    """Dense, half thinned, thin, quantised: model, optimiser and recipe in one file, into new objects."""
    rules = {"model": {"ratio": 0.3, "allocation": allocation}, "rules": {"*": rule}}
    rules["stages"] = {"thin": [0.25, 0.5], "quantize": 0.75, "every": 2}
    torch.manual_seed(3)
    started = network().state_dict()

    def begin():
        model = network()
        model.load_state_dict(started)
        return model, dt.Recipe(model, rules, steps=40, loss=loss_of(digits))

    def go_on(model, recipe, optimizer, first, last):
        inputs, targets = digits
        for i in range(first, last):
            chosen = torch.arange(i * 64, i * 64 + 64) % len(inputs)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
            if recipe.step():
                optimizer = torch.optim.Adam(dt.parameter_groups(model, 3e-3))
        return optimizer

    model, recipe = begin()
    optimizer, done, stops = torch.optim.Adam(dt.parameter_groups(model, 3e-3)), 0, (12, 22, 34)
    for stop in stops:
        optimizer, done = go_on(model, recipe, optimizer, done, stop), stop
        parts = {"recipe": recipe, "model": model, "optimizer": optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / f"{stop}.pt")
    go_on(model, recipe, optimizer, done, 40)
    straight = to_bytes(contents(model))

    torch.manual_seed(4)
    for stop in stops:
        fresh, again = begin()
        fresh[0].weight.data.zero_()
        for _ in range(2):  # into a dense model, and into one that a recipe has taken somewhere
            saved = torch.load(tmp_path / f"{stop}.pt", weights_only=True)
            again.load_state_dict(saved["recipe"])
            fresh.load_state_dict(saved["model"])
            optimizer = torch.optim.Adam(dt.parameter_groups(fresh, 3e-3))
            optimizer.load_state_dict(saved["optimizer"])
            go_on(fresh, again, optimizer, stop, 40)
            assert to_bytes(contents(fresh)) == straight, stop


def test_a_state_of_another_recipe_is_refused():
    recipe = dt.Recipe(network(), DEEP, steps=80)
    for _ in range(45):
        recipe.step()
    state = recipe.state_dict()
    with pytest.raises(ConfigError, match="the state is of a schedule .20, 40, 60, 2., but this recipe has"):
        dt.Recipe(network(), DEEP, steps=40).load_state_dict(state)
    other = {**DEEP, "model": {"ratio": 0.3}, "rules": {"*": {"method": "deepthin"}}}
    model = network()
    with pytest.raises(ConfigError, match="by pruned then kmeans, which the rules of this recipe do not"):
        dt.Recipe(model, other, steps=80).load_state_dict(state)
    for broken in ({}, {"steps": 3}, [], {**state, "plans": [3]}, {**state, "steps": "x"}):
        with pytest.raises(ConfigError, match="this is no state of a recipe"):
            recipe.load_state_dict(broken)


# ---- Optimisers that miss it ----------------------------------------------------------------------------------------


def exchange(model, how):
    """All that replaces parameters; what a message calls it."""
    if how == "recipe":
        recipe = dt.Recipe(model, {**DEEP, "stages": {"thin": [0, 0.1], "quantize": 0.5}}, steps=10)
        assert recipe.step()
        return "recipe.step()"
    if how == "compress":
        dt.compress(model, {"model": {"ratio": 0.3}})
        return "compress()"
    if how == "trim":
        with torch.no_grad():
            model[0].bias[:8] = -100
        dt.trim(model, [torch.rand(10, 64)])
        return "trim()"
    if how == "twist":
        dt.Twist(model, {"model": {"ratio": 0.3}}).finish()
        return "twist.finish()"
    thin = copy.deepcopy(model)
    dt.compress(thin, {"model": {"ratio": 0.3}})
    dt.save(thin, how)
    dt.load(model, how)
    return "load()"


HOWS = ["recipe", "compress", "trim", "twist", "load"]


def step(model, optimizer, to_none=True):
    optimizer.zero_grad(set_to_none=to_none)
    model(torch.rand(4, 64)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("how", HOWS)
def test_an_optimiser_that_misses_new_parameters_is_told(how, to_none, kind, tmp_path):
    model = network()
    optimizer = kind(model.parameters(), lr=1e-3)
    step(model, optimizer)
    what = exchange(model, str(tmp_path / "x.thin") if how == "load" else how)
    with pytest.raises(ConfigError, match=re.escape(f"{what} replaced the model's parameters, but the optimizer")):
        for _ in range(2):
            step(model, optimizer, to_none)
    step(model, kind(dt.parameter_groups(model, 1e-3), lr=1e-3))  # the way out


def test_a_recipe_whose_answer_is_ignored_is_told_at_its_next_step(digits):
    model = network()
    recipe = dt.Recipe(model, {**DEEP, "stages": {"thin": [0.0, 0.5], "quantize": 1.0}}, steps=10)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ConfigError, match=re.escape("Build a new one after recipe.step(): optimizer = torch.optim.")):
        for _ in range(10):
            step(model, optimizer)
            recipe.step()
    assert recipe.steps == 5  # and the optimiser's step after it


@pytest.mark.parametrize("how", HOWS)
def test_optimisers_that_are_right_are_left_alone(how, tmp_path):
    """A new one; the old one with new groups; two in turn; a twin that shares the old parameters; evaluation."""
    for case in ("new", "added", "two", "twin", "other", "frozen"):
        model = network()
        twin = nn.Sequential(*model) if case == "twin" else network()  # the same layers would become thin too
        if case == "twin":
            twin = network()
            for layer, own in zip(twin, model, strict=True):
                if isinstance(layer, nn.Linear):
                    layer.weight, layer.bias = own.weight, own.bias
        optimizer = torch.optim.Adam(model.parameters())
        of_twin = torch.optim.Adam(twin.parameters())
        step(model, optimizer)
        exchange(model, str(tmp_path / "x.thin") if how == "load" else how)
        new = [p for p in model.parameters() if all(p is not q for g in optimizer.param_groups for q in g["params"])]
        fresh = torch.optim.Adam(model.parameters() if case == "new" else new, lr=0.02)
        if case == "added":
            optimizer.add_param_group({"params": new, "lr": 0.02})
        for _ in range(4):
            if case == "new":
                step(model, fresh)
            elif case == "added":
                step(model, optimizer)
            elif case == "two":
                optimizer.zero_grad()
                step(model, fresh)
                optimizer.step()
            elif case in ("twin", "other"):
                step(twin, of_twin)
            else:
                model.requires_grad_(False)
                optimizer.step()


def test_nothing_is_watched_when_nobody_holds_old_parameters():
    from deepthin.torch import replaced

    replaced._watches.clear()
    model = network()
    dt.compress(model, {"model": {"ratio": 0.3}})
    step(model, torch.optim.Adam(model.parameters(), lr=0.02))
    assert not replaced._watches
    assert not replaced._hooks


# ---- Sensitivity ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(1)
    return train(network(), digits, 300).state_dict()


def with_state(state):
    model = network()
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("rule", [{"method": "pruned"}, {"method": "rank"}, {"method": "uniform"}])
def test_sensitivity_is_no_worse_than_flat_and_within_the_budget(rule, trained, digits):
    loss, rules = loss_of(digits), {"model": {"ratio": 0.2}, "rules": {"*": rule}}
    model = with_state(trained)
    found = dt.allocate(model, rules, loss)
    assert all(torch.equal(t, trained[name]) for name, t in model.state_dict().items())
    losses, bits = [], []
    for given in (rules, found):
        model = with_state(trained)
        dt.compress(model, given)
        losses.append(loss(model))
        bits.append(sum(weight.method.bits() for weight, _ in thin_tensors(model).values()))
    assert losses[1] <= losses[0]
    assert max(bits) <= 0.2 * 32 * (64 * 48 + 48 * 32 + 32 * 10)


def test_bits_go_where_the_loss_is(digits):
    """Of two matrices, one does not reach the output; it gets next to nothing."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 10, bias=False), nn.Linear(64, 10, bias=False)

        def forward(self, x):
            return self.used(x) + 0 * self.unused(x)

    model = train(Half(), digits, 100)
    found = dt.allocate(model, {"model": {"ratio": 0.3}, "rules": {"*": {"method": "pruned"}}}, loss_of(digits))
    dt.compress(model, found)
    kept = {name: weight.method.kept for name, (weight, _) in thin_tensors(model).items()}
    assert kept["used.weight"] > 3 * kept["unused.weight"]


@pytest.mark.parametrize("allocation", ["flat", "sensitivity"])
def test_a_file_in_bytes_is_met_as_it_is_coded(allocation, trained, digits, tmp_path):
    limit = 1500  # in 3 bits all weights take 2800
    model = with_state(trained)
    rules = {
        "model": {"file_bytes": limit, "allocation": allocation},
        "rules": {"*": {"method": "pruned", "then": {"method": "kmeans", "bits": 3}}},
    }
    if allocation == "sensitivity":
        rules = dt.allocate(model, rules, loss_of(digits))
    dt.compress(model, rules)
    written = dt.save(model, tmp_path / "x.thin")
    assert 0.9 * limit < written <= limit


def test_groups_and_own_targets_keep_their_places(trained, digits):
    rules = {
        "model": {"ratio": 0.3, "ignore": ["4"]},
        "rules": {
            "0": {"method": "pruned", "ratio": 0.1},
            "*": {"method": "pruned", "group": "flat"},
        },
    }
    model = with_state(trained)
    model.append(nn.ReLU()).append(nn.Linear(10, 40))
    found = dt.allocate(model, rules, lambda model: float(model(digits[0])[:, :10].square().mean()))
    named = {plan.tensors[0].name: plan.method for plan in plan_tensors(found, tensors_of(model)[0])}
    before = {plan.tensors[0].name: plan.method for plan in plan_tensors(parse_rules(rules), tensors_of(model)[0])}
    assert named == before  # there was nothing to be shared out
    assert named["4.weight"] is None


def test_a_loss_that_is_no_number_counts_as_the_worst(trained):
    found = dt.allocate(
        with_state(trained), {"model": {"ratio": 0.2}, "rules": {"*": {"method": "pruned"}}}, lambda _: np.nan
    )
    assert found.ratio is None


# ---- The command ----------------------------------------------------------------------------------------------------


def test_train_writes_a_file_and_judges_it(tmp_path, monkeypatch):
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    (tmp_path / "deep.toml").write_text(
        '[model]\nratio = 0.05\nallocation = "sensitivity"\n[rules."*"]\nmethod = "pruned"\n'
        'then = { method = "kmeans", bits = 4 }\n[stages]\nthin = [0.2, 0.5]\nquantize = 0.7\nevery = 5\n'
    )
    out, report = tmp_path / "net.thin", tmp_path / "net.json"
    arguments = ["train", "lenet", "--depth", "3", "--config", str(tmp_path / "deep.toml"), "--steps", "200"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json", str(report)], catch_exceptions=False)
    found = json.loads(report.read_text())
    size = out.stat().st_size
    assert found["bytes"] == deepthin.inspect(out).total_bytes == size
    assert f"{out}: {size:,} bytes, {found['dense_bytes'] / size:.1f} times smaller than dense" in result.stdout
    assert found["values"]["test"]["error"] < 15
    assert f"test error {found['values']['test']['error']:.4g} (development " in result.stdout


def test_train_from_scratch_where_there_are_no_stages(tmp_path, monkeypatch):
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    (tmp_path / "thin.toml").write_text("[model]\nratio = 0.02\n")
    out = tmp_path / "net.thin"
    arguments = ["train", "digits", "--config", str(tmp_path / "thin.toml"), "--steps", "100", "--out", str(out)]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert {row.method for row in deepthin.inspect(out).rows} == {"deepthin"}


def test_lenet_has_two_depths():
    from deepthin.lab.tasks import lenet

    sizes = {depth: sum(p.numel() for p in lenet.build(None, 1000, depth).parameters()) for depth in (3, 5)}
    assert sizes == {3: 266_610, 5: 431_080}  # Table 1 of Deep Compression: 1,070 and 1,720 KB
    with pytest.raises(ConfigError, match="No LeNet of depth 4: use 3 for LeNet-300-100, or 5 for LeNet-5"):
        lenet.build(None, 1000, 4)


def test_codes_of_a_thin_model_are_quantized_afterwards(digits, tmp_path):
    model = train(network(), digits, 60)
    dt.compress(model, {"model": {"ratio": 0.2}, "rules": {"*": {"method": "pruned"}}})
    before = {name: weight(index) for name, (weight, index) in thin_tensors(model).items()}
    importance = dt.hessian_diagonal(model, [(digits[0][:50], digits[1][:50])], nn.functional.cross_entropy)
    plain = copy.deepcopy(model)
    report = dt.quantize_codes(model, {"method": "kmeans", "bits": 2}, importance)
    dt.quantize_codes(plain, {"method": "kmeans", "bits": 2})
    assert report.total_bytes == dt.save(model, tmp_path / "x.thin")
    for name, (weight, _) in thin_tensors(model).items():
        assert weight.name == "pruned then kmeans"
        shared, other = weight(0), thin_tensors(plain)[name][0](0)
        assert torch.equal(shared != 0, before[name] != 0)
        assert len(shared.unique()) == len(other.unique()) == 5
        positions = weight.code()["positions"]
        share = importance[f"{name.removesuffix('.weight')}.thin.weight.values"]
        errors = [(share * (x - before[name]).flatten()[positions] ** 2).sum() for x in (shared, other)]
        assert errors[0] < errors[1]
    with pytest.raises(ConfigError, match="quantize_codes: no thin layer stores its floats directly"):
        dt.quantize_codes(model, {"method": "kmeans", "bits": 2})
    with pytest.raises(ConfigError, match=re.escape("quantize_codes: then = {'method': 'rank'}")):
        dt.quantize_codes(dt.load(network(), _pruned(tmp_path)), {"method": "rank"})


def _pruned(folder):
    model = network()
    dt.compress(model, {"model": {"ratio": 0.2}, "rules": {"*": {"method": "pruned"}}})
    dt.save(model, folder / "pruned.thin")
    return folder / "pruned.thin"


def test_the_loop_of_the_documentation(digits, tmp_path, monkeypatch):
    """docs/recipe.md, on another network and fewer steps; and its configuration is a valid one."""
    root = Path(__file__).parents[1]
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "recipe.md").read_text(), re.S)
    (tmp_path / "deep.toml").write_text((root / "docs" / "deep.toml").read_text())
    monkeypatch.chdir(tmp_path)
    batches = [(digits[0][i : i + 64], digits[1][i : i + 64]) for i in range(0, 1600, 64)]
    names = {"dt": dt, "torch": torch, "model": network(), "loss": nn.functional.cross_entropy, "batches": batches}
    exec(blocks[0].replace("20_000", "25").replace('"deep.toml"', "rules"), {**names, "rules": _wide(tmp_path)})
    assert {row.method for row in deepthin.inspect(tmp_path / "model.thin").rows} == {"pruned then kmeans"}
    more = {"inputs": digits[0], "targets": digits[1], "cross_entropy": nn.functional.cross_entropy}
    exec(blocks[1].replace('"deep.toml"', "rules"), {**names, **more, "model": network(), "rules": _wide(tmp_path)})


def _wide(folder):
    """The documented configuration, at a size that a small network can have."""
    rules = tomllib.loads((folder / "deep.toml").read_text())
    return {**rules, "model": {"file_bytes": 6000, "allocation": rules["model"]["allocation"]}}


def test_centres_that_are_not_used_cost_no_more_after_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-2, 3, (64, 64)) / 3.7)  # five numbers for more centres
    dt.compress(model, {"rules": {"*": {"method": "ecsq", "bits": 2.5}}})
    before = len(to_bytes(contents(model)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    assert len(to_bytes(contents(model))) == before


def test_small_matrices_whose_second_method_takes_more_than_their_floats():
    """Thinning asks for plans of the first method alone, below what both together take at least."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))
    rule = {"method": "deepthin", "ratio": 0.5, "then": {"method": "binary", "bits": 3}}
    rules = {"rules": {"*": rule}, "stages": {"thin": [0.2, 0.6], "quantize": 0.8, "every": 1}}
    recipe = dt.Recipe(model, rules, steps=10)
    for _ in range(10):
        recipe.step()
    assert recipe.done
    assert {weight.name for weight, _ in thin_tensors(model).values()} == {"deepthin then binary"}
