"""State that is right whatever happens to a model: averaging, copies, state dicts, devices without values."""

import copy
import functools
import io
import itertools
import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import deepthin.torch as dt
from deepthin import ConfigError
from deepthin.storage.contents import Part
from deepthin.torch.exchange import thin_tensors
from deepthin.torch.state import smallest_type

pytestmark = pytest.mark.filterwarnings("ignore:The relative error of", "ignore:.*_init_weights")

ALONE = {
    "deepthin": {"ratio": 0.12},
    "shuffled": {"ratio": 0.12},
    "rank": {"ratio": 0.2},
    "hashed": {"ratio": 0.1},
    "pruned": {"ratio": 0.2},
    "kronecker": {"ratio": 0.2},
    "tensor-train": {"ratio": 0.2},
    "uniform": {"bits": 4},
    "kmeans": {"bits": 3},
    "ecsq": {"bits": 3},
    "binary": {"bits": 2, "rounds": 0},
    "coded": {},
}
INNER = {"coded": {}, "uniform": {"bits": 8}, "kmeans": {"bits": 4}, "ecsq": {"bits": 3}, "binary": {"bits": 3}}
OUTER = ("deepthin", "shuffled", "rank", "hashed", "pruned", "kronecker", "tensor-train")
RULES = {name: {"method": name, **options} for name, options in ALONE.items()} | {
    f"{outer} then {inner}": {"method": outer, "ratio": 0.3, "then": {"method": inner, **options}}
    for outer, (inner, options) in itertools.product(OUTER, INNER.items())
}
QUICK = {
    *ALONE,  # and each method of a pair in one pair at least
    "deepthin then coded",
    "shuffled then kmeans",
    "rank then binary",
    "hashed then uniform",
    "pruned then ecsq",
    "kronecker then uniform",
    "tensor-train then coded",
}
every = pytest.mark.parametrize(
    "rule",
    [pytest.param(rule, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, rule in RULES.items()],
)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 10))


def compressed(rule, seed=0):
    model = network(seed)
    dt.compress(model, {"rules": {"*": rule}})
    return model.eval()


@functools.cache
def _compressed_once(rule, seed):
    return compressed(json.loads(rule), seed)


def thin(rule, seed=0):
    """A copy: each network is compressed once for all tests."""
    return copy.deepcopy(_compressed_once(json.dumps(rule), seed))


def outputs(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 72).reshape(3, 24))


