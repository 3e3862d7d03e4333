"""The product without the weight, by every way, against the dense product in float64; gradients of both orders."""

import copy
import gc
import importlib
import math
import pkgutil
import typing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepthin.kernels.costs
import deepthin.torch as dt
from deepthin.kernels.costs import choose, costs, fft_length
from deepthin.methods.factor import Factor
from deepthin.torch import multiply, product
from deepthin.torch.product import factor_linear
from tolerance import assert_close

EPS32 = float(np.finfo(np.float32).eps)


@st.composite
def problems(draw):
    """A plan whose n is coprime with the fan-in, as (rows, cols, n, rank), the batch, and a seed."""
    rows, cols, rank = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.integers(1, 3))
    n = draw(st.integers(1, 90).filter(lambda n: math.gcd(n, cols) == 1))
    return (rows, cols, n, rank), draw(st.integers(1, 5)), draw(st.integers(0, 2**32 - 1))


def build(problem):
    """The plan, a batch of inputs and the factors, in float64."""
    (rows, cols, n, rank), batch, seed = problem
    rng = np.random.default_rng(seed)
    method = Factor((rows, cols), n, rank)
    shapes = ((batch, cols), *method.code_shapes().values())
    return method, *(torch.from_numpy(rng.normal(size=shape)) for shape in shapes)


def exact(method, x, xf, wf):
    return x @ method.decode({"xf": xf, "wf": wf}, torch).T


