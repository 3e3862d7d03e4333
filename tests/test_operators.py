"""The operator in torch: registration, gradients, graphs, precision, and that nothing kept is ever out of date."""

import copy
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deepthin
import deepthin.torch as dt
from deepthin.errors import ConfigError
from deepthin.kernels import products
from deepthin.methods.factor import Factor
from deepthin.torch.operators import linear
from tolerance import absolute, assert_close, largest

native = pytest.mark.skipif(not products.native_available, reason="no native kernels here")
OPERATOR = torch.ops.deepthin.factor_linear.default
TERMS = (
    40 + 8 + 3 * 7 * 7
)  # of an output of `operands`: 40, or three transforms of 128 points, whose levels take some 7 each


def operands(rows=30, cols=40, n=7, rank=2, batch=(9,), offset=0, kind=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    m = -(-(offset + rows * cols) // n)
    return [
        torch.randn(shape, generator=generator, dtype=kind) for shape in ((*batch, cols), (m, rank), (rank, n), (rows,))
    ]


def dense(x, xf, wf, bias, rows, offset=0):
    cols = x.shape[-1]
    return x @ (xf @ wf).reshape(-1)[offset : offset + rows * cols].view(rows, cols).T + bias


def sums(x, xf, wf, bias, rows, offset=0):
    """The magnitudes of all terms behind each output."""
    return dense(*(t.detach().double().abs() for t in (x, xf, wf, bias)), rows, offset)


def wide(ratio=0.01, width=1024, **options):
    """A model of one layer for which native code pays at every batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width))
    dt.compress(model, {"rules": {"*": {"ratio": ratio, "rank": 1, **options}}}, init="scratch")
    return model


def test_whether_there_is_native_code_is_said():
    assert deepthin.native_available is products.native_available


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("correlation", ["auto", "direct", "fft"])
@pytest.mark.parametrize("offset", [0, 3])
def test_the_operator_is_the_dense_layer(correlation, relu, offset):
    x, xf, wf, bias = operands(batch=(2, 5), offset=offset)
    y = linear(x, xf, wf, bias, rows=30, offset=offset, correlation=correlation, relu=relu)
    want = dense(x, xf, wf, bias, 30, offset)
    assert_close(y, want.relu() if relu else want, TERMS, sums(x, xf, wf, bias, 30, offset))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("correlation", ["direct", "fft"])
@pytest.mark.parametrize("batch", [(1,), (3, 11), (200,)])
def test_gradients_of_all_operands(batch, correlation, relu):
    tensors = [t.requires_grad_() for t in operands(batch=batch)]
    y = linear(*tensors, rows=30, correlation=correlation, relu=relu)
    want = dense(*tensors, 30)
    want = want.relu() if relu else want
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad(y, tensors, grad), torch.autograd.grad(want, tensors, grad), strict=True
    ):
        assert_close(ours, theirs, batch[0] * batch[-1] + 172 + TERMS, largest(theirs))  # items, rows of factors


def test_gradients_of_any_order():
    """In float64 by torch operations; those of the native gradients follow the same formulas."""
    tensors = [t.requires_grad_() for t in operands(5, 7, 4, 2, (3,), kind=torch.float64)]
    work = lambda *t: linear(*t, rows=5)  # noqa: E731
    assert torch.autograd.gradcheck(work, tensors)
    assert torch.autograd.gradgradcheck(work, tensors)


@native
def test_second_gradients_of_the_native_operator():
    tensors = [t.requires_grad_() for t in operands(batch=(12,))]
    found = []
    for y in (linear(*tensors, rows=30, correlation="fft"), dense(*tensors, 30)):
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 3 * (12 + 172 + TERMS), largest(theirs))  # there, back, and back through both


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [False, True])
def test_opcheck(kind, trained):
    x, xf, wf, bias = (t.requires_grad_(trained) for t in operands(kind=kind))
    for arguments in [(x, xf, wf, bias, 30, 0, "auto", False), (x, xf, wf, None, 30, 0, "fft", True)]:
        torch.library.opcheck(OPERATOR, arguments)
    grad = torch.randn(9, 30, dtype=kind)
    arguments = (grad, *(t.detach() for t in (x, xf, wf)), 30, 0, "direct", [True, False, True])
    torch.library.opcheck(torch.ops.deepthin.factor_linear_backward.default, arguments)


def test_operands_that_do_not_go_together():
    x, xf, wf, bias = operands()
    with pytest.raises(ValueError, match=r"30 x 40 weights from entry 0 of rows of 7 need an xf of 172 x 2, not \(171"):
        linear(x, xf[1:], wf, bias, rows=30)
    with pytest.raises(ValueError, match=r"The bias is \(29,\): 30 outputs need \(30,\)"):
        linear(x, xf, wf, bias[1:], rows=30)
    with pytest.raises(ValueError, match="correlation='slow' must be 'auto', 'direct' or 'fft'"):
        linear(x, xf, wf, bias, rows=30, correlation="slow")


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_take_the_torch_way(kind):
    tensors = [t.to(kind) for t in operands()]
    y = linear(*tensors, rows=30)
    assert y.dtype == kind
    want = dense(*(t.double() for t in tensors), 30)
    # Half precision rounds the weight, the product and the sum, each once or twice; float64 every term.
    assert_close(y, want, TERMS if kind == torch.float64 else 6, sums(*tensors, 30))
    assert linear(*(t.to("meta") for t in tensors), rows=30).shape == (9, 30)


def test_autocast_computes_in_single_precision():
    tensors = operands()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(tensors[0].bfloat16(), *tensors[1:], rows=30)
    assert y.dtype == torch.float32
    assert torch.equal(y, linear(tensors[0].bfloat16().float(), *tensors[1:], rows=30))


def test_views_of_negated_numbers():
    tensors = operands(batch=(3,))
    x = torch._neg_view(tensors[0])
    want = dense(-tensors[0], *tensors[1:], 30)
    assert_close(linear(x, *tensors[1:], rows=30), want, TERMS, sums(*tensors, 30))
    model = wide().eval()
    x = torch.randn(1, 1024)
    with torch.no_grad():
        model(x)  # from now on the short way
        assert torch.equal(model(torch._neg_view(x)), model(-x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.xf, self.wf, self.bias = (nn.Parameter(t) for t in operands()[1:])

    def forward(self, x):
        return linear(x, self.xf, self.wf, self.bias, rows=30, relu=True) * 2


def test_export_with_a_dynamic_batch():
    net = Net()
    program = torch.export.export(net, (torch.randn(4, 40),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "deepthin.factor_linear" in str(program.graph)
    for batch in (1, 6, 33):
        x = torch.randn(batch, 40)
        assert_close(program.module()(x), net(x), TERMS, 2 * sums(x, net.xf, net.wf, net.bias, 30))


def test_compiled_training_is_one_graph(compiling):
    net, twin = Net(), Net()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(11, 40)
    net(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for ours, theirs in zip(twin.parameters(), net.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, 11 + 172 + 2 * TERMS, largest(theirs.grad))


@native
def test_a_compiled_layer_calls_the_operator(compiling):
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph

    model, x = wide(), torch.randn(40, 1024)
    y = torch.compile(model, fullgraph=True, backend=backend)(x)
    assert len(graphs) == 1
    assert "deepthin.factor_linear" in graphs[0]
    assert_close(y, model(x), 1024 + 8, absolute(model)(x.abs().double()))


def test_an_exported_layer_needs_no_library():
    """Plain operations: the program runs where deepthin is not installed."""
    program = torch.export.export(wide().eval(), (torch.randn(2, 1024),))
    assert "deepthin" not in "".join(str(node.target) for node in program.graph.nodes)


@native
class TestTheShortWay:
    """A layer in evaluation: one call of native code, which looks at everything itself."""

    def test_it_is_taken_and_gives_the_same_bits(self):
        model, x = wide().eval(), torch.randn(5, 1024)
        layer, weight = model[0], model[0].thin["weight"]
        with torch.no_grad():
            first = model(x)
            assert weight._short_way(x, 0, layer.bias) is not None
            assert torch.equal(model(x), first)
        assert weight._short_way(x, 0, layer.bias) is None  # a gradient of the code is wanted
        assert model(x).requires_grad
        assert_close(model(x), first, 1024 + 8, absolute(model)(x.abs().double()))

    def test_it_is_left_where_it_must_be(self):
        model, x = wide().eval().requires_grad_(False), torch.randn(5, 1024)
        weight, bias = model[0].thin["weight"], model[0].bias
        y = model(x)
        way = lambda x, bias=bias: weight._short_way(x, 0, bias)  # noqa: E731
        assert torch.equal(way(x), y)
        assert way(x.clone().requires_grad_()) is None
        assert way(x.double()) is None
        assert way(x.to("meta")) is None
        assert way(x[:, :1023]) is None
        assert way(torch.randn(1024, 1024)[:5].t().contiguous().t()) is None  # columns first
        assert way(torch.randn(6, 1024)) is None  # no choice was made for six
        assert way(x, bias[1:]) is None
        assert way(x, bias.double()) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert way(x) is None
            assert model(x).dtype == torch.bfloat16
        with FlopCounterMode(display=False):
            assert way(x) is None
        assert torch.func.vmap(model)(x[None]).shape == (1, 5, 1024)
        model.train()
        assert way(x) is None
        model.eval()
        weight.xf = nn.Parameter(weight.xf[1:])
        assert way(x) is None

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_every_change_of_the_code_is_seen(self, mode, tmp_path):
        model, x = wide().eval(), torch.randn(3, 1024)
        dt.save(model, tmp_path / "m.thin")
        weight = model[0].thin["weight"]

        def check():
            with mode():
                y = model(x)
                assert torch.equal(weight._short_way(x, 0, model[0].bias), y)
            want = x.double() @ model[0].weight.double().T + model[0].bias.double()
            assert_close(y, want, 1024 + 8, absolute(model)(x.abs().double()))
            return y

        first = check()
        with mode():
            weight.wf.mul_(2)  # no version counts it in inference mode
            check()
            weight.xf.data.mul_(2)  # nor here in any
            check()
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x).square().sum().backward()
        optimizer.step()
        model.eval()
        check()
        model.load_state_dict(wide(seed=None).state_dict(), assign=True)
        check()
        dt.load(model, tmp_path / "m.thin")
        assert torch.equal(check(), first)

    def test_copies_and_pickles(self):
        model, x = wide().eval(), torch.randn(3, 1024)
        with torch.no_grad():
            y = model(x)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(x), y)

    def test_many_threads_on_one_model(self):
        """Promise 11, through the layer."""
        model = wide(width=512).eval()
        xs = [torch.randn(batch, 512) for batch in (1, 2, 5, 9)]
        wrong = []
        with torch.no_grad():
            want = [model(x) for x in xs]

        def call(i):
            with torch.no_grad():
                for _ in range(200):
                    if not torch.equal(model(xs[i % 4]), want[i % 4]):
                        wrong.append(i)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    @pytest.mark.parametrize("batch", [1, 8, 32])
    @pytest.mark.parametrize("ratio", [0.0195, 0.0099, 0.004, 0.0014])
    def test_the_error_is_not_larger_than_the_dense_layers(self, ratio, batch):
        model, x = wide(ratio, 2048).eval(), torch.randn(batch, 2048)
        code = {entry: t.detach().double() for entry, t in model[0].thin["weight"].code().items()}
        exact = model[0].thin["weight"].method.decode(code, torch)
        bias = model[0].bias.detach()
        want = x.double() @ exact.T + bias
        with torch.no_grad():
            assert model[0].thin["weight"].path(x).startswith("native")
            ours = (model(x) - want).norm()
        theirs = (nn.functional.linear(x, exact.float(), bias) - want).norm()
        # A BLAS may have more accumulators than the 8 of AVX2. A sum of n random terms in one is off by a random walk:
        # its n roundings have a variance of u^2 / 6 on average, relative to partial sums of n / 2 terms on average.
        walk = 2.0**-24 * math.sqrt(2048 / 8 / 12)
        assert ours <= max(theirs, walk * want.norm())

    @pytest.mark.parametrize("batch", [1, 9])
    def test_nan_reaches_every_output_of_its_item_only(self, batch):
        model, x = wide().eval(), torch.randn(batch, 1024)
        x[batch // 2, 5] = math.nan
        with torch.no_grad():
            y = model(x)
        assert y[batch // 2].isnan().all()
        assert y.isnan().sum() == 1024

    def test_a_weight_shared_by_two_layers_has_second_gradients(self):
        """One layer's input then depends on the code of the other."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
        dt.compress(model, {"rules": {"*": {"ratio": 0.3, "rank": 1, "n": 7, "group": "flat"}}}, init="scratch")
        group, x = model[0].thin["weight"].group, torch.randn(5, 64)
        found = []
        for way in ("native-fft", "fft", "dense"):
            group.path = lambda x, index=0, way=way: way
            code = list(group.parameters())
            first = torch.autograd.grad(model(x).square().sum(), code, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), code))
        for ours in found[:2]:
            for one, other in zip(ours, found[2], strict=True):
                assert_close(
                    one, other, 3 * (2 * 64 + 5 + 300), largest(*found[2])
                )  # two layers, items, rows of factors

    def test_a_group_member_that_begins_within_a_row(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 500), nn.Linear(500, 512))
        dt.compress(model, {"rules": {"*": {"ratio": 0.01, "rank": 1, "group": "flat"}}}, init="scratch")
        group = model[0].thin["weight"].group.eval()
        for layer in model.eval():
            x = torch.randn(4, layer.in_features)
            with torch.no_grad():
                y, index = layer(x), layer.thin["weight"].index
                assert torch.equal(group._short_way(x, index, layer.bias), y)
                want = nn.functional.linear(x, layer.weight, layer.bias)
                assert_close(y, want, 512 + 8, nn.functional.linear(x.abs(), layer.weight.abs(), layer.bias.abs()))


