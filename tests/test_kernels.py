"""The native kernels, each instruction set in turn, against the definition in float64; nothing here loads torch."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from deepthin.kernels import products
from deepthin.methods.factor import Factor
from tolerance import assert_close

pytestmark = pytest.mark.skipif(not products.native_available, reason="no native kernels here")

EPS32 = float(np.finfo(np.float32).eps)
WAYS = ("direct", "fft")


@pytest.fixture(params=products.isas() or ("none",))
def isa(request):
    """Every instruction set that this machine runs."""
    products.native().select(request.param)
    yield request.param
    products.native().select(os.environ.get("DEEPTHIN_ISA", ""))


class Problem:
    """A plan, its operands, and float64 answers with what float32 may lose on the way to them."""

    def __init__(self, rng, rows, cols, n, rank, batch, offset=0, bias=True):
        self.method, self.offset = Factor((rows, cols), n, rank), offset
        m = -(-(offset + rows * cols) // n)
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        self.x, self.xf, self.wf, self.grad = draw(batch, cols), draw(m, rank), draw(rank, n), draw(batch, rows)
        self.bias = draw(rows) if bias else None

    def weight(self, change=lambda a: a):
        rows, cols = self.method.shape
        flat = (change(self.xf.astype(np.float64)) @ change(self.wf.astype(np.float64))).reshape(-1)
        return flat[self.offset : self.offset + rows * cols].reshape(rows, cols)

    def run(self, correlation, **options):
        return products.linear(
            self.method, self.x, self.xf, self.wf, self.bias, correlation=correlation, offset=self.offset, **options
        )

    def gradients(self, correlation, **options):
        return products.linear_gradients(
            self.method, self.grad, self.x, self.xf, self.wf, correlation=correlation, offset=self.offset, **options
        )

    def reference(self):
        return products.linear_reference(self.method, self.x, self.xf, self.wf, self.bias, offset=self.offset)

    def losses(self):
        """Roundings of a sum of so many terms; by FFT, of its levels, over the energy of the whole item."""
        cols, n, rank = self.method.shape[1], self.method.n, self.method.rank
        taps = -(-(cols + n - 1) // n) * rank
        return (n + taps + 8) * EPS32, 8 * math.log2(2 * n + 2 * cols + 32) * EPS32

    def bound(self, correlation):
        """For each output, the most that ``run`` may be off."""
        direct, levels = self.losses()
        sizes = abs(self.x.astype(np.float64)) @ self.weight(abs).T + (0 if self.bias is None else abs(self.bias))
        if correlation == "direct":
            return direct * sizes
        energy = np.linalg.norm(self.x, axis=1)[:, None] * self.reach()[None] * np.linalg.norm(self.wf)
        return levels * energy + direct * sizes

    def reach(self):
        """For each output, the sum of |xf| over the rows that it reads."""
        rows, cols = self.method.shape
        first = self.offset + np.arange(rows) * cols
        total = np.concatenate([[0], np.cumsum(abs(self.xf).sum(1))])
        return total[(first + cols - 1) // self.method.n + 1] - total[first // self.method.n]

    def gradient_references(self):
        rows, cols = self.method.shape
        grad, flat = self.grad.astype(np.float64), np.zeros(len(self.xf) * self.method.n)
        flat[self.offset : self.offset + rows * cols] = (grad.T @ self.x).reshape(-1)
        flat = flat.reshape(len(self.xf), -1)
        return grad @ self.weight(), flat @ self.wf.T.astype(np.float64), self.xf.T.astype(np.float64) @ flat

    def gradient_bounds(self, correlation):
        rows, cols = self.method.shape
        direct, levels = self.losses()
        direct = direct + (rows + len(self.x)) * EPS32
        sizes, flat = abs(self.grad.astype(np.float64)), np.zeros(len(self.xf) * self.method.n)
        flat[self.offset : self.offset + rows * cols] = (sizes.T @ abs(self.x)).reshape(-1)
        flat = flat.reshape(len(self.xf), -1)
        exact = sizes @ self.weight(abs), flat @ abs(self.wf.T), abs(self.xf.T) @ flat
        if correlation == "direct":
            return [direct * size for size in exact]
        spread = (sizes @ self.reach())[:, None]  # what of an item's gradient reaches the correlation
        items = np.linalg.norm(self.x, axis=1)
        w = np.linalg.norm(self.wf)
        return [
            levels * spread * w + direct * exact[0],
            levels * (sizes.T @ items).max() * w + direct * exact[1],
            levels * (spread[:, 0] @ items) + direct * exact[2],
        ]


def problems(count, seed):
    """Plans of every kind: one row or column, n coprime or not, n = fan-in, n past the end; few items and many."""
    rng = np.random.default_rng(seed)
    print(f"seed {seed}")
    for i in range(count):
        rows, cols = (int(v) for v in rng.integers(1, rng.choice([4, 20, 90]), 2))
        n = int(rng.integers(1, rng.choice([3, 30, 120])))
        rank, batch = int(rng.choice([1, 1, 2, 3, 9, 17])), int(rng.choice([0, 1, 2, 3, 4, 8, 11, 16, 19, 33]))
        if i % 10 == 0:
            n = cols
        if i % 10 == 1:
            n = rows * cols + int(rng.integers(1, 9))
        offset = int(rng.integers(0, n)) if i % 2 else 0
        yield Problem(rng, rows, cols, n, rank, batch, offset, bias=i % 3 > 0)


@pytest.mark.parametrize("correlation", WAYS)
def test_the_product_is_the_dense_one(isa, correlation):
    """Promise 9: 1,000 random plans each way, so 2,000 on each instruction set."""
    for problem in problems(1000, seed=1):
        y = problem.run(correlation)
        assert (abs(y - problem.reference()) <= problem.bound(correlation)).all(), problem.method


@pytest.mark.parametrize("correlation", WAYS)
def test_the_gradients_are_those_of_the_dense_product(isa, correlation):
    for problem in problems(300, seed=2):
        found = problem.gradients(correlation)
        for got, want, bound in zip(
            found, problem.gradient_references(), problem.gradient_bounds(correlation), strict=True
        ):
            assert (abs(got - want) <= bound).all(), problem.method


@pytest.mark.parametrize("batch", [64, 130, 300])
def test_gradients_of_many_items(isa, batch):
    """Slices of the batch have sums of their own."""
    problem = Problem(np.random.default_rng(3), 40, 50, 21, 2, batch)
    for correlation in WAYS:
        for got, want, bound in zip(
            problem.gradients(correlation),
            problem.gradient_references(),
            problem.gradient_bounds(correlation),
            strict=True,
        ):
            assert (abs(got - want) <= bound).all()


@pytest.mark.parametrize("batch", [1, 9])
def test_transforms_of_every_kind_of_length(isa, batch):
    """Two to four levels, of all radices; no plan so long that it is cut into pieces."""
    rng = np.random.default_rng(5)
    for cols in np.unique(np.geomspace(3, 3000, 50).astype(int)):
        n, rank = int(rng.integers(2, max(4, cols // 2))), int(rng.integers(1, 5))
        problem = Problem(rng, 6, int(cols), n, rank, batch)
        assert (abs(problem.run("fft") - problem.reference()) <= problem.bound("fft")).all(), problem.method
        bounds = problem.gradient_bounds("fft")
        for got, want, bound in zip(problem.gradients("fft"), problem.gradient_references(), bounds, strict=True):
            assert (abs(got - want) <= bound).all(), problem.method


@pytest.mark.parametrize("correlation", WAYS)
@pytest.mark.parametrize(("cols", "n", "rank", "offset"), [(4101, 101, 2, 7), (12_300, 64, 1, 0), (8193, 8193, 1, 3)])
def test_products_of_many_inputs_in_pieces(isa, cols, n, rank, offset, correlation):
    problem = Problem(np.random.default_rng(0), 5, cols, n, rank, 9, offset)
    assert (abs(problem.run(correlation) - problem.reference()) <= problem.bound(correlation)).all()
    grads, bounds = problem.gradients(correlation), problem.gradient_bounds(correlation)
    for got, want, bound in zip(grads, problem.gradient_references(), bounds, strict=True):
        assert (abs(got - want) <= bound).all()


@pytest.mark.parametrize("correlation", ["direct", "fft"])
def test_threads_do_not_change_a_bit(isa, correlation):
    """Promise 11."""
    problem = Problem(np.random.default_rng(4), 130, 140, 17, 2, 300)
    alone = [problem.run(correlation), *problem.gradients(correlation)]
    for threads in (2, 4, 8):
        again = [problem.run(correlation, threads=threads), *problem.gradients(correlation, threads=threads)]
        assert all(np.array_equal(a, b) for a, b in zip(alone, again, strict=True))


def test_many_callers_at_once():
    """Promise 11: 16 threads x 1,000 calls on one weight, each of several threads of its own."""
    problem = Problem(np.random.default_rng(5), 60, 64, 13, 1, 20)
    want = {way: problem.run(way) for way in WAYS}
    wrong = []

    def call(way):
        for _ in range(1000):
            if not np.array_equal(problem.run(way, threads=2), want[way]):
                wrong.append(way)

    callers = [threading.Thread(target=call, args=(WAYS[i % 2],)) for i in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_forked_child_has_threads_of_its_own():
    problem = Problem(np.random.default_rng(6), 60, 64, 13, 1, 40)
    want = problem.run("fft", threads=2)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(problem.run("fft", threads=2), want) else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (done, status) == (child, 0)


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("correlation", WAYS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "xf", "wf", "bias"])
def test_what_is_not_finite_comes_out_as_from_a_dense_product(isa, where, value, correlation, batch):
    """Promise 12: the same outputs are NaN, the same are infinite, all others are as they were."""
    problem = Problem(np.random.default_rng(7), 30, 40, 7, 2, batch)
    clean, bound = problem.run(correlation), problem.bound("direct")
    array = getattr(problem, where)
    array[(len(array) // 2, *(dim // 2 for dim in array.shape[1:]))] = value
    y = problem.run(correlation)
    with np.errstate(invalid="ignore"):
        product = np.zeros((len(problem.xf), 7), np.float32)
        for a in range(2):
            product += np.outer(problem.xf[:, a], problem.wf[a])
        weight = product.reshape(-1)[: 30 * 40].reshape(30, 40)
        want = (problem.x[:, None] * weight[None]).sum(2) + problem.bias
    assert not np.isfinite(want).all()
    assert np.array_equal(np.isnan(y), np.isnan(want))
    assert np.array_equal(y[np.isinf(want)], want[np.isinf(want)])
    same = np.isfinite(want)
    assert (abs(y - clean)[same] <= 2 * bound[same]).all() if where != "wf" else True
    assert np.array_equal(np.isnan(problem.run(correlation, relu=True)), np.isnan(want))


def test_what_only_overflows_on_the_way_is_computed_anew(isa):
    """A spectrum sums what no output sums."""
    problem = Problem(np.random.default_rng(8), 4, 600, 7, 1, 9)
    problem.x = np.full_like(problem.x, 1e36)
    problem.wf[:], problem.bias = 1e-3, None
    assert np.isfinite(problem.run("fft")).all()


@pytest.mark.parametrize("correlation", WAYS)
def test_a_huge_item_leaves_its_batch_mates_intact(isa, correlation):
    problem = Problem(np.random.default_rng(9), 60, 90, 7, 1, 19)
    alone = problem.run(correlation)
    problem.x[3] *= 1e6
    y = problem.run(correlation)
    rest = [i for i in range(19) if i != 3]
    assert np.array_equal(y[rest], alone[rest])


def test_rectified(isa):
    problem = Problem(np.random.default_rng(11), 33, 20, 7, 1, 11)
    for correlation in WAYS:
        assert np.array_equal(problem.run(correlation, relu=True), np.maximum(problem.run(correlation), 0))


def test_operands_of_any_layout():
    problem = Problem(np.random.default_rng(12), 33, 20, 7, 1, 11)
    want = problem.run("fft")
    wide = np.empty((11, 41), np.float32)
    wide[:, 1::2] = problem.x
    problem.x = wide[:, 1::2]  # every other number, from an odd address on
    assert np.array_equal(problem.run("fft"), want)
    moved = np.empty(len(problem.xf) + 1, np.float32)[1:].reshape(-1, 1)
    moved[:] = problem.xf
    problem.xf = moved
    assert np.array_equal(problem.run("fft"), want)


def test_spectra_follow_the_filter():
    """They are kept by value: a filter that changes in place is another one."""
    problem = Problem(np.random.default_rng(13), 33, 20, 7, 1, 11)
    problem.run("fft")
    problem.wf *= 2
    assert (abs(problem.run("fft") - problem.reference()) <= problem.bound("fft")).all()


TESTS = str(Path(__file__).parent)
GUARDED = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from deepthin.kernels import products
from deepthin.methods.factor import Factor
from guard_pages import guarded

rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal(shape).astype("f4")
products.native().select(sys.argv[1])
count = 0
for rows, cols, n, rank, offset in [
    (1, 1, 1, 1, 0), (5, 7, 3, 1, 2), (40, 64, 13, 1, 0), (40, 64, 13, 3, 5), (17, 100, 33, 2, 0), (64, 30, 200, 1, 7),
    (8, 8, 8, 2, 0), (30, 16, 16, 5, 0), (9, 12, 8, 1, 3), (33, 50, 7, 9, 1), (3, 4, 100, 1, 0),
]:
    m = -(-(offset + rows * cols) // n)
    method = Factor((rows, cols), n, rank)
    for batch in (1, 2, 5, 8, 17):
        for at_end in (True, False):
            x, xf, wf, bias, grad, y, gx, gxf, gwf = (
                guarded(draw(*shape), at_end)
                for shape in [(batch, cols), (m, rank), (rank, n), (rows,), (batch, rows), (batch, rows), (batch, cols),
                              (m, rank), (rank, n)]
            )
            at = lambda *arrays: [a.ctypes.data for a in arrays]
            for fft in (False, True):
                plan = rows, cols, n, rank, offset
                products.native().forward(*plan, *at(x, xf, wf, bias, y), batch, fft, True, 1)
                products.native().backward(*plan, *at(x, xf, wf, grad, gx, gxf, gwf), batch, fft, 1)
                count += 2
            starts, columns = guarded(np.array([0, *[1] * rows]), at_end), guarded(np.zeros(1, "i4"), at_end)
            value = guarded(draw(1), at_end)
            products.native().csr(*at(value, columns, starts), rows, cols, 1, *at(bias, x, y), batch, 1)
            symbols, once = guarded(np.zeros((rows, cols), "u1"), at_end), guarded(draw(1, 1), at_end)
            for levels in {1, *products.levels()} - {0} if products.levels()[1] else ():
                table = guarded(draw(levels), at_end)
                products.native().symbols(
                    rows, cols, *at(symbols), 0, 0, False, *at(table), levels, *at(bias, x, y), batch, 1
                )
            for step in (once, bias):
                own = *at(symbols, step, step), step is bias, 0, 0
                products.native().symbols(rows, cols, *own, *at(bias, x, y), batch, 1)
print("untouched", count)
"""


