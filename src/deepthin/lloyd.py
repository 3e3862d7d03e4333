"""Few centres for many numbers: Lloyd's rounds, plain or weighted, and those that also bound an entropy.

Lloyd, 1982, "Least squares quantization in PCM"; weights and the entropy as in Choi, El-Khamy and Lee, 2017,
arXiv:1612.01543. The numbers are sorted once: a cell is then a range, and its sums are differences of running sums, so
that a round takes ``levels * log(count)`` steps.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64

from deepthin.bits import permutation

STARTS = ("linear", "density", "random")
ROUNDS, PRICED_ROUNDS = 1000, 100  # at most
_GROWTH, _MOST_GROWTHS, _HALVINGS = 4.0, 60, 8  # of the price of a bit, until the entropy is low enough


@dataclass(frozen=True)
class Numbers:
    """Numbers in rising order, each with its share of the error; all have the share 1 if ``alike``."""

    values: Float64[np.ndarray, "count"]
    shares: Float64[np.ndarray, "count"]
    order: Int64[np.ndarray, "count"]  # where each of them stands in what was given
    alike: bool

    @classmethod
    def of(cls, flat: Float64[np.ndarray, "count"], shares: Float64[np.ndarray, "count"] | None = None) -> "Numbers":
        """Sorted; equal ones stay in their order. Without a positive share all are alike."""
        order = np.argsort(flat, kind="stable")
        alike = shares is None or not (shares > 0).any()
        own = np.ones(len(flat)) if shares is None or alike else shares[order]
        return cls(flat[order], own, order, alike)

    @cached_property
    def sums(self) -> Float64[np.ndarray, "3 ends"]:
        """Of shares, shares times values, and shares times squares, below each place."""
        terms = self.shares, self.shares * self.values, self.shares * self.values**2
        return np.stack([np.concatenate([[0.0], np.cumsum(term)]) for term in terms])

    def ends(self, bounds: Float64[np.ndarray, "inner"]) -> Int64[np.ndarray, "ends"]:
        """Where each cell begins, and the last one ends; a number on a bound belongs to the upper cell."""
        inner = np.searchsorted(self.values, bounds, side="left")
        return np.concatenate([[0], inner, [len(self.values)]])

    def means(
        self, ends: Int64[np.ndarray, "ends"], empty: Float64[np.ndarray, "cells"]
    ) -> Float64[np.ndarray, "cells"]:
        """Of each cell; where there is no share, ``empty``."""
        mass, first, _ = np.diff(self.sums[:, ends])
        return np.sort(np.where(mass > 0, first / np.where(mass > 0, mass, 1), empty))

    def errors(
        self, ends: Int64[np.ndarray, "ends"], centres: Float64[np.ndarray, "cells"]
    ) -> Float64[np.ndarray, "cells"]:
        """Shares times squared distances, summed over each cell."""
        mass, first, second = np.diff(self.sums[:, ends])
        return second - 2 * centres * first + centres**2 * mass

    def error(self, centres: Float64[np.ndarray, "cells"]) -> float:
        """The sum of shares times squared distances to the nearest centre."""
        nearest = np.searchsorted(midpoints(centres), self.values, side="right")
        return float(np.sum(self.shares * (self.values - centres[nearest]) ** 2))

    def distinct(self) -> Float64[np.ndarray, "distinct"]:
        """The different values."""
        return self.values[np.diff(self.values, prepend=-math.inf) > 0]


def midpoints(centres: Float64[np.ndarray, "cells"]) -> Float64[np.ndarray, "inner"]:
    """Between neighbours."""
    return centres[:-1] / 2 + centres[1:] / 2


def first_centres(numbers: Numbers, levels: int, start: str, seed: int) -> Float64[np.ndarray, "levels"]:
    """Evenly from the least to the largest, at quantiles, or at numbers that ``seed`` draws."""
    values, count = numbers.values, len(numbers.values)
    if start == "linear":
        return np.linspace(values[0], values[-1], levels)
    if start == "density":
        return values[(2 * np.arange(levels) + 1) * count // (2 * levels)]
    return values[np.sort(permutation(seed, count)[np.arange(levels) % count])]


def refined(
    numbers: Numbers, centres: Float64[np.ndarray, "levels"], rounds: int = ROUNDS
) -> Float64[np.ndarray, "levels"]:
    """Lloyd's rounds until nothing changes, at most so many; the error never rises.

    A centre that is left without numbers moves into a cell whose error is largest, which it splits at the mean.
    """
    before = None
    for _ in range(rounds):
        ends = numbers.ends(midpoints(centres))
        if (np.diff(ends) == 0).any() and (split := _without_empty(numbers, centres, ends)) is not None:
            centres, before = split, None
            continue
        if before is not None and (ends == before).all():
            break
        centres, before = numbers.means(ends, centres), ends
    return centres


def _without_empty(
    numbers: Numbers, centres: Float64[np.ndarray, "levels"], ends: Int64[np.ndarray, "ends"]
) -> Float64[np.ndarray, "levels"] | None:
    """As many cells split as there are empty ones, which go; none if nothing can be split."""
    full = np.diff(ends) > 0
    spare, errors = int((~full).sum()), np.where(full, numbers.errors(ends, centres), 0.0)
    halves: list[float] = []
    split = np.zeros(len(centres), bool)
    for cell in np.argsort(-errors, kind="stable")[:spare]:
        low, high = int(ends[cell]), int(ends[cell + 1])
        middle = low + int(np.searchsorted(numbers.values[low:high], centres[cell], side="left"))
        mass, first = np.diff(numbers.sums[:2, [low, middle, high]])
        if errors[cell] > 0 and (mass > 0).all():
            halves += (first / mass).tolist()
            split[cell] = True
    kept = np.concatenate([centres[full & ~split], halves])
    return np.sort(np.concatenate([kept, centres[~full][: len(centres) - len(kept)]])) if halves else None


def centres_of(
    flat: Float64[np.ndarray, "count"],
    levels: int,
    start: str = "linear",
    seed: int = 0,
    shares: Float64[np.ndarray, "count"] | None = None,
) -> Float64[np.ndarray, "levels"]:
    """The centres, rising; where there are fewer different numbers, these, the last one repeated.

    With ``shares``, Lloyd's weighted rounds begin at the plain solution, and the better of the two is taken: begun
    elsewhere they often end above it.
    """
    plain = Numbers.of(flat)
    if len(found := plain.distinct()) <= levels:
        return np.concatenate([found, np.full(levels - len(found), found[-1])])
    centres = refined(plain, first_centres(plain, levels, start, seed))
    weighted = plain if shares is None else Numbers.of(flat, shares)
    if weighted.alike:
        return centres
    return min((refined(weighted, centres), centres), key=weighted.error)


# ---- With a bound on the entropy ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """Which cell each number is in, its centres, and how many are in each; none is empty."""

    centres: Float64[np.ndarray, "cells"]
    counts: Int64[np.ndarray, "cells"]
    symbols: Int64[np.ndarray, "count"]  # of the numbers as they are sorted

    def entropy_bits(self) -> float:
        """What an ideal coder takes for all symbols."""
        return entropy_bits(self.counts)


def entropy_bits(counts: Int64[np.ndarray, "symbols"]) -> float:
    """What an ideal coder takes for symbols that are there so often: count times entropy."""
    there = counts[counts > 0]
    return float(np.sum(there * np.log2(there.sum() / there)))


def cells_of(numbers: Numbers, centres: Float64[np.ndarray, "levels"], lengths: Float64[np.ndarray, "levels"]) -> Cells:
    """Every number to the centre where share times squared distance plus ``lengths`` is least; empty cells go.

    Takes ``levels`` passes over the numbers, or, where all are alike, ``levels * log(count)`` steps and one.
    """
    if numbers.alike:
        live, bounds = _hull(centres, lengths)
        ends = numbers.ends(bounds)
        counts = np.diff(ends)
        means, full = numbers.means(ends, centres[live]), counts > 0
        return Cells(means[full], counts[full], np.repeat(np.cumsum(full) - 1, counts))
    symbols, least = np.zeros(len(numbers.values), np.int64), np.full(len(numbers.values), math.inf)
    for cell, (centre, length) in enumerate(zip(centres, lengths, strict=True)):
        cost = numbers.shares * (numbers.values - centre) ** 2 + length
        better = cost < least
        symbols, least = np.where(better, cell, symbols), np.where(better, cost, least)
    counts = np.bincount(symbols, minlength=len(centres))
    mass = np.bincount(symbols, numbers.shares, len(centres))
    first = np.bincount(symbols, numbers.shares * numbers.values, len(centres))
    means, full = np.where(mass > 0, first / np.where(mass > 0, mass, 1), centres), counts > 0
    return Cells(means[full], counts[full], (np.cumsum(full) - 1)[symbols])


def _hull(
    centres: Float64[np.ndarray, "levels"], lengths: Float64[np.ndarray, "levels"]
) -> tuple[Int64[np.ndarray, "live"], Float64[np.ndarray, "inner"]]:
    """The centres that are cheapest somewhere, rising, and where each takes over from the one below.

    The cost less the square of the number is a straight line for each centre; wanted is the lower hull of the lines.
    """
    heights = centres**2 + lengths
    order = np.lexsort((heights, centres))
    order = order[np.diff(centres[order], prepend=-math.inf) > 0]  # of equal centres the cheapest
    live: list[int] = []
    bounds: list[float] = []
    for cell in order.tolist():
        bound = -math.inf
        while live:
            bound = float((heights[cell] - heights[live[-1]]) / (centres[cell] - centres[live[-1]])) / 2
            if not bounds or bound > bounds[-1]:
                break
            live.pop()
            bounds.pop()
        if live:
            bounds.append(bound)
        live.append(cell)
    return np.array(live, np.int64), np.array(bounds, np.float64)


def settled(numbers: Numbers, cells: Cells, price: float, rounds: int = PRICED_ROUNDS) -> Cells:
    """Rounds that lower ``sum share * (number - centre)^2 + price * entropy_bits`` until nothing changes."""
    for _ in range(rounds):
        lengths = price * np.log2(len(numbers.values) / cells.counts)
        found = cells_of(numbers, cells.centres, lengths)
        if (found.symbols == cells.symbols).all():
            return found
        cells = found
    return cells


def within_entropy(
    flat: Float64[np.ndarray, "count"],
    centres: Float64[np.ndarray, "levels"],
    most_bits: int,
    shares: Float64[np.ndarray, "count"] | None = None,
) -> tuple[Float64[np.ndarray, "live"], Int64[np.ndarray, "count"]]:
    """Centres and symbols whose ``entropy_bits`` are at most ``most_bits``, at as small an error as is found.

    Begins at ``centres`` and raises the price of a bit until the entropy is low enough, then narrows it down; each
    price begins where a lower one has settled, which can only lose cells. If none is high enough, one cell is left.
    """
    numbers = Numbers.of(flat, shares)
    start = low = cells_of(numbers, np.unique(centres), np.zeros(len(np.unique(centres))))
    allowed = most_bits * (1 + 1e-12)  # an entropy is a sum of logarithms
    best: Cells | None = None
    if start.entropy_bits() <= allowed:
        best = start
    below, price = 0.0, 1e-6 * (_error(numbers, _single(numbers)) / len(flat) or 1.0)
    for _ in range(0 if best else _MOST_GROWTHS):
        found = settled(numbers, low, price)
        if found.entropy_bits() <= allowed:
            best = found
            break
        low, below, price = found, price, price * _GROWTH
    if best is None:
        best = _single(numbers)
    elif best is not start:
        for _ in range(_HALVINGS):
            middle = math.sqrt(below * price) if below else price / _GROWTH
            found = settled(numbers, low, middle)
            if found.entropy_bits() > allowed:
                low, below = found, middle
                continue
            price, best = middle, min(best, found, key=lambda cells: _error(numbers, cells))
    symbols = np.empty(len(flat), np.int64)
    symbols[numbers.order] = best.symbols
    return best.centres, symbols


def _single(numbers: Numbers) -> Cells:
    mean = np.array([np.sum(numbers.shares * numbers.values) / np.sum(numbers.shares)])
    return Cells(mean, np.array([len(numbers.values)]), np.zeros(len(numbers.values), np.int64))


def _error(numbers: Numbers, cells: Cells) -> float:
    return float(np.sum(numbers.shares * (numbers.values - cells.centres[cells.symbols]) ** 2))
