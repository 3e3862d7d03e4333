"""One native call in a module's place: the same bits, every change seen, the usual way wherever more has to run."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import fx, nn

import deepthin.torch as dt
from deepthin.torch.evaluated import decoded
from deepthin.torch.layers import ThinLinear
from deepthin.torch.operators import short_ways

pytestmark = [
    pytest.mark.skipif(not short_ways, reason="no native calls here"),
    pytest.mark.filterwarnings("ignore:The relative error"),
]

UNIFORM = {"method": "uniform", "bits": 8}
RULES = {
    "fp32": {"*weight": {"rank": 1, "ratio": 0.05}},
    "rank 4": {"*weight": {"rank": 4, "ratio": 0.1}},
    "uniform": {"*weight": {"rank": 1, "ratio": 0.05, "then": UNIFORM}},
    "coded": {"*weight": {"rank": 4, "floats": 0.1, "then": {"method": "coded"}}},
    "thin bias": {"*weight": {"rank": 1, "ratio": 0.05}, "*bias": UNIFORM},
    "all coded": {"*": {"rank": 4, "floats": 0.1, "then": {"method": "coded"}}, "*bias": {"method": "coded"}},
    "group": {"*weight": {"rank": 1, "ratio": 0.05, "group": "flat"}},
}
each_rule = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


def pair(rules):
    """Two thin layers, not an nn.Sequential, with biases that are not zero."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(200, 256), nn.Linear(256, 300)])
    for layer in model:
        nn.init.normal_(layer.bias)
    dt.compress(model, {"rules": rules}, init="trained" if "*bias" in rules else "scratch")
    return model.eval()


def ordinary(layer, x):
    """The result by torch's own call, with nothing computed before."""
    with torch.no_grad():
        return nn.Module.__call__(copy.deepcopy(layer), x)


def native(layer, x):
    """The result of the native call alone, or none."""
    y = layer._native(layer, x)
    return None if y is NotImplemented else y


@pytest.fixture
def ready():
    layer, x = pair(RULES["coded"])[1], torch.randn(3, 256)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        assert native(layer, x) is not None
        yield layer, x


@each_rule
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batch", [(1,), (9,), (2, 4), (), (0,)])
def test_the_same_bits(rules, mode, batch):
    for layer in pair(rules):
        x = torch.randn(*batch, layer.in_features)
        want = ordinary(layer, x)
        with mode():
            for _ in range(3):
                y = layer(x)
                assert torch.equal(y, want)
                assert y.shape == want.shape
                assert y.is_contiguous()
            assert 0 in batch or torch.equal(native(layer, x), want)


def test_results_are_ordinary_tensors(ready):
    layer, x = ready
    y, other = native(layer, x), native(layer, x)
    want = other.clone()
    assert y.data_ptr() % 64 == 0
    y.mul_(2)
    y[:, 0] = 0
    assert torch.equal(other, want)
    again = other.view(-1)[5:].requires_grad_()
    with torch.enable_grad():
        again.sum().backward()
    assert torch.equal(again.grad, torch.ones_like(again))
    view = other.t()
    del other
    assert torch.equal(view, want.t())


def swap_weight(layer):
    layer.thin["weight"] = pair(RULES["rank 4"])[1].thin["weight"]


def reverse_code(layer):
    weight = layer.thin["weight"]
    weight.set_code({e: t.flip(0) if e.endswith("symbols") else t for e, t in weight.code().items()})