@native
def test_torchs_number_of_threads_does_not_change_a_bit():
    """The kernels run on torch's own threads, forward and backward."""
    model, x, found = wide(), torch.randn(300, 1024), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            y = model(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
        finally:
            torch.set_num_threads(1)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@native
def test_a_forked_child_does_not_wait_for_its_parents_threads():
    """GNU OpenMP would, for ever."""
    model, x = wide().eval(), torch.randn(64, 1024)
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            want = model(x)
            child = os.fork()
            if child == 0:
                os._exit(0 if np.array_equal(model(x).numpy(), want.numpy()) else 1)  # torch.equal would wait, too
    finally:
        torch.set_num_threads(1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (done, status) == (child, 0)


@native
def test_a_plan_of_the_library_is_that_of_the_kernels():
    method = Factor((20, 30), 7, 1)
    x, xf, wf = (np.ones(s, np.float32) for s in ((2, 30), *method.code_shapes().values()))
    # Sums of ones, exact unless the processor's fastest way is by transforms: three, of 64 points.
    assert_close(products.linear(method, x, xf, wf), np.full((2, 20), 30.0), 30 + 3 * 7 * 6, 30)


@native
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use
def test_tangents_go_along():
    model = wide().eval()
    x, tangent = torch.randn(3, 1024), torch.randn(3, 1024)
    with torch.no_grad():
        model(x)
        model(x)
        weight = model[0].weight
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, tangent))
            found = torch.autograd.forward_ad.unpack_dual(y).tangent
    terms, sizes = 1024 + 8, tangent.abs() @ weight.abs().T
    assert_close(found, tangent @ weight.T, terms, sizes)
    for wanted in (True, False):
        model.requires_grad_(wanted)
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, tangent))
            assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, found, terms, sizes)


