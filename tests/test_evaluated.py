"""Rounded weights in evaluation: which changes are seen, what is not computed again, and which way is taken."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin import ConfigError
from deepthin.kernels import products
from deepthin.torch import evaluated
from deepthin.torch.cache import StateCache
from deepthin.torch.operators import short_ways
from deepthin.torch.sequential import ThinSequential
from deepthin.torch.weight import ThinWeight

ROUNDINGS = {
    "uniform": {"then": {"method": "uniform", "bits": 8}},
    "coded": {"then": {"method": "coded"}},
    "rows": {"then": {"method": "uniform", "bits": 8, "per": "row"}},
}
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
native = pytest.mark.skipif(not short_ways, reason="no native calls here")
SIZES = (60, 256, 256, 200)


def network(rounding=ROUNDINGS["uniform"], bias=None, **options):
    """Three thin layers with rectifiers, in evaluation; with thin biases of a method, or dense ones."""
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(SIZES) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    rules = {"*weight": {"rank": 1, "ratio": 0.05, **rounding, **options}}
    dt.compress(model, {"rules": rules | ({"*bias": bias} if bias else {})}, init="scratch")
    return model.eval()


def fresh(model, x):
    """What a copy without anything computed gives."""
    with torch.no_grad():
        return copy.deepcopy(model)(x)


@pytest.fixture
def ready():
    """A model that has computed what evaluation reads, and an input."""
    model, x = network(), torch.randn(3, 60)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model, x


def weight_of(model, place=0):
    return model[place].thin["weight"]


def write_in_place(model):
    with torch.no_grad():
        weight_of(model).xf.mul_(2)


def write_within(model):
    with torch.no_grad():
        weight_of(model, 2).wf[0, 0] = 1.0


def write_in_inference_mode(model):
    with torch.inference_mode():
        torch._foreach_mul_([weight_of(model).wf], 2.0)


def replace_parameter(model):
    weight_of(model).xf = nn.Parameter(weight_of(model).xf.detach() * 2)


def replace_memory(model):
    weight_of(model).xf.data = weight_of(model).xf.detach() * 2


def load_state_dict(model):
    other = network()
    write_in_place(other)
    model.load_state_dict(other.state_dict())


def assign_state_dict(model):
    other = network()
    write_in_place(other)
    model.load_state_dict(other.state_dict(), assign=True)


def set_code(model):
    code = weight_of(model).code()
    weight_of(model).set_code({e: t.flip(0) if e.endswith("symbols") else t for e, t in code.items()})


def write_data_and_toggle(model):
    weight_of(model).xf.data.mul_(2)
    model.train()
    model.eval()


def write_data_and_evaluate_again(model):
    weight_of(model).xf.data.mul_(2)
    model.eval()


def apply(model):
    model._apply(lambda t: t.mul_(2) if t.dim() == 2 else t)


CHANGES = (
    write_in_place,
    write_within,
    write_in_inference_mode,
    replace_parameter,
    replace_memory,
    load_state_dict,
    assign_state_dict,
    set_code,
    write_data_and_toggle,
    write_data_and_evaluate_again,
    apply,
)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(ready, change, mode):
    model, x = ready
    with mode():
        before = model(x)
    with torch.no_grad():
        change(model)
    want = fresh(model, x)
    with mode():
        for _ in range(2):
            assert torch.equal(model(x), want)
    assert not torch.equal(before, want)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
@each_rounding
def test_steps_of_optimisers_in_evaluation_are_seen(options, rounding):
    """Fused ones count no version."""
    model, x = network(rounding), torch.randn(3, 60)
    optimizer = torch.optim.Adam(model.parameters(), 0.05, **options)
    for _ in range(3):
        model(x).square().sum().backward()
        with torch.no_grad():
            before = model(x)
            assert torch.equal(before, model(x))
        optimizer.step()
        optimizer.zero_grad()
        want = fresh(model, x)
        with torch.no_grad():
            assert not torch.equal(before, want)
            for _ in range(2):
                assert torch.equal(model(x), want)


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it has deprecated
@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_step_is_seen(ready, fused):
    model, x = ready
    optimizer = torch.optim.SGD(model.parameters(), 0.05, fused=fused)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        model(x).square().sum().backward()
        with torch.no_grad():
            before = model(x)
        step()
        want = fresh(model, x)
        with torch.no_grad():
            assert torch.equal(model(x), want)
        assert not torch.equal(before, want)


def test_memory_shared_with_other_processes_is_compared_by_value(ready):
    model, x = ready
    model.share_memory()
    with torch.no_grad():
        model(x)
        weight_of(model).xf.data.mul_(2)  # as another process writes: no version of this one counts it
        assert torch.equal(model(x), fresh(model, x))


def test_tensors_of_inference_mode_are_compared_by_value():
    with torch.inference_mode():
        model, x = network(), torch.randn(3, 60)
        before = model(x)
        weight_of(model).xf.mul_(2)
        after = model(x)
        assert not torch.equal(before, after)
        assert torch.equal(after, copy.deepcopy(model)(x))


def test_copies_pickles_and_types(ready, tmp_path):
    model, x = ready
    with torch.no_grad():
        want = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), want)
            write_in_place(twin)
            assert torch.equal(twin(x), fresh(twin, x))
        assert torch.equal(model(x), want)
        double = model.double()(x.double())
        assert double.dtype == torch.float64
        assert torch.equal(double, fresh(model, x.double()))


def test_a_loaded_model_evaluates_and_trains(ready, tmp_path):
    model, x = ready
    dt.save(model, tmp_path / "m.thin")
    layers = [m for a, b in itertools.pairwise(SIZES) for m in (nn.Linear(a, b), nn.ReLU())]
    loaded = dt.load(nn.Sequential(*layers[:-1]), tmp_path / "m.thin").eval()
    with torch.no_grad():
        want = model(x)
        for _ in range(3):
            assert torch.equal(loaded(x), want)
    loaded.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in weight_of(loaded).parameters())
    loaded.eval()
    y = loaded(x)
    assert y.requires_grad
    torch.optim.SGD(loaded.parameters(), 0.1).step()
    with torch.no_grad():
        assert torch.equal(loaded(x), fresh(loaded, x))
        assert not torch.equal(loaded(x), want)


@native
@each_rounding
@pytest.mark.parametrize("bias", [None, {"method": "uniform", "bits": 8}, {"method": "kmeans", "bits": 4}])
@pytest.mark.parametrize("options", [{}, {"group": "flat"}])
def test_the_chain_reads_rounded_factors_and_thin_biases(rounding, bias, options):
    model, x = network(rounding, bias, **options), torch.randn(3, 60)
    assert type(model) is ThinSequential
    with torch.no_grad():
        want = x
        for module in model:
            want = module(want)
        for _ in range(3):
            assert torch.equal(model(x), want)
        ((modules, chain),) = model._runs[1]
        assert len(modules) == 5
        assert torch.equal(chain(x), want)
        owner = model[2].thin["bias" if bias else "weight"]
        owner = getattr(owner, "group", owner)
        parameter = next(owner.parameters())
        parameter.mul_(2)
        assert chain(x) is None  # the decoded values are no longer current
        after = model(x)
        assert not torch.equal(after, want)
        assert torch.equal(chain(x), after)
        assert torch.equal(after, fresh(model, x))


@native
def test_hooks_of_a_thin_bias_are_called():
    model, x, calls = network(bias={"method": "uniform", "bits": 8}), torch.randn(3, 60), []
    with torch.no_grad():
        want = model(x)
        model(x)
        handle = model[0].thin["bias"].register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(model(x), want)
        assert calls == [1]
        handle.remove()
        assert model._runs[1][0][1](x) is not None


@native
def test_a_decoded_bias_that_is_written_to_is_decoded_again():
    model, x = network(bias={"method": "uniform", "bits": 8}), torch.randn(3, 60)
    with torch.no_grad():
        want = model(x)
        model(x)
        with pytest.raises(ConfigError, match="bias of a ThinLinear is lost"):
            model[0].bias.add_(1)
        model[0].thin["bias"]().add_(1)
        assert model._runs[1][0][1](x) is None
        assert torch.equal(model(x), want)


@native
@each_rounding
@pytest.mark.parametrize("kind", ["sequential", "linear", "lstm", "embedding", "conv"])
def test_nothing_is_compared_or_decoded_at_each_call(kind, rounding, monkeypatch):
    """Counted, not timed: values compared and codes decoded, once all is computed."""
    torch.manual_seed(0)
    model, x = {
        "sequential": lambda: (network(rounding, {"method": "uniform", "bits": 8}), torch.randn(1, 60)),
        "linear": lambda: (nn.Sequential(nn.Linear(60, 256)), torch.randn(1, 60)),
        "lstm": lambda: (nn.LSTM(256, 256), torch.randn(5, 1, 256)),
        "embedding": lambda: (nn.Embedding(500, 64), torch.tensor([3, 7])),
        "conv": lambda: (nn.Sequential(nn.Conv2d(8, 16, 3)), torch.randn(1, 8, 9, 9)),
    }[kind]()
    if kind != "sequential":
        dt.compress(model, {"rules": {"*weight*": {"rank": 1, "ratio": 0.05, **rounding}}}, init="scratch")
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            want = model(x)
        calls = []
        for owner, name in (
            (StateCache, "get"),
            (ThinWeight, "_decode_floats"),
            (evaluated, "same_values"),
        ):
            plain = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *args, plain=plain: (calls.append(plain), plain(*args))[1])
        again = model(x)
        assert not calls
        write = next(p for name, p in model.named_parameters() if "thin.weight" in name)
        write.mul_(2)
        model(x)
        assert calls  # so that the counters count
    first, second = (y[0] if isinstance(y, tuple) else y for y in (want, again))
    assert torch.equal(first, second)


@native
def test_the_check_in_native_code_is_the_one_in_python(ready):
    model, _ = ready
    weight = weight_of(model)
    with torch.no_grad():
        held = weight._now()
        assert products.native().current(weight.__dict__) is held
        assert evaluated.is_current(held, weight.state(), False)
        assert not evaluated.is_current(held, weight.state(), True)  # in training, values alone tell
        weight.wf.mul_(1)
        assert products.native().current(weight.__dict__) is None
        assert not evaluated.is_current(held, weight.state(), False)
        weight._now()
        assert products.native().current(weight.__dict__) is not None
    assert products.native().current(weight.__dict__) is None  # a gradient may be needed
    weight.requires_grad_(False)
    assert products.native().current(weight.__dict__) is not None
    with torch.autocast("cpu"):
        assert products.native().current(weight.__dict__) is None
    weight.train()
    assert products.native().current(weight.__dict__) is None


def test_without_native_code_the_same(ready, monkeypatch):
    model, _ = ready
    for module in ("rounding", "operand"):
        monkeypatch.setattr(f"deepthin.torch.{module}.current", evaluated._looked_up)
    with torch.no_grad():
        before = weight_of(model)(0)
        assert weight_of(model)(0) is before
        write_in_place(model)
        assert torch.equal(weight_of(model)(0), copy.deepcopy(weight_of(model))(0))
        assert not torch.equal(weight_of(model)(0), before)


@pytest.mark.parametrize("kind", ["layer", "chain"])
def test_threads_see_one_state_or_the_other(kind):
    """A parameter is exchanged in turn while two threads multiply: every result belongs to one of its values."""
    model, inputs = network(), torch.randn(1, 256 if kind == "layer" else 60)
    run, weight, wants = model[2] if kind == "layer" else model, weight_of(model, 2), []
    values = [weight.wf.detach().clone(), weight.wf.detach().flip(1) * 3]
    with torch.no_grad():
        for value in values:
            weight.wf = nn.Parameter(value.clone())
            wants.append([run(inputs) for _ in range(3)][-1])
    assert not torch.equal(*wants)
    failures, counts, stop = [], [0, 0], threading.Event()

    def multiply():
        with torch.no_grad():
            while not stop.is_set():
                y = run(inputs)
                which = [place for place, want in enumerate(wants) if torch.equal(y, want)]
                if which:
                    counts[which[0]] += 1
                else:
                    failures.append(y)

    workers = [threading.Thread(target=multiply) for _ in range(2)]
    for worker in workers:
        worker.start()
    turn = 0
    while turn < 500 or (min(counts) < 20 and not failures and turn < 1_000_000):
        weight.wf = nn.Parameter(values[turn % 2].clone())
        turn += 1
        stop.wait(0.0002)
    stop.set()
    for worker in workers:
        worker.join()
    assert not failures
    assert min(counts) > 0