def bound(method, x, xf, wf, path):
    """What float32 may lose: terms of a dot product, or, by FFT, log2 N levels over the energy of the whole item."""
    sizes = exact(method, x.abs(), xf.abs(), wf.abs())
    if path == "direct":
        return (2 * method.n + method.shape[1] // method.n + method.rank + 10) * EPS32 * sizes
    energy = x.norm(dim=1, keepdim=True) * wf.norm() * xf.abs().sum()
    return 8 * math.log2(2 * method.n + 2 * method.shape[1] + 4) * EPS32 * energy


@given(problems(), st.sampled_from(["direct", "fft"]))
def test_product_is_the_dense_product(problem, path):
    method, x, xf, wf = build(problem)
    y = factor_linear(method, x.float(), xf.float(), wf.float(), path)
    assert y.dtype == torch.float32
    assert y.shape == (len(x), method.shape[0])
    assert ((y.double() - exact(method, x, xf, wf)).abs() <= bound(method, x, xf, wf, path) + 1e-30).all()


@given(problems(), st.sampled_from(["direct", "fft"]))
def test_gradients_are_those_of_the_dense_product(problem, path):
    method, *tensors = build(problem)
    tensors = [t.requires_grad_() for t in tensors]
    y = factor_linear(method, *tensors, path)
    reference = exact(method, *tensors)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # A gradient multiplies two of the operands and the output's: no product is above those of their norms.
    norms = math.prod(1 + t.detach().abs().sum().item() for t in (*tensors[1:], tensors[0].norm(), grad.norm()))
    terms = sum(x.numel() for x in tensors) + 8 * 3 * math.log2(2 * method.n + 2 * method.shape[1] + 4)
    for ours, theirs in zip(
        torch.autograd.grad(y, tensors, grad), torch.autograd.grad(reference, tensors, grad), strict=True
    ):
        assert_close(ours, theirs, terms, norms)


@pytest.mark.parametrize("path", ["direct", "fft"])
def test_gradcheck_of_both_orders(path):
    method = Factor((5, 7), 4, 2)
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 7), *method.code_shapes().values())
    inputs = tuple(torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(lambda *t: factor_linear(method, *t, path), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: factor_linear(method, *t, path), inputs)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_are_not_wanted_are_not_made(needed):
    method = Factor((5, 7), 4, 2)
    tensors = [
        torch.randn(shape, requires_grad=wanted)
        for shape, wanted in zip(((3, 7), *method.code_shapes().values()), needed, strict=True)
    ]
    factor_linear(method, *tensors, "fft").sum().backward()
    assert [t.grad is not None for t in tensors] == list(needed)


def test_rank_factorisation_is_two_products():
    method = Factor((6, 9), 9, 2)
    x, xf, wf = torch.randn(4, 9), torch.randn(6, 2), torch.randn(2, 9)
    sizes = x.abs() @ (xf.abs() @ wf.abs()).T
    assert_close(factor_linear(method, x, xf, wf, "factors"), x @ (xf @ wf).T, 9 + 2, sizes)


def test_leading_dimensions_and_strides():
    method = Factor((6, 9), 4, 1)
    xf, wf = (torch.randn(shape) for shape in method.code_shapes().values())
    x = torch.randn(9, 2, 5).permute(2, 1, 0)  # 5 x 2 x 9, not contiguous
    for path in ("direct", "fft"):
        y = factor_linear(method, x, xf, wf, path)
        assert y.shape == (5, 2, 6)
        want = exact(method, x.double(), xf.double(), wf.double())
        most = bound(method, x.reshape(10, 9).double(), xf.double(), wf.double(), path)
        assert ((y - want).abs() <= most.view(5, 2, -1)).all()
    assert factor_linear(method, x[0, 0], xf, wf, "fft").shape == (6,)


@pytest.mark.parametrize("path", ["direct", "fft"])
def test_a_huge_item_leaves_its_batch_mates_intact(path):
    """KERNELS: two items in one complex FFT would spoil each other; each item has its own."""
    method = Factor((60, 90), 7, 1)
    xf, wf = (torch.randn(shape) for shape in method.code_shapes().values())
    x = torch.randn(2, 90)
    alone = factor_linear(method, x[1:], xf, wf, path)
    x[0] *= 1e6
    most = 2 * bound(method, x[1:].double(), xf.double(), wf.double(), path)  # of both
    assert ((factor_linear(method, x, xf, wf, path)[1:] - alone).abs() <= most).all()


@pytest.mark.parametrize("path", ["direct", "fft"])
def test_nan_reaches_the_output(path):
    method = Factor((6, 9), 4, 1)
    xf, wf = (torch.randn(shape) for shape in method.code_shapes().values())
    x = torch.randn(3, 9)
    x[1, 4] = math.nan
    y = factor_linear(method, x, xf, wf, path)
    assert y[1].isnan().any()
    assert not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(kind):
    method = Factor((60, 90), 7, 1)
    x, xf, wf = (torch.randn(shape).to(kind) for shape in ((3, 90), *method.code_shapes().values()))
    y = factor_linear(method, x, xf, wf, "fft")
    assert y.dtype == kind
    reference = exact(method, x.double(), xf.double(), wf.double())
    limit = torch.finfo(kind).eps * reference.abs() + bound(method, x.double(), xf.double(), wf.double(), "fft")
    assert ((y.double() - reference).abs() <= limit).all()


def test_the_choice_follows_the_predicted_cost():
    big = Factor((2048, 2048), 103, 1)
    assert choose(big, 128, dense_ready=False) in ("fft", "direct")
    assert choose(big, 128, dense_ready=True) in ("fft", "direct")
    assert choose(Factor((10, 100), 13, 1), 1, dense_ready=True) == "dense"
    assert choose(Factor((2048, 2048), 2048, 4), 128, dense_ready=True) == "factors"
    assert choose(Factor((2048, 2048), 64, 1), 128, dense_ready=True) == "dense"  # gcd(n, fan-in) = 64: no phases
    assert choose(Factor((2048, 2048), 103, 1, seed=1), 128, dense_ready=True) == "dense"
    for ready in (False, True):
        predicted = costs(big, 32, ready)
        assert predicted[choose(big, 32, ready, native=True)] == min(predicted.values())
        assert choose(big, 32, ready) in ("fft", "direct")
    assert choose(big, 128, dense_ready=False, native=True) == "native-fft"
    assert choose(Factor((2048, 2048), 31, 1), 128, dense_ready=True, native=True) == "native-direct"
    assert choose(Factor((2048, 2048), 2048, 4), 1, dense_ready=True, native=True) == "native-direct"


def test_tables_first_made_in_inference_mode_serve_training():
    method = Factor((37, 41), 6, 1)
    xf, wf = (torch.randn(shape, requires_grad=True) for shape in method.code_shapes().values())
    x = torch.randn(3, 41)
    with torch.inference_mode():
        factor_linear(method, x, xf, wf, "fft")
    factor_linear(method, x, xf, wf, "fft").sum().backward()
    assert xf.grad is not None


def test_tables_live_as_long_as_the_weights_that_use_them():
    """Not in a cache of the process: on a GPU they are as large as the outputs of a layer."""
    before = len(product._alive)
    model = torch.nn.Sequential(torch.nn.Linear(301, 203, bias=False), torch.nn.Linear(203, 151, bias=False))
    dt.compress(model, {"model": {"ratio": 0.05}}, init="scratch")
    model.double()  # for which there is no native code
    x = torch.randn(2000, 301, dtype=torch.float64)
    for layer in model:
        weight = layer.thin["weight"]
        window = weight.plans[0]
        multiply.Factored("fft").run(weight, torch.randn(3, window.plan.shape[1], dtype=torch.float64), 0, None)
    first = dict(product._alive)
    assert len(first) == before + 2
    del first
    other = copy.deepcopy(model)
    multiply.Factored("fft").run(other[0].thin["weight"], x, 0, None)
    gc.collect()
    assert len(product._alive) == before + 2  # shared between weights of one plan
    del model, layer, weight
    gc.collect()
    assert len(product._alive) == before + 1
    del other
    gc.collect()
    assert len(product._alive) == before
    method = Factor((37, 43), 6, 1)
    factors = [torch.randn(shape) for shape in method.code_shapes().values()]
    factor_linear(method, torch.randn(3, 43), *factors, "direct")
    assert len(product._alive) == before + 1
    del factors
    gc.collect()
    assert len(product._alive) == before


def test_nothing_of_torch_is_kept_by_a_cache_of_the_process():
    """The kind: functools caches of the torch room return plain numbers and values, never tensors."""
    found = {}
    for info in pkgutil.iter_modules(deepthin.torch.__path__, "deepthin.torch."):
        module = importlib.import_module(info.name)
        found |= {f"{info.name}.{name}": f for name, f in vars(module).items() if hasattr(f, "cache_info")}
    kinds = {name: typing.get_type_hints(f.__wrapped__)["return"] for name, f in found.items()}
    assert kinds
    costs_of = dict[deepthin.kernels.costs.Path, float], deepthin.kernels.costs.Path
    assert set(kinds.values()) <= {int, bool, multiply.Way, *costs_of}, kinds


@given(st.integers(1, 5000))
def test_fft_length(least):
    length = fft_length(least)
    rest = length
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    assert rest == 1
    assert length >= least
    assert length % 2 == 0
    assert length <= max(2 * least, 2)
