"""Recurrent layers of Kronecker sums and tensor trains in native code, against torch's with decoded weights."""

import copy

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.kernels import products
from deepthin.torch.recurrent import recurrent
from tolerance import assert_close, largest

pytestmark = pytest.mark.skipif(not products.native_available, reason="no native kernels here")

STEPS, TERMS = 6, 6 * (2 * 60 + 40)  # each step sums inputs, states and what a gate rounds
CORES = {"kronecker": {"method": "kronecker", "ratio": 0.1}, "tensor-train": {"method": "tensor-train", "ratio": 0.05}}
MIXED = {"rules": {"weight_ih*": CORES["kronecker"], "weight_hh*": {"method": "deepthin", "ratio": 0.1}}}
CONFIGURATIONS = {name: {"rules": {"weight*": rule}} for name, rule in CORES.items()} | {"mixed": MIXED}


def pair(kind, configuration, **options):
    """A thin layer, and torch's with the weights decoded from it."""
    torch.manual_seed(0)
    layer = kind(30, 28, **options)
    dt.compress(layer, configuration, init="scratch")
    return layer, dt.materialize(copy.deepcopy(layer))


@pytest.fixture
def chosen(monkeypatch):
    """Native code is used whether it is predicted to be faster or not; the calls are counted."""
    calls = []
    monkeypatch.setattr("deepthin.torch.recurrent_layers.pays", lambda *_: calls.append(1) or True)
    return calls


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True}),
        (nn.RNN, {"bias": False, "batch_first": True}),
        (nn.LSTM, {"num_layers": 2, "dropout": 1e-9}),
    ],
)
def test_a_layer_is_that_of_the_decoded_weights(kind, options, configuration, chosen):
    thin, dense = pair(kind, configuration, **options)
    x = torch.randn(STEPS, STEPS, 30)
    with torch.no_grad():
        for got, want in zip(thin.eval()(x), dense.eval()(x), strict=True):
            for mine, theirs in zip(*((t,) if torch.is_tensor(t) else t for t in (got, want)), strict=True):
                assert_close(mine, theirs, TERMS, torch.ones_like(theirs))
    assert chosen


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gradients_are_those_of_the_decoded_weights(kind, configuration, chosen, monkeypatch):
    thin, _ = pair(kind, configuration, num_layers=2, bidirectional=True)
    found = []
    for _ in range(2):
        x = torch.randn(STEPS, 5, 30, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, _ = thin(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        found.append(torch.autograd.grad(y, [x, *thin.parameters()], grad))
        monkeypatch.setattr("deepthin.torch.recurrent_layers.pays", lambda *_: False)  # decoded
    assert chosen
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, 5 * TERMS, largest(*found[1]))


def test_a_sequence_in_pieces_and_threads_change_no_bit(chosen):
    thin, _ = pair(nn.LSTM, CONFIGURATIONS["kronecker"])
    x = torch.randn(STEPS, 19, 30)
    with torch.no_grad():
        whole, last = thin.eval()(x)
        first, state = thin(x[:2])
        rest, end = thin(x[2:], state)
        assert torch.equal(whole, torch.cat([first, rest]))
        assert all(map(torch.equal, last, end))
        threads = torch.get_num_threads()
        torch.set_num_threads(4)
        again = thin(x)[0]
        torch.set_num_threads(threads)
    assert torch.equal(again, whole)


def test_what_is_not_finite_stays_with_its_sequence(chosen):
    thin, dense = pair(nn.GRU, CONFIGURATIONS["kronecker"])
    x = torch.randn(STEPS, 5, 30)
    with torch.no_grad():
        clean = thin.eval()(x)[0]
        x[2, 3, 4] = torch.nan
        y, want = thin(x)[0], dense.eval()(x)[0]
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y[:, [0, 1, 2, 4]], clean[:, [0, 1, 2, 4]])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_opcheck(kind):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=kind).requires_grad_()  # noqa: E731
    x, h, c = draw(3, 2, 6), draw(1, 2, 4), draw(1, 2, 4)
    chain, factors = [draw(1, 4, 3, 2), draw(2, 4, 2, 1)], [draw(13, 2), draw(2, 5)]  # 16 x 6, and 16 x 4 by rows of 5
    operands = (x, h, c, [*chain, *factors], [draw(16), draw(16)], [-2, 0], "lstm", 1, True)
    torch.library.opcheck(torch.ops.deepthin.recurrent.default, operands)


def test_cores_that_do_not_fit():
    x, h = torch.randn(3, 2, 6), torch.randn(1, 2, 4)
    cores = [torch.randn(1, 2, 3, 2), torch.randn(2, 2, 2, 1)]
    with pytest.raises(ValueError, match=r"are no chain for a matrix of \(4, 6\)"):
        recurrent(x, h, None, [*cores[:1], cores[1][:1], *cores], [], [-2, -2], "tanh", 1)
    with pytest.raises(ValueError, match=r"are no chain for a matrix of \(4, 6\)"):
        recurrent(x, h, None, [cores[0][:, :1], cores[1], *cores], [], [-2, -2], "tanh", 1)
    with pytest.raises(ValueError, match="With 2 offsets"):
        recurrent(x, h, None, cores, [], [-2, -2], "tanh", 1)


def test_a_compiled_graph_has_the_operator(chosen, compiling):
    thin, _ = pair(nn.LSTM, CONFIGURATIONS["kronecker"])
    x, graphs = torch.randn(STEPS, 3, 30), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    y, _ = torch.compile(thin, backend=backend, fullgraph=True)(x)
    assert any("deepthin.recurrent" in str(node.target) for node in graphs[0].graph.nodes)
    assert torch.equal(y, thin(x)[0])
