"""The task keywords: features by their definition, folders and splits, published networks, every method."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin import BudgetError, ConfigError
from deepthin.lab.compared import COMPARED, INT8, is_coded
from deepthin.lab.tasks import keyword_networks, keywords, words
from deepthin.lab.tasks.keyword_networks import NETWORKS
from deepthin.lab.tasks.log_mel import BANDS, FFT, FLOOR, HOP, RATE, WINDOW, log_mel, resampled, triangles
from deepthin.lab.trial import Run, Setup, Trial, alike, quantised
from deepthin.storage.read import inspect

soundfile = pytest.importorskip("soundfile")

TONES = {"low": 300.0, "mid": 1200.0, "high": 3500.0}  # Hz
SPEAKERS = 30
DATA = os.environ.get("DEEPTHIN_DATA")


def tone(frequency, seconds=0.3, rate=RATE, seed=0):
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (0.3 * np.sin(2 * np.pi * frequency * time) + 0.01 * noise).astype(np.float32)


def write(folder, speakers=SPEAKERS, ending="wav"):
    """Three words of tones, a file of each speaker, and noise that is no word."""
    for number, (word, frequency) in enumerate(TONES.items()):
        (folder / word).mkdir(parents=True)
        for speaker in range(speakers):
            sound = tone(frequency * (1 + speaker / 500), seed=number * speakers + speaker)
            soundfile.write(folder / word / f"{speaker:08x}_nohash_0.{ending}", sound, RATE)
    (folder / "_background_noise_").mkdir()
    soundfile.write(folder / "_background_noise_" / "hum.wav", tone(50.0), RATE)
    (folder / "README.md").write_text("tones")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def data(folder):
    return keywords.load(folder)


def random_data(shape=(1, 40, 24), classes=4, items=24):
    generator = torch.Generator().manual_seed(0)
    splits = words.SPLITS
    inputs = {split: torch.randn(items, *shape, generator=generator) for split in splits}
    targets = {split: torch.randint(classes, (items,), generator=generator) for split in splits}
    return keywords.Data(inputs, targets, tuple("abcdefgh"[:classes]), "random")


def numbers(model):
    return sum(p.numel() for p in model.parameters())


# Features


def test_features_are_their_definition():
    """Each number by the sums of the module's description, in float64, without an FFT."""
    samples = (tone(440.0) + tone(3000.0)).astype(np.float32)
    got = log_mel(samples)
    assert got.dtype == np.float32
    assert got.shape == (1 + (len(samples) - WINDOW) // HOP, BANDS)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    bins = np.arange(FFT // 2 + 1)
    waves = np.exp(-2j * np.pi * np.outer(bins, np.arange(WINDOW)) / FFT)
    mel = np.linspace(2595 * np.log10(1 + 20 / 700), 2595 * np.log10(1 + 8000 / 700), BANDS + 2)
    corners = 700 * (10 ** (mel / 2595) - 1)
    for frame in (0, 7, len(got) - 1):
        power = abs(waves @ (hann * samples[HOP * frame :][:WINDOW].astype(np.float64))) ** 2
        for band in range(BANDS):
            low, peak, high = corners[band : band + 3]
            weight = [np.interp(k * RATE / FFT, [low, peak, high], [0, 1, 0]) for k in bins]
            # Rounding in the FFT is relative to the loudest bin: log2(FFT) roundings of each product.
            slack = 2 * np.finfo(np.float32).eps * np.log2(FFT) * power.max() * sum(weight)
            energy = power @ weight + FLOOR
            assert abs(np.exp(got[frame, band].astype(np.float64)) - energy) <= slack + 1e-5 * energy


def test_every_band_has_a_bin_and_none_but_neighbours_overlap():
    table = triangles()
    assert (table.max(1) > 0).all()
    assert not (table[:-2] * table[2:]).any()


def test_a_recording_shorter_than_a_frame_is_refused():
    with pytest.raises(ConfigError, match=r"399 samples is shorter than one frame: it needs 400"):
        log_mel(np.zeros(399, np.float32))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_other_rates_give_the_same_tone(rate):
    """Whole periods in the recording, so that it is a period of a periodic signal and the result is exact."""
    got = resampled(tone_of_whole_periods(rate), rate)
    expected = tone_of_whole_periods(RATE)
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    assert abs(got - expected).max() < 1e-5


def tone_of_whole_periods(rate):
    return np.sin(2 * np.pi * 400 * np.arange(rate // 5) / rate).astype(np.float32)


def test_what_16_khz_cannot_have_is_cut_off():
    high = np.sin(2 * np.pi * 12_000 * np.arange(9_600) / 48_000).astype(np.float32)
    assert abs(resampled(high, 48_000)).max() < 1e-5


# Folders


def test_words_are_folders(data):
    assert data.words == tuple(sorted(TONES))
    assert sum(map(len, data.targets.values())) == 3 * SPEAKERS
    assert data.shape == (1, BANDS, 1 + (round(0.3 * RATE) - WINDOW) // HOP)
    counts = [len(data.targets[split]) for split in words.SPLITS]
    assert data.about == "recordings: 3 words; train {:,}, dev {:,}, test {:,}; 28 frames".format(*counts)


def test_speakers_are_in_one_split_by_the_hash_of_speech_commands():
    """Three files of Speech Commands v2 with the split that its lists give them."""
    lists = {"dev": None, "test": None}
    splits = {words.split_of(f"{word}/0a7c2a8d_nohash_{take}.wav", lists) for word in TONES for take in range(3)}
    assert len(splits) == 1
    counted = [words.split_of(f"yes/{number:08x}_nohash_0.wav", lists) for number in range(4000)]
    for split in ("dev", "test"):  # 400 expected, standard deviation 19
        assert 300 < counted.count(split) < 500


def test_lists_go_before_the_hash(tmp_path, folder):
    lists = {"dev": {"low/00000001_nohash_0.wav"}, "test": None}
    assert words.split_of("low/00000001_nohash_0.wav", lists) == "dev"
    others = {words.split_of(f"low/{number:08x}_nohash_0.wav", lists) for number in range(2, 200)}
    assert others == {"train", "test"}
    write(tmp_path / "listed", 4)
    for split, speaker in (("validation", 2), ("testing", 3)):
        names = "".join(f"{word}/{speaker:08x}_nohash_0.wav\n" for word in TONES)
        (tmp_path / "listed" / f"{split}_list.txt").write_text(names)
    listed = keywords.load(tmp_path / "listed")
    assert [len(listed.targets[split]) for split in words.SPLITS] == [6, 3, 3]


def test_formats_rates_and_channels(tmp_path):
    """The same sound as FLAC, at 48 kHz and in stereo gives nearly the same features."""
    for word in ("one", "two"):
        (tmp_path / word).mkdir()
    fine = np.sin(2 * np.pi * 400 * np.arange(14_400) / 48_000)
    sounds = {
        "plain.wav": (fine[::3], RATE),
        "fast.FLAC": (fine, 48_000),
        "stereo.wav": (np.stack([0.5 * fine[::3], 0.3 * fine[::3]], 1), RATE),
        "quiet.wav": (0.4 * fine[::3], RATE),  # the mean of the channels
    }
    for name, (sound, rate) in sounds.items():
        for word in ("one", "two"):
            soundfile.write(tmp_path / word / name, 0.5 * sound, rate)
    (tmp_path / "validation_list.txt").write_text("one/fast.FLAC\ntwo/fast.FLAC\n")
    (tmp_path / "testing_list.txt").write_text("one/stereo.wav\ntwo/stereo.wav\n")
    data = keywords.load(tmp_path)
    train, dev, test = (data.inputs[split] for split in words.SPLITS)
    plain, quiet = train[0], train[1]  # by name
    steps = 2 * 16_000 / FFT  # Hz; the tone is loud in the bands near 400 Hz, elsewhere rounding to 16 bits decides
    near = triangles() @ (abs(np.arange(FFT // 2 + 1) * RATE / FFT - 400) < steps) > 0.2
    assert near.sum() >= 2
    assert abs(dev[0] - plain)[:, near].max() < 0.05
    assert abs(test[0] - quiet)[:, near].max() < 0.05
    assert abs(plain - quiet)[:, near].min() > 1


def test_lengths_are_padded_and_cut_in_the_middle():
    sound = np.arange(1, 6, dtype=np.float32)
    assert words.centred(sound, 8).tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert words.centred(sound, 3).tolist() == [2, 3, 4]
    assert words.centred(sound, 5).tolist() == sound.tolist()


def test_mistakes_are_named(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"The task keywords needs --data: a folder with a subfolder"):
        keywords.load(None)
    with pytest.raises(ConfigError, match=r"nowhere is no folder: --data must have a subfolder of recordings"):
        keywords.load(tmp_path / "nowhere")
    (tmp_path / "empty" / "word").mkdir(parents=True)
    (tmp_path / "empty" / "word" / "notes.txt").write_text("none")
    with pytest.raises(ConfigError, match=r"empty has no recordings: it needs a subfolder for each word with .flac"):
        keywords.load(tmp_path / "empty")
    (tmp_path / "few" / "word").mkdir(parents=True)
    soundfile.write(tmp_path / "few" / "word" / "a.wav", tone(300.0), RATE)
    with pytest.raises(
        ConfigError, match=r"few has no recording for '(train|dev|test)' .* of 1\): it needs recordings of"
    ):
        keywords.load(tmp_path / "few")
    (tmp_path / "few" / "word" / "b.wav").write_bytes(b"RIFF, but not really")
    with pytest.raises(ConfigError, match=r"b\.wav cannot be read as audio .*: replace or remove it"):
        keywords.load(tmp_path / "few")
    one = tmp_path / "one"
    one.mkdir()
    (one / "low").symlink_to(folder / "low")
    with pytest.raises(ConfigError, match=r"one has recordings of one word only \(low\): give at least two"):
        keywords.load(one)


def test_a_list_that_names_nothing_is_named(tmp_path):
    write(tmp_path / "tones", 3)
    (tmp_path / "tones" / "validation_list.txt").write_text("low/other.wav\n")
    with pytest.raises(ConfigError, match=r"no recording for 'dev' \(none is in validation_list.txt of 9\)"):
        keywords.load(tmp_path / "tones")


# AN4


def test_words_of_an_alignment(tmp_path):
    (tmp_path / "dic").write_text("TWO T UW\nNINE N AY N\nNINE(2) N AY\n")
    lines = [
        "u1 0.00 0.10 SIL <sil>",
        "u1 0.10 0.05 N NINE",
        "u1 0.15 0.05 AY NINE",
        "u1 0.20 0.05 N NINE",
        "u1 0.25 0.05 AY NINE",
        "u1 0.30 0.05 N NINE",
        "u1 0.35 0.15 T TWO(2)",
        "u1 0.50 0.15 UW TWO(2)",
        "u2 0.00 0.15 T TWO",
        "u2 0.15 0.20 UW TWO",
    ]
    (tmp_path / "ctm").write_text("\n".join(lines))
    spoken = words.read_ctm(tmp_path / "ctm", tmp_path / "dic")
    assert spoken["u1"][-1] == ("TWO", 35, 65)
    assert [word for word, _, _ in spoken["u1"]] == ["NINE", "NINE", "TWO"]  # N AY, N AY N
    assert spoken["u1"][0][1] == 10
    assert spoken["u1"][0][2] == spoken["u1"][1][1]
    assert spoken["u1"][1][2] == 35
    assert spoken["u2"] == [("TWO", 0, 35)]
    (tmp_path / "ctm").write_text("u1 0.00 SIL <sil>\n")
    with pytest.raises(ConfigError, match=r"line 1: 'u1 0.00 SIL <sil>' is not utterance, start, duration, phone"):
        words.read_ctm(tmp_path / "ctm", tmp_path / "dic")


@pytest.mark.skipif(DATA is None, reason="DEEPTHIN_DATA is not set")
def test_an4_has_thirty_words_split_by_speaker():
    data = keywords.load(Path(DATA) / "an4")
    assert len(data.words) == 30
    assert data.shape[:2] == (3, 13)
    assert {"A", "ENTER", "ONE", "W"} <= set(data.words)
    assert len(data.targets["train"]) > 5 * len(data.targets["test"]) > 2000
    assert all(torch.isfinite(inputs).all() for inputs in data.inputs.values())


@pytest.mark.slow  # 2,279 recordings; the folders that other tests write are read in the same way
@pytest.mark.skipif(DATA is None, reason="DEEPTHIN_DATA is not set")
def test_wake_words_are_read():
    data = keywords.load(Path(DATA) / "wakewords")
    assert len(data.words) == 6
    assert data.shape == (1, 40, 148)
    assert sum(map(len, data.targets.values())) == 2279
    assert len(data.targets["test"]) == 451


# Networks


def test_published_numbers_of_parameters():
    """BC-ResNet-1 (Kim et al., 2021, table 2) and its smallest version; DS-CNN S, M, L (Zhang et al., 2017)."""
    assert numbers(keyword_networks.bc_resnet()) == 9_232
    assert numbers(keyword_networks.bc_resnet(620)) == 4_585
    assert numbers(keyword_networks.bc_resnet(8000)) == pytest.approx(321_000, rel=0.001)
    kilobytes = {"ds-cnn-s": 38.6, "ds-cnn-m": 189.2, "ds-cnn-l": 497.6}  # 8-bit weights, normalisation folded
    for name, published in kilobytes.items():
        model = NETWORKS[name]()
        weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert sum(m.weight.numel() + len(m.weight) for m in weights) / 1000 <= published


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 40, 98), (3, 13, 41)])
def test_networks_of_any_width_score_each_class(name, shape):
    counts = []
    for width in (1, 300, 1000):
        model = NETWORKS[name](width, 5, shape)
        assert model(torch.randn(2, *shape)).shape == (2, 5)
        counts.append(numbers(model))
    assert counts == sorted(counts)
    assert not any("num_batches" in key for key in model.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_factories_need_no_arguments(name):
    model = NETWORKS[name]().eval()
    assert model(torch.zeros(1, *keyword_networks.SHAPE)).shape == (1, keyword_networks.CLASSES)


def test_sub_bands_are_normalised_apart():
    norm = keyword_networks.SubSpectralNorm(2, 5)
    x = torch.randn(8, 2, 10, 6) * torch.arange(1.0, 11)[:, None]
    y = norm(x).view(8, 2, 5, 2, 6)
    assert torch.allclose(y.mean((0, 3, 4)), torch.zeros(2, 5), atol=1e-5)
    assert torch.allclose(y.var((0, 3, 4), unbiased=False), torch.ones(2, 5), atol=1e-3)


def test_a_block_broadcasts_over_the_bins():
    """With weights of zero over time, all that is left is the 2-d part and the shortcut."""
    block = keyword_networks.BroadcastedBlock(4, 4, 1, 2, 5, transition=False).eval()
    nn.init.zeros_(block.time[3].weight)
    x = torch.randn(2, 4, 10, 12)
    with torch.no_grad():
        assert torch.equal(block(x), torch.relu(block.frequency(x) + x))
        nn.init.ones_(block.time[3].weight)
        added = block.time(block.frequency(x).mean(2, keepdim=True))
        assert added.shape == (2, 4, 1, 12)
        assert torch.equal(block(x), torch.relu(block.frequency(x) + added + x))


# Compression


def run_of(name, data, steps, width=1000):
    return Run(keywords.TASK, data, steps, width, partial(keywords.build, data, network=name), None, name)


# With quantised floats only deepthin; same-size-coded: the next test.
ONCE = [m for m in COMPARED if not m.endswith("bit") and m not in (INT8, "same-size-coded")]


# The larger network with methods that store it in ways of their own: whole, smaller, by learned steps, quantised.
BOTH = ("dense", "same-size", "rank", "deepthin-coded", "deepthin-8bit")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if name == "ds-cnn-s" or method in BOTH else pytest.mark.slow)
        for name in ("ds-cnn-s", "bc-resnet")
        for method in (*ONCE, "deepthin-8bit")
    ],
)
def test_depthwise_networks_by_every_method(name, method, tmp_path):
    """Thin where that pays, and never larger than asked."""
    data = random_data((1, 10, 8), items=8)
    steps = 3 if method == "pruned-coded" else 1  # it is trained to its size after pruning
    run, trial = run_of(name, data, steps, 400), Trial(method, 1.2 if is_coded(method) else 0.5, 0)
    model = run.train(trial, lambda step: None)
    written = dt.save(model, tmp_path / "m.thin")
    rows = inspect(tmp_path / "m.thin").rows
    if is_coded(method):
        assert written <= run.file_bytes(trial.ratio)
        assert {row.method.rpartition(" ")[2] for row in rows} == {"coded"}
    elif method not in ("dense", "same-size"):
        thin = {row.name for row in rows if row.method != "dense"}
        assert len(thin) > len(rows) / 2
        assert sum(row.bytes for row in rows) <= trial.ratio * run.weight_bytes()
    loaded = run.load(tmp_path / "m.thin", method, trial.ratio)
    assert alike(model.eval(), loaded, keywords.example(data))


def test_statistics_can_be_too_large_for_the_file():
    """The widest BC-ResNet with two bits for each weight has more statistics than that takes."""
    with pytest.raises(BudgetError, match=r"with every symbol zero it has \d+, of which \d+ are tensors that no rule"):
        run_of("bc-resnet", random_data((1, 10, 8), items=8), 1, 400).model(Trial("same-size-coded", 0.9, 0))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(
            name, method, marks=() if method == "deepthin-8bit" or name in ("gru", "cnn") else pytest.mark.slow
        )
        for name in NETWORKS
        for method in ("deepthin-8bit", "deepthin-coded")
    ],
)
def test_a_step_of_each_network_and_its_file(name, method, tmp_path):
    data = random_data((3, 13, 12))
    run = run_of(name, data, 2)
    trial = Trial(method, 0.5, 0)
    model = run.train(trial, lambda step: None)
    dt.save(model, tmp_path / "m.thin")
    loaded = run.load(tmp_path / "m.thin", method, 0.5)
    assert alike(model.eval(), loaded, keywords.example(data))