@native
@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians_and_hessians(vectorize):
    model, x = wide(width=256, ratio=0.05), torch.randn(2, 256)
    weight = model[0].weight.detach()
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[:, :3], x, vectorize=vectorize)
    assert_close(jacobian[1, :, 1], weight[:3], 256, weight[:3].norm(dim=1, keepdim=True))  # by transforms: of norms
    hessian = torch.autograd.functional.hessian(lambda x: model(x).square().sum(), x[0], vectorize=vectorize)
    assert_close(hessian, 2 * weight.T @ weight, 2 * 256, largest(2 * weight.T.abs() @ weight.abs()))


@native
def test_tensors_that_are_more_or_less_than_their_memory():
    class Named(torch.Tensor):
        pass

    method = wide()[0].thin["weight"].method
    x, xf, wf, bias = operands(1024, 1024, method.n, 1)
    weight, y = (xf @ wf).reshape(-1)[: 1024 * 1024].view(1024, 1024), linear(x, xf, wf, bias, rows=1024)
    zero = torch._efficientzerotensor(1024)
    for given, want in (
        ((x.as_subclass(Named), xf, wf, bias), y),
        ((x, xf.as_subclass(Named), wf, bias), y),
        ((x, xf, wf, zero), x @ weight.T),
        ((x, xf, torch._neg_view(-wf), bias), y),
    ):
        assert_close(linear(*given, rows=1024), want, 1024 + 8, sums(x, xf, wf, bias, 1024))
    model = wide().eval()
    thin = model[0].thin["weight"]
    with torch.no_grad():
        for _ in range(3):
            want = model(x)
        sizes = absolute(model)(x.abs().double())
        thin.wf = nn.Parameter(torch._neg_view(-thin.wf.detach()))
        assert_close(model(x), want, 1024 + 8, sizes)
        model[0].bias = nn.Parameter(zero)
        assert_close(model(x), x @ model[0].weight.T, 1024 + 8, sizes)


