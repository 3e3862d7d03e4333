"""Every method, and those whose floats another stores, through the whole library: layers, files, copies, twist."""

import copy
import functools
import io
import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin import METHODS, BudgetError, ConfigError, FormatError
from deepthin.plan.parse import parse_rules
from deepthin.plan.shares import plan_tensors
from deepthin.plan.tensor import Tensor
from deepthin.storage.read import from_bytes
from deepthin.torch.size_target import fit_to
from test_storage import header_of, resign
from tolerance import absolute, assert_close, bound, largest, peak

EIGHT = {"method": "uniform", "bits": 8}
RULES = {name: {"method": name} for name in METHODS} | {
    "deepthin then 8 bits": {"method": "deepthin", "then": EIGHT},
    "deepthin then 4 bits": {"method": "deepthin", "then": {**EIGHT, "bits": 4, "per": "row"}},
    "hashed then 8 bits": {"method": "hashed", "then": EIGHT},
    "pruned then 8 bits": {"method": "pruned", "then": {**EIGHT, "affine": True}},
    "pruned, balanced": {"method": "pruned", "balance": 4},
    "rank then 8 bits": {"method": "rank", "then": EIGHT},
    "tensor-train then 8 bits": {"method": "tensor-train", "then": EIGHT},
    "pruned then kmeans": {"method": "pruned", "then": {"method": "kmeans", "bits": 5}},
    "deepthin then kmeans": {"method": "deepthin", "then": {"method": "kmeans", "bits": 6}},
    "pruned then ecsq": {"method": "pruned", "then": {"method": "ecsq", "bits": 3.5}},
    "deepthin then binary": {"method": "deepthin", "then": {"method": "binary", "bits": 3, "per": "matrix"}},
}
# Terms of the sums behind one number: of a decoded weight, and of an output of Everything: the convolution's 73, the
# recurrent layer's 5 steps of 58, the attention's 24 + 12 + 5 + 24, the last layer's 25 and the mean's 5.
DECODING, PATH = 100, 73 + 5 * 58 + 65 + 30
# Pairs that store floats as other pairs of the table do.
ALIKE = {
    "deepthin then 4 bits",
    "rank then 8 bits",
    "tensor-train then 8 bits",
    "deepthin then kmeans",
    "pruned then ecsq",
}
each_rule = pytest.mark.parametrize(
    "rule",
    [pytest.param(rule, id=name, marks=pytest.mark.slow if name in ALIKE else ()) for name, rule in RULES.items()],
)


