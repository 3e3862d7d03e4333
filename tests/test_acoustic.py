"""The acoustic task: both kinds of folder, features, and the best state of a training."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deepthin import ConfigError
from deepthin.lab.compare import Settings, compare
from deepthin.lab.tasks import acoustic, an4
from deepthin.lab.tasks.acoustic import Utterance, spliced
from deepthin.lab.tasks.training import Training
from deepthin.lab.trial import Run, Setup
from tolerance import assert_close, bound

SPEAKERS = {"train": [f"s{i}" for i in range(9)], "test": ["t0", "t1"]}


def recordings(split):
    """(utterance, speaker, features, states): each state has a mean of its own, each speaker an offset."""
    rng = np.random.default_rng(len(split))
    means = np.random.default_rng(0).normal(size=(6, 13)) * 3
    for number, speaker in enumerate(SPEAKERS[split]):
        for take in range(2):
            states = np.repeat(rng.integers(0, 6, size=12), 5)
            features = means[states] + rng.normal(size=(60, 13)) + number
            yield f"{speaker}-u{take}", speaker, features.astype(np.float32), states


def write_kaldi(folder):
    for split in SPEAKERS:
        base = folder / split
        base.mkdir(parents=True)
        feats, ali, speakers = [], [], []
        for name, speaker, features, states in recordings(split):
            rows = "\n".join("  " + " ".join(map(str, row)) for row in features)
            feats.append(f"{name}  [\n{rows} ]\n")
            ali.append(f"{name} {' '.join(map(str, states))}\n")
            speakers.append(f"{name} {speaker}\n")
        (base / "feats.txt").write_text("".join(feats))
        (base / "ali.txt").write_text("".join(ali))
        (base / "utt2spk").write_text("".join(speakers))


def write_an4(folder):
    states = {}
    (folder / "an4" / "etc").mkdir(parents=True)
    for split in SPEAKERS:
        names = []
        for name, speaker, features, own in recordings(split):
            path = folder / "an4" / "feat" / split / speaker / f"{name}.mfc"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(struct.pack(">i", features.size) + features.astype(">f4").tobytes())
            names.append(f"{split}/{speaker}/{name}")
            states[name] = own.astype(np.uint16)
        (folder / "an4" / "etc" / f"an4_{split}.fileids").write_text("\n".join(names))
    np.savez(folder / "states.npz", **states)


@pytest.fixture(scope="module", params=[write_kaldi, write_an4])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    request.param(folder)
    return folder


def test_a_folder_becomes_spliced_frames(folder):
    data = acoustic.load(folder)
    assert {split: tuple(x.shape) for split, x in data.inputs.items()} == {
        "train": (1 * 2 * 60, 429),
        "dev": (8 * 2 * 60, 429),
        "test": (2 * 2 * 60, 429),
    }
    assert data.states == 6
    expected = [u for _, _, _, u in recordings("test")]
    assert data.targets["test"].tolist() == np.concatenate(expected).tolist()
    assert "test 240 frames of 2 speakers; 6 states" in data.about


def test_features_are_normalised_per_speaker_and_spliced():
    rng = np.random.default_rng(0)
    utterances = [
        Utterance(speaker, rng.normal(size=(length, 13)) * 5 + 7, np.zeros(length, dtype=np.int64))
        for speaker, length in (("a", 50), ("a", 30), ("b", 40))
    ]
    rows = spliced(utterances)
    centre = rows[:, 5 * 39 : 6 * 39]
    for own in (centre[:80], centre[80:]):
        own = own.astype(np.float64)  # normalised in float64, then rounded once
        once = bound(1, abs(own).max())
        assert abs(own.mean(0)).max() <= once
        assert abs(own.std(0) - 1).max() <= once + 1e-8  # what the features' deviation is raised by
    assert (rows[10, :39] == centre[5]).all()  # five frames earlier
    assert (rows[10, -39:] == centre[15]).all()
    assert (rows[0, :39] == centre[0]).all()  # the edge repeats
    assert (rows[50, :39] == centre[50]).all()  # utterances do not run into each other
    assert (rows[49, -39:] == centre[49]).all()


def test_the_slope_of_a_ramp_is_one():
    with_deltas = an4.with_deltas(np.arange(20.0)[:, None] * np.ones((1, 13)))
    assert_close(with_deltas[4:-4, 13:26], np.ones((12, 13)), 10, 20)  # sums of a few products of numbers up to 20
    assert_close(with_deltas[4:-4, 26:], np.zeros((12, 13)), 10, 20)


def test_compare_on_speech(folder, tmp_path):
    setup = Setup("acoustic", folder, 60, width=64, depth=2)
    assert str(Run.prepare(setup).build(64)).count("Linear") == 3
    rows = compare(Settings(setup, ("deepthin",), (0.05,)), tmp_path)
    errors = {row.method: row.value for row in rows if row.split == "test"}
    assert errors["dense"] < 60  # of six states, guessing errs on 83
    assert errors["deepthin"] < 60
    assert {row.metric for row in rows} == {"frame_error"}
    assert "(0): Linear(in_features=429, out_features=64" in json.loads((tmp_path / "run.json").read_text())["network"]


def test_only_some_networks_have_a_depth():
    with pytest.raises(ConfigError, match="The network of digits has a fixed depth"):
        Run.prepare(Setup("digits", depth=3))


def test_folders_that_hold_no_speech(tmp_path):
    with pytest.raises(ConfigError, match="needs --data"):
        acoustic.load(None)
    with pytest.raises(ConfigError, match="holds neither AN4"):
        acoustic.load(tmp_path)


def test_an_alignment_of_another_length_is_named(tmp_path):
    write_kaldi(tmp_path)
    path = tmp_path / "train" / "ali.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0] + " 3", *lines[1:]]))
    with pytest.raises(ConfigError, match="an utterance of s0 has 60 frames, but its alignment 61"):
        acoustic.load(tmp_path)


def test_a_damaged_feature_file_is_named(tmp_path):
    write_an4(tmp_path)
    path = next((tmp_path / "an4" / "feat").rglob("*.mfc"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConfigError, match="is not a Sphinx feature file"):
        acoustic.load(tmp_path)


def test_the_best_state_stays():
    """The judge likes the second of four judgments best."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    seen = []

    def judge():
        seen.append(model.weight.detach().clone())
        return [3.0, 1.0, 2.0, 4.0][len(seen) - 1]

    x, y = torch.randn(40, 4), torch.arange(40) % 2
    training = Training(model=model, steps=10, lr=0.1)
    training.keep_best(judge, 4)
    for chosen in training.batches(40, 8):
        training.minimise(nn.functional.cross_entropy(model(x[chosen]), y[chosen]))
    assert len(seen) == 4
    assert torch.equal(model.weight, seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_an4(data_folder):
    data = acoustic.load(Path(data_folder))
    assert {split: len(x) for split, x in data.inputs.items()} == {"train": 228_922, "dev": 24_760, "test": 35_570}
    assert data.states == 102
