"""torch's own exporters and quantisers, called on a thin model: right outputs, and the code instead of latents."""

import copy
import functools
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import deepthin.torch as dt
from deepthin.torch import snapshot
from tolerance import assert_close, peak, terms

pytestmark = pytest.mark.filterwarnings(
    "ignore:The relative error of",
    "ignore:.*torch.jit",
    "ignore:.*legacy TorchScript",
    "ignore:.*torch.ao.quantization",
)

EIGHT = {"method": "uniform", "bits": 8}
RULES = {
    "deepthin": {"method": "deepthin", "ratio": 0.1},
    "uniform": EIGHT,
    "coded": {"method": "coded", "ratio": 0.1},
    "kmeans": {"method": "kmeans", "bits": 3},
    "binary": {"method": "binary", "bits": 2, "rounds": 0},
    "deepthin then uniform": {"method": "deepthin", "ratio": 0.1, "then": EIGHT},
    "pruned then uniform": {"method": "pruned", "ratio": 0.1, "then": EIGHT},
}
ROUNDING = [rule for rule in RULES if rule not in ("deepthin", "kmeans")]


@functools.cache
def built(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))
    dt.compress(model, {"rules": {"*weight": RULES[rule]}})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    model.train()(inputs()).square().mean().backward()  # so that latents are not what their code decodes to
    optimizer.step()
    model.zero_grad()
    return model


def thin(rule):
    return copy.deepcopy(built(rule)).eval()


def inputs(batch=3):
    return torch.randn(batch, 96, generator=torch.Generator().manual_seed(batch))


def assert_same(model, got, x):
    with torch.no_grad():
        assert_close(got, model(x), terms(model, x), peak(model, x))


def latents(model):
    """The floats before rounding, each as a set of values."""
    weights = [m for m in model.modules() if isinstance(m, dt.ThinWeight) and m.rounds]
    return [p.detach().numpy().ravel() for weight in weights for p in weight.parameters()]


def assert_without_latents(model, arrays):
    held = [array.ravel() for array in arrays if array.dtype == np.float32]
    for floats in latents(model):
        assert not any(len(array) == len(floats) and np.array_equal(array, floats) for array in held)


@pytest.mark.parametrize(
    ("rule", "strict"),
    [(rule, False) for rule in RULES] + [("coded", True), ("deepthin then uniform", True), ("deepthin", True)],
)
def test_an_exported_program_holds_the_code(rule, strict, compiling):
    model, x = thin(rule), inputs()
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert_same(model, program.module()(inputs(5)), inputs(5))
    held = [t for t in [*program.state_dict.values(), *program.constants.values()] if isinstance(t, torch.Tensor)]
    assert_without_latents(model, [t.detach().numpy() for t in held])
    if rule in ROUNDING:
        assert not [name for name in program.state_dict if ".thin." in name]
        symbols = [t for t in held if not t.is_floating_point()]
        assert symbols
        assert all(t.element_size() <= 4 for t in symbols)
        assert max(t.numel() for t in held if t.is_floating_point()) <= 256  # biases, and a scale a row and bit
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in built(rule).named_parameters()]


@pytest.mark.parametrize("rule", RULES)
def test_a_traced_module_holds_the_code(rule, compiling):
    model, x, file = thin(rule), inputs(), io.BytesIO()
    traced = torch.jit.trace(model, (x,))
    torch.jit.save(traced, file)
    assert_same(model, torch.jit.load(io.BytesIO(file.getvalue()))(inputs(5)), inputs(5))
    assert_without_latents(model, [p.detach().numpy() for p in traced.parameters()])
    for floats in latents(model):
        assert len(floats) == 1 or floats.tobytes() not in file.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("rule", "dynamo"), [("deepthin then uniform", True), ("uniform", False), ("deepthin then uniform", False)]
)
def test_an_onnx_file_holds_the_code(rule, dynamo, tmp_path, compiling):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, path = thin(rule), inputs(), tmp_path / "m.onnx"
    options = {"optimize": False} if dynamo else {"do_constant_folding": False}
    torch.onnx.export(model, (x,), path, dynamo=dynamo, external_data=False, **options)
    graph = onnx.load(path).graph
    tensors = [*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t"))]
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in tensors]
    assert_without_latents(model, arrays)
    assert max(array.nbytes for array in arrays if array.dtype == np.float32) <= 4 * 256
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same(model, torch.from_numpy(got), x)