class Everything(nn.Module):
    """A layer of every kind that keeps a matrix in its own way."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 24, padding_idx=0)
        self.conv = nn.Conv1d(24, 32, 3, padding=1)
        self.lstm = nn.LSTM(32, 24, batch_first=True)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.out = nn.Linear(24, 30)

    def forward(self, words):
        x = self.conv(self.table(words).transpose(1, 2)).transpose(1, 2)
        x = self.lstm(x)[0]
        return self.out(self.attention(x, x, x)[0]).mean(1)


@functools.cache
def built(rule, trained=False):
    """A network by a rule in JSON, untrained or after ten steps, and what ``compress`` reported."""
    if trained:
        network, report = copy.deepcopy(built(rule))
        return train(network), report
    torch.manual_seed(0)
    network = Everything()
    return network, dt.compress(network, {"model": {"ratio": 0.4}, "rules": {"*": json.loads(rule)}}, init="scratch")


def everything(rule, trained=False):
    """A copy: each rule builds, and trains, one network for all tests."""
    network = copy.deepcopy(built(json.dumps(rule), trained)[0])
    torch.manual_seed(0)
    return network


def words():
    return torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(1))


CLASSES = torch.arange(6)


def loss_of(network, classes=CLASSES):
    return nn.functional.cross_entropy(network(words()), classes)


def train(network, steps=10, lr=2.5e-3, classes=CLASSES):
    optimizer = torch.optim.Adam(dt.parameter_groups(network.train(), lr))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(network, classes).backward()
        optimizer.step()
    return network.eval()


def outputs(network):
    with torch.no_grad():
        return network.eval()(words())


@each_rule
def test_every_layer_trains_and_comes_back_from_a_file(rule, tmp_path):
    first = loss_of(everything(rule)).item()
    network = everything(rule, trained=True)
    assert loss_of(network).item() < first - 0.2
    want = outputs(network)
    assert torch.equal(outputs(network), want)
    written = dt.save(network, tmp_path / "a.thin")
    assert written == (tmp_path / "a.thin").stat().st_size
    with torch.device("meta"):
        empty = Everything()
    for target in (Everything(), empty, everything(rule), copy.deepcopy(network)):
        loaded = dt.load(target, tmp_path / "a.thin")
        assert torch.equal(outputs(loaded), want)
        dt.save(loaded, tmp_path / "b.thin")
        assert (tmp_path / "b.thin").read_bytes() == (tmp_path / "a.thin").read_bytes()
    dense = deepthin.load(tmp_path / "a.thin")
    plain = dt.materialize(copy.deepcopy(network))
    assert dense.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert_close(dense[name], value.numpy(), DECODING, largest(value))
    assert_close(outputs(plain), want, DECODING + PATH, peak(plain, words()))


@each_rule
def test_what_is_loaded_can_be_trained_on(rule, tmp_path):
    network = everything(rule, trained=True)
    dt.save(network, tmp_path / "a.thin")
    loaded = dt.load(Everything(), tmp_path / "a.thin")
    other = torch.arange(6).flip(0)  # classes that the network has not learnt
    before = loss_of(loaded, other).item()
    train(loaded, 12, 1e-3, other)
    assert loss_of(loaded, other).item() < before
    dt.save(loaded, tmp_path / "b.thin")
    assert (tmp_path / "b.thin").read_bytes() != (tmp_path / "a.thin").read_bytes()


@each_rule
def test_copies_and_state_dicts(rule):
    network = everything(rule, trained=True)
    want, buffer = outputs(network), io.BytesIO()
    torch.save(network.state_dict(), buffer)
    buffer.seek(0)
    fresh = everything(rule)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), fresh):
        assert torch.equal(outputs(twin), want)


@each_rule
def test_half_precision_and_the_meta_device(rule, tmp_path):
    network = everything(rule, trained=True).to(torch.bfloat16)
    want = outputs(network)
    dt.save(network, tmp_path / "a.thin")
    assert torch.equal(outputs(dt.load(Everything().to(torch.bfloat16), tmp_path / "a.thin")), want)
    with torch.device("meta"):
        empty = Everything()
    report = dt.compress(empty, {"model": {"ratio": 0.4}, "rules": {"*": rule}}, init="scratch")
    assert all(value.is_meta for value in empty.parameters())
    assert report.dense_bytes > 0


@each_rule
@pytest.mark.parametrize("group", ["flat", "rows"])
def test_groups(rule, group, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    pattern = "*" if group == "flat" else "re:[04]"
    dt.compress(network, {"model": {"ratio": 0.4}, "rules": {pattern: {**rule, "group": group}}}, init="scratch")
    x = torch.randn(3, 30)
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad():
        want = network.eval()(x)
    dt.save(network, tmp_path / "a.thin")
    fresh = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    with torch.no_grad():
        assert torch.equal(dt.load(fresh, tmp_path / "a.thin").eval()(x), want)


@each_rule
def test_a_trained_weight_and_a_bias_are_encoded(rule, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some lose more than half of the weight's norm, and say so
        report = dt.compress(network, {"model": {"ratio": 0.5}, "rules": {"0.weight": rule, "*bias": rule}})
    assert {row.name for row in report.rows} == {"0.weight", "0.bias"}
    assert all(0 <= row.error < 1.2 for row in report.rows)
    dt.save(network, tmp_path / "a.thin")
    x = torch.randn(2, 40)
    assert torch.equal(dt.load(nn.Sequential(nn.Linear(40, 60)), tmp_path / "a.thin")(x), network(x))


@each_rule
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_file_bytes_is_never_exceeded(rule, share, tmp_path):
    """Also where the size of a file depends on what is in it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 60))
    limit = int(share * 4 * 12800)
    dt.compress(network, {"model": {"file_bytes": limit}, "rules": {"*": rule}}, init="scratch")
    if METHODS[rule.get("then", rule)["method"]].learns_step:  # which training brings to its size
        assert fit_to(network, limit) == dt.save(network, tmp_path / "a.thin", max_bytes=limit) > 0.9 * min(limit, 6700)
        return
    most = 12800 * rule["then"]["bits"] / 8 if "then" in rule else limit  # a code has no more floats than weights
    assert 0.5 * min(limit, most) < dt.save(network, tmp_path / "a.thin", max_bytes=limit) <= limit


