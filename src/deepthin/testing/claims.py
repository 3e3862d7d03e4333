"""What a method claims beyond what all methods obey: how exact its arithmetic is, what its encode and init guarantee.

Each number is derived from the method's definition; the derivation is beside it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepthin.method import Code, Method
from deepthin.methods.plus import PREFIX, SMALL

_NUMPY: Any = np


def floats_of(method: Method) -> int:
    """The number of floats of a code.

    Args:
        method: The plan.

    Returns:
        All entries of its code that are not integers.
    """
    integers = method.integers()
    return sum(math.prod(shape) for entry, shape in method.code_shapes().items() if entry not in integers)


def magnitudes(method: Method, code: Code) -> np.ndarray:
    """The decoded weight with every number of the code replaced by its absolute value: the scale of rounding errors.

    Args:
        method: The plan.
        code: Its code.

    Returns:
        Rows x cols, >= 0.
    """
    absolute = {entry: abs(np.asarray(array)) for entry, array in code.items()}
    return abs(method.decode({**code, **absolute, **method.derived()}, _NUMPY))


def no_spread(method: Method) -> float:
    """The spread of a method whose ``init`` scales the decoded weight, so that its mean square is equal in every draw.

    Args:
        method: The plan.

    Returns:
        0.
    """
    return 0.0


@dataclass(frozen=True)
class Claims:
    """What the laws ask of one method beyond what all methods obey.

    Attributes:
        options: Keyword arguments of ``fit``; every example takes one of these mappings.
        roundings: An upper bound on the number of roundings that an entry of the decoded weight takes. By default as
            many as the code has floats, and two.
        magnitudes: Of a method and a float64 code: for each weight the sum of the absolute values of the terms that
            are added. By default the weight decoded from absolute values, right for sums of products.
        distance: Of a method and a weight that a code decodes to: an upper bound of the relative error (Frobenius norm)
            of encoding it. By default 1e-9: ``encode`` projects, so that a decoded weight is encoded exactly.
        nested: Whether codes of a larger size can represent all that smaller ones can and ``encode`` finds the best of
            them, so that no error grows with the budget. By default it need not grow where the budget is four times as
            large, averaged over four weights.
        spread: Of a method: an upper bound of the variance of the mean square of a weight that ``init`` draws, over the
            square of its expectation. By default 0: ``init`` scales each draw.
        agreement: Of a method: an upper bound of the relative difference between the errors of NumPy's and torch's
            codes of one weight. By default 1e-6, as singular values may tie; more where rounding decides between
            several optima.
        largest: Upper bound on rows and on columns of an example; smaller where ``encode`` is slow.
    """

    options: Sequence[Mapping[str, Any]] = ({},)
    roundings: Callable[[Any], int] = lambda method: floats_of(method) + 2
    magnitudes: Callable[[Any, Code], np.ndarray] = magnitudes
    distance: Callable[[Any, np.ndarray], float] = lambda method, weight: 1e-9
    nested: bool = False
    spread: Callable[[Any], float] = no_spread
    agreement: Callable[[Any], float] = lambda method: 1e-6
    largest: int = 40


def chain_spread(sides: Sequence[int], ranks: Sequence[int], weights: int) -> float:
    """The variance of the mean square of a chain of normal factors, over the square of its expectation.

    An entry of the chain is ``g1[i1] G2[i2] .. gd[id]`` with ``G_k[i]`` an r_(k-1) x r_k matrix of independent normal
    numbers; i_k goes over ``sides[k]`` values. For two entries, with v and v' the products of the first k matrices, let
    p = E |v|^2 |v'|^2 and q = E (v . v')^2, both over what p would be if squares were independent. The next matrix is
    the same for both with probability 1 / side: p' = p + 2 q / r and q' = q (1 + 1 / r) + p / r, where r = r_k; else
    p' = p and q' = p / r. In the end p - 1 is the variance sought. Cutting the chain's entries to ``weights`` of them
    multiplies it by (entries / weights)^2 at most. Scaling each factor to an exact root mean square lowers it: the
    scale of normal numbers is independent of their direction (Basu, 1955).

    Args:
        sides: The number of values of each index.
        ranks: r_1 to r_d; the last is 1.
        weights: Entries of the chain that are used.

    Returns:
        An upper bound.
    """
    p, q = 1.0, 1.0
    for side, rank in zip(sides, ranks, strict=True):
        same = 1 / side
        p, q = p + same * 2 * q / rank, p / rank + same * q * (1 + 1 / rank)
    return (p - 1) * (math.prod(sides) / weights) ** 2


def _hashed_spread(method: Any) -> float:
    """The variance of ``sum over buckets of fraction * value^2``, whose squares have the mean 1 in each draw.

    Exchangeable squares of a fixed sum have the variance v, and -v / (buckets - 1) as covariance; v < 2, which is that
    of normal numbers, whose tails are longer than the uniform ones'.
    """
    if method.buckets == 1:
        return 0.0
    counts = np.bincount(method.derived()["index"] % method.buckets, minlength=method.buckets)
    fractions = counts / math.prod(method.shape)
    return 2 * method.buckets / (method.buckets - 1) * float(((fractions - 1 / method.buckets) ** 2).sum())


def _factor_distance(method: Any, weight: np.ndarray) -> float:
    """Exact, but for the last row: its coefficients come from its tail alone, so a singular tail magnifies rounding."""
    tail = weight.size % method.n
    if tail < method.rank or not np.any(weight):
        return 1e-12
    return 1e-12 * max(1.0, float(np.linalg.cond(method.encode(weight, np)["wf"][:, :tail])))


def _kronecker_distance(method: Any, weight: np.ndarray) -> float:
    """Exact without surplus entries; else the ``terms`` largest of k singular values have terms / k of the squares.

    Surplus entries are encoded as zeros, which gives a nearby matrix, not the same.
    """
    sides = math.prod(method.left), math.prod(method.right)
    if (method.left[0] * method.right[0], method.left[1] * method.right[1]) == method.shape:
        return 1e-12
    return math.sqrt(1 - min(1, method.terms / min(sides))) + 1e-12


def _train_distance(method: Any, weight: np.ndarray) -> float:
    """As of a Kronecker sum: an SVD that keeps a fraction of the singular values keeps at least that of the squares.

    1e-9, since the SVDs come one after the other, and the last takes what the first have rounded.
    """
    if (math.prod(method.rows), math.prod(method.cols)) == method.shape:
        return 1e-9
    fraction, ranks = 1.0, method.ranks
    rest = math.prod(method.rows) * math.prod(method.cols)
    for k, (r, q) in enumerate(zip(method.rows[:-1], method.cols[:-1], strict=True)):
        rest //= r * q
        fraction *= min(1, ranks[k + 1] / min(ranks[k] * r * q, rest))
    return math.sqrt(1 - fraction) + 1e-9


def _binary_distance(method: Any, weight: np.ndarray) -> float:
    """The error of one plane: further planes and optimal scales only lower it. A single plane is encoded exactly."""
    rows = weight if method.per == "row" else weight.reshape(1, -1)
    if method.planes == 1:
        return 1e-12
    sizes = abs(rows)
    return float(np.linalg.norm(sizes - sizes.mean(1)[:, None]) / max(np.linalg.norm(weight), 1e-300)) + 1e-12


def _binary_magnitudes(method: Any, code: Code) -> np.ndarray:
    return np.broadcast_to(abs(np.asarray(code["scales"])).sum(1)[:, None], method.shape)


def _factor_spread(method: Any) -> float:
    return chain_spread((method.m, method.n), (method.rank, 1), math.prod(method.shape))


CLAIMS: dict[str, Claims] = {
    "deepthin": Claims(
        ({}, {"rank": 2}, {"rank": "max"}), lambda m: m.rank + 2, distance=_factor_distance, spread=_factor_spread
    ),
    "shuffled": Claims(
        ({}, {"rank": 3}, {"rank": "max"}), lambda m: m.rank + 2, distance=_factor_distance, spread=_factor_spread
    ),
    "rank": Claims(
        ({}, {"rank": 2}), lambda m: m.rank + 2, distance=_factor_distance, nested=True, spread=_factor_spread
    ),
    "hashed": Claims(({}, {"seed": 5}), lambda m: 1, distance=lambda m, w: 1e-12, spread=_hashed_spread),
    "pruned": Claims(({}, {"balance": 3}), lambda m: 1, distance=lambda m, w: 1e-12, nested=True),
    "kronecker": Claims(
        roundings=lambda m: m.terms + 2,
        distance=_kronecker_distance,
        nested=True,
        spread=lambda m: chain_spread((math.prod(m.left), math.prod(m.right)), (m.terms, 1), math.prod(m.shape)),
    ),
    "tensor-train": Claims(
        ({}, {"order": 2}, {"order": 4}),
        lambda m: sum(m.ranks) + 2 * len(m.rows),
        distance=_train_distance,
        spread=lambda m: chain_spread(
            [r * q for r, q in zip(m.rows, m.cols, strict=True)], m.ranks[1:], math.prod(m.shape)
        ),
    ),
    "uniform": Claims(
        ({}, {"bits": 3}, {"per": "row"}, {"bits": 4, "affine": True}, {"per": "row", "affine": True}),
        lambda m: 3,
        distance=lambda m, w: 1e-6,  # the step is computed from the largest entry, which is rounded
    ),
    "coded": Claims(({}, {"bits": 3}), lambda m: 3, distance=lambda m, w: 1e-6),  # as uniform
    "kmeans": Claims(
        ({}, {"bits": 3}, {"bits": 1}, {"start": "density"}, {"start": "random", "seed": 3}),
        lambda m: 1,
        distance=lambda m, w: 1e-12,
    ),
    "ecsq": Claims(({}, {"bits": 3}, {"bits": 1}, {"bits": 1.5, "levels": 5}), lambda m: 1, largest=12),
    "binary": Claims(
        ({}, {"bits": 2}, {"rounds": 0}, {"rounds": 1}, {"bits": 3, "rounds": 5, "per": "matrix"}),
        lambda m: m.planes + 1,
        _binary_magnitudes,
        _binary_distance,
        # Alternating rounds go to a local optimum; rounding decides to which, where least squares has many solutions.
        agreement=lambda m: 1.0 if m.rounds > 1 and m.planes > 1 else 1e-6,
    ),
}
"""The claims of every method of ``METHODS``."""


def claims_of_sum(first: Claims, second: Claims) -> Claims:
    """The claims of a sum of two codes (``deepthin.methods.plus``).

    Encoding a sum again first encodes all of it by the first method, which leaves at most what it was if it projects;
    the second one lowers that. The mean square of ``F + S`` has the variances of both, in proportion to their fourth
    powers, and four times that of the mean of ``F S``: of uncorrelated entries ``F``, the squares of both spreads over
    the number of weights.

    Args:
        first: Claims of the first method.
        second: Claims of the second.

    Returns:
        Those of their sum, with the options that both have by default.
    """

    def sizes(method: Any, code: Code) -> np.ndarray:
        own = {entry: array for entry, array in code.items() if not entry.startswith(PREFIX)}
        added = {e.removeprefix(PREFIX): array for e, array in code.items() if e.startswith(PREFIX)}
        return first.magnitudes(method.first, own) + second.magnitudes(method.second, added)

    def spread(method: Any) -> float:
        small, weights = SMALL**2, math.prod(method.shape)
        one, other = first.spread(method.first), second.spread(method.second)
        return (1 - small) ** 2 * one + small**2 * other + 4 * small * (1 - small) / weights

    return Claims(
        roundings=lambda m: first.roundings(m.first) + second.roundings(m.second) + 1,
        magnitudes=sizes,
        distance=lambda m, weight: 1 + 1e-6,
        spread=spread,
        agreement=lambda m: max(first.agreement(m.first), second.agreement(m.second)),
        largest=min(first.largest, second.largest),
    )


INNER: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("uniform", {"bits": 8}),
    ("uniform", {"bits": 3, "per": "row"}),
    ("uniform", {"bits": 4, "affine": True}),
    ("kmeans", {"bits": 5}),
    ("kmeans", {"bits": 2, "start": "density"}),
    ("ecsq", {"bits": 2.5}),
    ("binary", {"bits": 2}),
    ("binary", {"bits": 3, "rounds": 0, "per": "matrix"}),
)
"""Methods, with options, that may store the floats of another one."""
