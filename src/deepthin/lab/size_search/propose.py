"""Propose the settings of a round's candidates: known ones first, then Optuna's estimate of what is good.

Tree-structured Parzen estimator (Bergstra et al., 2011, "Algorithms for hyper-parameter optimization"). A proposal is a
function of the seed, its place, and the results of earlier rounds: however a search was interrupted, and wherever its
trainings run, it proposes the same.
"""

import random
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from deepthin.lab.size_search.candidate import Candidate, Settings, Value
from deepthin.lab.size_search.problem import Problem
from deepthin.lab.size_search.space import Choice, Space, draw

NEAR_EVERY = 2  # each second proposal is near to a good candidate
NEAR = 3  # how many candidates count as good
CHANGED = 1 / 3  # probability with which such a proposal changes a choice
TRIES = 20  # for settings that were not proposed before


def proposed(
    problem: Problem,
    earlier: Sequence[Candidate],
    good: Sequence[Settings],
    tried: Collection[str],
    lengths: Sequence[int],
    place: int,
    seed: str,
) -> tuple[str, dict[str, Value]] | None:
    """Settings that are new.

    Args:
        problem: What is searched.
        earlier: Candidates of earlier rounds, with their results.
        good: Settings to which some proposals are near.
        tried: Identities of all settings that were proposed before.
        lengths: Steps of each rung, rising.
        place: Place in the round.
        seed: What makes this proposal another than the others.

    Returns:
        Their origin, ``"TPE"`` or ``"near"``, and the settings; None if nothing new was found.
    """
    import optuna

    by_model = bool(earlier) and place % NEAR_EVERY != NEAR_EVERY - 1
    bound = problem.wanted.microseconds
    trials = [_trial(candidate, problem.space, lengths, bound) for candidate in earlier] if by_model else []
    for attempt in range(TRIES):
        number = zlib.crc32(f"{seed} {attempt}".encode())
        if by_model and attempt < TRIES // 2:
            sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=0)
            study = optuna.create_study(sampler=sampler)
            study.add_trials(trials)
            trial = study.ask()
            origin = "TPE"
            settings = draw(problem.space, lambda name, choice, trial=trial: suggested(trial, name, choice))
        else:
            origin = "near"
            settings = near(problem.space, good[(place + attempt) % len(good)], random.Random(number))
        if problem.identity(settings) not in tried:
            return origin, settings
    return None


def near(space: Space, base: Settings, chance: random.Random) -> dict[str, Value]:
    """Settings that differ from others in some choices.

    Args:
        space: What may be chosen.
        base: The others.
        chance: Random numbers.

    Returns:
        The settings: each choice is changed with a probability of a third, numbers of ranges by a factor of at most 2.
    """

    def pick(name: str, choice: Choice) -> Value:
        draws = chance.random(), chance.random()  # always two, so that one choice does not change the draws of others
        if name in base and draws[0] >= CHANGED:
            return choice.nearest(base[name])
        if choice.values:
            return choice.values[int(draws[1] * len(choice.values))]
        low, high = choice.low, choice.high
        if name in base:
            low, high = (float(choice.nearest(float(base[name]) * factor)) for factor in (0.5, 2.0))
        return float(low * (high / low) ** draws[1])

    return draw(space, pick)


def different(
    starts: Sequence[tuple[str, Settings]], identity: Callable[[Settings], str]
) -> list[tuple[str, Settings]]:
    """Named settings without those that come to the same as one before them.

    Args:
        starts: Names and settings.
        identity: What a training with some settings depends on.

    Returns:
        The first of each.
    """
    first: dict[str, tuple[str, Settings]] = {}
    for start in starts:
        first.setdefault(identity(start[1]), start)
    return list(first.values())


def suggested(trial: Any, name: str, choice: Choice) -> Value:
    """Ask a trial of Optuna for a value.

    Args:
        trial: The trial.
        name: Name of the choice.
        choice: What may be chosen.

    Returns:
        The value.
    """
    if choice.values:
        return trial.suggest_categorical(name, choice.values)
    return trial.suggest_float(name, choice.low, choice.high, log=True)


def distributions(candidate: Candidate, space: Space) -> dict[str, Any]:
    """What a candidate's settings were chosen from, in Optuna's terms.

    Args:
        candidate: The candidate.
        space: What may be chosen.

    Returns:
        Name -> distribution, of those settings that were not fixed.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, Any] = {}

    def pick(name: str, choice: Choice) -> Value:
        found[name] = (
            CategoricalDistribution(choice.values)
            if choice.values
            else FloatDistribution(choice.low, choice.high, log=True)
        )
        return candidate.settings[name]

    draw(space, pick)
    return found


def _trial(candidate: Candidate, space: Space, lengths: Sequence[int], microseconds: float | None) -> Any:
    """A candidate as a trial of Optuna: complete if it had the longest training, else pruned after its longest one.

    Of pruned trials the sampler prefers those that were trained longer, then those with lower values. A network that is
    too slow counts as pruned before the first step, with what exceeds the bound as its value: it is worse than all
    others, and the better the faster it is.
    """
    from optuna.trial import TrialState, create_trial

    ranges = distributions(candidate, space)
    valued = {steps: result.value for steps, result in candidate.results.items() if result.value is not None}
    top = valued.get(lengths[-1])
    last = candidate.longest()
    if valued and last is not None and (over := last.over(microseconds)) > 0:
        valued, top = {0: over}, None
    return create_trial(
        state=TrialState.PRUNED if top is None else TrialState.COMPLETE,
        value=top,
        params={name: candidate.settings[name] for name in ranges},
        distributions=ranges,
        intermediate_values=valued,
    )
