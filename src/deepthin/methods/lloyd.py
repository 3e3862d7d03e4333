"""Lloyd's algorithm for scalars: few centres for many numbers, plain, weighted, or with a bound on the entropy.

Lloyd, 1982, "Least squares quantization in PCM"; weights and the entropy as in Choi, El-Khamy and Lee, 2017,
arXiv:1612.01543. The numbers are sorted once: a cell is then a range, and its sums are differences of cumulative sums,
so that a round takes ``levels * log(count)`` steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64

from deepthin.coding.bits import permutation

STARTS = ("linear", "density", "random")
ROUNDS, PRICED_ROUNDS = 10_000, 100  # upper bounds
_FEW = 64  # distinct importances, at most, that are searched one by one
_FINENESS, _OCTAVES = 3, 20  # classes of importance: so many per doubling, and so many doublings
_GROWTH, _MOST_GROWTHS, _NARROWING = 4.0, 30, 8  # growth of lambda until the entropy is low enough, then bisections


@dataclass(frozen=True)
class Numbers:
    """Numbers in rising order, and the weight of each one's squared error: its importance, 1 if ``unweighted``."""

    values: Float64[np.ndarray, "count"]
    importance: Float64[np.ndarray, "count"]
    order: Int64[np.ndarray, "count"]  # index of each number in the input
    unweighted: bool

    @classmethod
    def of(
        cls, flat: Float64[np.ndarray, "count"], importance: Float64[np.ndarray, "count"] | None = None
    ) -> "Numbers":
        """Sort the numbers.

        Args:
            flat: The numbers, finite.
            importance: Weight of each squared error, >= 0. None, or zeros only, weighs all equally.

        Returns:
            The sorted numbers; equal ones keep their order.
        """
        order = np.argsort(flat, kind="stable")
        unweighted = importance is None or not (importance > 0).any()
        sorted_importance = np.ones(len(flat)) if importance is None or unweighted else importance[order]
        return cls(flat[order], sorted_importance, order, unweighted)

    @cached_property
    def classes(self) -> "list[Numbers]":
        """The numbers of each distinct importance, ``order`` indexing into these; empty above 64 distinct ones."""
        if self.unweighted:
            return [Numbers(self.values, self.importance, np.arange(len(self.values)), True)]
        if len(different := np.unique(self.importance)) > _FEW:
            return []
        places = [np.flatnonzero(self.importance == value) for value in different]
        return [Numbers(self.values[p], self.importance[p], p, True) for p in places]

    def coarse(self) -> "Numbers":
        """Replace importances that differ by less than about a quarter by the mean of their class.

        Returns:
            The same numbers, with some 60 distinct importances at most; those below a millionth of the largest form
            one class.
        """
        top = float(self.importance.max())
        near = np.ones(len(self.importance))
        there = self.importance > 0
        near[there] = np.round(_FINENESS * np.maximum(np.log2(self.importance[there] / top), -_OCTAVES))
        _, class_of = np.unique(near, return_inverse=True)
        means = np.bincount(class_of, self.importance) / np.bincount(class_of)
        return Numbers(self.values, means[class_of], self.order, self.unweighted)

    @cached_property
    def sums(self) -> Float64[np.ndarray, "2 ends"]:
        """Cumulative sums, up to each index, of importance and of importance times values."""
        return np.stack(
            [np.concatenate([[0.0], np.cumsum(t)]) for t in (self.importance, self.importance * self.values)]
        )

    def ends(self, bounds: Float64[np.ndarray, "inner"]) -> Int64[np.ndarray, "ends"]:
        """The cells between bounds, as indices.

        Args:
            bounds: Upper bounds of all cells but the last, rising; a number on a bound belongs to the upper cell.

        Returns:
            The first index of each cell, then the number of numbers.
        """
        inner = np.searchsorted(self.values, bounds, side="left")
        return np.concatenate([[0], inner, [len(self.values)]])

    def means(
        self, ends: Int64[np.ndarray, "ends"], empty: Float64[np.ndarray, "cells"]
    ) -> Float64[np.ndarray, "cells"]:
        """The weighted mean of each cell.

        Args:
            ends: Cell bounds, as ``ends`` returns them.
            empty: For each cell, the value to use where its importance sums to 0.

        Returns:
            The means, rising.
        """
        mass, first = self.masses(ends[:-1], ends[1:])
        return np.sort(np.where(mass > 0, first / np.where(mass > 0, mass, 1), empty))

    def masses(
        self, starts: Int64[np.ndarray, "cells"], stops: Int64[np.ndarray, "cells"]
    ) -> Float64[np.ndarray, "2 cells"]:
        """The sums over each cell.

        Args:
            starts: First index of each cell.
            stops: Index after the last of each cell.

        Returns:
            Importance, and importance times values, summed over each cell: 2 x cells.
        """
        return self.sums[:, stops] - self.sums[:, starts]

    def error(self, centres: Float64[np.ndarray, "cells"]) -> float:
        """The weighted squared error.

        Args:
            centres: Rising centres.

        Returns:
            The sum of importance times squared distances to the nearest centre.
        """
        nearest = np.searchsorted(midpoints(centres), self.values, side="right")
        return float(np.sum(self.importance * (self.values - centres[nearest]) ** 2))

    def distinct(self) -> Float64[np.ndarray, "distinct"]:
        """The distinct values.

        Returns:
            The values without repetitions, rising.
        """
        new: np.ndarray = np.concatenate([[True], self.values[1:] > self.values[:-1]])
        return self.values[new]


