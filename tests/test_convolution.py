"""Convolutions by their factors in native code, against torch's of the decoded kernel in double precision."""

import copy
import math

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.kernels import products
from deepthin.kernels.costs import convolution_costs
from deepthin.methods.factor import Factor
from deepthin.torch import convolution
from tolerance import absolute, assert_close, largest

needs_native = pytest.mark.skipif(not products.native_available, reason="native code is not there")


@pytest.fixture
def always(monkeypatch):
    """Small layers, too, by their factors; the number of products is counted."""
    calls = []
    monkeypatch.setattr(convolution, "pays", lambda *given: True)
    monkeypatch.setattr(convolution, "_spectra_pay", lambda *given: False)
    apply = convolution._Convolve.apply
    monkeypatch.setattr(convolution._Convolve, "apply", lambda *given: calls.append(1) or apply(*given))
    return calls


def thin(layer, ratio=0.7, **rule):
    """The layer, thin, and a dense twin in double precision with the decoded kernel."""
    network = nn.Sequential(layer)
    rules = {"model": {"ratio": ratio}, "rules": {"*.weight": {"method": "deepthin", **rule}}}
    dt.compress(network, rules, init="scratch", seed=1)
    return network, copy.deepcopy(dt.materialize(copy.deepcopy(network))).double()


@needs_native
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(6, 24, 9, padding=4),
        nn.Conv1d(6, 24, 4, padding="same", dilation=3),
        nn.Conv2d(6, 24, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 24, (5, 2), stride=(2, 1), padding=(2, 1), padding_mode="circular"),
        nn.Conv2d(6, 24, 3, stride=2, groups=2, bias=False),
        nn.Conv3d(3, 24, 3, padding=1, padding_mode="replicate"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [{}, {"rank": 2}, {"then": {"method": "uniform", "bits": 8}}], ids=str)
def test_every_option_of_a_layer_as_with_the_decoded_kernel(layer, rule, always):
    torch.manual_seed(1)
    network, twin = thin(copy.deepcopy(layer), **rule)
    x = torch.randn(3, layer.in_channels, *[13] * (layer.weight.dim() - 2))
    for mode in (True, False):
        network.train(mode)
        given, twice = x.clone().requires_grad_(), x.double().requires_grad_()
        y, want = network(given), twin(twice)
        grad = torch.randn_like(y)
        y.backward(grad)
        want.backward(grad.double())
        most = x.double().abs().requires_grad_()
        sums = absolute(twin)(most)
        sums.backward(grad.double().abs())
        terms = layer.weight[0].numel() + layer.out_channels * math.prod(layer.kernel_size) + 200
        assert y.dtype == torch.float32
        assert y.is_contiguous()
        assert_close(y, want, terms, sums.max().item() * torch.ones(y.shape))
        assert_close(given.grad, twice.grad, terms, largest(most.grad) * torch.ones(x.shape))
        assert torch.equal(network(x[0]), network(x[:1])[0])
    assert len(always) == 6


@needs_native
def test_gradients_of_the_factors_are_those_of_autograd(always):
    torch.manual_seed(2)
    network, _ = thin(nn.Conv2d(4, 12, 3, padding=1), rank=2)
    weight = network[0].thin["weight"]
    x, grad = torch.randn(5, 4, 9, 9), torch.randn(5, 12, 9, 9)
    network(x).backward(grad)
    found = {name: p.grad.clone() for name, p in weight.named_parameters()}
    twice = {name: p.detach().double().requires_grad_() for name, p in weight.named_parameters()}
    size = {name: p.detach().double().abs().requires_grad_() for name, p in weight.named_parameters()}
    for factors, images, outer in ((twice, x.double(), grad.double()), (size, x.double().abs(), grad.double().abs())):
        kernel = (factors["xf"] @ factors["wf"]).reshape(-1)[: 12 * 36].view(12, 4, 3, 3)
        torch.nn.functional.conv2d(images, kernel, padding=1).backward(outer)
    for name, got in found.items():
        assert_close(got, twice[name].grad, 36 + 5 * 81 * 12 + 200, largest(size[name].grad) * torch.ones(got.shape))


