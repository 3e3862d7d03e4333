"""What a search has done, in an SQLite file: a trial of Optuna for each candidate, whole or not there."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError
from deepthin.lab.claims import claim
from deepthin.lab.search import open_storage
from deepthin.lab.size_search.candidate import Candidate, Result, Value
from deepthin.lab.size_search.propose import distributions
from deepthin.lab.size_search.space import Space

NAME = "size"
_ABOUT, _SPENT, _RESULTS = "about", "spent", "results of candidate {}"
LEAST_TRIALS = 8  # for importances


class Record:
    """The file of a search, which several drivers may share.

    Args:
        path: The file; created if missing. Claims on it are in the folder ``locks`` beside it.
        space: What may be chosen.
        storage: What to use instead of the file: the URL of a database, or a journal file.
        name: Name of the study.

    Raises:
        ConfigError: Optuna is not installed, or the file is damaged.
    """

    def __init__(self, path: Path, space: Space, storage: str | None = None, name: str = NAME) -> None:
        if find_spec("optuna") is None:
            raise ConfigError("deepthin search needs Optuna: pip install 'deepthin[compare]'.")
        opened = open_storage(path, storage)
        import optuna

        self._path, self._space, self._lock = path, space, path.parent / "locks" / "study.lock"
        with claim(self._lock):
            self._study = optuna.create_study(storage=opened, study_name=name, load_if_exists=True)

    def check(self, about: Mapping[str, Any]) -> None:
        """Refuse to go on with another search.

        Args:
            about: All that the proposals and the results depend on.

        Raises:
            ConfigError: The file is of a search with another value of one of them.
        """
        with claim(self._lock):
            earlier = self._study.user_attrs.get(_ABOUT)
            if earlier is None:
                self._study.set_user_attr(_ABOUT, dict(about))
                return
        changed = [k for k in sorted({*earlier, *about}) if earlier.get(k) != about.get(k)]
        if changed:
            key = changed[0]
            raise ConfigError(
                f"{self._path.parent} holds another search ({', '.join(changed)}: {_short(earlier.get(key))}, now "
                f"{_short(about.get(key))}): choose another --out, or remove {self._path} to begin anew."
            )

    @property
    def spent(self) -> float:
        """Seconds that earlier runs took, up to their last result."""
        return float(self._study.user_attrs.get(_SPENT, 0.0))

    def spend(self, seconds: float) -> None:
        """Note how many seconds the search has taken.

        Args:
            seconds: All of them; of several drivers, the largest number counts.
        """
        with claim(self._lock):
            self._study.set_user_attr(_SPENT, max(seconds, self.spent))

    def candidates(self) -> list[Candidate]:
        """All candidates with their results.

        Returns:
            In the order in which they were added.
        """
        results = self._study.user_attrs
        return [_candidate(trial, _results(results, trial.number)) for trial in self._study.get_trials(deepcopy=False)]

    def add(self, round_: int, place: int, settings: Mapping[str, Value], origin: str) -> Candidate:
        """Add a candidate, unless another driver has added one in its place.

        Args:
            round_: Its round.
            place: Its place there.
            settings: Its settings.
            origin: Where they come from.

        Returns:
            The candidate.
        """
        with claim(self._lock):
            there = self.candidates()
            same = [one for one in there if (one.round, one.place) == (round_, place)]
            return same[0] if same else self._added(len(there), round_, place, settings, origin)

    def _added(self, number: int, round_: int, place: int, settings: Mapping[str, Value], origin: str) -> Candidate:
        from optuna.trial import TrialState, create_trial

        candidate = Candidate(number, round_, place, dict(settings), {}, origin)
        ranges = distributions(candidate, self._space)
        about = {"round": round_, "place": place, "settings": dict(settings), "origin": origin}
        trial = create_trial(
            state=TrialState.RUNNING,
            params={name: settings[name] for name in ranges},
            distributions=ranges,
            user_attrs=about,
        )
        self._study.add_trial(trial)
        return candidate

    def note(self, candidate: Candidate, result: Result) -> Candidate:
        """Add a result.

        Args:
            candidate: Whose it is.
            result: The result.

        Returns:
            The candidate with the result.
        """
        with claim(self._lock):
            there = _results(self._study.user_attrs, candidate.number)
            candidate = replace(candidate, results={**candidate.results, **there, result.steps: result})
            stored = [one.to_json() for one in candidate.results.values()]
            self._study.set_user_attr(_RESULTS.format(candidate.number), stored)  # trials that have ended take no more
        return candidate

    def close(self, candidates: list[Candidate], lengths: tuple[int, ...]) -> None:
        """End a round: Optuna's own tools then show its trials as complete or pruned.

        Args:
            candidates: All of the round, with their results.
            lengths: Steps of each rung, rising.
        """
        from optuna.trial import TrialState

        with claim(self._lock):
            trials = self._study.get_trials(deepcopy=False)
            for candidate in candidates:
                if trials[candidate.number].state != TrialState.RUNNING:
                    continue
                top = candidate.at(lengths[-1])
                if top is None or top.value is None:
                    self._study.tell(candidate.number, state=TrialState.PRUNED)
                else:
                    self._study.tell(candidate.number, top.value)

    def closed(self) -> int:
        """How many rounds have ended.

        Returns:
            Rounds whose trials all are complete or pruned.
        """
        running = {
            trial.user_attrs["round"]
            for trial in self._study.get_trials(deepcopy=False)
            if not trial.state.is_finished()
        }
        rounds = {trial.user_attrs["round"] for trial in self._study.get_trials(deepcopy=False)}
        return len(rounds - running)


def importances(space: Space, candidates: list[Candidate]) -> dict[str, float]:
    """How much of the differences between the shortest trainings each choice explains, by Optuna's fANOVA.

    Hutter, Hoos and Leyton-Brown, 2014, "An efficient approach for assessing hyperparameter importance".

    Args:
        space: What may be chosen.
        candidates: Candidates with results.

    Returns:
        Choice -> share, largest first; only choices that every candidate had. Empty for too few candidates, or without
        scikit-learn, which it needs.
    """
    if find_spec("optuna") is None or find_spec("sklearn") is None:
        return {}
    import optuna
    from optuna.trial import create_trial

    shortest = min((min(c.results) for c in candidates if c.results), default=0)
    valued = [(c, r.value) for c in candidates if (r := c.at(shortest)) is not None and r.value is not None]
    if len(valued) < LEAST_TRIALS or len({value for _, value in valued}) < 2:
        return {}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for candidate, value in valued:
        ranges = distributions(candidate, space)
        params = {name: candidate.settings[name] for name in ranges}
        study.add_trial(create_trial(value=value, params=params, distributions=ranges))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _results(stored: Mapping[str, Any], number: int) -> dict[int, Result]:
    return {one["steps"]: Result(**one) for one in stored.get(_RESULTS.format(number), [])}


def _candidate(trial: Any, results: dict[int, Result]) -> Candidate:
    told = trial.user_attrs
    return Candidate(trial.number, told["round"], told["place"], told["settings"], results, told["origin"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
