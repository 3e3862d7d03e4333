"""A fast way keeps every option of its layer: values and gradients are those of the dense twin."""

import copy
import itertools

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.torch import layers, recurrent_layers
from deepthin.torch.exchange import thin_tensors
from tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The relative error of", "ignore:dropout option adds")

RULES = {"rules": {"*weight*": {"ratio": 0.2, "rank": 1}}}


def grid(kind, /, *args, **options):
    """The layer by its defaults, and with each value of each option by itself."""
    yield lambda: kind(*args)
    for name, values in options.items():
        for value in values:
            yield lambda name=name, value=value: kind(*args, **{name: value})


def combined(kind, /, *args, **options):
    """The layer with every combination of the values."""
    for values in itertools.product(*options.values()):
        yield lambda values=values: kind(*args, **dict(zip(options, values, strict=True)))


def ids(*shape):
    return torch.randint(0, 400, shape, generator=torch.Generator().manual_seed(2)) % 23


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


WINDOW = {"stride": (2,), "padding": (2, "same", "valid"), "dilation": (2,), "groups": (2,), "bias": (False,)}
WINDOW |= {"padding_mode": ("zeros", "reflect", "replicate", "circular")}
TURNED = {"stride": (2,), "padding": (1,), "dilation": (2,), "groups": (2,), "bias": (False,)}
CELL = {"num_layers": (1, 2), "bias": (True, False), "batch_first": (True, False), "bidirectional": (True, False)}


def padded(kind, *args, **options):
    """A convolution whose padding is not zero, so that its mode shows."""
    return kind(*args, **{"padding": 2 if "padding_mode" in options else 0, **options})


def attention(**options):
    layer = nn.MultiheadAttention(48, 4, **{"batch_first": True, **options})
    layer.calls = lambda x: (x, x[..., : options.get("kdim", 48)], x[..., : options.get("vdim", 48)])
    return layer


# name: layers, one for each set of options; inputs, of several sizes
TABLE = {
    "Linear": (grid(nn.Linear, 256, 192, bias=(False,)), lambda: [noise(n, 256) for n in (1, 3, 40)]),
    "Conv1d": (grid(lambda **o: padded(nn.Conv1d, 24, 32, 5, **o), **WINDOW), lambda: [noise(2, 24, 20)]),
    "Conv2d": (
        grid(lambda **o: padded(nn.Conv2d, 8, 16, 5, **o), **WINDOW),
        lambda: [noise(2, 8, 14, 13), noise(8, 9, 9)],
    ),
    "Conv2d by FFT": (
        grid(lambda **o: padded(nn.Conv2d, 8, 16, 17, **o), **WINDOW),
        lambda: [noise(2, 8, 72, 68), noise(8, 80, 80)],
    ),
    "Conv3d": (grid(lambda **o: padded(nn.Conv3d, 4, 8, 3, **o), **WINDOW), lambda: [noise(2, 4, 6, 7, 6)]),
    "ConvTranspose1d": (grid(nn.ConvTranspose1d, 24, 16, 5, **TURNED), lambda: [noise(2, 24, 9)]),
    "ConvTranspose2d": (grid(nn.ConvTranspose2d, 8, 16, 5, **TURNED), lambda: [noise(2, 8, 5, 6)]),
    "ConvTranspose3d": (grid(nn.ConvTranspose3d, 8, 4, 3, **TURNED), lambda: [noise(2, 8, 3, 4, 3)]),
    "ConvTranspose2d, output padding": (
        combined(nn.ConvTranspose2d, 8, 16, 5, stride=(3,), output_padding=(1, 2)),
        lambda: [noise(2, 8, 5, 6)],
    ),
    "Embedding": (
        combined(nn.Embedding, 400, 32, padding_idx=(None, 3, -380), scale_grad_by_freq=(False, True)),
        lambda: [ids(7), ids(2, 30), ids(500)],
    ),
    "EmbeddingBag": (
        combined(
            nn.EmbeddingBag, 400, 32, mode=("sum", "mean"), scale_grad_by_freq=(False, True), padding_idx=(None, 3)
        ),
        lambda: [ids(3, 5), ids(40, 20)],
    ),
    "EmbeddingBag, max": (combined(nn.EmbeddingBag, 400, 32, mode=("max",)), lambda: [ids(3, 5)]),
    "RNN": (combined(nn.RNN, 40, 64, nonlinearity=("tanh", "relu"), **CELL), lambda: [noise(5, 3, 40), noise(4, 40)]),
    "GRU": (combined(nn.GRU, 40, 64, **CELL), lambda: [noise(5, 3, 40), noise(4, 40)]),
    "LSTM": (combined(nn.LSTM, 40, 64, **CELL), lambda: [noise(5, 3, 40), noise(4, 40)]),
    "LSTM, projected": (
        combined(nn.LSTM, 40, 64, 2, proj_size=(16,), bidirectional=(True, False)),
        lambda: [noise(5, 3, 40)],
    ),
    "dropout of everything": (
        combined(lambda kind, **o: kind(40, 64, 2, **o), kind=(nn.RNN, nn.GRU, nn.LSTM), dropout=(1.0,)),
        lambda: [noise(5, 3, 40)],
    ),
    "MultiheadAttention": (
        grid(
            attention, bias=(False,), add_bias_kv=(True,), add_zero_attn=(True,), kdim=(40,), vdim=(32,),
            batch_first=(False,),
        ),
        lambda: [noise(3, 6, 48), noise(6, 48)],
    ),
}  # fmt: skip
MADE = {name: list(makers) for name, (makers, _) in TABLE.items()}


