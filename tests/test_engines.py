"""Trials in several processes, on Ray, and after a kill: the same rows as one after another."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import types
from contextlib import closing, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import optuna
import pytest
import torch

from deepthin import BudgetError, ConfigError
from deepthin.errors import DeepThinError
from deepthin.lab.calls import Resources, TrialTimeout, limited, resources_of
from deepthin.lab.claims import claim, claim_free, claimed
from deepthin.lab.compare import Settings, compare, searched_ratio
from deepthin.lab.engines import Inline, Processes, Ray, run_chains
from deepthin.lab.on_slurm import Slurm
from deepthin.lab.results import Results
from deepthin.lab.rows import Row, read_rows, write_rows
from deepthin.lab.run import Trial
from deepthin.lab.search import Choice, Search, open_storage, search
from deepthin.lab.trial import Setup

UNTIMED = ("seconds", "microseconds", "dense_microseconds")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'deepthin[ray]'")
SEARCH = Search(trials=3, ratio=0.02, steps=20)


def untimed(rows):
    return [{key: value for key, value in row.to_json().items() if key not in UNTIMED} for row in rows]


def settings(**more):
    setup = Setup("digits", steps=40)
    return Settings(setup, ("rank", "deepthin-8bit"), (0.05, 0.02), 1, SEARCH, **more)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    return out, compare(settings(), out)


def test_a_chain_gets_its_results_in_turn():
    seen = []

    def chain(name, count):
        for number in range(count):
            seen.append((name, (yield max, number, 10 * number)))

    run_chains(Inline(), [chain("a", 3), chain("b", 0), chain("c", 2)])
    assert sorted(seen) == [("a", 0), ("a", 10), ("a", 20), ("c", 0), ("c", 10)]
    assert [result for name, result in seen if name == "a"] == [0, 10, 20]


def test_an_exception_reaches_the_caller():
    def chain():
        yield int, "no number"

    def other():
        ended.append((yield time.sleep, 0.5))

    for engine, others in ((Inline(), 0), (Processes(2, 1), 1)):
        ended = []
        try:
            with pytest.raises(ValueError, match="no number"):
                run_chains(engine, [chain(), other(), other()])
        finally:
            engine.close()
        assert ended == [None] * others  # what runs may end, nothing more begins


def test_a_process_that_is_killed_is_told():
    def chain():
        yield os.kill, os.getpid(), 0
        yield os._exit, 1

    engine = Processes(2, 1)
    with pytest.raises(DeepThinError, match="A process was ended from outside.*the same command goes on"):
        run_chains(engine, [chain()])
    engine.close()


def test_several_processes_give_the_same_rows(straight, tmp_path):
    told = []
    rows = compare(settings(jobs=2), tmp_path, lambda *what: told.append(what))
    assert untimed(rows) == untimed(straight[1])
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads((straight[0] / "run.json").read_text())
    assert ("searching", 9, 9) in told
    assert ("trials", 6, 6) in told


def test_ray_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr("deepthin.lab.on_ray.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--engine ray needs Ray: pip install 'deepthin\[ray\]'"):
        Ray(1, Resources())


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class OutOfMemoryError(RayError):
    pass


class NodeDiedError(RayError):
    pass


class Cluster(types.ModuleType):
    """Ray as far as the engine knows it: calls run when they are waited for, and fail as they are told to."""

    def __init__(self, cores=(4,), refuses=None, fails=()):
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(
            RayError=RayError, RayTaskError=RayTaskError, NodeDiedError=NodeDiedError
        )
        self.cores, self.refuses, self.fails = list(cores), refuses, list(fails)
        self.asked, self.begun, self.looks, self.stopped, self.store = {}, [], 0, 0, []

    def init(self, **options):
        self.asked = options
        if self.refuses is not None:
            raise self.refuses

    def shutdown(self):
        self.stopped += 1

    def nodes(self):
        self.looks += 1
        return [{"Alive": True, "Resources": {"CPU": float(n)}} for n in self.cores] + [
            {"Alive": False, "Resources": {"CPU": 99.0}}
        ]

    def remote(self, **options):
        assert options["max_retries"] == 0  # a cluster's own retries may have no end

        def begin(function):
            def call(*arguments):
                self.begun.append((function, arguments))
                return len(self.begun) - 1

            return types.SimpleNamespace(remote=call)

        return begin

    def wait(self, references, num_returns, timeout):
        return (references[:1], references[1:]) if self.cores else ([], references)

    def put(self, value):
        self.store.append(value)
        return f"stored {len(self.store) - 1}"

    def get(self, reference):
        if isinstance(reference, str):
            return self.store[int(reference.split()[1])]
        if self.fails and (failure := self.fails.pop(0)) is not None:
            raise failure
        function, arguments = self.begun[reference]
        return function(*arguments)


@pytest.fixture
def cluster(monkeypatch):
    def installed(**how):
        made = Cluster(**how)
        monkeypatch.setitem(sys.modules, "ray", made)
        monkeypatch.setattr("deepthin.lab.on_ray._MADE", set())
        monkeypatch.setattr("deepthin.lab.on_ray.find_spec", lambda _: True)
        return made

    return installed


def one(*call, into):
    into.append((yield call))


def test_a_worker_that_dies_is_begun_again(cluster):
    made, got = cluster(fails=[RayError("gone"), OutOfMemoryError("full")]), []
    engine = Ray(2, Resources())
    run_chains(engine, [one(max, 1, 2, into=got), one(max, 3, 4, into=got)])
    assert sorted(got) == [2, 4]
    assert len(made.begun) == 4


@pytest.mark.parametrize("kind", [OutOfMemoryError, RayError])
def test_a_worker_that_dies_every_time_ends_with_what_to_do(cluster, kind):
    """And what runs beside it is kept."""
    made, got = cluster(fails=[kind("Task was killed\ndetails")] * 4), []
    why = "for want of memory" if kind is OutOfMemoryError else "perhaps for want of memory"
    with pytest.raises(DeepThinError) as raised:
        run_chains(Ray(2, Resources()), [one(max, 1, 2, into=got), one(max, 3, 4, into=got), one(max, 5, 6, into=got)])
    assert str(raised.value) == (
        f"A worker of Ray died 4 times in the same trial, {why} ({kind.__name__}: Task was killed). Use fewer --jobs, "
        "more --threads for each, or machines with more memory. What is done is kept; the same command goes on where "
        "it stopped."
    )
    assert got == [4]
    assert len(made.begun) == 5


def test_an_exception_of_a_call_on_ray_reaches_the_caller(cluster):
    cluster(fails=[RayTaskError(BudgetError("small", smallest_bits=8, smallest_ratio=0.1))])
    with pytest.raises(BudgetError, match="small"):
        run_chains(Ray(1, Resources()), [one(max, 1, 2, into=[])])


def test_more_threads_than_any_machine_has_are_refused(cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    made = cluster(cores=(4, 8))
    Ray(3, Resources(8))
    assert made.asked == {"log_to_driver": False, "logging_level": "error"}
    with pytest.raises(ConfigError) as raised:
        Ray(3, Resources(9))
    assert str(raised.value) == (
        "--threads 9: the largest machine of the cluster has 8 cores, so that no trial would ever begin. Use --threads "
        "8 or fewer."
    )
    assert made.stopped == 1


def test_machines_that_go_away_are_told(cluster):
    made = cluster(cores=(4,))
    engine = Ray(1, Resources(4))
    made.cores.clear()
    with pytest.raises(DeepThinError, match=r"No machine of the cluster has 4 cores any more: .* What is done is kept"):
        run_chains(engine, [one(max, 1, 2, into=[])])


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
@pytest.mark.parametrize("error", [TimeoutError("Timed out\nafter 30 s"), ConnectionError(""), ValueError("Malformed")])
def test_a_start_that_fails_is_told(cluster, monkeypatch, address, error):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    made = cluster(refuses=error)
    reason = (str(error) or "ConnectionError").splitlines()[0]
    with pytest.raises(DeepThinError) as raised:
        Ray(1, Resources())
    told = str(raised.value)
    assert told.startswith(
        f"No cluster answers at RAY_ADDRESS = {address} ({reason}): start it with `ray start --head`, or unset "
        if address
        else f"Ray did not start here ({reason}). Ask for fewer --jobs, or leave --engine out, "
    )
    assert made.stopped == 1


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_a_worker_of_ray_itself_that_dies_every_time(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else its workers wait for whatever runs beside the tests
    engine, got = Ray(2, Resources()), []
    try:
        with pytest.raises(DeepThinError, match="A worker of Ray died 4 times in the same trial, perhaps for want of"):
            run_chains(engine, [one(os._exit, 1, into=got), one(max, 3, 4, into=got)])
    finally:
        engine.close()
    assert got == [4]


@pytest.mark.parametrize(
    ("engine", "moments"),
    [
        ("local", ("trials",)),
        pytest.param("local", ("search", "trials"), marks=pytest.mark.slow),
        pytest.param("ray", ("trials",), marks=[needs_ray, pytest.mark.slow]),
    ],
)
def test_a_killed_comparison_goes_on_to_the_same_rows(straight, tmp_path, engine, moments):
    """kill -9 while its trials run, or while it searches and again then; no process of it survives."""
    for within in moments:
        _killed(tmp_path / "out", engine, within)
    rows = compare(settings(engine=engine, jobs=1 if engine == "local" else 2), tmp_path / "out")
    assert untimed(rows) == untimed(straight[1])


def _killed(out, engine, within):
    """Begin a comparison, or go on with it, in a process of its own, and kill that at a moment of its work."""
    command = [sys.executable, "-m", "deepthin", "compare", "digits", "--methods", "rank,deepthin-8bit"]
    command += "--ratios 0.05,0.02 --steps 40 --search 3 --search-ratio 0.02 --search-steps 20 --jobs 2".split()
    command += ["--engine", engine, "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "DEEPTHIN_DATA"}
    killed = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    study, results = out / "search.db", out / "results.json"

    def far_enough():
        if within == "trials":
            return results.exists() and len(json.loads(results.read_text())) >= 2
        return study.exists() and _finished(study) >= 4

    until = time.monotonic() + 120
    while not far_enough() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    children = {pid: name for pid in _descendants(killed.pid) if (name := _name(pid))}
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL  # not done before
    assert len(children) >= 2
    agents = [pid for pid, name in children.items() if name.endswith("Agent")]  # two of Ray's own, which it leaves
    until = time.monotonic() + 60
    while (left := [pid for pid in children if _name(pid) and pid not in agents]) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left
    for pid in agents:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _finished(study):
    """Trials of all studies that have ended; none while the tables are being made."""
    with closing(sqlite3.connect(f"file:{study}?mode=ro", uri=True)) as connection:
        try:
            return connection.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def _descendants(pid):
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [*children, *(further for child in children for further in _descendants(child))]


def _name(pid):
    """The command of a process that runs; nothing for one that has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "" if state in "ZX" else Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def drive(storage, values, trials=4):
    """Search with known values by rate; what was tried, and the outcome."""
    steps = search(storage, "m", Choice(0.01, 0.0), True, trials, lambda choice: choice)
    tried, value = [], None
    while True:
        try:
            tried.append(steps.send(value))
        except StopIteration as end:
            return tried, end.value
        value = values(tried[-1])


