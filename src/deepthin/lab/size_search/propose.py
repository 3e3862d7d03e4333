"""Propose the settings of a round's candidates: known ones first, then Optuna's estimate of what is good.

Tree-structured Parzen estimator (Bergstra et al., 2011, "Algorithms for hyper-parameter optimization"). A proposal is a
function of the seed, its place, and the results of earlier rounds: however a search was interrupted, and wherever its
trainings run, it proposes the same.
"""

import zlib
from collections.abc import Sequence
from typing import Any

from deepthin.lab.size_search.candidate import Candidate, Value
from deepthin.lab.size_search.space import Choice, Space, draw

RANDOM_EVERY = 3  # each third proposal is random, as in BOHB (Falkner et al., 2018, arXiv:1807.01774)
TRIES = 20  # for settings that were not proposed before


def proposed(
    space: Space,
    earlier: Sequence[Candidate],
    before: Sequence[Candidate],
    lengths: Sequence[int],
    microseconds: float | None,
    seed: int,
    place: int,
) -> tuple[str, dict[str, Value]] | None:
    """Settings that are new.

    Args:
        space: What may be chosen.
        earlier: Candidates of earlier rounds, with their results.
        before: Candidates of this round that were proposed already.
        lengths: Steps of each rung, rising.
        microseconds: Upper bound on the time for one item; None: none.
        seed: Seed of the search.
        place: Place in the round.

    Returns:
        Their origin, ``"TPE"`` or ``"random"``, and the settings; None if nothing new was found.
    """
    import optuna

    round_ = max((candidate.round for candidate in earlier), default=-1) + 1
    tried = [candidate.settings for candidate in (*earlier, *before)]
    origin = "random" if not earlier or place % RANDOM_EVERY == RANDOM_EVERY - 1 else "TPE"
    for attempt in range(TRIES):
        number = zlib.crc32(f"{seed} {round_} {place} {attempt}".encode())
        by_chance = origin == "random" or attempt >= TRIES // 2
        samplers = optuna.samplers
        sampler = samplers.RandomSampler(number) if by_chance else samplers.TPESampler(seed=number, n_startup_trials=0)
        study = optuna.create_study(sampler=sampler)
        if origin == "TPE":
            study.add_trials([_trial(candidate, space, lengths, microseconds) for candidate in earlier])
        trial = study.ask()
        settings = draw(space, lambda name, choice, trial=trial: suggested(trial, name, choice))
        if settings not in tried:
            return origin, settings
    return None


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
