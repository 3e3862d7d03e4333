"""Sums of two codes: ``plus`` in a rule, from the configuration to the file and back."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin import METHODS, BudgetError, ConfigError
from deepthin.method import Bounded
from deepthin.methods import fields, method_named, with_fields
from deepthin.methods.plus import GAIN, Plus, Rest
from deepthin.plan.parse import parse_rules
from deepthin.storage.schemas import read_method, write_method
from deepthin.storage.varints import Reader, Writer
from deepthin.testing import INNER, check_method
from deepthin.testing.claims import CLAIMS, claims_of_sum

CODED = {"method": "coded"}


@pytest.mark.parametrize("then", [(), INNER[:2]], ids=["alone", "then"])
@pytest.mark.parametrize("name", ["kronecker plus pruned", "deepthin plus hashed", "pruned plus rank"])
def test_a_sum_obeys_every_law(name, then):
    first, second = name.split(" plus ")
    claims = claims_of_sum(CLAIMS[first], CLAIMS[second])
    check_method(method_named(name), claims=claims, then=then, examples=4)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


def trained(model, steps=60):
    """Train on data that the seed fixes, to the model's size if it has one."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(400, 64, generator=generator), torch.randint(10, (400,), generator=generator)
    rates = any(entry.unrounded() for entry in model.modules() if hasattr(entry, "unrounded"))
    target = dt.SizeTarget(model, steps) if rates else None
    optimizer, losses = torch.optim.Adam(dt.parameter_groups(model, 1e-3)), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss if target is None else loss + target.penalty()).backward()
        optimizer.step()
        if target is not None:
            target.step()
    return losses


@pytest.mark.parametrize("init", ["scratch", "trained"])
@pytest.mark.parametrize("method", ["deepthin", "kronecker"])
def test_a_sum_trains_to_a_size(method, init, tmp_path):
    model, path = network(), tmp_path / "a.thin"
    rules = {"model": {"file_bytes": 1_600}, "rules": {"*": {"method": method, "plus": CODED, "then": CODED}}}
    dt.compress(model, rules, init=init)
    start = model[0].thin["weight"].code()["plus_rest_symbols"]
    assert bool((start == 0).all()) == (init == "scratch")  # at the residual of a trained weight
    losses = trained(model)
    assert losses[-1] < losses[0]
    assert dt.save(model, path) <= 1_600
    x = torch.randn(3, 64)
    torch.testing.assert_close(dt.load(network(), path)(x), model(x))
    weight = deepthin.load(path)["0.weight"]
    np.testing.assert_allclose(weight, dt.materialize(model)[0].weight.detach().numpy(), atol=1e-6)
    row = next(row for row in deepthin.inspect(path).rows if row.name == "0.weight")
    assert row.method == f"{method} plus coded then coded"


def test_the_rest_begins_as_zeros_with_a_step_of_the_size_of_the_weights():
    model = network()
    rule = {"method": "deepthin", "floats": 0.1, "plus": CODED, "then": CODED}
    dt.compress(model, {"model": {"file_bytes": 2_000}, "rules": {"*": rule}}, init="scratch")
    thin = model[0].thin["weight"]
    with torch.no_grad():
        step = GAIN * thin.plus_rest_log_step.exp().item()
        assert 0.9 < step / thin().std().item() < 1.1


@pytest.mark.parametrize("then", [None, {"method": "uniform", "bits": 8}], ids=["floats", "8 bits"])
def test_a_sum_of_known_size_divides_its_bytes(then, tmp_path):
    rule = {"method": "kronecker", "plus": {"method": "pruned", "share": 0.5}} | ({"then": then} if then else {})
    model = network()
    report = dt.compress(model, {"model": {"ratio": 0.1}, "rules": {"*": rule}}, init="scratch")
    method = model[0].thin["weight"].decoder
    assert isinstance(method, Plus)
    assert 0.3 < method.second.bits() / method.bits() < 0.7
    assert (
        sum(row.bytes for row in report.rows if row.shape)
        <= 0.1 * sum(row.dense_bytes for row in report.rows if row.shape) + 1
    )
    losses = trained(model)
    assert losses[-1] < losses[0]
    dt.save(model, tmp_path / "a.thin")
    x = torch.randn(3, 64)
    torch.testing.assert_close(dt.load(network(), tmp_path / "a.thin")(x), model(x))


def test_two_hashed_codes_have_different_tables():
    model = network()
    dt.compress(
        model,
        {"model": {"ratio": 0.1}, "rules": {"*": {"method": "hashed", "plus": {"method": "hashed"}}}},
        init="scratch",
    )
    method = model[0].thin["weight"].method
    assert method.first.seed != method.second.seed


