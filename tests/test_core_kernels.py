"""The native product with chains of cores, each instruction set in turn, against the definition in float64."""

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from deepthin.kernels import chains, costs, products
from deepthin.methods.kronecker import Kronecker
from deepthin.methods.tensor_train import TensorTrain
from tolerance import bound

pytestmark = pytest.mark.skipif(not products.native_available, reason="no native kernels here")


@pytest.fixture(params=products.isas() or ("none",))
def isa(request):
    """Every instruction set that this machine runs."""
    products.native().select(request.param)
    yield request.param
    products.native().select(os.environ.get("DEEPTHIN_ISA", ""))


class Problem:
    """A chain, its operands, and float64 answers with what float32 may lose on the way to them."""

    def __init__(self, rng, rows, cols, ranks, batch, cut=(0, 0), bias=True):
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        self.cores = [draw(a, r, q, b) for a, r, q, b in zip((1, *ranks), rows, cols, (*ranks, 1), strict=True)]
        self.shape = math.prod(rows) - cut[0], math.prod(cols) - cut[1]
        self.x, self.grad = draw(batch, self.shape[1]), draw(batch, self.shape[0])
        self.bias = draw(self.shape[0]) if bias else None
        # Each step sums so many products, one after the other, and rounds each; then there is the bias.
        self.terms = sum(core.shape[0] * core.shape[2] + 1 for core in self.cores) + 1
        self.terms_back = sum(core.shape[1] * core.shape[3] + 1 for core in self.cores)

    def run(self, **options):
        return chains.core_linear(self.shape, self.cores, self.x, self.bias, **options)

    def reference(self, change=lambda a: a):
        cores = [change(core) for core in self.cores]
        return chains.core_reference(
            self.shape, cores, change(self.x), None if self.bias is None else change(self.bias)
        )

    def bound(self):
        return bound(self.terms, self.reference(abs))

    def gradients(self, **options):
        of_x, of_cores = chains.core_gradients(self.shape, self.cores, self.grad, self.x, **options)
        return [of_x, *of_cores]

    def gradient_references(self, change=lambda a: a):
        """That of the weight, through the products of the cores before and after each one."""
        cores = [change(core).astype(np.float64) for core in self.cores]
        x, grad = change(self.x).astype(np.float64), change(self.grad).astype(np.float64)
        whole = np.zeros([math.prod(core.shape[axis] for core in cores) for axis in (1, 2)])
        whole[: self.shape[0], : self.shape[1]] = grad.T @ x
        results = [grad @ chains.core_reference(self.shape, cores, np.eye(self.shape[1])).T]
        for k, core in enumerate(cores):
            before, after = np.ones((1, 1, 1)), np.ones((1, 1, 1))
            for other in cores[:k]:
                before = np.einsum("ija,arqb->irjqb", before, other)
                before = before.reshape(math.prod(before.shape[:2]), -1, other.shape[3])
            for other in cores[:k:-1]:
                after = np.einsum("arqb,bkl->arkql", other, after)
                after = after.reshape(len(other), math.prod(after.shape[1:3]), -1)
            axes = len(before), core.shape[1], after.shape[1], before.shape[1], core.shape[2], after.shape[2]
            results.append(np.einsum("ija,irkjql,bkl->arqb", before, whole.reshape(axes), after))
        return results

    def gradient_bounds(self):
        lost = self.terms + self.terms_back + len(self.x) * max(math.prod(core.shape[:3]) for core in self.cores)
        places = math.prod(max(core.shape[1:3]) for core in self.cores)
        return [bound(lost + len(self.x) * places, size) for size in self.gradient_references(abs)]


