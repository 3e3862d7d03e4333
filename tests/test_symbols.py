"""Layers that multiply by symbols of a byte: the way taken, what it computes, and what it never misses."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import deepthin.torch as dt
import tolerance
from deepthin.kernels import costs, products
from deepthin.methods.kmeans import KMeans
from deepthin.methods.scalar import Uniform

EPS32 = float(np.finfo(np.float32).eps)
RULES = {
    "uniform": {"method": "uniform", "bits": 8},
    "rows": {"method": "uniform", "bits": 5, "per": "row"},
    "affine": {"method": "uniform", "bits": 8, "affine": True},
    "affine rows": {"method": "uniform", "bits": 4, "affine": True, "per": "row"},
    "kmeans": {"method": "kmeans", "bits": 3},
    "ecsq": {"method": "ecsq", "bits": 1.5, "levels": 8},
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
needs_look_ups = pytest.mark.skipif(products.levels()[1] == 0, reason="no look-ups in this instruction set")


def layer_of(rule, tmp_path, rows=30, cols=53, bias=True):
    """A thin layer in evaluation, read from its file to be used alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(cols, rows, bias=bias))
    dt.compress(model, {"model": {"ratio": 0.5}, "rules": {"*": rule}})
    dt.save(model, tmp_path / "m.thin")
    return dt.load(nn.Sequential(nn.Linear(cols, rows, bias=bias)), tmp_path / "m.thin", frozen=True).eval()[0]


def bound(layer, x):
    """Roundings of a sum of so many terms; symbols with a least value count from their middle."""
    weight = layer.thin["weight"]
    code, sizes = {e: t.double() for e, t in weight.code().items()}, weight().double().abs()
    if "least" in code:
        middle = code["least"] + 128 * code["step"]
        sizes = middle.abs() + (code["step"] * (code["symbols"] - 128)).abs()
    sums = x.double().abs() @ sizes.T + (0 if layer.bias is None else layer.bias.double().abs())
    return (x.shape[-1] + 8) * EPS32 * sums  # 4 more: of the decoded weight itself


def assert_close(layer, x, y=None):
    y = layer(x) if y is None else y
    weight = layer.thin["weight"]().double()
    want = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
    assert y.dtype == torch.float32
    assert ((y - want).abs() <= bound(layer, x)).all()


@needs_look_ups
@each_rule
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_decoded_weight(rule, bias, tmp_path):
    layer = layer_of(rule, tmp_path, bias=bias).requires_grad_(False)
    for shape in [(1, 53), (53,), (2, 4, 53), (8, 53)]:
        x = torch.randn(shape)
        assert layer.thin["weight"].path(x) == "symbols"
        assert_close(layer, x)
        assert layer(x).shape == (*shape[:-1], 30)
    assert layer.thin["weight"]._evaluated.dense  # made by the test alone
    assert_close(layer, torch.randn(53, 5).T)


@pytest.mark.filterwarnings("ignore")  # torch's own use of torch.jit.script
@each_rule
def test_other_inputs_take_the_decoded_weight(rule, tmp_path):
    layer = layer_of(rule, tmp_path)
    thin, x = layer.thin["weight"], torch.randn(3, 53)
    with torch.no_grad():
        assert thin.path(torch.randn(9, 53)) == "dense"
        assert thin.path(torch.randn(0, 53)) == "dense"
        assert thin.path(x.double()) == "dense"
        assert thin.path(x.to("meta")) == "dense"
        with torch.autocast("cpu"):
            assert thin.path(x) == "dense"
            assert layer(x).dtype == torch.bfloat16
        with forward_ad.dual_level():
            assert thin.path(x) == "dense"
            _, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x)))
        assert ((tangent - x @ layer.weight.T).abs() <= 2 * bound(layer, x)).all()
        assert ((torch.func.vmap(layer)(x) - layer(x)).abs() <= 2 * bound(layer, x)).all()
        layer.train()
        assert thin.path(x) == "dense"
        layer.eval()
    x.requires_grad_()
    assert thin.path(x) == "dense"
    layer(x).sum().backward()
    tolerance.assert_close(x.grad, layer.weight.sum(0).expand(3, -1), 30, layer.weight.abs().sum(0).expand(3, -1))
    assert torch.equal(layer.bias.grad, torch.full((30,), 3.0))
    with torch.no_grad():
        layer.double()
        assert layer(x.double()).dtype == torch.float64


@needs_look_ups
@each_rule
def test_graphs_hold_the_decoded_weight(rule, tmp_path):
    layer = layer_of(rule, tmp_path).requires_grad_(False)
    x = torch.randn(3, 53)
    exported = torch.export.export(layer, (x,)).module()(x)
    assert_close(layer, x, exported)


