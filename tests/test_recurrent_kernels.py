"""Native recurrent layers, each instruction set, against the definition in float64; nothing here loads torch."""

import os
import subprocess
import sys

import numpy as np
import pytest

from deepthin.kernels import products
from deepthin.kernels.recurrent import CELLS, Gate, gates_of, recurrent, recurrent_gradients, recurrent_reference
from deepthin.methods.factor import Factor
from tolerance import bound

pytestmark = pytest.mark.skipif(not products.native_available, reason="no native kernels here")

WAYS = ("direct", "fft")


@pytest.fixture(params=products.isas() or ("none",))
def isa(request):
    """Every instruction set that this machine runs."""
    products.native().select(request.param)
    yield request.param
    products.native().select(os.environ.get("DEEPTHIN_ISA", ""))


class Problem:
    """Layers, their operands and options; weights that neither vanish nor saturate all gates."""

    def __init__(
        self, rng, cell, steps, batch, inputs, hidden, layers=1, directions=1, n=7, rank=1, bias=True, offset=0
    ):
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        self.cell, self.directions = cell, directions
        self.x, self.h = draw(steps, batch, inputs), draw(layers * directions, batch, hidden)
        self.c = draw(*self.h.shape) if cell == "lstm" else None
        self.grad_y = draw(steps, batch, directions * hidden)
        self.gates, rows = [], gates_of(cell) * hidden
        for number in range(2 * layers * directions):
            cols = hidden if number % 2 else inputs if number < 2 * directions else directions * hidden
            own, start = (cols, 0) if n == "rank" else (n, min(offset, n - 1))
            m = -(-(start + rows * cols) // own)
            xf, wf = draw(m, rank), draw(rank, own) / np.sqrt(np.float32(rank * cols))
            shift = draw(rows) if bias else None
            if cell == "relu" and bias:  # far from the corner, on either side of it
                shift, wf = shift + 4 * np.sign(shift), wf / 8
            self.gates.append(Gate(Factor((rows, cols), own, rank), xf, wf, shift, start))

    def terms(self):
        """Those of the sums behind one output: of both products and the gates, in each step of each layer."""
        layers = len(self.gates) // 2 // self.directions
        return len(self.x) * layers * (sum(gate.method.shape[1] for gate in self.gates[-2:]) + self.x.shape[2] + 8)

    def run(self, **options):
        y, (h, c) = recurrent(self.cell, self.gates, self.x, (self.h, self.c), directions=self.directions, **options)
        return [y, h] if c is None else [y, h, c]

    def reference(self, gates=None, x=None, h=None, c=None):
        """In float64; with other operands instead, if they are given."""
        x, h, c = (own if given is None else given for given, own in ((x, self.x), (h, self.h), (c, self.c)))
        y, (h, c) = recurrent_reference(self.cell, gates or self.gates, x, (h, c), directions=self.directions)
        return [y, h] if c is None else [y, h, c]

    def gradients(self, **options):
        x, (h, c), gates = recurrent_gradients(
            self.cell, self.gates, self.x, (self.h, self.c), self.grad_y, directions=self.directions, **options
        )
        return [x, h, *([] if c is None else [c]), *(array for gate in gates for array in gate)]

    def operands(self):
        return [self.x, self.h, *([] if self.c is None else [self.c])] + [
            a for g in self.gates for a in (g.xf, g.wf, g.bias)
        ]

    def loss(self, operands):
        first = 2 if self.c is None else 3
        x, h, c = operands[0], operands[1], operands[2] if first == 3 else None
        gates = [
            gate._replace(xf=operands[at], wf=operands[at + 1], bias=operands[at + 2])
            for gate, at in zip(self.gates, range(first, len(operands), 3), strict=True)
        ]
        return (self.reference(gates, x, h, c)[0] * self.grad_y).sum()


def problems(count, seed):
    rng = np.random.default_rng(seed)
    for number in range(count):
        steps, batch = int(rng.integers(1, 9)), int(rng.choice([1, 1, 2, 3, 4, 5, 9, 16, 17, 33]))
        inputs, hidden = (int(v) for v in rng.integers(1, rng.choice([5, 40]), 2))
        layers, directions = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        n = "rank" if number % 7 == 0 else int(rng.integers(1, rng.choice([4, 60])))
        rank, offset = int(rng.choice([1, 2, 5])), int(rng.integers(0, 3)) if number % 2 else 0
        yield Problem(
            rng, CELLS[number % 4], steps, batch, inputs, hidden, layers, directions, n, rank, number % 3 > 0, offset
        )


@pytest.mark.parametrize("correlation", WAYS)
def test_layers_are_those_of_the_definition(isa, correlation):
    for problem in problems(120, seed=1):
        for got, want in zip(problem.run(correlation=correlation), problem.reference(), strict=True):
            assert got.shape == want.shape
            assert np.abs(got - want).max() <= bound(problem.terms(), max(1.0, np.abs(want).max())), (
                problem.cell,
                problem.gates[0].method,
            )


@pytest.mark.parametrize("correlation", WAYS)
def test_gradients_are_those_of_the_definition(isa, correlation):
    """Along random directions, by differences in float64."""
    rng = np.random.default_rng(2)
    for problem in problems(60, seed=3):
        if any(gate.bias is None for gate in problem.gates):
            continue
        operands = [operand.astype(np.float64) for operand in problem.operands()]
        for operand, grad in zip(range(len(operands)), problem.gradients(correlation=correlation), strict=True):
            direction, found = rng.standard_normal(operands[operand].shape), []
            for side in (1e-6, -1e-6):
                moved = list(operands)
                moved[operand] = operands[operand] + side * direction
                found.append(problem.loss(moved))
            want = (found[0] - found[1]) / 2e-6
            scale = np.linalg.norm(grad) * np.linalg.norm(direction) / np.sqrt(grad.size) + abs(want)
            # Terms there and back, over items; and the differences' own, of third order in their step of 1e-6.
            lost = bound(2 * problem.terms() + problem.x[..., 0].size, scale)
            assert abs((grad * direction).sum() - want) <= lost + 1e-5, (problem.cell, operand)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_a_sequence_in_pieces_is_the_whole_one_to_the_bit(isa, cell, batch):
    """Promise: frame by frame, with the states handed on, and in longer pieces."""
    problem = Problem(np.random.default_rng(4), cell, 40, batch, 30, 50, layers=2, n=17)
    whole = problem.run()
    for piece in (1, 7):
        states, found = (problem.h, problem.c), []
        for start in range(0, 40, piece):
            y, states = recurrent(cell, problem.gates, problem.x[start : start + piece], states)
            found.append(y)
        last = [s for s in states if s is not None]
        assert all(np.array_equal(a, b) for a, b in zip(whole, [np.concatenate(found), *last], strict=True))


def test_chunks_do_not_change_a_bit(isa):
    """So many numbers that gates are computed in several chunks, from the end on where a direction is turned round."""
    problem = Problem(np.random.default_rng(5), "lstm", 50, 16, 20, 128, directions=2, n=31)
    ahead, back = np.split(problem.run()[0], 2, axis=2)
    for gates, place, x, want in (
        (problem.gates[:2], 0, problem.x, ahead),
        (problem.gates[2:], 1, problem.x[::-1], back[::-1]),
    ):
        states = problem.h[place : place + 1], problem.c[place : place + 1]
        assert np.array_equal(recurrent("lstm", gates, x[:5], states)[0], want[:5])
        assert np.array_equal(recurrent("lstm", gates, x, states)[0], want)


def test_threads_do_not_change_a_bit(isa):
    for cell in CELLS:
        problem = Problem(np.random.default_rng(6), cell, 12, 40, 30, 33, layers=2, directions=2, n=11, rank=2)
        want = problem.run() + problem.gradients()
        for threads in (2, 5):
            again = problem.run(threads=threads) + problem.gradients(threads=threads)
            assert all(np.array_equal(a, b) for a, b in zip(want, again, strict=True))


def test_what_is_not_finite_stays_in_its_sequence(isa):
    for cell in CELLS:
        problem = Problem(np.random.default_rng(7), cell, 6, 19, 12, 20, n=5)
        clean = problem.run()
        problem.x[2, 3, 4] = np.nan
        problem.x[3, 7, 0] = np.inf
        found = problem.run()
        rest = [i for i in range(19) if i not in (3, 7)]
        assert np.isnan(found[0][2:, 3]).any()
        assert np.isfinite(found[0][:2, 3]).all()
        assert all(np.array_equal(a[:, rest], b[:, rest]) for a, b in zip(clean, found, strict=True))


@pytest.mark.parametrize("correlation", WAYS)
def test_outputs_of_a_phase_abreast(isa, correlation):
    """Sequences one by one, of factors whose phases fill tiles: evenly or not, and with lanes that no output has."""
    rng = np.random.default_rng(12)
    for number in range(60):
        cell, hidden = CELLS[number % 4], int(rng.integers(8, 50))
        n = int(rng.integers(8, max(9, gates_of(cell) * hidden // 2)))
        rank, offset = int(rng.choice([1, 1, 2, 5])), int(rng.integers(0, 3))
        problem = Problem(rng, cell, 4, int(rng.integers(1, 4)), 3, hidden, 1, 2, n, rank, number % 3 > 0, offset)
        for got, want in zip(problem.run(correlation=correlation), problem.reference(), strict=True):
            allowed = bound(problem.terms(), max(1.0, np.abs(want).max()))
            assert np.abs(got - want).max() <= allowed, problem.gates[1].method
        problem.x[1, 0, 0] = np.nan
        assert np.isnan(problem.run(correlation=correlation)[0][1:, 0, :hidden]).any()


def test_gates_that_are_shut_or_open():
    """Near zero and far from it; never beyond -1 and 1."""
    values = np.concatenate(
        [np.linspace(-0.5, 0.5, 2001), np.linspace(-100, 100, 2001), [np.inf, -np.inf, 1e-30, -1e-8]]
    )
    x = values.astype(np.float32)[:, None, None]
    gates = [
        Gate(Factor((1, 1), 1, 1), *np.float32([[[1]], [[1]]])),
        Gate(Factor((1, 1), 1, 1), *np.float32([[[0]], [[1]]])),
    ]
    y, _ = recurrent("tanh", gates, x, (np.zeros((1, 1, 1), np.float32), None), correlation="direct")
    want = np.tanh(x.astype(np.float64))
    assert (np.abs(y - want) <= bound(8, np.abs(want))).all()  # four units in the last place
    assert np.abs(y).max() <= 1
    assert np.isnan(recurrent("tanh", gates, x[:1] * np.nan, (np.zeros((1, 1, 1), np.float32), None))[0]).all()


def test_operands_that_do_not_go_together():
    problem = Problem(np.random.default_rng(8), "lstm", 3, 2, 4, 5)
    for change, reason in [
        (lambda p: setattr(p, "cell", "elman"), "must be one of"),
        (lambda p: setattr(p, "c", None), "c for an LSTM alone"),
        (lambda p: setattr(p, "h", p.h[:, :1]), "batch of x"),
        (lambda p: setattr(p, "gates", p.gates[:1]), "two for each"),
        (lambda p: setattr(p, "gates", [p.gates[0]._replace(xf=p.gates[0].xf[1:]), p.gates[1]]), "xf is float32"),
        (lambda p: setattr(p, "gates", p.gates[::-1]), "another shape than its layer"),
    ]:
        problem = Problem(np.random.default_rng(8), "lstm", 3, 2, 4, 5)
        change(problem)
        with pytest.raises(ValueError, match=reason):
            problem.run()


GUARDED = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
import test_recurrent_kernels as own
from deepthin.kernels import products
from guard_pages import KEPT, guarded
from deepthin.kernels.recurrent import _at, _numbers, _parts
products.native().select(sys.argv[1])
count = 0
for problem in own.problems(60, seed=9):
    for at_end in (True, False):
        x, h, grad_y = (guarded(a, at_end) for a in (problem.x, problem.h, problem.grad_y))
        c = None if problem.c is None else guarded(problem.c, at_end)
        gates = [g._replace(xf=guarded(g.xf, at_end), wf=guarded(g.wf, at_end),
                            bias=None if g.bias is None else guarded(g.bias, at_end)) for g in problem.gates]
        grads = [(guarded(g.xf, at_end), guarded(g.wf, at_end), guarded(np.zeros(g.method.shape[0], "f4"), at_end))
                 for g in gates]
        y, numbers = guarded(grad_y, at_end), _numbers(problem.cell, x, h, problem.directions)
        reserve = guarded(np.zeros(products.native().recurrent_reserve(*numbers[:3], *numbers[4:]), "f4"), at_end)
        grad_x, grad_h = guarded(x, at_end), guarded(h, at_end)
        grad_c = None if c is None else guarded(c, at_end)
        last, last_c = guarded(h, at_end), None if c is None else guarded(c, at_end)
        for way in own.WAYS:
            products.native().recurrent(*numbers, *_parts(gates, way), *_at(x, last, last_c, y), 0, 1)
            products.native().recurrent(*numbers, *_parts(gates, way), *_at(x, last, last_c, y, reserve), 1)
            products.native().recurrent_backward(*numbers, *_parts(gates, way, grads),
                                                *_at(x, h, c, y, reserve, grad_y, grad_x, grad_h, grad_c), 1)
            count += 1
    KEPT.clear()
print("untouched", count)
"""


@pytest.mark.parametrize("name", products.isas())
def test_nothing_is_touched_outside_the_arrays(name):
    """Promise 10: every array between pages that may be neither read nor written."""
    folder = os.path.dirname(__file__)
    shown = subprocess.run([sys.executable, "-c", GUARDED, name, folder], capture_output=True, text=True, check=False)
    assert shown.stdout.strip() == "untouched 240", shown.stderr


def test_memory_that_is_not_there_is_an_error_and_no_crash():
    problem = Problem(np.random.default_rng(10), "gru", 5, 4, 6, 7, layers=2, directions=2)
    want = problem.run() + problem.gradients()
    failures = 0
    for count in range(40):
        products.native().fail_allocation_after(count)
        try:
            problem.run()
            problem.gradients()
        except MemoryError:
            failures += 1
        finally:
            products.native().fail_allocation_after(-1)
    assert failures > 3
    assert all(np.array_equal(a, b) for a, b in zip(want, problem.run() + problem.gradients(), strict=True))