@each_rule
def test_stored_bits_in_the_report(rule, tmp_path):
    """What is written for a matrix is at most what its plan promises, and half of it: centres may be left unused."""
    network, report = everything(rule), built(json.dumps(rule))[1]
    dt.save(network, tmp_path / "a.thin")
    stored = from_bytes((tmp_path / "a.thin").read_bytes()).thin
    for name, thin in stored.items():
        assert 0.5 * thin.method.bits() < 8 * thin.bytes <= thin.method.bits()
        assert report.ratio < 1, name
    assert deepthin.inspect(tmp_path / "a.thin").total_bytes == (tmp_path / "a.thin").stat().st_size


def exported_network(rule):
    """Few bits a weight: every plane of binary's is an encoding of its own in the graph."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(48, 64), nn.ReLU())
    dt.compress(network, {"model": {"ratio": 0.2}, "rules": {"*": rule}}, init="scratch")
    return network.eval(), torch.randn(5, 48)


@pytest.mark.parametrize("rule", ["deepthin", "deepthin then 8 bits", "pruned", "uniform", "kmeans", "kronecker"])
def test_torch_compile(rule, compiling):
    """One rule for each way of multiplying."""
    network, x = exported_network(RULES[rule])
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    terms, sizes = 48 + 64 + DECODING, absolute(network)
    sums = sizes(x.abs().double())
    sums.sum().backward()
    assert_close(compiled(x), network(x), terms, sums)
    compiled(x).sum().backward()
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    network(x).sum().backward()
    for got, p, size in zip(found, network.parameters(), sizes.parameters(), strict=True):
        assert_close(got, p.grad, terms + 3072 // len(p), size.grad.max())  # a number in the code serves many weights


@each_rule
def test_torch_export(rule, compiling):
    network, x = exported_network(rule)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert_close(exported.module()(x[:3]), network(x[:3]), 48 + 64 + DECODING, peak(network, x))


# ---- What trains through its rounding -------------------------------------------------------------------------------


def test_the_gradient_goes_straight_through():
    """That of the rounded weight, as if the rounding were not there (Bengio et al., 2013)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(30, 20, bias=False))
    rule = {"method": "deepthin", "then": {"method": "uniform", "bits": 3}}
    dt.compress(network, {"model": {"ratio": 0.05}, "rules": {"*": rule}}, init="scratch")
    thin = network[0].thin["weight"]
    xf, wf = (thin.floats()[e].detach().requires_grad_() for e in ("xf", "wf"))
    assert len(set((xf / xf.abs().max() * 3).flatten().round(decimals=4).tolist())) <= 7
    assert not torch.equal(xf, thin.xf)
    x = torch.randn(4, 30)
    (x @ (xf @ wf).reshape(-1)[:600].view(20, 30).T).square().sum().backward()
    network(x).square().sum().backward()
    sizes = [t.detach().double().abs().requires_grad_() for t in (xf, wf)]
    (x.double().abs() @ (sizes[0] @ sizes[1]).reshape(-1)[:600].view(20, 30).T).square().sum().backward()
    for got, want, size in zip((thin.xf, thin.wf), (xf, wf), sizes, strict=True):
        assert_close(got.grad, want.grad, 30 + 4 + sum(xf.shape) + sum(wf.shape), size.grad)


