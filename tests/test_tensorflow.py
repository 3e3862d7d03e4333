"""Generated variables of TensorFlow: made, trained, traced, saved, and the same as torch's."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is tested by `make test-tensorflow`, in an environment of its own")
os.environ["KERAS_BACKEND"] = "tensorflow"

import tensorflow as tf
import torch
from torch import nn

import deepthin
import deepthin.tensorflow as dtf
import deepthin.torch as dt
from deepthin.errors import BudgetError, ConfigError, NonFiniteError
from deepthin.tensorflow.get_variable import _here
from tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept")  # of TensorFlow's variables
EPS32 = float(np.finfo(np.float32).eps)
RULES = {"model": {"ratio": 0.1}}
v1 = tf.compat.v1


@pytest.fixture(autouse=True)
def nothing_made_before():
    yield
    _here._state.entries.clear()
    _here._tracked.clear()


def file_of(folder, variables):
    dtf.save(variables, folder / "m.thin")
    return deepthin.load(folder / "m.thin")


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


# ---- What a name gives ---------------------------------------------------------------------------------------------


def test_a_tensor_is_generated_from_factors_that_train():
    with tf.GradientTape() as tape:
        weight = dtf.get_variable("fc1/kernel", shape=(440, 2048), rules=RULES, seed=0)
        loss = tf.reduce_sum(weight**2)
    assert weight.shape == (440, 2048)
    assert weight.dtype == tf.float32
    assert float(tf.math.reduce_std(weight)) == pytest.approx(np.sqrt(0.2 / 440), rel=0.02)  # a draw's spread
    factors = dtf.variables().trainable_variables
    assert [variable.name for variable in factors] == ["fc1/kernel/wf:0", "fc1/kernel/xf:0"]
    assert sum(tf.size(variable).numpy() for variable in factors) <= 0.1 * 440 * 2048
    assert all(np.abs(gradient).min() > 0 for gradient in map(np.asarray, tape.gradient(loss, factors)))


def test_every_call_has_the_same_factors_as_they_are_now():
    first = dtf.get_variable("fc/kernel", (60, 90), RULES)
    assert same(dtf.get_variable("fc/kernel", (60, 90), RULES), first)
    for variable in dtf.variables().trainable_variables:
        variable.assign(2 * variable)
    assert same(dtf.get_variable("fc/kernel", (60, 90), RULES), 4 * first)
    with v1.variable_scope("encoder"):
        dtf.get_variable("fc/kernel", (60, 90), RULES)
    assert sorted(dtf.variables()._state.entries) == ["encoder.fc.kernel", "fc.kernel"]


def test_what_no_rule_names_is_a_variable_as_it_is():
    thin = dtf.Variables({**RULES, "rules": {"*kernel": {}}})
    assert same(thin.get("fc/bias", (9,)), np.zeros(9))
    table = thin.get("table", (50, 30))
    assert float(tf.math.reduce_std(table)) == pytest.approx(np.sqrt(0.2 / 50), rel=0.1)  # a draw's spread
    assert same(thin.get("ones", (2, 3), initializer=tf.ones_initializer()), np.ones((2, 3)))
    assert same(thin.get("given", (2, 2), initializer=[[1.0, 2.0], [3.0, 4.0]]), [[1, 2], [3, 4]])
    assert {v.name for v in thin.trainable_variables} == {"fc/bias:0", "table:0", "ones:0", "given:0"}
    assert thin.get("still", (3,), trainable=False).shape == (3,)
    assert len(thin.trainable_variables) == 4


def test_an_array_is_encoded_as_in_torch(tmp_path):
    values = np.random.default_rng(0).normal(size=(40, 70)).astype(np.float32)
    thin = dtf.Variables({"rules": {"fc": {"method": "rank", "rank": 30}}})
    thin.get("fc/weight", (40, 70), initializer=values)
    layer = nn.Sequential()
    layer.add_module("fc", nn.Linear(40, 70, bias=False))
    layer.fc.weight.data = torch.from_numpy(values.T.copy())
    dt.compress(layer, {"rules": {"fc": {"method": "rank", "rank": 30}}})
    dt.save(layer, tmp_path / "torch.thin")
    dtf.save(thin, tmp_path / "tensorflow.thin")
    assert (tmp_path / "torch.thin").read_bytes() == (tmp_path / "tensorflow.thin").read_bytes()


def test_what_get_variable_made_is_in_one_factory(tmp_path):
    values = np.random.default_rng(0).normal(size=(60, 90)).astype(np.float32)
    rules = {"rules": {"*": {"method": "uniform", "bits": 8}}}
    found = dtf.get_variable("fc/kernel", (60, 90), rules, initializer=values)
    assert np.abs(found - values).max() < 0.02
    assert same(dtf.variables().get("fc/kernel"), found)
    assert same(file_of(tmp_path, dtf.variables())["fc.kernel"].T, found)


def test_values_that_are_lost_are_said_to_be():
    values = np.random.default_rng(0).normal(size=(60, 90))
    with pytest.warns(UserWarning, match=r"relative error of fc is 0.9\d: at this size the values given are lost"):
        dtf.Variables(RULES).get("fc", (60, 90), initializer=values)


def test_types():
    for kind in ("float16", "bfloat16", "float64"):
        thin = dtf.Variables(RULES)
        assert thin.get("fc/kernel", (60, 90), kind).dtype.name == kind
        assert {variable.dtype.name for variable in thin.trainable_variables} == {kind}


METHODS = {
    "shuffled": {"method": "shuffled"},
    "hashed": {"method": "hashed"},
    "pruned": {"method": "pruned"},
    "kronecker": {"method": "kronecker"},
    "tensor-train": {"method": "tensor-train"},
    "kmeans": {"method": "kmeans", "bits": 3},
    "uniform": {"method": "uniform", "bits": 8},
    "binary": {"method": "binary", "bits": 3},
    "deepthin then uniform": {"method": "deepthin", "then": {"method": "uniform", "bits": 8}},
}


@pytest.mark.parametrize("rule", METHODS.values(), ids=METHODS)
def test_every_method_decodes_trains_and_comes_back(rule, tmp_path):
    rules = {"model": {"ratio": 0.3}, "rules": {"*": rule}}
    thin = dtf.Variables(rules, seed=3)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((thin.get("fc/kernel", (40, 60)) - 1) ** 2)
        return loss, tape.gradient(loss, thin.trainable_variables)

    thin.get("fc/kernel", (40, 60))
    losses = []
    for _ in range(5):
        loss, gradients = step()
        losses.append(float(loss))
        for variable, gradient in zip(thin.trainable_variables, gradients, strict=True):
            variable.assign_sub(1e-3 * gradient)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    weight = np.asarray(thin.get("fc/kernel"))
    stored = file_of(tmp_path, thin)["fc.kernel"].T
    assert np.abs(stored - weight).max() <= 16 * EPS32 * np.abs(weight).max()
    again = dtf.load(dtf.Variables(), tmp_path / "m.thin")
    assert np.abs(again.get("fc/kernel", (40, 60)) - weight).max() <= 16 * EPS32 * np.abs(weight).max()
    before = (tmp_path / "m.thin").read_bytes()
    dtf.save(again, tmp_path / "m.thin")
    assert (tmp_path / "m.thin").read_bytes() == before


# ---- Plans and seeds: as in torch ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.conv = nn.Linear(70, 90), nn.Linear(90, 50), nn.Conv2d(8, 12, 3)


PARTS = {"kernel": "weight", "bias": "bias"}
SHAPES = {
    "fc1/weight": (70, 90),
    "fc1/bias": (90,),
    "fc2/weight": (90, 50),
    "fc2/bias": (50,),
    "conv/weight": (3, 3, 8, 12),
    "conv/bias": (12,),
}
TOML = {
    "ratio": '[model]\nratio = 0.1\n[rules."fc*"]\n[rules.conv]\nmethod = "shuffled"\nratio = 0.3\n',
    "file_bytes": "[model]\nfile_bytes = 9000\n",
    "group": '[model]\nratio = 0.2\nignore = ["conv"]\n[rules."fc*"]\ngroup = "flat"\n',
    "then": '[model]\nratio = 0.1\nignore = ["conv"]\n[rules."*"]\nthen = { method = "uniform", bits = 8 }\n',
}


@pytest.mark.parametrize("text", TOML.values(), ids=TOML)
def test_one_file_says_the_same_as_in_torch(text, tmp_path):
    (tmp_path / "thin.toml").write_text(text)
    net = Net()
    with torch.no_grad():
        for bias in (net.fc1.bias, net.fc2.bias, net.conv.bias):
            bias.zero_()
    dt.compress(net, tmp_path / "thin.toml", init="scratch", seed=5)
    thin = dtf.Variables(tmp_path / "thin.toml", seed=5, shapes=SHAPES)
    for name, shape in SHAPES.items():
        thin.get(name, shape)
    dt.save(net, tmp_path / "torch.thin")
    dtf.save(thin, tmp_path / "tensorflow.thin")
    ours, theirs = (deepthin.load(tmp_path / f"{kind}.thin") for kind in ("tensorflow", "torch"))
    kept = {name for name in theirs if name.startswith("conv") and "ignore" in text}  # dense starts differ
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - kept:
        assert same(ours[name], theirs[name]), name
    if not kept:
        assert (tmp_path / "torch.thin").read_bytes() == (tmp_path / "tensorflow.thin").read_bytes()


def test_alone_each_matrix_meets_the_ratio():
    thin = dtf.Variables({"model": {"ratio": 0.1}})
    for name, shape in SHAPES.items():
        thin.get(name, shape)
    assert all(0 < row.bytes <= 0.1 * row.dense_bytes for row in thin.report().rows)
    assert len(thin.report().rows) == 3


def test_rules_that_do_not_reach_a_variable_are_no_error_for_it():
    rules = {"model": {"ratio": 0.1}, "rules": {"fc*": {"method": "rank"}, "out": {"method": "hashed", "ratio": 0.2}}}
    thin = dtf.Variables(rules)
    thin.get("fc/kernel", (60, 90))
    thin.get("out/kernel", (60, 90))
    thin.get("other/kernel", (60, 90))
    assert [row.method for row in thin.report().rows] == ["rank", "dense", "hashed"]


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_files_cross_to_torch_and_back(tmp_path):
    thin = dtf.Variables(RULES, seed=1)
    for name, shape in SHAPES.items():
        thin.get(name, shape)
    file_of(tmp_path, thin)
    net = dt.load(Net(), tmp_path / "m.thin").eval()
    x = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
    theirs = net.fc2(net.fc1(torch.from_numpy(x))).detach().numpy()
    ours = (x @ thin.get("fc1/weight") + thin.get("fc1/bias")) @ thin.get("fc2/weight") + thin.get("fc2/bias")
    bound = 400 * EPS32 * np.asarray(np.abs(x) @ np.abs(thin.get("fc1/weight")) @ np.abs(thin.get("fc2/weight")))
    assert (np.abs(np.asarray(ours) - theirs) <= bound).all()
    images = np.random.default_rng(1).normal(size=(2, 9, 9, 8)).astype(np.float32)
    theirs = net.conv(torch.from_numpy(images.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    ours = tf.nn.conv2d(images, thin.get("conv/weight"), 1, "VALID")
    size = tf.nn.conv2d(np.abs(images), np.abs(thin.get("conv/weight")), 1, "VALID")
    assert (np.abs(np.asarray(ours) - theirs) <= 100 * EPS32 * np.asarray(size)).all()
    dt.save(net, tmp_path / "torch.thin")
    assert (tmp_path / "torch.thin").read_bytes() == (tmp_path / "m.thin").read_bytes()
    names = {f"{layer}.weight": f"{layer}/kernel" for layer in ("fc1", "fc2", "conv")}
    again = dtf.load(dtf.Variables(), tmp_path / "torch.thin", names)
    for name, shape in SHAPES.items():
        assert same(again.get(name.replace("weight", "kernel"), shape), thin.get(name))


def test_a_file_is_taken_over_in_place(tmp_path):
    one, other = (dtf.Variables(RULES, seed) for seed in (1, 2))
    for thin in (one, other):
        thin.get("fc/kernel", (60, 90))
        thin.get("fc/bias", (90,), initializer=np.full(90, float(thin is one)))
    use = tf.function(lambda x: x @ other.get("fc/kernel") + other.get("fc/bias"))
    x = tf.ones((2, 60))
    use(x)
    file_of(tmp_path, one)
    dtf.load(other, tmp_path / "m.thin")
    assert same(other.get("fc/kernel"), one.get("fc/kernel"))
    kernel, bias = one.get("fc/kernel"), one.get("fc/bias")
    assert_close(use(x), x @ kernel + bias, 60 + 8, np.abs(x) @ np.abs(kernel) + np.abs(bias))
    assert use.experimental_get_tracing_count() == 1


def test_what_a_file_has_beside_is_kept(tmp_path):
    thin = dtf.Variables(RULES)
    for name in ("a", "b"):
        thin.get(f"{name}/kernel", (60, 90))
        thin.get(f"{name}/bias", (90,))
    file_of(tmp_path, thin)
    some = dtf.load(dtf.Variables(), tmp_path / "m.thin")
    some.get("a/kernel", (60, 90))
    some.get("b/bias", (90,))
    assert len(some.trainable_variables) == 3
    dtf.save(some, tmp_path / "again.thin")
    assert (tmp_path / "again.thin").read_bytes() == (tmp_path / "m.thin").read_bytes()


def test_checkpoints_hold_the_factors(tmp_path):
    thin = dtf.Variables(RULES)
    before = thin.get("fc/kernel", (60, 90))
    path = tf.train.Checkpoint(thin=thin).write(str(tmp_path / "checkpoint"))
    for variable in thin.variables:
        variable.assign(0 * variable)
    tf.train.Checkpoint(thin=thin).read(path).assert_consumed()
    assert same(thin.get("fc/kernel"), before)


def test_a_size_that_is_too_small_writes_nothing(tmp_path):
    thin = dtf.Variables(RULES)
    thin.get("fc/kernel", (60, 90))
    with pytest.raises(BudgetError):
        dtf.save(thin, tmp_path / "m.thin", max_bytes=100)
    assert not list(tmp_path.iterdir())


# ---- TensorFlow 1 ----------------------------------------------------------------------------------------------------


def declared(outputs=90):
    """Code as it was written for TensorFlow 1."""
    kernel = v1.get_variable("fc/kernel", (60, outputs))
    bias = v1.get_variable("fc/bias", (outputs,), initializer=v1.zeros_initializer())
    return kernel, bias


def test_a_custom_getter_in_a_graph(tmp_path):
    rules, x = {**RULES, "rules": {"*kernel": {}}}, np.random.default_rng(0).normal(size=(5, 60)).astype(np.float32)
    thin = dtf.Variables(rules, seed=2)
    with tf.Graph().as_default(), v1.Session() as session:
        with v1.variable_scope("net", custom_getter=thin.getter):
            kernel, bias = declared()
        with v1.variable_scope("net", custom_getter=thin.getter, reuse=True):
            again, _ = declared()
        names = [variable.name for variable in v1.trainable_variables()]
        assert names == ["net/fc/kernel/xf:0", "net/fc/kernel/wf:0", "net/fc/bias:0"]
        loss = tf.reduce_mean((x @ kernel + bias - 1) ** 2)
        step = v1.train.GradientDescentOptimizer(0.05).minimize(loss)
        session.run(v1.global_variables_initializer())
        first = session.run(kernel)
        losses = [session.run((loss, step))[0] for _ in range(5)]
        assert losses == sorted(losses, reverse=True)
        assert same(*session.run((kernel, again)))
        dtf.save(thin, tmp_path / "m.thin")
        trained = session.run(kernel)
        assert same(deepthin.load(tmp_path / "m.thin")["net.fc.kernel"].T, trained)
        session.run(v1.global_variables_initializer())
        assert not same(session.run(kernel), trained)
        dtf.load(thin, tmp_path / "m.thin")
        assert same(session.run(kernel), trained)
        with v1.variable_scope("net", custom_getter=thin.getter), pytest.raises(ValueError, match="already exists"):
            declared()
    assert same(first, dtf.Variables(rules, seed=2).get("net/fc/kernel", (60, 90)))


def test_get_variable_in_a_graph():
    with tf.Graph().as_default(), v1.Session() as session:
        with v1.variable_scope("a"):
            kernel = dtf.get_variable("fc/kernel", (60, 90), RULES)
        session.run(v1.global_variables_initializer())
        assert [v.name for v in v1.trainable_variables()] == ["a/fc/kernel/xf:0", "a/fc/kernel/wf:0"]
        shown = session.run(kernel)
    with v1.variable_scope("a"):
        assert same(dtf.get_variable("fc/kernel", (60, 90), RULES), shown)


def test_a_regularizer_is_told_the_matrix():
    with tf.Graph().as_default(), v1.Session() as session:
        with v1.variable_scope("net", custom_getter=dtf.getter(RULES), regularizer=tf.reduce_sum):
            kernel = v1.get_variable("kernel", (60, 90))
        session.run(v1.global_variables_initializer())
        assert same(*session.run((v1.losses.get_regularization_loss(), tf.reduce_sum(kernel))))


def test_a_custom_getter_in_functions():
    thin = dtf.Variables({**RULES, "rules": {"*kernel": {}}})

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            with v1.variable_scope("net", custom_getter=thin.getter):
                kernel, bias = declared()
            loss = tf.reduce_mean((x @ kernel + bias - 1) ** 2)
        for variable, gradient in zip(
            thin.trainable_variables, tape.gradient(loss, thin.trainable_variables), strict=True
        ):
            variable.assign_sub(0.05 * gradient)
        return loss

    losses = [float(step(tf.ones((n, 60)))) for n in (5, 5, 6, 6, 7)]
    assert losses[-1] < losses[0]
    assert len(thin.trainable_variables) == 3
    assert v1.get_variable_scope().name == ""


# ---- Mistakes --------------------------------------------------------------------------------------------------------


def made():
    thin = dtf.Variables(RULES)
    thin.get("fc/kernel", (60, 90))
    return thin


MISTAKES = {
    "no shape": (lambda: made().get("fc/kernal"), "There is no 'fc/kernal' yet: give its shape. Closest: 'fc.kernel'."),
    "shape": (
        lambda: made().get("fc/kernel", (90, 60)),
        "fc/kernel has shape (60, 90), but is asked for as (90, 60).",
    ),
    "type": (
        lambda: made().get("fc/kernel", dtype=tf.float16),
        "fc/kernel is float32, but is asked for as float16.",
    ),
    "integers": (
        lambda: made().get("steps", (), tf.int32),
        "steps cannot be int32: generated variables are float32, float64, float16, bfloat16.",
    ),
    "file_bytes": (
        lambda: dtf.Variables({"model": {"file_bytes": 999}}).get("fc/kernel", (60, 90)),
        "[model] file_bytes is shared, which takes the shapes of all tensors, but fc.kernel comes alone. Give them up "
        "front, deepthin.tensorflow.Variables(rules, shapes={name: shape}), or give a ratio instead.",
    ),
    "group": (
        lambda: dtf.Variables({**RULES, "rules": {"fc": {"group": "flat"}}}).get("fc/kernel", (60, 90)),
        "rule 'fc' has a group, which takes the shapes of all tensors, but fc.kernel comes alone. Give them up "
        "front, deepthin.tensorflow.Variables(rules, shapes={name: shape}), or give a ratio instead.",
    ),
    "other seed": (
        lambda: [dtf.get_variable("fc/kernel", (60, 90), RULES, seed) for seed in (0, 1)],
        "fc/kernel was made by other rules or another seed: use these again, or another name.",
    ),
    "no rules": (
        lambda: dtf.get_variable("fc/kernel", (60, 90)),
        "get_variable needs rules: a mapping, or the path of a TOML file.",
    ),
    "no file": (
        lambda: dtf.Variables().get("fc/kernel", (60, 90)),
        "No file has 'fc.kernel', and there are no rules to make it by.",
    ),
    "not given": (
        lambda: dtf.Variables(RULES, shapes=SHAPES).get("fc1/wait", (70, 90)),
        "fc1.wait is not among the shapes given. Closest: 'fc1.weight'.",
    ),
    "given otherwise": (
        lambda: dtf.Variables(RULES, shapes=SHAPES).get("fc1/weight", (90, 70)),
        "fc1.weight was given up front with shape (70, 90): ask for that.",
    ),
    "initializer": (
        lambda: dtf.Variables(RULES).get("fc", (60, 90), initializer=np.zeros((90, 60))),
        "The initializer of fc has shape (90, 60), not (60, 90).",
    ),
    "vector": (
        lambda: dtf.Variables(RULES).product(tf.ones((2, 9)), "fc/bias", (9,)),
        "fc/bias, of shape (9,), is not a matrix (inputs, outputs): use get.",
    ),
    "constraint": (
        lambda: dtf.Variables(RULES).getter(None, "fc", (60, 90), constraint=tf.nn.relu),
        "fc has a constraint, which a generated matrix cannot keep: leave it out.",
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_the_way_out(mistake, message):
    with pytest.raises(ConfigError) as raised:
        mistake()
    assert str(raised.value) == message


def test_too_small_a_ratio_names_both_ways_out():
    with pytest.raises(BudgetError) as raised:
        dtf.Variables({"model": {"ratio": 0.01}}).get("fc/kernel", (60, 90))
    assert str(raised.value) == (
        "fc.kernel, which comes alone: The matched matrices cannot be stored in 216 bytes: the smallest plans, and "
        "what the rules' own targets fix, need 588. Use [model] ratio >= 0.028, another method, or [model] ignore. Or "
        "give all shapes up front, Variables(rules, shapes={name: shape}), so that all share the budget."
    )


def test_what_is_not_finite_is_named():
    values = np.zeros((60, 90), np.float32)
    values[7, 5] = np.nan
    with pytest.raises(NonFiniteError) as raised:
        dtf.Variables(RULES).get("fc/kernel", (60, 90), initializer=values)
    assert str(raised.value) == "fc.kernel is nan at index (5, 7), outputs first: give finite values."


def test_files_that_do_not_fit_change_nothing(tmp_path):
    file_of(tmp_path, made())
    other = dtf.Variables({"model": {"ratio": 0.2}}, seed=4)
    before = other.get("fc/kernel", (60, 90))
    with pytest.raises(ConfigError, match=r"by another plan .* load the file before the first get"):
        dtf.load(other, tmp_path / "m.thin")
    assert same(other.get("fc/kernel"), before)
    other.get("fc2/kernel", (60, 90))
    with pytest.raises(ConfigError, match=r"lacks 'fc2.kernel'. Closest: 'fc.kernel'. Pass names="):
        dtf.load(other, tmp_path / "m.thin")
    turned = dtf.Variables(RULES)
    turned.get("fc/kernel", (90, 60))
    with pytest.raises(ConfigError, match=r"shape \(90, 60\) in .*, outputs first, but \(90, 60\) here"):
        dtf.load(turned, tmp_path / "m.thin")
    with pytest.raises(ConfigError, match=r"shape \(60, 90\) in the file, but is asked for as \(90, 60\)"):
        dtf.load(dtf.Variables(), tmp_path / "m.thin").get("fc/kernel", (90, 60))


def test_outputs_first(tmp_path):
    thin = dtf.Variables(RULES, outputs_first=["*embedding*"])
    table = thin.get("net/embedding", (100, 40))
    assert same(file_of(tmp_path, thin)["net.embedding"], table)
    layer = nn.Module()
    layer.net = nn.Module()
    layer.net.embedding = nn.Embedding(100, 40)
    dt.load(layer, tmp_path / "m.thin", {"net.embedding": "net.embedding.weight"})
    assert same(layer.net.embedding.weight.detach(), table)
    x = tf.ones((2, 100))
    assert same(thin.product(x, "net/embedding"), x @ table)


def test_names_that_look_like_patterns_mean_themselves():
    shapes = {"fc[0]/kernel": (40, 30), "fc0/kernel": (40, 30), "e[0]": (30, 20), "e0": (30, 20)}
    rules = {"rules": {"fc[0].kernel": {"ratio": 0.3}}}
    thin = dtf.Variables(rules, shapes=shapes, outputs_first=["e[0]"])
    for name, shape in shapes.items():
        thin.get(name, shape)
    assert {v.name.split(":")[0] for v in thin.trainable_variables} == {
        "fc[0]/kernel/wf", "fc[0]/kernel/xf", "fc0/kernel", "e[0]", "e0",
    }  # fmt: skip
    assert {row.name: row.shape for row in thin.report().rows if row.name[0] == "e"} == {
        "e[0]": (30, 20),
        "e0": (20, 30),
    }


# ---- The page and the benchmark --------------------------------------------------------------------------------------


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout


def test_the_example_of_the_page_learns_and_its_file_serves_in_torch(tmp_path):
    shown = run("docs/tensorflow_acoustic.py", str(tmp_path / "m.thin"))
    before, after = map(float, re.search(r"loss ([\d.]+), then ([\d.]+);", shown).groups())
    assert after < 0.9 * before
    net = nn.Sequential(nn.Linear(429, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 102))
    names = {"fc1": 0, "fc2": 2, "output": 4}
    dt.load(
        net,
        tmp_path / "m.thin",
        {f"{name}.{ours}": f"{at}.{own}" for name, at in names.items() for ours, own in PARTS.items()},
    )
    assert net(torch.ones(1, 429)).isfinite().all()


def test_the_benchmark_writes_its_rows(tmp_path):
    words = "bench tensorflow --rows 300 --cols 200 --ratios 0.1,0.001 --batch 2 --repeats 2 --out".split()
    shown = run("-m", "deepthin", *words, str(tmp_path / "b.json"))
    assert "tensorflow 300x200" in shown
    one, small = json.loads((tmp_path / "b.json").read_text())
    assert small["microseconds"] is None
    assert 0.001 < small["smallest_ratio"] < 0.1
    assert {
        "n",
        "microseconds",
        "dense_microseconds",
        "best_dense_microseconds",
        "generated_microseconds",
    } <= one.keys()
