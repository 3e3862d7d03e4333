"""The search: rounds of successive halving within the time, each result written at once (docs/search.md)."""

import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepthin.errors import BudgetError, ConfigError, DeepThinError
from deepthin.lab.calls import Engine, TrialTimeout
from deepthin.lab.claims import claimed
from deepthin.lab.engines import ENGINES
from deepthin.lab.size_search.candidate import Candidate, Result
from deepthin.lab.size_search.clock import Clock, Forecast, fits, highest, seconds_of, worded
from deepthin.lab.size_search.halving import FIRST, due, ordered, ranked, rungs
from deepthin.lab.size_search.problem import Problem
from deepthin.lab.size_search.propose import NEAR, different, proposed
from deepthin.lab.size_search.record import NAME, Record
from deepthin.lab.size_search.starts import known
from deepthin.lab.size_search.training import train_candidate
from deepthin.lab.trial import hold

_LOOK_SECONDS = 0.5  # between two looks at the work of other drivers
Told = Callable[[Candidate, Result], None]
"""Called with each result."""
Progress = Callable[[float, float], None]
"""Called with the seconds that are spent, and the budget."""


@dataclass
class Search:
    """A search under way.

    Attributes:
        problem: What is searched.
        record: What is done.
        out: Its folder.
        engine: Where trainings run.
        clock: The time.
        told: Called with each result.
        progress: Called with the seconds so far, and those of the budget.
    """

    problem: Problem
    record: Record
    out: Path
    engine: Engine
    clock: Clock
    told: Told = lambda *_: None
    progress: Progress = lambda *_: None
    candidates: list[Candidate] = field(init=False)

    def __post_init__(self) -> None:
        wanted = self.problem.wanted
        self.candidates = self.record.candidates()
        self.forecast = Forecast.of(self.candidates)
        self.lengths = rungs(self.problem.run.steps, wanted.least_steps)
        self._starts = different(known(self.problem.space, self.problem.usual), self.problem.identity)
        self._limit = wanted.microseconds

    def run(self) -> None:
        """Run rounds until the time is over, or the rounds that were asked for are done.

        Raises:
            Exception: What a training raised, other than that it diverged or that its size is out of reach.
        """
        most, round_ = self.problem.wanted.rounds, self.record.closed()
        while (most is None or round_ < most) and self._round(round_):
            round_ += 1
        if most is None or round_ < most:
            self._promote()

    def _left(self) -> float:
        """Seconds for trainings: the best file has yet to be judged on test data."""
        return self.clock.left() - self.forecast.rest

    def _round(self, round_: int) -> bool:
        """One round, or the rest of it; whether it is complete."""
        left = self._left()
        aim = highest(self.forecast, self.lengths, left)
        begun = any(candidate.round == round_ for candidate in self.candidates)
        if aim is None or (round_ > 0 and not begun and aim < len(self.lengths) - 1):
            return False
        if not self._propose(round_):
            return False
        complete = True
        for place, steps in enumerate(self.lengths):
            while True:
                self.candidates = self.record.candidates()  # with what other drivers have found
                wanted = [c for c in due(self._of(round_), self.lengths, self._limit)[place] if c.at(steps) is None]
                if not self._train(wanted, place, left) or self._left() <= 0:
                    break
                time.sleep(_LOOK_SECONDS)
            complete = complete and all(self.candidates[c.number].at(steps) is not None for c in wanted)
        if complete:
            self.record.close(self._of(round_), self.lengths)
        return complete

    def _promote(self) -> None:
        """Use what is left of the time, too short for a round: longer trainings of the best that had none."""
        while True:
            for place in range(len(self.lengths) - 2, -1, -1):
                steps, next_ = self.lengths[place], self.lengths[place + 1]
                waiting = [c for c in ordered(self.candidates, steps, self._limit) if c.at(next_) is None]
                if waiting and fits(self.forecast, waiting[0].number, [next_], self._left()):
                    self._train(waiting[: self.engine.jobs], place + 1)
                    if self.candidates[waiting[0].number].at(next_) is None:
                        return
                    break
            else:
                return

    def _of(self, round_: int) -> list[Candidate]:
        return sorted((c for c in self.candidates if c.round == round_), key=lambda c: c.place)

    def _propose(self, round_: int) -> bool:
        """Add the candidates of a round that are missing; whether it has any."""
        self.candidates = self.record.candidates()
        earlier = [c for c in self.candidates if c.round < round_]
        tried = {self.problem.identity(c.settings) for c in self.candidates}
        unused = [(name, s) for name, s in self._starts if self.problem.identity(s) not in tried]
        for place in range(len(self._of(round_)), FIRST):
            if unused:
                found = unused.pop(0)
            else:
                known_to_be_good = [settings for _, settings in self._starts]
                near = [c.settings for c in ranked(earlier, self._limit)[:NEAR]] or known_to_be_good
                seed = f"{self.problem.wanted.seed} {round_} {place}"
                found = proposed(self.problem, earlier, near, tried, self.lengths, place, seed)
            if found is None:  # all settings have been tried
                break
            self.record.add(round_, place, found[1], found[0])
            tried.add(self.problem.identity(found[1]))
        self.candidates = self.record.candidates()
        return bool(self._of(round_))

    def _train(self, candidates: Sequence[Candidate], place: int, round_seconds: float | None = None) -> bool:
        """Train candidates for the steps of a rung, as long as that is predicted to end in time.

        In a round, which had so many seconds when it began, time is kept for one training of each longer rung that the
        round can reach. Returns whether other drivers train some of them.
        """
        steps = self.lengths[place]
        others = False

        def begins(candidate: Candidate) -> bool:
            aim = None if round_seconds is None else highest(self.forecast, self.lengths, round_seconds)
            later = list(() if aim is None else self.lengths[place + 1 : aim + 1])
            while later and sum(self.forecast.seconds(length) or 0.0 for length in later) > self._left():
                later.pop()  # out of reach by now
            return fits(self.forecast, candidate.number, [steps, *later], self._left())

        def call(candidate: Candidate) -> Any:
            nonlocal others
            # after the training this network is judged, and in the end the best one on test data
            job = self.problem.job(candidate, steps, self.out, self._left() - self.forecast.rest)
            if claimed(job.claim):
                others = True
                return None
            inline = self.engine.jobs == 1 and self.problem.wanted.engine == "local"
            report = (lambda *_: self.progress(self.clock.spent(), self.clock.budget)) if inline else None
            return train_candidate, job, report

        def ended(candidate: Candidate, result: Result | TrialTimeout | None) -> None:
            nonlocal others
            if result is None:
                others = True
                return
            if isinstance(result, TrialTimeout):
                result = Result(steps, None, str(result))
            self.forecast.learn(candidate.number, result)
            self.record.spend(self.clock.spent())
            self.progress(self.clock.spent(), self.clock.budget)
            if result.value is None and result.failed is None:
                return  # stopped: it goes on when there is more time
            result = replace(result, at=round(self.clock.spent(), 1))
            self.candidates[candidate.number] = self.record.note(self.candidates[candidate.number], result)
            self.told(candidate, result)

        run_calls(self.engine, list(candidates), begins, call, ended)
        return others