def test_a_search_begins_with_the_default_and_keeps_the_best(tmp_path):
    tried, (best, value) = drive(open_storage(tmp_path / "s.db"), lambda choice: abs(choice.lr - 0.02))
    assert tried[0] == Choice(0.01, 0.0)
    assert len(tried) == 4
    assert all(0.01 / 8 <= choice.lr <= 0.08 and choice.allocation in (0, 0.5, 1) for choice in tried)
    assert best == min(tried, key=lambda choice: abs(choice.lr - 0.02))
    assert value == abs(best.lr - 0.02)
    again, outcome = drive(open_storage(tmp_path / "s.db"), lambda choice: pytest.fail("nothing is tried again"))
    assert (again, outcome) == ([], (best, value))
    more, _ = drive(open_storage(tmp_path / "s.db"), lambda choice: abs(choice.lr - 0.02), trials=6)
    assert len(more) == 2


def test_what_diverges_counts_but_never_wins(tmp_path):
    tried, (best, _) = drive(open_storage(tmp_path / "s.db"), lambda choice: None if choice.lr > 0.009 else 5.0)
    assert len(tried) == 4
    assert best.lr <= 0.009
    tried, (best, value) = drive(open_storage(tmp_path / "t.db"), lambda choice: None)
    assert best == Choice(0.01, 0.0)
    assert value is None


