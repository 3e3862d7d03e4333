"""Every method, its options at their extremes, by every way of loading, against the dense twin; weights of any size."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin.methods import METHODS

EXTREMES = [
    *[("deepthin", o) for o in ({"ratio": 0.5}, {"ratio": 0.9, "rank": "max"}, {"ratio": 0.2, "n": 7})],
    ("shuffled", {"ratio": 0.5, "seed": -1}),
    *[("rank", o) for o in ({"rank": 1}, {"rank": 24})],
    *[("hashed", {"ratio": ratio}) for ratio in (0.01, 1.0)],
    *[("pruned", {"ratio": 0.4, "balance": b, "index": i}) for b in (1, 24) for i in ("gaps", "csr")],
    ("kronecker", {"ratio": 0.9}),
    *[("tensor-train", {"ratio": 0.5, "order": order}) for order in (2, 3, 4)],
    *[
        ("uniform", {"bits": b, "per": per, "affine": affine})
        for b in (2, 8, 9, 15, 16)
        for per in ("row", "matrix")
        for affine in (False, True)
    ],
    *[("kmeans", {"bits": b, "start": start}) for b in (1, 8) for start in ("linear", "density", "random")],
    *[("ecsq", o) for o in ({"bits": 1}, {"bits": 8}, {"bits": 2, "levels": 256})],
    *[("coded", {"bits": b}) for b in (2, 8)],
    *[("binary", {"bits": b, "per": p, "rounds": r}) for b in (1, 8) for p in ("row", "matrix") for r in (0, 3)],
    *[
        ("deepthin", {"ratio": 0.5, "then": {"method": "uniform", "bits": 16, "affine": True, "per": per}})
        for per in ("row", "matrix")
    ],
]


def thin(rule, size=1.0):
    """A thin layer, its report, and the weight that it had."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 24)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(24, 30).clamp(-3, 3) * size)
        weight = layer.weight.detach().double().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some lose more than half of the norm, and say so
        report = dt.compress(layer, {"rules": {"*": {"method": rule[0], **rule[1]}}})
    return layer.eval(), report, weight


def test_every_method_is_here():
    assert {name for name, _ in EXTREMES} == set(METHODS)


@pytest.mark.parametrize("rule", EXTREMES, ids=str)
def test_all_ways_to_load_give_the_dense_twin(rule, tmp_path):
    layer, _, _ = thin(rule)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    bound = 1e-6 * weight.abs().max()
    dt.save(layer, tmp_path / "a.thin")
    assert (torch.from_numpy(deepthin.load(tmp_path / "a.thin")["weight"]) - weight).abs().max() <= bound
    x = torch.randn(33, 30)
    reach = 64 * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T + bias.abs())
    for frozen in (False, True):
        loaded = dt.load(nn.Linear(30, 24), tmp_path / "a.thin", frozen=frozen).eval()
        assert (loaded.weight.detach() - weight).abs().max() <= bound
        dt.save(loaded, tmp_path / "b.thin")
        assert (tmp_path / "b.thin").read_bytes() == (tmp_path / "a.thin").read_bytes()
        for batch in (1, 5, 33):
            want = nn.functional.linear(x[:batch], weight, bias)
            assert ((loaded(x[:batch]) - want).abs() <= reach[:batch]).all()


@pytest.mark.parametrize("rule", EXTREMES, ids=str)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e18, 1e19, 3e37, 1e38])
def test_weights_of_any_size_are_stored_as_those_of_size_one(rule, size):
    try:
        layer, report, weight = thin(rule, size)
    except deepthin.NonFiniteError as error:
        assert size == 1e38
        assert "Scale the tensor down" in str(error)
        return
    made = layer.weight.detach().double()
    assert torch.isfinite(made).all()
    error = float((made - weight).norm() / weight.norm())
    assert report.rows[0].error == pytest.approx(error, rel=1e-6, abs=1e-12)
    if size >= 1e-20:
        assert error <= 1.05 * thin(rule)[1].rows[0].error + 1e-6


def test_an_overflow_is_refused_and_the_model_left_as_it_was():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([3e38, -3e38, 1.0, 2.0])
    rules = {"rules": {"weight": {"method": "uniform", "bits": 8, "affine": True}}}
    with pytest.raises(
        deepthin.NonFiniteError, match=r"weight has the value 3e\+38, and what is decoded for it is not"
    ):
        dt.compress(layer, rules)
    assert type(layer) is nn.Linear


def test_importance_beyond_single_precision_still_ranks_weights():
    weight = np.array([[1e19, 2e19, 3e19, 1e19]], np.float32)
    importance = np.array([[4e30, 4e30, 1e30, 9e30]], np.float32)  # damages 4, 16, 9 and 9: the first of equals
    code = METHODS["pruned"](shape=(1, 4), kept=2).encode(weight, np, importance)
    assert code["positions"].tolist() == [1, 2]


def test_a_product_takes_one_floating_type():
    x, xf, wf = torch.ones(2, 5), torch.ones(4, 2), torch.ones(2, 5)
    linear = torch.ops.deepthin.factor_linear
    message = "x, xf and wf are torch.int64, torch.float32 and torch.float32: a product needs one floating type"
    with pytest.raises(TypeError, match=message):
        linear(x.long(), xf, wf, None, 4, 0, "auto", False)
    for operands in ((x.double(), xf, wf), (x, xf.half(), wf), (x, xf, wf.long()), (x.long(), xf.long(), wf.long())):
        with pytest.raises(TypeError, match="a product needs one floating type"):
            linear(*operands, None, 4, 0, "auto", False)
    with pytest.raises(TypeError, match=r"The bias is torch.int64, x is torch.float32: convert the bias"):
        linear(x, xf, wf, torch.ones(4).long(), 4, 0, "auto", False)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_takes_factors_above_one(kind, tmp_path):
    """Their products are computed in single precision, so that those need not be below the largest half."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3000, 40))
    dt.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.05}}}, init="scratch")
    with torch.no_grad():
        model[0].thin["weight"].wf *= 40
        model[0].thin["weight"].xf /= 40
    dt.save(model.to(kind), tmp_path / "m.thin")
    x = torch.randn(2, 3000).to(kind)
    with torch.no_grad():
        want = model.eval()(x)
        loaded = dt.load(nn.Sequential(nn.Linear(3000, 40)).to(kind), tmp_path / "m.thin").eval()
        assert torch.equal(loaded(x), want)


def test_factors_whose_products_overflow_are_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40))
    dt.compress(model, {"rules": {"*": {"method": "rank", "ratio": 0.5}}}, init="scratch")
    with torch.no_grad():
        model[0].thin["weight"].wf *= 1e38
        model[0].thin["weight"].xf *= 1e-38
    with pytest.raises(deepthin.NonFiniteError, match="wf times inputs has numbers up to .* nothing was written"):
        dt.save(model, tmp_path / "m.thin")
    assert not (tmp_path / "m.thin").exists()
    dt.save(model, tmp_path / "m.thin", finite=False)
    with pytest.raises(deepthin.FormatError, match="wf times inputs has numbers up to"):
        dt.load(nn.Sequential(nn.Linear(30, 40)), tmp_path / "m.thin")