def call(layer, x):
    arguments = getattr(layer, "calls", lambda x: (x,))(x)
    result = layer(*arguments)
    while isinstance(result, tuple):
        result = result[0]
    return result


def gradients(layer, x):
    """The output, the gradient of the input, and those of the parameters, thin ones of their dense tensors."""
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    layer.zero_grad()
    y = call(layer, x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y, x.grad if x.is_floating_point() else None


def close(got, want):
    """Some thousand terms, of magnitudes that the largest number stands for."""
    assert_close(got, want, 4000, want.detach().abs().max().double() + 1e-6)


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, made in MADE.items() for i in range(len(made))])
def test_every_option_has_the_values_and_gradients_of_the_dense_twin(name, number):
    torch.manual_seed(0)
    layer = MADE[name][number]()
    calls = layer.__dict__.pop("calls", None)
    model = nn.Sequential(layer)
    dt.compress(model, RULES, init="scratch")
    twin = dt.materialize(copy.deepcopy(model))
    if calls:
        model[0].calls = twin[0].calls = calls
    for x, training in itertools.product(TABLE[name][1](), (True, False)):
        model.train(training), twin.train(training)
        (got, got_x), (want, want_x) = gradients(model[0], x), gradients(twin[0], x)
        close(got, want)
        if want_x is not None:
            close(got_x, want_x)
        parameters = dict(twin.named_parameters())
        for tensor, (weight, index) in thin_tensors(model).items():
            entries = [p for p in weight.parameters() if p.requires_grad]
            pulled = torch.autograd.grad(weight(index), entries, parameters[tensor].grad)
            for entry, gradient in zip(entries, pulled, strict=True):
                close(entry.grad, gradient)
        for tensor, parameter in model.named_parameters():
            if ".thin." not in tensor:
                close(parameter.grad, parameters[tensor].grad)
    with torch.no_grad():
        for x in TABLE[name][1]():
            for _ in range(2):  # then by what is cached
                close(call(model.eval()[0], x), call(twin.eval()[0], x))


@pytest.mark.parametrize("name", ["Conv2d by FFT", "Embedding", "LSTM"])
def test_the_table_reaches_the_fast_ways(name, monkeypatch):
    used = []
    where = {
        "Conv2d by FFT": (layers.spectral, "convolve"),
        "Embedding": (layers.ThinWeight, "rows"),
        "LSTM": (recurrent_layers, "recurrent"),
    }
    owner, function = where[name]
    plain = getattr(owner, function)
    monkeypatch.setattr(owner, function, lambda *given: used.append(1) or plain(*given))
    torch.manual_seed(0)
    model = nn.Sequential(MADE[name][0]())
    dt.compress(model, RULES, init="scratch")
    with torch.no_grad():
        call(model.eval()[0], TABLE[name][1]()[0])
    assert used


def test_a_shared_table_keeps_the_padding_of_each_layer():
    torch.manual_seed(0)
    model = nn.ModuleList(
        [nn.Embedding(400, 32, padding_idx=3), nn.Embedding(400, 32, padding_idx=5), nn.Embedding(400, 32)]
    )
    for layer in model[1:]:
        layer.weight = model[0].weight
    with torch.no_grad():
        model[0].weight[3] = 0
    dt.compress(model, {"rules": {"*": {"ratio": 0.1}}})
    twin = dt.materialize(copy.deepcopy(model))
    for number, x in itertools.product(range(3), (torch.tensor([3, 5, 5, 7]), ids(500))):
        (got, _), (want, _) = gradients(model[number], x), gradients(twin[number], x)
        close(got, want)
        weight = model[0].thin["weight"]
        entries = list(weight.parameters())
        for entry, pulled in zip(entries, torch.autograd.grad(weight(), entries, twin[0].weight.grad), strict=True):
            close(entry.grad, pulled)
