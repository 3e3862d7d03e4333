"""Thin nn.Sequential: the same bits in one native call, and the ordinary way as soon as anything is not as it was."""

import copy
import gc
import pickle
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.kernels import products
from deepthin.torch.sequential import ThinSequential
from tolerance import absolute, assert_close

pytestmark = pytest.mark.skipif(not products.native_available, reason="no native kernels here")


def network(**options):
    torch.manual_seed(0)
    layers = [nn.Linear(60, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 256), nn.Linear(256, 200, bias=False)]
    model = nn.Sequential(*layers, nn.ReLU())
    dt.compress(model, {"model": {"ratio": 0.05}, "rules": {"*": {"rank": 1, **options}}}, init="scratch")
    for layer in model:
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.bias)
    return model.eval()


def terms_and_sums(model, x):
    """Of three chained layers: the terms of each, and the magnitudes of what they sum."""
    with torch.no_grad():
        return 60 + 256 + 256 + 3 * 8, absolute(model)(x.abs().double())


def one_by_one(model, x):
    for module in model:
        x = module(x)
    return x


def chained(model, x):
    """The result of the chain alone, or none."""
    ((_, chain),) = model._runs[1]
    y = chain(x)
    return None if y is NotImplemented else y


@pytest.fixture
def ready():
    """A model that has its chain, and an input."""
    model, x = network(), torch.randn(3, 60)
    with torch.no_grad():
        model(x)
        model(x)
        assert chained(model, x) is not None
        yield model, x


@pytest.mark.parametrize("options", [{}, {"group": "flat"}])
@pytest.mark.parametrize("batch", [(1,), (9,), (2, 4), ()])
def test_the_same_bits(batch, options):
    model, x = network(**options), torch.randn(*batch, 60)
    assert type(model) is ThinSequential
    with torch.no_grad():
        want = one_by_one(model, x)
        for _ in range(3):
            assert torch.equal(model(x), want)
        assert torch.equal(chained(model, x), want)


def test_every_change_of_a_weight_is_seen(ready):
    model, x = ready
    for change in (
        lambda: model[0].thin["weight"].xf.mul_(2),
        lambda: model[3].bias.data.add_(1),
        lambda: setattr(model[3].thin["weight"], "wf", nn.Parameter(model[3].thin["weight"].wf * 3)),
        lambda: model[0].bias.zero_(),
    ):
        before = model(x)
        change()
        assert torch.equal(model(x), one_by_one(model, x))
        assert not torch.equal(model(x), before)
        assert chained(model, x) is not None


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(ready, hook):
    model, x = ready
    calls = []
    handle = getattr(model[1], hook)(lambda *_: calls.append(1))
    model(x)
    assert calls == [1]
    assert chained(model, x) is None
    handle.remove()
    model(x)
    assert calls == [1]
    assert chained(model, x) is not None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        model(x)
    finally:
        handle.remove()
    assert len(calls) == 8  # six modules and the whole


def test_modules_that_change(ready):
    model, x = ready
    for change in (
        lambda: model.__setitem__(1, nn.Tanh()),
        lambda: model.append(nn.Sigmoid()),
        lambda: model.__delitem__(2),
        lambda: setattr(model[0], "forward", lambda x: torch.zeros(len(x), 256)),
        lambda: model[0].__dict__.pop("forward"),
    ):
        before = model(x)
        change()
        for _ in range(2):
            assert torch.equal(model(x), one_by_one(model, x))
        assert type(model) is ThinSequential
        assert before.shape[0] == 3
    plain = dt.materialize(copy.deepcopy(model))
    assert type(plain) is nn.Sequential
    assert_close(plain(x), model(x), *terms_and_sums(plain, x))


def test_a_layer_materialised_alone(ready):
    model, x = ready
    before = model(x)
    dt.materialize(model[0])
    for _ in range(2):
        assert_close(model(x), before, *terms_and_sums(model, x))
    assert type(model[0]) is nn.Linear
    with pytest.warns(UserWarning, match="relative error"):
        dt.compress(model, {"rules": {"3.bias": {"ratio": 0.5}}})  # generated, so not where a parameter would be
    for _ in range(3):
        assert torch.equal(model(x), one_by_one(model, x))


