"""The native product in TensorFlow: right wherever it serves, and the generated weight where it does not."""

import os

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is tested by `make test-tensorflow`, in an environment of its own")
os.environ["KERAS_BACKEND"] = "tensorflow"

import tensorflow as tf

import deepthin.tensorflow as dtf
from deepthin.keras import tensorflow_product as module
from deepthin.keras.tensorflow_product import fused, pays
from deepthin.kernels import products
from deepthin.methods.factor import Factor
from tolerance import assert_close, largest

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept"),  # of TensorFlow's variables
    pytest.mark.skipif(not products.native_available, reason="the native product needs the native module"),
]
EPS32 = float(np.finfo(np.float32).eps)
PLAN = Factor((37, 53), 11, 2)


@pytest.fixture(autouse=True)
def small_ones_pay(monkeypatch):
    monkeypatch.setattr(module, "pays", lambda method, batch: batch > 0)


@pytest.fixture
def factors():
    code = PLAN.init(np.random.default_rng(0), 0.3)
    return tf.Variable(code["xf"]), tf.Variable(code["wf"])


def weight_of(xf, wf, offset=0):
    return tf.reshape(tf.reshape(xf @ wf, (-1,))[offset : offset + 37 * 53], (37, 53))


def inputs(*shape):
    return tf.constant(np.random.default_rng(1).normal(size=shape).astype(np.float32))


def close(got, x, weight):
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    bound = 200 * EPS32 * (np.abs(x).max(-1, keepdims=True, initial=0) @ np.ones((1, 53)) @ np.abs(weight).T)
    return got.shape == (*x.shape[:-1], 37) and (np.abs(np.asarray(got) - x @ weight.T) <= bound).all()


def calls(function, *arguments):
    """How many calls of Python a function's graph has, those in its branches too."""
    graph = function.get_concrete_function(*arguments).graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    return sum(node.op.startswith("PyFunc") or node.op == "EagerPyFunc" for node in nodes)


@pytest.mark.parametrize("shape", [(53,), (1, 53), (9, 53), (2, 3, 53), (0, 53)], ids=str)
def test_any_batch_known_or_not(shape, factors):
    x = inputs(*shape)
    call = lambda x: fused(PLAN, x, *factors)  # noqa: E731
    spec = tf.TensorSpec((*[None] * (len(shape) - 1), 53))
    ways = [tf.function(call, input_signature=[spec])] if 0 in shape else [call, tf.function(call)]
    ways.append(tf.function(call, input_signature=[spec]))
    for way in ways:
        assert close(way(x), x, weight_of(*factors))
    assert ways[-1].get_concrete_function().output_shapes.as_list() == [*[None] * (len(shape) - 1), 37]
    assert calls(ways[-1]) == 1


def test_a_graph_sees_the_factors_change(factors):
    call = tf.function(lambda x: fused(PLAN, x, *factors))
    x = inputs(4, 53)
    call(x)
    for factor in factors:
        factor.assign(factor * 1.5 + 0.1)
    assert close(call(x), x, weight_of(*factors))
    assert call.experimental_get_tracing_count() == 1


