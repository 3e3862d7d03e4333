"""Convolutions by their factors in native code, against torch's of the decoded kernel in double precision."""

import copy
import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deepthin.torch as dt
from deepthin.kernels import products
from deepthin.kernels.costs import convolution_costs
from deepthin.methods.factor import Factor
from deepthin.torch import convolution
from tolerance import absolute, assert_close, bound, largest

needs_native = pytest.mark.skipif(not products.native_available, reason="native code is not there")
LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


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
@settings(max_examples=80, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3), groups=st.sampled_from([1, 1, 2, 3]), seed=st.integers(0, 99))
def test_any_geometry_forward_and_backward(data, dims, groups, seed):
    draw, torch_seed = data.draw, torch.manual_seed(seed)
    del torch_seed

    def sides(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    inputs, outputs, batch = (
        groups * draw(st.integers(1, 5)),
        groups * draw(st.integers(1, 18)),
        draw(st.integers(1, 5)),
    )
    kernel, stride, dilation, padding = sides(1, 4), sides(1, 3), sides(1, 2), sides(0, 2)
    size = tuple(gap * (taps - 1) + extra for gap, taps, extra in zip(dilation, kernel, sides(1, 11), strict=True))
    cols, rank = inputs // groups * math.prod(kernel), draw(st.integers(1, 3))
    n = draw(st.one_of(st.integers(1, cols + 4), st.just(cols)))
    offset = 0 if n == cols else draw(st.integers(0, n - 1))
    x, bias = torch.randn(batch, inputs, *size), torch.randn(outputs)
    xf, wf = torch.randn(-(-(offset + outputs * cols) // n), rank), torch.randn(rank, n)
    operands = [t.double().requires_grad_() for t in (x, xf, wf)]

    def reference(x, xf, wf, bias):
        weight = (xf @ wf).reshape(-1)[offset : offset + outputs * cols].view(outputs, inputs // groups, *kernel)
        return convolution._CONVOLVE[dims](x, weight, bias, stride, padding, dilation, groups)

    y = reference(*operands, bias.double())
    grad = torch.randn(y.shape)
    y.backward(grad.double())
    sums = [t.detach().abs().requires_grad_() for t in operands]
    size_of_y = reference(*sums, bias.double().abs())
    size_of_y.backward(grad.double().abs())
    made = convolution.Geometry(
        kernel, stride, dilation, tuple(p for p in padding[::-1] for _ in "ab"), groups, outputs
    )
    window = convolution.Window(Factor((outputs, cols), n, rank), 0, len(xf), offset)
    numbers = made.numbers(batch, inputs, size, window)
    assert made.sides(size) == tuple(y.shape[2:])
    for fft, threads in itertools.product((False, True), (1, 2)):
        got, grads = torch.full(y.shape, torch.nan), [torch.full(t.shape, torch.nan) for t in (x, xf, wf)]
        at = [t.data_ptr() for t in (x, xf, wf)]
        products.native().convolve(numbers, *at, bias.data_ptr(), got.data_ptr(), fft, 1.0, threads)
        products.native().convolve_backward(numbers, *at, grad.data_ptr(), *(t.data_ptr() for t in grads), fft, threads)
        # by FFT, errors are relative to the largest of a window: the largest of all is an upper bound
        terms = cols + rank + 200
        assert ((got - y).abs() <= bound(terms, size_of_y.max())).all()
        for one, want, most in zip(grads, operands, sums, strict=True):
            assert want.grad is not None
            assert most.grad is not None
            count = terms + y.numel() // outputs * (outputs if one.shape != x.shape else 1)
            assert ((one - want.grad).abs() <= bound(count, most.grad.max())).all()


@needs_native
@pytest.mark.parametrize("fft", [False, True])
def test_results_do_not_depend_on_threads(fft):
    torch.manual_seed(0)
    x, xf, wf = torch.randn(9, 6, 12, 12), torch.randn(197, 2), torch.randn(2, 11)
    made = convolution.Geometry((3, 3), (1, 1), (1, 1), (1,) * 4, 1, 40)
    window = convolution.Window(Factor((40, 54), 11, 2), 0, 197, 0)
    numbers, found = made.numbers(9, 6, (12, 12), window), []
    grad = torch.randn(9, 40, 12, 12)
    for threads in (1, 2, 3):
        y, grads = torch.empty(9, 40, 12, 12), [torch.empty_like(t) for t in (x, xf, wf)]
        at = [t.data_ptr() for t in (x, xf, wf)]
        products.native().convolve(numbers, *at, 0, y.data_ptr(), fft, 1.0, threads)
        products.native().convolve_backward(numbers, *at, grad.data_ptr(), *(t.data_ptr() for t in grads), fft, threads)
        found.append([y, *grads])
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(others, found[0], strict=True))


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
def test_a_lack_of_memory_is_an_exception():
    x, xf, wf, y = torch.randn(1, 3, 8, 8), torch.randn(100, 1), torch.randn(1, 5), torch.empty(1, 16, 6, 6)
    made = convolution.Geometry((3, 3), (1, 1), (1, 1), (0,) * 4, 1, 16)
    numbers = made.numbers(1, 3, (8, 8), convolution.Window(Factor((16, 27), 5, 1), 0, 87, 0))
    at = [t.data_ptr() for t in (x, xf, wf)]
    products.native().fail_allocation_after(0)
    with pytest.raises(MemoryError):
        products.native().convolve(numbers, *at, 0, y.data_ptr(), False, 1.0, 1)
    products.native().fail_allocation_after(-1)
    products.native().convolve(numbers, *at, 0, y.data_ptr(), False, 1.0, 1)
    with pytest.raises(ValueError, match="no possible sizes"):
        products.native().convolve([*numbers[:3], 2, *numbers[4:]], *at, 0, y.data_ptr(), False, 1.0, 1)


GUARDED = """
import ctypes, itertools, mmap, sys
import numpy as np
from deepthin.kernels import products
from deepthin.methods.factor import Factor
from deepthin.torch.convolution import Geometry, Window
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE, kept = mmap.PAGESIZE, []

def guarded(array, at_end):
    pages = -(-max(array.nbytes, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    kept.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert libc.mprotect(base + page * PAGE, PAGE, 0) == 0
    start = (pages + 1) * PAGE - array.nbytes if at_end else PAGE
    copy = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    copy[:] = array
    return copy

rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal(shape).astype("f4")
products.native().select(sys.argv[1])
count = 0
for batch, inputs, outputs, groups, size, kernel, stride, pad, n, rank in [
    (1, 3, 20, 1, (9, 9), (3, 3), (1, 1), 1, 5, 1), (3, 4, 6, 2, (7, 5), (2, 3), (2, 1), 0, 11, 2),
    (2, 2, 33, 1, (40,), (7,), (3,), 2, 14, 1), (5, 1, 4, 1, (3, 3, 3), (3, 3, 3), (1, 1, 1), 0, 8, 3),
]:
    made = Geometry(kernel, stride, (1,) * len(size), (pad,) * 2 * len(size), groups, outputs)
    cols = inputs // groups * int(np.prod(kernel))
    m = -(-(outputs * cols) // n)
    numbers = made.numbers(batch, inputs, size, Window(Factor((outputs, cols), n, rank), 0, m, 0))
    shapes = [(batch, inputs, *size), (m, rank), (rank, n), (outputs,), (batch, outputs, *made.sides(size))]
    for at_end, fft in itertools.product((True, False), (True, False)):
        x, xf, wf, bias, y = (guarded(draw(*shape), at_end) for shape in shapes)
        grad, gx, gxf, gwf = (guarded(draw(*shapes[i]), at_end) for i in (4, 0, 1, 2))
        at = lambda *arrays: [a.ctypes.data for a in arrays]
        products.native().convolve(numbers, *at(x, xf, wf, bias, y), fft, 1.0, 1)
        products.native().convolve_backward(numbers, *at(x, xf, wf, grad, gx, gxf, gwf), fft, 1)
        count += 2
print("untouched", count)
"""


@needs_native
@pytest.mark.parametrize("name", products.isas())
def test_nothing_is_touched_outside_the_arrays(name):
    shown = subprocess.run([sys.executable, "-c", GUARDED, name], capture_output=True, text=True, check=False)
    assert shown.stdout.strip() == "untouched 32", shown.stderr


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
