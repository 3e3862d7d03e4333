"""Thin recurrent layers in torch: native code against decoded weights, gradients, graphs, states handed on."""

import copy
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import deepthin.torch as dt
from deepthin.kernels import costs, products
from deepthin.kernels.recurrent import CELLS, gates_of
from deepthin.methods.factor import Factor
from deepthin.torch import multiply
from deepthin.torch.recurrent import pays, recurrent
from deepthin.torch.recurrent_layers import ThinRecurrent
from tolerance import assert_close, bound, largest

native = pytest.mark.skipif(not products.native_available, reason="no native kernels here")
OPERATOR = torch.ops.deepthin.recurrent.default
# Terms of the sums behind one output, at the most: of 7 steps through 3 layers of 16 + 16 + 8 (or 2 of 28 + 14 + 8),
# and of a gradient: as many back, and over steps, items and what one factor serves.
TERMS = 7 * 3 * (16 + 16 + 8)
GRADIENT = 2 * TERMS + 7 * 6 + 100
KINDS = [nn.LSTM, nn.GRU, nn.RNN, lambda *sizes, **rest: nn.RNN(*sizes, nonlinearity="relu", **rest)]


def operands(cell, steps=6, batch=3, inputs=9, hidden=14, layers=2, directions=2, n=5, rank=2, kind=torch.float32):
    """x, h, c or none, the factors and the biases."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(kind)  # noqa: E731
    rows, factors, biases = gates_of(cell) * hidden, [], []
    for number in range(2 * layers * directions):
        cols = hidden if number % 2 else inputs if number < 2 * directions else directions * hidden
        factors += [draw(-(-rows * cols // n), rank), draw(rank, n) / (rank * cols) ** 0.5]
        biases.append(draw(rows))
    h = draw(layers * directions, batch, hidden)
    return draw(steps, batch, inputs), h, draw(*h.shape) if cell == "lstm" else None, factors, biases


def flat(x, h, c, factors, biases):
    return [x, h, *([] if c is None else [c]), *factors, *biases]


def trained(problem):
    return [None if o is None else o.clone().requires_grad_() if isinstance(o, torch.Tensor) else
            [t.clone().requires_grad_() for t in o] for o in problem]  # fmt: skip


def loss_of(outputs):
    return sum(
        (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs if t is not None
    )


def layer(kind, decoded=False, ratio=0.3, **options):
    """A thin layer; ``decoded``: the one that torch's own code runs."""
    torch.manual_seed(0)
    model = kind(11, 16, **options)
    dt.compress(model, {"model": {"ratio": ratio}, "rules": {"*": {"method": "deepthin", "rank": 2}}}, init="scratch")
    return model


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Native code also where decoded weights are faster: the layers here are small."""
    monkeypatch.setattr("deepthin.torch.recurrent_layers.pays", lambda *_: True)


@pytest.fixture
def decoded(monkeypatch):
    """Switches native layers off."""

    def off():
        monkeypatch.setattr(ThinRecurrent, "_is_plain", lambda self, input: False)

    return off


@native
@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients_are_those_of_double_precision(cell, batch):
    problem = trained(operands(cell, batch=batch))
    exact = trained(
        [None if o is None else o.detach().double() if isinstance(o, torch.Tensor) else [t.detach().double() for t in o]
         for o in problem]
    )  # fmt: skip
    results = []
    for own in (problem, exact):
        found = recurrent(*own, [0] * 8, cell, 2)
        results.append((found, torch.autograd.grad(loss_of(found), flat(*own))))
    for got, want in zip(itertools.chain(*results[0]), itertools.chain(*results[1]), strict=True):
        if want is not None:
            assert (got - want).norm() <= bound(GRADIENT, want.norm())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_of_gradients(cell):
    """Penalties on gradients train: both orders, against double precision."""
    found = []
    for kind in (torch.float32, torch.float64):
        own = trained(operands(cell, kind=kind, layers=1))
        y = recurrent(*own, [0] * 4, cell, 2)[0]
        first = torch.autograd.grad(y.square().sum(), own[0], create_graph=True)[0]
        found.append(torch.autograd.grad(first.square().sum(), own[3])[1])
    assert (found[0] - found[1]).norm() <= bound(2 * GRADIENT, found[1].norm())


@pytest.mark.parametrize(
    ("cell", "kind", "keep"),
    [
        pytest.param(
            cell, kind, keep, marks=() if cell == "lstm" or (kind == torch.float32 and keep) else pytest.mark.slow
        )
        for cell, kind, keep in itertools.product(CELLS, (torch.float32, torch.float64), (False, True))
    ],
)
def test_opcheck(cell, kind, keep):
    x, h, c, factors, biases = trained(operands(cell, kind=kind)) if keep else operands(cell, kind=kind)
    torch.library.opcheck(OPERATOR, (x, h, c, factors, biases, [0] * 8, cell, 2, keep))


def test_operands_that_do_not_go_together():
    x, h, c, factors, biases = operands("lstm")
    for change, reason in [
        ({"cell": "elman"}, "must be one of"),
        ({"h": h[:1]}, "three dimensions"),
        ({"h": h[:, :2]}, "as many sequences"),
        ({"factors": factors[:-1]}, "factors"),
        ({"factors": [factors[0][1:], *factors[1:]]}, "needs an xf of"),
        ({"x": x[:0]}, "may not be empty"),
        ({"offsets": [9] * 8}, "are matrices"),
        ({"c": None}, "a state c"),
        ({"c": c[:, :1]}, "a state c"),
        ({"biases": biases[:1]}, "as many biases"),
        ({"biases": [b[1:] for b in biases]}, "as many biases"),
    ]:
        named = {"x": x, "h": h, "c": c, "factors": factors, "biases": biases, "offsets": [0] * 8, "cell": "lstm"}
        with pytest.raises(ValueError, match=reason):
            recurrent(**(named | change), directions=2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_returns_what_torch_returns_with_decoded_weights(kind, batch_first, bidirectional, bias, decoded):
    model = layer(kind, num_layers=3, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    whole, single = torch.randn(4, 6, 11), torch.randn(7, 11)
    places = 6 if bidirectional else 3
    states = [torch.randn(places, 6 if not batch_first else 4, 16) for _ in range(2)]
    given = tuple(states) if kind is nn.LSTM else states[0]
    calls = [(whole,), (whole, given), (single,)]
    found = [[model(*call) for call in calls]]
    decoded()
    found.append([model(*call) for call in calls])
    flatten = lambda results: [t for y, s in results for t in (y, *(s if isinstance(s, tuple) else [s]))]  # noqa: E731
    for got, want in zip(*map(flatten, found), strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert_close(got, want, TERMS, max(1.0, largest(want)))


@native
@pytest.mark.parametrize("kind", KINDS)
def test_frame_by_frame_is_the_whole_sequence_to_the_bit(kind):
    """States in, states out, in evaluation and in pieces of any length."""
    for batch in (1, 3, 20):
        model, x = layer(kind, num_layers=2).eval(), torch.randn(30, batch, 11)
        with torch.no_grad():
            want, last = model(x)
            for piece in (1, 4):
                states, parts = None, []
                for part in x.split(piece):
                    y, states = model(part, states)
                    parts.append(y)
                assert torch.equal(torch.cat(parts), want)
                for got, end in zip(*(s if isinstance(s, tuple) else (s,) for s in (states, last)), strict=True):
                    assert torch.equal(got, end)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_is_torchs(kind):
    """In training alone; states and gradients are those of all layers."""
    model = layer(kind, num_layers=2, dropout=0.5)
    x = torch.randn(5, 4, 11)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    states = model.train()(x)[1]
    assert all(state.shape == (2, 4, 16) for state in (states if isinstance(states, tuple) else [states]))
    torch.manual_seed(1)
    loss_of([model(x)[0]]).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("wrong", [torch.randn(2, 3, 12), torch.randn(2, 3, 4, 11), torch.randint(5, (2, 3, 11))])
def test_wrong_inputs_get_torchs_error(wrong):
    own, plain = layer(nn.LSTM), nn.LSTM(11, 16)
    errors = []
    for model in (own, plain):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            model(wrong)
        errors.append(str(raised.value).splitlines()[0])
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "states", [(torch.zeros(1, 2, 16),) * 2, (torch.zeros(1, 3, 15),) * 2, (torch.zeros(3, 16),) * 2]
)
def test_wrong_states_get_torchs_error(states):
    errors = []
    for model in (layer(nn.LSTM), nn.LSTM(11, 16)):
        with pytest.raises(RuntimeError) as raised:
            model(torch.randn(2, 3, 11), states)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_packed_sequences_and_projections_take_torchs_way():
    model = layer(nn.LSTM)
    packed = pack_sequence([torch.randn(5, 11), torch.randn(2, 11)])
    y, lengths = pad_packed_sequence(model(packed)[0])
    assert y.shape == (5, 2, 16)
    assert lengths.tolist() == [5, 2]
    assert layer(nn.LSTM, proj_size=4)(torch.randn(3, 2, 11))[0].shape == (3, 2, 4)


@native
def test_a_rounded_code_trains_through_its_rounding(decoded):
    torch.manual_seed(0)
    model = nn.GRU(11, 16)
    rule = {"method": "deepthin", "rank": 4, "then": {"method": "uniform", "bits": 8}}
    dt.compress(model, {"model": {"ratio": 0.2}, "rules": {"*": rule}}, init="scratch")
    x, grads = torch.randn(7, 5, 11), []
    for switch in (lambda: None, decoded):
        switch()
        model.zero_grad()
        loss_of([model(x)[0]]).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        assert_close(got, want, GRADIENT, largest(want))


@native
@pytest.mark.parametrize("group", ["flat", "rows"])
def test_a_group_of_gate_matrices(group, decoded):
    """Each has its place in the group's factors, its scale, and its share of the gradient."""
    torch.manual_seed(0)
    model = nn.LSTM(16, 16, num_layers=2)
    rule = {"method": "deepthin", "rank": 2, "group": group}
    dt.compress(model, {"model": {"ratio": 0.2}, "rules": {"*": rule}}, init="scratch")
    x, found = torch.randn(6, 3, 16), []
    for switch in (lambda: None, decoded):
        switch()
        model.zero_grad()
        y = model(x)[0]
        loss_of([y]).backward()
        found.append([y, *(p.grad.clone() for p in model.parameters())])
    for got, want in zip(*found, strict=True):
        assert_close(got, want, GRADIENT, largest(want))


