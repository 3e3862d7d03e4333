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
from deepthin.coding.bits import gap_bytes, pack, pack_gaps, packed_bytes, permutation, splitmix, unpack, unpack_gaps
from deepthin.methods import THEN, fields, with_fields
from deepthin.methods.binary import Binary
from deepthin.methods.factor import Factor
from deepthin.methods.hashed import Hashed
from deepthin.methods.kronecker import Kronecker
from deepthin.methods.pruned import Pruned
from deepthin.methods.scalar import Uniform
from deepthin.methods.tensor_train import TensorTrain
from deepthin.methods.then import Then
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.read import from_bytes
from deepthin.storage.write import to_bytes
from deepthin.torch import ThinWeight

EPS32 = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Row:
    """What the laws ask of a method beyond what all obey; the one place that declares an exception, and why."""

    options: tuple = ({},)
    products: object = lambda method: 1  # roundings that an entry of the decoded weight takes, at most
    idempotent: object = lambda method: True
    exact: float = 1e-12  # of the weight's norm: what decode, encode, decode may lose
    nested: bool = False  # whether larger codes hold all that smaller ones do, so that the error cannot grow


def _as_factor(method):
    tail = math.prod(method.shape) % method.n
    # Too few complete rows to fix the row space: encode is near, not exact (Factor.encode).
    return not (tail and math.prod(method.shape) // method.n < method.rank)


def _no_surplus(method):
    whole = (
        (method.left[0] * method.right[0], method.left[1] * method.right[1])
        if isinstance(method, Kronecker)
        else (math.prod(method.rows), math.prod(method.cols))
    )
    return whole == method.shape  # what is cut off is encoded as zeros, which is a nearby matrix, not the same


ROWS = {
    "deepthin": Row(({}, {"rank": 2}, {"rank": "max"}), lambda m: m.rank + 2, _as_factor),
    "shuffled": Row(({}, {"rank": 3}, {"rank": "max"}), lambda m: m.rank + 2, _as_factor),
    "rank": Row(({}, {"rank": 2}), lambda m: m.rank + 2, nested=True),
    "hashed": Row(({}, {"seed": 5})),
    "pruned": Row(nested=True),
    "kronecker": Row(products=lambda m: m.terms + 2, idempotent=_no_surplus, nested=True),
    # The cores' SVDs come one after the other, and the last takes what the first have rounded.
    "tensor-train": Row(
        ({}, {"order": 2}, {"order": 4}), lambda m: sum(m.ranks) + 2 * len(m.rows), _no_surplus, exact=1e-9
    ),
    "uniform": Row(
        ({}, {"bits": 3}, {"per": "row"}, {"bits": 4, "affine": True}, {"per": "row", "affine": True}),
        lambda m: 3,
        exact=1e-6,  # the step is found again from the largest entry, rounded
    ),
    "kmeans": Row(({}, {"bits": 3}, {"bits": 1}, {"start": "density"}, {"start": "random", "seed": 3})),
    "ecsq": Row(({}, {"bits": 3}, {"bits": 1}, {"bits": 1.5, "levels": 5})),
    "binary": Row(
        ({}, {"bits": 2}, {"rounds": 0}, {"rounds": 1}, {"bits": 3, "rounds": 5, "per": "matrix"}),
        lambda m: m.planes + 1,
        lambda m: m.planes == 1,  # it finds a good sum, not always the one that a weight was made of
    ),
}
SCALAR = {name for name, named in METHODS.items() if "bits" in named.sized_by}  # may store the floats of others
INNER = (
    ("uniform", {"bits": 8}),
    ("uniform", {"bits": 3, "per": "row"}),
    ("uniform", {"bits": 4, "affine": True}),
    ("kmeans", {"bits": 5}),
    ("kmeans", {"bits": 2, "start": "density"}),
    ("ecsq", {"bits": 2.5}),
    ("binary", {"bits": 2}),
    ("binary", {"bits": 3, "rounds": 0, "per": "matrix"}),
)


def outer(method):
    return method.outer if isinstance(method, Then) else method


@st.composite
def plans(draw, then=True):
    """(name, inner options or none, shape, options, bits more than the least, seed) of a random method."""
    name = draw(st.sampled_from(sorted(METHODS)))
    inner = draw(st.sampled_from(INNER)) if then and name not in SCALAR and draw(st.booleans()) else None
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    options = draw(st.sampled_from(ROWS[name].options))
    return name, inner, shape, options, draw(st.integers(0, 32 * 200)), draw(st.integers(0, 2**32 - 1))


def made(plan):
    """(name, method, budget, a generator for arrays); outside the strategy, since type checks draw random numbers."""
    name, inner, shape, options, extra, seed = plan

    def fit(bits):
        if inner is None:
            return METHODS[name].fit(shape, bits, **options)
        return Then.fit(
            lambda bits: METHODS[name].fit(shape, bits, **options),
            lambda own: METHODS[inner[0]].fit(own, 1 << 40, **inner[1]),
            bits,
        )

    try:
        least = fit(0).bits()
    except BudgetError as error:
        least = error.smallest_bits
    return f"{name}{THEN}{inner[0]}" if inner else name, fit(least + extra), least + extra, np.random.default_rng(seed)


def is_float(array):
    return np.asarray(array).dtype.kind == "f"


def widened(code, change=lambda a: a):
    """Floats in float64; integers as they are."""
    return {k: change(np.asarray(v, "f8")) if is_float(v) else v for k, v in code.items()}


def assert_decoded_close(got, code, name, method):
    """A float32 result against the same sums in float64, entry by entry: so many roundings of the sum of magnitudes."""
    exact = method.decode(widened(code), np)
    parts = outer(method)
    floats = method.decode_floats(widened(code), np) if isinstance(method, Then) else widened(code)
    sizes = parts.decode({k: abs(v) if is_float(v) else v for k, v in floats.items()}, np)
    if isinstance(parts, Uniform):
        sizes = abs(floats["step"] * floats["symbols"]) + abs(floats.get("least", 0))
    if isinstance(parts, Binary):
        sizes = abs(floats["scales"]).sum(1)[:, None]
    if isinstance(parts, Hashed):
        sizes = abs(parts.decode(floats, np))
    roundings = ROWS[name.split(THEN)[0]].products(parts) + (3 * len(parts.code_shapes()) if parts is not method else 0)
    slack = sum(abs(np.asarray(v, "f8")).max() for k, v in code.items() if k.endswith("_least")) ** 2
    assert (abs(np.asarray(got, "f8") - exact) <= roundings * EPS32 * (sizes + slack) + 1e-30).all()


def as_torch(code):
    return {name: torch.from_numpy(np.asarray(array)) for name, array in code.items()}


@given(plans())
def test_within_budget(plan):
    _, method, budget, _ = made(plan)
    assert method.bits() <= budget


@given(plans())
def test_code_shapes_and_integers_are_those_of_the_codes(plan):
    _, method, _, rng = made(plan)
    shapes, integers = method.code_shapes(), method.integers()
    weight = rng.normal(size=method.shape).astype("f4")
    for code in (method.init(rng, 0.1), method.encode(weight, np)):
        assert {k: v.shape for k, v in code.items()} == shapes
        for entry, array in code.items():
            if entry not in integers:
                assert array.dtype == np.float32
                continue
            kind = integers[entry]
            assert array.dtype.kind == "i"
            assert kind.least <= array.min() <= array.max() < kind.least + kind.count
            assert not kind.rising or (np.diff(array) > 0).all()


@given(plans(), st.booleans())
def test_stored_bytes_are_at_most_bits_and_come_back(plan, drawn):
    name, method, _, rng = made(plan)
    arrays = method.init(rng, 0.1) if drawn else method.encode(rng.normal(size=method.shape).astype("f4"), np)
    code = {k: Raw.of(v) for k, v in arrays.items()}
    data = to_bytes(Contents({"w": Thin(name, method, {"w": Part(method.shape)}, code)}))
    stored = from_bytes(data).thin["w"]
    assert 8 * stored.bytes <= method.bits()
    assert stored.method == method
    assert all((stored.code[k].numpy() == v).all() for k, v in arrays.items())
    assert to_bytes(Contents({"w": stored})) == data


@given(plans())
def test_header_survives_json(plan):
    name, method, _, _ = made(plan)
    assert with_fields(name, json.loads(json.dumps(fields(method)))) == method


@given(plans())
def test_encode_is_deterministic_and_leaves_its_input_alone(plan):
    _, method, _, rng = made(plan)
    weight = rng.normal(size=method.shape).astype("f4")
    before = weight.copy()
    first, second = method.encode(weight, np), method.encode(weight, np)
    assert all((first[k] == second[k]).all() for k in first)
    assert (weight == before).all()


@given(plans())
def test_decode_agrees_across_numpy_and_torch(plan):
    name, method, _, rng = made(plan)
    code = method.init(rng, 0.1) | method.derived()
    assert_decoded_close(method.decode(code, np), code, name, method)
    assert_decoded_close(method.decode(as_torch(code), torch).numpy(), code, name, method)


@given(plans(then=False))
def test_encode_agrees_across_numpy_and_torch(plan):
    _, method, _, rng = made(plan)
    weight = rng.normal(size=method.shape)
    ours = method.decode(method.encode(weight, np) | method.derived(), np)
    theirs = method.decode(method.encode(torch.from_numpy(weight), torch) | as_torch(method.derived()), torch)
    # The two may pick different bases where singular values tie; the distance to the weight is then the same.
    assert np.linalg.norm(ours - weight) == pytest.approx(np.linalg.norm(theirs.numpy() - weight), rel=1e-6, abs=1e-9)


@given(plans(then=False))
def test_a_gradient_reaches_every_float(plan):
    _, method, _, rng = made(plan)
    if method.trains == "through":
        return  # its floats follow from what is trained: test_a_gradient_reaches_every_latent_of_a_layer
    code = as_torch(method.init(rng, 0.1))
    floats = [v.requires_grad_() for k, v in code.items() if k not in method.integers()]
    (method.decode(code | as_torch(method.derived()), torch) * torch.randn(method.shape)).sum().backward()
    assert all(value.grad is not None and (value.grad != 0).any() for value in floats)
    if isinstance(method, Factor):
        used = -(-method.shape[0] * method.shape[1] // method.n)  # rows of xf that the weight reads
        assert code["xf"].grad.abs().sum(1).gt(0).sum() == used


@given(plans())
def test_a_gradient_reaches_every_latent_of_a_layer(plan):
    """In training, where methods that round are trained through their rounding."""
    name, method, _, rng = made(plan)
    part = Part(method.shape)
    weight = ThinWeight.draw(name, method, [part], torch.zeros(1), rng, 0.1)
    (weight() * torch.randn(method.shape)).sum().backward()
    assert all((latent.grad != 0).any() for latent in weight.parameters())


@given(plans(then=False))
def test_decode_then_encode_then_decode_is_idempotent(plan):
    name, method, _, rng = made(plan)
    row = ROWS[name]
    if not row.idempotent(method):
        return
    code = widened(method.init(rng, 1.0))
    weight = method.decode(code | method.derived(), np)
    again = method.decode(method.encode(weight, np) | method.derived(), np)
    condition = 1.0
    if isinstance(method, Factor) and (tail := weight.size % method.n):
        # The last row's coefficients come from its tail alone, so a nearly singular tail magnifies rounding.
        wf = method.encode(weight, np)["wf"][:, :tail]
        condition = np.linalg.cond(wf) if tail >= method.rank else 1.0
    assert np.linalg.norm(again - weight) <= row.exact * max(condition, 1) * max(np.linalg.norm(weight), 1)


@given(plans(then=False))
def test_init_has_the_asked_standard_deviation(plan):
    _, method, _, rng = made(plan)
    code = widened(method.init(rng, 0.1))
    decoded = method.decode(code | method.derived(), np)
    floats = [v.size for k, v in code.items() if k not in method.integers()]
    if isinstance(method, Uniform):
        if method.width < 8:  # coarser steps move the spread itself
            return
        floats = [decoded.size]
    if min(floats) < 100:
        return  # too few draws to tell
    # Var(W) averages over the products, so its spread follows the smaller factor: 6 sigma of a chi-square mean.
    inner = getattr(method, "rank", getattr(method, "terms", 1))
    assert abs(decoded.var() / 0.01 - 1) < 6 * math.sqrt(2 * sum(1 / count for count in floats) * inner) * 2


@given(plans(then=False), st.integers(0, 32 * 100))
def test_error_does_not_grow_with_budget(plan, extra):
    """Not so where a larger plan has other factors, buckets or steps: there it need only hold on average."""
    name, method, budget, rng = made(plan)
    if not ROWS[name].nested:
        return
    weight = rng.normal(size=method.shape)
    larger = METHODS[name].fit(method.shape, budget + extra)
    errors = [
        np.linalg.norm(m.decode(m.encode(weight, np), np) - weight)
        for m in (METHODS[name].fit(method.shape, budget), larger)
    ]
    assert errors[1] <= errors[0] + 1e-9


@given(plans(), st.integers(1, 5))
def test_the_product_is_the_dense_one(plan, batch):
    """In evaluation, by whatever way a layer chooses, and twice, since the second time something is kept."""
    name, method, _, rng = made(plan)
    weight = ThinWeight.draw(name, method, [Part(method.shape)], torch.zeros(1), rng, 0.1).eval()
    x = torch.randn(batch, method.shape[1])
    with torch.no_grad():
        for _ in range(2):
            dense = weight()
            bound = 200 * EPS32 * (abs(x) @ abs(dense).T + x.norm(dim=1, keepdim=True) * dense.norm())
            assert (abs(weight.product(x) - x @ dense.T) <= bound + 1e-30).all()
    x.requires_grad_()
    weight.train().product(x).sum().backward()
    assert torch.allclose(x.grad, weight().detach().sum(0).expand_as(x), atol=1e-4)


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


# ---- Each method against an independent computation -----------------------------------------------------------------


@given(width=st.integers(0, 40), count=st.integers(0, 60), seed=st.integers(0, 1000))
def test_packed_integers_come_back(width, count, seed):
    values = np.random.default_rng(seed).integers(0, 1 << width, count)
    data = pack(values, width)
    assert len(data) == packed_bytes(count, width)
    assert (unpack(data, width, count) == values).all()
    whole = sum(int(v) << (width * i) for i, v in enumerate(values))  # one long number, its lowest bits first
    spare = 8 * len(data) - width * count
    assert int.from_bytes(data.tobytes(), "little") == whole | (((1 << spare) - 1) << (width * count))


@given(places=st.integers(1, 3000), share=st.floats(0, 1), width=st.integers(1, 24), seed=st.integers(0, 1000))
def test_gaps_come_back_and_none_is_longer_than_promised(places, share, width, seed):
    rng, count = np.random.default_rng(seed), int(places * share)
    positions = np.sort(rng.choice(places, count, replace=False)).astype(np.int64)
    assert (unpack_gaps(pack_gaps(positions, width), width, count, places) == positions).all()
    assert min(len(pack_gaps(positions, w)) for w in range(1, 25)) <= gap_bytes(count, places)


def test_gaps_as_deep_compression_draws_them():
    """Han et al., 2016, figure 2: 3 bits, entries at 1, 4 and 15; the long gap takes a filler (here a skip of 7)."""
    assert unpack(pack_gaps(np.array([1, 4, 15]), 3), 3, 4).tolist() == [1, 2, 7, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [([0xFF], "0 positions"), ([0b00000000], "2 positions"), ([0b00110000] + [0xFF] * 6, "7 bytes are more")],
)
def test_gaps_that_are_none_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        unpack_gaps(np.array(data, np.uint8), 4, 1, 9)


def test_hashed_is_the_sum_over_each_bucket():
    """Entry by entry, from the words themselves; and the gradient of a bucket is that of its entries, with signs."""
    method = Hashed((7, 5), 6, seed=3)
    words = [int(word) for word in splitmix(3, 35)]
    place = [((word >> 32) * 6 >> 32, -1 if word & 1 else 1) for word in words]
    values = torch.arange(1.0, 7.0, dtype=torch.float64, requires_grad=True)
    weight = method.decode({"values": values, **as_torch(method.derived())}, torch)
    assert weight.flatten().tolist() == [sign * (bucket + 1) for bucket, sign in place]
    grad = torch.randn(7, 5, dtype=torch.float64)
    (weight * grad).sum().backward()
    for k in range(6):
        mine = sum(sign * g for (bucket, sign), g in zip(place, grad.flatten().tolist(), strict=True) if bucket == k)
        assert values.grad[k].item() == pytest.approx(mine)
    shares = np.random.default_rng(0).random((7, 5))
    code = method.encode(grad.numpy(), np, shares)
    for k in range(6):
        own = [
            (sign * w, h)
            for (b, sign), w, h in zip(place, grad.flatten().tolist(), shares.ravel(), strict=True)
            if b == k
        ]
        assert code["values"][k] == pytest.approx(sum(w * h for w, h in own) / sum(h for _, h in own) if own else 0)


def test_hashes_of_two_layers_are_not_alike():
    one, other = (Hashed((40, 40), 50, seed=seed).derived()["index"] for seed in (1, 2))
    assert (one == other).mean() < 0.05
    counts = np.bincount(Hashed((1000, 100), 10, seed=4).derived()["index"] % 10)
    assert abs(counts / 10_000 - 1).max() < 0.05  # uniform


def test_pruning_keeps_the_largest_and_of_equals_the_first():
    method = Pruned((2, 4), 3)
    code = method.encode(np.array([[1, -2, 1, 0], [1, 5, -1, 1]], "f4"), np)
    assert code["positions"].tolist() == [0, 1, 5]
    assert code["values"].tolist() == [1, -2, 5]
    weigh = np.array([[9, 1, 1, 1], [1, 0, 1, 8]], "f4")  # importance times the square
    assert method.encode(np.array([[1, -2, 1, 0], [1, 5, -1, 1]], "f4"), np, weigh)["positions"].tolist() == [0, 1, 7]


@pytest.mark.parametrize(("shape", "column"), [((64, 300), 16), ((8, 70_000), 32)])
def test_pruned_at_the_price_of_sparse_rows(shape, column):
    """32 bits a value, 16 or 32 for its column, 32 for the start of each row and the end of the last."""
    starts, budget = 32 * (shape[0] + 1), 20_000
    method = METHODS["pruned"].fit(shape, budget, index="csr")
    assert method.kept == (budget - starts) // (32 + column)
    assert method.bits() == starts + (32 + column) * method.kept
    assert method.kept < METHODS["pruned"].fit(shape, budget).kept
    assert with_fields("pruned", fields(method)) == method
    with pytest.raises(BudgetError, match=f"one weight and its position need {starts + 32 + column}"):
        METHODS["pruned"].fit(shape, starts, index="csr")
    with pytest.raises(ConfigError, match="index = 'coo' is unknown. Valid: gaps, csr."):
        METHODS["pruned"].fit(shape, budget, index="coo")
    with pytest.raises(ValueError, match="no index 'coo'"):
        Pruned(shape, 3, "coo")


def test_balanced_pruning_keeps_the_same_share_in_every_processing_element():
    """ESE (Han et al., 2017), section 3.1: rows are dealt out in turn, sub-matrices have the same sparsity."""
    weight = np.array([[9, 8], [1, 2], [7, 6], [4, 3]], "f4")
    code = Pruned((4, 2), 4, balance=2).encode(weight, np)
    assert code["positions"].tolist() == [0, 1, 6, 7]  # rows 0 and 2 keep two, rows 1 and 3 too
    assert Pruned((4, 2), 4).encode(weight, np)["positions"].tolist() == [0, 1, 4, 5]
    for shape, kept, balance in [((10, 7), 33, 4), ((32, 50), 170, 32), ((5, 3), 15, 5), ((7, 11), 1, 3)]:
        method = Pruned(shape, kept, balance=balance)
        rng = np.random.default_rng(kept)
        for code in (method.encode(rng.normal(size=shape), np), method.init(rng, 1.0)):
            assert len(set(code["positions"].tolist())) == kept
            counts = np.bincount(code["positions"] // shape[1] % balance, minlength=balance)
            weights = np.bincount(np.arange(shape[0]) % balance) * shape[1]
            assert abs(counts - kept * weights / weights.sum()).max() < 1
    assert METHODS["pruned"].fit((10, 7), 900, balance=32).balance == 10
    for wrong in (0, 1.5, True):
        with pytest.raises(ConfigError, match="processing elements is a whole one, from 1 on"):
            METHODS["pruned"].fit((10, 7), 900, balance=wrong)
    with pytest.raises(ValueError, match="cannot balance 4 rows over 5"):
        Pruned((4, 2), 4, balance=5)


def test_pruned_against_scipy():
    from scipy import sparse

    weight = np.random.default_rng(5).normal(size=(30, 50))
    method = METHODS["pruned"].fit((30, 50), 32 * 200)
    code = method.encode(weight, np)
    rows, cols = np.divmod(code["positions"], 50)
    matrix = sparse.coo_matrix((code["values"], (rows, cols)), shape=(30, 50)).toarray()
    assert (method.decode(code, np) == matrix).all()
    kept = np.sort(abs(weight), axis=None)[-method.kept :]
    assert np.allclose(np.sort(abs(matrix[matrix != 0])), kept)


def test_kronecker_against_numpy_and_the_nearest_sum():
    method = Kronecker((12, 20), (3, 4), 2)
    code = method.init(np.random.default_rng(6), 1.0)
    assert np.allclose(
        method.decode(code, np), sum(np.kron(a, b) for a, b in zip(code["a"], code["b"], strict=True)), atol=1e-6
    )
    weight = np.random.default_rng(7).normal(size=(12, 20))
    error = np.linalg.norm(method.decode(method.encode(weight, np), np) - weight)
    blocks = [weight[4 * i : 4 * i + 4, 5 * j : 5 * j + 5].ravel() for i in range(3) for j in range(4)]
    assert error == pytest.approx(np.sqrt((np.linalg.svd(np.array(blocks))[1][2:] ** 2).sum()))
    assert METHODS["kronecker"].fit((1024, 1024), 32 * 2048).left == (32, 32)


def test_tensor_train_against_tensorly():
    from tensorly.decomposition import tensor_train_matrix
    from tensorly.tt_matrix import tt_matrix_to_matrix

    weight = np.random.default_rng(8).normal(size=(24, 30))
    method = TensorTrain((24, 30), (2, 3, 4), (5, 3, 2), 4)
    code = method.encode(weight, np)
    cores = [code[f"core{k}"] for k in range(3)]
    assert np.allclose(method.decode(code, np), tt_matrix_to_matrix(cores))
    theirs = tensor_train_matrix(weight.reshape(2, 3, 4, 5, 3, 2), rank=[1, 4, 4, 1])
    errors = [np.linalg.norm(w - weight) for w in (method.decode(code, np), tt_matrix_to_matrix(list(theirs)))]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_uniform_is_the_linear_quantiser():
    """ESE's, by hand: 3 bits, symbols -3 to 3, halves to even."""
    weight = np.array([[0.75, -0.375, 0.1, 0.0], [0.125, -0.75, 0.625, 0.2]], "f4")
    code = Uniform((2, 4), 3).encode(weight, np)
    assert code["step"] == 0.25
    assert code["symbols"].tolist() == [[3, -2, 0, 0], [0, -3, 2, 1]]
    affine = Uniform((2, 4), 2, affine=True, per="row").encode(weight, np)
    assert affine["least"].ravel().tolist() == [-0.375, -0.75]
    assert affine["step"].ravel().tolist() == pytest.approx([0.375, 1.375 / 3])
    assert affine["symbols"].tolist() == [[3, 0, 1, 1], [2, 0, 3, 2]]
    zero = Uniform((1, 3), 8).encode(np.zeros((1, 3), "f4"), np)
    assert (zero["step"].item(), zero["symbols"].tolist()) == (1.0, [[0, 0, 0]])


@pytest.mark.parametrize(
    ("name", "options"),
    [("uniform", {"bits": 1}), ("uniform", {"per": "col"}), ("tensor-train", {"order": 5}), ("hashed", {"seed": "x"})],
)
def test_options_of_all_methods_are_checked(name, options):
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        METHODS[name].fit((20, 30), 32 * 120, **options)


@pytest.mark.parametrize(
    ("name", "least"),
    [("hashed", 32), ("pruned", 32 + 16), ("kronecker", 32 * 49), ("tensor-train", None), ("uniform", 2 * 600 + 32)],
)
def test_budgets_that_are_too_small_name_the_smallest(name, least):
    with pytest.raises(BudgetError, match=r"Use ratio >= 0\.\d+") as caught:
        METHODS[name].fit((20, 30), 31)
    assert METHODS[name].fit((20, 30), caught.value.smallest_bits).bits() == caught.value.smallest_bits
    assert least in (None, caught.value.smallest_bits)