def midpoints(centres: Float64[np.ndarray, "cells"]) -> Float64[np.ndarray, "inner"]:
    """The bounds between the cells of neighbouring centres.

    Args:
        centres: Rising centres.

    Returns:
        The midpoint of each pair of neighbours.
    """
    return centres[:-1] / 2 + centres[1:] / 2


def first_centres(numbers: Numbers, levels: int, start: str, seed: int) -> Float64[np.ndarray, "levels"]:
    """The centres with which Lloyd's algorithm starts (Han, Mao and Dally, 2016, arXiv:1510.00149, section 3.2).

    Args:
        numbers: The numbers.
        levels: How many centres.
        start: ``"linear"``: evenly spaced from the least to the largest number; ``"density"``: quantiles; ``"random"``:
            numbers drawn by ``seed``.
        seed: Seed of a random start.

    Returns:
        The centres, rising.
    """
    values, count = numbers.values, len(numbers.values)
    if start == "linear":
        return np.linspace(float(values[0]), float(values[-1]), levels)
    if start == "density":
        return values[(2 * np.arange(levels) + 1) * count // (2 * levels)]
    return values[np.sort(permutation(seed, count)[np.arange(levels) % count])]


def refined(
    numbers: Numbers, centres: Float64[np.ndarray, "levels"], rounds: int = ROUNDS
) -> Float64[np.ndarray, "levels"]:
    """Lloyd's algorithm, until nothing changes; the error never rises.

    A centre without numbers moves into a cell where it lowers the error. At a fixed point, merge the cheapest pair of
    neighbours and split the costliest cell, for as long as that lowers the error, and go on.

    Args:
        numbers: The numbers.
        centres: First centres, rising.
        rounds: Most rounds.

    Returns:
        The centres, rising.
    """
    before = None
    for _ in range(rounds):
        ends = numbers.ends(midpoints(centres))
        settled = before is not None and (ends == before).all()
        if (settled or (np.diff(ends) == 0).any()) and (moved := _moved(numbers, centres, ends)) is not None:
            centres, before = moved, None
            continue
        if settled:
            break
        centres, before = numbers.means(ends, centres), ends
    return centres


def _moved(
    numbers: Numbers, centres: Float64[np.ndarray, "levels"], ends: Int64[np.ndarray, "ends"]
) -> Float64[np.ndarray, "levels"] | None:
    """Merge the cheapest pairs of neighbours, and split the costliest cells at their means; None if no error is saved.

    Merging centres c and d of masses m and n raises the error by ``(c - d)^2 m n / (m + n)``.
    """
    full = np.diff(ends) > 0
    starts, stops, means = ends[:-1][full], ends[1:][full], numbers.means(ends, centres)[full]
    middles = np.clip(np.searchsorted(numbers.values, means, side="left"), starts, stops)
    below, above = numbers.masses(starts, middles), numbers.masses(middles, stops)
    gains, costs = _worth(below, above), _worth(*(numbers.masses(starts, stops)[:, part] for part in _NEIGHBOURS))
    splits, joins = np.argsort(-gains, kind="stable"), iter(np.argsort(costs, kind="stable").tolist())
    spare, taken = len(centres) - len(means), set[int]()
    made, gone = list[float](), set[int]()
    for cell in splits.tolist()[: max(spare, len(centres) // 8, 1)]:
        if gains[cell] <= 0 or cell in taken:
            continue
        if spare:
            spare -= 1
        else:
            pair = next((j for j in joins if not {j, j + 1} & (taken | {cell})), None)
            if pair is None or costs[pair] >= gains[cell] * (1 - 1e-6):
                break
            taken |= {pair, pair + 1}
            gone |= {pair, pair + 1}
            mass, first = (numbers.sums[:, stops[pair + 1]] - numbers.sums[:, starts[pair]]).tolist()
            made.append(first / mass if mass > 0 else float(means[pair]))
        taken.add(cell)
        gone.add(cell)
        made += [below[1, cell] / below[0, cell], above[1, cell] / above[0, cell]]
    if not made:
        return None
    unchanged = [means[cell] for cell in range(len(means)) if cell not in gone]
    return np.sort(np.concatenate([unchanged, made, centres[~full][:spare]]))


_NEIGHBOURS = slice(None, -1), slice(1, None)


def _worth(one: Float64[np.ndarray, "2 cells"], other: Float64[np.ndarray, "2 cells"]) -> Float64[np.ndarray, "cells"]:
    """The error that two centres save over one; 0 where a mass is 0."""
    mass = np.where((one[0] > 0) & (other[0] > 0), one[0] * other[0], 0.0)
    apart = one[1] / np.where(mass > 0, one[0], 1) - other[1] / np.where(mass > 0, other[0], 1)
    return mass / np.where(mass > 0, one[0] + other[0], 1) * apart**2


def centres_of(
    flat: Float64[np.ndarray, "count"],
    levels: int,
    start: str = "linear",
    seed: int = 0,
    importance: Float64[np.ndarray, "count"] | None = None,
) -> Float64[np.ndarray, "levels"]:
    """K-means for scalars.

    With ``importance``, the weighted algorithm starts at the unweighted solution, and the better of the two is
    returned: from other starts it often ends at a larger error.

    Args:
        flat: The numbers, finite.
        levels: How many centres.
        start: ``"linear"``, ``"density"`` or ``"random"``, as for ``first_centres``.
        seed: Seed of a random start.
        importance: Weight of each squared error, >= 0; None weighs all equally.

    Returns:
        The centres, rising. With at most ``levels`` distinct numbers these are the numbers, the last one repeated.
    """
    plain = Numbers.of(flat)
    if len(values := plain.distinct()) <= levels:
        return np.concatenate([values, np.full(levels - len(values), values[-1])])
    centres = refined(plain, first_centres(plain, levels, start, seed))
    weighted = plain if importance is None else Numbers.of(flat, importance)
    if weighted.unweighted:
        return centres
    return min((refined(weighted, centres), centres), key=weighted.error)


# ---- With a bound on the entropy ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """A partition of the numbers into non-empty cells, with the centre and the number of numbers of each."""

    centres: Float64[np.ndarray, "cells"]
    counts: Int64[np.ndarray, "cells"]
    assign: Callable[[], Int64[np.ndarray, "count"]]
    price: float = 0.0  # lambda with which the cells were found

    @cached_property
    def symbols(self) -> Int64[np.ndarray, "count"]:
        """The cell of each number, in sorted order."""
        return self.assign()

    def entropy_bits(self) -> float:
        """Bits of all symbols with an ideal entropy coder.

        Returns:
            The number of numbers times the entropy of the symbols, in bits.
        """
        return entropy_bits(self.counts)

    def lengths(self, price: float) -> Float64[np.ndarray, "cells"]:
        """The cost of each cell's code.

        Args:
            price: Lambda: squared error per bit, >= 0.

        Returns:
            ``price`` times the ideal code length of each cell in bits.
        """
        return price * np.log2(self.counts.sum() / self.counts)

    def error(self, numbers: Numbers) -> float:
        """The weighted squared error of this partition.

        Args:
            numbers: The numbers that are partitioned.

        Returns:
            The sum of importance times squared distances, each number to the centre of its cell.
        """
        return float(np.sum(numbers.importance * (numbers.values - self.centres[self.symbols]) ** 2))

    def centred(self, numbers: Numbers) -> "Cells":
        """Recompute the centres for other weights.

        Args:
            numbers: The same numbers, with other importance.

        Returns:
            The same cells, with the weighted means as centres.
        """
        mass = np.bincount(self.symbols, numbers.importance, len(self.counts))
        first = np.bincount(self.symbols, numbers.importance * numbers.values, len(self.counts))
        return replace(self, centres=_means(mass, first, self.centres))


def _means(
    mass: Float64[np.ndarray, "cells"], first: Float64[np.ndarray, "cells"], empty: Float64[np.ndarray, "cells"]
) -> Float64[np.ndarray, "cells"]:
    """The weighted means; ``empty`` where the mass is 0."""
    return np.where(mass > 0, first / np.where(mass > 0, mass, 1), empty)


def entropy_bits(counts: Int64[np.ndarray, "symbols"]) -> float:
    """Bits of all symbols with an ideal entropy coder.

    Args:
        counts: How often each symbol occurs.

    Returns:
        The number of symbols times their entropy, in bits.
    """
    there = counts[counts > 0]
    return float(np.sum(there * np.log2(there.sum() / there)))


def cells_of(numbers: Numbers, centres: Float64[np.ndarray, "levels"], lengths: Float64[np.ndarray, "levels"]) -> Cells:
    """Assign each number to the centre where importance times squared distance plus code length is least.

    Takes ``levels * log(count)`` steps for each distinct importance; with more than 64 distinct ones, ``levels``
    passes over the numbers.

    Args:
        numbers: The numbers.
        centres: The centres.
        lengths: Cost of each centre's code, in units of squared error.

    Returns:
        The non-empty cells, with the weighted means as centres.
    """
    if not numbers.classes:
        return _cells_by_passes(numbers, centres, lengths)
    counts, sums = np.zeros(len(centres), np.int64), np.zeros((2, len(centres)))
    partitions: list[tuple[Numbers, np.ndarray, np.ndarray]] = []
    for part in numbers.classes:
        importance = float(part.importance[0])
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            scaled_lengths = lengths / importance
        if np.isfinite(scaled_lengths).all():
            live, bounds = _hull(centres, scaled_lengths)
        else:  # importance 0, or nearly: only the code length counts
            live, bounds = np.array([int(lengths.argmin())], np.int64), np.empty(0)
        ends = part.ends(bounds)
        many = ends[1:] - ends[:-1]
        counts[live] += many
        sums[:, live] += part.masses(ends[:-1], ends[1:])
        partitions.append((part, live, many))
    full = counts > 0
    names = np.cumsum(full) - 1

    def assign() -> Int64[np.ndarray, "count"]:
        symbols = np.empty(len(numbers.values), np.int64)
        for part, live, many in partitions:
            symbols[part.order] = np.repeat(names[live], many)
        return symbols

    return Cells(_means(sums[0], sums[1], centres)[full], counts[full], assign)


def _cells_by_passes(
    numbers: Numbers, centres: Float64[np.ndarray, "levels"], lengths: Float64[np.ndarray, "levels"]
) -> Cells:
    symbols, least = np.zeros(len(numbers.values), np.int64), np.full(len(numbers.values), math.inf)
    for cell, (centre, length) in enumerate(zip(centres, lengths, strict=True)):
        cost = numbers.importance * (numbers.values - centre) ** 2 + length
        better = cost < least
        symbols[better], least[better] = cell, cost[better]
    counts = np.bincount(symbols, minlength=len(centres))
    full = counts > 0
    names = (np.cumsum(full) - 1)[symbols]
    return Cells(centres[full], counts[full], lambda: names).centred(numbers)


_FIRST = np.array([True])


def _hull(
    centres: Float64[np.ndarray, "levels"], lengths: Float64[np.ndarray, "levels"]
) -> tuple[Int64[np.ndarray, "live"], Float64[np.ndarray, "inner"]]:
    """The centres that are cheapest for some number, rising, and the bounds between them.

    The cost minus the square of the number is a straight line for each centre: this is the lower envelope of the lines.
    """
    heights = centres**2 + lengths
    order = np.lexsort((heights, centres))
    rising = centres[order]
    order = order[np.concatenate([_FIRST, rising[1:] > rising[:-1]])]  # the cheapest of equal centres
    live: list[int] = []
    bounds: list[float] = []
    slopes, levels = centres.tolist(), heights.tolist()
    for cell in order.tolist():
        bound = -math.inf
        while live:
            bound = (levels[cell] - levels[live[-1]]) / (slopes[cell] - slopes[live[-1]]) / 2
            if not bounds or bound > bounds[-1]:
                break
            live.pop()
            bounds.pop()
        if live:
            bounds.append(bound)
        live.append(cell)
    return np.array(live, np.int64), np.array(bounds, np.float64)


def settled(numbers: Numbers, cells: Cells, price: float, rounds: int = PRICED_ROUNDS) -> Cells:
    """Lower ``sum importance * (number - centre)^2 + price * entropy_bits`` round by round, until nothing changes.

    Args:
        numbers: The numbers.
        cells: The partition to start from.
        price: Lambda: squared error per bit, >= 0.
        rounds: Most rounds.

    Returns:
        The partition; it may have fewer cells.
    """
    for _ in range(rounds):
        updated = cells_of(numbers, cells.centres, cells.lengths(price))
        same = len(updated.counts) == len(cells.counts) and (updated.counts == cells.counts).all()
        if same and (updated.centres == cells.centres).all():
            return replace(updated, price=price)
        cells = updated
    return replace(cells, price=price)


Fits = Callable[[Int64[np.ndarray, "cells"]], bool]
"""Whether symbols with these counts fit the upper bound on their bytes."""


def within(
    flat: Float64[np.ndarray, "count"],
    levels: int,
    fits: Fits,
    importance: Float64[np.ndarray, "count"] | None = None,
) -> tuple[Float64[np.ndarray, "live"], Int64[np.ndarray, "count"]]:
    """Entropy-coded scalar quantisation: centres and symbols of small error whose coded symbols fit.

    Choi, El-Khamy and Lee, 2017, arXiv:1612.01543. Starts from k-means with ``levels`` centres, with each smaller power
    of two, and with each number below eight, until one fits without lambda: entropy coding alone never drops equally
    likely cells. The result is thus at most as bad as that k-means. With more than 64 distinct importances the search
    uses classes of them, and the final assignment the exact ones.

    Args:
        flat: The numbers, finite.
        levels: Most centres, >= 1.
        fits: Whether symbols with these counts fit; one symbol alone must.
        importance: Weight of each squared error, >= 0; None weighs all equally.

    Returns:
        The centres that are used, and the index of a centre for each number, in the order of ``flat``.
    """
    numbers, candidates = Numbers.of(flat, importance), list[Cells]()
    searched = numbers if numbers.classes else numbers.coarse()
    while levels:
        centres = np.unique(centres_of(flat, levels, importance=importance))
        start = cells_of(searched, centres, np.zeros(len(centres)))
        candidates += [start] if fits(start.counts) else _priced(searched, start, fits)
        levels = 0 if fits(start.counts) else levels - 1 if levels <= 8 else 1 << ((levels - 1).bit_length() - 1)
    if searched is not numbers:
        candidates = [cells.centred(numbers) for cells in candidates]
    best = min(candidates, key=lambda cells: cells.error(numbers))
    if searched is not numbers:
        exact = cells_of(numbers, best.centres, best.lengths(best.price))
        best = min((c for c in (exact, best) if fits(c.counts)), key=lambda cells: cells.error(numbers))
    symbols = np.empty(len(flat), np.int64)
    symbols[numbers.order] = best.symbols
    return best.centres, symbols


def _priced(numbers: Numbers, start: Cells, fits: Fits) -> list[Cells]:
    """Partitions that fit: lambda is raised until one does, and then narrowed down; empty if none does.

    Each search starts from the result of a lower lambda, from which cells can only be lost.
    """
    mean = float(np.average(numbers.values, weights=numbers.importance))
    low, below = start, 0.0
    price = 1e-6 * float(np.mean(numbers.importance * (numbers.values - mean) ** 2))
    cells = settled(numbers, low, price)
    for _ in range(_MOST_GROWTHS):
        if fits(cells.counts):
            break
        low, below, price = cells, price, price * _GROWTH
        cells = settled(numbers, low, price)
    fitting = [cells] if fits(cells.counts) else []
    for _ in range(_NARROWING if fitting else 0):
        middle = math.sqrt(below * price) if below else price / _GROWTH
        cells = settled(numbers, low, middle)
        if fits(cells.counts):
            price = middle
            fitting.append(cells)
        else:
            low, below = cells, middle
    return fitting
