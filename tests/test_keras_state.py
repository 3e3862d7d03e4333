"""State of thin Keras models that is right whatever happens to it: names, averages, copies, files, options."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest

import deepthin
from deepthin.errors import ConfigError
from deepthin.method import Integers
from tolerance import bound

pytest.importorskip("keras")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    from keras import layers, ops

    import deepthin.keras as dk
    from deepthin.keras.integers import integer_type
    from deepthin.keras.layers import THIN

pytestmark = pytest.mark.filterwarnings("ignore")

BACKEND = keras.backend.backend()
tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own interfaces")

ALONE = {
    "deepthin": {"ratio": 0.12},
    "shuffled": {"ratio": 0.12},
    "rank": {"ratio": 0.2},
    "hashed": {"ratio": 0.1},
    "pruned": {"ratio": 0.2},
    "kronecker": {"ratio": 0.2},
    "tensor-train": {"ratio": 0.2},
    "uniform": {"bits": 4},
    "kmeans": {"bits": 8},
    "ecsq": {"bits": 3},
    "binary": {"bits": 2, "rounds": 0},
    "coded": {"bits": 8},
}
INNER = {
    "uniform": {"bits": 8},
    "kmeans": {"bits": 4},
    "ecsq": {"bits": 3},
    "binary": {"bits": 2, "rounds": 1},
    "coded": {},
}
OUTER = ("deepthin", "shuffled", "rank", "hashed", "pruned", "kronecker", "tensor-train")
RULES = {name: {"method": name, **options} for name, options in ALONE.items()} | {
    f"{outer} then {inner}": {"method": outer, "ratio": 0.3, "then": {"method": inner, **options}}
    for outer, (inner, options) in itertools.product(OUTER, INNER.items())
}
PAIRS = [f"{outer} then {inner}" for outer, inner in zip(OUTER, itertools.cycle(INNER), strict=False)]
QUICK = {
    *ALONE,
    *PAIRS,
    "pruned then binary",
    "rank then binary",
    "deepthin then uniform",
    "deepthin then coded",
}  # the others take minutes


def case(name, *values, id=None):
    return pytest.param(*values, id=id or name, marks=() if name in QUICK else pytest.mark.slow)


every = pytest.mark.parametrize("rule", [case(name, rule) for name, rule in RULES.items()])


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


def network():
    return keras.Sequential([keras.Input((24,)), layers.Dense(40, name="first")])


def thin(rule):
    model = network()
    dk.compress(model, {"rules": {"*": rule}})
    return model


def moved(model):
    """The same model after its floats changed as in a training step."""
    rng = np.random.default_rng(5)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.01 * rng.normal(size=variable.shape))
    return model


def outputs(model, x=None):
    x = np.linspace(-1, 1, 72, dtype=np.float32).reshape(3, 24) if x is None else x
    return np.asarray(ops.convert_to_numpy(model(x)), np.float32)


def assert_equal_up_to_rounding(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


# ---- Names are not patterns ------------------------------------------------------------------------------------------

NAMES = ("fc[0]", "fc0", "re:fc.*", "f*", "f?0")


class Blocks(keras.Model):
    """Layers whose names are the keys of a dictionary: TensorFlow calls no layer that has such a name itself."""

    def __init__(self):
        super().__init__()
        self.blocks = {name: layers.Dense(6) for name in NAMES}

    def call(self, x):
        for block in self.blocks.values():
            x = block(x)
        return x


def blocks():
    model = Blocks()
    model(np.zeros((1, 6), np.float32))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_patterns(name, tmp_path):
    exact = f"blocks.{name}"
    others = {f"blocks.{other}.kernel" for other in NAMES if other != name}
    for pattern in (exact, f"{exact}.kernel"):
        model = blocks()
        report = dk.compress(model, {"rules": {pattern: {"method": "deepthin", "ratio": 0.9}}})
        assert {row.name for row in report.rows if row.method != "dense"} == {f"{exact}.kernel"}
        left = dk.compress(blocks(), {"model": {"ratio": 0.9, "ignore": [pattern]}})
        assert {row.name for row in left.rows if row.method != "dense"} == others
    x = np.ones((2, 6), np.float32)
    dk.save(model, tmp_path / "m.thin")
    np.testing.assert_array_equal(outputs(dk.load(blocks(), tmp_path / "m.thin"), x), outputs(model, x))
    if BACKEND == "tensorflow":
        np.testing.assert_array_equal(model.predict(x, verbose=0).shape, (2, 6))


@pytest.mark.parametrize("name", NAMES)
def test_layers_with_such_names_cross_to_torch(name, tmp_path):
    torch = pytest.importorskip("torch")
    import deepthin.torch as dt

    model = keras.Sequential([keras.Input((6,)), *(layers.Dense(6, name=own) for own in NAMES)])
    dk.compress(model, {"rules": {name: {"ratio": 0.9}}})
    dk.save(model, tmp_path / "m.thin")
    net = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in NAMES))
    places = {
        f"{own}.{a}": f"{i}.{b}" for i, own in enumerate(NAMES) for a, b in (("kernel", "weight"), ("bias", "bias"))
    }
    dt.load(net, tmp_path / "m.thin", names=places)
    for index, layer in enumerate(model.layers):
        kernel = net[index].weight.detach().numpy().T
        np.testing.assert_allclose(kernel, ops.convert_to_numpy(layer.kernel), rtol=0, atol=1e-6)
    dt.save(net, tmp_path / "t.thin")
    back = keras.Sequential([keras.Input((6,)), *(layers.Dense(6, name=own) for own in NAMES)])
    dk.load(back, tmp_path / "t.thin", names={there: here for here, there in places.items()})
    for mine, theirs in zip(back.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(mine), ops.convert_to_numpy(theirs))


# ---- Exact integers --------------------------------------------------------------------------------------------------

AVERAGES = {
    "half": lambda a, b: (a + b) / 2,
    "moving": lambda a, b: 0.999 * a + 0.001 * b,
    "mean": lambda a, b: np.mean([a, b, a], axis=0),
    "float32": lambda a, b: (np.float32(0.9) * a.astype("f4") + np.float32(0.1) * b.astype("f4")).astype("f4"),
    "eight": lambda a, b: sum([a] * 7, start=b) / 8,
}


@every
def test_integers_survive_averaging(rule):
    """Weights become floats when they are averaged; integers must come back as they were."""
    model = thin(rule)
    wanted, before = outputs(model), model.get_weights()
    for average in AVERAGES.values():
        model.set_weights([average(w, w) for w in before])
        assert_equal_up_to_rounding(outputs(model), wanted)
        for variable, value in zip(model.weights, before, strict=True):
            if np.issubdtype(value.dtype, np.integer):
                np.testing.assert_array_equal(variable.numpy(), value)
        model.set_weights(before)


@pytest.mark.parametrize("name", ["pruned", "kmeans", "binary", "pruned then binary"])
def test_averages_of_different_integers_are_refused(name):
    model, other = thin(RULES[name]), thin(RULES[name])
    a, b = model.get_weights(), other.get_weights()
    assert any(np.issubdtype(w.dtype, np.integer) and (w != v).any() for w, v in zip(a, b, strict=True))
    with pytest.raises(ConfigError, match=r"(positions|symbols).* integers of a code.*copy them from one model"):
        model.set_weights([0.999 * w + 0.001 * v for w, v in zip(a, b, strict=True)])
    variable = next(v for v in model.weights if "int" in v.dtype)
    with pytest.raises(ConfigError, match=r"to .*, but .* from 0 to"):
        variable.assign(np.full(variable.shape, 1 << 40))
    with pytest.raises(ConfigError, match="integers of a code"):
        variable.assign(np.full(variable.shape, np.nan))
    model.set_weights(b)
    np.testing.assert_array_equal(outputs(model), outputs(other))


@pytest.mark.parametrize("name", ["pruned", "kmeans", "uniform", "binary", "hashed then binary"])
def test_moving_averages_of_optimisers(name):
    """Of an unchanged model the average is the model: Keras's EMA, the callback that swaps it in, and both at once."""
    x, y = np.ones((8, 24), np.float32), np.zeros((8, 40), np.float32)
    for callbacks, options in (
        ([], {"ema_overwrite_frequency": 1}),
        ([keras.callbacks.SwapEMAWeights(swap_on_epoch=True)], {}),
    ):
        model = thin(RULES[name])
        wanted = outputs(model)
        model.compile(dk.SGD(0.0, use_ema=True, ema_momentum=0.9, **options), "mse", run_eagerly=True)
        model.fit(x, y, epochs=2, batch_size=4, verbose=0, callbacks=callbacks)
        assert_equal_up_to_rounding(outputs(model), wanted)