@native  # without native code it is torch's own layer, whose types vary
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_autocast_returns_what_torch_returns(kind):
    model, x = layer(kind), torch.randn(4, 3, 11)
    want = model(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, states = model(x)
    assert y.dtype == torch.bfloat16
    assert all(s.dtype == torch.bfloat16 for s in (states if isinstance(states, tuple) else [states]))
    # Sums are in float32: what is rounded to bfloat16 is weights, inputs, states, gates and outputs, below one.
    assert (y - want).abs().max() <= bound(5, 1.0, "bfloat16")
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@native
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_compiled_layer_is_one_graph_with_the_operator_and_gradients(kind, compiling):
    model, x, calls = layer(kind, num_layers=2), torch.randn(4, 3, 11), []

    def backend(graph, _):
        calls.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    want = model(x)[0]
    grads = torch.autograd.grad(loss_of([want]), list(model.parameters()))
    y = torch.compile(lambda x: model(x)[0], backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, want)
    again = torch.autograd.grad(loss_of([y]), list(model.parameters()))
    for got, wanted in zip(again, grads, strict=True):
        assert_close(got, wanted, GRADIENT, largest(wanted))
    torch.compile(lambda x: model(x)[0], backend=backend, fullgraph=True)(x)
    assert any("deepthin.recurrent" in str(target) for target in calls[0])


def test_an_exported_layer_needs_no_library():
    model, x = layer(nn.GRU).eval(), torch.randn(4, 3, 11)
    program = torch.export.export(model, (x,))
    assert not any("deepthin" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(x)[0], model(x)[0], TERMS, 1.0)


@native
def test_gradients_that_do_not_go_together():
    x, h, c, factors, biases = operands("lstm")
    y, last, last_c, reserve = OPERATOR(x, h, c, factors, biases, [0] * 8, "lstm", 2, True)
    wanted = [True] * (3 + 16 + 8)
    for place, wrong in [(0, y[1:]), (1, last[:1]), (2, last_c[:1]), (6, y[1:]), (7, reserve[1:])]:
        given = [y, last, last_c, x, h, c, y, reserve]
        given[place] = wrong
        with pytest.raises(ValueError, match="shapes|reserve"):
            torch.ops.deepthin.recurrent_backward(*given, factors, biases, [0] * 8, "lstm", 2, wanted)


class Direct(nn.Module):
    """The operator in a module of one's own."""

    def __init__(self):
        super().__init__()
        _, _, _, factors, biases = operands("lstm", layers=1, directions=1)
        self.factors, self.biases = nn.ParameterList(factors), nn.ParameterList(biases)

    def forward(self, x):
        state = x.new_zeros(1, x.shape[1], 14)
        return recurrent(x, state, state, list(self.factors), list(self.biases), [0, 0], "lstm", 1)[0]


def test_the_operator_exports_with_a_dynamic_batch_and_trains(compiling):
    model, x = Direct(), torch.randn(6, 3, 9)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("batch")},))
    assert "deepthin.recurrent" in str(program.graph)
    for batch in (1, 3, 20):
        x, found = torch.randn(6, batch, 9), []
        for own in (model, program.module()):
            y = own(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(own.parameters()))])
        for got, want in zip(*found, strict=True):
            assert_close(got, want, GRADIENT + 6 * batch, max(1.0, largest(want)))


