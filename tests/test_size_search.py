"""The search of the best file of a size: its rounds, its time, its proposals, and what it leaves."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace

import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin import BudgetError, ConfigError, DeepThinError
from deepthin.cli.main import main
from deepthin.lab.calls import Resources
from deepthin.lab.claims import claim
from deepthin.lab.run import Setup
from deepthin.lab.size_search import search as module
from deepthin.lab.size_search import training as trainings
from deepthin.lab.size_search.best import chosen, command, write_best
from deepthin.lab.size_search.candidate import Candidate, Result
from deepthin.lab.size_search.clock import Clock, Forecast, fits, highest, seconds_of
from deepthin.lab.size_search.configuration import rules_of, to_toml
from deepthin.lab.size_search.groups import matrices_of
from deepthin.lab.size_search.halving import FIRST, due, ordered, ranked, rungs
from deepthin.lab.size_search.problem import Problem
from deepthin.lab.size_search.propose import near, proposed
from deepthin.lab.size_search.record import Record, importances
from deepthin.lab.size_search.search import run_search
from deepthin.lab.size_search.settings import Wanted
from deepthin.lab.size_search.space import OWN, Choice, default_training
from deepthin.lab.size_search.space_file import widened
from deepthin.lab.size_search.starts import known
from deepthin.lab.size_search.training import OutOfTime, Pace, train_candidate
from deepthin.lab.size_search.worth import described, falling, family, front, worth

pytest.importorskip("optuna")

STEPS = 900  # of the fake trainings: rungs of 100, 300 and 900
IMAGES = torch.rand(120, 24, generator=torch.Generator().manual_seed(0))
CLASSES = (IMAGES[:, :12].sum(1) > IMAGES[:, 12:].sum(1)).long()


def build():
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))


def small():
    return nn.Sequential(nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 2))


def wrong():
    return nn.Linear(7, 2)


def fit(model, training):
    for batch in training.batches(80, 16):
        training.minimise(nn.functional.cross_entropy(model(IMAGES[batch]), CLASSES[batch]))


def evaluate(model, split):
    part = slice(80, 100) if split == "dev" else slice(100, 120)
    loss = nn.functional.cross_entropy(model(IMAGES[part]), CLASSES[part])
    return {"loss": float(loss), "error": 100 * float((model(IMAGES[part]).argmax(1) != CLASSES[part]).float().mean())}


def wanted(steps=STEPS, file_bytes=1500, least_steps=100, **more):
    return Wanted(Setup("", steps=steps, own=(build, fit, evaluate)), file_bytes, least_steps=least_steps, **more)


def value_of(settings, steps):
    """A made-up error: a function of the settings that falls with the steps."""
    text = json.dumps(sorted((name, str(value)) for name, value in settings.items()))
    return sum(text.encode()) % 97 / 97 + 100 / steps


class Fake:
    """Stands for the trainings: it counts them, takes no time, and may stop or raise at one of them."""

    def __init__(self, raises_at=None, microseconds=lambda settings: 50.0, step_seconds=0.01, clock=None):
        self.jobs, self.raises_at, self.microseconds = [], raises_at, microseconds
        self.step_seconds, self.clock = step_seconds, clock

    def __call__(self, job, report=None):
        steps = job.setup.steps
        if len(self.jobs) == self.raises_at:
            raise RuntimeError("killed")
        self.jobs.append((job.file, job.rules, job.lr, job.decay))
        settings = {"rules": job.rules, "lr": job.lr, "decay": job.decay}
        seconds = steps * self.step_seconds
        if self.clock is not None:
            if seconds > job.seconds:
                self.clock.now += job.seconds
                return Result(steps, None, seconds=job.seconds, step_seconds=self.step_seconds)
            self.clock.now += seconds
        return Result(
            steps, value_of(settings, steps), None, 1400, self.microseconds(job.rules), seconds, self.step_seconds,
            file=job.file, development={"loss": value_of(settings, steps)},
        )  # fmt: skip


class Now:
    """A clock that only trainings move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Reversed:
    """An engine of two jobs that hands back the one that began last."""

    jobs = 2

    def share(self, call):
        pass

    def start(self, call):
        return call

    def done(self, begun):
        function, *arguments = begun[-1]
        return begun[-1], function(*arguments)

    def close(self):
        pass


def searched(problem, out, monkeypatch, fake):
    monkeypatch.setattr(module, "train_candidate", fake)
    candidates, _ = run_search(problem, out, lambda *_: None, lambda *_: None)
    return candidates


def untimed(candidates):
    """All that does not depend on the time: settings, origins and values, by round and place."""
    return [(c.round, c.place, c.origin, dict(c.settings), {s: r.value for s, r in c.results.items()})
            for c in sorted(candidates, key=lambda c: (c.round, c.place))]  # fmt: skip


def candidate(number, values, microseconds=10.0, settings=None, round_=0):
    results = {steps: Result(steps, value, None, 100, microseconds, development={"e": value or 0.0})
               for steps, value in values.items()}  # fmt: skip
    return Candidate(number, round_, number, settings or {"network": OWN}, results)


