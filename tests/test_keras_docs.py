"""The whole examples of docs/keras.md run, in small."""

import importlib.util
import warnings
from pathlib import Path

import pytest

from tolerance import bound

pytest.importorskip("keras")
pytestmark = pytest.mark.filterwarnings("ignore")


def example(name):
    path = Path(__file__).parent.parent / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def test_an_acoustic_net(tmp_path, capsys):
    right = example("keras_acoustic").main(str(tmp_path / "m.thin"), width=128, epochs=3)
    assert "fc1.kernel" in capsys.readouterr().out
    assert right > 10 / 48


def test_an_lstm_and_the_same_file_in_torch(tmp_path):
    lstm = example("keras_lstm")
    right, far = lstm.main(str(tmp_path / "m.thin"))
    assert right > 0.7  # a quarter by chance
    # Each step sums inputs and 64 units, then a score sums 64 units below one times weights below a tenth on average.
    assert far <= 2 * bound(lstm.STEPS * (lstm.FEATURES + 64 + 8) + 64, 6.4)


def test_a_training_to_a_size(tmp_path):
    right, n_bytes = example("keras_size").main(str(tmp_path / "m.thin"))
    assert 0.97 * 1500 <= n_bytes <= 1500
    assert right > 0.5  # an eighth by chance