SUMS = [
    ("deepthin plus coded", Plus(METHODS["deepthin"](shape=(6, 5), n=7, rank=2), Rest((6, 5)))),
    (
        "pruned plus kronecker",
        Plus(METHODS["pruned"](shape=(6, 5), kept=3), METHODS["kronecker"](shape=(6, 5), left=(2, 3), terms=1)),
    ),
]


@pytest.mark.parametrize(("name", "method"), SUMS, ids=[name for name, _ in SUMS])
def test_the_fields_of_a_sum_come_back(name, method):
    assert with_fields(name, fields(method)) == method
    written = Writer()
    write_method(written, name, method)
    assert read_method(Reader(bytes(written.data)), (13, 0), (6, 5), False) == (name, method)


@pytest.mark.parametrize(
    "numbers",
    [
        [12, 8, 0],  # coded weights cannot be the first
        [8, 8, 0],
        [0, 8, 0],
        [13, 1, 14, 0],  # nor can another sum
        [1, 28, 12, 8],  # nor coded weights, with their own fields, the second
        [1, 28, 13, 1],
        [1, 28, 15],
        [1, 28],  # the end is missing
        [6, 1, 2, 3, 5, 1 << 40 << 1, 0],  # more kept weights than there are
        [1, 0],  # n = 0
    ],
)
def test_fields_that_are_no_sum_are_refused(numbers):
    written = Writer()
    for number in numbers:
        written.number(number)
    with pytest.raises((KeyError, TypeError, ValueError, OverflowError, AttributeError)):
        read_method(Reader(bytes(written.data)), (13, 0), (6, 5), False)


def test_every_damaged_byte_of_a_file_is_refused_or_reads_as_numbers(tmp_path):
    model, path = network(), tmp_path / "a.thin"
    rules = {"model": {"file_bytes": 1_600}, "rules": {"*": {"method": "kronecker", "plus": CODED, "then": CODED}}}
    dt.compress(model, rules, init="scratch")
    trained(model, 10)
    dt.save(model, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        with pytest.raises(deepthin.DeepThinError):
            deepthin.load(path)


def test_what_decoding_takes_is_known_beforehand():
    method = SUMS[0][1]
    assert isinstance(method, Bounded)
    assert method.decode_bytes(4) >= 3 * 4 * 30
    code = method.init(np.random.default_rng(0), 1.0) | method.derived()
    code["plus_rest"] = np.full((6, 5), 3.0, np.float32)
    largest = {entry: float(abs(array).max()) for entry, array in code.items()}
    assert abs(method.decode(code, np)).max() <= method.largest_weight(largest)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"plus": CODED}, "known only after training"),
        ({"plus": CODED, "then": CODED, "ratio": 0.1}, "without ratio and bytes"),
        ({"plus": CODED, "then": {"method": "uniform", "bits": 8}}, "known only after training"),
        ({"plus": {"method": "uniform"}}, "give the method whose code is added"),
        ({"plus": "pruned"}, "give the method whose code is added"),
        ({"plus": {"method": ["pruned"]}}, "give the method whose code is added"),
        ({"plus": {"method": "pruned", "rank": 2}}, "has no key 'rank'"),
        ({"plus": {"method": "pruned", "share": 1}}, "above 0 and below 1"),
        ({"plus": {"method": "pruned", "share": True}}, "above 0 and below 1"),
        ({"plus": {"method": "coded", "share": 0.5}, "then": CODED}, "has no key 'share'"),
        ({"method": "coded", "plus": {"method": "pruned"}}, "none can be added"),
        ({"method": "dense", "plus": {"method": "pruned"}}, "none can be added"),
    ],
)
def test_what_cannot_be_added_is_a_configuration_error(rule, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_rules({"model": {"file_bytes": 1_000}, "rules": {"*": rule}})


def test_a_sum_with_all_weights_has_no_stages():
    rule = {"method": "deepthin", "plus": CODED, "then": CODED}
    with pytest.raises(ConfigError, match="leave \\[stages\\] out"):
        parse_rules({"model": {"file_bytes": 1_000}, "rules": {"*": rule}, "stages": {}})


def test_a_budget_for_one_code_only_names_what_both_need():
    with pytest.raises(BudgetError) as found:
        dt.plan(network(), {"rules": {"0": {"method": "kronecker", "plus": {"method": "pruned"}, "bytes": 600}}})
    needed = -(-found.value.smallest_bits // 8)
    dt.plan(network(), {"rules": {"0": {"method": "kronecker", "plus": {"method": "pruned"}, "bytes": needed}}})
