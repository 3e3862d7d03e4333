"""Accelerators, as far as they can be tested without one: on the CPU by the ways that an accelerator takes."""

import copy
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepthin.torch as dt
from deepthin import METHODS
from deepthin.kernels import costs
from deepthin.methods import binary, binary_rows
from deepthin.methods.factor import Factor
from deepthin.storage.contents import Part
from deepthin.torch import accelerated, code_length, cudnn, evaluated, multiply, operators
from deepthin.torch.operand import Operand
from test_all_methods import ALIKE, DECODING, PATH, RULES, each_rule, everything, loss_of, words
from tolerance import assert_close

CARD = torch.cuda.is_available()
needs_card = pytest.mark.skipif(not CARD, reason="needs a CUDA device")
WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::unique"}


def largest(values):
    return values.detach().abs().max()


def pretend(monkeypatch):
    """The CPU is taken for an accelerator whose times are not known, without native code."""
    monkeypatch.setattr(accelerated, "on_accelerator", lambda tensor: not tensor.is_meta)
    monkeypatch.setattr(multiply, "timed_device", lambda x: "unknown")
    monkeypatch.setattr(binary_rows, "is_taken", lambda weight: isinstance(weight, torch.Tensor))
    monkeypatch.setattr("deepthin.torch.recurrent_layers.native_available", False)
    monkeypatch.setattr("deepthin.torch.code_length._is_native", lambda latents: False)
    monkeypatch.setattr(operators, "takes", lambda *operands: False)
    monkeypatch.setattr("deepthin.torch.operand.takes", lambda *operands: False)
    for module in ("evaluated", "rounding", "operand"):
        monkeypatch.setattr(f"deepthin.torch.{module}.current", evaluated._looked_up)


@pytest.fixture
def accelerator(monkeypatch):
    pretend(monkeypatch)


def thin_linear(inputs=24, outputs=20, ratio=0.4, **options):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    dt.compress(layer, {"model": {"ratio": ratio}, "rules": {"*": {"method": "deepthin", **options}}}, init="scratch")
    return layer


def step_of(network):
    network.zero_grad()
    loss = loss_of(network)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in network.parameters())]


@each_rule
def test_results_are_those_of_the_cpu(rule, monkeypatch):
    network = everything(rule).train()
    here = step_of(network)
    with torch.no_grad():
        outputs = network.eval()(words())
    with monkeypatch.context() as patch:
        pretend(patch)
        there = step_of(network.train())
        with torch.no_grad():
            assert_close(network.eval()(words()), outputs, PATH + DECODING, largest(outputs))
    for one, other in zip(here, there, strict=True):
        assert_close(one, other, 100 * (PATH + DECODING), largest(one))


@each_rule
def test_a_training_step_reads_no_value(rule, accelerator):
    network = everything(rule).train()
    optimizer = torch.optim.Adam(network.parameters())
    for _ in range(2):
        step_of(network)
        optimizer.step()
    with torch.autograd.profiler.profile() as profile:
        step_of(network)
    assert not WAITS & {event.name for event in profile.function_events}


@functools.cache
def on_fake_device():
    script = Path(__file__).parent / "fake_device.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=900, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", list(RULES))
def test_a_step_on_a_device_without_values(name):
    assert on_fake_device()[name] == ""


def test_reads_on_a_device_without_values_are_seen():
    planted = {name: error for name, error in on_fake_device().items() if name.startswith("planted")}
    assert len(planted) == 4
    assert all(planted.values())


