"""What tracers record of a thin model: the code and how it is decoded, never what evaluation has cached."""

import contextlib
import copy
import functools
import io
import tempfile

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import deepthin.torch as dt
from deepthin.torch.exchange import thin_tensors
from deepthin.torch.tracing import is_portable, is_recorded
from tolerance import assert_close, peak, terms

pytestmark = pytest.mark.filterwarnings(
    "ignore:The relative error of", "ignore:.*torch.jit", "ignore:.*legacy TorchScript"
)

EIGHT = {"method": "uniform", "bits": 8}
RULES = {
    "deepthin": {"ratio": 0.2},
    "shuffled": {"ratio": 0.2},
    "rank": {"ratio": 0.2},
    "hashed": {"ratio": 0.1},
    "pruned": {"ratio": 0.2},
    "kronecker": {"ratio": 0.2},
    "tensor-train": {"ratio": 0.2},
    "uniform": {"bits": 4},
    "kmeans": {"bits": 3},
    "ecsq": {"bits": 3},
    "binary": {"bits": 2, "rounds": 0},
    "deepthin then uniform": {"ratio": 0.06, "then": EIGHT},
    "deepthin then kmeans": {"ratio": 0.06, "then": {"method": "kmeans", "bits": 5}},
    "rank then binary": {"ratio": 0.04, "then": {"method": "binary", "bits": 3, "rounds": 0, "per": "matrix"}},
    "pruned then ecsq": {"ratio": 0.2, "then": {"method": "ecsq", "bits": 4}},
    "hashed then uniform": {"ratio": 0.1, "then": {**EIGHT, "affine": True}},
}
RULES = {name: {"method": name.split()[0], **options} for name, options in RULES.items()}
FACTORS = (
    "deepthin",
    "rank",
    "kronecker",
    "tensor-train",
    "deepthin then uniform",
    "deepthin then kmeans",
    "rank then binary",
)


