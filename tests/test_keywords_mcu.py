"""The example keywords-mcu: what the emulated Cortex-M4 prints is what torch computes."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deepthin.torch as dt
from deepthin.lab.tasks.log_mel import RATE, log_mel

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "examples" / "keywords-mcu", ROOT / "examples" / "keywords-browser"
CLOSE = (
    2e-4  # of probabilities: features in float32 differ where a quiet band is beside a loud one; 4 digits are printed
)

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("arm-none-eabi-gcc", "qemu-system-arm"))),
    reason="not installed: gcc-arm-none-eabi, libnewlib-arm-none-eabi, qemu-system-arm",
)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("keywords_mcu", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("keywords_network", PAGE / "network.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder, *arguments):
    """The example's output, run as its users do; it compiles in a folder."""
    command = [sys.executable, FOLDER / "run.py", "--build", folder / "build", *arguments]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout


def means_of(page, samples):
    """Mean probabilities after each frame, by torch."""
    network = dt.load(page.Spotter(), PAGE / "keywords.thin", frozen=True).eval()
    frames = torch.from_numpy(log_mel(samples.astype(np.float32) / 32768).astype(np.float32))
    with torch.no_grad():
        return page.smoothed(network(frames[None]))[0]


def assert_as_torch(output, page, samples):
    means = means_of(page, samples)
    printed = dict(re.findall(r"^(\S+|\(none of them\)): at most ([\d.]+)$", output, re.MULTILINE))
    assert list(printed) == [*page.WORDS, "(none of them)"]
    assert np.abs(np.array([*map(float, printed.values())]) - means.amax(0).numpy()).max() <= CLOSE
    heard = re.findall(r"^([\d.]+) s: (\S+)$", output, re.MULTILINE)
    assert {word for _, word in heard} == {
        word for word, most in zip(page.WORDS, means.amax(0), strict=False) if most > 0.5
    }
    for when, word in heard:
        assert abs(means[round(100 * float(when)), page.WORDS.index(word)] - 0.5) < 0.1  # as it passes a half
    return heard


def memory(output):
    return [int(number) for number in re.findall(r"(?:FLASH|RAM): +(\d+) B", output)]


def test_a_made_up_sound(example, page, tmp_path):
    output = run(tmp_path, "--data", tmp_path)
    assert "a made-up sound without words" in output
    assert assert_as_torch(output, page, example.made_up()) == []
    flash, ram = memory(output)
    assert flash - 2 * example.made_up().size < 64_000
    stack = int(re.findall(r"stack: (\d+) bytes", output)[0])
    assert ram + stack < 40_000
    rates = [int(number) for number in re.findall(r"(\d+) instructions a second of sound", output)]
    assert len(rates) == 2
    assert 1_000_000 < sum(rates) < 160_000_000  # which processors of this kind do in a second
    assert "the counter ticks every 40 instructions" in output


def test_recordings(example, page, tmp_path):
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install 'deepthin[compare]'")
    data = Path(os.environ.get("DEEPTHIN_DATA", "")) / "wakewords"
    if not data.is_dir():
        pytest.skip("DEEPTHIN_DATA has no folder wakewords with recordings")
    heard = 0
    for word in ("computer", "jarvis"):
        name = next(line for line in (data / "testing_list.txt").read_text().split() if line.startswith(word))
        output = run(tmp_path, "--wav", data / name)
        heard += len(assert_as_torch(output, page, example.recording(data / name)))
    assert heard > 0


def test_a_file_of_two_channels(example, tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install 'deepthin[compare]'")
    soundfile.write(tmp_path / "two.wav", np.zeros((100, 2)), RATE)
    with pytest.raises(SystemExit, match="2 channels"):
        example.recording(tmp_path / "two.wav")
