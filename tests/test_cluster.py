"""Comparisons and searches on two nodes of Ray that come and go, and by several drivers: as in one process."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepthin.lab.rows import read_rows
from test_size_search import SOURCE
from two_nodes import Nodes

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'deepthin[ray]'")
pytestmark = pytest.mark.slow
UNTIMED = ("seconds", "microseconds", "dense_microseconds")
COMPARE = "compare digits --methods rank,hashed --ratios 0.05,0.02 --seeds 3 --steps 60".split()
OWN = "--model nets:build --train nets:fit --evaluate nets:evaluate"
SEARCH = f"search {OWN} --file-bytes 1500 --steps 300 --rounds 1 --budget 2h".split()
TRIALS = 3 * (2 + 2 * 2)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
ASKED = """
import json, ray, time
from pathlib import Path
from deepthin.lab import trial
from deepthin.lab.calls import Resources, TrialTimeout
from deepthin.lab.engines import Ray, run_chains
from deepthin.lab.run import Setup

def where(setup):
    time.sleep(3)
    trial.prepared(setup)
    return ray.get_runtime_context().get_node_id(), trial._loaded.cache_info().misses

def chain(*call):
    try:
        got.append((yield call))
    except TrialTimeout as late:
        got.append(str(late))

setup, got = Setup("digits", steps=5), []
engine = Ray(2, Resources(seconds=20.0))
while len(ray.nodes()) < 2:
    time.sleep(.2)
engine.share((trial.hold, setup, trial.prepared(setup)))
run_chains(engine, [chain(where, setup) for _ in range(6)])
run_chains(engine, [chain(time.sleep, 60)])
print(json.dumps(got))
"""


def untimed(out):
    return [{k: v for k, v in row.to_json().items() if k not in UNTIMED} for row in read_rows(out / "results.json")]


def files(out, folder):
    return {path.name: path.read_bytes() for path in (out / folder).glob("*.thin")}


def begin(words, out, environment=None, log=None):
    environment = environment or {k: v for k, v in os.environ.items() if k != "DEEPTHIN_DATA"}
    command = [sys.executable, "-m", "deepthin", *words, "--out", str(out)]
    with (log or Path(os.devnull)).open("ab") as told:
        return subprocess.Popen(
            command, cwd=out.parent, env={**environment, **ONE_THREAD}, stdout=subprocess.DEVNULL, stderr=told
        )


def wait_for(process, out, count):
    """Until so many trials have ended."""
    until = time.monotonic() + 900
    while len(list((out / "rows").glob("*.json"))) < count:
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    assert begin(COMPARE, out).wait(1800) == 0
    return out


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    (folder / "nets.py").write_text(SOURCE)
    assert begin(SEARCH, folder / "whole").wait(1800) == 0
    return folder


def same(out, straight):
    assert untimed(out) == untimed(straight)
    assert files(out, "models") == files(straight, "models")
    assert len(list((out / "rows").glob("*.json"))) == TRIALS


@needs_ray
def test_trials_are_on_both_nodes_and_nobody_but_the_driver_reads_the_data(tmp_path):
    """And a call that takes too long is stopped."""
    (tmp_path / "asked.py").write_text(ASKED)
    with Nodes(tmp_path) as nodes:
        nodes.head(), nodes.node()
        done = subprocess.run(
            [sys.executable, "asked.py"],
            cwd=tmp_path,
            env=nodes.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    *asked, late = json.loads(done.stdout.splitlines()[-1])
    assert len({node for node, _ in asked}) == 2
    assert {misses for _, misses in asked} == {0}
    assert late == "It was stopped after the time limit of 20 s (--trial-time)."


@needs_ray
def test_a_search_on_two_nodes_is_that_of_one_process(searched, tmp_path):
    (tmp_path / "nets.py").write_text(SOURCE)
    out = tmp_path / "out"
    with Nodes(tmp_path) as nodes:
        nodes.head(), nodes.node()
        assert begin([*SEARCH, "--engine", "ray", "--jobs", "2"], out, nodes.environment).wait(1800) == 0
    assert (out / "best.thin").read_bytes() == (searched / "whole" / "best.thin").read_bytes()
    assert files(out, "trials") == files(searched / "whole", "trials")


@needs_ray
def test_nodes_that_come_and_go_a_killed_driver_and_a_restarted_head(straight, tmp_path):
    out, log = tmp_path / "out", tmp_path / "driver.log"
    words = [*COMPARE, "--engine", "ray", "--jobs", "4"]
    with Nodes(tmp_path) as nodes:
        head, node = nodes.head(), nodes.node()
        driver = begin(words, out, nodes.environment, log)
        wait_for(driver, out, 2)
        nodes.kill(node)
        wait_for(driver, out, 4)  # by the other one
        node = nodes.node()
        wait_for(driver, out, 6)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        driver = begin(words, out, nodes.environment, log)
        wait_for(driver, out, 9)
        nodes.kill(head)
        assert driver.wait(300) == 2
        assert "The head of the cluster does not answer any more: start it again" in " ".join(log.read_text().split())
        nodes.kill(node)
        assert len(list((out / "rows").glob("*.json"))) < TRIALS
        nodes.head(), nodes.node()
        assert begin(words, out, nodes.environment, log).wait(1800) == 0, log.read_text()[-2000:]
    same(out, straight)


def test_drivers_that_share_a_folder_divide_the_trials(straight, tmp_path):
    """Two whole ones, and one of a part that is killed."""
    out = tmp_path / "out"
    killed = begin([*COMPARE[:3], "hashed", *COMPARE[4:]], out)
    wait_for(killed, out, 1)
    drivers = [begin(COMPARE, out), begin(COMPARE, out)]
    wait_for(drivers[0], out, 3)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert [driver.wait(1800) for driver in drivers] == [0, 0]
    same(out, straight)


def test_drivers_that_share_a_study_search_as_one(searched, tmp_path):
    (tmp_path / "nets.py").write_text(SOURCE)
    words = [*SEARCH, "--storage", str(tmp_path / "study.log")]
    drivers = [begin(words, tmp_path / "out"), begin(words, tmp_path / "out")]
    assert [driver.wait(1800) for driver in drivers] == [0, 0]
    assert (tmp_path / "out" / "best.thin").read_bytes() == (searched / "whole" / "best.thin").read_bytes()
    assert files(tmp_path / "out", "trials") == files(searched / "whole", "trials")
    assert not (tmp_path / "out" / "search.db").exists()


@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed: pip install 'deepthin[slurm]'")
def test_jobs_that_are_preempted_or_whose_driver_is_killed(straight, tmp_path):
    """By submitit's local executor: its signal of a preemption, and kill -9 of jobs and of the driver."""
    out = tmp_path / "out"
    words = [*COMPARE, "--engine", "slurm", "--jobs", "2", "--trial-time", "30m"]
    driver = begin(words, out)
    wait_for(driver, out, 2)
    preempted, died = _workers(out), 0
    for pid in preempted[:1]:
        os.kill(pid, signal.SIGUSR2)
    wait_for(driver, out, 4)
    for pid in _workers(out)[:1]:
        os.kill(pid, signal.SIGKILL)
        died += 1
    wait_for(driver, out, 7)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert begin(words, out).wait(1800) == 0
    assert preempted
    assert died
    same(out, straight)


def _workers(out):
    """Processes of submitit that work for a folder, once there are any."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = []
        for process in Path("/proc").iterdir():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"submitit.core._submit" in words and str(out / "jobs").encode() in words:
                found.append(int(process.name))
        if found:
            return found
        time.sleep(0.02)
    return []