@native
def test_threads_and_other_callers_do_not_change_a_bit():
    model, x = layer(nn.LSTM, num_layers=2, bidirectional=True).eval(), torch.randn(12, 40, 11)
    threads, wrong = torch.get_num_threads(), []
    with torch.no_grad():
        want = model(x)[0]
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(model(x)[0], want)
    torch.set_num_threads(threads)

    def call():
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if not torch.equal(model(x)[0], want))

    workers = [threading.Thread(target=call) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@native
def test_a_weight_that_changes_is_seen_at_once():
    model, x = layer(nn.LSTM).eval(), torch.randn(5, 2, 11)
    with torch.no_grad():
        before = model(x)[0]
        model.thin["weight_hh_l0"].wf.mul_(2)
        after = model(x)[0]
        other = copy.deepcopy(model)
        assert not torch.equal(before, after)
        assert torch.equal(other(x)[0], after)


def test_models_under_transforms_of_torch_func():
    """Gradients for each item, by decoded weights."""
    model, x = layer(nn.GRU), torch.randn(3, 2, 11)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))[0].square().sum()

    want = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    got = torch.func.grad(loss)(parameters, x)
    for one, other in zip(got.values(), want, strict=True):
        assert_close(one, other, GRADIENT, largest(other))


def test_the_faster_way_is_taken_whatever_the_length():
    """Thin matrices by their factors, thick ones by the weight."""
    large, thick = Factor((4096, 1024), 101, 1), Factor((64, 16), 3, 9)
    for training in (False, True):
        assert pays((large, large), 1, training)
        assert pays((large, large), 32, training)
        assert not pays((thick, thick), 64, training)


@pytest.mark.parametrize("training", [False, True])
def test_a_refit_of_costs_reaches_every_choice(training, monkeypatch):
    """The kind: a number of the fit that is written down a second time would not follow."""
    method = Factor((2048, 2048), 60, 1)
    caches = (pays, multiply._factored, multiply._least, multiply.operator_pays, costs.choose, costs.choose_native)
    window = method.window(0, method.shape)
    case = multiply.Case(method, window, 32, not training, native=True)

    def choices():
        for cache in caches:
            cache.cache_clear()
        return [
            pays((method, method), 4, training),
            multiply.choose(case).name != "dense",
            costs.choose(method, 32, not training, native=True) != "dense",
            multiply.operator_pays(window),
        ]

    try:
        for times in (1e-6, 1e6):
            fitted = {
                ready: {**ways, "dense": tuple(times * number for number in ways["dense"])}
                for ready, ways in costs._NANOSECONDS.items()
            }
            with monkeypatch.context() as patch:
                patch.setattr(costs, "_NANOSECONDS", fitted)
                assert choices() == [times > 1] * 4
    finally:
        choices()  # by the fit as it is