# Rounds


def test_rungs_are_thirds_but_none_is_too_short():
    assert rungs(3000) == (333, 1000, 3000)
    assert rungs(900) == (300, 900)
    assert rungs(600) == (600,)
    assert rungs(50) == (50,)
    assert rungs(18, least=2) == (2, 6, 18)


def test_the_best_third_is_promoted_and_slow_networks_come_last():
    round_ = [candidate(i, {100: 9.0 - i}, microseconds=10.0 * i) for i in range(9)]
    first, second, third = due(round_, (100, 300, 900), None)
    assert [c.number for c in first] == list(range(9))
    assert [c.number for c in second] == [8, 7, 6]
    assert third == []
    assert [c.number for c in due(round_, (100, 300), 30.0)[1]] == [3, 2, 1]
    assert [c.number for c in ordered(round_, 100, 30.0)][-1] == 8
    known = [replace(c, origin="DeepThin" if c.number in (1, 5) else c.origin) for c in round_]
    assert [c.number for c in due(known, (100, 300, 900), None)[1]] == [8, 7, 6, 1]  # a known start is trained in full
    assert [c.number for c in due(known, (100, 300), 5.0)[1]] == [0, 1, 2]  # unless it is too slow
    failed = [*round_, candidate(9, {100: None})]
    assert 9 not in [c.number for c in ordered(failed, 100, None)]


def test_the_best_is_the_lowest_value_within_the_bound_and_of_equal_ones_the_longest_training():
    some = [candidate(0, {100: 3.0, 300: 3.0}, 50.0), candidate(1, {100: 2.0}, 90.0), candidate(2, {100: None})]
    assert chosen(some, None)[0].number == 1
    assert [(c.number, r.steps) for c, r in [chosen(some, 60.0)]] == [(0, 300)]
    assert chosen(some, 10.0)[0].number == 0  # none is fast enough: the fastest


# Time


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), (45, 45)])
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "2 hours", "-3s", "0s", True, float("inf"), float("nan"), "h"])
def test_what_is_no_duration(text):
    with pytest.raises(ConfigError, match="is no duration: write such as 90s, 30m, 2h or 1h30m."):
        seconds_of(text)


def test_forecasts():
    forecast = Forecast.of([])
    assert forecast.seconds(100) is None
    assert highest(forecast, (100, 300), 1.0) == 1
    assert fits(forecast, 0, [100], 1.0)
    assert not fits(forecast, 0, [100], 0.0)
    for number, step_seconds in enumerate((0.5, 1.0)):
        forecast.learn(number, Result(100, 1.0, step_seconds=step_seconds, rest_seconds=2.0))
    assert forecast.seconds(100, 0) == 52
    assert forecast.seconds(100) == forecast.seconds(100, 7) == 102  # a new one is as slow as the slowest
    assert highest(forecast, (10, 30, 90), 45.0) == 1  # 12 and 32 seconds
    assert highest(forecast, (10, 30, 90), 11.0) is None
    assert fits(forecast, 0, [10, 30], 24.0)
    assert not fits(forecast, 0, [10, 30], 23.0)


def test_a_training_that_would_overrun_is_stopped():
    now = Now()
    pace = Pace(100.0, now)
    for step in range(1, 25):
        now.now += 10 * (step == 24)
        pace.step(step, 100)
    now.now += 50  # 60 seconds for a quarter
    with pytest.raises(OutOfTime):
        pace.step(25, 100)
    pace = Pace(100.0, now)
    for step in range(1, 100):
        now.now += 0.9
        pace.step(step, 100)
    now.now += 1000
    pace.step(100, 100)  # it has ended


# Space


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.into = nn.Linear(8, 16)
        self.memory = nn.LSTM(16, 16)
        self.mid = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.out = nn.Linear(16, 4)
        self.own = nn.Parameter(torch.zeros(3, 3))


def test_groups_of_like_matrices():
    found = matrices_of(Everything())
    assert found.groups == {
        "table": ("table.weight",),
        "convolution": ("conv.weight",),
        "recurrent": ("memory.weight_ih_l0", "memory.weight_hh_l0"),
        "first": ("into.weight",),
        "middle": ("mid.0.weight", "mid.1.weight", "mid.2.weight"),
        "last": ("out.weight",),
    }
    assert found.ignore == ("own",)
    assert matrices_of(nn.Linear(3, 4)).groups == {"last": ("weight",)}
    assert set(matrices_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))).groups) == {"first", "last"}


def spaced(text, model=None, teacher=False):
    return widened(tomllib.loads(text), default_training(1e-3, (OWN,), teacher), matrices_of(model or build()), 0.25)