def test_rounding_happens_in_graphs_too():
    model = thin(RULES["pruned"])
    variable = next(v for v in model.weights if "int" in v.dtype)
    before = variable.numpy()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.function(lambda: variable.assign(0.999 * tf.cast(variable.value, "float32")))()
    else:
        variable.assign(0.999 * ops.cast(variable.value, "float32") + 0.001 * ops.cast(variable.value, "float32"))
    assert (np.abs(variable.numpy() - np.rint(0.999 * before)) <= 1).all()
    if BACKEND == "tensorflow":
        variable.assign(before)
        tf.function(lambda: variable.assign(tf.cast(variable.value, "float32") - 0.25))()
    np.testing.assert_array_equal(variable.numpy(), before)


@pytest.mark.parametrize("name", RULES)
def test_integers_have_small_types_and_arrays_of_them_room(name):
    for layer in thin(RULES[name])._flatten_layers():
        if isinstance(layer, dk.ThinWeight):
            whole = {**layer.method.integers(), **layer.decoder.integers()}
            for entry, variable in {**layer.latents, **layer.stored}.items():
                if entry in whole:
                    assert variable.dtype == integer_type(whole[entry])
                    assert variable.numpy().dtype == np.int64


@pytest.mark.parametrize(
    ("least", "most"),
    [(0, 255), (0, 256), (0, 65535), (0, 2**31 - 1), (-128, 127), (-129, 0), (-32768, 32767), (-40000, 40000)],
)
def test_integer_types_hold_their_range(least, most):
    kind = np.iinfo(integer_type(Integers(most - least + 1, least)))
    assert kind.min <= least
    assert most <= kind.max