def test_an_offset():
    plan = Factor((37, 53), 11, 2)
    xf, wf = inputs(-(-(7 + 37 * 53) // 11), 2), inputs(2, 11)
    x = inputs(3, 53)
    assert close(fused(plan, x, xf, wf, 7), x, weight_of(xf, wf, 7))


@pytest.mark.parametrize("shape", [(53,), (3, 53), (2, 3, 53)], ids=str)
@pytest.mark.parametrize("wrap", [lambda function: function, tf.function], ids=["eager", "function"])
def test_gradients_of_both_orders(shape, wrap, factors):
    x = inputs(*shape)

    def both_orders(multiply):
        def step(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(tf.sin(multiply(x)))
                first = inner.gradient(loss, (x, *factors))
                size = tf.add_n([tf.reduce_sum(gradient**2) for gradient in first])
            return *first, *outer.gradient(size, (x, *factors))

        return wrap(step)(x)

    ours = both_orders(lambda x: fused(PLAN, x, *factors))
    theirs = both_orders(lambda x: tf.linalg.matvec(weight_of(*factors), x))
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        # There, back, and back through both: 37 outputs, 53 inputs, and 179 rows of factors.
        assert_close(own, other, 3 * (37 + 53 + 179), largest(other))


def test_derivatives_in_forward_mode_and_jacobians(factors):
    x = inputs(3, 53)
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as forward, tf.GradientTape() as tape:
        y = fused(PLAN, x, *factors)
    want = tf.linalg.matvec(weight_of(*factors), tf.ones_like(x))
    sums = tf.linalg.matvec(tf.abs(weight_of(*factors)), tf.ones_like(x))
    assert_close(forward.jvp(y), want, 53 + 8, largest(sums))
    jacobian = tape.jacobian(y, factors[1])
    assert jacobian.shape == (3, 37, 2, 11)
    assert (np.abs(jacobian).reshape(3, 37, -1).max(2) > 0).all()


def test_what_is_not_finite_comes_out_as_from_a_dense_product(factors):
    x = np.asarray(inputs(3, 53)).copy()
    x[1, 7] = np.inf
    found, want = fused(PLAN, tf.constant(x), *factors), x @ np.asarray(weight_of(*factors)).T
    assert np.array_equal(np.isfinite(found), np.isfinite(want))


# ---- Where it does not serve -----------------------------------------------------------------------------------------


def made(seed=0):
    thin = dtf.Variables({"model": {"ratio": 0.1}}, seed)
    thin.get("fc/kernel", (60, 90))
    return thin


def sums_of(thin, x):
    """The magnitudes of all terms behind each output."""
    return np.abs(x) @ np.abs(thin.get("fc/kernel"))


def test_compiled_by_xla_the_weight_is_generated():
    thin, x = made(), inputs(4, 60)
    want = thin.product(x, "fc/kernel")
    plain = tf.function(lambda x: thin.product(x, "fc/kernel"))
    compiled = tf.function(lambda x: thin.product(x, "fc/kernel"), jit_compile=True)
    assert (calls(plain, x), calls(compiled, x)) == (1, 0)
    assert_close(compiled(x), want, 60 + 8, sums_of(thin, x))

    inner = tf.function(lambda x: thin.product(x, "fc/kernel"))
    around = tf.function(lambda x: tf.cond(x[0, 0] > 9, lambda: inner(x), lambda: 2 * inner(x)), jit_compile=True)
    assert_close(around(x), 2 * want, 60 + 8, 2 * sums_of(thin, x))


def test_a_function_traced_before_needs_portable_to_be_compiled():
    thin, x = made(), inputs(4, 60)
    inner = tf.function(lambda x: thin.product(x, "fc/kernel"))
    with dtf.portable():
        want = inner(x)
    assert calls(inner, x) == 0
    got = tf.function(lambda x: inner(x), jit_compile=True)(x)
    assert_close(got, want, 60 + 8, sums_of(thin, x))


def test_a_saved_model_generates_the_weight(tmp_path):
    thin, x = made(), inputs(4, 60)
    thin.serve = tf.function(lambda x: thin.product(x, "fc/kernel"))
    want = thin.serve(x)
    assert calls(thin.serve, x) == 1
    tf.saved_model.save(thin, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert_close(loaded.serve(x), want, 60 + 8, sums_of(thin, x))


def test_what_holds_a_call_of_python_cannot_be_saved(tmp_path):
    thin = made()
    thin.serve = tf.function(lambda x: thin.product(x, "fc/kernel"))
    spec = tf.TensorSpec((None, 60))
    with pytest.raises(AssertionError, match=r"trace_this_function_within_deepthin.tensorflow.portable"):
        tf.saved_model.save(thin, str(tmp_path / "saved"), signatures=thin.serve.get_concrete_function(spec))
    thin.serve = tf.function(lambda x: thin.product(x, "fc/kernel"))
    with dtf.portable():
        tf.saved_model.save(thin, str(tmp_path / "saved"), signatures=thin.serve.get_concrete_function(spec))
    x = inputs(4, 60)
    served = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"](x)
    assert_close(next(iter(served.values())), thin.product(x, "fc/kernel"), 60 + 8, sums_of(thin, x))


def test_what_else_the_weight_is_for(factors, monkeypatch):
    x = inputs(4, 53)
    assert fused(PLAN, x, *factors) is not None
    assert fused(PLAN, tf.cast(x, tf.float64), *factors) is None
    assert fused(PLAN, x[:, :50], *factors) is None
    assert fused(Factor((37, 53), 11, 2, seed=0), x, *factors) is None
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        assert fused(PLAN, x, *factors) is None
    with dtf.portable():
        assert fused(PLAN, x, *factors) is None
    devices = [*tf.config.list_logical_devices(), tf.config.LogicalDevice("/device:GPU:0", "GPU")]
    with monkeypatch.context() as other:
        other.setattr(tf.config, "list_logical_devices", lambda: devices)
        assert fused(PLAN, x, *factors) is None
    monkeypatch.setattr(products, "native_available", False)
    assert fused(PLAN, x, *factors) is None


def test_groups_and_methods_that_store_its_floats():
    x = inputs(4, 60)
    shapes = {"fc1/kernel": (60, 90), "fc2/kernel": (60, 70)}
    for rule in ({"group": "flat"}, {"group": "rows"}, {"then": {"method": "uniform", "bits": 8}}):
        thin = dtf.Variables({"model": {"ratio": 0.2}, "rules": {"*": rule}}, shapes=shapes)
        for name, shape in shapes.items():
            call = tf.function(lambda x, name=name, shape=shape, thin=thin: thin.product(x, name, shape))
            found, weight = call(x), thin.get(name)
            assert calls(call, x) == 1
            bound = 200 * EPS32 * np.abs(x).max(1, keepdims=True) * np.abs(weight).sum(0)
            assert (np.abs(found - x @ weight) <= bound).all()


def test_the_choice_is_one_of_plan_and_batch(monkeypatch):
    monkeypatch.undo()
    large, small = Factor.fit((2048, 2048), 1_300_000), Factor.fit((64, 64), 40_000)
    assert [pays(large, batch) for batch in (0, 1, 32, 1000)] == [False, True, True, True]
    assert not pays(small, 1)