def test_a_search_without_optuna_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("deepthin.lab.search.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="--search needs Optuna"):
        open_storage(tmp_path / "s.db")


def test_results_of_another_search_do_not_mix(straight):
    out, _ = straight
    with pytest.raises(ConfigError, match="holds results of another run .search = "):
        compare(Settings(Setup("digits", steps=40), ("deepthin",), (0.05,), 1, Search(4, 0.02, 20)), out)


def test_a_search_goes_on_after_a_kill_between_two_of_its_writes(tmp_path):
    whole, _ = drive(open_storage(tmp_path / "a.db"), lambda choice: choice.lr)
    storage = open_storage(tmp_path / "b.db")
    study = optuna.create_study(storage=storage, study_name="m")
    study.enqueue_trial({"lr": 0.01, "allocation": 0.0})  # and then it was killed
    assert drive(storage, lambda choice: choice.lr)[0] == whole
    steps = search(open_storage(tmp_path / "c.db"), "m", Choice(0.01, 0.0), True, 4, lambda choice: choice)
    next(steps), steps.send(0.01)  # killed while the second is trained
    assert drive(open_storage(tmp_path / "c.db"), lambda choice: choice.lr)[0] == whole[1:]


def test_a_damaged_study_is_told(tmp_path):
    (tmp_path / "s.db").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="s.db cannot be read .*: remove it to search anew"):
        open_storage(tmp_path / "s.db")


