"""Lloyd's algorithm for scalars: few centres for many numbers, plain, weighted, or with a bound on the entropy.

Lloyd, 1982, "Least squares quantization in PCM"; weights and the entropy as in Choi, El-Khamy and Lee, 2017,
arXiv:1612.01543. The numbers are sorted once: a cell is then a range, and its sums are differences of cumulative sums,
so that a round takes ``levels * log(count)`` steps.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float64, Int16, Int64, UInt

from deepthin.coding.bits import PIECE, permutation

STARTS = ("linear", "density", "random")
_PIECE = 1 << 15  # numbers that are widened at once, where there are many
ROUNDS, PRICED_ROUNDS = 10_000, 100  # at most
_FEW = 64  # different importance, at most, each of which is searched on its own
_FINENESS, _OCTAVES = 3, 20  # classes of importance: so many for each doubling, and so many doublings
_GROWTH, _MOST_GROWTHS, _NARROWING = 4.0, 30, 8  # of the price of a bit, until the entropy is low enough; and then


@dataclass(frozen=True)
class Numbers:
    """Numbers in rising order, each with the weight of its squared error: its importance, 1 for all if ``unweighted``.

    They are held in the precision in which they were given, and computed with in double precision.
    """

    values: Float[np.ndarray, " count"]
    importance: Float[np.ndarray, " count"]
    order: UInt[np.ndarray, " count"] | None  # where each of them stands in what was given; None if ``unweighted``
    unweighted: bool

    @classmethod
    def of(cls, flat: Float[np.ndarray, " count"], importance: Float[np.ndarray, " count"] | None = None) -> "Numbers":
        """Sort the numbers.

        Args:
            flat: The numbers, finite.
            importance: Weight of each squared error, >= 0. None, or zeros only, weighs all equally.

        Returns:
            The sorted numbers; equal ones keep their order.
        """
        if importance is None or not (importance > 0).any():
            return cls(np.sort(flat, kind="stable"), np.broadcast_to(1.0, len(flat)), None, True)
        order = np.argsort(flat, kind="stable").astype(np.uint32 if len(flat) >> 32 == 0 else np.uint64)
        return cls(flat[order], importance[order], order, False)

    @property
    def classes(self) -> "list[Numbers]":
        """The numbers of each distinct importance, ``order`` indexing into these; empty above 64 distinct ones."""
        return [self] if self.unweighted else self._of_each_importance

    @cached_property
    def _of_each_importance(self) -> "list[Numbers]":
        if len(different := np.unique(self.importance)) > _FEW:
            return []
        places = [np.flatnonzero(self.importance == value) for value in different]
        return [Numbers(self.values[p], self.importance[p], p.astype(np.uint64), True) for p in places]

    def coarse(self) -> "Numbers":
        """Merge importance that differ by less than about a quarter, each class by its mean.

        Returns:
            The same numbers, with at most some 60 distinct importance; those below a millionth of the largest are one
            class.
        """
        top = float(self.importance.max())
        near = np.ones(len(self.importance))
        there = self.importance > 0
        wide = self.importance[there].astype(np.float64)
        near[there] = np.round(_FINENESS * np.maximum(np.log2(wide / top), -_OCTAVES))
        _, own = np.unique(near, return_inverse=True)
        means = np.bincount(own, self.importance) / np.bincount(own)
        return Numbers(self.values, means[own], self.order, self.unweighted)

    @cached_property
    def _sums(self) -> tuple[Float64[np.ndarray, " ends"] | None, Float64[np.ndarray, " ends"]]:
        """Cumulative sums, before each index, of importance (None where that counts) and of importance times values."""
        counts = self.unweighted and self.importance[0] == 1
        made = [np.zeros(len(self.values) + 1) for _ in range(1 if counts else 2)]
        for own, values, importance in self.pieces():
            for sums, terms in zip(made, (importance * values, importance), strict=False):
                terms[0] += sums[own.start]
                np.cumsum(terms, out=sums[own.start + 1 : own.start + 1 + len(terms)])
        return None if counts else made[1], made[0]

    def pieces(self) -> Iterator[tuple[slice, Float64[np.ndarray, " own"], Float64[np.ndarray, " own"]]]:
        """Ranges of the numbers, with the values and importance there in double precision."""
        size = PIECE if len(self.values) <= PIECE else _PIECE
        for first in range(0, len(self.values), size):
            own = slice(first, first + size)
            yield own, self.values[own].astype(np.float64), self.importance[own].astype(np.float64)

    def ends(self, bounds: Float64[np.ndarray, "inner"]) -> Int64[np.ndarray, "ends"]:
        """The cells between bounds, as indices.

        Args:
            bounds: Upper bounds of all cells but the last, rising; a number on a bound belongs to the upper cell.

        Returns:
            The first index of each cell, then the number of numbers.
        """
        inner = np.searchsorted(self.values, _at_least(bounds, self.values.dtype), side="left")
        return np.concatenate([[0], inner, [len(self.values)]])

    def means(
        self, ends: Int64[np.ndarray, "ends"], empty: Float64[np.ndarray, "cells"]
    ) -> Float64[np.ndarray, "cells"]:
        """The weighted mean of each cell.

        Args:
            ends: Cell bounds, as ``ends`` returns them.
            empty: For each cell, the value to use where its importance sum to 0.

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
            The importance, and the importance times values, summed over each cell: 2 x cells.
        """
        mass, first = self._sums
        many = (stops - starts).astype(np.float64) if mass is None else mass[stops] - mass[starts]
        return np.stack([many, first[stops] - first[starts]])

    def error(self, centres: Float64[np.ndarray, "cells"]) -> float:
        """The weighted squared error.

        Args:
            centres: Rising centres.

        Returns:
            The sum of importance times squared distances to the nearest centre.
        """
        nearest, total = _bounded(midpoints(centres)), 0.0
        for _, values, importance in self.pieces():
            total += float(np.sum(importance * (values - centres[nearest(values)]) ** 2))
        return total

    def distinct(self, most: int) -> Float64[np.ndarray, " distinct"] | None:
        """The distinct values, if they are few.

        Args:
            most: How many there may be.

        Returns:
            The values without repetitions, rising; None if there are more than ``most``.
        """
        new: np.ndarray = np.concatenate([[True], self.values[1:] > self.values[:-1]])
        return None if np.count_nonzero(new) > most else self.values[new].astype(np.float64)


def _at_least(bounds: Float64[np.ndarray, " inner"], kind: np.dtype) -> Float[np.ndarray, " inner"]:
    """The least numbers of a type that are not below the bounds; to compare with them is to compare with the bounds."""
    with np.errstate(over="ignore"):
        near = bounds.astype(kind)
    return np.where(near < bounds, np.nextafter(near, np.inf), near)


def _bounded(bounds: Float64[np.ndarray, " inner"]) -> Callable[[Float[np.ndarray, " own"]], Int64[np.ndarray, " own"]]:
    return lambda own: np.searchsorted(_at_least(bounds, own.dtype), own, side="right")


def symbols_of(flat: Float[np.ndarray, " count"], bounds: Float64[np.ndarray, " inner"]) -> Int16[np.ndarray, " count"]:
    """The cell of each number.

    Args:
        flat: The numbers.
        bounds: Upper bounds of all cells but the last, rising; a number on a bound belongs to the upper cell.

    Returns:
        Indices of cells, from 0.
    """
    symbols, cell = np.empty(len(flat), np.int16), _bounded(bounds)
    for first in range(0, len(flat), PIECE):
        symbols[first : first + PIECE] = cell(flat[first : first + PIECE])
    return symbols


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
        return values[(2 * np.arange(levels) + 1) * count // (2 * levels)].astype(np.float64)
    return values[np.sort(permutation(seed, count)[np.arange(levels) % count])].astype(np.float64)


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
    starts, stops, own = ends[:-1][full], ends[1:][full], numbers.means(ends, centres)[full]
    middles = np.clip(numbers.ends(own)[1:-1], starts, stops)
    below, above = numbers.masses(starts, middles), numbers.masses(middles, stops)
    gains, costs = _worth(below, above), _worth(*(numbers.masses(starts, stops)[:, part] for part in _NEIGHBOURS))
    splits, joins = np.argsort(-gains, kind="stable"), iter(np.argsort(costs, kind="stable").tolist())
    spare, taken = len(centres) - len(own), set[int]()
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
            mass, first = numbers.masses(starts[pair : pair + 1], stops[pair + 1 : pair + 2])[:, 0].tolist()
            made.append(first / mass if mass > 0 else float(own[pair]))
        taken.add(cell)
        gone.add(cell)
        made += [below[1, cell] / below[0, cell], above[1, cell] / above[0, cell]]
    if not made:
        return None
    kept = [own[cell] for cell in range(len(own)) if cell not in gone]
    return np.sort(np.concatenate([kept, made, centres[~full][:spare]]))


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
    importance: Float[np.ndarray, " count"] | None = None,
    plain: Numbers | None = None,
) -> Float64[np.ndarray, "levels"]:
    """K-means for scalars.

    With ``importance``, the weighted algorithm starts at the unweighted solution, and the better of both is returned:
    from other starts it often ends at a larger error.

    Args:
        flat: The numbers, finite.
        levels: How many centres.
        start: ``"linear"``, ``"density"`` or ``"random"``, as for ``first_centres``.
        seed: Seed of a random start.
        importance: Weight of each squared error, >= 0; None weighs all equally.
        plain: ``Numbers.of(flat)``, if it is there.

    Returns:
        The centres, rising. With at most ``levels`` distinct numbers these are the numbers, the last one repeated.
    """
    plain = plain or Numbers.of(flat)
    if (found := plain.distinct(levels)) is not None:
        return np.concatenate([found, np.full(levels - len(found), found[-1])])
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
    assign: Callable[[], Int16[np.ndarray, " count"]]
    price: float = 0.0  # of a bit, at which they were found

    @cached_property
    def symbols(self) -> Int16[np.ndarray, " count"]:
        """The cell of each number, in sorted order."""
        return self.assign()

    def entropy_bits(self) -> float:
        """Bits of all symbols with an ideal entropy coder.

        Returns:
            The number of numbers times the entropy of the symbols, in bits.
        """
        return entropy_bits(self.counts)

    def lengths(self, price: float) -> Float64[np.ndarray, "cells"]:
        """What the code of a number adds to its cost, by cell.

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
        ends, total = np.cumsum(self.counts), 0.0
        for own, values, importance in numbers.pieces():
            places: np.ndarray = own.start + np.arange(len(values))  # cells are ranges where numbers are unweighted
            cells = np.searchsorted(ends, places, side="right") if numbers.unweighted else self.symbols[own]
            total += float(np.sum(importance * (values - self.centres[cells]) ** 2))
        return total

    def centred(self, numbers: Numbers) -> "Cells":
        """Recompute the centres for other weights.

        Args:
            numbers: The same numbers, with other importance.

        Returns:
            The same cells, with the weighted means as centres.
        """
        mass = np.bincount(self.symbols, numbers.importance, len(self.counts))
        first = np.bincount(self.symbols, numbers.importance.astype(np.float64) * numbers.values, len(self.counts))
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

    Takes ``levels * log(count)`` steps for each distinct importance; with more than 64 of these, ``levels`` passes over
    the numbers.

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
    found: list[tuple[Numbers, np.ndarray, np.ndarray]] = []
    for own in numbers.classes:
        importance = float(own.importance[0])
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            own_lengths = lengths / importance
        if np.isfinite(own_lengths).all():
            live, bounds = _hull(centres, own_lengths)
        else:  # no distance counts
            live, bounds = np.array([int(lengths.argmin())], np.int64), np.empty(0)
        ends = own.ends(bounds)
        many = ends[1:] - ends[:-1]
        counts[live] += many
        sums[:, live] += own.masses(ends[:-1], ends[1:])
        found.append((own, live, many))
    full = counts > 0
    names = np.cumsum(full) - 1

    def assign() -> Int16[np.ndarray, " count"]:
        symbols = np.empty(len(numbers.values), np.int16)
        for own, live, many in found:
            symbols[slice(None) if own.order is None else own.order] = np.repeat(names[live].astype(np.int16), many)
        return symbols

    return Cells(_means(sums[0], sums[1], centres)[full], counts[full], assign)


