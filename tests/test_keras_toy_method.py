"""The toy method of test_toy_method.py in Keras: it trains in every kind of layer, and comes back from a file."""

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import deepthin  # noqa: E402
import deepthin.keras as dk  # noqa: E402
from deepthin import METHODS  # noqa: E402
from test_toy_method import STRIPED  # noqa: E402
from tolerance import assert_close, largest  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Keras' own, of NumPy 2

L = keras.layers
LAYERS = {
    "Dense": (lambda: [L.Dense(30)], (24,)),
    "Conv1D": (lambda: [L.Conv1D(12, 3)], (9, 6)),
    "Conv2D": (lambda: [L.Conv2D(12, 3)], (7, 7, 3)),
    "Conv3D": (lambda: [L.Conv3D(12, 2)], (4, 4, 4, 2)),
    "Conv1DTranspose": (lambda: [L.Conv1DTranspose(12, 3)], (9, 6)),
    "Conv2DTranspose": (lambda: [L.Conv2DTranspose(12, 3)], (5, 5, 3)),
    "Conv3DTranspose": (lambda: [L.Conv3DTranspose(12, 2)], (4, 4, 4, 2)),
    "DepthwiseConv1D": (lambda: [L.DepthwiseConv1D(3)], (9, 6)),
    "DepthwiseConv2D": (lambda: [L.DepthwiseConv2D(3)], (7, 7, 6)),
    "SeparableConv1D": (lambda: [L.SeparableConv1D(12, 3)], (9, 6)),
    "SeparableConv2D": (lambda: [L.SeparableConv2D(12, 3)], (7, 7, 6)),
    "Embedding": (lambda: [L.Embedding(40, 12)], None),
    "SimpleRNN": (lambda: [L.SimpleRNN(16)], (5, 12)),
    "LSTM": (lambda: [L.LSTM(16)], (5, 12)),
    "GRU": (lambda: [L.GRU(16)], (5, 12)),
}
EIGHT = {"method": "uniform", "bits": 8}


def test_the_list_of_layers_is_complete():
    from deepthin.keras.layers import RECURRENT, THIN

    known = {layer.__name__ for layer in (*THIN, *RECURRENT)}
    around = {"RNN", "Bidirectional", "TimeDistributed"}  # that hold another layer
    assert {name for name in known if not name.endswith("Cell")} - around == LAYERS.keys()


@pytest.mark.parametrize(
    ("kind", "then"), [(kind, None) for kind in LAYERS] + [("Dense", EIGHT), ("Embedding", EIGHT), ("LSTM", EIGHT)]
)
def test_it_trains_in_keras_and_comes_back_from_a_file(kind, then, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "striped", STRIPED)
    make, shape = LAYERS[kind]
    rng = np.random.default_rng(0)
    x = rng.integers(0, 40, (6, 5)) if shape is None else rng.normal(size=(6, *shape)).astype("f4")

    def network():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input(x.shape[1:], dtype=str(x.dtype)), *make()])

    model = network()
    rule = {"method": "striped"} | ({"then": then} if then else {})
    report = dk.compress(model, {"model": {"ratio": 0.5}, "rules": {"*": rule}}, init="scratch")
    assert {row.method for row in report.rows} == {"striped then uniform" if then else "striped"}
    goal = 0.5 * rng.normal(size=tuple(model(x).shape)).astype("f4")
    model.compile(keras.optimizers.Adam(3e-3), "mse", run_eagerly=keras.backend.backend() == "tensorflow")
    losses = model.fit(x, goal, batch_size=6, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    want = keras.ops.convert_to_numpy(model(x))
    dk.save(model, tmp_path / "a.thin")
    loaded = dk.load(network(), tmp_path / "a.thin")
    # Five steps of 12 + 16 and their gates; no kernel has more terms.
    assert_close(keras.ops.convert_to_numpy(loaded(x)), want, 5 * (12 + 16 + 8), max(1.0, largest(want)))
    assert {row.method for row in deepthin.inspect(tmp_path / "a.thin").rows} == {row.method for row in report.rows}
