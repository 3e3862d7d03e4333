"""The examples of docs/distributed.md: two processes train one network to the size of its file."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import deepthin

EXAMPLES = Path(__file__).parent.parent / "examples" / "distributed"
NEEDS = {"accelerate_ddp": "accelerate", "trainer_ddp": "transformers", "lightning_ddp": "lightning"}

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not here"),
]


def run(processes, script, *arguments):
    """What an example prints: its bytes and its errors in percent; None if it prints none."""
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), *map(str, arguments)]
    if script == "lightning_ddp":
        command.append(str(processes))
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command[1:1] = torchrun
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"(\d+) bytes, ([\d.]+) % errors", done.stdout)
    return None if found is None else (int(found[1]), float(found[2]))


@pytest.mark.parametrize("script", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", *NEEDS))])
def test_two_processes_train_to_a_size(script, tmp_path):
    if find_spec(NEEDS.get(script, "sklearn")) is None:
        pytest.skip(f"{NEEDS.get(script, 'sklearn')} is not installed")
    out = tmp_path / "digits.thin"
    more = (tmp_path / "none",) if script == "fsdp" else ()
    size, wrong = run(2, script, out, *more)
    assert size == out.stat().st_size
    assert 3700 < size <= 4000
    assert wrong < 8
    sys.path.insert(0, str(EXAMPLES))
    try:
        from data import digits, network
    finally:
        sys.path.remove(str(EXAMPLES))
    weights = deepthin.load(out)
    plain = network()
    plain.load_state_dict({name.removeprefix("model."): torch.from_numpy(a) for name, a in renamed(weights).items()})
    _, _, images, labels = digits()
    with torch.no_grad():
        assert 100 * (plain(images).argmax(1) != labels).float().mean().item() == pytest.approx(wrong, abs=0.06)


def renamed(weights):
    return {name.removeprefix("network."): array for name, array in weights.items()}


@pytest.mark.slow
def test_a_sharded_training_goes_on_with_another_number_of_processes(tmp_path):
    assert run(2, "fsdp", tmp_path / "a.thin", tmp_path / "checkpoint", "--stop", 100) is None
    parted = run(1, "fsdp", tmp_path / "a.thin", tmp_path / "checkpoint")
    whole = run(2, "fsdp", tmp_path / "b.thin", tmp_path / "none")
    assert abs(parted[0] - whole[0]) < 100  # gradients are added in another order
    assert abs(parted[1] - whole[1]) < 2