def run_calls(
    engine: Engine,
    waiting: list[Candidate],
    begins: Callable[[Candidate], bool],
    call: Callable[[Candidate], Any],
    ended: Callable[[Candidate, Any], None],
) -> None:
    """Run a call for each candidate in order, as many at once as the engine has jobs.

    Args:
        engine: Where they run.
        waiting: The candidates; emptied as they begin.
        begins: Whether the next one may begin now; if not, no more do.
        call: The call of a candidate; None if another driver trains it.
        ended: Takes each result, or that the call took too long.

    Raises:
        Exception: The first one that a call raised; those that run may end before it is raised.
    """
    running: dict[Any, Candidate] = {}
    failure: Exception | None = None
    while True:
        while waiting and failure is None and len(running) < engine.jobs and begins(waiting[0]):
            candidate = waiting.pop(0)
            if (wanted := call(candidate)) is not None:
                running[engine.start(wanted)] = candidate
        if not running:
            break
        handle, result = engine.done(list(running))
        candidate = running.pop(handle)
        if isinstance(result, Exception) and not isinstance(result, TrialTimeout):
            failure = failure or result
        else:
            ended(candidate, result)
    if failure is not None:
        raise failure


def run_search(problem: Problem, out: Path, told: Told, progress: Progress) -> tuple[list[Candidate], bool]:
    """Run a search, or go on with it.

    Args:
        problem: What is searched.
        out: Its folder; created if missing.
        told: Called with each result.
        progress: Called with the seconds so far, and those of the budget.

    Returns:
        All candidates with their results, and whether it was interrupted from the keyboard.

    Raises:
        ConfigError: The folder holds another search, or no training ended in time.
        BudgetError: No candidate reaches the size.
        DeepThinError: All trainings failed.
    """
    wanted = problem.wanted
    out.mkdir(parents=True, exist_ok=True)
    about = problem.about()
    of_all = f"{about['task']}-{zlib.crc32(json.dumps(about, sort_keys=True).encode()):08x}-{NAME}"
    record = Record(out / "search.db", problem.space, wanted.storage, of_all if wanted.storage else NAME)
    record.check(about)
    clock = Clock(seconds_of(wanted.budget), record.spent)
    engine = ENGINES[wanted.engine](wanted.jobs, replace(wanted.resources, threads=wanted.threads), out)
    search = Search(problem, record, out, engine, clock, told, progress)
    interrupted = False
    try:
        engine.share((hold, wanted.setup, problem.run))
        search.run()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        engine.close()
        record.spend(clock.spent())
    results = [result for candidate in search.candidates for result in candidate.results.values()]
    if not any(result.value is not None for result in results):
        if interrupted:
            raise KeyboardInterrupt
        raise _nothing(search, [result for result in results if result.failed])
    return search.candidates, interrupted


def _nothing(search: Search, failures: Sequence[Result]) -> DeepThinError:
    """Why no training has ended well."""
    if smallest := [result.smallest_bytes for result in failures if result.smallest_bytes is not None]:
        least, dense_bytes = min(smallest), search.problem.run.dense_bytes()
        return BudgetError(
            f"No configuration reaches {search.problem.wanted.file_bytes:,} bytes: the smallest that was tried has "
            f"{least:,} with every symbol zero. Use --file-bytes {max(2 * least, least + 100)} or more, or a smaller "
            "network.",
            smallest_bits=8 * least,
            smallest_ratio=least / dense_bytes,
        )
    if failures:
        return DeepThinError(
            f"All trainings failed. The first: {failures[0].failed} A table [training] in --space FILE sets the rates."
        )
    steps = search.lengths[0]
    seconds = search.forecast.seconds(steps)
    takes = "" if seconds is None else f": one of {steps:,} steps takes about {worded(seconds)}"
    return ConfigError(
        f"No training ended within the budget of {worded(search.clock.budget)}{takes}. Give a longer --budget, with "
        "which the same command goes on, or fewer --steps."
    )