class Net(nn.Module):
    """Layers with a way of their own: rows of a table, a kernel, a chain of linear layers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 48)
        self.conv = nn.Conv1d(48, 32, 3, padding=1)
        self.chain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48))

    def forward(self, words):
        x = self.conv(self.table(words).transpose(1, 2)).transpose(1, 2)
        return self.chain(x).mean(1)


def words(seed=1, batch=3):
    return torch.randint(0, 64, (batch, 4), generator=torch.Generator().manual_seed(seed))


def step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    model.train()(words()).square().mean().backward()
    optimizer.step()
    model.zero_grad()
    return model.eval()


@functools.cache
def built(rule, how):
    """Trained for a step, loaded from its file (encoding may give another code than the loaded one), or trained on."""
    torch.manual_seed(0)
    model = Net()
    dt.compress(model, {"rules": {"*": RULES[rule]}})
    step(model)
    if how != "trained":
        with tempfile.TemporaryDirectory() as folder:
            dt.save(model, f"{folder}/m.thin")
            loaded = dt.load(Net(), f"{folder}/m.thin").eval()
        return loaded if how == "loaded" else step(loaded)
    return model


def thin(rule, how="trained"):
    return copy.deepcopy(built(rule, how)).eval()


def eager(model, *inputs):
    """Twice, so that all is cached."""
    with torch.no_grad():
        model(*inputs)
        return model(*inputs)


def traced(model, x):
    return torch.jit.trace(model, (x,))


def traced_without_gradients(model, x):
    with torch.no_grad():
        return torch.jit.trace(model, (x,))


def symbolic(model, x):
    return fx.symbolic_trace(model)


def proxied(model, x):
    with torch.no_grad():
        return make_fx(model)(x)


def proxied_fake(model, x):
    with torch.no_grad():
        return make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x)


def exported(model, x):
    return torch.export.export(model, (x,)).module()


def exported_strictly(model, x):
    with torch.no_grad():
        return torch.export.export(model, (x,), strict=True).module()


def mapped(model, x):
    return lambda given: torch.func.vmap(model)(given[:, None]).squeeze(1)


def called(model, x):
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    return lambda given: functional_call(copy.deepcopy(model).requires_grad_(False), parameters, (given,))


def stacked(model, x):
    parameters, buffers = stack_module_state([model, model])
    call = torch.func.vmap(lambda p, b, given: functional_call(model, (p, b), (given,)), in_dims=(0, 0, None))
    return lambda given: call(parameters, buffers, given)[1]


RECORDERS = (
    traced, traced_without_gradients, symbolic, proxied, proxied_fake,
    exported, exported_strictly, mapped, called, stacked,
)  # fmt: skip


def constants(recorded):
    """Every tensor that is part of what was recorded."""
    if isinstance(recorded, torch.jit.ScriptModule):
        graph = recorded.inlined_graph  # which owns the nodes
        nodes = graph.findAllNodes("prim::Constant")
        return [n.t("value") for n in nodes if n.hasAttribute("value") and n.kindOf("value") == "t"]
    if isinstance(recorded, fx.GraphModule):
        plain = [
            value for module in recorded.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)
        ]
        return [*plain, *recorded.buffers(), *recorded.parameters()]
    return []


ROUNDED = ("uniform", "binary", "deepthin then uniform", "rank then binary", "hashed then uniform")


SLOW = (exported_strictly, proxied_fake)
CASES = [
    (rule, "trained", r) for rule in RULES for r in RECORDERS if r not in SLOW or rule in ("deepthin then uniform",)
]
CASES += [(rule, "resumed", traced) for rule in ROUNDED]
CASES += [(rule, "loaded", recorder) for rule in ROUNDED for recorder in (traced, proxied, exported, mapped)]
# Rules that decode in ways of their own; the others are exported by test_all_methods.py, too.
QUICK = ("deepthin", "pruned", "deepthin then uniform", "hashed then uniform")
LOADED = ("binary", "deepthin then uniform")  # weights that are rounded themselves, and floats of another code


def is_quick(rule, how, recorder):
    if how == "resumed" or recorder == traced:
        return True
    return rule in LOADED if how == "loaded" else rule in QUICK or recorder == mapped


@pytest.mark.parametrize(
    ("rule", "how", "recorder"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}-{case[2].__name__}",
            marks=() if is_quick(*case) else pytest.mark.slow,
        )
        for case in CASES
    ],
)
def test_what_is_recorded_is_evaluation(rule, recorder, how, compiling):
    model, x = thin(rule, how), words()
    want = eager(model, x)
    recorded = recorder(model, x)
    with torch.no_grad():
        got = recorded(x)
        assert_close(got, want, terms(model, x), peak(model, x))
        assert torch.equal(eager(model, x), want)
    if rule in FACTORS:
        assert max([value.nbytes for value in constants(recorded)], default=0) < 4 * 32 * 48


# The others are factors of two, floats of centres and planes, as in test_what_is_recorded_is_evaluation.
SMALL = ("deepthin", "kronecker", "tensor-train", "deepthin then uniform")


@pytest.mark.parametrize(
    "rule", [rule if rule in SMALL else pytest.param(rule, marks=pytest.mark.slow) for rule in FACTORS]
)
def test_the_traced_file_is_small(rule, compiling):
    """Some 1 MB dense; graphs that round take up to 0.1 MB, whatever the matrix."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 512)), torch.randn(2, 512)
    dt.compress(model, {"rules": {"*": RULES[rule]}})
    want = eager(model.eval(), x)
    for recorder in (traced, traced_without_gradients):
        file = io.BytesIO()
        torch.jit.save(recorder(model, x), file)
        assert len(file.getvalue()) < 0.5 * 4 * 512 * 512
        file.seek(0)
        assert_close(torch.jit.load(file)(x), want, terms(model, x), peak(model, x))