def test_what_an_earlier_search_chose_stays_beside_what_a_later_one_does(straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)
    more = Settings(Setup("digits", steps=40), ("hashed",), (0.05,), 1, SEARCH)
    assert searched_ratio(out) == 0.02
    rows = compare(more, out)
    chosen = json.loads((out / "run.json").read_text())["chosen"]
    assert set(chosen) == {"dense", "rank", "deepthin-8bit", "hashed"}
    assert {row.method for row in rows} == {*chosen, "int8"}


def test_a_trial_whose_file_is_gone_is_made_again(straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)
    (out / "models" / "rank-0.02-seed0.thin").unlink()
    trained = []
    rows = compare(settings(), out, lambda name, *_: trained.append(name))
    assert set(trained) == {"rank-0.02-seed0", "timing"}
    assert untimed(rows) == untimed(straight[1])


def test_a_call_that_takes_too_long_is_stopped_even_if_it_catches_the_first_attempt():
    def stubborn():
        for _ in range(2):
            try:
                time.sleep(30)
            except Exception:
                caught.append(1)
        return "never"

    caught = []
    with pytest.raises(TrialTimeout, match=r"^It was stopped after the time limit of 0.1 s \(--trial-time\).$"):
        limited(0.1, time.sleep, 30)
    assert limited(5, max, 1, 2) == limited(None, max, 1, 2) == 2
    assert limited(0.05, stubborn) == "never"  # it was stopped twice, and went on
    assert caught == [1, 1]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_chain_is_told_of_a_call_that_took_too_long():
    def chain():
        try:
            yield time.sleep, 30
        except TrialTimeout as late:
            seen.append(str(late))
        seen.append((yield max, 1, 2))

    def nothing_to_do():
        yield from ()

    def careless():
        yield time.sleep, 30

    seen = []
    run_chains(Inline(0.05), [nothing_to_do(), chain(), nothing_to_do()])
    assert seen == ["It was stopped after the time limit of 0.05 s (--trial-time).", 2]
    with pytest.raises(TrialTimeout):
        run_chains(Inline(0.05), [careless()])


def test_a_machine_that_goes_away_is_no_fault_of_the_call(cluster):
    made, got = cluster(fails=[NodeDiedError("gone")] * 9), []
    run_chains(Ray(1, Resources()), [one(max, 1, 2, into=got)])
    assert got == [2]
    assert len(made.begun) == 10


def test_what_is_shared_is_made_once_in_each_worker(cluster):
    made, got, loaded = cluster(), [], []
    engine = Ray(1, Resources())
    engine.share((loaded.append, "data"))
    run_chains(engine, [one(max, 1, 2, into=got), one(max, 3, 4, into=got)])
    assert made.store == [(loaded.append, "data")]
    assert loaded == ["data"]
    assert got == [2, 4]