@native
def test_a_gradient_of_another_shape_is_refused():
    x, xf, wf, _ = operands()
    with pytest.raises(ValueError, match=r"The gradient is \(9, 29\)"):
        torch.ops.deepthin.factor_linear_backward(torch.zeros(9, 29), x, xf, wf, 30, 0, "auto", [True] * 3)
    with pytest.raises(ValueError, match="no entries"):
        linear(x, xf[:0], wf[:, :0], rows=30)


def test_inputs_that_are_no_tensors():
    """In a process of its own, where annotations are not checked, as in a user's."""
    script = """
import numpy as np, torch, deepthin.torch as dt
from torch import nn
model = nn.Sequential(nn.Linear(1024, 1024)).eval()
dt.compress(model, {"rules": {"*": {"ratio": 0.01, "rank": 1}}}, init="scratch")
try:
    model(np.zeros((2, 1024), np.float32))
except TypeError as error:
    print("linear(): argument 'input'" in str(error))
x = torch.randn(2, 1024)
with torch.no_grad():
    traced = torch.fx.symbolic_trace(model)
    allowed = 2 * 1024 * 2.0**-24 * nn.functional.linear(x.abs(), 2 * model[0].weight.abs(), model[0].bias.abs())
    print(((traced(x) - model(x)).abs() <= allowed).all().item())
    model[0].thin["weight"].xf.mul_(2)  # it reads the code, not a copy of the weight
    print(((traced(x) - model(x)).abs() <= allowed).all().item())
    model(torch.nested.nested_tensor([x, x]))
"""
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert (shown.stdout.split(), shown.returncode) == (["True"] * 3, 0), shown.stderr