def test_idle_dropout_is_passed_over_and_busy_dropout_is_not(ready):
    model, x = ready
    quiet = model(x)
    model[2].train()
    assert not torch.equal(model(x), quiet)
    assert not torch.equal(model(x), quiet)
    model[2].eval()
    assert torch.equal(model(x), quiet)


def test_what_is_wanted_besides_the_result(ready):
    model, x = ready
    y = model(x)
    with torch.enable_grad():
        assert model(x).requires_grad
        assert_close(model(x), y, *terms_and_sums(model, x))
    assert model.train()(x).shape == y.shape
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert_close(y, model.double()(x.double()), *terms_and_sums(model, x))
    assert chained(model, x) is None
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 61, dtype=torch.float64))


def test_copies_and_files(ready, tmp_path):
    model, x = ready
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        assert torch.equal(twin(x), y)
    dt.save(model, tmp_path / "m.thin")
    layers = [nn.Linear(60, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 256), nn.Linear(256, 200, bias=False)]
    loaded = dt.load(nn.Sequential(*layers, nn.ReLU()), tmp_path / "m.thin").eval()
    assert type(loaded) is ThinSequential
    assert torch.equal(loaded(x), y)
    assert torch.equal(loaded(x), y)


def test_other_modules_around_and_between():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(60, 256), nn.ReLU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 9)
    )
    dt.compress(model, {"model": {"ratio": 0.05}, "rules": {"*": {"rank": 1}}}, init="scratch")
    x = torch.randn(3, 6, 10)
    with torch.no_grad():
        want = one_by_one(model.eval(), x)
        for _ in range(3):
            assert torch.equal(model(x), want)
    assert [len(modules) for modules, _ in model._runs[1]] == [1, 3, 1, 1]
    assert [chain is not None for _, chain in model._runs[1]] == [False, True, False, False]


def test_changes_that_leave_the_modules_where_they_are(ready):
    model, x = ready
    calls = []

    class Doubled(type(model[3].thin["weight"])):
        def product(self, x, index=0, bias=None):
            return 2 * super().product(x, index, bias)

    for change in (
        lambda: setattr(model[1], "_forward_hooks", OrderedDict({0: lambda *_: calls.append(1)})),
        lambda: model[0].__dict__.update(_forward_pre_hooks=OrderedDict({0: lambda *_: calls.append(2)})),
        lambda: setattr(model[3].thin["weight"], "__class__", Doubled),
        lambda: setattr(model[0].thin["weight"], "product", lambda x, index=0, bias=None: torch.zeros(len(x), 256)),
    ):
        change()
        calls.clear()
        y = model(x)
        seen = list(calls)
        assert torch.equal(y, one_by_one(model, x))
        assert calls == seen * 2


def test_a_model_that_is_dropped_is_collected(ready):
    model, x = ready
    twin = copy.deepcopy(model)
    twin(x)
    twin(x)
    assert chained(twin, x) is not None
    gone = weakref.ref(twin[0])
    del twin
    gc.collect()
    assert gone() is None


def test_modes_that_watch_functions(ready):
    model, x = ready
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        model(x)
    assert torch.nn.functional.relu in seen


def test_a_batch_that_is_taken_in_pieces(ready):
    model, _ = ready
    x = torch.randn(5000, 60)
    want = one_by_one(model, x)
    for _ in range(2):
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("swap", ["data", "parameter"])
def test_weights_exchanged_while_others_multiply(swap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
    dt.compress(model, {"model": {"ratio": 0.01}, "rules": {"*": {"rank": 1}}}, init="scratch")
    model.eval()
    x, codes = torch.randn(64, 512), [model[i].thin["weight"] for i in (0, 2)]
    failures, stop = [], threading.Event()
    with torch.no_grad():
        want = model(x)

    def multiply():
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(model(x), want):
                    failures.append("other bits")
                    return

    workers = [threading.Thread(target=multiply) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(1500):
        for code in codes:
            for name in ("xf", "wf"):
                old = getattr(code, name)
                if swap == "data":
                    old.data = old.detach().clone()
                else:
                    setattr(code, name, nn.Parameter(old.detach().clone()))
                del old
                torch.full((codes[0].xf.numel(),), float("nan"))  # what is freed is soon written to
    stop.set()
    for worker in workers:
        worker.join()
    assert not failures