@pytest.mark.parametrize("name", [name for name in RULES if name not in ALIKE])
def test_a_step_compiles_to_a_whole_graph(name, accelerator, compiling):
    torch.manual_seed(0)
    layer = nn.Linear(24, 20)
    dt.compress(layer, {"model": {"ratio": 0.4}, "rules": {"*": RULES[name]}}, init="scratch")
    x = torch.randn(6, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for module in (compiled, layer):
        layer.zero_grad()
        module(x).square().sum().backward()
        if module is compiled:
            grads = [parameter.grad.clone() for parameter in layer.parameters()]
    for one, parameter in zip(grads, layer.parameters(), strict=True):
        assert_close(one, parameter.grad, 1000, largest(parameter.grad))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepthin", "rank", "shuffled", "deepthin then 8 bits", "binary"])
def test_inductor_compiles_a_step_to_a_whole_graph(name, accelerator, compiling):
    torch.manual_seed(0)
    layer = nn.Linear(24, 20)
    dt.compress(layer, {"model": {"ratio": 0.4}, "rules": {"*": RULES[name]}}, init="scratch")
    x = torch.randn(6, 24)
    layer(x).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    torch.compile(layer, fullgraph=True)(x).square().sum().backward()
    for one, parameter in zip(grads, layer.parameters(), strict=True):
        assert_close(one, parameter.grad, 1000, largest(parameter.grad))


# Products of factors -----------------------------------------------------------------------------------------------

PLACES = {
    "alone": (Factor((7, 9), 4, 1), Part((7, 9)), 0),
    "of rank 3": (Factor((7, 9), 4, 3), Part((7, 9)), 0),
    "without a rest": (Factor((8, 9), 4, 1), Part((8, 9)), 0),
    "in a group": (Factor((30, 11), 7, 2), Part((7, 9)), 50),
    "scaled": (Factor((7, 9), 4, 1), Part((7, 9), scale=0.5), 0),
}


def operands(name):
    method, part, start = PLACES[name]
    place = accelerated.place_of(method, part, start)
    torch.manual_seed(0)
    xf, wf = torch.randn(method.m, method.rank).double(), torch.randn(method.rank, method.n).double()
    dense = (xf @ wf).reshape(-1)[start : start + 63 + 9 * (name == "without a rest")] * part.scale
    return place, xf.requires_grad_(), wf.requires_grad_(), dense.reshape(part.shape)


@pytest.mark.parametrize("name", list(PLACES))
def test_decoded_tensors_and_their_gradients(name, accelerator):
    place, xf, wf, dense = operands(name)
    assert_close(accelerated.decode(xf, wf, place), dense, 4, dense)
    assert_close(accelerated.plain_decode(xf, wf, place), dense, 4, dense)
    with torch.no_grad():
        assert_close(accelerated.decode(xf, wf, place), dense, 4, dense)
        assert torch.equal(accelerated.decode(xf, wf, place, torch.float32), dense.float())
    for decode in (accelerated.decode, accelerated.plain_decode):
        assert torch.autograd.gradcheck(lambda xf, wf, of=decode: of(xf, wf, place), (xf, wf))
        assert torch.autograd.gradgradcheck(lambda xf, wf, of=decode: of(xf, wf, place), (xf, wf))


@pytest.mark.parametrize("name", list(PLACES))
@pytest.mark.parametrize("long", [True, False], ids=["in one function", "by torch's operations"])
def test_products_by_decoded_matrices_and_their_gradients(name, long, accelerator, monkeypatch):
    monkeypatch.setattr(accelerated, "_LONG", 0 if long else 1 << 60)
    place, xf, wf, dense = operands(name)
    x = torch.randn(2, 3, place.shape[1]).double().requires_grad_()
    bias = torch.randn(place.shape[0]).double().requires_grad_()

    def product(x, xf, wf, bias):
        return accelerated.linear(x, xf, wf, bias, place, torch.float64)

    y = product(x, xf, wf, bias)
    assert_close(y, F.linear(x, dense, bias), 20, largest(y))
    assert torch.autograd.gradcheck(product, (x, xf, wf, bias))
    assert torch.autograd.gradgradcheck(product, (x, xf, wf, bias))
    no_x = accelerated.linear(x.detach(), xf, wf.detach(), None, place, torch.float64)
    (slope,) = torch.autograd.grad(no_x.sum(), xf)
    (wanted,) = torch.autograd.grad(F.linear(x.detach(), accelerated.decode(xf, wf, place)).sum(), xf)
    assert_close(slope, wanted, 100, largest(wanted))


def test_a_transposed_tensor(accelerator):
    place = accelerated.place_of(Factor((7, 9), 4, 1), Part((9, 7), transposed=True), 0)
    xf, wf = torch.randn(16, 1, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    expected = (xf * wf).reshape(-1)[:63].view(7, 9).T
    for made in (accelerated.decode(xf, wf, place), accelerated.plain_decode(xf, wf, place)):
        assert torch.equal(made, expected)


def test_an_empty_batch_and_a_wrong_shape(accelerator):
    layer = thin_linear()
    assert layer(torch.empty(0, 24)).shape == (0, 20)
    layer(torch.empty(0, 24)).sum().backward()
    assert not layer.thin["weight"].xf.grad.any()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.empty(3, 23))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.empty(3, 24).double())


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_decodes_to_its_type_once(grad, accelerator):
    layer = thin_linear().train(grad)
    weight = layer.thin["weight"]
    dense = (weight.xf * weight.wf).reshape(-1)[: 24 * 20].view(20, 24)
    x = torch.randn(5, 24)
    expected = F.linear(x.bfloat16(), dense.bfloat16(), layer.bias.bfloat16())
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y = layer(x)
        assert torch.equal(y, expected)
        if grad:
            y.float().square().sum().backward()
            assert weight.xf.grad.dtype is torch.float32
            slopes = torch.autograd.grad(expected.float().square().sum(), list(weight.parameters()))
            for one, parameter in zip(slopes, weight.parameters(), strict=True):
                assert_close(one.bfloat16(), parameter.grad.bfloat16(), 100, largest(one))
        else:
            layer(x)
            assert [tensor.dtype for tensor, _ in weight._evaluated.dense.values()] == [torch.bfloat16]