def test_a_file_fixes_and_widens_the_space():
    space = spaced(
        '[training]\nlr = 0.002\ndecay = { low = 0.01, high = 0.1 }\n[groups."*"]\nrank = [1, 16]\n'
        '[groups.first]\nmethod = "hashed"\nfloats = [0.1, 0.2]\n[groups.pair]\nmatch = ["2", "4.weight"]\n'
        'method = ["coded", "rank"]'
    )
    assert space.training["lr"] == Choice((0.002,))
    assert space.training["decay"] == Choice(low=0.01, high=0.1)
    groups = {group.name: group for group in space.groups}
    assert {name: group.matrices for name, group in groups.items()} == {
        "pair": ("2.weight", "4.weight"), "first": ("0.weight",)
    }  # fmt: skip
    assert groups["first"].choices["method"] == Choice(("hashed",))
    assert groups["first"].choices["floats"] == Choice((0.1, 0.2))
    assert groups["pair"].choices["rank"] == Choice((1, 16))
    assert groups["pair"].choices["method"] == Choice(("coded", "rank"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "--space has no key 'x'. Did you mean"),
        ("[training]\nrate = 1", "--space [training] has no key 'rate'. Did you mean 'lr'? Valid: lr, decay, teacher."
         .replace("'lr'", "'teacher'")),
        ("[training]\nlr = 0", "--space [training] lr = 0 must be above 0."),
        ("[training]\nlr = []", "--space [training] lr = [] leaves no choice: give a value, a list, or"),
        ("[training]\nlr = { low = 2, high = 1 }", "ranges are of lr, decay and floats, with 0 < low <= high."),
        ("[training]\nlr = nan", "--space [training] lr = nan must be a number."),
        ("[training]\ndecay = -1", "--space [training] decay = -1 must not be below 0."),
        ("[training]\nteacher = true", "--space [training] teacher = true needs --teacher FILE"),
        ("[training]\nteacher = 1", "--space [training] teacher = 1 must be true, false or a list of both."),
        ("[groups.first]\nmethod = 'depthin'", "method = 'depthin' is unknown. Did you mean 'deepthin'?"),
        ("[groups.first]\nmethod = 3", "method = 3 is unknown."),
        ("[groups.first]\nmethod = [['a']]", "method = ['a'] is unknown."),
        ("[groups.first]\nfloats = 2", "floats = 2 must be above 0 and at most 1."),
        ("[groups.first]\nrank = 0", "rank = 0 must be a whole number from 1 on, or 'max'."),
        ("[groups.first]\nranks = 0", "--space [groups.first] has no key 'ranks'. Did you mean 'rank'?"),
        ("[groups.recurrent]\nrank = 1", "--space [groups.recurrent] is empty in this network. Groups: first, middle"),
        ("[groups.body]\nrank = 1", "--space [groups.body] is unknown. Groups: first, middle, last. For a group of"),
        ("[groups.body]\nmatch = ['fc']", "--space [groups.body] 'fc' matches nothing."),
        ("[groups.body]\nmatch = 'fc'", "match = 'fc' must be a list of patterns, such as ['fc*']."),
        ("[groups.a]\nmatch = ['*']\n[groups.b]\nmatch = ['0']", "[groups.b] has no matrix that is not in a group"),
        ("[groups.first]\nmatch = ['2']", "[groups.first] has match, but first is a group already: name it otherwise."),
        ("groups = 3", "--space groups = 3 must be a table."),
    ],
)  # fmt: skip
def test_a_space_that_makes_no_sense_names_the_way_out(text, message):
    with pytest.raises(ConfigError) as caught:
        spaced(text)
    assert message in str(caught.value)


def test_a_search_begins_with_known_configurations(tmp_path):
    problem = Problem.prepare(wanted(also=(small,)))
    found = known(problem.space, problem.usual)
    assert [name for name, _ in found][:2] == ["Kronecker outside", "DeepThin"]
    assert found[2][1] == {"network": f"{__name__}:small", "lr": 0.001, "decay": 0.0, "teacher": False}
    first = found[0][1]
    methods = {name: value for name, value in first.items() if name.endswith("method")}
    assert methods == {"first.method": "kronecker", "middle.method": "deepthin", "last.method": "kronecker"}
    assert first["middle.rank"] == 4
    recurrent = known(spaced("", Everything()), problem.usual)
    assert {"DeepThin, decay .3", "hashed recurrent"} < {name for name, _ in recurrent}
    fixed = known(spaced('[groups."*"]\nmethod = "coded"'), problem.usual)
    assert len(fixed) <= 2  # the known ones as far as the space allows, each once


def test_settings_become_a_configuration_that_compress_takes():
    model = Everything()
    matrices = {OWN: matrices_of(model)}
    space = widened({}, default_training(1e-3, (OWN,), False), matrices[OWN], 0.25)
    problem = Problem.prepare(wanted())
    for _, settings in known(space, problem.usual):
        rules = rules_of(settings, space, matrices, 3000)
        assert rules["model"] == {"file_bytes": 3000, "ignore": ["own"]}
        again = tomllib.loads(to_toml(rules, "about\nthis"))
        assert again == rules
        thin = Everything()
        dt.compress(thin, again, init="scratch")
        assert dt.SizeTarget(thin, 10).file_bytes == 3000