def test_files_of_what_load_refuses_are_not_written(tmp_path):
    model = thin(RULES["pruned"])
    variable = next(v for v in model.weights if v.name == "positions")
    variable.assign(np.sort(variable.numpy())[::-1].copy())
    with pytest.raises(ConfigError, match=r"first.kernel/positions.*rise"):
        dk.save(model, tmp_path / "m.thin")
    assert not list(tmp_path.iterdir())


# ---- State has one form ----------------------------------------------------------------------------------------------


def cloned(model):
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    return twin


def from_keras(model, folder):
    model.save(folder / "m.keras")
    return keras.models.load_model(folder / "m.keras")


def resumed(model, fresh, folder):
    model.save_weights(folder / "m.weights.h5")
    fresh.load_weights(folder / "m.weights.h5")
    return fresh


def form(model):
    return [(v.name, tuple(v.shape), v.dtype, v.trainable) for v in model.weights]


UNCHANGED = ("kmeans", "uniform", "deepthin then uniform", "rank then binary")  # as compressed, without training
ORIGINS = [case(name, rule, moved, id=f"{name}, trained") for name, rule in RULES.items()] + [
    case(name, RULES[name], lambda model: model) for name in UNCHANGED
]


@pytest.mark.parametrize(("rule", "change"), ORIGINS)
def test_variables_and_outputs_do_not_depend_on_the_way(rule, change, tmp_path):
    origin, fresh = change(thin(rule)), thin(rule)
    dk.save(origin, tmp_path / "m.thin")
    loaded = dk.load(network(), tmp_path / "m.thin")
    ways = {
        "loaded": loaded,
        "loaded thin": dk.load(moved(thin(rule)), tmp_path / "m.thin"),
        "cloned": cloned(loaded),
        "keras": from_keras(loaded, tmp_path),
        "keras of origin": from_keras(origin, tmp_path),
        "resumed": resumed(loaded, thin(rule), tmp_path),
        "pickled": pickle.loads(pickle.dumps(loaded)),
        "copied": copy.deepcopy(origin),
    }
    for name, way in ways.items():
        assert form(way) == form(origin), name
        assert_equal_up_to_rounding(outputs(way), outputs(origin))
        fresh.set_weights(way.get_weights())
        np.testing.assert_array_equal(outputs(fresh), outputs(way), err_msg=name)
    resumed(origin, fresh, tmp_path)
    np.testing.assert_array_equal(outputs(fresh), outputs(origin))
    for same, as_in in (("cloned", loaded), ("keras of origin", origin), ("copied", origin), ("resumed", loaded)):
        np.testing.assert_array_equal(outputs(ways[same]), outputs(as_in), err_msg=same)


