"""Successive halving over complete trainings: many short ones, the best third again three times as long.

Jamieson and Talwalkar, 2016, arXiv:1502.07943. A training to a size has its schedule over its whole length, so that
values within a long training say little: every rung trains from the beginning to the end.
"""

from collections.abc import Iterable, Sequence

from deepthin.lab.size_search.candidate import Candidate

FACTOR = 3  # between the steps of two rungs, and of candidates that are promoted
RUNGS = 3
FIRST = FACTOR ** (RUNGS - 1)  # new candidates of a round
LEAST_STEPS = 300  # of the shortest training: six times the warm-up
TRUSTED = 2  # known starts that are trained in full, whatever their short trainings say


def rungs(steps: int, least: int = LEAST_STEPS) -> tuple[int, ...]:
    """The lengths of a round's trainings.

    Args:
        steps: Steps of the longest training.
        least: Shorter ones are left out.

    Returns:
        Rising numbers of steps: ``steps / 9``, ``steps / 3`` and ``steps``, without those below ``least``.
    """
    lengths = [round(steps / FACTOR**power) for power in range(RUNGS - 1, 0, -1)]
    return *(length for length in lengths if length >= least), steps


def ordered(candidates: Iterable[Candidate], steps: int, microseconds: float | None) -> list[Candidate]:
    """Candidates by what their trainings of one length gave.

    Args:
        candidates: In any order.
        steps: The length.
        microseconds: Upper bound on the time for one item; None: none.

    Returns:
        Those whose training of that length has a value: first those within the bound by their development value, then
        the others by their time. Ties by number.
    """
    valued = [c for c in candidates if (result := c.at(steps)) is not None and result.value is not None]
    return sorted(valued, key=lambda c: (*c.results[steps].rank(microseconds), c.number))


def ranked(candidates: Iterable[Candidate], microseconds: float | None) -> list[Candidate]:
    """All candidates with a value, by their longest training.

    Args:
        candidates: In any order.
        microseconds: Upper bound on the time for one item; None: none.

    Returns:
        Longer trainings first; of equal lengths as ``ordered`` has them.
    """
    candidates = list(candidates)
    lengths = sorted({max(c.results) for c in candidates if c.results}, reverse=True)
    return [
        c
        for n in lengths
        for c in ordered([c for c in candidates if c.results and max(c.results) == n], n, microseconds)
    ]


def due(candidates: Sequence[Candidate], lengths: Sequence[int], microseconds: float | None) -> list[list[Candidate]]:
    """Whom a round trains, rung by rung, as far as that is known.

    Args:
        candidates: All of the round.
        lengths: Steps of each rung, rising.
        microseconds: Upper bound on the time for one item; None: none.

    Returns:
        For each rung its candidates, the most promising first: all in the first rung; then the best third, rounded up,
        of those that have a result in the rung before, and after them the first two known starts: which configuration
        is the best of long trainings, a short one may not tell.
    """
    chosen = [list(candidates)]
    for steps in lengths[:-1]:
        best = ordered(chosen[-1], steps, microseconds)
        third = -(-len(best) // FACTOR)
        chosen.append([c for place, c in enumerate(best) if place < third or _is_trusted(c, steps, microseconds)])
    return chosen


def _is_trusted(candidate: Candidate, steps: int, microseconds: float | None) -> bool:
    """Whether it is one of the first known starts, and as fast as it has to be."""
    known = candidate.round == 0 and candidate.place < TRUSTED and candidate.origin not in ("", "TPE", "near")
    return known and not candidate.results[steps].over(microseconds)
