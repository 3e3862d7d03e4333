"""Memory bombs in Keras and TensorFlow: promise 3, as in test_bombs.py."""

import pytest

from test_bombs import bombs, outcomes


@pytest.mark.parametrize("reader", ["keras", "tensorflow"])
def test_bombs_are_refused_before_they_go_off(reader, tmp_path):
    pytest.importorskip("tensorflow", reason="Keras is tested by `make test-tensorflow`, in an environment of its own")
    for name, (kind, said) in outcomes(reader, bombs(), tmp_path).items():
        assert kind == "FormatError", (name, kind, said)
        assert "above the limit of" in said, (name, said)
