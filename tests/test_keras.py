"""deepthin.keras on the backend that KERAS_BACKEND names: thin layers, training, files. One process a backend."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

import deepthin
from deepthin.errors import BudgetError, ConfigError, FormatError, NonFiniteError
from deepthin.methods import METHODS
from deepthin.methods.float_coding import FloatCoding
from deepthin.methods.then import Then
from deepthin.storage.contents import Part
from tolerance import assert_close, bound, largest

pytest.importorskip("keras")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    from keras import layers, ops

    import deepthin.keras as dk

pytestmark = pytest.mark.filterwarnings("ignore")

BACKEND = keras.backend.backend()
EPS = 2.0**-23
SHAPE = (24, 18)
AREA = 32 * SHAPE[0] * SHAPE[1]


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


def fitted(name, inner=None, **options):
    if inner is None:
        return METHODS[name].fit(SHAPE, AREA if "bits" in options else AREA // 3, **options)
    then = METHODS[inner]
    return Then.fit(lambda bits: METHODS[name].fit(SHAPE, bits), lambda s: then.fit(s, 1 << 40, **options), AREA // 3)


ALL = {
    "deepthin": fitted("deepthin"),
    "shuffled": fitted("shuffled", seed=3),
    "rank": fitted("rank"),
    "hashed": fitted("hashed", seed=2),
    "pruned": fitted("pruned"),
    "kronecker": fitted("kronecker"),
    "tensor-train": fitted("tensor-train"),
    "uniform": fitted("uniform", bits=4, per="row", affine=True),
    "kmeans": fitted("kmeans", bits=3),
    "ecsq": fitted("ecsq", bits=2),
    "binary": fitted("binary", bits=3, rounds=0),
    "coded": fitted("coded", bits=8),
    "deepthin then uniform": fitted("deepthin", "uniform", bits=8),
    "deepthin then coded": fitted("deepthin", "coded", bits=8),
    "pruned then kmeans": fitted("pruned", "kmeans", bits=3),
    "shuffled then binary": fitted("shuffled", "binary", bits=2),
}


def test_all_methods_are_here():
    assert set(METHODS) <= set(ALL)


def gradients(weight):
    """Of the sum of squares, by latent."""
    variables = weight.trainable_variables
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(weight.dense() ** 2)
        return [np.asarray(gradient) for gradient in tape.gradient(loss, [v.value for v in variables])]
    if BACKEND == "torch":
        (weight.dense() ** 2).sum().backward()
        return [variable.value.grad.numpy() for variable in variables]
    import jax

    def loss(values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return (weight.dense() ** 2).sum()

    return [np.asarray(gradient) for gradient in jax.grad(loss)([v.value for v in variables])]


@pytest.mark.parametrize("name", ALL)
def test_a_code_decodes_as_in_numpy_and_its_latents_get_gradients(name):
    method, matrix = ALL[name], np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    weight = dk.ThinWeight.encode(name, method, [Part(SHAPE)], [matrix])
    code = weight.code()
    wanted = method.decode({**code, **method.derived()}, np)
    assert np.abs(ops.convert_to_numpy(weight.dense()) - wanted).max() <= 64 * EPS * np.abs(wanted).max()
    for gradient, variable in zip(gradients(weight), weight.trainable_variables, strict=True):
        assert gradient.shape == tuple(variable.shape)
        assert np.isfinite(gradient).all()
        assert gradient.any()

    again = dk.ThinWeight.from_config(weight.get_config())  # what a loaded code gives is what it says
    again.set_code(code)
    assert np.abs(ops.convert_to_numpy(again.dense()) - wanted).max() <= 64 * EPS * np.abs(wanted).max()
    for entry, array in again.code().items():
        np.testing.assert_array_equal(array, code[entry])


@pytest.mark.parametrize("name", ["uniform", "binary", "shuffled then binary"])
def test_what_is_rounded_is_rounded_anew_once_it_changes(name):
    method, matrix = ALL[name], np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    weight = dk.ThinWeight.encode(name, method, [Part(SHAPE)], [matrix])
    code = weight.code()
    weight.set_code(code)
    for variable in weight.trainable_variables:
        variable.assign(variable * 1.5 + 0.01)
    changed = weight.code()
    assert any(not np.array_equal(changed[entry], code[entry]) for entry in code)
    wanted = method.decode({**changed, **method.derived()}, np)
    assert np.abs(ops.convert_to_numpy(weight.dense()) - wanted).max() <= 64 * EPS * np.abs(wanted).max()
    assert FloatCoding(method).latents(changed).keys() == weight.latents.keys()


class Net(keras.Model):
    """Subclassed: layers in attributes, in a list, and in a block of its own."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(16, activation="relu")
        self.blocks = [layers.Dense(16, activation="relu"), layers.Dense(16, activation="relu", name="given")]
        self.inner = keras.Sequential([layers.Dense(12, name="fc")])
        self.last = layers.Dense(3)

    def call(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.inner(x))