CHANGES = {
    "in place": lambda layer: layer.thin["weight"].xf.mul_(2),
    "step": lambda layer: (
        layer.thin["weight"]._parameters[next(p for p in layer.thin["weight"]._parameters if "step" in p)].add_(1)
    ),
    "bias": lambda layer: layer.bias.data.add_(1),
    "parameter": lambda layer: setattr(layer.thin["weight"], "wf", nn.Parameter(layer.thin["weight"].wf * 3)),
    "memory": lambda layer: setattr(layer.thin["weight"].wf, "data", layer.thin["weight"].wf * 3),
    "weight": swap_weight,
    "code": reverse_code,
    "forward": lambda layer: setattr(layer, "forward", lambda x: torch.zeros(len(x), 300)),
    "product": lambda layer: setattr(layer.thin["weight"], "product", lambda *_, **__: torch.zeros(3, 300)),
    "hook": lambda layer: layer.register_forward_hook(lambda *_: torch.zeros(3, 300)),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(ready, change):
    layer, x = ready
    before = layer(x)
    change(layer)
    want = ordinary(layer, x)
    for _ in range(3):
        assert torch.equal(layer(x), want)
    assert not torch.equal(before, want)


def test_the_call_comes_back(ready):
    layer, x = ready
    handle = layer.register_forward_hook(lambda *_: None)
    assert native(layer, x) is None
    handle.remove()
    assert native(layer, x) is not None
    swap_weight(layer)
    for _ in range(3):
        layer(x)
    assert native(layer, x) is not None
    layer.train()
    layer(x)
    assert native(layer, x) is None
    layer.eval()
    for _ in range(2):
        layer(x)
    assert native(layer, x) is not None


def test_hooks_of_all_modules_are_called(ready):
    layer, x = ready
    calls = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: calls.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    layer(x)
    assert calls == [layer]


def test_classes_that_are_patched(ready, monkeypatch):
    layer, x = ready
    with monkeypatch.context() as patched:
        patched.setattr(ThinLinear, "forward", lambda self, x: "forward")
        assert layer(x) == "forward"
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "__call__", lambda self, x: "call")
        assert layer(x) == "call"
    assert native(layer, x) is not None


def test_a_compiled_layer_runs_what_was_compiled(ready, monkeypatch):
    layer, x = ready
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: "compiled")
    layer.compile()
    assert layer(x) == "compiled"


def test_a_layer_that_is_called_with_a_constant_is_traced(ready):
    layer, x = ready

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, y):
            return y + self.layer(x)

    graph = fx.symbolic_trace(Sum())
    assert torch.equal(graph(torch.ones(3, 300)), 1 + layer(x))


@pytest.mark.parametrize("rules", [RULES["fp32"], RULES["thin bias"]], ids=["dense bias", "thin bias"])
def test_a_gradient_is_computed_where_it_is_wanted(rules):
    layer = pair(rules)[0]
    x = torch.randn(3, 200)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    frozen = layer.requires_grad_(False)
    frozen(x)
    assert native(frozen, x) is not None
    assert native(frozen, x.requires_grad_()) is None
    assert frozen(x).requires_grad


def test_a_bias_that_is_a_plain_tensor(ready):
    layer, x = ready
    bias = layer._parameters.pop("bias").detach()
    layer.bias = 2 * bias
    assert native(layer, x) is None
    assert torch.equal(layer(x), ordinary(layer, x))
    del layer.bias
    layer.bias = None
    assert torch.equal(layer(x), ordinary(layer, x))
    assert torch.equal(native(layer, x), layer(x))


@pytest.mark.parametrize(
    "x", [torch.randn(3, 255), torch.randn(3, 256).double(), torch.ones(3, 256).long(), torch.tensor(1.0), None]
)
def test_inputs_that_do_not_fit_raise_as_ever(ready, x):
    layer, _ = ready
    with pytest.raises((RuntimeError, TypeError, AttributeError, IndexError)) as raised:
        nn.Module.__call__(layer, x)
    with pytest.raises(type(raised.value)):
        layer(x)


def test_named_arguments(ready):
    layer, x = ready
    assert torch.equal(layer(input=x), layer(x))
    with pytest.raises(TypeError):
        layer(x, x)
    with pytest.raises(TypeError):
        layer()


def test_copies_and_pickles(ready):
    layer, x = ready
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert "_native" not in vars(twin)
        for _ in range(3):
            assert torch.equal(twin(x), layer(x))
        assert native(twin, x) is not None
    dt.materialize(layer)
    assert "_native" not in vars(layer)
    pickle.dumps(layer)