def _cells_by_passes(
    numbers: Numbers, centres: Float64[np.ndarray, "levels"], lengths: Float64[np.ndarray, "levels"]
) -> Cells:
    symbols, least = np.zeros(len(numbers.values), np.int16), np.full(len(numbers.values), math.inf)
    for cell, (centre, length) in enumerate(zip(centres, lengths, strict=True)):
        cost = numbers.importance * (numbers.values - centre) ** 2 + length
        better = cost < least
        symbols[better], least[better] = cell, cost[better]
    counts = np.bincount(symbols, minlength=len(centres))
    full = counts > 0
    names = (np.cumsum(full) - 1).astype(np.int16)[symbols]
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
    order = order[np.concatenate([_FIRST, rising[1:] > rising[:-1]])]  # of equal centres the cheapest
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
        found = cells_of(numbers, cells.centres, cells.lengths(price))
        same = len(found.counts) == len(cells.counts) and (found.counts == cells.counts).all()
        if same and (found.centres == cells.centres).all():
            return replace(found, price=price)
        cells = found
    return replace(cells, price=price)


Fits = Callable[[Int64[np.ndarray, "cells"]], bool]
"""Whether symbols that are there so often can be stored in the room that there is."""


def within(
    flat: Float[np.ndarray, " count"],
    levels: int,
    fits: Fits,
    importance: Float[np.ndarray, " count"] | None = None,
) -> tuple[Float64[np.ndarray, " live"], Int16[np.ndarray, " count"]]:
    """Entropy-coded scalar quantisation: centres and symbols of small error whose coded symbols fit.

    Choi, El-Khamy and Lee, 2017, arXiv:1612.01543. Starts from k-means with ``levels`` centres, with each smaller power
    of two, and with each number below eight, until one fits without lambda: entropy coding alone never drops equally
    likely cells. The result is thus at most as bad as that k-means. With more than 64 distinct importances the search
    uses classes of importance, and the final assignment the importances themselves.

    Args:
        flat: The numbers, finite.
        levels: Most centres, >= 1.
        fits: Whether symbols with these counts fit; one symbol alone must.
        importance: Weight of each squared error, >= 0; None weighs all equally.

    Returns:
        The centres that are used, and the index of a centre for each number, in the order of ``flat``.
    """
    numbers, found = Numbers.of(flat, importance), list[Cells]()
    searched = numbers if numbers.classes else numbers.coarse()
    while levels:
        centres = np.unique(
            centres_of(flat, levels, importance=importance, plain=numbers if numbers.unweighted else None)
        )
        start = cells_of(searched, centres, np.zeros(len(centres)))
        found += [start] if fits(start.counts) else _priced(searched, start, fits)
        levels = 0 if fits(start.counts) else levels - 1 if levels <= 8 else 1 << ((levels - 1).bit_length() - 1)
    if searched is not numbers:
        found = [cells.centred(numbers) for cells in found]
    best = min(found, key=lambda cells: cells.error(numbers))
    if searched is not numbers:
        exact = cells_of(numbers, best.centres, best.lengths(best.price))
        best = min((c for c in (exact, best) if fits(c.counts)), key=lambda cells: cells.error(numbers))
    if numbers.order is None:
        return best.centres, symbols_of(flat, numbers.values[np.cumsum(best.counts)[:-1]].astype(np.float64))
    symbols = np.empty(len(flat), np.int16)
    symbols[numbers.order] = best.symbols
    return best.centres, symbols


def _priced(numbers: Numbers, start: Cells, fits: Fits) -> list[Cells]:
    """Partitions that fit: lambda is raised until one does, and then narrowed down; empty if none does.

    Each search starts from the result of a lower lambda, from which cells can only be lost.
    """
    sums = np.sum([[np.sum(values * importance), np.sum(importance)] for _, values, importance in numbers.pieces()], 0)
    mean, low, below = float(sums[0] / sums[1]), start, 0.0
    spread = math.fsum(float(np.sum(importance * (values - mean) ** 2)) for _, values, importance in numbers.pieces())
    price = 1e-6 * spread / len(numbers.values)
    found = settled(numbers, low, price)
    for _ in range(_MOST_GROWTHS):
        if fits(found.counts):
            break
        low, below, price = found, price, price * _GROWTH
        found = settled(numbers, low, price)
    fitting = [found] if fits(found.counts) else []
    for _ in range(_NARROWING if fitting else 0):
        middle = math.sqrt(below * price) if below else price / _GROWTH
        found = settled(numbers, low, middle)
        if fits(found.counts):
            price = middle
            fitting.append(found)
        else:
            low, below = found, middle
    return fitting
