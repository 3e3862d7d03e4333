"""What a new user types in the first hour, in Keras."""

import pytest

keras = pytest.importorskip("keras")
pytestmark = pytest.mark.filterwarnings("ignore")

import deepthin.keras as dk  # noqa: E402 -- only beside Keras
from deepthin import ConfigError  # noqa: E402


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(96, "relu", name="one"), keras.layers.Dense(10, name="two")]
    )


def test_a_ratio_or_a_size_is_enough(tmp_path):
    expected = dk.compress(network(), {"model": {"ratio": 0.1}}, init="scratch").to_json()
    assert dk.compress(network(), 0.1, init="scratch").to_json() == expected
    assert dk.compress(network(), ratio=0.1, init="scratch").to_json() == expected
    assert dk.plan(network(), 0.1).total_bytes > 0
    dk.compress(model := network(), file_bytes=9_000, init="scratch")
    assert dk.save(model, tmp_path / "m.thin") <= 9_000


def test_compressing_twice_says_so():
    dk.compress(model := network(), 0.1, init="scratch")
    with pytest.raises(
        ConfigError, match=r"cannot be compressed again: stored by deepthin already\..*deepthin\.keras\.mat"
    ):
        dk.compress(model, 0.1)


def test_messages_speak_of_keras():
    class Odd(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 16), name="kernel")

        def call(self, x):
            return x @ self.kernel

    model = keras.Sequential([keras.Input((64,)), Odd(name="odd"), keras.layers.Dense(10)])
    with pytest.raises(ConfigError) as raised:
        dk.compress(model, 0.1)
    message = str(raised.value)
    assert "attention layers of Keras. Add 'odd' to [model] ignore" in message
    assert "torch" not in message
