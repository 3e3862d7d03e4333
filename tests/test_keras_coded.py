"""Learned steps, and training to the size of a file, in Keras on the backend of KERAS_BACKEND."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin.errors import BudgetError, ConfigError
from deepthin.methods.scalar import Coded
from deepthin.storage.contents import Part
from deepthin.torch.code_length import code_length as in_torch

pytest.importorskip("keras")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    from keras import layers, ops

    import deepthin.keras as dk
    from deepthin.keras.code_length import code_length

pytestmark = pytest.mark.filterwarnings("ignore")

BACKEND = keras.backend.backend()
EPS = 2.0**-23
FEATURES, CLASSES, BATCH, STEPS = 24, 6, 64, 240
CODED = {"method": "coded", "bits": 8}
THEN = {"method": "deepthin", "ratio": 0.5, "then": {"method": "coded"}}


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


def network():
    return keras.Sequential(
        [keras.Input((FEATURES,)), layers.Dense(64, "relu", name="first"), layers.Dense(CLASSES, name="last")]
    )


def data():
    """A linear rule: what a network of this size learns in a few steps."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * BATCH // 4, FEATURES)).astype(np.float32)
    return x, np.argmax(x @ rng.normal(size=(FEATURES, CLASSES)), 1)


def compiled(model, **options):
    model.compile(
        dk.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"], **options
    )
    return model


def trained(file_bytes, rule, steps=STEPS, **options):
    """A model after its training to a size, and the target."""
    model = network()
    dk.compress(model, {"model": {"file_bytes": file_bytes}, "rules": {"*.kernel": rule}})
    compiled(model, **options)
    target = dk.SizeTarget(model, steps=steps)
    epochs = 4 * steps // STEPS
    model.fit(*data(), batch_size=BATCH, epochs=epochs, verbose=0, shuffle=False, callbacks=[target])
    assert target.steps_done == steps
    return model, target


def tensor(array):
    return ops.convert_to_tensor(array)