@every
def test_a_clone_begins_anew(rule):
    """As Keras's own layers do; zeros would give factors no gradients."""
    model = thin(rule)
    kernels = [ops.convert_to_numpy(keras.models.clone_model(model).layers[0].kernel) for _ in range(2)]
    assert np.isfinite(kernels).all()
    assert (kernels[0] != kernels[1]).any()
    assert 0.3 <= kernels[0].std() / (0.2 / 24) ** 0.5 <= 3


def test_what_is_not_built_is_neither_saved_nor_loaded(tmp_path):
    model = keras.Sequential([layers.Dense(3, name="a")])
    for call in (
        lambda: dk.save(model, tmp_path / "m.thin"),
        lambda: dk.compress(model, {"model": {"ratio": 0.9}}),
        lambda: dk.plan(model, {"model": {"ratio": 0.9}}),
    ):
        with pytest.raises(ConfigError, match="has no weights yet: build the model"):
            call()
    dk.save(keras.Sequential([keras.Input((3,)), layers.Dense(3, name="a")]), tmp_path / "m.thin")
    with pytest.raises(ConfigError, match="has no weights yet: build the model"):
        dk.load(model, tmp_path / "m.thin")


# ---- Options of layers, and pairs of models and files ----------------------------------------------------------------

IMAGE, SEQUENCE, SIGNAL, VOLUME = (8, 9, 4), (5, 6), (12, 4), (5, 6, 5, 2)
ACTIVITY = {"activity_regularizer": "l2", "bias_initializer": "ones", "activation": "tanh"}
REGULAR = {"kernel_regularizer": "l2", "bias_regularizer": "l1", "bias_constraint": "non_neg"}
CONVOLUTION = [
    {},
    {"padding": "same"},
    {"strides": 2},
    {"dilation_rate": 2},
    {"use_bias": False},
    {**ACTIVITY, **REGULAR},
]
RECURRENT = [
    {},
    {"return_sequences": True, "go_backwards": True},
    {"unroll": True, "use_bias": False},
    {"dropout": 0.3, "recurrent_dropout": 0.2, "seed": 3},
    {"activation": "relu", **REGULAR, "recurrent_regularizer": "l2", "activity_regularizer": "l2"},
    {"stateful": True, "return_sequences": True},
    {"zero_output_for_mask": True, "return_sequences": True},
]
OPTIONS = {
    layers.Dense: (
        SEQUENCE,
        {"units": 5},
        [{}, {"use_bias": False}, {**ACTIVITY, **REGULAR}, {"activation": "softmax"}],
    ),
    layers.Conv1D: (
        SIGNAL,
        {"filters": 6, "kernel_size": 3},
        [*CONVOLUTION, {"padding": "causal"}, {"groups": 2}, {"data_format": "channels_first"}],
    ),
    layers.Conv2D: (
        IMAGE,
        {"filters": 6, "kernel_size": (3, 2)},
        [*CONVOLUTION, {"groups": 2}, {"data_format": "channels_first"}],
    ),
    layers.Conv3D: (VOLUME, {"filters": 4, "kernel_size": 2}, [*CONVOLUTION[:3], {"dilation_rate": (2, 2, 2)}]),
    layers.Conv1DTranspose: (
        SIGNAL,
        {"filters": 6, "kernel_size": 3},
        [*CONVOLUTION, {"strides": 2, "output_padding": 1}],
    ),
    layers.Conv2DTranspose: (
        IMAGE,
        {"filters": 6, "kernel_size": 3},
        [*CONVOLUTION, {"strides": 2, "output_padding": 1}],
    ),
    layers.Conv3DTranspose: (VOLUME, {"filters": 4, "kernel_size": 2}, [{}, {"strides": 2, "padding": "same"}]),
    layers.DepthwiseConv1D: (
        SIGNAL,
        {"kernel_size": 3},
        [{}, {"depth_multiplier": 3, "padding": "same"}, {"strides": 2}, {"depthwise_regularizer": "l2", **ACTIVITY}],
    ),
    layers.DepthwiseConv2D: (
        IMAGE,
        {"kernel_size": 3},
        [{}, {"depth_multiplier": 3, "padding": "same"}, {"strides": 2}, {"depthwise_regularizer": "l2", **ACTIVITY}],
    ),
    layers.SeparableConv1D: (
        SIGNAL,
        {"filters": 6, "kernel_size": 3},
        [{}, {"depth_multiplier": 2, "strides": 2}, {"depthwise_regularizer": "l2", "pointwise_regularizer": "l1"}],
    ),
    layers.SeparableConv2D: (
        IMAGE,
        {"filters": 6, "kernel_size": 3},
        [{}, {"depth_multiplier": 2, "strides": 2}, {"depthwise_regularizer": "l2", "pointwise_regularizer": "l1"}],
    ),
    layers.Embedding: (
        None,
        {"input_dim": 11, "output_dim": 6},
        [{}, {"mask_zero": True}, {"embeddings_regularizer": "l2", "activity_regularizer": "l2"}],
    ),
    layers.SimpleRNN: (SEQUENCE, {"units": 6}, RECURRENT),
    layers.LSTM: (SEQUENCE, {"units": 6}, [*RECURRENT, {"unit_forget_bias": False, "recurrent_activation": "relu"}]),
    layers.GRU: (SEQUENCE, {"units": 6}, [*RECURRENT, {"reset_after": False}]),
}
CASES = [(kind, options) for kind, (_, _, listed) in OPTIONS.items() for options in listed]
EXACT = {
    "method": "uniform",
    "bits": 8,
}  # its gradients are those of the dense weight, by the straight-through estimator


