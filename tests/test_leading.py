"""Singular vectors of which few are kept against LAPACK's SVD, and the memory that encoding takes."""

import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from deepthin.coding import bits
from deepthin.methods import METHODS
from deepthin.methods.leading import SMALL, leading, tame
from deepthin.methods.lloyd import Numbers

XP = cast(Any, np)


def normal(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, cols))


CASES = {
    "normal": normal(700, 800),
    "tall": normal(3000, 150),
    "wide": normal(150, 3000),
    "falling": normal(700, 700) * np.exp(-np.arange(700) / 20),
    "one row counts": normal(600, 600) * np.where(np.arange(600) == 3, 1e4, 1)[:, None],
    "repeated values": np.kron(np.eye(40), normal(16, 16)),
    "low rank": normal(700, 5) @ normal(5, 600),
    "zero": np.zeros((600, 600)),
    "ones": np.ones((600, 600)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_leading_vectors_are_as_good_as_those_of_the_whole_svd(name, kind):
    matrix, eps = CASES[name].astype(kind), np.finfo(kind).eps
    assert matrix.size > SMALL
    norm = np.linalg.norm(matrix.astype("f8"))
    every = np.linalg.svd(matrix.astype("f8"), compute_uv=False)
    for count in (1, 12, 30):
        u, sigma, vt = leading(matrix, count, XP)
        assert (u.shape, sigma.shape, vt.shape) == ((len(matrix), count), (count,), (count, matrix.shape[1]))
        assert u.dtype == sigma.dtype == vt.dtype == matrix.dtype
        error = np.linalg.norm(matrix - (u.astype("f8") * sigma) @ vt)
        assert error <= np.sqrt((every[count:] ** 2).sum()) * (1 + 1e-4) + 32 * eps * norm
        assert (np.diff(sigma) <= 32 * eps * norm).all()
        assert np.abs(vt @ vt.T - np.eye(count)).max() < 64 * eps


def test_leading_vectors_are_the_same_each_time_and_in_torch():
    matrix = CASES["falling"].astype("f4")
    first, again = leading(matrix, 8, XP), leading(matrix.copy(), 8, XP)
    theirs = leading(torch.from_numpy(matrix), 8, cast(Any, torch))
    for one, other, third in zip(first, again, theirs, strict=True):
        assert (one == other).all()
        assert np.abs(one - third.numpy()).max() < 1e-3 * np.abs(one).max()
    largest = np.take_along_axis(first[2], np.abs(first[2]).argmax(1)[:, None], 1)
    assert (largest > 0).all()


def test_small_matrices_have_the_svd_of_lapack():
    matrix = normal(512, 512).astype("f4")
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    found = leading(matrix, 3, XP)
    for one, other in zip(found, (u[:, :3], sigma[:3], vt[:3]), strict=True):
        assert (one == other).all()


def test_a_tamed_matrix_is_exact():
    for size in (1e-44, 1e-30, 1.0, 1e30, 3e38):
        matrix = (normal(4, 5).clip(-1, 1) * size).astype("f4")
        made, root = tame(matrix, XP)
        assert np.isfinite(made * made).all()
        assert (made * made).max() > 0
        assert (made.astype("f8") * root * root == matrix).all()
        assert (made is matrix) == (size == 1.0)


LARGE = {
    "deepthin": {}, "shuffled": {}, "rank": {}, "hashed": {}, "pruned": {}, "kronecker": {}, "tensor-train": {},
    "uniform": {"bits": 8}, "kmeans": {"bits": 4}, "ecsq": {"bits": 2}, "binary": {"bits": 2},
    "coded": {"bits": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_encoding_takes_at_most_four_times_the_matrix(name):
    assert LARGE.keys() == METHODS.keys()
    shape = (1536, 1536)
    weight = normal(*shape).astype("f4")
    budget = int(0.01 * 32 * weight.size) if not LARGE[name] else 64 * weight.size
    method = METHODS[name].fit(shape, budget, **LARGE[name])
    tracemalloc.start()
    try:
        method.encode(weight, XP)
        assert tracemalloc.get_traced_memory()[1] <= 4 * weight.nbytes
    finally:
        tracemalloc.stop()


def test_what_was_sorted_is_freed_at_once():
    """Without a cycle of references, for which it would wait."""
    numbers = Numbers.of(normal(40, 50).reshape(-1))
    assert numbers.classes[0] is numbers
    gone = weakref.ref(numbers)
    del numbers
    assert gone() is None


BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "encoding.py"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what a process holds")
@pytest.mark.parametrize("name", LARGE)
def test_compressing_takes_hardly_more(name):
    """With the report, for which codes are serialised: 4.1 for 8 bits arithmetically coded, and for a permutation."""
    words = ("--sizes", "2048", "--calls", "compress", "--methods", name)
    shown = subprocess.run([sys.executable, BENCHMARK, *words], check=True, capture_output=True, text=True).stdout
    assert float(shown.splitlines()[1].split()[-2]) <= 4.25


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 2 * bits.PIECE + 3])
@pytest.mark.parametrize("seed", [0, -5, 1 << 70])
def test_permutations_sort_the_words(seed, count):
    assert (bits.permutation(seed, count) == np.argsort(bits.splitmix(seed, count), kind="stable")).all()


def test_words_that_differ_late_are_sorted_too(monkeypatch):
    mixed = bits._mixed
    for left in (40, 63):
        monkeypatch.setattr(bits, "_mixed", lambda seed, at, left=left: mixed(seed, at) >> np.uint64(left))
        words = bits.splitmix(3, 50_000)
        assert (bits.permutation(3, 50_000) == np.argsort(words, kind="stable")).all()