@each_rule
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pretends", [True, False], ids=["accelerator", "cpu"])
def test_codes_are_exact_under_autocast(rule, training, pretends, monkeypatch):
    if pretends:
        pretend(monkeypatch)
    torch.manual_seed(0)
    layer = nn.Linear(24, 20).train(training)
    dt.compress(layer, {"model": {"ratio": 0.4}, "rules": {"*": rule}}, init="scratch")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)  # so that the code is another one
    with torch.set_grad_enabled(training):
        weight = layer.train(training).weight.detach().clone()
        layer.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_leaves_double_precision_and_integers(training, accelerator):
    layer = thin_linear().train(training)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        with pytest.raises(RuntimeError):
            layer(torch.ones(3, 24, dtype=torch.int64))
        assert layer.double()(torch.randn(3, 24).double()).dtype is torch.float64


# What evaluation keeps ---------------------------------------------------------------------------------------------


def changes():
    def loaded(layer):
        layer.load_state_dict({key: 2 * value for key, value in layer.state_dict().items()})

    def stepped(layer):
        optimizer = torch.optim.SGD(layer.parameters(), 0.5, fused=True)  # which counts no version
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    def written(layer):
        layer.thin["weight"].wf.mul_(2)

    def through_data(layer):
        layer.thin["weight"].wf.data.mul_(2)
        layer.eval()

    return [loaded, stepped, written, through_data]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_evaluation_keeps_the_decoded_weight_until_it_changes(change, accelerator, monkeypatch):
    layer, x = thin_linear().eval(), torch.randn(4, 24)
    compared = []
    for module in ("evaluated", "cache"):
        monkeypatch.setattr(f"deepthin.torch.{module}.same_values", lambda old, now: compared.append(1))
    with torch.no_grad():
        before, dense = layer(x), layer.weight
        assert layer.weight.data_ptr() == dense.data_ptr()
        change(layer)
        after = layer(x)
        assert layer.weight.data_ptr() != dense.data_ptr()
    assert not torch.equal(before, after)
    fresh = thin_linear()
    fresh.load_state_dict(layer.state_dict())
    assert_close(after, fresh.train()(x).detach(), 40, largest(after))
    assert not compared


def test_training_decodes_anew(accelerator):
    layer, x = thin_linear().train(), torch.randn(4, 24)
    with torch.no_grad():
        layer(x)
        layer.thin["weight"].wf.data.mul_(2)
        y = layer(x)
    assert "_evaluated" not in layer.thin["weight"].__dict__
    assert_close(y, layer(x).detach(), 40, largest(y))