def moved(model):
    """The same model after its floats changed as in a training step."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def pickled(model):
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


@every
def test_integers_survive_averaging(rule):
    """EMA with buffers multiplies them by floats and truncates: what is exact may not be among them."""
    model = thin(rule)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    assert torch.equal(outputs(average.module), outputs(model))
    assert not [name for name, buffer in model.named_buffers() if not buffer.is_floating_point()]


@every
def test_keys_and_outputs_do_not_depend_on_the_way(rule, tmp_path):
    """Compressed, trained on, loaded, copied, pickled or resumed: each state dict fits each model, and tells all."""
    for origin in (compressed(rule), moved(thin(rule))):
        dt.save(origin, tmp_path / "m.thin")
        loaded = dt.load(network(1), tmp_path / "m.thin").eval()
        resumed = thin(rule, 1)
        resumed.load_state_dict(loaded.state_dict())
        ways = [origin, loaded, copy.deepcopy(loaded), pickled(loaded), resumed]
        keys = [{key: (v.dtype, v.shape) for key, v in way.state_dict().items()} for way in ways]
        assert all(other == keys[0] for other in keys)
        for way in ways[1:]:
            torch.testing.assert_close(outputs(way), outputs(origin), rtol=0, atol=1e-5)
            fresh = thin(rule, 2)
            fresh.load_state_dict(way.state_dict())
            assert torch.equal(outputs(fresh), outputs(way))
        assigned = thin(rule, 2)
        assigned.load_state_dict(copy.deepcopy(loaded.state_dict()), assign=True)
        assert torch.equal(outputs(assigned), outputs(loaded))


@every
def test_frozen_models_and_trainable_ones_exchange_state_dicts(rule, tmp_path):
    model = moved(thin(rule))
    dt.save(model, tmp_path / "m.thin")
    frozen = dt.load(network(1), tmp_path / "m.thin", frozen=True).eval()
    assert frozen.state_dict().keys() <= model.state_dict().keys()
    back = thin(rule, 2)
    back.load_state_dict(frozen.state_dict())
    torch.testing.assert_close(outputs(back), outputs(frozen), rtol=0, atol=1e-5)
    again = dt.load(network(3), tmp_path / "m.thin", frozen=True).eval()
    again.load_state_dict(moved(model).state_dict())
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=1e-5)


def test_averaged_state_dicts_never_take_a_code_that_is_not_theirs():
    """Of a model soup the integers are nonsense; latents decide."""
    rule = RULES["binary"]
    models = [thin(rule), moved(thin(rule))]
    states = [model.state_dict() for model in models]
    soup = {
        k: (a + b) / 2 if a.is_floating_point() else (a + b) // 2
        for (k, a), b in zip(states[0].items(), states[1].values(), strict=True)
    }
    mixed, other = thin(rule, 4), thin(rule, 4)
    mixed.load_state_dict(soup)
    other.load_state_dict({key: value for key, value in soup.items() if not key.endswith(("symbols", "scales"))})
    assert torch.equal(outputs(mixed), outputs(other))


def test_state_dicts_of_version_0_1_load():
    """Without the code, with wide integers, and with tables among them."""
    for rule in (RULES["uniform"], RULES["pruned then binary"], RULES["shuffled"]):
        model = thin(rule)
        old = {key: v for key, v in model.state_dict().items() if not key.endswith(("_symbols", "_scales", ".step"))}
        old = {key: v if v.is_floating_point() or key.endswith("symbols") else v.long() for key, v in old.items()}
        if rule["method"] == "uniform":
            old = {key: value for key, value in old.items() if not key.endswith("symbols")}
        if rule["method"] == "shuffled":
            old |= {"0.thin.weight.order": torch.zeros(24 * 40), "2.thin.weight.order": torch.zeros(400)}
        other = thin(rule, 3)
        other.load_state_dict(old)
        torch.testing.assert_close(outputs(other), outputs(model), rtol=0, atol=1e-5)


def test_integers_of_a_state_dict_are_checked():
    model = thin(RULES["pruned"])
    state = model.state_dict()
    state["0.thin.weight.positions"] = state["0.thin.weight.positions"].long() + (1 << 40)
    with pytest.raises(RuntimeError, match="positions holds integers from"):
        thin(RULES["pruned"]).load_state_dict(state)
    state["0.thin.weight.positions"] = state["0.thin.weight.positions"][:-1]
    with pytest.raises(RuntimeError, match="positions is .* in the state dict"):
        thin(RULES["pruned"]).load_state_dict(state)
    del state["0.thin.weight.positions"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.thin\.weight\.positions"):
        thin(RULES["pruned"]).load_state_dict(state)


@every
def test_integers_have_the_smallest_type(rule):
    for weight, _ in thin_tensors(thin(rule)).values():
        ranges = weight.method.integers()
        for entry, value in weight.state().items():
            if not value.is_floating_point():
                assert value.dtype == smallest_type(ranges[entry])


# ---- Models without values -------------------------------------------------------------------------------------------


def on_meta(rule):
    with torch.device("meta"):
        model = network()
    dt.compress(model, {"rules": {"*": rule}}, init="scratch", seed=7)
    return model


@every
def test_a_model_from_the_meta_device_begins_as_one_from_scratch(rule):
    """As FSDP and Lightning do: to_empty, then reset_parameters of every module; or ``initialise``."""
    scratch = network()
    dt.compress(scratch, {"rules": {"*": rule}}, init="scratch", seed=7)
    expected = scratch.state_dict()
    model = on_meta(rule).to_empty(device="cpu")
    for module in model.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    initialised = dt.initialise(on_meta(rule), seed=7)
    for state in (model.state_dict(), initialised.state_dict()):
        assert state.keys() == expected.keys()
        for key, value in state.items():
            if key.endswith(".bias"):
                assert 0 < value.abs().max() <= 1 / 24**0.5
            else:
                assert torch.equal(value, expected[key])
    assert torch.isfinite(outputs(model)).all()


@every
def test_a_state_dict_fills_a_model_from_the_meta_device(rule):
    trained = moved(thin(rule))
    for assign in (True, False):
        model = on_meta(rule)
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(trained.state_dict(), assign=assign)
        assert torch.equal(outputs(model.eval()), outputs(trained))


@every
def test_what_has_no_values_is_neither_run_nor_saved(rule, tmp_path):
    for model in (on_meta(rule), on_meta(rule).to_empty(device="cpu")):
        with pytest.raises(ConfigError, match=r"no values|on the meta device"):
            dt.save(model, tmp_path / "m.thin")
    with pytest.raises(ConfigError, match=r"has no values.*initialise"):
        model(torch.ones(3, 24))
    assert not (tmp_path / "m.thin").exists()


class Positions(nn.Module):
    """A buffer that is not saved, and set when the module is reset, or not."""

    def __init__(self, resets):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("places", torch.arange(6), persistent=False)
        if resets:
            self.reset_parameters = lambda: self.places.copy_(torch.arange(6))

    def forward(self, x):
        return self.layer(x) + self.places


def test_unsaved_buffers_are_computed_or_refused(tmp_path):
    model = Positions(False)
    dt.compress(model, {"rules": {"layer": {"ratio": 0.9}}})
    dt.save(model, tmp_path / "m.thin")
    with torch.device("meta"):
        fresh, stuck = Positions(True), Positions(False)
    x = torch.ones(2, 6)
    assert torch.equal(dt.load(fresh, tmp_path / "m.thin").eval()(x), model.eval()(x))
    with pytest.warns(UserWarning, match="places: not saved"):
        dt.load(stuck, tmp_path / "m.thin")
    with pytest.raises(ConfigError, match="places: not saved in .* Give values"):
        stuck(x)
    stuck.places = torch.arange(6)
    assert torch.equal(stuck.eval()(x), model(x))
    assert not stuck._forward_pre_hooks


def test_a_bert_from_the_meta_device(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    dt.compress(model, {"rules": {"encoder": {"ratio": 0.3}}})
    dt.save(model, tmp_path / "m.thin")
    with torch.device("meta"):
        fresh = transformers.BertModel(config).eval()
    tokens = torch.arange(12).reshape(2, 6)
    dt.load(fresh, tmp_path / "m.thin")
    assert torch.equal(fresh(tokens).last_hidden_state, model(tokens).last_hidden_state)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LSTM(8, 12, num_layers=2),
        lambda: nn.MultiheadAttention(16, 4),
        lambda: nn.Embedding(50, 16, padding_idx=3),
        lambda: nn.Conv2d(4, 8, 3),
        lambda: nn.ConvTranspose1d(4, 8, 3),
        lambda: nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9)),
    ],
)
def test_every_layer_is_initialised(build):
    with torch.device("meta"):
        model = build()
    dt.compress(model, {"rules": {"*": {"ratio": 0.6}}}, init="scratch")
    dt.initialise(model, seed=3)
    state = model.state_dict()
    assert all(torch.isfinite(value).all() and not value.is_meta for value in state.values())
    torch.manual_seed(9)
    plain = build()
    dt.compress(plain, {"rules": {"*": {"ratio": 0.6}}}, init="scratch", seed=3)
    for name, value in plain.state_dict().items():
        if ".thin." in f".{name}":
            assert torch.equal(state[name], value)
        elif value.dim():
            assert 0.3 <= (state[name].float().std() + 1e-3) / (value.float().std() + 1e-3) <= 3


def test_what_cannot_be_initialised_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(ConfigError, match="1 is a Odd with parameters or buffers of its own"):
        dt.initialise(nn.Sequential(nn.Linear(3, 3), Odd()))


def test_an_entry_named_like_an_attribute_is_refused():
    """A method of someone else, whose code would hide what a weight can do."""

    class Odd:
        trains, shape = "codes", (2, 3)

        def integers(self):
            return {}

        def derived(self):
            return {}

        def code_shapes(self):
            return {"rows": (2, 3)}

        def decode(self, code, xp):
            return code["rows"]

    with pytest.raises(ValueError, match="has an attribute 'rows' already: the method must call this entry"):
        dt.ThinWeight("odd", Odd(), [Part((2, 3))], {"rows": torch.ones(2, 3)})