def test_a_head_that_is_gone_is_told(cluster, monkeypatch):
    made = cluster()
    engine = Ray(1, Resources())
    made.cores.clear()
    monkeypatch.setattr("deepthin.lab.on_ray._ANSWER_SECONDS", 0.05)
    made.nodes = lambda: time.sleep(1) or []
    with pytest.raises(DeepThinError, match=r"The head of the cluster does not answer any more: start it again with"):
        run_chains(engine, [one(max, 1, 2, into=[])])


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Resources(cpus=5), "--cpus 5: the largest machine of the cluster has 4 cores, so that no trial would ever"),
        (Resources(gpus=1), "--gpus 1: the largest machine of the cluster has 0 GPUs, so that no trial would ever"),
        (Resources(memory_bytes=9), "--memory 9: the largest machine of the cluster has 0 bytes, so that no trial"),
    ],
)
def test_more_than_any_machine_has_is_refused(cluster, needs, message):
    cluster(cores=(4,))
    with pytest.raises(ConfigError) as raised:
        Ray(1, needs)
    assert str(raised.value).startswith(message)


def test_a_cluster_may_have_no_machines_yet(cluster):
    made, got = cluster(cores=()), []
    engine = Ray(1, Resources())
    made.cores.append(4)
    run_chains(engine, [one(max, 1, 2, into=got)])
    assert got == [2]


def test_parts_of_a_cluster_need_a_cluster(tmp_path):
    with pytest.raises(ConfigError, match="--cpus, --gpus and --memory reserve parts of a cluster: leave them out, or"):
        compare(settings(resources=resources_of(memory="4GB")), tmp_path)


@pytest.mark.parametrize("memory", ["much", "-1", "0", "4 XB"])
def test_what_is_no_size_is_told(memory):
    with pytest.raises(ConfigError, match="is no size: write such as 500MB or 4GB."):
        resources_of(memory=memory)


def test_sizes_and_durations():
    assert resources_of(2, 0.5, "1.5gb", "30m") == Resources(1, 2, 0.5, 1_500_000_000, 1800)
    assert resources_of(memory="700").memory_bytes == 700


class Done:
    def __init__(self, result):
        self.result = result

    def done(self):
        return True


class Executor:
    """submitit's, as far as the engine knows it: jobs end when they are looked at, and die as they are told to."""

    def __init__(self, folder, **_):
        self.folder, self.arrays, self.dies, self.parameters, self.cancelled = folder, [], 0, {}, []

    def update_parameters(self, **given):
        self.parameters = given

    def map_array(self, function, calls):
        self.arrays.append(len(calls))
        return [
            types.SimpleNamespace(done=lambda: True, result=lambda c=call: self.result(function, c)) for call in calls
        ]

    def result(self, function, call):
        if self.dies:
            self.dies -= 1
            raise RuntimeError("Job 7 has not produced any output (state: OUT_OF_MEMORY)\nlog")
        return function(call)


@pytest.fixture
def slurm(monkeypatch):
    module, made = types.ModuleType("submitit"), []

    def executor(**given):
        made.append(Executor(**given))
        return made[-1]

    module.AutoExecutor = executor
    monkeypatch.setitem(sys.modules, "submitit", module)
    monkeypatch.setattr("deepthin.lab.on_slurm.find_spec", lambda _: True)
    monkeypatch.setattr("deepthin.lab.on_slurm._LOOK_SECONDS", 0.01)
    return made


def test_jobs_that_begin_together_are_one_array(slurm, tmp_path):
    got, threads = [], torch.get_num_threads()
    engine = Slurm(3, Resources(threads, 2, 1, 2**31, 90.0), tmp_path)
    run_chains(engine, [one(max, n, n + 1, into=got) for n in range(4)])
    assert sorted(got) == [1, 2, 3, 4]
    assert slurm[0].arrays == [3, 1]
    assert slurm[0].folder == tmp_path / "jobs"
    assert slurm[0].parameters == {
        "name": "deepthin", "timeout_min": 7, "cpus_per_task": 2, "gpus_per_node": 1, "mem_gb": 2.0,
        "slurm_array_parallelism": 3, "slurm_additional_parameters": {"requeue": True},
    }  # fmt: skip


def test_jobs_that_die_are_submitted_again(slurm, tmp_path):
    got, threads = [], torch.get_num_threads()
    engine = Slurm(1, Resources(threads, seconds=90.0), tmp_path)
    slurm[0].dies = 3
    run_chains(engine, [one(max, 1, 2, into=got)])
    assert got == [2]
    slurm[0].dies = 4
    with pytest.raises(DeepThinError, match="A worker of Slurm died 4 times in the same trial, for want of memory"):
        run_chains(engine, [one(max, 1, 2, into=got)])
    with pytest.raises(ValueError, match="no number"):
        run_chains(engine, [one(int, "no number", into=got)])


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Resources(), "--engine slurm needs --trial-time, such as 2h: Slurm asks how long a job may take."),
        (Resources(gpus=0.5, seconds=9.0), "--gpus 0.5: Slurm gives whole GPUs only. Use --gpus 1."),
    ],
)
def test_what_slurm_needs(slurm, needs, message):
    with pytest.raises(ConfigError) as raised:
        Slurm(1, needs)
    assert str(raised.value) == message


