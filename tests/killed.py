"""Kill -9 at random, many times: ``python tests/killed.py saving COUNT FOLDER``, or ``training METHOD COUNT FOLDER``.

What is to be killed runs in forks of this process, which has imported everything, so that a kill costs milliseconds and
lands in the work rather than in the start. Prints what happened as JSON; that it is right is for the tests to say.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import deepthin
import deepthin.torch as dt
from deepthin.lab.checkpoint import Checkpoint
from deepthin.lab.train import checkpoint_of, train
from deepthin.lab.trial import Setup, prepared

STEPS = 60


def forked(work) -> int:
    """Start work in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def killed_after(work, seconds: float, written: int = 0, path: Path | None = None) -> int | None:
    """Kill the work so many seconds after a file was written so often; None if it was killed, else its exit status."""
    child, times = forked(work), set()
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(times) < written:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if len(times) < written and path is not None and path.exists():
            times.add(path.stat().st_mtime_ns)
            until = time.monotonic() + seconds
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


def saving(count: int, folder: Path) -> dict[str, object]:
    """Two models, and two checkpoints, take turns at one name each, until the kill."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(700, 500), torch.nn.Linear(500, 700))
        dt.compress(model, {"model": {"ratio": 0.3}}, init="scratch", seed=seed)
        models.append(model)
    path, kept = folder / "model.thin", Checkpoint(folder / "state.checkpoint", 1, "about")
    wholes = set()
    for model in models:
        dt.save(model, path)
        wholes.add(path.read_bytes())

    def work() -> None:
        while True:
            for number, model in enumerate(models):
                dt.save(model, path)
                kept.save({"number": number, "model": model.state_dict()})

    seen = {"killed": 0, "whole": 0, "checkpoints": 0}
    chance = random.Random(0)
    for _ in range(count):
        seen["killed"] += killed_after(work, chance.uniform(0.001, 0.06)) is None
        seen["whole"] += path.read_bytes() in wholes and bool(deepthin.load(path))
        state = kept.load()
        seen["checkpoints"] += state is None or all(
            torch.equal(value, state["model"][name]) for name, value in models[state["number"]].state_dict().items()
        )
    left = len(list(folder.glob(".deepthin-*.tmp")))
    for stale in folder.glob(".deepthin-*.tmp"):
        os.utime(stale, (0, 0))
    dt.save(models[0], path)
    kept.save({})
    return {**seen, "left": left, "left_after_an_hour": len(list(folder.glob(".deepthin-*.tmp")))}


def training(method: str, count: int, folder: Path) -> dict[str, object]:
    """The same training, killed so many times at random, against one that is left alone."""
    rule: dict[str, object] = {"method": method.partition("+")[0]}
    rules: dict[str, object] = {"model": {"ratio": 0.2, "allocation": "flat"}, "rules": {"*": rule}}
    if "+" in method:
        rule["then"] = {"method": method.partition("+")[2], "bits": 3}
        rules["stages"] = {"thin": [0.2, 0.5], "quantize": 0.7, "every": 3}
    setup = Setup("digits", None, STEPS, 40)
    prepared(setup)

    def work(out: Path) -> None:
        train(setup, rules, out, seed=1, checkpoint=2)

    status = os.waitstatus_to_exitcode(os.waitpid(forked(lambda: work(folder / "whole.thin")), 0)[1])
    out, chance, kills, steps = folder / "killed.thin", random.Random(method), 0, []
    for _ in range(20 * count):
        if kills == count:
            break
        kept = checkpoint_of(out)
        ended = killed_after(lambda: work(out), chance.uniform(0, 0.03), chance.randint(1, 3), kept)
        kills += ended is None
        if ended is not None:  # it was done before its time: begin anew
            out.unlink(missing_ok=True)
        elif kept.exists():
            body = Checkpoint(kept, 1, "")
            try:
                body.load()
            except deepthin.ConfigError as error:  # of another training, as it has to be: so it is whole
                steps.append("another training" in str(error))
    again = os.waitstatus_to_exitcode(os.waitpid(forked(lambda: work(out)), 0)[1])
    return {
        "status": [status, again],
        "kills": kills,
        "checkpoints": len(steps),
        "whole": all(steps),
        "same": out.read_bytes() == (folder / "whole.thin").read_bytes(),
        "left": [path.name for path in folder.iterdir() if path.suffix == ".checkpoint"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *words, target = sys.argv[1:]
    os.environ.pop("DEEPTHIN_DATA", None)
    found = saving(int(words[0]), Path(target)) if what == "saving" else training(words[0], int(words[1]), Path(target))
    print(json.dumps(found))
