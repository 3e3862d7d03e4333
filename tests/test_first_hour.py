"""What a new user types in the first hour works, or says what to write instead."""

import copy
import json
import math
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn

import deepthin
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
    assert message.startswith("0.weight")
    assert "cannot be compressed again: stored by deepthin already." in message
    assert "call deepthin.torch.materialize(model) first" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dt.compress(dt.materialize(model), rules, init="scratch")


def test_the_rest_of_a_model_can_be_compressed_later():
    model = thin({"rules": {"0": {"ratio": 0.1}}})
    assert [row.name for row in dt.compress(model, {"rules": {"2": {"ratio": 0.5}}}, init="scratch").rows] == [
        "0.weight",
        "2.weight",
    ]


# ---- Writes to generated weights ------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(32, 32), "weight"),
    "conv1d": (lambda: nn.Conv1d(16, 16, 3), "weight"),
    "conv2d": (lambda: nn.Conv2d(16, 16, 3), "weight"),
    "transposed": (lambda: nn.ConvTranspose1d(16, 16, 3), "weight"),
    "embedding": (lambda: nn.Embedding(64, 32), "weight"),
    "bag": (lambda: nn.EmbeddingBag(64, 32), "weight"),
    "rnn": (lambda: nn.RNN(32, 32), "weight_hh_l0"),
    "lstm": (lambda: nn.LSTM(32, 32), "weight_ih_l0"),
    "gru": (lambda: nn.GRU(32, 32), "weight_hh_l0"),
    "attention": (lambda: nn.MultiheadAttention(32, 4), "in_proj_weight"),
}
WRITES = {
    "init": lambda layer, name: nn.init.xavier_uniform_(getattr(layer, name)),
    "zeros": lambda layer, name: nn.init.zeros_(getattr(layer, name)),
    "normal": lambda layer, name: nn.init.normal_(getattr(layer, name)),
    "orthogonal": lambda layer, name: nn.init.orthogonal_(getattr(layer, name)),
    "data": lambda layer, name: getattr(layer, name).data.clamp_(-0.01, 0.01),
    "data item": lambda layer, name: getattr(layer, name).data.__setitem__(0, 1.0),
    "data assigned": lambda layer, name: setattr(getattr(layer, name), "data", torch.zeros(1)),
    "multiplied": lambda layer, name: getattr(layer, name).__imul__(0.5),
    "copied": lambda layer, name: getattr(layer, name).copy_(torch.zeros(())),
    "assigned": lambda layer, name: setattr(layer, name, torch.zeros_like(getattr(layer, name))),
    "parameter": lambda layer, name: setattr(layer, name, nn.Parameter(torch.zeros(4, 4))),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_writes_to_a_generated_weight_are_refused(kind, training):
    make, name = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    dt.compress(model, 0.2, init="scratch")
    layer = model.train(training)[0]
    assert torch.is_grad_enabled()
    before = getattr(layer, name).detach().clone()
    for write in WRITES.values():
        with torch.no_grad(), warnings.catch_warnings(), pytest.raises(ConfigError, match="is lost: it is generated"):
            warnings.simplefilter("ignore")  # the view through which nn.init.orthogonal_ writes first
            write(layer, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(getattr(layer, name), before)
    assert name not in layer.__dict__


def test_the_message_has_the_way_out():
    with pytest.raises(ConfigError) as raised:
        nn.init.kaiming_uniform_(thin()[0].weight)
    assert str(raised.value) == (
        "uniform_() on the weight of a ThinLinear is lost: it is generated from its code. Initialise the dense model "
        "before compress, or draw the code anew by the layer's reset_parameters(). To write weights, call "
        "deepthin.torch.materialize(model) first, and compress again."
    )


def test_apply_of_an_initialisation_is_refused():
    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)

    with pytest.raises(ConfigError, match=r"uniform_\(\) on the weight of a ThinLinear is lost"):
        thin().apply(init)


@pytest.mark.parametrize("write", [nn.init.eye_, lambda w: w[0].zero_(), lambda w: torch.clamp_(w, 0, 0)])
def test_writes_that_python_does_not_see_are_warned_of(write):
    layer = thin()[0]
    with torch.no_grad(), pytest.warns(UserWarning, match="A write on the weight of a ThinLinear is lost"):
        write(layer.weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_reset_parameters_draws_anew(kind):
    make, name = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dt.compress(model, 0.2)
    layer = model[0]
    before = getattr(layer, name).detach().clone()
    (layer._reset_parameters if kind == "attention" else layer.reset_parameters)()
    after = getattr(layer, name).detach()
    assert not torch.equal(after, before)
    assert 0.3 < after.std() / before.std() < 4


def test_what_is_computed_from_a_generated_weight_is_plain():
    weight = thin()[0].weight
    assert isinstance(weight, torch.Tensor)
    for other in (weight * 2, weight.detach(), weight.t(), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(other) is torch.Tensor
    copied = weight.detach().clone()
    copied.zero_()  # as users do who want to change it
    assert weight.any()


# ---- Optimisers that train codes wrongly ----------------------------------------------------------------------------


def steps(model, optimizer, count=4, accumulate=1):
    for index in range(count * accumulate):
        model(torch.randn(8, 64)).square().mean().backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_codes_at_the_dense_rate_are_told_once(kind):
    model = thin()
    optimizer = kind(model.parameters(), 1e-3)
    with pytest.warns(UserWarning, match="trains the codes") as told:
        steps(model, optimizer)
    assert [str(one.message) for one in told] == [
        f"{kind.__name__} trains the codes of thin layers at the rate of dense weights, 0.001, but they need 20 times "
        f"that. Write optimizer = torch.optim.{kind.__name__}(deepthin.torch.parameter_groups(model, lr=0.001)); the "
        "rate given there is that of the dense network."
    ]
    steps(model, kind(model.parameters(), 1e-3))  # said once


def test_codes_that_no_optimiser_has_are_told_once():
    model, other = thin(), nn.Linear(64, 64)
    both, optimizer = nn.Sequential(other, model), torch.optim.Adam(other.parameters())
    steps(both, optimizer, 8)
    with pytest.warns(UserWarning, match="none of the optimisers that took 9 steps has them: they are not trained"):
        steps(both, optimizer, 1)
    steps(both, optimizer, 20)


def test_an_optimiser_from_before_compress_is_refused():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    dt.compress(model, 0.1, init="scratch")
    with pytest.raises(ConfigError, match="the optimizer still has the old ones: it trains nothing"):
        steps(model, optimizer, 2)


def test_right_optimisers_hear_nothing():
    """Warnings are errors here."""
    steps(model := thin(), torch.optim.Adam(dt.parameter_groups(model, 1e-4)))
    steps(model := thin(), torch.optim.Adam(dt.parameter_groups(model, 1e-4)), accumulate=3)
    steps(model := thin(), torch.optim.SGD(model.parameters(), 1e-3))
    steps(model := thin(), torch.optim.Adam(model.parameters(), 2e-2))  # chosen for codes
    model = thin()
    codes = [p for name, p in model.named_parameters() if ".thin." in name]
    rest = [p for name, p in model.named_parameters() if ".thin." not in name]
    steps(model, torch.optim.Adam([{"params": codes, "lr": 2e-3}, {"params": rest}], 1e-4))
    optimizer = torch.optim.Adam(dt.parameter_groups(model := thin(), 1e-4))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # warm-up
    steps(model, optimizer)
    steps(model := thin({"rules": {"*": {"method": "uniform", "bits": 8}}}), torch.optim.Adam(model.parameters(), 1e-3))
    frozen, head = thin().requires_grad_(False), nn.Linear(10, 4)
    steps(nn.Sequential(frozen, head), torch.optim.Adam(head.parameters()), 20)
    teacher = thin()
    teacher(torch.randn(8, 64)).sum().backward()  # once, for some analysis
    steps(other := network(), torch.optim.Adam(other.parameters()), 20)
    assert teacher[0].thin["weight"].xf.grad is not None
    generator, critic = thin(), nn.Linear(10, 1)
    optimizers = torch.optim.Adam(dt.parameter_groups(generator, 1e-3)), torch.optim.Adam(critic.parameters(), 1e-3)
    for step in range(24):
        critic(generator(torch.randn(8, 64))).mean().backward()
        optimizers[(step + 1) % 6 > 0].step()


def test_nothing_is_watched_once_an_optimiser_is_right():
    from deepthin.torch import replaced

    replaced._watches.clear()
    model = thin()
    assert len(replaced._watches) == 1
    steps(model, torch.optim.Adam(dt.parameter_groups(model, 1e-3)), 1)
    assert not replaced._watches
    assert not replaced._hooks
    model = thin()
    del model
    steps(other := network(), torch.optim.Adam(other.parameters()), 1)
    assert not replaced._watches


# ---- Recurrent factors ----------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(64, 8)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


def train_tagger(weight_decay) -> tuple[float, float]:
    """The recipe of the README with a large rate; the largest norm of the gradient, and the mean of the last losses."""
    torch.manual_seed(0)
    model = Tagger()
    dt.compress(model, {"model": {"ratio": 0.1}}, init="scratch")
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 4e-3, weight_decay=weight_decay))
    generator, norms, losses = torch.Generator().manual_seed(1), [], []
    for _ in range(225):
        x = torch.randn(16, 40, 16, generator=generator)
        loss = nn.functional.cross_entropy(model(x).transpose(1, 2), x[..., :8].cumsum(1).argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        losses.append(loss.item())
        optimizer.step()
    return max(norms), sum(losses[-25:]) / 25


def test_a_bidirectional_lstm_of_two_layers_converges():
    norm, loss = train_tagger(None)
    assert norm < 20
    assert loss < 1.5 < math.log(8)


@pytest.mark.slow
def test_it_explodes_without_decay():
    norm, _ = train_tagger(0)
    assert norm > 1e4


def groups_of(model, **options):
    return {group["name"]: group for group in dt.parameter_groups(model, 1e-3, **options)}


def test_decay_of_recurrent_factors():
    model = Tagger()
    dt.compress(model, 0.2, init="scratch")
    groups = groups_of(model)
    assert set(groups) == {"recurrent deepthin", "deepthin"}
    recurrent = groups["recurrent deepthin"]
    assert recurrent["weight_decay"] == 0.3
    assert recurrent["decoupled_weight_decay"] is True
    assert recurrent["lr"] == groups["deepthin"]["lr"] == pytest.approx(0.02)
    assert {id(p) for p in recurrent["params"]} == {
        id(p) for name, p in model.named_parameters() if name.startswith("lstm.thin.weight")
    }
    assert "weight_decay" not in groups["deepthin"]
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
    before = recurrent["params"][0].detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(recurrent["params"][0], before * (1 - 0.02 * 0.3))


def test_decay_that_is_given():
    model = Tagger()
    dt.compress(model, 0.2, init="scratch")
    assert all(not group.get("weight_decay") for group in dt.parameter_groups(model, 1e-3, weight_decay=0))
    groups = dt.parameter_groups(model, 1e-3, weight_decay=0.5)
    for group in groups:
        vectors = group["name"] == "deepthin" and all(p.dim() < 2 for p in group["params"])
        assert group["weight_decay"] == (0.0 if vectors else 0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups_of(model, weight_decay=0.1)["recurrent deepthin"]["weight_decay"] == 0.3
    assert "recurrent deepthin" not in groups_of(model, learning_rate_multiplier=1.0)
    rank = Tagger()
    dt.compress(rank, {"model": {"ratio": 0.2}, "rules": {"*": {"method": "rank"}}}, init="scratch")
    assert set(groups_of(rank)) == {"rank"}
    coded = {"*": {"method": "deepthin", "rank": 2, "floats": 0.2, "then": {"method": "coded"}}}
    dt.compress(coded_model := Tagger(), {"model": {"file_bytes": 9_000}, "rules": coded}, init="scratch")
    assert groups_of(coded_model)["recurrent deepthin then coded"]["weight_decay"] == pytest.approx(0.1)
    assert groups_of(coded_model)["learned steps"]["weight_decay"] == 0
    with pytest.raises(ConfigError, match=r"weight_decay = -1 must be 0 or more"):
        dt.parameter_groups(model, 1e-3, weight_decay=-1)


def test_an_optimiser_whose_decay_is_not_decoupled_is_told():
    model = Tagger()
    dt.compress(model, 0.2, init="scratch")
    optimizer = torch.optim.SGD(dt.parameter_groups(model, 1e-3))
    model(torch.randn(2, 5, 16)).sum().backward()
    with pytest.warns(UserWarning, match="SGD adds weight decay to gradients"):
        optimizer.step()
    optimizer.step()


# ---- Biases, uncovered parameters, messages -------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["*bias*", "re:.*bias.*", "lstm.bias*", "*bias_[ih]h_l0"])
def test_patterns_that_name_biases_reach_them(pattern):
    model = Tagger()
    report = dt.compress(model, {"rules": {pattern: {"method": "uniform", "bits": 4}}}, init="scratch")
    named = {row.name for row in report.rows if row.method == "uniform"}
    everywhere = {name for name, p in Tagger().named_parameters() if "bias" in name}
    if pattern in ("*bias*", "re:.*bias.*"):
        assert named == everywhere
    else:
        assert named == {name for name in everywhere if name.startswith("lstm.")} - (
            {name for name in everywhere if not name.endswith("_l0")} if pattern.endswith("l0") else set()
        )


def test_other_patterns_leave_vectors_alone():
    model = nn.ModuleDict({"debias": nn.Linear(30, 30), "norm": nn.LayerNorm(30)})
    for pattern in ("*", "debias*", "re:debias.*"):
        copied = copy.deepcopy(model)
        report = dt.compress(copied, {"rules": {pattern: {"method": "uniform", "bits": 8}}}, init="scratch")
        assert {row.name for row in report.rows if row.method == "uniform"} == {"debias.weight"}


def test_a_budget_that_biases_exceed_names_the_way_out():
    model = nn.Sequential(nn.Linear(64, 4000), nn.ReLU(), nn.Linear(4000, 10))
    with pytest.raises(deepthin.BudgetError) as raised:
        dt.plan(model, file_bytes=8_000)
    assert "8096 are biases and scales of normalisation: [model] biases = 4 stores them in 4 bits" in str(raised.value)
    with pytest.raises(deepthin.BudgetError) as raised:
        dt.plan(model, {"model": {"file_bytes": 3_000, "biases": 4}})
    assert "[model] biases" not in str(raised.value)
    smallest = dt.plan(model, {"model": {"file_bytes": 10_500, "biases": 4}})
    assert smallest.total_bytes <= 10_500


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(16, 16))
        self.inner = nn.Linear(16, 16)


def test_one_message_has_all_uncovered_parameters():
    def build():
        return nn.ModuleDict({"a": Custom(), "b": nn.Bilinear(8, 8, 8), "c": nn.Linear(16, 16)})

    with pytest.raises(ConfigError) as raised:
        dt.compress(build(), 0.3)
    assert str(raised.value) == (
        "rule '*' reaches a.table: Custom has no thin version; b.weight: Bilinear has no thin version. Covered are the "
        "parameters of linear, convolution, embedding, recurrent and attention layers of torch.nn. Add 'a.table', 'b' "
        "to [model] ignore to keep them dense."
    )
    report = dt.compress(build(), {"model": {"ratio": 0.3, "ignore": ["a.table", "b"]}}, init="scratch")
    assert {row.name for row in report.rows if row.method == "deepthin"} == {"a.inner.weight", "c.weight"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nn.utils.parametrizations.weight_norm, "weight_norm computes a weight from it; first call torch.nn.utils"),
        (nn.utils.parametrizations.spectral_norm, "spectral_norm computes a weight from it; first call torch.nn.utils"),
        (nn.utils.weight_norm, "weight_norm of a Linear computes its weight; first call torch.nn.utils.remove_weight"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrisations_have_their_names(make, message):
    with pytest.raises(ConfigError, match=message):
        dt.compress(nn.Sequential(make(nn.Linear(30, 30))), 0.3)


def test_load_places_the_model(tmp_path):
    model = thin()
    dt.save(model, tmp_path / "m.thin")
    with torch.device("meta"):
        empty = network()
    again = dt.load(empty, tmp_path / "m.thin", device="cpu")
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    x = torch.randn(3, 64)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert {p.device.type for p in dt.load(network(), tmp_path / "m.thin", device="meta").parameters()} == {"meta"}
    untouched = network()
    with pytest.raises(RuntimeError, match="nowhere"):
        dt.load(untouched, tmp_path / "m.thin", device="nowhere")
    assert type(untouched[0]) is nn.Linear


# ---- The command line -----------------------------------------------------------------------------------------------


def test_version(capsys, monkeypatch):
    from deepthin.cli.main import main

    monkeypatch.setattr(sys, "argv", ["deepthin", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out.strip() == f"deepthin {deepthin.__version__}"


@pytest.mark.parametrize("written", [False, True])
def test_ctrl_c_promises_only_what_is_kept(written, capsys, monkeypatch, tmp_path):
    from deepthin.cli import app, main

    def stop():
        app.resumes(tmp_path, "results.json", "models/*.thin")
        if written:
            (tmp_path / "models").mkdir()
            (tmp_path / "models" / "dense-seed0.thin").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "_kept", [])
    monkeypatch.setattr(main, "app", stop)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130
    told = " ".join(capsys.readouterr().err.split())
    assert told == (
        f"interrupted; what is done is kept in {tmp_path}: the same command goes on"
        if written
        else "interrupted before anything was kept: the same command starts over"
    )
