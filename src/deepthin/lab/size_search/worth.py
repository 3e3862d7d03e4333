"""What each choice of a search was worth, which results no other beats, and how the best value fell over time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from deepthin.lab.size_search.candidate import Candidate, Result, Value
from deepthin.lab.size_search.space import Choice, Space


@dataclass(frozen=True)
class Worth:
    """One value of a choice, or a part of its range.

    Attributes:
        choice: Name of the choice, such as ``first.method``.
        value: The value, or the part of the range, as text.
        candidates: How many candidates had it.
        best: Steps -> lowest development value of a training of that length.
    """

    choice: str
    value: str
    candidates: int
    best: dict[int, float]


def worth(space: Space, candidates: Sequence[Candidate], lengths: Sequence[int]) -> list[Worth]:
    """The best result of each value of each choice.

    Args:
        space: What may be chosen.
        candidates: All candidates.
        lengths: Steps of each rung.

    Returns:
        A row for each value that was tried of each choice that was not fixed; ranges are in three parts, equal in their
        logarithms.
    """
    choices = dict(space.training)
    choices |= {f"{group.name}.{name}": choice for group in space.groups for name, choice in group.choices.items()}
    rows: list[Worth] = []
    for name, choice in choices.items():
        if choice.fixed:
            continue
        for text, has in _parts(choice):
            having = [c for c in candidates if name in c.settings and has(c.settings[name])]
            if not having:
                continue
            best: dict[int, float] = {}
            for steps in lengths:
                values = [r.value for c in having if (r := c.at(steps)) is not None and r.value is not None]
                if values:
                    best[steps] = min(values)
            rows.append(Worth(name, text, len(having), best))
    return rows


def _parts(choice: Choice) -> list[tuple[str, Callable[[Value], bool]]]:
    """Texts, and whether a value belongs to each."""
    if choice.values:
        return [(_text(value), lambda other, value=value: other == value) for value in choice.values]
    ratio = (choice.high / choice.low) ** (1 / 3)
    edges = [choice.low, choice.low * ratio, choice.high / ratio, choice.high]
    parts: list[tuple[str, Callable[[Value], bool]]] = []
    for place, (low, high) in enumerate(pairwise(edges)):
        last = place == 2

        def has(value: Value, low: float = low, high: float = high, last: bool = last) -> bool:
            return low <= float(value) and (last or float(value) < high)

        parts.append((f"{low:.3g} to {high:.3g}", has))
    return parts


def _text(value: Value) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def front(results: Sequence[tuple[Candidate, Result]], by: Callable[[Result], float]) -> list[tuple[Candidate, Result]]:
    """The results that no other beats in both the development value and a cost.

    Args:
        results: Candidates with results that have a value.
        by: The cost of a result, such as its bytes.

    Returns:
        Those of the front, the cheapest first.
    """
    found: list[tuple[Candidate, Result]] = []
    for candidate, result in sorted(results, key=lambda pair: (by(pair[1]), pair[1].value)):
        best = found[-1][1].value if found else None
        if best is None or (result.value is not None and result.value < best):
            found.append((candidate, result))
    return found


def falling(results: Sequence[tuple[Candidate, Result]]) -> list[tuple[Candidate, Result]]:
    """The results that were the best so far when they came.

    Args:
        results: Candidates with results that have a value.

    Returns:
        Those with a lower value than all before them, in the order of time.
    """
    return front(results, lambda result: result.at)


def family(candidate: Candidate) -> str:
    """A short name for candidates of one kind.

    Args:
        candidate: The candidate.

    Returns:
        Its methods, the one of most groups first, such as ``deepthin + kronecker``; of networks of --also, their name.
    """
    methods = [str(value) for name, value in candidate.settings.items() if name.endswith(".method")]
    if not methods:
        return str(candidate.settings["network"])
    unique = sorted(dict.fromkeys(methods), key=lambda method: (-methods.count(method), method))
    return " + ".join(unique)


def described(candidate: Candidate) -> str:
    """The settings of a candidate in one line.

    Args:
        candidate: The candidate.

    Returns:
        Such as ``first: kronecker .04; middle: deepthin .04 rank 4; lr .001``.
    """
    parts: dict[str, list[str]] = {}
    training: list[str] = []
    for name, value in candidate.settings.items():
        group, _, what = name.rpartition(".")
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        if group:
            parts.setdefault(group, []).append(f"rank {text}" if what == "rank" else text)
        elif what == "lr" or (what == "decay" and value):
            training.append(f"{what} {text}")
        elif what == "teacher" and value:
            training.append("teacher")
        elif what == "network" and value != "own":
            training.insert(0, text)
    return "; ".join([*(f"{group}: {' '.join(texts)}" for group, texts in parts.items()), ", ".join(training)])
