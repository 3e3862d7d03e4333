"""The largest singular values and vectors of a matrix, at a cost that grows with their number.

Small matrices, and those of which many vectors are wanted: LAPACK's SVD. Narrow ones: the eigenvectors of the Gram
matrix. All others: block Lanczos with restarts (Golub, Luk and Overton, 1981; Musco and Musco, 2015, arXiv:1504.05477).
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from deepthin.coding.bits import splitmix
from deepthin.method import Array, Namespace

SMALL = 1 << 18  # entries: up to so many, LAPACK's SVD, whose results files of earlier versions hold
NARROW = 512  # the shorter side, at most, of what the Gram matrix is taken of, in double precision
_SPARE, _BLOCKS = 8, 6  # vectors in a block beyond those that are wanted; blocks until the space is reduced to one
_TOLERANCE, _STILL, _MOST_STEPS = 1e-5, 3, 200
_USUAL = 40  # binary orders of magnitude, above 1 and below, of weights whose squares can be added up
_PIECE = 1 << 20  # entries that are widened to double precision at once

Svd = tuple[Float[Array, "m kept"], Float[Array, " kept"], Float[Array, "kept n"]]
"""u, sigma and vt, as ``linalg.svd`` returns them."""


def leading(matrix: Float[Array, "m n"], count: int, xp: Namespace) -> Svd:
    """The ``count`` largest singular values, and their vectors.

    Deterministic. The iteration ends after a step that lowers the squared error of the truncated matrix by less than a
    hundred-thousandth; if none does, LAPACK's SVD is taken. It costs some ``30 m n count`` multiplications; memory,
    besides the matrix, is ``12 (m + n) count`` numbers.

    Args:
        matrix: Array, m x n, finite, of single or double precision.
        count: Number of singular values, >= 1.
        xp: The namespace of ``matrix``.

    Returns:
        u, m x kept; sigma, falling; vt, kept x n; with ``kept = min(count, m, n)``.
    """
    m, n = matrix.shape
    short = min(m, n)
    count = min(count, short)
    if m * n > SMALL:
        if xp.finfo(matrix.dtype).bits == 32 and short <= NARROW:
            return _signed(*_by_gram(matrix, count, xp), xp)
        if 4 * (count + _SPARE) <= short and (found := _by_lanczos(matrix, count, xp)) is not None:
            return _signed(*found, xp)
    u, sigma, vt = xp.linalg.svd(matrix, full_matrices=False)
    return u[:, :count], sigma[:count], vt[:count]


def tame(weight: Float[Array, "rows cols"], xp: Namespace) -> tuple[Float[Array, "rows cols"], float]:
    """A matrix whose squares neither overflow nor vanish.

    Args:
        weight: Array, rows x cols, finite.
        xp: The namespace of ``weight``.

    Returns:
        The matrix over the square of a power of two, and that power: 1 and the matrix itself if its largest magnitude
        is 0 or between 2^-40 and 2^40.
    """
    flat = xp.reshape(weight, (-1,))
    largest = max(float(xp.amax(flat, 0)), -float(xp.amin(flat, 0)))
    if largest == 0 or 2**-_USUAL <= largest <= 2**_USUAL:
        return weight, 1.0
    root = 2.0 ** round(math.log2(largest) / 2)
    return weight / root / root, root


def _signed(u: Any, sigma: Any, vt: Any, xp: Namespace) -> Svd:
    """The same with signs by which the entry of largest magnitude in each row of vt is positive."""
    signs = xp.where(xp.amax(vt, 1) < -xp.amin(vt, 1), -xp.ones_like(sigma), xp.ones_like(sigma))
    return u * signs, sigma, vt * signs[:, None]


def _by_gram(matrix: Any, count: int, xp: Namespace) -> Svd:
    """By the eigenvectors of the Gram matrix of the shorter side, in double precision.

    Its condition is that of the matrix squared, which double precision has room for where the matrix has single.
    """
    m, n = matrix.shape
    if m < n:
        u, sigma, vt = _by_gram(matrix.T, count, xp)
        return vt.T, sigma, u.T
    step = max(1, _PIECE // n)
    gram: Any = 0
    for first in range(0, m, step):
        rows = xp.asarray(matrix[first : first + step], dtype=xp.float64)
        gram = gram + xp.matmul(rows.T, rows)
    _, vectors = xp.linalg.eigh(gram)
    right = xp.asarray(vectors.T[-count:], dtype=matrix.dtype)[_falling(count)]
    left = xp.matmul(matrix, right.T)
    sigma = xp.sqrt(xp.sum(left * left, 0))
    return left / xp.where(sigma > 0, sigma, xp.ones_like(sigma)), sigma, right


def _falling(count: int) -> np.ndarray:
    """Indices that turn rising rows into falling ones; torch has no negative steps."""
    return np.arange(count - 1, -1, -1)


def _by_lanczos(matrix: Any, count: int, xp: Namespace) -> Svd | None:
    """Rayleigh and Ritz in the Krylov space of a block that is wider than what is wanted; None without convergence.

    A block of ``count`` vectors or more is not deceived by singular values that occur several times.
    """
    m, n = matrix.shape
    width = count + _SPARE
    most = min(_BLOCKS * width, n, m)
    whole, noise = _squares(matrix, xp), float(xp.finfo(matrix.dtype).eps) / 8
    basis = _orthonormal(_start(width, n, matrix, xp), None, xp)
    images, before, still = xp.matmul(basis, matrix.T), -math.inf, 0  # images of the basis, row by row
    for _ in range(_MOST_STEPS):
        wide = xp.asarray(images, dtype=xp.float64)
        values, vectors = xp.linalg.eigh(xp.matmul(wide, wide.T))
        captured = float(xp.sum(values[-count:], 0))
        gain, before = captured - before, captured
        still = still + 1 if gain <= noise * whole else 0  # too little to be told from rounding
        best = xp.asarray(vectors.T[-width:], dtype=matrix.dtype)
        left = xp.matmul(best, images)
        block = _orthonormal(xp.matmul(left, matrix), basis, xp)
        if not len(block) or still == _STILL or noise * whole < gain <= _TOLERANCE * (whole - captured):
            q, r = xp.linalg.qr(images.T)
            inner, sigma, turned = xp.linalg.svd(r, full_matrices=False)
            return xp.matmul(q, inner[:, :count]), sigma[:count], xp.matmul(turned[:count], basis)
        if len(basis) + width > most:
            basis, images = xp.matmul(best, basis), left
        basis = xp.concatenate([basis, block])
        images = xp.concatenate([images, xp.matmul(block, matrix.T)])
    return None


def _start(width: int, n: int, like: Any, xp: Namespace) -> Any:
    """The first block: signs drawn from a fixed seed, width x n."""
    signs = (splitmix(0, width * n) & np.uint64(1)).astype(np.float32).reshape(width, n)
    return xp.asarray(2 * signs - 1, dtype=like.dtype) + 0 * like[:1]  # on its device


def _orthonormal(rows: Any, basis: Any, xp: Namespace) -> Any:
    """An orthonormal basis of what rows add to an orthonormal basis: fewer rows where some add nothing."""
    size = xp.sqrt(xp.sum(rows * rows, 1))[:, None]
    rows, least = rows / xp.where(size > 0, size, xp.ones_like(size)), (16 * float(xp.finfo(rows.dtype).eps)) ** 2
    for _ in range(2):  # "twice is enough" (Parlett, 1980, "The symmetric eigenvalue problem", section 6.9)
        if basis is not None:
            rows = rows - xp.matmul(xp.matmul(rows, basis.T), basis)
        wide = xp.asarray(rows, dtype=xp.float64)
        values, vectors = xp.linalg.eigh(xp.matmul(wide, wide.T))
        new = values > least
        rows, least = xp.matmul(xp.asarray((vectors[:, new] / xp.sqrt(values[new])).T, dtype=rows.dtype), rows), 0.25
        if not len(rows):
            break
    return rows


def _squares(matrix: Any, xp: Namespace) -> float:
    """The sum of squares."""
    step, total = max(1, _PIECE // matrix.shape[1]), 0.0
    for first in range(0, matrix.shape[0], step):
        rows = xp.asarray(matrix[first : first + step], dtype=xp.float64)
        total += float((rows * rows).sum())
    return total