def test_a_matrix_too_small_for_its_floats_is_coded_as_it_is():
    matrices = {OWN: matrices_of(build())}
    space = spaced('[groups."*"]\nmethod = "deepthin"\nfloats = 0.02\nrank = 4')
    settings = known(space, Problem.prepare(wanted()).usual)[0][1]
    rules = rules_of(settings, space, matrices, 1500)["rules"]
    assert {"method": "coded"} in rules.values()
    dt.compress(build(), {"model": {"file_bytes": 1500}, "rules": rules}, init="scratch")


def test_names_of_any_characters_survive_toml():
    rules = {"model": {"file_bytes": 1}, "rules": {'a"b\\c\x7f\u00e9': {"method": "coded", "x": True, "y": [1, 0.5]}}}
    assert tomllib.loads(to_toml(rules, "")) == rules


# Proposals


def history(problem, count=18):
    """Candidates of two rounds, with made-up results."""
    candidates, good = [], [settings for _, settings in known(problem.space, problem.usual)]
    for number in range(count):
        round_, place = divmod(number, FIRST)
        earlier = [c for c in candidates if c.round < round_]
        tried = {problem.identity(c.settings) for c in candidates}
        near = [c.settings for c in ranked(earlier, None)[:3]] or good
        found = proposed(problem, earlier, near, tried, rungs(STEPS, 100), place, f"{round_} {place}")
        results = {100: Result(100, value_of(found[1], 100), None, 1400, 100.0 * (1 + place))}
        candidates.append(Candidate(number, round_, place, found[1], results, found[0]))
    return candidates


def test_proposals_are_new_and_depend_on_earlier_rounds_only():
    problem = Problem.prepare(wanted())
    one, two = history(problem), history(problem)
    assert untimed(one) == untimed(two)
    assert len({problem.identity(c.settings) for c in one}) == len(one)
    assert {c.origin for c in one[:FIRST]} == {"near"}
    assert [c.origin for c in one[FIRST:]] == ["TPE", "near"] * 4 + ["TPE"]
    third = [proposed(problem, one, [one[0].settings], (), rungs(STEPS, 100), 0, seed) for seed in ("0", "0", "1")]
    assert third[0] == third[1] != third[2]


def test_near_settings_differ_in_some_choices_by_little():
    problem = Problem.prepare(wanted())
    base = known(problem.space, problem.usual)[0][1]
    changes = []
    for seed in range(200):
        settings = near(problem.space, base, random.Random(seed))
        changes.append(sum(settings.get(name) != value for name, value in base.items()))
        assert 0.49 * base["lr"] < settings["lr"] < 2.01 * base["lr"]
    assert 1 < sum(changes) / len(changes) < len(base) / 2
    assert changes.count(0) < 20


def test_too_slow_networks_steer_proposals_away():
    problem = Problem.prepare(wanted())
    earlier = []
    for number in range(40):
        method = "kronecker" if number % 2 else "deepthin"
        settings = known(problem.space, problem.usual)[0][1] | {"first.method": method, "lr": 0.0005 + number / 1e5}
        settings |= {"first.rank": 4} if method == "deepthin" else {}
        slow = method == "kronecker"
        result = Result(100, 0.1 if slow else 1.0, None, 1400, 900.0 if slow else 10.0)
        earlier.append(Candidate(number, 0, number, settings, {100: result}))

    def share(bound):
        bounded = replace(problem, wanted=replace(problem.wanted, microseconds=bound))
        asked = [proposed(bounded, earlier, [earlier[0].settings], (), (100,), 0, str(seed))[1] for seed in range(20)]
        return sum(settings["first.method"] == "kronecker" for settings in asked)

    assert share(100.0) < share(None)


def test_a_space_that_is_used_up_ends_the_search(tmp_path, monkeypatch):
    space = {"training": {"lr": 0.001, "decay": [0.0, 0.1]}, "groups": {"*": {"method": "coded"}}}
    problem = Problem.prepare(wanted(space=space))
    candidates = searched(problem, tmp_path, monkeypatch, Fake())
    assert len(candidates) == 2
    assert max(s for c in candidates for s in c.results) == STEPS


# The search, with made-up trainings