def test_submitit_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr("deepthin.lab.on_slurm.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--engine slurm needs submitit: pip install 'deepthin\[slurm\]'"):
        Slurm(1, Resources(seconds=9.0))


def test_a_claim_ends_with_its_process(tmp_path):
    path = tmp_path / "locks" / "x.lock"
    assert not claimed(path)
    code = (
        "import sys, time, pathlib, deepthin.lab.claims as c; h = c.claim(pathlib.Path(sys.argv[1])); print(flush=True)"
    )
    other = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)", str(path)], stdout=subprocess.PIPE)
    other.stdout.readline()
    assert claimed(path)
    assert claim_free(path) is None
    other.kill()
    other.communicate()
    with claim(path):
        assert claimed(path)
    assert not claimed(path)


def row(method, value, seed=0):
    return Row(
        task="t",
        method=method,
        ratio=0.1,
        bytes=9,
        dense_bytes=99,
        seed=seed,
        split="test",
        metric="error",
        value=value,
    )


def test_rows_of_several_drivers_are_merged(tmp_path):
    one, other = Results(tmp_path), Results(tmp_path)
    write_rows([row("old", 5.0)], tmp_path / "results.json")  # by an earlier version, without files of their own
    one.adopt()
    one.put([row("rank", 1.0), row("hashed", 2.0, seed=1)])
    other.put([row("hashed", 3.0)])
    one.merge()
    rows = other.merge(("hashed", "rank"))
    assert [(r.method, r.seed, r.value) for r in rows] == [
        ("hashed", 0, 3.0), ("rank", 0, 1.0), ("old", 0, 5.0), ("hashed", 1, 2.0)
    ]  # fmt: skip
    assert read_rows(tmp_path / "results.json") == rows


def test_a_trial_that_another_driver_runs_is_left_to_it(straight, tmp_path, monkeypatch):
    """Its rows are waited for."""
    out, begun = tmp_path / "out", []
    shutil.copytree(straight[0], out)
    results, trial = Results(out), Trial("rank", 0.02, 0)
    content = results.file(trial).read_bytes()
    results.file(trial).unlink()
    (out / "results.json").unlink()
    held = results.claim(trial.name)

    def waited(_):
        results.file(trial).write_bytes(content)
        held.close()

    monkeypatch.setattr("deepthin.lab.compare.time.sleep", waited)
    monkeypatch.setattr("deepthin.lab.compare.run_trial", lambda *given: begun.append(given))
    assert untimed(compare(settings(), out)) == untimed(straight[1])
    assert begun == []


def test_trials_that_took_too_long_run_again_with_another_limit(tmp_path):
    few = Settings(Setup("digits", steps=40), ("rank",), (0.05,), resources=Resources(seconds=0.02))
    late = "It was stopped after the time limit of 0.02 s (--trial-time)."
    rows = compare(few, tmp_path)
    assert {r.failed for r in rows if r.method != "int8"} == {late}
    stopped = [path.stat().st_mtime_ns for path in sorted((tmp_path / "rows").glob("*.json"))]
    compare(few, tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "rows").glob("*.json"))] == stopped
    rows = compare(replace(few, resources=Resources()), tmp_path)
    assert all(r.value is not None for r in rows)


def test_a_study_in_a_journal_that_several_may_share(tmp_path):
    path = str(tmp_path / "study.log")
    tried, outcome = drive(open_storage(tmp_path / "s.db", path), lambda choice: choice.lr)
    assert drive(open_storage(tmp_path / "s.db"), lambda choice: choice.lr) == (tried, outcome)
    assert drive(open_storage(tmp_path / "t.db", path), lambda choice: pytest.fail("it is done")) == ([], outcome)


@pytest.mark.parametrize("storage", ["missing/study.log", "nosql://host/name"])
def test_a_storage_that_cannot_be_opened_is_told(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=f"--storage {storage} cannot be opened .*: name a journal file in a folder that"
    ):
        open_storage(tmp_path / "s.db", storage)
