"""What tracers record of a thin model: the code and how it is decoded, never what evaluation has cached."""

import copy
import functools
import io
import tempfile

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.func import functional_call, stack_module_state

import deepthin.torch as dt

from tolerance import assert_close, bound, peak, terms

pytestmark = pytest.mark.filterwarnings("ignore:The relative error of", "ignore:.*torch.jit", "ignore:.*legacy TorchScript")

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
FACTORS = ("deepthin", "rank", "kronecker", "tensor-train", "deepthin then uniform", "deepthin then kmeans", "rank then binary")
every = pytest.mark.parametrize("rule", RULES)


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
    """Trained for a step, or loaded from its file: a loaded code may be one that encoding does not give."""
    torch.manual_seed(0)
    model = Net()
    dt.compress(model, {"rules": {"*": RULES[rule]}})
    step(model)
    if how == "loaded":
        with tempfile.TemporaryDirectory() as folder:
            dt.save(model, f"{folder}/m.thin")
            return dt.load(Net(), f"{folder}/m.thin").eval()
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
    traced, traced_without_gradients, symbolic, proxied, proxied_fake, exported, exported_strictly, mapped, called, stacked,
)  # fmt: skip


def constants(recorded):
    """Every tensor that is part of what was recorded."""
    if isinstance(recorded, torch.jit.ScriptModule):
        graph = recorded.inlined_graph  # which owns the nodes
        nodes = graph.findAllNodes("prim::Constant")
        return [n.t("value") for n in nodes if n.hasAttribute("value") and n.kindOf("value") == "t"]
    if isinstance(recorded, fx.GraphModule):
        plain = [value for module in recorded.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
        return plain + [*recorded.buffers(), *recorded.parameters()]
    return []


ROUNDED = ("uniform", "binary", "deepthin then uniform", "rank then binary", "hashed then uniform")


SLOW = (exported_strictly, proxied_fake)
CASES = [(rule, "trained", r) for rule in RULES for r in RECORDERS if r not in SLOW or rule in ("deepthin", *ROUNDED[2:4])]
CASES += [(rule, "loaded", recorder) for rule in ROUNDED for recorder in (traced, proxied, exported, mapped)]


@pytest.mark.parametrize(("rule", "how", "recorder"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
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


@pytest.mark.parametrize("rule", FACTORS)
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