def is_long(kind, options):
    """Options that all recurrent layers leave to ``layers.RNN`` are tried with the simplest of them."""
    return kind in (layers.LSTM, layers.GRU) and options in [o for o in RECURRENT if o and "dropout" not in o]


def built(kind, options):
    """A model of one layer, with a mask before it where it is recurrent and does not unroll."""
    shape, base, _ = OPTIONS[kind]
    layer = kind(**base, **options, name="layer")
    if shape is None:
        inner = [layer, layers.LSTM(3, name="after")]
        return keras.Sequential([keras.Input((7,), dtype="int32"), *inner])
    begin = keras.Input(batch_shape=(3, *shape))
    masked = issubclass(kind, layers.RNN) and not options.get("unroll")
    return keras.Sequential([begin, *([layers.Masking(name="mask")] if masked else []), layer])


def inputs_of(kind):
    rng, shape = np.random.default_rng(1), OPTIONS[kind][0]
    if shape is None:
        x = rng.integers(1, 11, (3, 7))
        x[1, 3:] = 0
        return x
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    if len(shape) == 2:
        x[1, 3:] = 0  # masked by layers.Masking
    return x


def gradients_of(model, x, variables):
    """Of the loss that training minimises: mean squares of the outputs, and the regularisers."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2) + sum(model.losses)
        values = [variable.value for variable in variables]
        return float(loss), [
            np.zeros(v.shape, np.float32) if g is None else np.asarray(tf.convert_to_tensor(g))
            for g, v in zip(tape.gradient(loss, values), values, strict=True)
        ]
    pytest.skip("gradients by GradientTape")
    return None


@tensorflow_only
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(k, o, id=f"{k.__name__} {' '.join(o) or 'plain'}", marks=pytest.mark.slow if is_long(k, o) else ())
        for k, o in CASES
    ],
)
def test_every_option_acts_as_in_the_dense_layer(kind, options):
    model, x = built(kind, options), inputs_of(kind)
    rng = np.random.default_rng(2)
    for variable in model.trainable_variables:
        variable.assign(0.3 * rng.normal(size=variable.shape))
    dk.compress(model, {"rules": {"layer": EXACT}})
    thin_ones = [layer for layer in model._flatten_layers() if isinstance(layer, dk.ThinLayer)]
    assert thin_ones
    twin = built(kind, options)
    dense = keras.models.clone_model(model)
    dense.set_weights(model.get_weights())
    dk.materialize(dense)
    twin.set_weights(dense.get_weights())  # Keras's own layers, with the decoded weights

    assert_equal_up_to_rounding(outputs(model, x), outputs(twin, x))
    for one in (model, twin):
        if options.get("stateful"):
            one.get_layer("layer").reset_state()
    loss, mine = gradients_of(model, x, model.trainable_variables)
    wanted, theirs = gradients_of(twin, x, twin.trainable_variables)
    assert abs(loss - wanted) <= 1e-5 * max(1, abs(wanted))
    found, by_shape = {}, {}
    for layer in thin_ones:
        for name, weight in layer.thin.items():
            place = next(i for i, v in enumerate(model.trainable_variables) if v is weight.latents["weight"])
            shape = layer.shapes[name]
            layout = dk_layouts(layer, name, shape)[name]
            part = weight.parts[0]
            found[name] = layout.restored(mine[place].reshape(-1)[: np.prod(part.shape)].reshape(part.shape), shape)
    for variable, gradient in zip(twin.trainable_variables, theirs, strict=True):
        by_shape[variable.path.split("/")[-2] + "/" + variable.name] = gradient
    largest = max(np.abs(g).max() for g in theirs)
    for name, gradient in found.items():
        candidates = [g for key, g in by_shape.items() if key.endswith("/" + name) and g.shape == gradient.shape]
        assert any(np.abs(g - gradient).max() <= 1e-5 * max(1, largest) for g in candidates), name
        assert np.abs(gradient).max() > 0
    rest = [g for v, g in zip(model.trainable_variables, mine, strict=True) if v.name != "weight"]
    others = [g for v, g in zip(twin.trainable_variables, theirs, strict=True) if not is_thin_name(v, found)]
    for a, b in zip(rest, others, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(1, largest)


def is_thin_name(variable, found):
    return variable.name in found and "after" not in variable.path


def dk_layouts(layer, name, shape):
    from deepthin.keras.layout import layouts

    return layouts(layer, name, shape)


@tensorflow_only
@pytest.mark.parametrize("options", OPTIONS[layers.Dense][2], ids=lambda options: " ".join(options) or "plain")
def test_every_option_of_a_dense_layer_acts_in_the_native_product(options):
    """The same factors, by native code and by the decoded weight."""
    from deepthin.keras.tensorflow_product import portable, product

    model = keras.Sequential([keras.Input((5, 512)), layers.Dense(512, **options, name="layer")])
    dk.compress(model, {"rules": {"layer": {"method": "deepthin", "ratio": 0.01}}}, init="scratch")
    x = np.random.default_rng(1).normal(size=(3, 5, 512)).astype(np.float32)
    assert not deepthin.native_available or product(model.layers[0].thin["kernel"], x) is not None
    loss, native = gradients_of(model, x, model.trainable_variables)
    got = outputs(model, x)
    with portable():
        wanted, decoded = gradients_of(model, x, model.trainable_variables)
        assert_equal_up_to_rounding(got, outputs(model, x))
    assert abs(loss - wanted) <= 1e-5 * max(1, abs(wanted))
    for a, b in zip(native, decoded, strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


def test_all_layers_are_here():
    cells = {layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell}
    assert {*OPTIONS, *cells} == {*THIN, layers.SimpleRNN, layers.LSTM, layers.GRU}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(
            kind,
            method,
            id=f"{kind.__name__}-{method}",
            marks=pytest.mark.slow if method == "kmeans" and kind is not layers.Dense else (),
        )
        for kind in OPTIONS
        for method in ("deepthin", "kmeans")
    ],
)
def test_thin_and_dense_files_load_into_thin_and_dense_models(kind, method, tmp_path):
    rule = {"method": method, "ratio": 0.95} if method == "deepthin" else {"method": method, "bits": 3}
    x = inputs_of(kind)

    def one(is_thin):
        model = built(kind, {})
        if is_thin:
            dk.compress(model, {"rules": {"*": rule}})
        return model

    files, model = {is_thin: one(is_thin) for is_thin in (True, False)}, one(False)
    for in_file in (True, True, False, False):  # into a dense model, a thin one, a thin one, a dense one
        saved = files[in_file]
        outputs(moved(model), x)
        dk.save(saved, tmp_path / "m.thin")
        dk.load(model, tmp_path / "m.thin")
        assert_equal_up_to_rounding(outputs(model, x), outputs(saved, x))
        assert form(model) == form(saved)
        assert [type(layer) for layer in model.layers] == [type(layer) for layer in saved.layers]
        dk.save(model, tmp_path / "n.thin")
        assert (tmp_path / "m.thin").read_bytes() == (tmp_path / "n.thin").read_bytes()


@tensorflow_only
def test_sparse_and_ragged_inputs():
    import tensorflow as tf

    model = keras.Sequential([keras.Input((512,)), layers.Dense(512, name="a")])
    dk.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.01}}}, init="scratch")
    x = np.zeros((2, 512), np.float32)
    x[0, 3], x[1, 500] = 1, 2
    got = model.layers[0](tf.sparse.from_dense(x))
    assert_equal_up_to_rounding(np.asarray(got), outputs(model, x))


def test_adapters_and_constraints_are_refused_by_name():
    model = keras.Sequential([keras.Input((10,)), layers.Dense(4, lora_rank=2, name="a"), layers.Dense(4, name="b")])
    with pytest.raises(ConfigError, match=r"a\.kernel: the layer is quantised or has adapters"):
        dk.compress(model, {"rules": {"a": {"ratio": 0.9}}})
    dk.compress(model, {"rules": {"b": {"ratio": 0.9}}})
    with pytest.raises(ConfigError, match=r"b is thin: .*materialize"):
        model.get_layer("b").enable_lora(2)
    words = keras.Sequential([keras.Input((3,)), layers.Embedding(11, 6, name="e")])
    dk.compress(words, {"rules": {"*": {"ratio": 0.9}}})
    with pytest.raises(ConfigError, match=r"e is thin: .*materialize"):
        words.get_layer("e").enable_lora(2)
    dk.materialize(words).get_layer("e").enable_lora(2)
    for kind, options in ((layers.Embedding, "embeddings_constraint"), (layers.Conv2D, "kernel_constraint")):
        with pytest.raises(ConfigError, match="it has a constraint"):
            dk.compress(built(kind, {options: "non_neg"}), {"rules": {"layer": {"ratio": 0.9}}})


# ---- Extremes --------------------------------------------------------------------------------------------------------

EXTREMES = [
    *(
        {"method": "uniform", "bits": b, "per": per, "affine": affine}
        for b in (2, 8, 15, 16)
        for per in ("row", "matrix")
        for affine in (False, True)
    ),
    *({"method": "kmeans", "bits": b} for b in (1, 8)),
    *({"method": "ecsq", "bits": b} for b in (1, 8)),
    *({"method": "binary", "bits": b, "per": per} for b in (1, 8) for per in ("row", "matrix")),
    {"method": "deepthin", "ratio": 1.0},
    {"method": "shuffled", "ratio": 1.0},
    {"method": "rank", "ratio": 1.0},
    {"method": "hashed", "ratio": 1.0},
    {"method": "pruned", "ratio": 1.0},
    {"method": "pruned", "ratio": 0.002},
    {"method": "kronecker", "ratio": 1.0},
    {"method": "tensor-train", "ratio": 1.0},
    *({"method": "pruned", "ratio": 0.5, "then": {"method": "uniform", "bits": b, "affine": True}} for b in (2, 16)),
]


@pytest.mark.parametrize("rule", EXTREMES, ids=lambda rule: " ".join(map(str, rule.values())))
def test_extremes_decode_as_in_numpy(rule, tmp_path):
    model = keras.Sequential([keras.Input((160,)), layers.Dense(500, name="a")])
    kernel = np.random.default_rng(3).normal(size=(160, 500)).astype(np.float32)
    kernel[0], kernel[1] = kernel.max(0) * 2, -kernel.max(0)  # the ends of the range are used
    model.layers[0].kernel.assign(kernel)
    dk.compress(model, {"rules": {"*": rule}})
    dk.save(model, tmp_path / "m.thin")
    wanted = deepthin.load(tmp_path / "m.thin")["a.kernel"].T
    loaded = keras.Sequential([keras.Input((160,)), layers.Dense(500, name="a")])
    dk.load(loaded, tmp_path / "m.thin")
    for one in (model, loaded):
        got = ops.convert_to_numpy(one.layers[0].kernel)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=64 * bound(1, np.abs(wanted).max()))
    dk.save(loaded, tmp_path / "n.thin")
    assert (tmp_path / "m.thin").read_bytes() == (tmp_path / "n.thin").read_bytes()


# ---- Errors with names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules", [None, 3, [], "\0", ".", b"x", {"rules": 3}, {"model": []}, {"rules": {3: {}}}, {3: 4}]
)
def test_what_is_no_configuration_is_named(rules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network()
    for call in (dk.compress, dk.plan):
        with pytest.raises(ConfigError):
            call(model, rules)
    assert type(model.layers[0]) is layers.Dense


# ---- Generated variables of deepthin.tensorflow ----------------------------------------------------------------------


@tensorflow_only
@pytest.mark.parametrize("name", ["pruned", "kmeans", "binary", "pruned then binary", "hashed then kmeans"])
def test_generated_variables_survive_averaging(name, tmp_path):
    import tensorflow as tf

    import deepthin.tensorflow as dtf

    thin_ones = dtf.Variables({"rules": {"*": RULES[name]}})
    wanted = thin_ones.get("a/kernel", (24, 40)).numpy()
    exact = [v for v in thin_ones.variables if v.dtype.is_integer]
    for average in AVERAGES.values():
        for variable in thin_ones.variables:
            variable.assign(average(variable.numpy(), variable.numpy()))
        np.testing.assert_allclose(thin_ones.get("a/kernel").numpy(), wanted, rtol=0, atol=1e-5)
    averages = tf.train.ExponentialMovingAverage(0.9)
    averages.apply(thin_ones.trainable_variables)
    for variable in thin_ones.trainable_variables:
        variable.assign(averages.average(variable))
    np.testing.assert_allclose(thin_ones.get("a/kernel").numpy(), wanted, rtol=0, atol=1e-5)
    for variable in exact:
        with pytest.raises(ConfigError, match="integers of a code"):
            variable.assign(variable.numpy() + 0.5)
    checkpoint = tf.train.Checkpoint(thin=thin_ones).save(str(tmp_path / "c"))
    other = dtf.Variables({"rules": {"*": RULES[name]}}, seed=1)
    other.get("a/kernel", (24, 40))
    tf.train.Checkpoint(thin=other).restore(checkpoint)
    np.testing.assert_allclose(other.get("a/kernel").numpy(), wanted, rtol=0, atol=1e-5)


@tensorflow_only
def test_names_of_generated_variables_are_no_patterns(tmp_path):
    import deepthin.tensorflow as dtf

    shapes = {f"{name}/kernel": (6, 6) for name in NAMES}
    made = dtf.Variables({"rules": {"fc[0]": {"ratio": 0.9}}}, shapes=shapes)
    for name, shape in shapes.items():
        made.get(name, shape)
    assert {row.name for row in made.report().rows if row.method != "dense"} == {"fc[0].kernel"}
    dtf.save(made, tmp_path / "m.thin")
    again = dtf.load(dtf.Variables(outputs_first=["fc[0].kernel"]), tmp_path / "m.thin")
    np.testing.assert_array_equal(again.get("fc0/kernel", (6, 6)), made.get("fc0/kernel"))
    np.testing.assert_array_equal(again.get("fc[0]/kernel", (6, 6)), np.transpose(made.get("fc[0]/kernel")))