def test_a_layer_that_is_dropped_goes_without_a_collection(ready):
    layer, x = ready
    twin = copy.deepcopy(layer)
    for _ in range(3):
        twin(x)
    assert native(twin, x) is not None
    gone = weakref.ref(twin)
    gc.disable()
    try:
        del twin
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # forward-mode's own
def test_modes_that_watch(ready):
    layer, x = ready
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        assert native(layer, x) is None
        tangent = torch.randn_like(x)
        y = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, tangent)))
        assert y.tangent is not None
    assert native(layer, x) is not None


class TestDecodedParameters:
    @pytest.fixture
    def ready(self):
        model = pair(RULES["all coded"])
        with torch.no_grad():
            for layer in model:
                assert layer.weight.shape == (layer.out_features, layer.in_features)
                assert layer.bias.shape == (layer.out_features,)
            yield model

    def test_it_is_what_was_decoded(self, ready):
        for layer in (*ready, *pair(RULES["group"])):
            with torch.no_grad():
                for part in layer.thin.values():
                    assert part() is decoded(part)
                assert layer.weight.data_ptr() == decoded(layer.thin["weight"]).data_ptr()

    def test_it_changes_with_the_code(self, ready):
        weight = ready[0].thin["weight"]
        before = ready[0].weight.clone()
        weight.xf.mul_(2)
        assert decoded(weight) is None
        assert not torch.equal(ready[0].weight, before)
        weight().mul_(2)  # written to, so not what the code gives
        assert decoded(weight) is None
        assert torch.equal(ready[0].weight, copy.deepcopy(weight)())

    def test_it_is_left_where_more_is_wanted(self, ready):
        weight = ready[0].thin["weight"]
        with torch.enable_grad():
            assert decoded(weight) is None
            assert ready[0].weight.requires_grad
        weight.register_forward_hook(lambda *_: torch.zeros(256, 200))
        assert decoded(weight) is None
        assert not ready[0].weight.any()
        ready.train()
        assert decoded(ready[1].thin["weight"]) is None

    def test_a_group_with_a_hook(self):
        first, second = pair(RULES["group"])
        with torch.no_grad():
            first.weight, second.weight  # noqa: B018 -- decodes both
            assert decoded(second.thin["weight"]) is not None
            first.thin["weight"].group.register_forward_hook(lambda *_: torch.zeros(300, 256))
            assert decoded(second.thin["weight"]) is None
            assert not second.weight.any()


ROWS = {
    "fp32": {"*": {"rank": 1, "ratio": 0.05}},
    "rank 4": {"*": {"rank": 4, "ratio": 0.1}},
    "plain rank": {"*": {"method": "rank", "ratio": 0.1}},
    "coded": {"*": {"rank": 4, "floats": 0.1, "then": {"method": "coded"}}},
    "group": {"*": {"rank": 2, "ratio": 0.1, "group": "flat"}},
}