def sequential():
    return keras.Sequential(
        [
            keras.Input((10,)),
            layers.Dense(16, activation="relu", name="fc1"),
            layers.Dropout(0.1),
            layers.Dense(16, activation="relu"),
            layers.Dense(3, name="out"),
        ]
    )


def functional():
    x = keras.Input((10,))
    shared = layers.Dense(10, activation="tanh", name="shared")
    y = shared(shared(x))
    z = layers.BatchNormalization(name="norm")(layers.Dense(12, name="side")(x))
    return keras.Model(x, layers.Dense(3, name="out")(layers.Concatenate()([y, z])))


def subclassed():
    model = Net()
    model(np.zeros((1, 10), np.float32))
    return model


MODELS = {"sequential": sequential, "functional": functional, "subclassed": subclassed}
MATRICES = {
    "sequential": {"fc1.kernel": (16, 10), "dense.kernel": (16, 16), "out.kernel": (3, 16)},
    "functional": {"shared.kernel": (10, 10), "side.kernel": (12, 10), "out.kernel": (3, 22)},
    "subclassed": {
        "first.kernel": (16, 10),
        "blocks.0.kernel": (16, 16),
        "given.kernel": (16, 16),
        "inner.fc.kernel": (12, 16),
        "last.kernel": (3, 12),
    },
}
RULES = {"model": {"ratio": 0.5}}


def data(count=128):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 10)).astype(np.float32)
    return x, (x @ rng.normal(size=(10, 3))).argmax(1)


def outputs(model, x):
    return np.asarray(ops.convert_to_numpy(model(x)), np.float32)


# Terms of the sums behind one output, at the most: of five layers of 16 and their decoded weights, or of five steps
# through two recurrent layers of 8 + 6 and their gates.
TERMS = 5 * (16 + 16 + 8)


def peak(model, x):
    """No sum of magnitudes in any layer exceeds this: the largest input, or one, times the largest sum of weights."""
    kernels = [
        np.abs(ops.convert_to_numpy(getattr(layer, name)))
        for layer in model._flatten_layers()
        for name in ("kernel", "recurrent_kernel")
        if getattr(layer, name, None) is not None
    ]
    return max(1.0, largest(x)) * max(kernel.reshape(-1, kernel.shape[-1]).sum(0).max() for kernel in kernels)