@pytest.mark.parametrize("name", ["gru", "bc-resnet"])
def test_a_size_out_of_reach_names_the_smallest(name):
    with pytest.raises(BudgetError) as caught:
        run_of(name, random_data(), 2).model(Trial("deepthin", 0.0005, 0))
    assert "smallest" in str(caught.value)


def test_int8(data):
    with torch.no_grad():
        assert quantised(keywords.build(data, 1000, "gru").eval())(data.inputs["test"]).shape[1] == 3


# The command line


def test_tones_end_to_end(folder, tmp_path, monkeypatch, command_line):
    monkeypatch.chdir(tmp_path)
    code, _, _ = command_line(
        *"compare keywords --network cnn --width 250 --methods deepthin-8bit,same-size --ratios 0.1".split(),
        *f"--steps 60 --data {folder} --out runs".split(),
    )
    assert code == 0
    rows = [row for row in json.loads((tmp_path / "runs" / "results.json").read_text()) if row["split"] == "test"]
    assert {row["method"] for row in rows} == {"dense", "int8", "deepthin-8bit", "same-size"}
    for row in rows:
        assert row["task"] == "keywords"
        assert row["metric"] == "error"
        assert row["value"] < 20  # of three tones; guessing has 67


def test_train_takes_a_network(folder, tmp_path, monkeypatch, command_line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thin.toml").write_text('[model]\nratio = 0.2\n[rules."*"]\nmethod = "deepthin"\n')
    code, out, _ = command_line(
        *"train keywords --network gru --width 100 --config thin.toml --steps 3 --out gru.thin".split(),
        *f"--data {folder}".split(),
    )
    assert code == 0
    assert "gru.weight_hh_l0" in out
    assert {row.name for row in inspect(tmp_path / "gru.thin").rows} >= {"gru.weight_ih_l0", "output.weight"}


def test_the_network_is_a_choice_of_this_task_only(folder):
    with pytest.raises(ConfigError) as caught:
        Run.prepare(Setup("keywords", folder, network="resnet"))
    assert str(caught.value) == (
        "keywords has no network 'resnet': use one of cnn, ds-cnn-s, ds-cnn-m, ds-cnn-l, bc-resnet, gru."
    )
    with pytest.raises(ConfigError, match=r"digits has no network 'cnn': leave out --network\."):
        Run.prepare(Setup("digits", network="cnn"))


def test_each_network_has_its_learning_rate(data):
    run = run_of("cnn", data, 1)
    task = replace(keywords.TASK, learning_rates={"rank": 3.0}, network_rates={"cnn": {"rank": 2.0, "dense": 1.0}})
    run = replace(run, task=task)
    assert [run.choice(method).lr for method in ("dense", "rank", "rank-8bit")] == [1.0, 2.0, 2.0]
    other = replace(run, network="gru")
    assert [other.choice(method).lr for method in ("dense", "rank")] == [task.learning_rate, 3.0]
