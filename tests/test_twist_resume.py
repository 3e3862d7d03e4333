"""A DeepTwist training that is killed, and goes on, ends with the file of one that was left alone."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "resume.py"


def started(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), "600"], stdout=subprocess.PIPE, text=True)


def test_killed_and_resumed_ends_with_the_same_file(tmp_path):
    pytest.importorskip("mlxtend")
    whole = started(tmp_path / "whole")
    killed = started(tmp_path / "killed")
    assert killed.stdout is not None
    seen = [killed.stdout.readline() for _ in range(4)]
    killed.kill()  # SIGKILL
    killed.communicate()
    assert seen[-1] == "step 200 of 600\n"  # the schedule is rising
    assert not (tmp_path / "killed" / "thin.thin").exists()
    resumed = started(tmp_path / "killed")
    said, _ = resumed.communicate(timeout=300)
    assert said.startswith("resuming after ")
    assert "test error" in said
    _, _ = whole.communicate(timeout=300)
    assert resumed.returncode == whole.returncode == 0
    hashes = {hashlib.sha256((tmp_path / run / "thin.thin").read_bytes()).hexdigest() for run in ("whole", "killed")}
    assert len(hashes) == 1