@pytest.mark.parametrize("rule", ["deepthin", "deepthin then 8 bits", "binary"])
def test_a_recorded_cuda_graph_reads_and_leaves_nothing_kept(rule, accelerator, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(24, 20)
    dt.compress(layer, {"model": {"ratio": 0.4}, "rules": {"*": RULES[rule]}}, init="scratch")
    weight = layer.eval().thin["weight"]
    x = torch.randn(4, 24)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(accelerated, "is_captured", lambda tensor: True)
        layer(x)
        layer(x)
        assert "_evaluated" not in weight.__dict__
    with torch.no_grad():
        kept = layer(x)
        for parameter in weight.parameters():
            parameter.data.mul_(2)  # which no version counts
        assert torch.equal(layer(x), kept)
        monkeypatch.setattr(accelerated, "is_captured", lambda tensor: True)
        assert not torch.equal(layer(x), kept)


def test_little_memory_keeps_nothing(accelerator, monkeypatch):
    monkeypatch.setattr(accelerated, "may_keep", lambda dense: False)
    layer = thin_linear().eval()
    with torch.no_grad():
        layer(torch.randn(4, 24))
    assert not layer.thin["weight"]._evaluated.dense


def test_a_loaded_code_of_learned_steps_is_looked_at_once(accelerator, tmp_path, monkeypatch):
    rule = {"rules": {"*": {"method": "coded"}}}
    layer = nn.Linear(24, 20)
    dt.compress(layer, rule)
    dt.save(layer, tmp_path / "m.thin")
    layer = dt.load(nn.Linear(24, 20), tmp_path / "m.thin").train()
    weight, x = layer.thin["weight"], torch.randn(3, 24)
    looks, plain = [], type(weight)._has_learned_steps
    monkeypatch.setattr(type(weight), "_has_learned_steps", lambda *args: looks.append(1) or plain(*args))
    for _ in range(3):
        layer(x).sum().backward()
    assert len(looks) == 1


@pytest.mark.parametrize("piece", [7, 1 << 24])
def test_code_lengths_read_no_value(piece, accelerator, monkeypatch):
    method = METHODS["coded"].fit((30, 40), 30 * 40 * 32)
    torch.manual_seed(0)
    latents, log_step = (3 * torch.randn(30, 40)).requires_grad_(), torch.zeros(1, 1, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(accelerated, "on_accelerator", lambda tensor: False)
        expected = code_length.code_length(latents, log_step, method)
    monkeypatch.setattr(code_length, "_EXACT", piece)
    with torch.autograd.profiler.profile() as profile:
        bits = code_length.code_length(latents, log_step, method)
        bits.backward()
    assert bits == expected
    assert not (WAITS | {"aten::bincount"}) & {event.name for event in profile.function_events}


# Costs -------------------------------------------------------------------------------------------------------------

# The rows of docs/performance.md: size, batch, and whether the structured product was the faster one on an H100
MEASURED = [
    (1024, 32, False), (1024, 256, False), (2048, 1, False), (2048, 256, False), (4096, 1, False), (4096, 256, False),
    (4096, 4096, True),
]  # fmt: skip


@pytest.mark.parametrize("ready", [True, False], ids=["evaluation", "training"])
@pytest.mark.parametrize(("size", "batch", "structured"), MEASURED)
def test_the_costs_of_a_cuda_device_choose_what_was_faster_there(size, batch, structured, ready):
    method = METHODS["deepthin"].fit((size, size), int(0.01 * 32 * size * size))
    case = multiply.Case(method, method.window(0, method.shape), batch, ready, device="cuda")
    assert (multiply.choose(case).name == "fft") == structured
    assert multiply.choose(case._replace(device="reduced")) is multiply.DENSE


@pytest.mark.parametrize("name", ["deepthin", "rank", "kronecker", "tensor-train"])
@pytest.mark.parametrize("device", ["mps", "xpu", "reduced"])
def test_devices_without_times_take_the_decoded_weight(name, device):
    method = METHODS[name].fit((512, 512), int(0.05 * 32 * 512 * 512))
    window = method.window(0, method.shape) if isinstance(method, Factor) else None
    for batch in (1, 4096):
        case = multiply.Case(method, window, batch, False, whole=True, device=device)
        assert multiply.choose(case) is multiply.DENSE
    assert costs.costs(METHODS["deepthin"].fit((64, 64), 1 << 14), 8, True, device) == {"dense": 0.0}


def test_reduced_precision_takes_the_decoded_weight():
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    half = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert multiply.timed_device(torch.empty(2, 3)) == "cpu"
    assert multiply.timed_device(x) == "cuda"
    assert multiply.timed_device(half) == "reduced"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert multiply.timed_device(x) == "reduced"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_choice_is_noted_by_batch(accelerator, monkeypatch):
    asked, plain = [], multiply.choose
    monkeypatch.setattr(multiply, "choose", lambda case: asked.append(case.batch) or plain(case))
    layer = thin_linear()
    for batch in (3, 3, 5, 3):
        layer(torch.randn(batch, 24))
    assert asked == [3, 5]


# Binary codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", range(1, 9))
@pytest.mark.parametrize("rounds", [0, 1, 2, 4])
@pytest.mark.parametrize("per", ["row", "matrix"])
def test_binary_codes_of_all_rows_at_once_are_as_near(planes, rounds, per, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(24, 64).double()
    weight[3], weight[5], weight[6] = 0.0, 1.0, 0.3 * weight[6].sign()  # singular: signs of planes are equal
    method = binary.Binary((24, 64), planes, rounds, per)
    code = method.encode(weight, torch)
    monkeypatch.setattr(binary_rows, "is_taken", lambda weight: True)
    other = method.encode(weight, torch)
    assert code.keys() == other.keys()
    assert all(code[entry].dtype is other[entry].dtype and code[entry].shape == other[entry].shape for entry in code)
    errors = [(method.decode(each, torch) - weight).square().sum() for each in (code, other)]
    assert abs(errors[0] - errors[1]) <= 1e-4 * errors[0] + 1e-12 * weight.square().sum()
    if planes < 3:  # more planes may end in another local minimum, as rounding decides
        usual = [row for row in range(24) if row not in (3, 5, 6)] if per == "row" else slice(None)
        assert torch.equal(code["symbols"][usual], other["symbols"][usual])


# Recurrent layers --------------------------------------------------------------------------------------------------


def flat_layout(layer, weights):
    """As cuDNN has it: the matrices of all layers one after the other, then the biases."""
    offsets, end = [0] * len(weights), 0
    for kind in ("weight", "bias"):
        for place, name in enumerate(layer._flat_weights_names):
            if name.startswith(kind):
                offsets[place], end = end, end + weights[place].numel()
    return cudnn.Layout(end, tuple(offsets))


@pytest.fixture
def with_cudnn(accelerator, monkeypatch):
    monkeypatch.setattr(cudnn, "applies", lambda weights: True)
    monkeypatch.setattr(cudnn, "layout_of", flat_layout)


def thin_recurrent(kind):
    torch.manual_seed(0)
    layer = kind(10, 12, num_layers=2, bidirectional=True)
    dt.compress(layer, {"model": {"ratio": 0.5}, "rules": {"*": {"method": "deepthin"}}}, init="scratch")
    return layer


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_lie_in_one_buffer_in_the_order_of_cudnn(kind, with_cudnn):
    layer = thin_recurrent(kind)
    dt.materialize(expected := copy.deepcopy(layer))
    flat = layer._flat_weights
    first, layout = flat[0], flat_layout(layer, flat)
    assert all(weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for weight in flat)
    assert all(weight.is_contiguous() for weight in flat)
    assert [weight.storage_offset() for weight in flat] == list(layout.offsets)
    assert first.untyped_storage().nbytes() == 4 * layout.entries
    assert layout.entries == sum(parameter.numel() for parameter in expected.parameters())

    x = torch.randn(7, 3, 10, requires_grad=True)
    y, wanted = layer(x)[0], expected(x)[0]
    assert_close(y, wanted, 7 * 30, largest(wanted))
    slopes = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, wanted)]
    assert_close(*slopes, 7 * 60, largest(slopes[1]))
    layer(x)[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_evaluation_keeps_the_buffer_until_a_weight_changes(with_cudnn):
    layer, x = thin_recurrent(nn.LSTM).eval(), torch.randn(7, 3, 10)
    with torch.no_grad():
        first = layer._flat_weights
        before = layer(x)[0]
        assert layer._flat_weights[0] is first[0]
        layer.get_submodule("thin")["weight_hh_l0"].wf.mul_(2)
        assert layer._flat_weights[0] is not first[0]
        assert not torch.equal(layer(x)[0], before)
    with torch.inference_mode():
        kept = layer._flat_weights
    assert not any(weight.is_inference() for weight in kept)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        assert torch.equal(copied(x)[0], layer(x)[0])


def test_weights_are_decoded_once_a_call(accelerator, monkeypatch):
    layer, decoded = thin_recurrent(nn.LSTM), []
    plain = Operand._decode
    monkeypatch.setattr(Operand, "_decode", lambda self, *rest: decoded.append(1) or plain(self, *rest))
    layer(torch.randn(7, 3, 10))
    assert len(decoded) == 8
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        layer(torch.randn(7, 3, 10).double())
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.randn(7, 3, 11))


# benchmarks/gpu.py -------------------------------------------------------------------------------------------------


def benchmark(*words):
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--small", "--seconds", "0.01", *words]
    environment = {**os.environ, "DEEPTHIN_ISA": "none"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_the_benchmark_prints_a_row_for_every_layer():
    done = benchmark("--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if " (" in line and line[0] == "|"]
    assert [row[0].split()[0] for row in rows] == ["Linear"] * 3 + ["LSTM", "Conv2d", "Embedding", "encoder"]
    for row in rows:
        assert len(row) == 4
        assert all(float(cell.split(" / ")[0].replace(",", "")) > 0 for cell in row[1:3])
        assert all(float(value) < 1e-3 for value in row[3].split(", "))


def test_the_benchmark_fits_times_of_every_way():
    done = benchmark("--device", "cpu", "--fit")
    assert done.returncode == 0, done.stderr
    lines = [line.strip().split(": ")[0] for line in done.stdout.splitlines()]
    assert lines.count('"dense"') == lines.count('"fft"') == 2


def test_the_benchmark_counts_what_the_host_starts():
    done = benchmark("--host")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "training |" in line]
    assert len(rows) == 5
    for _, _, dense, *thin in rows:
        assert all(int(cell) > int(dense) for cell in thin)  # a number: no reads


@pytest.mark.skipif(CARD, reason="there is a CUDA device")
def test_the_benchmark_says_that_there_is_no_device():
    done = benchmark()
    assert done.returncode == 2
    assert "there is no CUDA device here" in done.stderr


# On a card ---------------------------------------------------------------------------------------------------------


@needs_card
@each_rule
def test_results_on_a_card(rule):
    network = everything(rule).train()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here = step_of(network)
        there = copy.deepcopy(network).cuda()
        there.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # weights that are not contiguous, for one
            loss = nn.functional.cross_entropy(there(words().cuda()), torch.arange(6).cuda())
            loss.backward()
    for one, other in zip(here, [loss.detach(), *(p.grad for p in there.parameters())], strict=True):
        assert_close(one, other, 1000 * (PATH + DECODING), largest(one))


@needs_card
@each_rule
def test_a_training_step_in_a_cuda_graph(rule):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).cuda()
    dt.compress(layer, {"model": {"ratio": 0.4}, "rules": {"*": rule}}, init="scratch")
    x = torch.randn(8, 64, device="cuda")

    def step():
        layer.zero_grad()
        layer(x).square().sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    graph.replay()
    recorded = [parameter.grad.clone() for parameter in layer.parameters()]
    step()
    for one, parameter in zip(recorded, layer.parameters(), strict=True):
        assert_close(one, parameter.grad, 1000, largest(parameter.grad))


@needs_card
def test_no_step_waits_for_a_card():
    layer = nn.Linear(64, 48).cuda()
    dt.compress(layer, {"model": {"ratio": 0.4}, "rules": {"*": {"method": "deepthin"}}}, init="scratch")
    x = torch.randn(8, 64, device="cuda")
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_card
def test_flat_weights_are_where_cudnn_wants_them():
    layer = thin_recurrent(nn.LSTM).cuda()
    flat = layer._flat_weights
    assert len({weight.untyped_storage().data_ptr() for weight in flat}) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(7, 3, 10, device="cuda"))[0].sum().backward()
