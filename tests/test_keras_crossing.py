"""Files cross: what Keras saves torch and NumPy read, and the other way round, layer by layer.

The backend is that of KERAS_BACKEND; torch is there besides, to compare with.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin.errors import ConfigError
from deepthin.plan.start import drawn, generator

pytest.importorskip("keras")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    from keras import layers

    import deepthin.keras as dk

pytestmark = pytest.mark.filterwarnings("ignore")

EPS = 2.0**-23


class Last(nn.Module):
    """A recurrent layer's outputs, without its states."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def recurrent(bias="one", **directions):
    """Names of the file, by those in torch."""
    found = {}
    for cell, end in directions.items():
        place = cell.replace("__", ".")
        found |= {f"layer.weight_ih_{end}": f"{place}.kernel", f"layer.weight_hh_{end}": f"{place}.recurrent_kernel"}
        found |= {f"layer.bias_ih_{end}": f"{place}.bias"}
        if bias == "two":
            found |= {f"layer.bias_hh_{end}": f"{place}.recurrent_bias"}
    return found


ONE = {"weight": "a.kernel", "bias": "a.bias"}
PLACES = (0, 2, 3, 1)  # images: Keras has channels last
CASES = {
    "dense": (lambda: layers.Dense(7, name="a"), lambda: nn.Linear(12, 7), (12,), ONE, None),
    "no bias": (
        lambda: layers.Dense(7, use_bias=False, name="a"),
        lambda: nn.Linear(12, 7, bias=False),
        (12,),
        {"weight": "a.kernel"},
        None,
    ),
    "conv1d": (lambda: layers.Conv1D(6, 3, name="a"), lambda: nn.Conv1d(4, 6, 3), (9, 4), ONE, (0, 2, 1)),
    "conv2d": (
        lambda: layers.Conv2D(6, (3, 2), strides=2, groups=2, name="a"),
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2),
        (9, 8, 4),
        ONE,
        PLACES,
    ),
    "conv3d": (lambda: layers.Conv3D(3, 2, name="a"), lambda: nn.Conv3d(4, 3, 2), (3, 4, 5, 4), ONE, (0, 2, 3, 4, 1)),
    "transposed": (
        lambda: layers.Conv2DTranspose(6, (3, 2), strides=2, name="a"),
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2),
        (4, 5, 4),
        ONE,
        PLACES,
    ),
    "depthwise": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="a"),
        lambda: nn.Conv2d(4, 8, 3, groups=4),
        (6, 7, 4),
        ONE,
        PLACES,
    ),
    "lstm": (
        lambda: layers.LSTM(6, return_sequences=True, name="a"),
        lambda: Last(nn.LSTM(5, 6, batch_first=True)),
        (4, 5),
        recurrent(a__lstm_cell="l0"),
        None,
    ),
    "rnn": (
        lambda: layers.SimpleRNN(6, return_sequences=True, name="a"),
        lambda: Last(nn.RNN(5, 6, batch_first=True)),
        (4, 5),
        recurrent(a__simple_rnn_cell="l0"),
        None,
    ),
    "gru": (
        lambda: layers.GRU(6, return_sequences=True, name="a"),
        lambda: Last(nn.GRU(5, 6, batch_first=True)),
        (4, 5),
        recurrent(bias="two", a__gru_cell="l0"),
        None,
    ),
    "bidirectional": (
        lambda: layers.Bidirectional(layers.LSTM(6, return_sequences=True, name="own"), name="a"),
        lambda: Last(nn.LSTM(5, 6, batch_first=True, bidirectional=True)),
        (4, 5),
        recurrent(a__forward_own__lstm_cell="l0", a__backward_own__lstm_cell="l0_reverse"),
        None,
    ),
    "bidirectional gru": (
        lambda: layers.Bidirectional(layers.GRU(6, return_sequences=True, name="own"), name="a"),
        lambda: Last(nn.GRU(5, 6, batch_first=True, bidirectional=True)),
        (4, 5),
        recurrent(bias="two", a__forward_own__gru_cell="l0", a__backward_own__gru_cell="l0_reverse"),
        None,
    ),
    "time distributed": (
        lambda: layers.TimeDistributed(layers.Dense(7, name="b"), name="a"),
        lambda: nn.Linear(5, 7),
        (4, 5),
        {"weight": "a.b.kernel", "bias": "a.b.bias"},
        None,
    ),
}
METHODS = [
    {"method": "deepthin", "ratio": 0.6},
    {"method": "kmeans", "bits": 3},
    {"method": "uniform", "bits": 6},
    {"method": "coded", "bits": 8},
    {"method": "pruned", "ratio": 0.5},
]


def of_keras(build, shape, seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(shape), build()])
    for variable in model.weights:  # biases too
        variable.assign(np.random.default_rng(seed).normal(size=variable.shape, scale=0.5))
    return model


def turned(x, axes):
    return x if axes is None else np.transpose(x, (0, x.ndim - 1, *range(1, x.ndim - 1)))