def test_evaluation_is_training_without_the_gradient():
    rule = {"method": "deepthin", "then": EIGHT}
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(512, 512))
    dt.compress(network, {"model": {"ratio": 0.01}, "rules": {"*": rule}}, init="scratch")
    x = torch.randn(9, 512)
    trained = network(x).detach()
    with torch.no_grad():
        for _ in range(3):
            assert_close(network.eval()(x), trained, 512 + 8, absolute(network)(x.abs().double()))
        assert network[0].thin["weight"].path(x).startswith("native") or not deepthin.native_available


def test_a_loaded_code_is_kept_until_something_changes(tmp_path):
    network = everything(RULES["deepthin then 8 bits"])
    dt.save(network, tmp_path / "a.thin")
    loaded = dt.load(Everything(), tmp_path / "a.thin")
    thin = loaded.out.thin["weight"]
    codes = {k: v.clone() for k, v in thin.code().items()}
    assert codes["xf_symbols"].dtype == torch.int16
    with torch.no_grad():
        thin.xf.mul_(1.5)
    assert_close(thin.code()["xf_step"], 1.5 * codes["xf_step"], 3)
    assert_close(thin() * 1.0, 1.5 * deepthin_weight(codes, thin.method), DECODING, largest(thin()))


def deepthin_weight(codes, method):
    return method.decode(codes, torch)


def test_a_fixed_scale_per_row_and_the_sizes_of_then():
    plan = parse_rules({"model": {"ratio": 0.01}, "rules": {"*": {"method": "deepthin", "then": EIGHT}}})
    (planned,) = plan_tensors(plan, [Tensor("w", (1024, 1024))])
    assert planned.name == "deepthin then uniform"
    outer = planned.method.outer
    assert planned.method.bits() == 8 * (outer.m + outer.n) + 64 <= 32 * 1024 * 1024 // 100
    assert planned.method.bits() > 0.9 * 32 * 1024 * 1024 // 100
    plain = METHODS["deepthin"].fit((1024, 1024), 32 * 1024 * 1024 // 100)
    assert outer.m > 3.7 * plain.m  # four times the factors in the same bytes
    assert math.gcd(outer.n, 1024) == 1


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("uniform", "give a method with a fixed number of bits"),
        ({"method": "deepthin"}, "Valid methods: uniform"),
        ({"method": "uniform"}, "has no bits"),
        ({"method": "uniform", "bits": 40}, "bits = 40"),
        ({"method": "uniform", "bits": 8, "pre": "row"}, "Did you mean 'per'"),
    ],
)
def test_what_then_cannot_be(then, message):
    with pytest.raises(ConfigError, match=message):
        parse_rules({"rules": {"*": {"method": "deepthin", "then": then}}})


def test_rounded_factors_of_a_high_rank_get_half_the_rate():
    network = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 4))
    rules = {
        "0": {"method": "deepthin", "ratio": 0.1, "rank": "max", "then": EIGHT},
        "1": RULES["deepthin then 8 bits"],
    }
    dt.compress(network, {"model": {"ratio": 0.1, "ignore": ["2"]}, "rules": rules}, init="scratch")
    rates = {id(p): group["lr"] for group in dt.parameter_groups(network, 1.0) for p in group["params"]}
    assert [rates[id(layer.thin["weight"].wf)] for layer in (network[0], network[1])] == [10, 20]
    assert [rates[id(layer.bias)] for layer in network] == [10, 20, 1]