@pytest.mark.parametrize("name", products.isas())
def test_nothing_is_touched_outside_the_arrays(name):
    """Promise 10: every array between pages that may be neither read nor written."""
    shown = subprocess.run([sys.executable, "-c", GUARDED, name, TESTS], capture_output=True, text=True, check=False)
    assert shown.stdout.strip() == "untouched 440", shown.stderr


def test_the_guard_pages_do_guard():
    """The test above can fail: a plan with one row more reads past xf."""
    broken = GUARDED.replace("plan = rows,", "plan = rows + 1,")
    shown = subprocess.run(
        [sys.executable, "-c", broken, products.isas()[0], TESTS], capture_output=True, text=True, check=False
    )
    assert shown.returncode < 0


def test_memory_that_runs_out_is_an_error_like_any_other():
    """Promise 13: the first, the second ... allocation fails; then all is as before."""
    script = """
import numpy as np
from deepthin.kernels import products
from deepthin.methods.factor import Factor
rng = np.random.default_rng(0)
method = Factor((40, 50), 7, 2)
x, xf, wf, grad = (rng.standard_normal(s).astype("f4") for s in [(130, 50), (286, 2), (2, 7), (130, 40)])
runs = [lambda: products.linear(method, x, xf, wf, correlation="fft", threads=2),
        lambda: products.linear(method, x[:1], xf, wf, correlation="fft"),
        lambda: products.linear_gradients(method, grad, x, xf, wf, correlation="fft", threads=2)]
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
    again = run()
    assert all(np.array_equal(a, b) for a, b in zip(y, again))
print("failures", failures)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    word, count = shown.stdout.split() or ("", "0")
    assert word == "failures", shown.stderr
    assert int(count) >= 7


def test_what_does_not_fit_is_refused():
    method = Factor((6, 9), 4, 1)
    x, xf, wf = np.zeros((2, 9), np.float32), np.zeros((14, 1), np.float32), np.zeros((1, 4), np.float32)
    with pytest.raises(TypeError, match="xf is float64: the native kernels compute in float32"):
        products.linear(method, x, xf.astype(np.float64), wf)
    with pytest.raises(ValueError, match=r"x is \(2, 8\): this plan needs \(2, 9\)"):
        products.linear(method, x[:, :8], xf, wf)
    with pytest.raises(ValueError, match=r"xf is \(13, 1\): this plan needs \(14, 1\)"):
        products.linear(method, x, xf[:13], wf)
    with pytest.raises(ValueError, match="The offset 4 must be at least 0 and below n = 4"):
        products.linear(method, x, xf, wf, offset=4)
    with pytest.raises(ValueError, match="'Direct' must be 'direct' or 'fft'"):
        products.linear(method, x, xf, wf, correlation="Direct")
    with pytest.raises(TypeError, match="x is a masked array"):
        products.linear(method, np.ma.masked_array(x, x > 0), xf, wf)
    with pytest.raises(ValueError, match="shuffled"):
        products.linear(Factor((6, 9), 4, 1, seed=1), x, xf, wf)
    for plan in [(0, 9, 4, 1, 0), (6, 9, 4, 1, 4), (2**31, 9, 4, 1, 0), (6, 9, -4, 1, 0)]:
        with pytest.raises(ValueError, match="must be from 1 to 2"):
            products.native().forward(*plan, 0, 0, 0, 0, 0, 0, False, False, 1)
    with pytest.raises(ValueError, match="the batch is negative or too large"):
        products.native().forward(6, 9, 4, 1, 0, 0, 0, 0, 0, 0, 2**60, False, False, 1)


def in_fresh_process(isa, statement="print(products.native_available, products.isa())"):
    environment = {**os.environ, "DEEPTHIN_ISA": isa}
    code = f"from deepthin.kernels import products; {statement}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_the_instruction_set_can_be_forced():
    for name in products.isas():
        assert in_fresh_process(name).stdout.strip() == f"True {name}"
    assert in_fresh_process("none").stdout.strip() == "False none"
    shown = in_fresh_process("none", "products.native()")
    assert "deepthin has no native kernels here: DEEPTHIN_ISA=none." in shown.stderr
    shown = in_fresh_process("v9")
    assert f"DEEPTHIN_ISA='v9': this machine runs {', '.join(products.isas())}, or none." in shown.stderr


@pytest.mark.parametrize("batch", [0, 1, 3, 8, 21])
def test_sparse_rows_against_scipy(isa, batch):
    from scipy import sparse

    rng = np.random.default_rng(14)
    dense = rng.standard_normal((40, 70)) * (rng.random((40, 70)) < 0.1)
    dense[5] = 0
    matrix = sparse.csr_matrix(dense.astype(np.float32))
    x, bias = rng.standard_normal((batch, 70)).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    y = products.csr_linear(matrix.shape, matrix.data, matrix.indices, matrix.indptr, x, bias, threads=2)
    want = (matrix.astype(np.float64) @ x.T.astype(np.float64)).T + bias
    bound = 40 * EPS32 * ((abs(matrix).astype(np.float64) @ abs(x.T)).T + abs(bias))
    assert (abs(y - want) <= bound).all()


def test_sparse_rows_are_checked():
    x, ones = np.ones((2, 4), np.float32), np.ones(3, np.float32)
    for columns, starts in [
        ([0, 1, 4], [0, 1, 3]),
        ([0, -1, 2], [0, 1, 3]),
        ([0, 1, 2], [0, 4, 3]),
        ([0, 1, 2], [1, 2, 3]),
        ([0, 2**32, 2], [0, 1, 3]),
    ]:
        with pytest.raises(ValueError, match="columns lie within the matrix|Columns go from"):
            products.csr_linear((2, 4), ones, np.array(columns), np.array(starts), x)
    with pytest.raises(ValueError, match="3 values need as many columns, and 2 rows one start more; there are 2 and 3"):
        products.csr_linear((2, 4), ones, np.array([0, 1]), np.array([0, 1, 3]), x)
    with pytest.raises(TypeError, match="must be integers; they are float64 and int64"):
        products.csr_linear((2, 4), ones, np.array([0.0, 1.0, 2.0]), np.array([0, 1, 3]), x)


def test_many_filters_leave_the_latest_in_place():
    """More spectra than are kept: what is found anew has the same bits as what was found first."""
    method = Factor((64, 2048), 1024, 1)
    rng = np.random.default_rng(0)
    x, xf = rng.standard_normal((9, 2048), np.float32), rng.standard_normal((method.m, 1), np.float32)
    filters = rng.standard_normal((1500, 1, 1024), np.float32)  # their spectra take some 70 MB
    first = [products.linear(method, x, xf, wf) for wf in filters[:3]]
    for wf in filters:
        products.linear(method, x, xf, wf)
    for wf, y in zip(filters, first, strict=False):
        assert np.array_equal(products.linear(method, x, xf, wf), y)
        # Three transforms over 3 * 2,048 points, and three rows of factors for each output, over the norms.
        norms = np.linalg.norm(x, axis=1).max() * np.linalg.norm(wf) * 3 * abs(xf).max()
        assert_close(y, products.linear_reference(method, x, xf, wf), 8 * 3 * math.log2(3 * 2048), norms)