def test_a_round_is_nine_short_trainings_three_longer_ones_and_one_long_one(tmp_path, monkeypatch):
    fake = Fake()
    candidates = searched(Problem.prepare(wanted(rounds=2)), tmp_path, monkeypatch, fake)
    counts = [sum(c.round == 1 and steps in c.results for c in candidates) for steps in (100, 300, 900)]
    assert counts == [9, 3, 1]
    begun = [[c for c in candidates if c.round == 0 and steps in c.results] for steps in (100, 300, 900)]
    first = ordered(begun[0], 100, None)[:3]
    assert {c.number for c in begun[1]} == {0, 1, *(c.number for c in first)}  # two known ones are trained in full
    second = ordered(begun[1], 300, None)[: -(-len(begun[1]) // 3)]
    assert {c.number for c in begun[2]} == {0, 1, *(c.number for c in second)}
    assert len({file for file, *_ in fake.jobs}) == len(fake.jobs) == 13 + sum(map(len, begun))
    assert candidates[0].origin == "Kronecker outside"
    _, result = chosen(candidates, None)
    assert result.value == min(r.value for c in candidates for r in c.results.values())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two rounds that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        return searched(Problem.prepare(wanted(rounds=2)), tmp_path_factory.mktemp("straight"), patch, Fake())


@pytest.mark.parametrize("at", [0, 9, 13, 20])
def test_after_a_kill_between_trainings_the_search_goes_on_with_the_same_proposals(at, straight, tmp_path, monkeypatch):
    problem = Problem.prepare(wanted(rounds=2))
    with pytest.raises(RuntimeError, match="killed"):
        searched(problem, tmp_path / "b", monkeypatch, Fake(raises_at=at))
    rest = Fake()
    again = searched(Problem.prepare(wanted(rounds=2)), tmp_path / "b", monkeypatch, rest)
    assert untimed(again) == untimed(straight)
    assert len(rest.jobs) == sum(len(c.results) for c in straight) - at  # nothing twice


def test_a_kill_between_two_proposals(straight, tmp_path, monkeypatch):
    problem = Problem.prepare(wanted(rounds=2))
    add, count = Record.add, [0]

    def dying(*arguments):
        count[0] += 1
        if count[0] == 13:
            raise RuntimeError("killed")
        return add(*arguments)

    monkeypatch.setattr(Record, "add", dying)
    with pytest.raises(RuntimeError):
        searched(problem, tmp_path / "b", monkeypatch, Fake())
    assert untimed(searched(problem, tmp_path / "b", monkeypatch, Fake())) == untimed(straight)


def test_two_jobs_run_the_same_trainings_as_one(straight, tmp_path, monkeypatch):
    monkeypatch.setitem(module.ENGINES, "local", lambda *_: Reversed())
    two = searched(Problem.prepare(wanted(rounds=2, jobs=2)), tmp_path / "b", monkeypatch, Fake())
    assert untimed(two) == untimed(straight)


@pytest.mark.parametrize("budget", [1.5, 4.0, 33.0])
def test_the_budget_is_kept(budget, tmp_path, monkeypatch):
    """Trainings of 1, 3 and 9 seconds, on a clock that only they move."""
    now = Now()
    monkeypatch.setattr(module, "Clock", lambda *given: Clock(*given, now))
    candidates = searched(Problem.prepare(wanted(budget=budget)), tmp_path, monkeypatch, Fake(clock=now))
    assert now.now <= budget
    lengths = [steps for c in candidates for steps in c.results]
    longest = {1.5: 100, 4.0: 300}.get(budget, 900)
    assert max(lengths) == longest  # time was kept for the longest training
    assert now.now > budget - {1.5: 1, 4.0: 1}.get(budget, 9) - 1e-6  # and used
    more = searched(Problem.prepare(wanted(budget=budget + 40.0)), tmp_path, monkeypatch, Fake(clock=now))
    assert now.now <= budget + 40.0
    assert len(more) >= len(candidates)
    assert sum(len(c.results) for c in more) > len(lengths)  # a longer budget goes on


def test_no_time_for_any_training(tmp_path, monkeypatch):
    now = Now()
    monkeypatch.setattr(module, "Clock", lambda *given: Clock(*given, now))
    with pytest.raises(ConfigError) as caught:
        searched(Problem.prepare(wanted(budget=0.5)), tmp_path, monkeypatch, Fake(clock=now))
    assert str(caught.value) == (
        "No training ended within the budget of 0.5 s: one of 100 steps takes about 1 s. Give a longer --budget, with "
        "which the same command goes on, or fewer --steps."
    )


def test_a_bound_on_the_time_for_one_item_is_kept_if_it_can_be(tmp_path, monkeypatch):
    def slow(rules):
        return 900.0 if any(rule["method"] == "kronecker" for rule in rules["rules"].values()) else 20.0

    candidates = searched(
        Problem.prepare(wanted(rounds=2, microseconds=100)), tmp_path, monkeypatch, Fake(microseconds=slow)
    )
    assert chosen(candidates, 100)[1].microseconds == 20.0
    longest = [c for c in candidates if STEPS in c.results]
    assert {c.results[STEPS].microseconds for c in longest} == {20.0}
    assert any(r.microseconds == 900.0 for c in candidates for r in c.results.values())  # reported anyway


def test_failed_trainings_are_told(tmp_path, monkeypatch):
    def failing(job, report=None):
        return Result(job.setup.steps, None, failed="The loss is nan at step 3: use a smaller learning rate.")

    with pytest.raises(DeepThinError, match="All trainings failed. The first: The loss is nan at step 3"):
        searched(Problem.prepare(wanted(rounds=1)), tmp_path, monkeypatch, failing)


def test_another_search_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    searched(Problem.prepare(wanted(rounds=1)), tmp_path, monkeypatch, Fake())
    with pytest.raises(ConfigError) as caught:
        searched(Problem.prepare(wanted(rounds=1, file_bytes=1600)), tmp_path, monkeypatch, Fake())
    assert "holds another search (file bytes: '1500', now '1600'): choose another --out" in str(caught.value)


def test_what_each_choice_was_worth(straight):
    problem, candidates = Problem.prepare(wanted(rounds=2)), straight
    rows = worth(problem.space, candidates, rungs(STEPS, 100))
    for steps in (100, 300, 900):
        lowest = min(r.value for c in candidates if (r := c.at(steps)))
        for choice in ("first.method", "decay", "lr"):
            assert min(row.best[steps] for row in rows if row.choice == choice and steps in row.best) == lowest
    assert sum(row.candidates for row in rows if row.choice == "first.method") == len(candidates)
    assert sum(row.candidates for row in rows if row.choice == "lr") == len(candidates)
    assert not any(row.choice in ("network", "teacher") for row in rows)  # fixed
    shares = importances(problem.space, candidates)
    assert set(shares) >= {"lr", "decay", "first.method"}
    assert family(candidates[0]) == "kronecker + deepthin"
    assert described(candidates[0]).startswith("first: kronecker ")


def test_fronts():
    some = [candidate(i, {100: value}, microseconds) for i, (value, microseconds) in
            enumerate([(3.0, 10.0), (2.0, 20.0), (2.5, 30.0), (1.0, 40.0), (3.0, 5.0)])]  # fmt: skip
    pairs = [(c, c.results[100]) for c in some]
    assert [c.number for c, _ in front(pairs, lambda r: r.microseconds)] == [4, 1, 3]
    timed = [(c, replace(r, at=float(-c.number))) for c, r in pairs]
    assert [c.number for c, _ in falling(timed)] == [4, 3]


# The search, with real trainings


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    out = tmp_path_factory.mktemp("search")
    told = []
    best = dt.search(
        build, fit, evaluate, file_bytes=1500, budget=600, out=out, steps=18, rounds=1, also=[small],
        told=lambda candidate, result: told.append((candidate.number, result.steps)),
    )  # fmt: skip
    return out, best, told


def test_what_a_search_leaves(real):
    out, best, told = real
    stored = json.loads((out / "best.json").read_text())
    assert {"file_bytes", "development", "test", "microseconds", "rules"} <= set(stored)
    assert stored["file_bytes"] == (out / "best.thin").stat().st_size == best.file_bytes <= 1500
    assert stored["rules"] == best.rules == tomllib.loads((out / "best.toml").read_text())
    assert told == [(number, 18) for number in range(9)]
    model = dt.load(small() if best.network != OWN else build(), out / "best.thin").eval()
    with torch.no_grad():
        assert evaluate(model, "dev")["loss"] == best.development == stored["metrics"]["dev"]["loss"]
        assert evaluate(model, "test")["loss"] == best.test
    assert best.microseconds > 0
    assert best.trainings == 9
    assert not list((out / "trials").glob("*.checkpoint"))


def test_the_page_needs_no_other_file(real):
    pytest.importorskip("jinja2")
    out, best, _ = real
    page = (out / "search.html").read_text()
    assert "http" not in page.replace("http://www.w3.org/", "").replace("http-equiv", "")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    names = {curve["method"] for curve in data["curves"]}
    assert {"front, bytes", "front, microseconds", "best so far", "18 steps"} <= names
    assert data["split"] == "development"
    assert f"{best.file_bytes:,} bytes" in page
    assert page.count("<tr>") > 9


def test_the_same_call_again_trains_nothing(real):
    out, best, _ = real
    told = []
    again = dt.search(
        build, fit, evaluate, file_bytes=1500, budget=600, out=out, steps=18, rounds=1, also=[small],
        told=lambda *given: told.append(given),
    )  # fmt: skip
    assert told == []
    assert again == best


def test_the_configuration_trains_to_the_same_bytes(real, tmp_path, monkeypatch, capsys):
    out, best, _ = real
    monkeypatch.chdir(tmp_path)
    words = best.command.split()
    assert words[:2] == ["deepthin", "train"]
    words[words.index("--steps") + 1] = str(best.steps)
    words[words.index("--out") + 1] = str(tmp_path / "again.thin")
    monkeypatch.setattr(sys, "argv", words)
    main_returns()
    assert (tmp_path / "again.thin").read_bytes() == (out / "best.thin").read_bytes()


def main_returns():
    """Run the command; its success ends in SystemExit(0) or a return."""
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, None)


def test_a_training_that_is_stopped_goes_on_later(tmp_path):
    problem = Problem.prepare(wanted(steps=40))
    some = Candidate(0, 0, 0, known(problem.space, problem.usual)[1][1])
    stopped = train_candidate(replace(problem.job(some, 40, tmp_path, 1e-9)))
    assert (stopped.value, stopped.failed) == (None, None)
    seen = []
    job = problem.job(some, 40, tmp_path, 600.0)

    def interrupt(step, _):
        seen.append(step)
        if step == 20 and len(seen) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_candidate(job, interrupt)
    went_on = train_candidate(job, interrupt)
    assert seen[20] == 17  # from the checkpoint after step 16
    whole = train_candidate(problem.job(some, 40, tmp_path / "whole", 600.0))
    assert (tmp_path / job.file).read_bytes() == (tmp_path / "whole" / job.file).read_bytes()
    assert went_on.value == whole.value


def job_of(tmp_path, **more):
    problem = Problem.prepare(wanted(6))
    settings = known(problem.space, problem.usual)[1][1]
    return replace(problem.job(Candidate(0, 0, 0, settings), 6, tmp_path, 600.0), **more)


def test_the_result_of_a_training_is_kept_by_whoever_trained_it(tmp_path, monkeypatch):
    job = job_of(tmp_path)
    first = train_candidate(job)
    assert first is not None
    trained = []
    monkeypatch.setattr(trainings, "train_file", lambda *_: trained.append(1) or pytest.skip("trained again"))
    assert train_candidate(job) == first
    (tmp_path / "trials" / "000-6.json").write_text("{")
    for other in (job, job_of(tmp_path, identity="another search")):
        with pytest.raises(pytest.skip.Exception):
            train_candidate(other)
    assert trained == [1, 1]


def test_a_training_that_another_process_runs_is_left_to_it(straight, tmp_path, monkeypatch):
    """Whose result comes while the others are trained."""
    fake, held = Fake(), []

    def train(job, report=None):
        if job.file.startswith("trials/003-100") and not held:
            held.append(claim(job.claim))
            return None
        if held and not held[0].closed:
            held[0].close()
        return fake(job, report)

    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    again = searched(Problem.prepare(wanted(rounds=2)), tmp_path / "b", monkeypatch, train)
    assert untimed(again) == untimed(straight)


def test_a_candidate_is_added_once(tmp_path):
    space = Problem.prepare(wanted()).space
    settings = known(space, Problem.prepare(wanted()).usual)[0][1]
    one, other = (Record(tmp_path / "search.db", space) for _ in range(2))
    first = one.add(0, 0, settings, "one")
    assert other.add(0, 0, settings, "other") == first
    one.note(first, Result(100, 2.0))
    assert set(other.note(first, Result(300, 1.0)).results) == {100, 300}
    assert set(one.candidates()[0].results) == {100, 300}
    one.spend(5.0)
    other.spend(3.0)
    assert one.spent == 5.0


def test_a_study_in_a_journal(straight, tmp_path, monkeypatch):
    problem = Problem.prepare(wanted(rounds=2, storage=str(tmp_path / "study.log")))
    assert untimed(searched(problem, tmp_path / "b", monkeypatch, Fake())) == untimed(straight)
    assert not (tmp_path / "b" / "search.db").exists()
    rest = Fake()
    searched(problem, tmp_path / "b", monkeypatch, rest)
    assert rest.jobs == []


def test_a_training_that_takes_too_long_counts_as_failed(tmp_path, monkeypatch):
    fake = Fake()

    def train(job, report=None):
        if "004-" in job.file:
            time.sleep(30)
        return fake(job, report)

    limit = Resources(seconds=0.2)
    candidates = searched(Problem.prepare(wanted(rounds=1, resources=limit)), tmp_path, monkeypatch, train)
    late = {c.number: r.failed for c in candidates for r in c.results.values() if r.failed}
    assert late == {4: "It was stopped after the time limit of 0.2 s (--trial-time)."}


def test_a_size_out_of_reach_names_the_smallest(tmp_path):
    with pytest.raises(BudgetError) as caught:
        dt.search(build, fit, evaluate, file_bytes=60, budget=60, out=tmp_path, steps=9, rounds=1)
    assert "No configuration reaches 60 bytes: the smallest that was tried has" in str(caught.value)
    assert caught.value.smallest_bits > 480


def test_an_interrupt_from_the_keyboard_leaves_the_best_so_far(tmp_path, monkeypatch):
    problem = Problem.prepare(wanted(steps=9, rounds=1))

    def interrupting(job, report=None):
        if job.file.startswith("trials/002"):
            raise KeyboardInterrupt
        return train_candidate(job, report)

    monkeypatch.setattr(module, "train_candidate", interrupting)
    candidates, interrupted = run_search(problem, tmp_path, lambda *_: None, lambda *_: None)
    assert interrupted
    assert sum(len(c.results) for c in candidates) == 2
    best = write_best(problem, candidates, tmp_path, interrupted)
    assert best.trainings == 2
    assert (tmp_path / "best.thin").exists()


def test_networks_of_also_are_trained_and_checked(real, tmp_path):
    out, _, _ = real
    name = f"{__name__}:small"
    problem = Problem.prepare(wanted(steps=18, also=(small,)))
    number = next(
        n for n, (_, settings) in enumerate(known(problem.space, problem.usual)) if settings["network"] == name
    )
    file = out / "trials" / f"{number:03}-18.thin"
    assert set(deepthin.load(file)) == set(small().state_dict())
    some = Candidate(0, 0, 0, known(problem.space, problem.usual)[number][1])
    words = command(problem, some, 9, tmp_path / "a.toml", tmp_path / "a.thin").split()
    assert words[words.index("--model") + 1] == name
    with pytest.raises(ConfigError, match=f"--also {__name__}:wrong cannot be called with one item of build: "):
        Problem.prepare(wanted(also=(wrong,)))


def test_a_teacher_is_one_of_the_choices(tmp_path):
    dense = build()
    dt.save(dense, tmp_path / "dense.thin")

    def taught(model, training):
        for batch in training.batches(80, 16):
            scores = model(IMAGES[batch])
            loss = nn.functional.cross_entropy(scores, CLASSES[batch])
            training.minimise(training.taught(IMAGES[batch], scores, loss))

    given = {"file_bytes": 1500, "budget": 600, "out": tmp_path / "out", "steps": 4, "rounds": 1}
    best = dt.search(build, taught, evaluate, teacher=tmp_path / "dense.thin", **given)
    origins = Record(tmp_path / "out" / "search.db", Problem.prepare(wanted()).space).candidates()
    assert {c.settings["teacher"] for c in origins} == {True, False}
    assert ("--teacher" in best.command) is best.teacher


@pytest.mark.parametrize("where", ['[rules."*"]', '[rules."fc"]'])
def test_method_auto_names_the_command(where, tmp_path):
    path = tmp_path / "auto.toml"
    path.write_text(f'[model]\nfile_bytes = 1500\n{where}\nmethod = "auto"\n')
    with pytest.raises(ConfigError) as caught:
        dt.compress(build(), path)
    assert str(caught.value).startswith(
        f"{where} method = 'auto': which method is best for a layer is found by trainings."
    )
    assert "`deepthin search`" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("digits --file-bytes 6000 --budget soon", "The budget 'soon' is no duration: write such as 90s"),
        ("digits --file-bytes 6000 --engine locale", "There is no engine 'locale'. Did you mean 'local'?"),
        ("digits --file-bytes 6000 --microseconds -1", "microseconds = -1.0 must be above 0"),
        ("digits --file-bytes 6000 --also nets", "--model nets: write package.module:function."),
        ("digits --file-bytes 6000 --space no.toml", "--space no.toml cannot be read: No such file or directory."),
        ("--file-bytes 6000", "Name a task (digits, acoustic"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlxtend")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["deepthin", "search", *words.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


SOURCE = """
import torch
from torch import nn

x = torch.rand(400, 24, generator=torch.Generator().manual_seed(0))
y = (x[:, :12].sum(1) > x[:, 12:].sum(1)).long()


def build():
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))


def fit(model, training):
    for batch in training.batches(300, 16):
        training.minimise(nn.functional.cross_entropy(model(x[batch]), y[batch]))


def evaluate(model, split):
    part = slice(300, 350) if split == "dev" else slice(350, 400)
    return {"loss": float(nn.functional.cross_entropy(model(x[part]), y[part]))}
"""


@pytest.mark.slow
def test_the_command_goes_on_after_kill_9_to_the_same_best_file(tmp_path):
    """Killed in the middle of trainings, three times, and at random, five times; two jobs give the same too."""
    (tmp_path / "nets.py").write_text(SOURCE)
    words = (
        "search --model nets:build --train nets:fit --evaluate nets:evaluate --file-bytes 1500 --steps 300 --rounds 1"
    )
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")

    def begin(out, *more):
        line = [sys.executable, "-m", "deepthin", *words.split(), "--budget", "2h", "--out", out, *more]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(line, cwd=tmp_path, env={**os.environ, **one}, **quiet)

    assert begin("whole").wait(1500) == 0
    trials, seen, statuses = tmp_path / "killed" / "trials", set(), []
    for _ in range(3):
        process, until = begin("killed"), time.monotonic() + 600
        while process.poll() is None and time.monotonic() < until:
            under_way = {path.name for path in trials.glob("*.checkpoint")}
            if under_way - seen:  # of a training that was not killed before
                seen |= under_way
                break
            time.sleep(0.002)
        process.kill()
        statuses.append(process.wait())
    assert statuses == [-signal.SIGKILL] * 3
    chance, statuses, done = random.Random(0), [], tmp_path / "random" / "trials"
    for _ in range(5):  # at random after the first training that ends: in one, in a file, or in the study
        before, process = len(list(done.glob("*.json"))), begin("random")
        while process.poll() is None and len(list(done.glob("*.json"))) == before:
            time.sleep(0.01)
        time.sleep(chance.choice((0, 0.1, 1)) * chance.random())
        process.kill()
        statuses.append(process.wait())
    assert statuses == [-signal.SIGKILL] * 5
    for out, more in (("killed", ()), ("random", ()), ("two", ("--jobs", "2"))):
        assert begin(out, *more).wait(1500) == 0
    whole = (tmp_path / "whole" / "best.thin").read_bytes()
    files = {}
    for out in ("whole", "killed", "random", "two"):
        assert (tmp_path / out / "best.thin").read_bytes() == whole
        files[out] = sorted((path.name, path.read_bytes()) for path in (tmp_path / out / "trials").glob("*.thin"))
        assert files[out] == files["whole"]