@each_rule
def test_every_change_of_the_code_is_seen(rule, tmp_path):
    layer = layer_of(rule, tmp_path).requires_grad_(False)
    thin, x = layer.thin["weight"], torch.randn(2, 53)
    assert_close(layer, x)
    code = {entry: tensor.clone() for entry, tensor in thin.code().items()}
    thin.set_code({**code, "symbols": code["symbols"].flip(0)})
    assert_close(layer, x)
    thin.symbols.data[3] = thin.symbols[4]
    assert torch.equal(layer.weight[3] - layer.weight[3], torch.zeros(53))
    assert_close(layer, x)
    with torch.inference_mode():
        for parameter in thin.parameters():
            parameter.data.mul_(3)
    assert_close(layer, x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))


@needs_look_ups
def test_what_is_not_finite_is_as_from_the_decoded_weight(tmp_path):
    for rule in RULES.values():
        layer, x = layer_of(rule, tmp_path).requires_grad_(False), torch.randn(3, 53)
        x[1, 7] = torch.inf
        want = nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x).isnan(), want.isnan())
        assert torch.equal(layer(x).isfinite(), want.isfinite())


def test_the_way_is_a_function_of_plan_and_batch():
    few, more, most = (KMeans((100, 100), levels) for levels in (8, 9, 17))
    large, levels = KMeans((2048, 1024), 16), (8, 16)
    assert [costs.symbols_pay(few, batch, levels) for batch in (0, 1, 8, 9)] == [False, True, True, False]
    assert [costs.symbols_pay(plan, 1, levels) for plan in (more, most, large)] == [False, False, True]
    assert costs.symbols_pay(Uniform((9, 9), 8), 1, levels)
    assert not costs.symbols_pay(Uniform((9, 9), 9), 1, levels)
    assert not costs.symbols_pay(Uniform((9, 9), 8), 1, (0, 0))


def test_symbols_take_a_byte_and_files_stay_the_same(tmp_path):
    for rule, kind in [("uniform", torch.int8), ("affine", torch.uint8), ("kmeans", torch.uint8)]:
        layer = layer_of(RULES[rule], tmp_path)
        assert layer.thin["weight"].symbols.dtype == kind
        dt.save(nn.Sequential(layer), tmp_path / "again.thin")
        assert (tmp_path / "again.thin").read_bytes() == (tmp_path / "m.thin").read_bytes()
    wide = layer_of({"method": "uniform", "bits": 12}, tmp_path)
    assert wide.thin["weight"].symbols.dtype == torch.int16
    assert wide.thin["weight"].path(torch.randn(1, 53)) == "dense"
    assert_close(wide, torch.randn(2, 53))


def test_a_model_is_frozen_by_loading_and_thawed_by_loading(tmp_path):
    model = nn.Sequential(nn.Linear(53, 30), nn.Linear(30, 8))
    rules = {"0": RULES["uniform"], "1": {"method": "rank", "ratio": 0.6, "then": {"method": "uniform", "bits": 6}}}
    dt.compress(model, {"model": {"ratio": 0.5}, "rules": rules})
    dt.save(model, tmp_path / "m.thin")
    x = torch.randn(3, 53)
    want = model.eval()(x)
    assert dt.load(model, tmp_path / "m.thin", frozen=True) is model
    weights = [layer.thin["weight"] for layer in model]
    assert [weight.rounds for weight in weights] == [False, False]
    assert not any(p.requires_grad for weight in weights for p in weight.parameters())
    assert "weight" not in dict(weights[0].named_parameters())
    tolerance.assert_close(
        model(x), want, 53 + 30 + 2 * 20, tolerance.peak(model, x)
    )  # two layers, and their decoded weights
    assert dt.load(model, tmp_path / "m.thin", frozen=True)[0].thin["weight"] is weights[0]  # filled again, in place
    dt.load(model, tmp_path / "m.thin").requires_grad_().train()
    assert [layer.thin["weight"].rounds for layer in model] == [True, True]
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_shared_values_train_as_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(53, 30))
    dt.compress(model, {"model": {"ratio": 0.5}, "rules": {"*": RULES["kmeans"]}})
    thin, x = model[0].thin["weight"], torch.randn(3, 53)
    thin.set_code({"symbols": thin.symbols.to(torch.int16), "centres": thin.centres.detach().clone()})
    y = model(x)
    y.backward(torch.ones_like(y))
    every = x.sum(0).expand(30, -1)
    want = torch.zeros(8).index_add_(0, thin.symbols.flatten().long(), every.flatten())
    sizes = torch.zeros(8).index_add_(0, thin.symbols.flatten().long(), every.abs().flatten())
    tolerance.assert_close(thin.centres.grad, want, 3 + int(thin.symbols.flatten().bincount().max()), sizes)