def compiled(model, rate=1e-3, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(dk.Adam(rate), loss, **{"jit_compile": BACKEND == "jax", **options})  # XLA takes long to compile
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_becomes_thin_learns_and_comes_back_from_its_file(kind, tmp_path):
    keras.backend.clear_session()
    model, (x, y) = MODELS[kind](), data()
    planned = dk.plan(model, RULES)
    report = dk.compress(model, RULES, init="scratch", seed=3)
    shapes = {row.name: row.shape for row in report.rows}
    assert shapes == MATRICES[kind]
    assert [row.bytes for row in planned.rows] == [row.bytes for row in report.rows]
    assert sum(row.bytes for row in report.rows) <= 0.5 * sum(row.dense_bytes for row in report.rows)
    assert model.count_params() < sum(np.prod(shape) for shape in shapes.values())

    history = compiled(model).fit(x, y, epochs=6, verbose=0).history["loss"]
    assert history[-1] < 0.9 * history[0]
    wanted, path = outputs(model, x), tmp_path / "m.thin"
    assert dk.save(model, path) == path.stat().st_size == deepthin.inspect(path).total_bytes
    arrays = deepthin.load(path)
    assert {name: arrays[name].shape for name in shapes} == shapes

    other = MODELS[kind]()  # whose layers Keras gives other numbers
    assert dk.load(other, path) is other
    assert_close(outputs(other, x), wanted, TERMS, peak(other, x))
    before = {variable.path: id(variable) for variable in other.weights}
    dk.load(other, path)  # thin already: values only
    assert before == {variable.path: id(variable) for variable in other.weights}
    dense = outputs(dk.materialize(other), x)
    assert_close(dense, wanted, TERMS, peak(other, x))
    assert not [layer for layer in other._flatten_layers() if isinstance(layer, dk.ThinLayer | dk.ThinWeight)]


@pytest.mark.parametrize("kind", ["sequential", "functional"])
def test_a_thin_model_is_saved_and_loaded_by_keras(kind, tmp_path):
    model, (x, y) = MODELS[kind](), data()
    dk.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.6, "then": {"method": "uniform", "bits": 8}}}})
    compiled(model).fit(x, y, epochs=1, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(outputs(again, x), outputs(model, x))
    methods = {name: weight.method for name, weight in thin_weights(model).items()}
    assert methods == {name: weight.method for name, weight in thin_weights(again).items()}
    again.fit(x, y, epochs=1, verbose=0)  # the optimiser goes on
    model.save_weights(tmp_path / "m.weights.h5")
    again.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(outputs(again, x), outputs(model, x))


def thin_weights(model):
    return {
        f"{layer.name}.{name}": weight
        for layer in model._flatten_layers()
        if isinstance(layer, dk.ThinLayer)
        for name, weight in layer.thin.items()
    }


RECURRENT = {
    "lstm": lambda: layers.LSTM(6, return_sequences=True, name="r"),
    "gru": lambda: layers.GRU(6, return_sequences=True, dropout=0.2, name="r"),
    "gru before": lambda: layers.GRU(6, reset_after=False, return_sequences=True, name="r"),
    "simple": lambda: layers.SimpleRNN(6, return_sequences=True, go_backwards=True, name="r"),
    "both": lambda: layers.Bidirectional(layers.LSTM(6, return_sequences=True, name="own"), name="r"),
    "stacked": lambda: layers.RNN([layers.LSTMCell(6, name="a"), layers.GRUCell(5, name="b")], return_sequences=True),
    "steps": lambda: layers.TimeDistributed(layers.Dense(6, name="d"), name="r"),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_give_what_their_dense_selves_give(kind, tmp_path):
    model = keras.Sequential([keras.Input((5, 8)), RECURRENT[kind](), layers.Dense(3, name="out")])
    x = np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32)
    dk.compress(model, {"rules": {"*": {"method": "kmeans", "bits": 4}}})
    wanted = outputs(model, x)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(outputs(again, x), wanted)
    eagerly = BACKEND == "tensorflow" and kind not in ("gru", "stacked")  # tracing a graph takes most of the time
    compiled(again, 1e-2, run_eagerly=eagerly).fit(x, np.zeros((4, 5)), epochs=2, verbose=0)
    assert np.abs(outputs(again, x) - wanted).max() > 1e-3
    dk.save(again, tmp_path / "m.thin")
    dk.load(model, tmp_path / "m.thin")
    wanted = outputs(again, x)
    assert_close(outputs(model, x), wanted, TERMS, peak(model, x))
    assert_close(outputs(dk.materialize(again), x), wanted, TERMS, peak(model, x))
    assert_close(outputs(again, x), wanted, TERMS, peak(model, x))


def test_states_of_sequences_are_no_weights(tmp_path):
    model = keras.Sequential([keras.Input(batch_shape=(2, 5, 8)), layers.LSTM(6, stateful=True, name="r")])
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    dk.compress(model, {"model": {"ratio": 0.6}}, init="scratch")
    first, second = outputs(model, x), outputs(model, x)
    assert np.abs(first - second).max() > 1e-4
    dk.save(model, tmp_path / "m.thin")
    assert sorted(deepthin.load(tmp_path / "m.thin")) == [
        "r.lstm_cell.bias",
        "r.lstm_cell.kernel",
        "r.lstm_cell.recurrent_kernel",
    ]
    model.layers[0].reset_state()
    np.testing.assert_array_equal(outputs(model, x), first)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_half_precision(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = keras.Sequential([keras.Input((10,)), layers.Dense(16, "relu", name="a"), layers.Dense(3, name="b")])
    finally:
        keras.config.set_dtype_policy("float32")
    x, y = data()
    dk.compress(model, RULES, init="scratch")
    assert keras.backend.standardize_dtype(model(x).dtype) == policy.removeprefix("mixed_")
    wanted = "float32" if policy.startswith("mixed") else policy
    assert {variable.dtype for variable in model.trainable_variables} == {wanted}
    if policy.startswith("mixed"):
        history = compiled(model).fit(x, y, epochs=4, verbose=0).history["loss"]
        assert history[-1] < history[0]
    dk.save(model, tmp_path / "m.thin")
    before = outputs(model, x)
    for variable in model.trainable_variables:
        variable.assign(0 * variable)
    dk.load(model, tmp_path / "m.thin")
    np.testing.assert_array_equal(outputs(model, x), before)
    arrays = deepthin.load(tmp_path / "m.thin")
    kernel = np.asarray(ops.convert_to_numpy(ops.cast(model.layers[0].decoded("kernel"), "float32")))
    bound = (4 * EPS if wanted == "float32" else 2.0**-7 if "b" in wanted else 2.0**-10) * np.abs(kernel).max()
    assert np.abs(arrays["a.kernel"].T - kernel).max() <= bound


def test_callbacks_see_the_latents(tmp_path):
    model, (x, y) = sequential(), data()
    dk.compress(model, RULES, init="scratch")
    watching = [
        keras.callbacks.EarlyStopping(monitor="loss", patience=1, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss", save_best_only=True),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
    ]
    compiled(model).fit(x, y, epochs=3, verbose=0, callbacks=watching)
    assert keras.models.load_model(tmp_path / "best.keras").count_params() == model.count_params()


def test_codes_and_the_biases_beside_them_learn_at_their_own_rate():
    model = keras.Sequential(
        [keras.Input((10,)), layers.Dense(4, name="thin"), layers.Dense(4, name="dense"), layers.Dense(1, name="hash")]
    )
    rules = {"thin": {"method": "deepthin", "ratio": 0.9}, "hash": {"method": "hashed", "ratio": 0.5}}
    dk.compress(model, {"rules": rules})
    before = [ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    optimizer = dk.SGD(0.5)
    optimizer.apply([ops.ones_like(variable) for variable in before], model.trainable_variables)
    moved = {
        variable.path: (old - ops.convert_to_numpy(variable)).reshape(-1)
        for variable, old in zip(model.trainable_variables, before, strict=True)
    }
    for path, steps in moved.items():
        rates = {
            "thin": METHODS["deepthin"].learning_rate_multiplier,
            "hash": METHODS["hashed"].learning_rate_multiplier,
            "dense": 1.0,
        }
        times = next(rate for name, rate in rates.items() if name in path)
        assert np.abs(steps - 0.5 * times).max() <= 16 * EPS * times, path
    again = keras.optimizers.deserialize(keras.optimizers.serialize(dk.AdamW(0.25)))
    assert type(again) is dk.AdamW
    assert again.get_config()["learning_rate"] == 0.25


def test_a_compiled_model_stays_compiled():
    model, (x, y) = compiled(sequential()), data()
    model.fit(x, y, epochs=1, verbose=0)
    model.predict(x, verbose=0)
    dk.compress(model, RULES)
    history = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    predicted = model.predict(x, verbose=0)
    assert_close(predicted, outputs(model, x), TERMS, peak(model, x))


def test_a_regularizer_sees_the_decoded_weight():
    model = keras.Sequential([keras.Input((10,)), layers.Dense(6, kernel_regularizer=keras.regularizers.L2(0.1))])
    dk.compress(model, {"model": {"ratio": 0.8}})
    kernel = ops.convert_to_numpy(model.layers[0].kernel)
    assert float(sum(model.losses)) == pytest.approx(0.1 * (kernel**2).sum(), rel=2 * bound(kernel.size + 8, 1.0))
    model.compile("sgd", "mse")
    assert model.evaluate(np.zeros((4, 10)), np.zeros((4, 6)), verbose=0) > 0.05
    again = type(model.layers[0]).from_config(model.layers[0].get_config())
    again.build((None, 10))
    assert len(again.losses) == 1
    dk.materialize(model)
    assert float(sum(model.losses)) == pytest.approx(0.1 * (kernel**2).sum(), rel=2 * bound(kernel.size + 8, 1.0))


def test_groups_share_a_code_and_come_back(tmp_path):
    model, (x, _) = sequential(), data()
    report = dk.compress(model, {"rules": {"re:.*": {"method": "deepthin", "ratio": 0.5, "group": "flat"}}})
    assert {row.group for row in report.rows} == {report.rows[0].group}
    assert len({id(weight) for weight in thin_weights(model).values()}) == 1
    wanted = outputs(model, x)
    dk.save(model, tmp_path / "m.thin")
    fresh = sequential()
    dk.load(fresh, tmp_path / "m.thin")
    assert_close(outputs(fresh, x), wanted, TERMS, peak(fresh, x))
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert len({id(weight) for weight in thin_weights(again).values()}) == 1
    np.testing.assert_array_equal(outputs(again, x), wanted)
    parts = keras.Sequential([keras.Input((10,)), model.layers[0]])
    with pytest.raises(ConfigError, match="share one code with layers that are not in this model"):
        dk.save(parts, tmp_path / "part.thin")


@pytest.mark.filterwarnings("ignore:The relative error")
def test_the_input_kernel_takes_the_projection_of_the_recurrent_one():
    """DeepTwist's equation 5, as in deepthin.torch."""
    model = keras.Sequential([keras.layers.Input((7, 12)), keras.layers.LSTM(12, name="lstm")])
    cell = model.layers[0].cell
    inputs, recurrent = (np.array(keras.ops.convert_to_numpy(k)).T for k in (cell.kernel, cell.recurrent_kernel))
    rule = {"method": "rank", "rank": 3, "group": "rows", "projection": "*recurrent_kernel"}
    dk.compress(model, {"rules": {"*kernel": rule}})
    sigma, vt = np.linalg.svd(recurrent)[1:]
    v = vt[:3].T
    lost = bound(48 + 12, sigma[0]) / (sigma[2] - sigma[3])  # of a subspace: what the decomposition loses over the gap
    cell = model.layers[0].cell
    for kernel, before in ((cell.kernel, inputs), (cell.recurrent_kernel, recurrent)):
        far = keras.ops.convert_to_numpy(kernel).T - before @ v @ v.T
        assert np.linalg.norm(far) <= lost * np.linalg.norm(before)


def test_biases_are_thin_where_they_are_named_and_a_thin_model_may_become_thinner(tmp_path):
    model, (x, _) = sequential(), data()
    dk.compress(model, {"rules": {"fc1.kernel": {"method": "kmeans", "bits": 4}}})
    rules = {"rules": {"fc1.bias": {"method": "uniform", "bits": 8}, "out": {"method": "pruned", "ratio": 0.5}}}
    dk.compress(model, rules)
    assert set(thin_weights(model)) == {"fc1.kernel", "fc1.bias", "out.kernel"}
    wanted = outputs(model, x)
    dk.save(model, tmp_path / "m.thin")
    other = dk.load(sequential(), tmp_path / "m.thin")
    assert_close(outputs(other, x), wanted, TERMS, peak(other, x))
    dk.compress(other, {"rules": {"dense*": {"method": "kmeans", "bits": 2}}})
    dk.load(other, tmp_path / "m.thin")  # of another plan
    assert set(thin_weights(other)) == {"fc1.kernel", "fc1.bias", "out.kernel"}
    assert_close(outputs(other, x), wanted, TERMS, peak(other, x))


def test_a_limit_for_the_file_is_met(tmp_path):
    model = keras.Sequential([keras.Input((64,)), layers.Dense(64, name="a"), layers.Dense(64, name="b")])
    dk.compress(model, {"model": {"file_bytes": 12_000}}, init="scratch")
    assert 9_000 < dk.save(model, tmp_path / "m.thin", max_bytes=12_000) <= 12_000
    with pytest.raises(BudgetError, match="above the limit of 100"):
        dk.save(model, tmp_path / "n.thin", max_bytes=100)
    assert not (tmp_path / "n.thin").exists()


def test_layers_become_thin_without_collecting_garbage(monkeypatch):
    """Keras's ``delattr`` of a variable collects garbage, which takes longer than the layer does."""
    model = keras.Sequential([keras.Input((24,)), layers.Dense(16, name="a"), layers.Dense(3, name="b")])
    dense = [model.layers[0].kernel, model.layers[1].kernel]
    monkeypatch.setattr("gc.collect", lambda *_: pytest.fail("garbage is collected"))
    dk.compress(model, {"model": {"ratio": 0.5}})
    assert all(isinstance(layer, dk.ThinLayer) for layer in model.layers)
    assert not [variable for variable in model.weights if any(variable is one for one in dense)]


def test_frozen_layers_stay_frozen():
    model = sequential()
    model.layers[0].trainable = False
    dk.compress(model, RULES)
    assert not model.layers[0].trainable_variables
    assert model.layers[2].trainable_variables
    model.layers[0].trainable = True
    assert len(model.layers[0].trainable_variables) == 3


def test_errors_come_before_any_change(tmp_path):
    model, (x, _) = sequential(), data()
    wanted = outputs(model, x)
    with pytest.raises(ConfigError, match="unknown. Valid: trained, scratch"):
        dk.compress(model, RULES, init="other")
    with pytest.raises(ConfigError, match="'fc2' matches nothing. Did you mean 'fc1'"):
        dk.compress(model, {"rules": {"fc2": {"ratio": 0.5}}})
    with pytest.raises(BudgetError, match="Use \\[model\\] ratio >="):
        dk.compress(model, {"model": {"ratio": 0.001}})
    unbuilt = keras.Sequential([layers.Dense(3)])
    with pytest.raises(ConfigError, match="has no weights yet: build the model"):
        dk.compress(unbuilt, RULES)
    dk.save(model, tmp_path / "dense.thin")
    np.testing.assert_array_equal(outputs(model, x), wanted)
    wrong = keras.Sequential([keras.Input((10,)), layers.Dense(15, name="fc1"), layers.Dense(3, name="out")])
    with pytest.raises(ConfigError, match="which the model lacks"):
        dk.load(wrong, tmp_path / "dense.thin")
    with pytest.raises(ConfigError, match=r"lacks 'nowhere'. Closest"):
        dk.load(sequential(), tmp_path / "dense.thin", names={"nowhere": "fc1.kernel"})
    narrow = keras.Sequential([keras.Input((10,)), layers.Dense(15, name="fc1")])
    dk.save(keras.Sequential([keras.Input((10,)), layers.Dense(16, name="fc1")]), tmp_path / "one.thin")
    with pytest.raises(ConfigError, match=r"has shape \(16,\) in .*, but \(15,\) in the model|has shape \(16, 10\)"):
        dk.load(narrow, tmp_path / "one.thin")
    (tmp_path / "bad.thin").write_bytes(b"no file")
    with pytest.raises(FormatError):
        dk.load(model, tmp_path / "bad.thin")
    kernel = ops.convert_to_numpy(model.layers[0].kernel).copy()
    kernel[2, 5] = np.nan
    model.layers[0].kernel.assign(kernel)
    with pytest.raises(NonFiniteError, match=r"fc1\.kernel is nan at index \(5, 2\)"):
        dk.compress(model, RULES)
    assert type(model.layers[0]) is layers.Dense


def test_what_cannot_be_thin_is_told():
    class Odd(layers.Dense):
        pass

    model = keras.Sequential([keras.Input((10,)), Odd(4, name="odd"), layers.Dense(4, name="b")])
    with pytest.raises(ConfigError, match=r"reaches odd\.kernel: Odd has no thin version"):
        dk.compress(model, RULES)
    dk.compress(model, {"model": {"ratio": 0.9, "ignore": ["odd"]}})
    model = keras.Sequential([keras.Input((10,)), layers.Dense(4, kernel_constraint="non_neg", name="c")])
    with pytest.raises(ConfigError, match=r"reaches c\.kernel: it has a constraint"):
        dk.compress(model, RULES)


def test_torch_is_never_imported_by_it():
    if BACKEND == "torch":
        pytest.skip("this backend is torch itself")
    code = "import sys, deepthin.keras as dk; print(dk.compress.__name__, 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["compress", "False"]
