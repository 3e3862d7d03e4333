"""A DeepTwist training that is killed, and goes on, ends with the file of one that was left alone."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "docs" / "resume.py"


def started(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), "300"], stdout=subprocess.PIPE, text=True)


def test_killed_and_resumed_ends_with_the_same_file(tmp_path):
    pytest.importorskip("mlxtend")
    killed = started(tmp_path / "killed")
    assert killed.stdout is not None
    seen = [killed.stdout.readline() for _ in range(2)]
    killed.kill()  # SIGKILL
    killed.communicate()
    assert seen[-1] == "step 100 of 300\n"  # the schedule is rising
    assert not (tmp_path / "killed" / "thin.thin").exists()
    resumed = started(tmp_path / "killed")
    threads = torch.get_num_threads()
    runpy.run_path(str(SCRIPT))["main"](tmp_path / "whole", 300)
    torch.set_num_threads(threads)
    said, _ = resumed.communicate(timeout=300)
    assert said.startswith("resuming after ")
    assert "test error" in said
    assert resumed.returncode == 0
    assert (tmp_path / "whole" / "thin.thin").read_bytes() == (tmp_path / "killed" / "thin.thin").read_bytes()