def test_a_graph_is_a_snapshot_and_a_later_export_is_a_later_one(compiling):
    model, x = thin("uniform"), inputs()
    first = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        before = model(x)
        model[0].thin["weight"].weight.mul_(2)
    assert_close(first(x), before, terms(model, x), peak(model, x))
    assert not torch.equal(model(x), before)
    assert_same(model, torch.export.export(model, (x,)).module()(x), x)
    assert_same(model, torch.jit.trace(model, (x,))(x), x)


def test_tied_and_grouped_weights(compiling):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    model[1].weight = model[0].weight
    dt.compress(model, {"rules": {"*weight": EIGHT}})
    x = torch.randn(2, 64)
    assert_same(model, torch.export.export(model, (x,)).module()(x), x)


def test_in_training_and_with_given_parameters_graphs_follow_the_floats(compiling):
    model, x = thin("uniform"), inputs()
    program = torch.export.export(model.train(), (x,))
    assert "0.thin.weight.weight" in program.state_dict
    program.module()(x).sum().backward()
    model.eval()

    def by(weight):
        given = dict(model.named_parameters()) | {"0.thin.weight.weight": weight}
        return torch.func.functional_call(model, given, (x,))

    weight = model[0].thin["weight"].weight.detach()
    recorded = make_fx(by)(weight)
    assert_close(recorded(2 * weight), by(2 * weight), terms(model, x), 2 * peak(model, x))
    assert not torch.equal(recorded(2 * weight), recorded(weight))
    assert torch.func.grad(lambda w: by(w).sum())(weight).abs().max() > 0


def test_one_warning_names_the_command(monkeypatch, compiling):
    model, x = thin("deepthin"), inputs()

    def warned(call):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        return [str(w.message) for w in seen if str(w.message) == snapshot.WARNING]

    monkeypatch.setattr(snapshot, "_warned", False)
    for quiet in (
        lambda: torch.compile(model, backend="eager")(x),
        lambda: torch.func.vmap(model)(x[:, None]),
        lambda: torch.export.export(dt.portable(model), (x,)),
        lambda: torch.export.export(nn.Linear(96, 4), (x,)),
        lambda: model(x),
    ):
        assert warned(quiet) == []
    assert warned(lambda: torch.export.export(model, (x,))) == [snapshot.WARNING]
    assert warned(lambda: torch.jit.trace(model, (x,))) == []
    monkeypatch.setattr(snapshot, "_warned", False)
    assert warned(lambda: torch.jit.trace(model, (x,))) == [snapshot.WARNING]
    assert "deepthin.torch.export(model, path)" in snapshot.WARNING
    assert "`deepthin export`" in snapshot.WARNING


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rule", ["deepthin", "uniform"])
def test_dynamic_quantisation_leaves_thin_layers_alone(rule, compiling):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.thin, self.lstm = nn.Linear(96, 128), nn.LSTM(128, 32, batch_first=True)
            self.head = nn.Linear(32, 8)

        def forward(self, x):
            return self.head(self.lstm(self.thin(x)[:, None])[0][:, 0])

    model = Net().eval()
    dt.compress(model, {"model": {"ignore": ["head"]}, "rules": {"*weight*": RULES[rule]}})
    x = inputs()
    for layers in (None, {nn.Linear, nn.LSTM}):
        quantized = torch.ao.quantization.quantize_dynamic(model, layers)
        assert type(quantized.thin) is type(model.thin)
        assert type(quantized.lstm) is type(model.lstm)
        assert "quantized" in type(quantized.head).__module__
        with torch.no_grad():
            want = model(x)
            assert (quantized(x) - want).abs().max() < 0.05 * want.abs().max()  # of the dense head, in 8 bits
    with torch.no_grad():
        assert torch.equal(quantized.thin(x), model.thin(x))