def gradient(function, array):
    """Of a scalar function of a backend's tensor."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            x = tf.constant(array)
            tape.watch(x)
            loss = function(x)
        return np.asarray(tape.gradient(loss, x))
    if BACKEND == "torch":
        x = torch.from_numpy(array).requires_grad_()
        function(x).backward()
        return x.grad.numpy()
    import jax

    return np.asarray(jax.grad(function)(array))


# ---- The code length -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 4, 8])
def test_the_code_length_and_its_gradient_are_torchs(width):
    method = Coded((40, 30), width)
    top = method.top()
    symbols = np.random.default_rng(top).normal(scale=top / 2, size=(40, 30)).astype(np.float32)
    symbols[0, :3] = 2 * top, -2 * top, top  # beyond the largest, and exactly there
    x = torch.from_numpy(symbols.copy()).requires_grad_()
    wanted = in_torch(x, torch.zeros(1, 1), method)
    wanted.backward()
    got = float(ops.convert_to_numpy(code_length(tensor(symbols), top)))
    assert abs(got - float(wanted.detach())) <= (2 * top + 3) * EPS * 16 * float(wanted.detach())
    # A slope is the difference of two logarithms, below 16 each
    assert np.abs(gradient(lambda x: code_length(x, top), symbols) - x.grad.numpy()).max() <= 64 * EPS * 16
    assert x.grad.numpy().any()


def test_latents_and_the_step_get_torchs_gradients():
    method, rng = Coded((12, 10), 4), np.random.default_rng(0)
    matrix, grad = (rng.normal(size=(12, 10)).astype(np.float32) for _ in range(2))
    mine = dk.ThinWeight.encode("coded", method, [Part((12, 10))], [matrix])
    theirs = dt.ThinWeight.encode("coded", method, [Part((12, 10))], [torch.from_numpy(matrix)])
    (theirs() * torch.from_numpy(grad)).sum().backward()
    for latent, wanted in (("weight", theirs.weight.grad), ("log_step", theirs.log_step.grad)):
        variable = mine.latents[latent]

        def loss(value, variable=variable):
            with keras.StatelessScope(state_mapping=[(variable, value)]):
                return ops.sum(mine.dense() * tensor(grad))

        got = gradient(loss, np.array(ops.convert_to_numpy(variable)))
        assert np.abs(got - wanted.numpy()).max() <= 4 * 120 * EPS * np.abs(wanted.numpy()).max()
        assert got.any()


def test_learned_steps_have_a_rate_of_their_own():
    model = network()
    dk.compress(model, {"rules": {"*.kernel": THEN}})
    rates = {v.name: v.learning_rate_multiplier for v in model.layers[0].thin["kernel"].trainable_variables}
    assert rates == {"xf": 10.0, "wf": 10.0, "xf_log_step": 10.0, "wf_log_step": 10.0}
    model = network()
    dk.compress(model, {"rules": {"*.kernel": CODED}})
    rates = {v.name: v.learning_rate_multiplier for v in model.layers[0].thin["kernel"].trainable_variables}
    assert rates == {"weight": 1.0, "log_step": 10.0}


# ---- Training to a size ----------------------------------------------------------------------------------------------


class Torch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 64), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.last(self.first(x).relu())


@pytest.mark.parametrize(
    ("file_bytes", "rule", "options"),
    [
        pytest.param(1400, CODED, {}, marks=pytest.mark.slow),
        (900, CODED, {} if BACKEND == "torch" else {"steps_per_execution": 4}),
        (1000, THEN, {}),
    ],
    ids=["dense", "dense, small", "factors"],
)
def test_a_training_ends_within_its_size_and_files_cross(file_bytes, rule, options, tmp_path):
    model, target = trained(file_bytes, rule, **options)
    size = dk.save(model, tmp_path / "m.thin", max_bytes=file_bytes)
    assert 0.97 * file_bytes <= size <= file_bytes == target.file_bytes
    x, y = data()
    _, accuracy = model.evaluate(x, y, verbose=0)
    assert accuracy > 2 / CLASSES

    wanted = ops.convert_to_numpy(model(x[:9]))
    bound = 64 * 64 * EPS * np.abs(wanted).max()
    again = dk.load(network(), tmp_path / "m.thin")
    assert np.abs(ops.convert_to_numpy(again(x[:9])) - wanted).max() <= bound
    names = {
        f"{layer}.{ours}": f"{layer}.{own}"
        for layer in ("first", "last")
        for ours, own in (("kernel", "weight"), ("bias", "bias"))
    }
    other = dt.load(Torch(), tmp_path / "m.thin", names=names).eval()
    with torch.no_grad():
        assert np.abs(other(torch.from_numpy(x[:9])).numpy() - wanted).max() <= bound
    arrays = deepthin.load(tmp_path / "m.thin")
    hidden = np.maximum(x[:9] @ arrays["first.kernel"].T + arrays["first.bias"], 0)
    assert np.abs(hidden @ arrays["last.kernel"].T + arrays["last.bias"] - wanted).max() <= bound
    dk.save(again, tmp_path / "again.thin")
    assert (tmp_path / "again.thin").read_bytes() == (tmp_path / "m.thin").read_bytes()


@pytest.mark.slow
def test_without_a_graph_the_same_holds(tmp_path):
    model, target = trained(1100, CODED, steps=STEPS // 4, run_eagerly=True)
    assert 0.97 * 1100 <= dk.save(model, tmp_path / "m.thin") <= 1100
    assert target.weight > 0


def test_the_penalty_is_in_training_steps_only():
    model = network()
    dk.compress(model, {"model": {"file_bytes": 1100}, "rules": {"*.kernel": CODED}})
    compiled(model)
    x, y = data()
    before = model.evaluate(x, y, verbose=0)
    target = dk.SizeTarget(model, steps=4 * len(x) // BATCH)
    assert model.evaluate(x, y, verbose=0) == before
    seen = []

    class Seen(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(logs["val_loss"])

    model.fit(x, y, batch_size=BATCH, verbose=0, validation_data=(x, y), callbacks=[target, Seen()])
    assert target.weight > 0
    assert [float(term) for term in map(ops.convert_to_numpy, model.losses)] == [0.0]
    y_pred = model.predict(x, verbose=0)
    task = float(ops.convert_to_numpy(model.loss(y, y_pred)))
    assert abs(seen[0] - task) <= len(x) * EPS * task

    target.on_train_batch_begin(0)  # as a training loop of one's own has it
    assert float(ops.convert_to_numpy(model.losses[0])) > 0
    target.on_train_batch_end(0)
    assert [float(term) for term in map(ops.convert_to_numpy, model.losses)] == [0.0]


def test_a_training_that_ends_early_is_finished_by_hand(tmp_path):
    model = network()
    dk.compress(model, {"rules": {"*.kernel": CODED}})
    target = dk.SizeTarget(model, steps=1000, file_bytes=1000)
    assert target.finish() <= 1000
    assert dk.save(model, tmp_path / "m.thin") == target.finish()


def test_a_target_goes_on_from_its_state():
    model = network()
    dk.compress(model, {"model": {"file_bytes": 1100}, "rules": {"*.kernel": CODED}})
    compiled(model)
    first = dk.SizeTarget(model, steps=100)
    model.fit(*data(), batch_size=BATCH, steps_per_epoch=9, verbose=0, callbacks=[first])
    second = dk.SizeTarget(model, steps=100)
    second.load_state_dict(first.state_dict())
    assert second.steps_done == first.steps_done == 9
    assert second.weight == first.weight > 0
    assert second.bytes == first.bytes


# ---- What is refused, and what is kept -------------------------------------------------------------------------------


def test_a_size_below_that_of_zeros_is_refused_before_training():
    rules = {"model": {"file_bytes": 40}, "rules": {"*.kernel": CODED}}
    with pytest.raises(BudgetError, match="cannot be trained to 40 bytes: with every symbol zero it has") as refused:
        dk.compress(network(), rules)
    least = refused.value.smallest_bits // 8
    model = network()
    dk.compress(model, {"model": {"file_bytes": least}, "rules": {"*.kernel": CODED}})
    with pytest.raises(BudgetError, match=r"cannot be trained to 40 bytes: .* file_bytes >= \d+, or code more"):
        dk.SizeTarget(model, steps=10, file_bytes=40)


def test_what_a_target_needs():
    model = network()
    with pytest.raises(ConfigError, match="no coded weights"):
        dk.SizeTarget(model, steps=10, file_bytes=1000)
    dk.compress(model, {"rules": {"*.kernel": CODED}})
    with pytest.raises(ConfigError, match="There is no target"):
        dk.SizeTarget(model, steps=10)
    with pytest.raises(ConfigError, match="steps = 0 must be a whole number from 1 on"):
        dk.SizeTarget(model, steps=0, file_bytes=1000)


@pytest.mark.parametrize("rule", [CODED, THEN], ids=["alone", "then"])
def test_keras_files_keep_codes_steps_and_the_target(rule, tmp_path):
    model = network()
    dk.compress(model, {"model": {"file_bytes": 1200}, "rules": {"*.kernel": rule}})
    for variable in model.trainable_variables:
        variable.assign(variable * 1.25 + 0.01)
    x = data()[0][:5]
    wanted = ops.convert_to_numpy(model(x))
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(ops.convert_to_numpy(again(x)), wanted)
    assert dk.SizeTarget(again, steps=10).file_bytes == 1200
    model.save_weights(tmp_path / "m.weights.h5")
    other = network()
    dk.compress(other, {"model": {"file_bytes": 1200}, "rules": {"*.kernel": rule}}, init="scratch", seed=3)
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(ops.convert_to_numpy(other(x)), wanted)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_keeps_the_step_of_a_file(kind, tmp_path):
    model = network()
    dk.compress(model, {"rules": {"*.kernel": CODED}})
    dk.save(model, tmp_path / "m.thin")
    keras.config.set_dtype_policy(kind)
    try:
        half = dk.load(network(), tmp_path / "m.thin")
    finally:
        keras.config.set_dtype_policy("float32")
    mine, wanted = half.layers[0].thin["kernel"], model.layers[0].thin["kernel"].code()
    decoded = ops.convert_to_numpy(ops.cast(mine.dense(), "float32"))
    exact = wanted["symbols"] * wanted["step"]
    assert (np.abs(decoded - exact) <= 2.0**-8 * np.abs(exact) + 2.0**-24).all()
    np.testing.assert_array_equal(mine.code()["symbols"], wanted["symbols"])