def problems(count, seed):
    """One to four cores, of any sizes: a row or column alone, ranks of one, cut matrices; few items and many."""
    rng = np.random.default_rng(seed)
    print(f"seed {seed}")
    for i in range(count):
        cores = int(rng.integers(1, 5))
        most = {1: 50, 2: 20, 3: 8, 4: 5}[cores]
        rows, cols = ([int(v) for v in rng.integers(1, most, cores)] for _ in range(2))
        ranks = [int(v) for v in rng.integers(1, rng.choice([2, 7, 24]), cores - 1)]
        cut = [int(rng.integers(0, max(1, math.prod(sizes) // 2))) for sizes in (rows, cols)] if i % 2 else (0, 0)
        yield Problem(rng, rows, cols, ranks, int(rng.choice([0, 1, 2, 7, 16, 33])), cut, bias=i % 3 > 0)


def test_the_product_is_the_dense_one(isa):
    for problem in problems(700, seed=1):
        assert (abs(problem.run() - problem.reference()) <= problem.bound()).all(), problem.shape


def test_the_gradients_are_those_of_the_dense_product(isa):
    for problem in problems(300, seed=2):
        found = zip(problem.gradients(), problem.gradient_references(), problem.gradient_bounds(), strict=True)
        for got, want, most in found:
            assert (abs(got - want) <= most).all(), [core.shape for core in problem.cores]


@pytest.mark.parametrize(("rows", "cols", "ranks"), [((3, 31), (5, 130), (40,)), ((130, 4), (3, 2), (1,))])
def test_sums_of_many_products_go_in_blocks(isa, rows, cols, ranks):
    """Of more than 96 terms; of the second core, several for each column and few."""
    problem = Problem(np.random.default_rng(3), rows, cols, ranks, 3)
    assert (abs(problem.run() - problem.reference()) <= problem.bound()).all()
    found = zip(problem.gradients(), problem.gradient_references(), problem.gradient_bounds(), strict=True)
    assert all((abs(got - want) <= most).all() for got, want, most in found)


def test_from_the_end_that_is_less_work():
    """A wide last core and a tall first one: from the last core on there are 4 times fewer products."""
    rng = np.random.default_rng(4)
    for rows, cols, ranks in (((16, 4), (3, 13), (3,)), ((16, 8, 8), (8, 8, 16), (5, 5))):
        problem = Problem(rng, rows, cols, ranks, 9, cut=(1, 1))
        steps = [tuple(stride // 4 for stride in core.strides) for core in problem.cores]
        layout = chains.Layout(problem.shape, tuple(core.shape for core in problem.cores), tuple(steps))
        sizes = [(b, r, q, a) for a, r, q, b in layout.sizes[::-1]]
        assert costs.chain_terms(layout, 1)[1] == costs._chain_work(sizes)[0] < costs._chain_work(layout.sizes)[0]
        assert (abs(problem.run() - problem.reference()) <= problem.bound()).all()
        found = zip(problem.gradients(), problem.gradient_references(), problem.gradient_bounds(), strict=True)
        assert all((abs(got - want) <= most).all() for got, want, most in found)


def test_threads_and_batches_do_not_change_a_bit(isa):
    problem = Problem(np.random.default_rng(5), (12, 11), (10, 14), (6,), 300, cut=(3, 5))
    alone = [problem.run(), *problem.gradients()]
    for threads in (2, 4, 8):
        again = [problem.run(threads=threads), *problem.gradients(threads=threads)]
        assert all(np.array_equal(a, b) for a, b in zip(alone, again, strict=True))
    problem.x = problem.x[17:18]
    assert np.array_equal(problem.run(), alone[0][17:18])


def test_many_callers_at_once():
    problem = Problem(np.random.default_rng(6), (8, 8), (8, 9), (4,), 20)
    want, wrong = problem.run(), []

    def call():
        wrong.extend(i for i in range(300) if not np.array_equal(problem.run(threads=2), want))

    callers = [threading.Thread(target=call) for _ in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "bias", 0, 1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_not_finite_comes_out_as_from_a_dense_product(isa, where, value, batch, turned):
    rows, cols = ((3, 2, 4), (5, 3, 2)) if not turned else ((5, 4, 2), (2, 2, 6))
    problem = Problem(np.random.default_rng(7), rows, cols, (3, 2), batch, cut=(2, 1))
    clean, most = problem.run(), problem.bound()
    array = problem.cores[where] if isinstance(where, int) else getattr(problem, where)
    array[tuple(dim // 2 for dim in array.shape)] = value
    y = problem.run()
    with np.errstate(invalid="ignore"):
        weight = np.ones((1, 1, 1), np.float32)
        for core in problem.cores:
            weight = (weight[:, None, :, None, :, None] * core.transpose(1, 2, 0, 3)[None, :, None]).sum(4)
            weight = weight.reshape(weight.shape[0] * weight.shape[1], -1, core.shape[3])
        weight = weight[: problem.shape[0], : problem.shape[1], 0]
        want = (problem.x[:, None] * weight[None]).sum(2) + problem.bias
    assert not np.isfinite(want).all()
    assert np.array_equal(np.isnan(y), np.isnan(want))
    assert np.array_equal(y[np.isinf(want)], want[np.isinf(want)])
    if where in ("x", "bias"):
        same = np.isfinite(want)
        assert (abs(y - clean)[same] <= 2 * most[same]).all()


def test_what_only_overflows_on_the_way_is_computed_anew(isa):
    problem = Problem(np.random.default_rng(8), (4, 4), (4, 4), (2,), 3, bias=False)
    problem.cores = [np.ones_like(core) for core in problem.cores]
    problem.cores[0] *= 1e20
    problem.cores[1] *= 1e-20
    problem.x[:], problem.x[:, ::2] = 1e20, -1e20  # the sums over the first columns overflow, those of a row do not
    problem.x[:, :8] = 1e19
    assert np.isfinite(problem.reference()).all()
    assert np.isfinite(problem.run()).all()


def test_a_huge_item_leaves_its_batch_mates_intact(isa):
    problem = Problem(np.random.default_rng(9), (8, 9), (7, 10), (3,), 19)
    alone = problem.run()
    problem.x[3] *= 1e6
    rest = [i for i in range(19) if i != 3]
    assert np.array_equal(problem.run()[rest], alone[rest])


def test_operands_of_any_layout():
    problem = Problem(np.random.default_rng(10), (6, 5), (4, 7), (3,), 11)
    want, wide = problem.run(), np.empty((11, 57), np.float32)
    wide[:, 1::2] = problem.x
    problem.x = wide[:, 1::2]  # every other number, from an odd address on
    assert np.array_equal(problem.run(), want)


TESTS = str(Path(__file__).parent)
GUARDED = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from deepthin.kernels import chains, products
from guard_pages import guarded

rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal(shape).astype("f4")
products.native().select(sys.argv[1])
count = 0
for rows, cols, ranks, cut in [
    ((1,), (1,), (), 0), ((37,), (18,), (), 0), ((5, 7), (3, 4), (2,), 3), ((16, 4), (3, 16), (3,), 1),
    ((8, 8, 16), (16, 8, 8), (5, 4), 0), ((2, 3, 4), (5, 2, 3), (17, 2), 5), ((2, 3, 2, 3), (3, 2, 4, 2), (2, 3, 2), 1),
]:
    shape = int(np.prod(rows)) - cut, int(np.prod(cols)) - cut
    for by_column in (False, True):
        sizes = list(zip((1, *ranks), rows, cols, (*ranks, 1)))
        for batch in (1, 2, 9):
            for at_end in (True, False):
                x, bias, grad, y, of_x = (
                    guarded(draw(*s), at_end)
                    for s in [(batch, shape[1]), (shape[0],), (batch, shape[0]), (batch, shape[0]), (batch, shape[1])]
                )
                order = (3, 0, 1, 2) if by_column else (0, 1, 2, 3)  # a core whose last axis moves slowest, or first
                back = [order.index(axis) for axis in range(4)]
                make = lambda: [guarded(draw(*(s[a] for a in order)), at_end).transpose(back) for s in sizes]
                cores, grads = make(), make()
                steps = tuple(tuple(stride // 4 for stride in core.strides) for core in cores)
                chain = products.native().Cores(*shape, chains.Layout(shape, tuple(sizes), steps).numbers())
                at = lambda arrays: [a.ctypes.data for a in arrays]
                chain.forward(at(cores), *at((x, bias, y)), batch, 1.0, 1)
                chain.backward(at(cores), *at((x, grad, of_x)), at(grads), batch, 1.0, 1)
                assert np.allclose(y, chains.core_reference(shape, cores, x, bias), rtol=1e-3, atol=1e-2)
                count += 2
print("untouched", count)
"""


@pytest.mark.parametrize("name", products.isas())
def test_nothing_is_touched_outside_the_arrays(name):
    shown = subprocess.run([sys.executable, "-c", GUARDED, name, TESTS], capture_output=True, text=True, check=False)
    assert shown.stdout.strip() == "untouched 168", shown.stderr


def test_the_guard_pages_do_guard():
    """The test above can fail: a chain with one row more writes past y."""
    broken = GUARDED.replace("Cores(*shape,", "Cores(shape[0] + (cut > 0), shape[1],")
    command = [sys.executable, "-c", broken, products.isas()[0], TESTS]
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode != 0


def test_memory_that_runs_out_is_an_error_like_any_other():
    script = """
import numpy as np
from deepthin.kernels import chains, products
rng = np.random.default_rng(0)
cores = [rng.standard_normal(s).astype("f4") for s in [(1, 9, 8, 5), (5, 7, 9, 1)]]
x, grad = rng.standard_normal((130, 72)).astype("f4"), rng.standard_normal((130, 63)).astype("f4")
runs = [lambda: [chains.core_linear((63, 72), cores, x)],
        lambda: [(g := chains.core_gradients((63, 72), cores, grad, x))[0], *g[1]]]
failures = 0
for run in runs:
    for count in range(100):
        products.native().fail_allocation_after(count)
        try:
            y = run()
        except MemoryError:
            failures += 1
            continue
        break
    products.native().fail_allocation_after(-1)
    assert all(np.array_equal(a, b) for a, b in zip(y, run()))
print("failures", failures)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    word, count = shown.stdout.split() or ("", "0")
    assert word == "failures", shown.stderr
    assert int(count) >= 4


def test_what_does_not_fit_is_refused():
    problem = Problem(np.random.default_rng(11), (6, 5), (4, 7), (3,), 2)
    cores, x = problem.cores, problem.x
    with pytest.raises(TypeError, match="core 0 is float64: the native kernels compute in float32"):
        chains.core_linear(problem.shape, [cores[0].astype(np.float64), cores[1]], x)
    with pytest.raises(ValueError, match=r"Cores have four axes; these have \[4, 3\]"):
        chains.core_linear(problem.shape, [cores[0], cores[1][0]], x)
    with pytest.raises(ValueError, match="of another rank than the one before"):
        chains.core_linear(problem.shape, [cores[0], cores[1][:2]], x)
    with pytest.raises(ValueError, match="the cores do not cover the matrix"):
        chains.core_linear((31, 28), cores, x)
    with pytest.raises(ValueError, match=r"x is \(2, 28\): this plan needs \(2, 27\)"):
        chains.core_linear((30, 27), cores, x)
    native = products.native().Cores
    for numbers in (
        [1, 2, 3, 1, 1, 1, 1],
        [1, 0, 3, 1, 1, 1, 1, 1],
        [1, 2**31, 3, 1, 1, 1, 1, 1],
        [1, 2, 3, 1, -1, 1, 1, 1],
    ):
        with pytest.raises(ValueError, match="8 numbers|is empty, too large|too far apart"):
            native(1, 1, numbers)
    with pytest.raises(ValueError, match="a chain has 1 to 8 cores"):
        native(1, 1, [])
    chain = native(6, 4, [1, 6, 4, 1, 24, 4, 1, 1])
    with pytest.raises(ValueError, match="a chain needs all of its cores"):
        chain.forward([], 0, 0, 0, 1, 1.0, 1)
    with pytest.raises(ValueError, match="the batch is negative or too large"):
        chain.forward([0], 0, 0, 0, 2**60, 1.0, 1)


@pytest.mark.parametrize("method", [Kronecker((30, 40), (5, 8), 3), TensorTrain((30, 40), (2, 3, 5), (5, 4, 2), 3)])
def test_the_entries_of_a_code_are_read_as_they_lie(method):
    rng = np.random.default_rng(12)
    code, layout = method.init(rng, 0.1), chains.layout_of(method)
    x, y = rng.standard_normal((3, 40)).astype(np.float32), np.empty((3, 30), np.float32)
    chains.native_chain(layout).forward(
        [a.ctypes.data for a in code.values()], x.ctypes.data, 0, y.ctypes.data, 3, 2.0, 1
    )
    sizes = 2 * abs(x).astype(np.float64) @ method.decode({k: abs(a).astype(np.float64) for k, a in code.items()}, np).T
    assert (abs(y - 2 * x @ method.decode(code, np).T.astype(np.float64)) <= bound(200, sizes)).all()


def test_layouts_of_what_is_no_chain():
    class Computed:
        """A chain whose cores are not the entries of its code."""

        shape = (6, 4)

        def code_shapes(self):
            return {"a": (1, 6, 4, 1)}

        def cores(self, code, xp):
            return [code["a"] * 2]

    Computed.__getattr__ = lambda self, name: None  # all that protocols ask for
    assert chains.layout_of(Computed()) is None
    assert chains.layout_of(Kronecker((30, 40), (5, 8), 3)) is not None