def test_models_stacked_by_functional_calls():
    models = [wide(), wide()]
    for i, model in enumerate(models):
        model.eval()
        nn.init.normal_(model[0].thin["weight"].xf, generator=torch.Generator().manual_seed(i))
    stacked, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 1024)
    with torch.no_grad():
        y = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(stacked, buffers)
        assert_close(y[1], models[1](x), 1024 + 8, absolute(models[1])(x.abs().double()))


def test_replicas_of_data_parallel():
    """What torch.nn.parallel.replicate does on each device."""
    layer, x = wide().eval()[0], torch.randn(2, 1024)
    replica = layer._replicate_for_data_parallel()
    replica._modules = dict(layer._modules)
    replica.bias = layer.bias.detach() * 1
    assert_close(replica(x), layer(x), 1024 + 8, absolute(layer)(x.abs().double()))
    with pytest.raises(ConfigError, match="generated"):
        replica.weight = layer.weight


@native
def test_a_code_that_others_write_to_never_poisons_what_is_kept():
    """Spectra and dense weights are kept by value: under each value must lie what follows from it."""
    model, x = wide().eval(), torch.randn(1, 1024)
    thin = model[0].thin["weight"]
    values = [torch.randn_like(thin.wf) for _ in range(2)]
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for value in values:
                thin.wf.data.copy_(value)

    with torch.no_grad():
        worker = threading.Thread(target=write)
        worker.start()
        for _ in range(300):
            model(x)
            thin()
        stop.set()
        worker.join()
        for value in values:
            thin.wf.copy_(value)
            want = x.double() @ (thin.xf @ thin.wf).reshape(-1)[: 1024 * 1024].view(1024, 1024).double().T
            sizes = absolute(model)(x.abs().double())
            assert_close(model(x), want + model[0].bias, 1024 + 8, sizes)
            assert_close(x @ thin().T, want, 1024 + 8, sizes)