def test_a_bias_learns_beside_a_frozen_pruned_weight():
    layer = nn.Sequential(nn.Linear(300, 200))
    dt.compress(layer, {"rules": {"*": {"method": "pruned", "ratio": 0.02}}}, init="scratch")
    layer[0].thin.requires_grad_(False)
    x = torch.randn(3, 300)
    layer.eval()(x).sum().backward()
    assert torch.equal(layer[0].bias.grad, torch.full((200,), 3.0))
    with torch.no_grad():
        assert layer[0].thin["weight"].path(x) == "csr" or not deepthin.native_available
        dense = x @ layer[0].weight.T + layer[0].bias
        assert_close(layer(x), dense, 300 + 1, absolute(layer)(x.abs().double()))
        layer[0].bias.data = layer[0].bias.data.double()
        with pytest.raises(RuntimeError):
            layer(x)  # as a dense layer


@each_rule
def test_tangents_of_the_code_are_not_lost(rule):
    from torch.autograd import forward_ad

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(30, 20, bias=False)).eval()
    dt.compress(layer, {"model": {"ratio": 0.4}, "rules": {"*": rule}}, init="scratch")
    layer.requires_grad_(False)
    x, thin = torch.randn(4, 30), layer[0].thin["weight"]
    for _ in range(2):
        layer(x)
    name, latent = next(iter(thin.named_parameters()))
    step = torch.randn_like(latent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own use of torch.jit.script
        with forward_ad.dual_level():
            dual = {f"0.thin.weight.{name}": forward_ad.make_dual(latent.detach(), step)}
            y = torch.func.functional_call(layer, dual, (x,))
            found = forward_ad.unpack_dual(y).tangent
    latent.requires_grad_()
    grad = torch.autograd.grad(layer(x).sum(), latent)[0]
    terms = 4 * 20 * 30 + DECODING  # both are sums over all items, outputs and inputs
    assert_close(found.sum(), (grad * step).sum(), terms, found.abs().sum() + (grad * step).abs().sum())


# ---- Shares of a budget ---------------------------------------------------------------------------------------------


def test_allocation_by_a_power_of_the_size():
    tensors = [Tensor(name, shape) for name, shape in (("a", (400, 400)), ("b", (100, 100)), ("c", (200, 200)))]

    def bits(allocation):
        rules = parse_rules({"model": {"ratio": 0.1, "allocation": allocation}, "rules": {"*": {"method": "hashed"}}})
        return [planned.method.bits() for planned in plan_tensors(rules, tensors)]

    assert bits("flat") == bits(1)
    assert bits("uniform-bytes") == bits(0)
    flat, middle, equal = bits(1), bits(0.5), bits(0)
    # The smallest tensor has 1,000 buckets: whole numbers of them are within a percent, and a permille of all.
    assert [b / (32 * math.prod(t.shape)) for b, t in zip(flat, tensors, strict=True)] == pytest.approx(
        [0.1] * 3, rel=0.01
    )
    assert middle[0] / middle[1] == pytest.approx(4, rel=0.01)
    assert equal[0] == pytest.approx(equal[1], rel=0.01)
    assert sum(flat) == pytest.approx(sum(middle), rel=0.001) == pytest.approx(sum(equal), rel=0.001)
    for wrong in (-0.1, 1.5, True, None, "blind"):
        with pytest.raises(ConfigError, match="allocation"):
            parse_rules({"model": {"ratio": 0.1, "allocation": wrong}})


# ---- Files that hold integers, and lie ------------------------------------------------------------------------------


def stored(rule, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 30, bias=False))
    dt.compress(network, {"model": {"ratio": 0.3}, "rules": {"*": rule}}, init="scratch")
    dt.save(network, tmp_path / "a.thin", format=1)
    return (tmp_path / "a.thin").read_bytes()


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("pruned", lambda e: e["codings"].update(positions=["gaps", 1])),
        ("pruned", lambda e: e["codings"].update(positions=["gaps", 60])),
        ("pruned", lambda e: e["codings"].update(positions=["gaps", True])),
        ("pruned", lambda e: e["codings"].update(positions=["packed", 10])),
        ("pruned", lambda e: e["codings"].update(positions="gaps")),
        ("pruned", lambda e: e.pop("codings")),
        ("pruned", lambda e: e["fields"].update(kept=e["fields"]["kept"] - 1)),
        ("pruned", lambda e: e["fields"].update(kept=601)),
        ("uniform", lambda e: e["fields"].update(width=e["fields"]["width"] - 1)),
        ("uniform", lambda e: e["fields"].update(per="row")),
        ("uniform", lambda e: e["fields"].update(affine=True)),
        ("uniform", lambda e: e["codings"].update(symbols=["gaps", 8])),
        ("hashed", lambda e: e["fields"].update(buckets=10**12)),
        ("kronecker", lambda e: e["fields"].update(left=[0, 4])),
        ("tensor-train", lambda e: e["fields"].update(rows=[1, 1, 1])),
        ("deepthin then 8 bits", lambda e: e["fields"]["inner"].pop("xf")),
        ("deepthin then 8 bits", lambda e: e["fields"]["inner"]["xf"].update(shape=[2, 3])),
        ("deepthin then 8 bits", lambda e: e["fields"].update(outer=3)),
        ("deepthin then 8 bits", lambda e: e.update(method="deepthin then")),
        ("deepthin then 8 bits", lambda e: e.update(method="deepthin then uniform then uniform")),
        ("deepthin then 8 bits", lambda e: e.update(method="uniform then deepthin")),
        ("deepthin then 8 bits", lambda e: e["codings"].update(xf_step=["packed", 8])),
    ],
)
def test_headers_that_lie_about_integers(rule, change, tmp_path):
    data = stored(RULES[rule], tmp_path)
    header = header_of(data)
    change(header["thin"]["0.weight"])
    with pytest.raises(FormatError):
        from_bytes(resign(data, header))