class TestRows:
    @staticmethod
    def tables(rules, padding_idx=None):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Embedding(500, 24, padding_idx), nn.Embedding(300, 24)])
        dt.compress(model, {"rules": rules}, init="scratch")
        return model.eval()

    @pytest.mark.parametrize("rules", ROWS.values(), ids=ROWS)
    @pytest.mark.parametrize("kind", [torch.int32, torch.int64])
    @pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (0,)])
    def test_they_are_those_of_the_table(self, rules, kind, shape):
        for padding_idx in (None, 3) if "group" not in str(rules) else (None,):
            for table in self.tables(rules, padding_idx):
                places = torch.randint(0, table.num_embeddings, shape).to(kind)
                if len(shape) == 1 and shape[0]:
                    places[0] = 3
                with torch.no_grad():
                    part = table.thin["weight"]
                    group, index = getattr(part, "group", part), getattr(part, "index", 0)
                    table(places)
                    rows, dense = group._short_rows(places, index), table.weight.double()
                    assert torch.equal(rows, table(places))
                assert rows.shape == (*shape, 24)
                xf, wf = (group.floats()[entry].abs().max() for entry in ("xf", "wf"))
                rank = group.decoder.rank
                most = (rank + 2) * torch.finfo(torch.float32).eps * rank * xf * wf * group.parts[index].scale
                assert ((rows.double() - dense[places.long()]).abs() <= 2 * most).all()

    def test_they_are_left_where_more_is_wanted(self):
        table = self.tables(ROWS["rank 4"])[0]
        weight, places = table.thin["weight"], torch.tensor([5, 9])
        assert weight._short_rows(places, 0) is None  # a gradient is wanted
        assert table(places).requires_grad
        with torch.no_grad():
            assert weight._short_rows(places, 0) is not None
            assert weight._short_rows(torch.arange(200), 0) is None  # many
            for wrong in (torch.tensor([500]), torch.tensor([-1])):
                with pytest.raises(IndexError):
                    table(wrong)
            assert weight._short_rows(places.repeat_interleave(2)[::2], 0) is None
            torch.testing.assert_close(table(places.repeat_interleave(2)[::2]), table(places))
            before = table(places)
            weight.xf.data.mul_(2)
            assert torch.equal(table(places), 2 * before)
            table.double()
            assert table(places).dtype == torch.float64

    def test_copies_and_pickles(self):
        table = self.tables(ROWS["coded"])[0]
        places = torch.tensor([5, 9])
        with torch.no_grad():
            for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
                assert torch.equal(twin(places), table(places))


TRAINED = {
    "fp32": RULES["fp32"],
    "rank 4": RULES["rank 4"],
    "coded": RULES["coded"],
    "uniform": RULES["uniform"],
    "group": RULES["group"],
}


class TestTraining:
    @staticmethod
    def step(layer, x, grad, **options):
        """Outputs and gradients of all that has one."""
        x = x.clone().requires_grad_()
        y = layer(x)
        wanted = [x, *layer.parameters()]
        return [y, *torch.autograd.grad(y, wanted, grad, **options)]

    @pytest.mark.parametrize("rules", TRAINED.values(), ids=TRAINED)
    @pytest.mark.parametrize("batch", [(1,), (33,), (2, 9)])
    def test_the_same_bits(self, rules, batch):
        for layer in pair(rules):
            layer.train()
            x, grad = torch.randn(*batch, layer.in_features), torch.randn(*batch, layer.out_features)
            want = self.step(copy.deepcopy(layer), x, grad)  # at its first step, by the operator
            for _ in range(3):
                for got, wanted in zip(self.step(layer, x, grad), want, strict=True):
                    assert torch.equal(got, wanted)
            part = layer.thin["weight"]
            group, index = getattr(part, "group", part), getattr(part, "index", 0)
            assert group._trained_way(x, index, layer.bias) is not None

    def test_steps_of_an_optimiser(self):
        made = []
        for native in (True, False):
            layer = pair(RULES["coded"])[1].train()
            optimizer = torch.optim.Adam(layer.parameters(), 0.01)
            torch.manual_seed(1)
            for _ in range(5):
                x = torch.randn(16, 256)
                if not native:
                    layer.thin["weight"]._fast = None
                optimizer.zero_grad()
                layer(x).square().mean().backward()
                optimizer.step()
            made.append(layer.state_dict())
        assert all(torch.equal(one, other) for one, other in zip(made[0].values(), made[1].values(), strict=True))

    def test_gradients_of_gradients(self):
        layer = pair(RULES["fp32"])[0].train()
        x, grad = torch.randn(3, 200), torch.randn(3, 256)
        results = []
        for _ in range(2):
            _, *first = self.step(layer, x, grad, create_graph=True)
            results.append(torch.autograd.grad(first[0].square().sum(), list(layer.parameters())[1:]))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("kind", ["expanded", "strided", "some"])
    def test_gradients_in_other_layouts(self, kind):
        layer = pair(RULES["fp32"])[0].train()
        x = torch.randn(3, 200)
        grad = torch.ones(()).expand(3, 256) if kind == "expanded" else torch.randn(256, 3).t()
        if kind == "some":
            layer.thin["weight"].xf.requires_grad_(False)
        dense = [p for p in layer.parameters() if p.requires_grad]
        for _ in range(2):
            got = torch.autograd.grad(layer(x), dense, grad)
            want = torch.autograd.grad(layer(x), dense, grad.contiguous())
            assert all(map(torch.equal, got, want))

    def test_it_is_left_where_more_is_wanted(self):
        layer = pair(RULES["fp32"])[0].train()
        weight, x = layer.thin["weight"], torch.randn(3, 200)
        for _ in range(2):
            layer(x)
        way = lambda x: weight._trained_way(x, 0, layer.bias)  # noqa: E731
        assert way(x) is not None
        assert way(torch.randn(4, 200)) is None  # not chosen for this batch
        assert way(x.double()) is None
        assert way(torch.randn(200, 3).t()) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert way(x) is None
            assert layer(x).dtype == torch.bfloat16
        jacobian = torch.func.jacrev(lambda x: layer(x).sum(0))(x)
        assert jacobian.shape == (256, 3, 200)
        with pytest.raises(RuntimeError):
            layer(torch.randn(3, 201))
        y = layer(x)
        weight.wf.data = weight.wf.data.double()
        assert way(x) is None
        assert y.shape == (3, 256)