def assert_close(got, wanted, width):
    """Sums of ``width`` products, some deep; all values are of the order of one."""
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 16 * width * EPS * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_a_layer_crosses_from_keras_to_torch_and_numpy_and_back(case, tmp_path):
    build, make, shape, names, axes = CASES[case]
    rule = METHODS[len(case) % len(METHODS)]
    model = of_keras(build, shape)
    dk.compress(model, {"rules": {"*": rule}})
    dk.save(model, tmp_path / "keras.thin")

    x = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    wanted = keras.ops.convert_to_numpy(model(x))
    other = dt.load(make(), tmp_path / "keras.thin", names={ours: theirs for theirs, ours in names.items()}).eval()
    with torch.no_grad():
        y = other(torch.from_numpy(turned(x, axes))).numpy()
    got = np.moveaxis(y, 1, -1) if axes is not None else y
    assert_close(got, wanted, 100)

    arrays = deepthin.load(tmp_path / "keras.thin")
    for theirs, ours in names.items():  # (outputs, inputs), gates in torch's order
        module, _, own = theirs.rpartition(".")
        tensor = getattr(other.get_submodule(module), own).detach().numpy()
        assert np.abs(arrays[ours] - tensor).max() <= 16 * EPS * np.abs(tensor).max()

    dt.save(other, tmp_path / "torch.thin")
    if case in ("lstm", "rnn", "bidirectional"):  # torch has two biases where Keras has their sum
        names = names | {theirs.replace("_ih_", "_hh_"): ours for theirs, ours in names.items() if "bias" in theirs}
    again = dk.load(of_keras(build, shape, seed=5), tmp_path / "torch.thin", names=names)
    assert_close(keras.ops.convert_to_numpy(again(x)), wanted, 100)
    dk.save(again, tmp_path / "again.thin")
    assert (tmp_path / "again.thin").read_bytes() == (tmp_path / "keras.thin").read_bytes()


@pytest.mark.parametrize(
    "rule", [*METHODS, {"method": "ecsq", "bits": 2}, {"method": "binary", "bits": 3, "rounds": 0}]
)
def test_integers_are_equal_and_floats_the_same(rule, tmp_path):
    model = of_keras(lambda: layers.Dense(16, name="a"), (24,))
    dk.compress(model, {"rules": {"*": rule}})
    dk.save(model, tmp_path / "keras.thin")
    names = {"a.kernel": "weight", "a.bias": "bias"}
    layer = dt.load(nn.Linear(24, 16), tmp_path / "keras.thin", names=names)
    mine, theirs = model.layers[0].thin["kernel"].code(), layer.thin["weight"].code()
    assert mine.keys() == theirs.keys()
    for entry, array in mine.items():
        np.testing.assert_array_equal(array, theirs[entry].detach().numpy())
    fresh = dk.load(of_keras(lambda: layers.Dense(16, name="a"), (24,), seed=4), tmp_path / "keras.thin")
    kernel = keras.ops.convert_to_numpy(fresh.layers[0].kernel)
    assert np.abs(kernel.T - layer.weight.detach().numpy()).max() <= 16 * EPS * np.abs(kernel).max()
    np.testing.assert_array_equal(deepthin.load(tmp_path / "keras.thin")["a.bias"], layer.bias.detach().numpy())


def test_an_embedding_and_a_normalisation_cross(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(30, 8, name="e"), layers.BatchNormalization(name="n")]
    )
    for variable in model.weights:
        variable.assign(np.random.default_rng(3).uniform(0.5, 1.5, size=variable.shape))
    dk.compress(model, {"rules": {"e": {"method": "deepthin", "ratio": 0.5}}})
    dk.save(model, tmp_path / "m.thin")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.n = nn.Embedding(30, 8), nn.BatchNorm1d(8, eps=1e-3)

        def forward(self, x):
            return self.n(self.e(x).transpose(1, 2)).transpose(1, 2)

    names = {
        "e.embeddings": "e.weight",
        "n.gamma": "n.weight",
        "n.beta": "n.bias",
        "n.moving_mean": "n.running_mean",
        "n.moving_variance": "n.running_var",
    }
    net = dt.load(Net(), tmp_path / "m.thin", names=names).eval()
    places = np.random.default_rng(0).integers(0, 30, (4, 6))
    with torch.no_grad():
        got = net(torch.from_numpy(places)).numpy()
    assert_close(got, keras.ops.convert_to_numpy(model(places.astype("int32"))), 20)
    dt.save(net, tmp_path / "t.thin")
    back = {theirs: ours for ours, theirs in names.items()}
    with pytest.raises(ConfigError, match=r"holds 'e\.weight'.* which the model lacks"):
        dk.load(model, tmp_path / "t.thin")
    dk.load(model, tmp_path / "t.thin", names=back)
    assert_close(keras.ops.convert_to_numpy(model(places.astype("int32"))), got, 20)


def test_a_gru_that_torch_has_not_is_refused_there(tmp_path):
    model = of_keras(lambda: layers.GRU(6, reset_after=False, name="a"), (4, 5))
    dk.save(model, tmp_path / "m.thin")
    names = {
        "a.gru_cell.kernel": "weight_ih_l0",
        "a.gru_cell.recurrent_kernel": "weight_hh_l0",
        "a.gru_cell.bias": "bias_ih_l0",
    }
    with pytest.raises(ConfigError, match="lacks 'bias_hh_l0'"):
        dt.load(nn.GRU(5, 6), tmp_path / "m.thin", names=names)


def test_fresh_factors_follow_from_name_and_seed_as_in_torch():
    rules = {"rules": {"*": {"method": "deepthin", "ratio": 0.4}}}
    model = of_keras(lambda: layers.Dense(16, name="a"), (24,))
    dk.compress(model, rules, init="scratch", seed=7)
    net = nn.Sequential(nn.Linear(24, 16))
    dt.compress(net, rules, init="scratch", seed=7)
    weights = {"a.kernel": model.layers[0].thin["kernel"], "0.weight": net[0].thin["weight"]}
    assert weights["a.kernel"].method == weights["0.weight"].method
    for name, weight in weights.items():
        code, _ = drawn(weight.method, generator(name, 7), math.sqrt(0.2 / 24))
        for entry, array in weight.code().items():
            np.testing.assert_array_equal(np.asarray(array.detach() if name == "0.weight" else array), code[entry])
