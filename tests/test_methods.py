"""Laws that every method obeys, over all of METHODS, and the facts that the DeepThin paper and its algebra state."""

import functools
import itertools
import math
import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepthin import METHODS, BudgetError, ConfigError
from deepthin.coding.bits import gap_bytes, pack, pack_gaps, packed_bytes, permutation, splitmix, unpack, unpack_gaps
from deepthin.methods import Named, fields, with_fields
from deepthin.methods.factor import Factor
from deepthin.methods.hashed import Hashed
from deepthin.methods.kronecker import Kronecker
from deepthin.methods.pruned import Pruned
from deepthin.methods.scalar import Uniform
from deepthin.methods.tensor_train import TensorTrain
from deepthin.testing import INNER, check_method
from deepthin.testing.claims import CLAIMS
from deepthin.testing.laws import LAWS, NOT_OF_TWO
from tolerance import assert_close

SCALAR = {name for name, named in METHODS.items() if "bits" in named.sized_by}  # these may store others' floats
SUBJECTS = {name: (name, ()) for name in METHODS} | {
    f"{name} then another": (name, INNER) for name in METHODS if name not in SCALAR
}


@pytest.fixture
def shapes_of_the_first(shapes_are_checked, request):
    """Make a law check shapes in its first examples only, which takes most of its time; with --shapes in all."""

    def first(law, count):
        runs = itertools.count(1)

        @functools.wraps(law)
        def checked(example):
            law(example)
            if next(runs) == count and not request.config.getoption("--shapes"):
                jaxtyping.config.update("jaxtyping_disable", True)

        return checked

    yield first
    jaxtyping.config.update("jaxtyping_disable", not shapes_are_checked)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_method_obeys_every_law(subject, law, shapes_of_the_first, monkeypatch):
    """On random examples: what fails says how it is repeated. Each law asserts in 90 % of its examples, or fails."""
    name, then = SUBJECTS[subject]
    if then and law in NOT_OF_TWO:
        assert law not in check_method(name, then=then, examples=1)
        return
    examples = settings().max_examples
    monkeypatch.setitem(LAWS, law, shapes_of_the_first(LAWS[law], -(-examples // 3)))
    (counted,) = check_method(name, then=then, laws=[law], examples=examples).values()
    assert counted.examples == examples
    assert counted.asserted >= 0.9 * examples


def test_a_law_that_hardly_asserts_is_refused(monkeypatch):
    """An early return in most examples is no law that holds."""

    def sometimes(example):
        """Nothing, but where rows are few."""
        if example.shape[0] < 10:
            example.check(True, "")

    monkeypatch.setitem(LAWS, "sometimes", sometimes)
    with pytest.raises(AssertionError, match=r"The law 'sometimes' was asserted in \d+ of 30 examples of deepthin"):
        check_method("deepthin", laws=["sometimes"])


def test_a_failing_law_says_what_is_needed_to_repeat_it(monkeypatch):
    def narrow(example):
        """At most 30 columns."""
        example.check(example.shape[1] <= 30, f"{example.shape[1]} columns")

    monkeypatch.setitem(LAWS, "narrow", narrow)
    with pytest.raises(AssertionError) as caught:
        check_method("hashed", laws=["narrow"], examples=100)
    message = str(caught.value)
    seed = int(message.rpartition("seed=")[2].partition(",")[0])
    assert "hashed breaks the law 'narrow': " in message
    assert "  the law: At most 30 columns.\n  example: shape (" in message
    with pytest.raises(AssertionError) as again:
        check_method("hashed", laws=["narrow"], seed=seed, examples=1)
    assert str(again.value) == message  # the seed alone repeats it


def test_what_check_method_refuses():
    with pytest.raises(ValueError, match="There is no law 'x'. Laws: budget, stored, "):
        check_method("deepthin", laws=["x"])
    with pytest.raises(ValueError, match="examples = 0: a law needs one at least"):
        check_method("deepthin", examples=0)
    with pytest.raises(ValueError, match="METHODS has another method 'deepthin'"):
        check_method(Named("deepthin", Hashed))


def test_a_class_and_a_function_are_checked_too():
    """Neither is in METHODS afterwards."""
    before = dict(METHODS)
    for method in (Hashed, lambda shape, max_bits, seed=9: Hashed.fit(shape, max_bits, seed=seed)):
        counts = check_method(method, claims=CLAIMS["hashed"], examples=3)
        assert counts.keys() == LAWS.keys()
    assert before == METHODS


def test_testing_loads_no_framework():
    code = "import sys, deepthin.testing; print([m for m in ('torch', 'keras', 'hypothesis') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def as_torch(code):
    return {name: torch.from_numpy(np.asarray(array)) for name, array in code.items()}


def test_a_gradient_reaches_the_rows_that_the_weight_reads():
    """All of xf: its rows are the fewest that hold every weight."""
    for shape, bits in [((30, 20), 32 * 100), ((7, 13), 32 * 40), ((40, 40), 32 * 200)]:
        method = METHODS["deepthin"].fit(shape, bits)
        code = {k: v.requires_grad_() for k, v in as_torch(method.init(np.random.default_rng(0), 0.1)).items()}
        (method.decode(code, torch) * torch.randn(shape)).sum().backward()
        assert (code["xf"].grad != 0).any(1).all()


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
    assert_close(method.decode(method.encode(weight, np), np), best, 30 + 20, s[0])  # what two decompositions lose


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
    assert np.sqrt((code["xf"] ** 2).mean()) == pytest.approx(
        np.sqrt((code["wf"] ** 2).mean()), rel=0.01
    )  # by the factors' norms; half of the numbers of the last row are outside


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
    [
        ([0xFF], "0 positions"),
        ([0b00000000], "2 positions"),
        ([0b11111010], "a position of 10 among 9"),
        ([0b00110000] + [0xFF] * 6, "7 bytes are more"),
    ],
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
        assert_close(values.grad[k].item(), mine, 35, abs(grad).sum())
    shares = np.random.default_rng(0).random((7, 5))
    code = method.encode(grad.numpy(), np, shares)
    for k in range(6):
        own = [
            (sign * w, h)
            for (b, sign), w, h in zip(place, grad.flatten().tolist(), shares.ravel(), strict=True)
            if b == k
        ]
        want = sum(w * h for w, h in own) / sum(h for _, h in own) if own else 0
        assert_close(code["values"][k], want, 2 * 35, abs(grad).max())


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
        with pytest.raises(ConfigError, match="processing elements is an integer >= 1"):
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
    assert (np.sort(abs(matrix[matrix != 0])) == kept).all()


def test_kronecker_against_numpy_and_the_nearest_sum():
    method = Kronecker((12, 20), (3, 4), 2)
    code = method.init(np.random.default_rng(6), 1.0)
    want, sizes = (
        sum(np.kron(a, b) for a, b in zip(f(code["a"]), f(code["b"]), strict=True)) for f in (np.array, np.abs)
    )
    assert_close(method.decode(code, np), want, 2, sizes)
    weight = np.random.default_rng(7).normal(size=(12, 20))
    error = np.linalg.norm(method.decode(method.encode(weight, np), np) - weight)
    blocks = [weight[4 * i : 4 * i + 4, 5 * j : 5 * j + 5].ravel() for i in range(3) for j in range(4)]
    want = np.sqrt((np.linalg.svd(np.array(blocks))[1][2:] ** 2).sum())
    assert_close(error, want, weight.size, np.linalg.norm(weight))
    assert METHODS["kronecker"].fit((1024, 1024), 32 * 2048).left == (32, 32)


def test_tensor_train_against_tensorly():
    from tensorly.decomposition import tensor_train_matrix
    from tensorly.tt_matrix import tt_matrix_to_matrix

    weight = np.random.default_rng(8).normal(size=(24, 30))
    method = TensorTrain((24, 30), (2, 3, 4), (5, 3, 2), 4)
    code = method.encode(weight, np)
    cores = [code[f"core{k}"] for k in range(3)]
    assert_close(method.decode(code, np), tt_matrix_to_matrix(cores), 4 + 4, tt_matrix_to_matrix([*map(abs, cores)]))
    theirs = tensor_train_matrix(weight.reshape(2, 3, 4, 5, 3, 2), rank=[1, 4, 4, 1])
    errors = [np.linalg.norm(w - weight) for w in (method.decode(code, np), tt_matrix_to_matrix(list(theirs)))]
    assert_close(errors[0], errors[1], weight.size, np.linalg.norm(weight))


def test_uniform_is_the_linear_quantiser():
    """ESE's, by hand: 3 bits, symbols -3 to 3, halves to even."""
    weight = np.array([[0.75, -0.375, 0.1, 0.0], [0.125, -0.75, 0.625, 0.2]], "f4")
    code = Uniform((2, 4), 3).encode(weight, np)
    assert code["step"] == 0.25
    assert code["symbols"].tolist() == [[3, -2, 0, 0], [0, -3, 2, 1]]
    affine = Uniform((2, 4), 2, affine=True, per="row").encode(weight, np)
    assert affine["least"].ravel().tolist() == [-0.375, -0.75]
    assert_close(affine["step"].ravel(), [0.375, 1.375 / 3], 2)  # a difference and a quotient
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