class Alone(nn.Module):
    """A layer, and what of its result is compared."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        result = self.layer(*inputs)
        return result[0] if isinstance(self.layer, nn.RNNBase | nn.MultiheadAttention) else result


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


LAYERS = {
    "Linear": (lambda: nn.Linear(128, 96), lambda: (noise(3, 128),)),
    "Conv1d": (lambda: nn.Conv1d(32, 32, 5), lambda: (noise(2, 32, 9),)),
    "Conv2d by FFT": (lambda: nn.Conv2d(8, 16, 17), lambda: (noise(2, 8, 72, 68),)),
    "Conv3d": (lambda: nn.Conv3d(8, 16, 3), lambda: (noise(2, 8, 5, 5, 5),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(32, 32, 5), lambda: (noise(2, 32, 5),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(16, 16, 4), lambda: (noise(2, 16, 5, 5),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(16, 16, 3), lambda: (noise(2, 16, 3, 3, 3),)),
    "Embedding": (lambda: nn.Embedding(200, 32, padding_idx=3), lambda: (words(),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(200, 32), lambda: (words(),)),
    "RNN": (lambda: nn.RNN(48, 96), lambda: (noise(4, 3, 48),)),
    "GRU": (lambda: nn.GRU(48, 96), lambda: (noise(4, 3, 48),)),
    "LSTM": (lambda: nn.LSTM(48, 96, batch_first=True), lambda: (noise(4, 3, 48),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(48, 4), lambda: [noise(4, 3, 48)] * 3),
    "chain": (lambda: nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 128)), lambda: (noise(3, 128),)),
}


@functools.cache
def layer_of(name):
    torch.manual_seed(0)
    model = Alone(LAYERS[name][0]()).eval()
    dt.compress(model, {"rules": {"*weight*": {"ratio": 0.15, "rank": 1}}}, init="scratch")
    return model


@pytest.mark.filterwarnings("ignore:Using padding", "ignore:Converting a tensor", "ignore:RNN module weights")
@pytest.mark.parametrize("recorder", ["trace", "trace without gradients", "fx", "make_fx", "export"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_recorded_as_it_evaluates(name, recorder, compiling):
    model, inputs = copy.deepcopy(layer_of(name)), tuple(LAYERS[name][1]())
    want = eager(model, *inputs)
    with torch.set_grad_enabled(recorder == "trace"):
        if recorder.startswith("trace"):
            recorded = torch.jit.trace(model, inputs)
        elif recorder == "fx":
            recorded = fx.symbolic_trace(with_arguments(model, len(inputs)))
        elif recorder == "make_fx":
            recorded = make_fx(model)(*inputs)
        else:
            recorded = torch.export.export(model, inputs).module()
    with torch.no_grad():
        assert_close(recorded(*inputs), want, terms(model, *inputs) + 5000, peak(model, *inputs))
        assert torch.equal(eager(model, *inputs), want)
        dense = min(weight(index).nbytes for weight, index in thin_tensors(model).values())
        assert max([value.nbytes for value in constants(recorded)], default=0) < dense
        for parameter in recorded.parameters():  # the graph reads them: nothing of an earlier value is left in it
            parameter.zero_()
        assert recorded(*inputs).abs().max() == 0


def with_arguments(model, count):
    """A root whose forward has as many arguments as the layer has inputs: torch.fx takes no ``*inputs``."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, a):
            return self.model(a)

    class Three(One):
        def forward(self, a, b, c):
            return self.model(a, b, c)

    return One() if count == 1 else Three()


def test_torch_fx_takes_a_layer_as_one_node_and_a_weight_that_is_read_as_another():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.conv = nn.Linear(48, 64), nn.Conv1d(8, 8, 3)

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight) + self.fc(x) + self.conv(x[:, None].expand(-1, 8, -1)).mean()

    model, x = Reads().eval(), noise(3, 48)
    dt.compress(model, {"rules": {"*weight": {"ratio": 0.2}}}, init="scratch")
    want = eager(model, x)
    recorded = fx.symbolic_trace(model)
    assert [node.target for node in recorded.graph.nodes if node.op == "call_module"] == [
        "fc.thin.weight",
        "fc",
        "conv",
    ]
    assert not [node for node in recorded.graph.nodes if node.op == "get_attr" and node.users]
    with torch.no_grad():
        assert torch.equal(recorded(x), want)
    for layer, given in ((model.fc, x), (model.conv, noise(2, 8, 9))):  # as the root
        want = eager(layer, given)
        got = fx.symbolic_trace(layer)(given)
        assert_close(got, want, 100, want.abs().max())


def test_who_records_is_known():
    seen = []

    class Asks(nn.Module):
        def forward(self, x):
            seen.append((is_recorded(), is_portable()))
            return x + 1

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    asks, x = Asks(), torch.ones(2)

    def asked(call, *contexts):
        seen.clear()
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            call()
        return set(seen)

    eagerly, observed, elsewhere = {(False, False)}, {(True, False)}, {(True, True)}
    assert asked(lambda: asks(x)) == eagerly
    for context in (torch.device("cpu"), torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        assert asked(lambda: asks(x), context) == eagerly
    for context in (Dispatch(), Functions(), FakeTensorMode(allow_non_fake_inputs=True)):
        assert asked(lambda: asks(x), context) == observed
    assert asked(lambda: make_fx(asks)(x)) == observed
    assert asked(lambda: make_fx(asks, pre_dispatch=True)(x)) == observed
    assert asked(lambda: torch.compile(asks, backend="eager")(x)) == observed
    assert asked(lambda: torch.jit.trace(asks, (x,), check_trace=False)) == elsewhere
    assert asked(lambda: torch.export.export(asks, (x,))) == elsewhere
    for transform in (
        torch.func.vmap(asks),
        lambda x: torch.func.jvp(asks, (x,), (x,)),
        torch.func.grad(lambda x: asks(x).sum()),
    ):
        assert asked(lambda transform=transform: transform(x)) == elsewhere
    assert asked(lambda: asks(x), forward_ad.dual_level()) == elsewhere
    assert asked(lambda: asks(x)) == eagerly


def test_fake_tensors_leave_nothing_behind():
    model, x = thin("hashed then uniform"), words()
    want = eager(thin("hashed then uniform"), x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))
    assert torch.equal(eager(model, x), want)