@needs_native
def test_layers_with_one_code_for_all(always):
    torch.manual_seed(7)
    network = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 20, 3, groups=2))
    rules = {"model": {"ratio": 0.6}, "rules": {"*.weight": {"method": "deepthin", "group": "flat"}}}
    dt.compress(network, rules, init="scratch")
    assert network[2].thin["weight"].group.kernels[1].first > 0
    twin = dt.materialize(copy.deepcopy(network)).double()
    x = torch.randn(2, 3, 9, 9)
    got, want = network(x), twin(x.double())
    assert len(always) == 2
    assert_close(got, want, 400, absolute(twin)(x.double().abs()).max().item() * torch.ones(want.shape))


@needs_native
def test_gradients_of_gradients(always):
    torch.manual_seed(3)
    network, _ = thin(nn.Conv1d(3, 8, 3, padding=1))
    x = torch.randn(2, 3, 7, requires_grad=True)
    twin = dt.materialize(copy.deepcopy(network))
    for net in (network, twin):
        (slope,) = torch.autograd.grad(net(x).tanh().sum(), x, create_graph=True)
        net.second = torch.autograd.grad(slope.pow(2).sum(), x)[0]
    assert len(always) == 1
    assert_close(network.second, twin.second, 400, largest(twin.second) * torch.ones(x.shape))


@needs_native
def test_many_gradients_at_once(always):
    torch.manual_seed(8)
    network, twin = thin(nn.Conv1d(3, 8, 3, padding=1))
    x, grads = torch.randn(2, 3, 7, requires_grad=True), torch.randn(4, 2, 8, 7)
    (got,) = torch.autograd.grad(network(x), x, grads, is_grads_batched=True)
    twice = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(twin(twice), twice, grads.double(), is_grads_batched=True)
    assert len(always) == 1
    assert_close(got, want, 300, largest(want) * torch.ones(got.shape))


@needs_native
def test_what_is_not_finite_comes_out_as_from_the_decoded_kernel(always):
    torch.manual_seed(4)
    network, twin = thin(nn.Conv2d(3, 16, 3, padding=1))
    network.eval()
    x = torch.randn(2, 3, 10, 10)
    x[0, 1, 4, 4], x[1, 2, 0, 9], x[1, 0, 7, 7] = torch.nan, torch.inf, -torch.inf
    with torch.no_grad():
        y, want = network(x), twin(x.double())
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isposinf(), want.isposinf())
    finite = want.isfinite()
    assert 0 < int(finite.sum()) < finite.numel()
    assert_close(y[finite], want[finite], 300, want[finite].abs().max().item() * torch.ones(int(finite.sum())))


@needs_native
def test_what_native_code_cannot_read_is_left_to_torch(always):
    torch.manual_seed(5)
    network, twin = thin(nn.Conv2d(3, 16, 3))
    x = torch.randn(2, 3, 10, 10)
    want = twin(x.double())
    last = network(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    each = torch.func.vmap(network)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x).dtype == torch.bfloat16
    double = copy.deepcopy(network).double()(x.double())
    assert not always
    for got in (last, each, double):
        assert_close(got.float(), want, 100, want.abs().max().item() * torch.ones(want.shape))
    with pytest.raises(RuntimeError, match="channels"):
        network(torch.randn(2, 4, 10, 10))
    with pytest.raises(RuntimeError, match="Kernel size"):
        network(torch.randn(2, 3, 2, 2))
    assert network(torch.randn(0, 3, 10, 10)).shape == (0, 16, 8, 8)


def test_layers_without_gain_keep_the_decoded_kernel():
    """A depthwise convolution has few outputs for each window, and LeNet-5's first layer few weights."""
    for rows, cols, groups, items in ((64, 9, 64, 32 * 196), (20, 25, 1, 576), (16, 27, 1, 1024)):
        dense, structured = convolution_costs(Factor((rows // groups, cols), 5, 1), groups, items, True)
        assert dense < structured
    dense, structured = convolution_costs(Factor((512, 16384), 51, 1), 1, 8, True)
    assert structured < dense


@needs_native
def test_coded_kernels_loaded_for_evaluation(tmp_path, always):
    torch.manual_seed(6)
    network = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
    rules = {"model": {"file_bytes": 1500}, "rules": {"*": {"method": "deepthin", "then": {"method": "coded"}}}}
    dt.compress(network, rules, init="scratch")
    dt.save(network.eval(), tmp_path / "m.thin")
    loaded = dt.load(
        nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)), tmp_path / "m.thin"
    )
    loaded.eval()
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        got, want = loaded(x), dt.materialize(copy.deepcopy(loaded)).double()(x.double())
    assert len(always) == 2
    assert_close(got, want, 1000, want.abs().max().item() * torch.ones(want.shape))
