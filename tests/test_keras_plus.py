"""Sums of two codes in Keras, on the backend of KERAS_BACKEND; their files are those of torch."""

import warnings

import numpy as np
import pytest

import deepthin

pytest.importorskip("keras")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    from keras import layers

    import deepthin.keras as dk

pytestmark = pytest.mark.filterwarnings("ignore")


def network():
    return keras.Sequential([layers.Input((24,)), layers.Dense(48, activation="relu"), layers.Dense(6)])


def test_a_sum_trains_to_a_size_and_comes_back(tmp_path):
    keras.utils.set_random_seed(0)
    model = network()
    coded = {"method": "coded"}
    rules = {"model": {"file_bytes": 900}, "rules": {"*": {"method": "kronecker", "plus": coded, "then": coded}}}
    dk.compress(model, rules, init="scratch")
    x = np.random.default_rng(0).normal(size=(256, 24)).astype(np.float32)
    y = abs(x[:, :6]).argmax(1)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    target = dk.SizeTarget(model, 40)
    found = model.fit(x, y, batch_size=64, epochs=10, verbose=0, callbacks=[target]).history["loss"]
    assert found[-1] < found[0]
    assert dk.save(model, tmp_path / "a.thin") <= 900
    again = dk.load(network(), tmp_path / "a.thin")
    np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    (row, *_) = [row for row in deepthin.inspect(tmp_path / "a.thin").rows if row.shape == (48, 24)]
    assert row.method == "kronecker plus coded then coded"