@pytest.mark.parametrize("rule", ["pruned", "uniform", "deepthin then 8 bits", "pruned then 8 bits"])
def test_any_bytes_in_place_of_integers(rule, tmp_path):
    """Whatever stands there, it is read as valid integers or refused."""
    data, rng = bytearray(stored(RULES[rule], tmp_path)), np.random.default_rng(0)
    header = header_of(bytes(data))
    refused = 0
    for _ in range(60):
        changed = bytearray(data)
        start = int.from_bytes(data[:8], "little") + 8
        for place in rng.integers(start, len(data) - 4, 3):
            changed[place] = rng.integers(256)
        try:
            thin = from_bytes(resign(bytes(changed), header)).thin["0.weight"]
        except FormatError:
            refused += 1
            continue
        for entry, kind in thin.method.integers().items():
            values = thin.code[entry].numpy()
            assert kind.least <= values.min() <= values.max() < kind.least + kind.count
            assert not kind.rising or (np.diff(values) > 0).all()
    assert refused > 0 or rule in ("uniform", "deepthin then 8 bits")


# ---- Twist ----------------------------------------------------------------------------------------------------------


def twisted(rule, every=5, schedule=None, steps=20, seed=0, **model):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 10))
    twist = dt.Twist(network, {"model": {"ratio": 0.1, **model}, "rules": {"*": rule}}, every=every, schedule=schedule)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    x, y = torch.randn(64, 40), torch.randint(0, 10, (64,))

    def step():
        _step(network, optimizer, x, y)
        return twist.step()

    return network, twist, step


def _step(network, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(x), y).backward()
    optimizer.step()


