"""The product with a chain of cores as a torch operator, and layers of Kronecker sums and tensor trains that use it."""

import math

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.kernels import products
from deepthin.torch import multiply
from deepthin.torch.core_operators import core_linear
from deepthin.torch.operators import short_ways
from tolerance import assert_close, largest

native = pytest.mark.skipif(not short_ways, reason="no native calls here")
ROWS, COLS, RANKS = (3, 4), (5, 2), (1, 3, 1)
TERMS = 5 + 2 * 3 + 4  # two sums, their roundings, and the bias


def operands(batch=(9,), cut=2, kind=torch.float32, turned=False):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=kind)  # noqa: E731
    cores = [draw(RANKS[k], ROWS[k], COLS[k], RANKS[k + 1]) for k in range(2)]
    if turned:  # axes in another order, as Kronecker sums have them
        cores[0] = draw(RANKS[1], ROWS[0], COLS[0]).movedim(0, 2)[None]
    rows, cols = math.prod(ROWS) - cut, math.prod(COLS) - 1
    return [draw(*batch, cols), *cores, draw(rows)]


def dense(x, first, second, bias):
    weight = torch.einsum("aijb,bklc->ikjl", first, second).reshape(math.prod(ROWS), math.prod(COLS))
    return x @ weight[: len(bias), : x.shape[-1]].T + bias


def ours(x, first, second, bias, scale=1.0):
    return core_linear(x, [first, second], bias, rows=len(bias), scale=scale)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("batch", [(1,), (2, 5), (0,), (70,)])
def test_the_operator_is_the_dense_layer(batch, turned):
    tensors = operands(batch, turned=turned)
    sums = dense(*(t.double().abs() for t in tensors))
    assert_close(ours(*tensors), dense(*tensors), TERMS, sums)
    assert_close(ours(*tensors[:3], 0 * tensors[3], scale=0.5), dense(*tensors[:3], 0 * tensors[3]) / 2, TERMS, sums)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("batch", [(1,), (3, 11), (200,), (0,)])
def test_gradients_of_all_operands(batch, turned):
    tensors = [t.requires_grad_() for t in operands(batch, turned=turned)]
    y, want = ours(*tensors), dense(*tensors)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, tensors, grad), torch.autograd.grad(want, tensors, grad)
    for mine, theirs in zip(*found, strict=True):
        assert mine.shape == theirs.shape
        assert_close(mine, theirs, math.prod(batch) + 2 * TERMS + math.prod(ROWS) * math.prod(COLS), largest(theirs))


def test_gradients_of_any_order():
    tensors = [t.requires_grad_() for t in operands((3,), kind=torch.float64)]
    assert torch.autograd.gradcheck(ours, tensors)
    assert torch.autograd.gradgradcheck(ours, tensors)


@native
def test_second_gradients_of_the_native_operator():
    tensors = [t.requires_grad_() for t in operands((12,))]
    found = []
    for y in (ours(*tensors), dense(*tensors)):
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, 3 * (12 + 120 + 2 * TERMS), largest(theirs))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [False, True])
def test_opcheck(kind, trained):
    x, first, second, bias = (t.requires_grad_(trained) for t in operands(kind=kind))
    for arguments in [(x, [first, second], bias, 10, 1.0), (x, [first, second], None, 10, 0.5)]:
        torch.library.opcheck(torch.ops.deepthin.core_linear.default, arguments)
    grad, plain = torch.randn(9, 10, dtype=kind), [t.detach() for t in (x, first, second)]
    arguments = (grad, plain[0], plain[1:], 1.0, [True, False, True])
    torch.library.opcheck(torch.ops.deepthin.core_linear_backward.default, arguments)


def test_operands_that_do_not_go_together():
    x, first, second, bias = operands()
    with pytest.raises(ValueError, match=r"are no chain for 10 outputs of 9 inputs"):
        core_linear(x, [first, second[:2]], bias, rows=10)
    with pytest.raises(ValueError, match=r"are no chain for 13 outputs"):
        core_linear(x, [first, second], None, rows=13)
    with pytest.raises(ValueError, match=r"The bias is \(9,\): 10 outputs need \(10,\)"):
        core_linear(x, [first, second], bias[1:], rows=10)
    with pytest.raises(ValueError, match="Cores need four axes with entries"):
        core_linear(x, [first, second[0]], bias, rows=10)
    with pytest.raises(TypeError, match="a product needs one floating type"):
        core_linear(x.double(), [first, second], bias, rows=10)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_take_the_torch_way(kind):
    tensors = [t.to(kind) for t in operands()]
    assert_close(
        ours(*tensors), dense(*(t.double() for t in tensors)), 3 * TERMS, dense(*(t.double().abs() for t in tensors))
    )


def test_views_are_read_as_they_lie():
    """Expanded, sliced and reversed in sign: the cores are copied where their memory is not theirs alone."""
    x, first, second, bias = operands()
    wide = torch.randn(1, 3, 10, 3)
    for core in (wide[:, :, ::2], first[:, :1].expand(1, 3, 5, 3), torch._neg_view(first)):
        want = ours(x, core.clone(), second, bias)
        assert torch.equal(ours(x, core, second, bias), want)
        core = core.clone().requires_grad_()
        assert torch.equal(ours(x, core, second, bias), want)


