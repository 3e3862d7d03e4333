"""``deepthin.keras.export``: small files with the right outputs, or none."""

import sys
import warnings

import numpy as np
import pytest

from deepthin.errors import ConfigError, ExportError

pytest.importorskip("keras")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras

    import deepthin.keras as dk

pytestmark = pytest.mark.filterwarnings(
    "ignore:The relative error of", "ignore::DeprecationWarning", "ignore:.*tf.lite.Interpreter is deprecated"
)
on_tensorflow = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="export needs TensorFlow's backend")
layers = keras.layers
EIGHT = {"method": "uniform", "bits": 8}
RULES = {
    "deepthin": {"ratio": 0.05},
    "rank": {"method": "rank", "ratio": 0.05},
    "kronecker": {"method": "kronecker", "ratio": 0.05},
    "tensor-train": {"method": "tensor-train", "ratio": 0.05},
    "pruned": {"method": "pruned", "ratio": 0.05},
    "uniform 8": EIGHT,
    "uniform 4": {"method": "uniform", "bits": 4},
    "coded": {"method": "coded", "ratio": 0.1},
    "kmeans": {"method": "kmeans", "bits": 3},
    "ecsq": {"method": "ecsq", "bits": 3},
    "binary": {"method": "binary", "bits": 2, "rounds": 0},
    "deepthin then uniform": {"ratio": 0.05, "then": EIGHT},
    "pruned then uniform": {"method": "pruned", "ratio": 0.1, "then": EIGHT},
}


def mlp(*units, inputs=128):
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(n, activation="relu", name=f"fc{at}") for at, n in enumerate(units)]
    return keras.Sequential([keras.Input((inputs,)), *hidden])


def thin(model, rule):
    dk.compress(model, {"rules": {"*kernel": rule}})
    return model


def outputs_of(path, *inputs):
    """What the runtime computes, asked without deepthin."""
    import tensorflow as tf

    named = {f"input_{at}": array for at, array in enumerate(inputs)}
    if path.suffix == ".tflite":
        made = tf.lite.Interpreter(str(path)).get_signature_runner()(**named)
    else:
        loaded = tf.saved_model.load(str(path))
        made = loaded.signatures["serving_default"](**{name: tf.constant(a) for name, a in named.items()})
    return [np.asarray(made[f"output_{at}"]) for at in range(len(made))]


def size_of(path):
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


@on_tensorflow
@pytest.mark.parametrize("name", ["m.tflite", "folder"])
@pytest.mark.parametrize("rule", RULES)
def test_every_method_is_small_and_right(rule, name, tmp_path):
    if name == "folder" and rule in ("ecsq", "kmeans", "rank", "uniform 4"):
        pytest.skip("the same operations as in tflite")
    model, path = thin(mlp(256, 64), RULES[rule]), tmp_path / name
    made = dk.export(model, path)
    assert made.path == path
    assert made.bytes == size_of(path) <= 1.25 * made.thin_bytes + 2 * 8192 + (65536 if name == "folder" else 0)
    assert made.thin_bytes == dk.save(model, tmp_path / "m.thin")
    x = np.random.default_rng(1).normal(size=(5, 128)).astype(np.float32)  # a batch that the guard did not run
    want = keras.ops.convert_to_numpy(model(x))
    (got,) = outputs_of(path, x)
    assert abs(got - want).max() <= 1e-5 * abs(want).max()
    assert made.batches == (1, 3, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "m.thin"])
    expected = {"deepthin": "structured", "rank": "structured", "kronecker": "factors in turn"}
    expected |= {"tensor-train": "factors in turn", "deepthin then uniform": "structured"}
    assert set(made.forms.values()) == {expected.get(rule, "decoded in the graph")}