@each_rule
def test_distortion_is_decode_of_encode(rule):
    network, twist, step = twisted(rule)
    happened = []
    for _ in range(20):
        happened.append(step())
        weight = network[0].weight.detach().clone()
        if happened[-1]:
            again = copy.deepcopy(network)
            with_same = dt.Twist(again, twist.rules, every=1)
            with_same.step()
            if rule["method"] in ("pruned", "deepthin", "rank", "hashed", "uniform") and "then" not in rule:
                # A decomposition loses some terms of rows and columns times the norm (Golub and Van Loan, section 8.6).
                assert_close(again[0].weight, weight, 60 + 40, torch.linalg.matrix_norm(weight, 2))
    assert happened == [(i + 1) % 5 == 0 for i in range(20)]
    assert type(network[0]) is nn.Linear
    x = torch.randn(3, 40)
    report = twist.finish()
    assert type(network[0]) is dt.ThinLinear
    assert all(math.isfinite(row.error) for row in report.rows)
    assert network(x).shape == (3, 10)


def test_pruning_rises_as_the_equation_says():
    schedule = dt.Rising(10, 50, initial=0.25, power=3)
    network, twist, step = twisted({"method": "pruned"}, every=1, schedule=schedule)
    final = {row.name: row.kept for row in dt.plan(network, twist.rules).rows}
    for t in range(1, 61):
        step()
        for name in ("0.weight", "2.weight"):
            weight = network.get_parameter(name)
            p_f = 1 - final[name] / weight.numel()
            p = p_f + (0.25 - p_f) * (1 - (t - 10) / 40) ** 3 if t < 50 else p_f
            kept = weight.numel() if t < 10 else round(weight.numel() * (1 - p))
            assert int((weight != 0).sum()) == kept, t
    twist.finish()
    assert network[0].thin["weight"].method.kept == final["0.weight"]


def test_other_methods_rise_too():
    network, twist, step = twisted({"method": "rank"}, every=1, schedule=dt.Rising(2, 10))
    ranks = []
    for _ in range(12):
        step()
        # What rounding leaves of the removed singular values: some 60 + 40 roundings of the largest.
        ranks.append(int(torch.linalg.matrix_rank(network[0].weight.detach(), rtol=bound(60 + 40, 1.0))))
    assert ranks[0] == 40
    assert ranks[1:] == sorted(ranks[1:], reverse=True)
    assert ranks[-1] == twist._planned[0].method.rank < 5


@pytest.mark.parametrize("rule", ["pruned", "deepthin"])
def test_a_resumed_twist_goes_on_as_if_nothing_had_happened(rule, tmp_path):
    def run(steps, state=None):
        network, twist, _ = twisted(RULES[rule], every=4, schedule=dt.Rising(3, 15))
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        if state:
            for part, saved in zip((network, twist, optimizer), state, strict=True):
                part.load_state_dict(saved)
        x, y = torch.randn(64, 40, generator=torch.Generator().manual_seed(3)), torch.arange(64) % 10
        for _ in range(steps):
            _step(network, optimizer, x, y)
            twist.step()
        return network, twist, [copy.deepcopy(part.state_dict()) for part in (network, twist, optimizer)]

    whole, twist, _ = run(22)
    twist.finish()
    half, twist, _ = run(13, run(9)[2])
    twist.finish()
    for network, name in ((whole, "a"), (half, "b")):
        dt.save(network, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_twist_refuses():
    network = nn.Sequential(nn.Linear(40, 60))
    with pytest.raises(ConfigError, match="at least 1 step"):
        dt.Twist(network, {"model": {"ratio": 0.1}}, every=0)
    with pytest.raises(ConfigError, match="is invalid: give 0 <= start < end"):
        dt.Rising(5, 5)
    with pytest.raises(BudgetError):
        dt.Twist(network, {"model": {"ratio": 0.0001}})
    with torch.no_grad():
        network[0].weight[1, 2] = math.nan
    twist = dt.Twist(network, {"model": {"ratio": 0.1}}, every=1)
    with pytest.raises(deepthin.NonFiniteError, match=r"0.weight is nan at index \(1, 2\)"):
        twist.step()