# ---- Layers ----------------------------------------------------------------------------------------------------------

RULES = {
    "kronecker": {"method": "kronecker", "ratio": 0.05},
    "tensor-train": {"method": "tensor-train", "ratio": 0.02},
    "coded": {"method": "kronecker", "floats": 0.05, "then": {"method": "coded"}},
}


@pytest.fixture(params=RULES.values(), ids=RULES)
def layer(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 290))
    dt.compress(model, {"rules": {"*weight": request.param}}, init="scratch")
    return model[0]


def decoded(layer, x):
    return nn.functional.linear(x, layer.thin["weight"](), layer.bias)


def limits(layer, x):
    """Sums of magnitudes, by the magnitudes of all cores."""
    weight = layer.thin["weight"]
    magnitudes = {entry: t.detach().double().abs() for entry, t in weight.floats().items()}
    whole = weight.decoder.decode(magnitudes, torch) * weight.parts[0].scale
    return nn.functional.linear(x.double().abs(), whole, layer.bias.detach().double().abs())


@native
@pytest.mark.parametrize("batch", [(1,), (8,), (2, 16)])
def test_a_layer_multiplies_by_its_cores(layer, batch):
    x = torch.randn(*batch, 300)
    assert layer.thin["weight"].path(x) == "native-cores"
    layer.eval()
    with torch.no_grad():
        sums, want = limits(layer, x), decoded(layer, x)
        for _ in range(3):  # by the operator, then by a native call
            assert_close(layer(x), want, 700, sums)
        assert layer.thin["weight"]._short_way(x, 0, layer.bias) is not None
    assert layer(x).requires_grad


@native
def test_a_training_has_the_gradients_of_the_decoded_weight(layer):
    layer.train()
    x = torch.randn(32, 300, requires_grad=True)
    grad, wanted = torch.randn(32, 290), [x, *layer.parameters()]
    want = torch.autograd.grad(decoded(layer, x), wanted, grad, allow_unused=True)
    for _ in range(3):
        found = torch.autograd.grad(layer(x), wanted, grad, allow_unused=True)
        for mine, theirs in zip(found, want, strict=True):
            if theirs is not None:
                assert_close(mine, theirs, 32 + 2000, largest(theirs) * 4)
    assert layer.thin["weight"]._trained_way(x, 0, layer.bias) is not None


@native
def test_where_more_is_wanted_than_native_calls_do(layer):
    x = torch.randn(4, 300)
    layer.train()
    for _ in range(2):
        layer(x)
    first = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()), create_graph=True, allow_unused=True)
    second = torch.autograd.grad(
        sum(g.square().sum() for g in first if g is not None), list(layer.parameters()), allow_unused=True
    )
    assert any(g is not None and g.abs().max() > 0 for g in second)
    jacobian = torch.func.jacrev(lambda x: layer(x).sum(0))(x)
    assert jacobian.shape == (290, 4, 300)
    batched = torch.autograd.grad(layer(x).sum(0), layer.bias, torch.eye(290), is_grads_batched=True)
    assert torch.equal(batched[0], 4 * torch.eye(290))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        layer(torch.randn(4, 299))
    assert layer(torch.empty(0, 300)).shape == (0, 290)
    assert layer.double()(x.double()).dtype == torch.float64


@native
def test_a_chain_of_layers_is_one_call():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 290), nn.ReLU(), nn.Linear(290, 280), nn.ReLU(), nn.Linear(280, 10)).eval()
    rules = [RULES["kronecker"], RULES["tensor-train"], {"method": "deepthin", "ratio": 0.2}]
    dt.compress(model, {"rules": {f"{2 * k}.weight": rule for k, rule in enumerate(rules)}}, init="scratch")
    x = torch.randn(5, 300)
    with torch.no_grad():
        want = x
        for module in model:
            want = module(want)
        for module in (model[0], model[2]):
            assert module.thin["weight"]._short_way(torch.randn(5, module.in_features), 0, module.bias) is not None
        for _ in range(3):
            assert torch.equal(model(x), want)


@native
def test_a_compiled_graph_has_the_operator(compiling):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512))
    dt.compress(model, {"rules": {"*weight": {"method": "kronecker", "ratio": 0.01}}}, init="scratch")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(6, 512)
    y = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert any("core_linear" in str(node.target) for node in graphs[0].graph.nodes)
    assert torch.equal(y, model(x))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_exported_graph_has_standard_operations(compiling):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512)).eval()
    dt.compress(model, {"rules": {"*weight": {"method": "kronecker", "ratio": 0.01}}}, init="scratch")
    exported = torch.export.export(model, (torch.randn(6, 512),))
    assert not any("deepthin" in str(node.target) for node in exported.graph.nodes)


def test_without_native_code_the_cores_are_multiplied_in_torch(layer, monkeypatch):
    monkeypatch.setattr(products, "native_available", False)
    x = torch.randn(4, 300)
    paths = {multiply.choose(layer.thin["weight"]._case(x.repeat(n, 1), 0, None)).name for n in (1, 100)}
    assert paths <= {"dense", "factors"}
    assert_close(layer(x), decoded(layer, x), 700, limits(layer, x))
