"""Laws that every method obeys, over all of METHODS, and the facts that the DeepThin paper and its algebra state."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepthin import METHODS, BudgetError, ConfigError
from deepthin.bits import permutation, splitmix
from deepthin.methods.factor import Factor
from deepthin.storage import Contents, Part, Raw, Thin, from_bytes, to_bytes

EPS32 = float(np.finfo(np.float32).eps)


@st.composite
def plans(draw):
    """(name, method, a generator for arrays) for a random method, shape and budget that it can meet."""
    named = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    options = {"rank": draw(st.sampled_from([1, 2, 3, "max"]))} if draw(st.booleans()) else {}
    try:
        least = named.fit(shape, 0, **options).bits()
    except BudgetError as error:
        least = error.smallest_bits
    budget = draw(st.integers(least, least + 32 * 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return named.name, named.fit(shape, budget, **options), budget, rng


def assert_decoded_close(got, code, method):
    """A float32 result against the same sums in float64, entry by entry, with the bound of an r-term dot product."""
    exact = method.decode({k: np.asarray(v, "f8") if v.dtype.kind == "f" else v for k, v in code.items()}, np)
    sizes = method.decode({k: abs(np.asarray(v, "f8")) if v.dtype.kind == "f" else v for k, v in code.items()}, np)
    assert (abs(np.asarray(got, "f8") - exact) <= (method.rank + 2) * EPS32 * sizes + 1e-30).all()


def as_torch(code):
    return {name: torch.from_numpy(np.asarray(array)) for name, array in code.items()}


@given(plans())
def test_within_budget(plan):
    _, method, budget, _ = plan
    assert method.bits() <= budget


@given(plans())
def test_code_shapes_are_those_of_the_codes(plan):
    _, method, _, rng = plan
    shapes = method.code_shapes()
    weight = rng.normal(size=method.shape).astype("f4")
    assert {k: v.shape for k, v in method.init(rng, 0.1).items()} == shapes
    assert {k: v.shape for k, v in method.encode(weight, np).items()} == shapes


@given(plans())
def test_stored_bytes_are_at_most_bits(plan):
    name, method, _, rng = plan
    code = {k: Raw.of(v) for k, v in method.init(rng, 0.1).items()}
    stored = from_bytes(to_bytes(Contents({"w": Thin(name, method, {"w": Part(method.shape)}, code)}))).thin["w"]
    assert 8 * stored.bytes <= method.bits()
    assert stored.method == method


@given(plans())
def test_header_survives_json(plan):
    name, method, _, _ = plan
    fields = json.loads(json.dumps(dataclasses.asdict(method)))
    assert METHODS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}) == method


@given(plans())
def test_encode_is_deterministic_and_leaves_its_input_alone(plan):
    _, method, _, rng = plan
    weight = rng.normal(size=method.shape).astype("f4")
    before = weight.copy()
    first, second = method.encode(weight, np), method.encode(weight, np)
    assert all((first[k] == second[k]).all() for k in first)
    assert (weight == before).all()


@given(plans())
def test_decode_agrees_across_numpy_and_torch(plan):
    _, method, _, rng = plan
    code = method.init(rng, 0.1) | method.derived()
    assert_decoded_close(method.decode(code, np), code, method)
    assert_decoded_close(method.decode(as_torch(code), torch).numpy(), code, method)


@given(plans())
def test_encode_agrees_across_numpy_and_torch(plan):
    _, method, _, rng = plan
    weight = rng.normal(size=method.shape)
    ours = method.decode(method.encode(weight, np) | method.derived(), np)
    theirs = method.decode(method.encode(torch.from_numpy(weight), torch) | as_torch(method.derived()), torch)
    # The two may pick different bases where singular values tie; the distance to the weight is then the same.
    assert np.linalg.norm(ours - weight) == pytest.approx(np.linalg.norm(theirs.numpy() - weight), rel=1e-6, abs=1e-9)


@given(plans())
def test_a_gradient_reaches_every_latent(plan):
    _, method, _, rng = plan
    code = {k: v.requires_grad_() for k, v in as_torch(method.init(rng, 0.1)).items()}
    method.decode(code | as_torch(method.derived()), torch).sum().backward()
    used = -(-method.shape[0] * method.shape[1] // method.n)  # rows of xf that the weight reads
    assert all(value.grad is not None and (value.grad != 0).any() for value in code.values())
    assert code["xf"].grad.abs().sum(1).gt(0).sum() == used


@given(plans())
def test_decode_then_encode_then_decode_is_idempotent(plan):
    _, method, _, rng = plan
    code = {k: v.astype("f8") for k, v in method.init(rng, 1.0).items()}
    weight = method.decode(code | method.derived(), np)
    again = method.decode(method.encode(weight, np) | method.derived(), np)
    tail = weight.size % method.n
    if tail and weight.size // method.n < method.rank:
        return  # too few complete rows to fix the row space: encode is near, not exact (Factor.encode)
    # The last row's coefficients come from its tail alone, so a nearly singular tail magnifies rounding.
    wf = method.encode(weight, np)["wf"][:, :tail]
    condition = np.linalg.cond(wf) if tail >= method.rank else 1.0
    assert np.linalg.norm(again - weight) <= 1e-12 * max(condition, 1) * max(np.linalg.norm(weight), 1)


@given(plans())
def test_init_has_the_asked_standard_deviation(plan):
    _, method, _, rng = plan
    code = {k: v.astype("f8") for k, v in method.init(rng, 0.1).items()}
    entries = (method.m * method.rank, method.rank * method.n)
    if min(entries) < 100:
        return  # too few draws to tell
    # Var(W) averages over the products, so its spread follows the smaller factor: 6 sigma of a chi-square mean.
    decoded = method.decode(code | method.derived(), np).var() / 0.01
    assert abs(decoded - 1) < 6 * math.sqrt(2 * (1 / entries[0] + 1 / entries[1]) * method.rank) * 2


@given(rows=st.integers(1, 60), cols=st.integers(1, 60), extra=st.integers(0, 60))
def test_rank_error_does_not_grow_with_budget(rows, cols, extra):
    weight = np.random.default_rng(rows * 61 + cols).normal(size=(rows, cols))
    least = 32 * (rows + cols)
    small, large = (METHODS["rank"].fit((rows, cols), least * k) for k in (1, 1 + extra))
    errors = [np.linalg.norm(m.decode(m.encode(weight, np), np) - weight) for m in (small, large)]
    assert errors[1] <= errors[0] + 1e-9


@given(rows=st.integers(1, 300), cols=st.integers(1, 300), share=st.floats(0.001, 1.5))
def test_deepthin_plan_is_the_smallest_coprime_n(rows, cols, share):
    """Card 1 of the algorithm: small root, gcd(n, fan-in) = 1; checked by trying every n."""
    floats = int(share * rows * cols)
    fitting = [n for n in range(1, rows * cols + 2) if math.gcd(n, cols) == 1 and n - (-rows * cols // n) <= floats]
    try:
        assert METHODS["deepthin"].fit((rows, cols), 32 * floats).n == fitting[0]
    except BudgetError as error:
        assert not fitting
        least = min(n - (-rows * cols // n) for n in range(1, rows * cols + 2) if math.gcd(n, cols) == 1)
        assert error.smallest_bits == 32 * least


@pytest.mark.parametrize(("n", "expected"), [(16, 32), (17, 512), (64, 8), (63, 512)])
def test_coprime_n_gives_full_rank(n, expected):
    """Q = R = 512, r = 1: the numerical rank falls to 2 * 512 / n - ... unless n is coprime with the fan-in."""
    method = Factor((512, 512), n, 1)
    code = {k: v.astype("f8") for k, v in method.init(np.random.default_rng(0), 1.0).items()}
    assert np.linalg.matrix_rank(method.decode(code, np)) == expected


def test_the_layout_is_the_papers():
    """Read Waux row by row, write W (fan-in x outputs) column by column (arXiv:1802.06944, section 2)."""
    method = Factor((3, 5), 4, 2)
    code = method.init(np.random.default_rng(1), 1.0)
    paper = (code["xf"] @ code["wf"]).ravel()[:15].reshape((5, 3), order="F")
    assert (method.decode(code, np) == paper.T).all()


def test_rank_is_the_truncated_svd():
    weight = np.random.default_rng(2).normal(size=(30, 20))
    method = METHODS["rank"].fit((30, 20), 32 * 50 * 4)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    assert method.rank == 4
    assert np.allclose(method.decode(method.encode(weight, np), np), best, atol=1e-12)


def test_shuffled_holds_deepthins_values():
    plain, scattered = (METHODS[name].fit((20, 30), 32 * 120) for name in ("deepthin", "shuffled"))
    code = plain.init(np.random.default_rng(3), 1.0)
    one, other = plain.decode(code, np), scattered.decode(code | scattered.derived(), np)
    assert (np.sort(one.ravel()) == np.sort(other.ravel())).all()
    assert (one != other).any()


def test_encoded_factors_are_alike_in_size():
    """As drawn ones are: one learning rate then suits both."""
    method = METHODS["deepthin"].fit((300, 400), 32 * 4000)
    code = method.encode(np.random.default_rng(4).normal(size=(300, 400)), np)
    assert method.m > 30 * method.n
    assert np.sqrt((code["xf"] ** 2).mean()) == pytest.approx(np.sqrt((code["wf"] ** 2).mean()), rel=0.01)


def test_a_zero_weight_still_trains():
    """With both factors at zero no gradient would ever reach them."""
    method = METHODS["deepthin"].fit((4, 8), 32 * 20)
    code = as_torch(method.encode(np.zeros((4, 8), "f4"), np))
    code = {k: v.requires_grad_() for k, v in code.items()}
    weight = method.decode(code, torch)
    assert (weight == 0).all()
    weight.sum().backward()
    assert (code["xf"].grad != 0).any()


def test_infeasible_budget_names_the_smallest_plan():
    with pytest.raises(BudgetError) as caught:
        METHODS["deepthin"].fit((2048, 2048), 512)
    assert str(caught.value) == (
        "DeepThin cannot store 2048x2048 in 512 bits: the smallest plan (m=2050, n=2047, r=1) needs 131104. "
        "Use ratio >= 0.00098."
    )
    assert caught.value.smallest_bits == 131104
    assert METHODS["deepthin"].fit((2048, 2048), 131104).bits() == 131104


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": "all"}, {"rank": 1.5}, {"n": 0}, {"n": "prime"}])
def test_options_that_make_no_sense_are_named(options):
    with pytest.raises(ConfigError, match=repr(next(iter(options.values())))):
        METHODS["deepthin"].fit((20, 30), 32 * 120, **options)


def test_splitmix_is_the_published_generator():
    """The first words for seed 1234567, as its reference implementation prints them; files depend on them."""
    assert splitmix(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert permutation(7, 5).tolist() == np.argsort(splitmix(7, 5)).tolist()
    assert sorted(permutation(7, 1000)) == list(range(1000))