OTHERS = {
    "kronecker": {"method": "kronecker", "ratio": 0.05},
    "kronecker coded": {"method": "kronecker", "floats": 0.05, "then": {"method": "coded"}},
    "tensor-train": {"method": "tensor-train", "ratio": 0.1},
    "hashed": {"method": "hashed", "ratio": 0.05},
    "kmeans": {"method": "kmeans", "ratio": 0.25},
}


def taken(weight, x, bias):
    """The product by the way that is taken at once, in a native call or as it was chosen before; or None."""
    y = weight._short_way(x, 0, bias)
    return weight._known_way(x, 0, bias) if y is None else y


class TestKnownWays:
    """Ways other than the native product of two factors: chosen once for a shape."""

    @pytest.fixture(params=OTHERS.values(), ids=OTHERS)
    def ready(self, request):
        layer, x = pair({"*weight": request.param})[1], torch.randn(3, 256)
        with torch.no_grad():
            for _ in range(2):
                layer(x)
            assert taken(layer.thin["weight"], x, layer.bias) is not None
            yield layer, x

    def test_the_same_bits(self, ready):
        layer, x = ready
        for items in (x, torch.randn(40, 256), torch.randn(2, 5, 256), x[::2], torch.randn(256, 3).t()):
            want = ordinary(layer, items)
            for _ in range(3):
                assert torch.equal(layer(items), want)

    def test_changes_are_seen(self, ready):
        layer, x = ready
        weight = layer.thin["weight"]
        before = layer(x)
        for parameter in weight.parameters():
            if parameter.numel() > 1:
                parameter.mul_(2)
        want = ordinary(layer, x)
        for _ in range(3):
            assert torch.equal(layer(x), want)
        assert not torch.equal(before, want)
        with torch.enable_grad():
            assert layer(x).requires_grad
            assert taken(weight, x, layer.bias) is None
        layer.train()
        assert layer(x).shape == (3, 300)
        layer.eval()
        assert torch.equal(layer(x), want)

    def test_it_is_left_where_more_is_wanted(self, ready):
        layer, x = ready
        weight = layer.thin["weight"]
        assert taken(weight, torch.randn(7, 256), layer.bias) is None
        assert taken(weight, x.double(), layer.bias) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert not twin.thin["weight"]._known
            assert torch.equal(twin(x), layer(x))
        with pytest.raises(RuntimeError):
            layer(torch.randn(3, 255))
        with pytest.raises(TypeError):
            layer(None)
