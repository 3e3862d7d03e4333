"""Native convolutions of two factors, against sums over windows in double precision. Needs no torch."""

import itertools
import math
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepthin.kernels import products
from tolerance import bound

pytestmark = pytest.mark.skipif(not products.native_available, reason="native code is not there")


class Problem(NamedTuple):
    """A convolution; the factors' product holds its kernel from entry ``offset`` on."""

    batch: int
    inputs: int
    outputs: int
    groups: int
    size: tuple
    kernel: tuple
    stride: tuple
    dilation: tuple
    padding: tuple
    n: int
    rank: int
    offset: int

    @property
    def cols(self):
        return self.inputs // self.groups * math.prod(self.kernel)

    @property
    def sides(self):
        axes = zip(self.size, self.kernel, self.stride, self.dilation, self.padding, strict=True)
        return tuple((points + 2 * pad - gap * (taps - 1) - 1) // step + 1 for points, taps, step, gap, pad in axes)

    def numbers(self):
        axes = zip(self.size, self.kernel, self.stride, self.dilation, self.padding, self.padding, strict=True)
        missing = [1, 1, 1, 1, 0, 0] * (3 - len(self.size))
        head = [self.batch, self.inputs, self.outputs, self.groups, self.n, self.rank, self.offset]
        return [*head, *missing, *itertools.chain.from_iterable(axes)]

    def draw(self, rng):
        """x, xf, wf, bias, and the gradient of the outputs."""
        m = -(-(self.offset + self.outputs * self.cols) // self.n)
        shapes = [(self.batch, self.inputs, *self.size), (m, self.rank), (self.rank, self.n), (self.outputs,)]
        return [rng.standard_normal(shape).astype("f4") for shape in [*shapes, (self.batch, self.outputs, *self.sides)]]

    def windows(self, x):
        """Positions x groups x cols, and for each of these entries its place in the padded images."""
        padded = np.pad(x, [(0, 0), (0, 0), *((pad, pad) for pad in self.padding)])
        places = np.arange(padded.size).reshape(padded.shape)
        taps = itertools.product(*map(range, self.kernel))
        cut = [
            places[
                (
                    ...,
                    *(
                        slice(gap * tap, gap * tap + step * (side - 1) + 1, step)
                        for tap, gap, step, side in zip(at, self.dilation, self.stride, self.sides, strict=True)
                    ),
                )
            ]
            for at in taps
        ]
        stacked = np.moveaxis(np.stack(cut, 2).reshape(self.batch, self.groups, self.cols, -1), 3, 1)
        return padded.reshape(-1)[stacked], stacked, padded.shape

    def reference(self, x, xf, wf, bias, grad):
        """y and the gradients of x, xf and wf, in double precision."""
        x, xf, wf, bias, grad = (t.astype("f8") for t in (x, xf, wf, bias, grad))
        rows = self.outputs // self.groups
        entries = slice(self.offset, self.offset + self.outputs * self.cols)
        kernel = (xf @ wf).reshape(-1)[entries].reshape(self.groups, rows, self.cols)
        windows, places, shape = self.windows(x)
        y = np.einsum("grq,bpgq->bgrp", kernel, windows).reshape(grad.shape)
        outer = grad.reshape(self.batch, self.groups, rows, -1)
        whole = np.zeros(xf.shape[0] * wf.shape[1])
        whole[entries] = np.einsum("bgrp,bpgq->grq", outer, windows).reshape(-1)
        whole = whole.reshape(len(xf), -1)
        back = np.zeros(math.prod(shape))
        np.add.at(back, places, np.einsum("grq,bgrp->bpgq", kernel, outer))
        inner = tuple(slice(pad, pad + points) for pad, points in zip(self.padding, self.size, strict=True))
        return (
            y + bias.reshape(-1, *[1] * len(self.size)),
            back.reshape(shape)[(..., *inner)],
            whole @ wf.T,
            xf.T @ whole,
        )

    def run(self, operands, fft, threads=1):
        """The same by native code."""
        x, xf, wf, bias, grad = operands
        y, grads = np.full_like(grad, np.nan), [np.full_like(t, np.nan) for t in (x, xf, wf)]
        at = [t.ctypes.data for t in (x, xf, wf)]
        products.native().convolve(self.numbers(), *at, bias.ctypes.data, y.ctypes.data, fft, 1.0, threads)
        made = [t.ctypes.data for t in grads]
        products.native().convolve_backward(self.numbers(), *at, grad.ctypes.data, *made, fft, threads)
        return y, *grads


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3), groups=st.sampled_from([1, 1, 2, 3]), seed=st.integers(0, 99))
def test_any_geometry_forward_and_backward(data, dims, groups, seed):
    draw = data.draw

    def sides(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    inputs, outputs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 18))
    kernel, stride, dilation, padding = sides(1, 4), sides(1, 3), sides(1, 2), sides(0, 2)
    size = tuple(gap * (taps - 1) + extra for gap, taps, extra in zip(dilation, kernel, sides(1, 11), strict=True))
    cols = inputs // groups * math.prod(kernel)
    n = draw(st.one_of(st.integers(1, cols + 4), st.just(cols)))
    offset, rank, batch = (
        0 if n == cols else draw(st.integers(0, n - 1)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
    )
    problem = Problem(batch, inputs, outputs, groups, size, kernel, stride, dilation, padding, n, rank, offset)
    operands = problem.draw(np.random.default_rng(seed))
    want, sums = problem.reference(*operands), problem.reference(*map(abs, operands))
    positions = batch * math.prod(problem.sides)
    # Of a gradient: the outputs of all positions; each kernel's entry; by FFT errors go by the largest of a window.
    terms = [cols + rank, outputs * math.prod(kernel) + rank, outputs * positions + cols, outputs * positions + cols]
    for fft, threads in ((False, 1), (True, 2)):
        for got, one, most, count in zip(problem.run(operands, fft, threads), want, sums, terms, strict=True):
            assert (abs(got - one) <= bound(count + 200, most.max())).all()


@pytest.mark.parametrize("fft", [False, True])
def test_many_channels_are_taken_in_pieces(fft):
    problem = Problem(2, 1430, 6, 2, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 101, 2, 7)
    operands = problem.draw(np.random.default_rng(0))
    want, sums = problem.reference(*operands), problem.reference(*map(abs, operands))
    for got, one, most in zip(problem.run(operands, fft), want, sums, strict=True):
        assert (abs(got - one) <= bound(problem.cols + 200, most.max())).all()


@pytest.mark.parametrize("fft", [False, True])
def test_results_do_not_depend_on_threads(fft):
    problem = Problem(9, 6, 40, 1, (12, 12), (3, 3), (1, 1), (1, 1), (1, 1), 11, 2, 0)
    operands = problem.draw(np.random.default_rng(0))
    first = problem.run(operands, fft, 1)
    for threads in (2, 3):
        for one, other in zip(problem.run(operands, fft, threads), first, strict=True):
            assert np.array_equal(one, other)


def test_a_lack_of_memory_and_impossible_sizes_are_exceptions():
    problem = Problem(1, 3, 16, 1, (8, 8), (3, 3), (1, 1), (1, 1), (0, 0), 5, 1, 0)
    operands = problem.draw(np.random.default_rng(0))
    for count in (0, 1):
        products.native().fail_allocation_after(count)
        with pytest.raises(MemoryError):
            problem.run(operands, False)
        products.native().fail_allocation_after(-1)
    for wrong in ({"groups": 2}, {"kernel": (9, 3)}, {"stride": (0, 1)}, {"offset": 5}, {"size": (1 << 30, 8)}):
        with pytest.raises(ValueError, match="no possible sizes"):
            products.native().convolve(problem._replace(**wrong).numbers(), 0, 0, 0, 0, 0, False, 1.0, 1)


GUARDED = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from deepthin.kernels import products
from guard_pages import guarded
from test_convolution_kernels import Problem

products.native().select(sys.argv[1])
count = 0
for given in [
    (1, 3, 20, 1, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), 5, 1, 0),
    (3, 4, 6, 2, (7, 5), (2, 3), (2, 1), (1, 1), (0, 0), 11, 2, 3),
    (2, 2, 33, 1, (40,), (7,), (3,), (2,), (2,), 14, 1, 0),
    (5, 1, 4, 1, (3, 3, 3), (3, 3, 3), (1, 1, 1), (1, 1, 1), (0, 0, 0), 8, 3, 0),
]:
    problem = Problem(*given)
    for at_end, fft in itertools.product((True, False), (True, False)):
        drawn = problem.draw(np.random.default_rng(0))
        x, xf, wf, bias, grad = (guarded(one, at_end) for one in drawn)
        y, gx, gxf, gwf = (guarded(one, at_end) for one in (drawn[4], *drawn[:3]))
        at = lambda *arrays: [a.ctypes.data for a in arrays]
        products.native().convolve(problem.numbers(), *at(x, xf, wf, bias, y), fft, 1.0, 1)
        products.native().convolve_backward(problem.numbers(), *at(x, xf, wf, grad, gx, gxf, gwf), fft, 1)
        count += 2
print("untouched", count)
"""


def guarded_run(code, name):
    folder = str(__file__).rpartition("/")[0]
    return subprocess.run([sys.executable, "-c", code, name, folder], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", products.isas())
def test_nothing_is_touched_outside_the_arrays(name):
    """Every array between pages that may be neither read nor written."""
    shown = guarded_run(GUARDED, name)
    assert shown.stdout.strip() == "untouched 32", shown.stderr


def test_the_guard_pages_do_guard():
    """The test above can fail: images with one more row are read past their end."""
    broken = GUARDED.replace("problem.numbers()", "problem._replace(size=(41, *given[4][1:])).numbers()")
    assert guarded_run(broken, products.isas()[0]).returncode != 0