@on_tensorflow
def test_the_file_is_a_small_part_of_the_dense_one(tmp_path):
    """Converted directly, the thin model takes as much as the dense one."""
    import tensorflow as tf

    dense = mlp(256, 192, 64)
    large = len(tf.lite.TFLiteConverter.from_keras_model(dense).convert())
    made = dk.export(thin(dense, {"ratio": 0.05}), tmp_path / "m.tflite")
    assert made.bytes < large / 6


@on_tensorflow
def test_integers_stay_integers(tmp_path):
    from tensorflow.lite.python import schema_py_generated as schema

    path = tmp_path / "m.tflite"
    dk.export(thin(mlp(256), EIGHT), path)
    held = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(path.read_bytes(), 0))
    tensors = [t for t in held.subgraphs[0].tensors if held.buffers[t.buffer].data is not None]
    kinds = {t.type for t in tensors if np.prod(t.shape) >= 128 * 256}
    assert kinds == {schema.TensorType.UINT8}


def embedding():
    return keras.Sequential(
        [
            keras.Input((12,), dtype="int32"),
            layers.Embedding(500, 64),
            layers.GlobalAveragePooling1D(),
            layers.Dense(64),
        ]
    )


def convolution():
    return keras.Sequential(
        [
            keras.Input((16, 16, 8)),
            layers.Conv2D(32, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(32),
        ]
    )


def several():
    """Two inputs and outputs, whose names are not in the order of the model."""
    a, b = keras.Input((48,), name="zz"), keras.Input((64,), name="aa")
    x, y = layers.Dense(64, name="x")(a), layers.Dense(96, name="y")(b)
    return keras.Model(
        [a, b], [layers.Dense(40, name="o")(layers.Concatenate()([x, y])), layers.Dense(72, name="p")(y)]
    )


def lstm():
    return keras.Sequential([keras.Input((10, 32)), layers.LSTM(128), layers.Dense(128)])


def gru():
    return keras.Sequential([keras.Input((10, 32)), layers.GRU(128, return_sequences=True), layers.Dense(128)])


@on_tensorflow
@pytest.mark.parametrize("name", ["m.tflite", "folder"])
@pytest.mark.parametrize("build", [embedding, convolution, several, lstm, gru])
def test_layers(build, name, tmp_path):
    keras.utils.set_random_seed(0)
    model = build()
    patterns = ("*embeddings", "*kernel") if build is embedding else ("*kernel",)
    dk.compress(model, {"rules": {pattern: {"ratio": 0.15} for pattern in patterns}})
    made = dk.export(model, tmp_path / name)
    fixed = build in (lstm, gru) and name == "m.tflite"
    assert made.batches == ((1,) if fixed else (1, 3, 8))
    assert "decoded at export" not in made.forms.values()
    rng = np.random.default_rng(2)
    inputs = [
        rng.integers(500, size=(1, *t.shape[1:])).astype("int32")
        if "int" in t.dtype
        else rng.normal(size=(1, *t.shape[1:])).astype("float32")
        for t in model.inputs
    ]
    wants = model(inputs if len(inputs) > 1 else inputs[0])
    wants = wants if isinstance(wants, list) else [wants]
    for got, want in zip(outputs_of(tmp_path / name, *inputs), wants, strict=True):
        want = keras.ops.convert_to_numpy(want)
        assert abs(got - want).max() <= 1e-5 * abs(want).max()


@on_tensorflow
def test_groups_and_a_subclassed_model(tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers.Dense(96), layers.Dense(96)

        def call(self, x):
            return self.b(self.a(x))

    keras.utils.set_random_seed(0)
    model, x = Net(), np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
    model(x)
    dk.compress(model, {"rules": {"*kernel": {"ratio": 0.1, "group": "rows"}}})
    with pytest.raises(ConfigError, match="pass an example"):
        dk.export(model, tmp_path / "m.tflite")
    made = dk.export(model, tmp_path / "m.tflite", x)
    assert set(made.forms.values()) == {"structured"}
    assert len(made.forms) == 2


@on_tensorflow
def test_a_nan_stays_one(tmp_path):
    """What is computed from the first input, and must be 0, is 0 for NaN too."""
    path = tmp_path / "m.tflite"
    model = thin(mlp(256), {"method": "uniform", "bits": 4})
    dk.export(model, path)
    x = np.zeros((2, 128), np.float32)
    x[0, 0] = np.nan
    (got,) = outputs_of(path, x)
    assert np.isnan(got[0]).any()
    want = keras.ops.convert_to_numpy(model(x[1:]))
    assert abs(got[1:] - want).max() <= 1e-5 * max(abs(want).max(), 1)


@on_tensorflow
def test_what_cannot_be_small_is_not_written(tmp_path):
    model = thin(mlp(256, 64), {"method": "hashed", "ratio": 0.05})
    for name in ("m.tflite", "folder"):
        with pytest.raises(ExportError, match=r"fc0\.kernel and 0|fc0\.kernel, fc1\.kernel must be stored dense"):
            dk.export(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


@on_tensorflow
def test_other_outputs_are_noticed(tmp_path, monkeypatch):
    from deepthin.keras import tensorflow_portable

    model = thin(mlp(256, 192), {"ratio": 0.1})
    plain = tensorflow_portable._Sizes.phases
    monkeypatch.setattr(tensorflow_portable._Sizes, "phases", lambda self: np.roll(plain(self), 1))
    with pytest.raises(ExportError, match="computes outputs that differ by"):
        dk.export(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


@on_tensorflow
def test_a_dense_constant_is_noticed(tmp_path, monkeypatch):
    """Without what keeps converters from seeing that a constant is one."""
    import tensorflow as tf

    from deepthin.keras import tensorflow_portable

    monkeypatch.setattr(tensorflow_portable, "_unforeseen", lambda values, zero: tf.constant(values.reshape(-1)))
    monkeypatch.setattr(sys.modules["deepthin.keras.export"], "_A_LAYER", 10**6)
    with pytest.raises(ExportError, match="holds constants as large as a dense matrix"):
        dk.export(thin(mlp(256), {"method": "uniform", "bits": 4}), tmp_path / "m.tflite")


ONNX = ("deepthin", "kronecker", "deepthin then uniform", "uniform")


@on_tensorflow
@pytest.mark.filterwarnings("ignore")  # of the converter, about itself
@pytest.mark.parametrize("rule", [name for name in RULES if name in ONNX])
def test_onnx(rule, tmp_path):
    pytest.importorskip("tf2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = thin(mlp(256), RULES[rule])
    made = dk.export(model, path := tmp_path / "m.onnx")
    assert made.target == "onnx"
    assert made.batches == (1, 3, 8)
    assert made.bytes == path.stat().st_size <= 1.25 * made.thin_bytes + 3 * 8192
    session = onnxruntime.InferenceSession(path)
    x = np.random.default_rng(0).normal(size=(5, *session.get_inputs()[0].shape[1:])).astype(np.float32)
    expected = keras.ops.convert_to_numpy(model(x))
    there = session.run(None, {session.get_inputs()[0].name: x})[0]
    assert np.abs(there - expected).max() <= 1e-5 * np.abs(expected).max()


@on_tensorflow
def test_formats(tmp_path, monkeypatch):
    model = thin(mlp(256), {"ratio": 0.05})
    with pytest.raises(ConfigError, match=r"m.h5 is no format: use m.tflite, m.onnx, or a folder"):
        dk.export(model, tmp_path / "m.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(sys.modules["deepthin.keras.export"], "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="needs tf2onnx and onnxruntime: pip install"):
            dk.export(model, tmp_path / "m.onnx")


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="the message is for other backends")
def test_other_backends(tmp_path):
    with pytest.raises(ConfigError, match="set KERAS_BACKEND=tensorflow"):
        dk.export(mlp(4), tmp_path / "m.tflite")
