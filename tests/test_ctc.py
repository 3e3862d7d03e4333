"""The task ctc: AN4's transcripts, padding that changes nothing, what is done to a batch, and a training that works."""

import copy
import itertools
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import deepthin.torch as dt
from deepthin import ConfigError
from deepthin.lab.tasks import an4, ctc
from deepthin.lab.tasks.training import Training
from deepthin.torch.recurrent_layers import ThinLSTM
from tolerance import assert_close, bound, largest, peak

SPEAKERS = {"train": [f"s{i:02}" for i in range(18)], "test": ["t0", "t1"]}
WORDS = ("AB", "BA", "C")
HOLD = 9  # frames a character


def recordings(split):
    """(utterance, speaker, features, text): each character has a mean of its own, each speaker an offset."""
    rng = np.random.default_rng(len(split))
    means = {letter: np.random.default_rng(ord(letter)).normal(size=13) * 3 for letter in "ABC "}
    for number, speaker in enumerate(SPEAKERS[split]):
        for take in range(2):
            text = " ".join(rng.choice(WORDS, size=rng.integers(2, 6)))
            features = np.repeat([means[letter] for letter in f"{text} "], HOLD, axis=0) + number
            yield f"{speaker}-u{take}", speaker, features + rng.normal(size=features.shape), text


def write_an4(folder):
    etc = folder / "an4" / "etc"
    etc.mkdir(parents=True)
    for split in SPEAKERS:
        names, lines = [], []
        for name, speaker, features, text in recordings(split):
            path = folder / "an4" / "feat" / split / speaker / f"{name}.mfc"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(struct.pack(">i", features.size) + features.astype(">f4").tobytes())
            names.append(f"{split}/{speaker}/{name}")
            lines.append(f"{text} ({name})")
        (etc / f"an4_{split}.fileids").write_text("\n".join(names))
        (etc / f"an4_{split}.transcription").write_text("\n".join(lines))
    (etc / "an4.dic").write_text("".join(f"{word} X\n" for word in (*WORDS, "AB(2)")))
    grams = "".join(f"-0.5 {word} 0.0\n" for word in WORDS)
    (etc / "an4.ug.lm").write_text(f"\\data\\\nngram 1=3\n\n\\1-grams:\n{grams}\n\\end\\\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    write_an4(folder)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return ctc.load(folder)


def network(width=12, thin=None):
    torch.manual_seed(0)
    model = ctc.build(None, width)
    if thin:
        dt.compress(model, {"model": {"ratio": 0.4}, "rules": ctc.rules(thin)}, init="scratch")
    return model


def padded(split, count):
    """The first utterances of a split."""
    return pad_sequence(split.features[:count], batch_first=True), torch.tensor(
        [len(f) for f in split.features[:count]]
    )


def test_a_folder_becomes_utterances_with_characters(data):
    assert {name: len(split.features) for name, split in data.splits.items()} == {"train": 20, "dev": 16, "test": 4}
    test = data.splits["test"]
    assert sorted(test.texts) == sorted(text for *_, text in recordings("test"))
    for features, target, text in zip(test.features, test.targets, test.texts, strict=True):
        assert features.shape == (HOLD * (len(text) + 1), 39)
        assert "".join(ctc.SYMBOLS[i] for i in target) == text.replace(" ", "|") + "|"
    lengths = [len(features) for features in test.features]
    assert lengths == sorted(lengths)
    assert "train 20 utterances of 10 speakers" in data.about


def test_features_are_normalised_per_speaker(data):
    frames = torch.cat(data.splits["dev"].features)
    assert abs(frames.double().mean(0)).max() <= bound(1, largest(frames))  # normalised in float64, then rounded once
    assert abs(frames.std(0) - 1).max() < 1e-2  # as of each speaker
    assert all(features.dtype == torch.float32 for features in data.splits["dev"].features)


def terms_of(count):
    """Terms behind a score: those of the convolution, of two layers in each step, and of the classes."""
    return 39 * 11 + 2 * count * (24 + 12 + 2) + 24 + 28


@pytest.mark.parametrize("thin", [None, {"method": "deepthin"}])
def test_padding_changes_nothing(data, thin):
    model = network(thin=thin).eval()
    features, lengths = padded(data.splits["dev"], 16)
    assert lengths.min() < lengths.max()
    with torch.no_grad():
        scores, steps = model(features, lengths)
        for i, length in enumerate(lengths.tolist()):
            alone, count = model(features[i : i + 1, :length], lengths[i : i + 1])
            assert count.item() == steps[i] == math.ceil(length / ctc.STRIDE)
            assert alone.shape == (1, count, len(ctc.SYMBOLS))
            assert_close(scores[i, :count], alone[0], terms_of(count.item()), peak(model, features, lengths))
            # The sum of 28 shares, and the rounding of their logarithms p ln p, which sum to at most ln 28.
            assert_close(alone.exp().sum(2), torch.ones(1, count), 28 + 4 + math.log(28))


def test_the_layers_are_bidirectional_lstms(data):
    """Both directions do what torch's own layer does with packed sequences."""
    model = network().eval()
    features, lengths = padded(data.splits["dev"], 16)
    own = nn.LSTM(4, 12, 2, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for layer, (ahead, back) in enumerate(zip(model.ahead, model.back, strict=True)):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(own, f"{name}_l{layer}").copy_(getattr(ahead, f"{name}_l0"))
                getattr(own, f"{name}_l{layer}_reverse").copy_(getattr(back, f"{name}_l0"))
        scores, steps = model(features, lengths)
        x = nn.functional.hardtanh(model.norm(model.front(features.transpose(1, 2)))).transpose(1, 2)
        packed, _ = own(pack_padded_sequence(x, steps, batch_first=True, enforce_sorted=False))
        expected = model.output(pad_packed_sequence(packed, batch_first=True)[0]).log_softmax(2)
    for i, count in enumerate(steps):
        assert_close(scores[i, :count], expected[i, :count], terms_of(count.item()), peak(model, features, lengths))


def test_a_thin_network_has_thin_recurrent_layers(data, tmp_path):
    model = network(thin={"method": "deepthin", "rank": "max", "then": {"method": "uniform", "bits": 8}})
    assert sum(isinstance(module, ThinLSTM) for module in model.modules()) == 4
    ctc.fit(model, data, Training(model=model, steps=3, lr=1e-3))
    dt.save(model, tmp_path / "model.thin")
    with torch.device("meta"):
        again = ctc.build(data, 12)
    dt.load(again, tmp_path / "model.thin")
    for one, other in zip(model.eval()(*ctc.example(data)), again.eval()(*ctc.example(data)), strict=True):
        assert torch.equal(one, other)


def test_a_training_learns_to_spell(data):
    model = network(width=48)
    before = ctc.evaluate(model, data, "dev")
    ctc.fit(model, data, Training(model=model, steps=250, lr=2e-2))
    after = ctc.evaluate(model, data, "dev")
    assert tuple(after) == ctc.TASK.metrics
    assert after["loss"] < before["loss"] / 2
    assert after["wer"] <= after["wer_greedy"] < 20
    assert not model.training


def test_a_training_follows_from_its_seed(data):
    def trained(seed):
        model = network()
        torch.manual_seed(17 + seed)  # is not what counts
        ctc.fit(model, data, Training(model=model, steps=2, lr=1e-2, seed=seed))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_the_global_generator_is_left_alone(data):
    model, before = network(), torch.get_rng_state()
    ctc.fit(model, data, Training(model=model, steps=1, lr=1e-2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("symbols", "text"),
    [("AB", "AB"), ("AAB", "AB"), ("A_AB", "AAB"), ("__A_B__", "AB"), ("A||B|", "A B"), ("|_|A", "A"), ("___", "")],
)
def test_repeats_count_once_and_blanks_part_them(symbols, text):
    assert ctc.spelled(torch.tensor([ctc.SYMBOLS.index(symbol) for symbol in symbols])) == text


def test_the_loss_is_that_of_all_alignments():
    """Two steps, one character: it may stand in either or both. A text that is too long counts as zero.

    In float32 each of the two steps, and the sum at their end, rounds logarithms of at most 3 (an absolute error of
    3 EPS each for a score and for the sum) and takes exp and log of up to three terms (some 4 EPS): 30 EPS in all,
    however small the loss is.
    """
    allowed = bound(60, 1.0)
    probabilities = torch.full((2, 2, 28), 1e-9)
    probabilities[:, :, 0], probabilities[:, :, 2] = 0.25, 0.75
    scores, steps = probabilities.log(), torch.tensor([2, 2])
    expected = -math.log(0.75 * 0.75 + 2 * 0.25 * 0.75)
    assert ctc.loss(scores[:1], steps[:1], [torch.tensor([2])]).item() == pytest.approx(expected, rel=0, abs=allowed)
    targets = [torch.tensor([2]), torch.tensor([2, 2])]
    assert ctc.loss(scores, steps, targets).item() == pytest.approx(expected / 3, rel=0, abs=allowed)


def test_distorted_batches(data):
    generator = torch.Generator().manual_seed(0)
    own = data.splits["train"].features[:5]
    copies = copy.deepcopy(own)
    for _ in range(20):
        x, lengths = ctc.distorted(own, generator)
        assert x.shape == (5, -(-int(lengths.max()) // ctc.WHOLE) * ctc.WHOLE, 39)
        for features, row, length in zip(own, x, lengths, strict=True):
            assert abs(length.item() * (1 + ctc.SPEED) - len(features)) <= 2 * ctc.SPEED * length + 2
            assert not row[length:].any()
            hidden = (row[:length] == 0).all(1).sum()
            assert hidden <= ctc.TIME_MASKS * ctc.MASKED_FRAMES
            assert (row[:length] == 0).all(0).sum() <= 3 * ctc.MASKED_CEPSTRA
    assert all(map(torch.equal, own, copies))


def test_a_distorted_batch_at_the_recordings_speed_is_the_recording(data, monkeypatch):
    for constant in ("SPEED", "NOISE", "TIME_MASKS", "MASKED_CEPSTRA"):
        monkeypatch.setattr(ctc, constant, 0)
    own = data.splits["train"].features[:5]
    x, lengths = ctc.distorted(own, torch.Generator().manual_seed(0))
    assert lengths.tolist() == [len(features) for features in own]
    assert all(torch.equal(row[:length], features) for row, length, features in zip(x, lengths, own, strict=True))


def test_batches_have_like_lengths():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(1, 1000, (103,), generator=generator)
    order = ctc._of_like_length(frames, 10, generator)
    assert len(set(order.tolist())) == 100
    spans = frames[order].view(10, 10)
    assert sorted(spans.flatten().tolist()) == torch.cat(sorted(spans, key=lambda row: row.max())).sort()[0].tolist()
    ends = sorted((row.min().item(), row.max().item()) for row in spans)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ends))


def test_folders_that_hold_no_speech(tmp_path):
    with pytest.raises(ConfigError, match="The task ctc needs --data"):
        ctc.load(None)
    with pytest.raises(ConfigError, match="does not hold AN4"):
        ctc.load(tmp_path)


def test_transcripts_that_cannot_be_spelled_are_named(tmp_path):
    write_an4(tmp_path)
    path = tmp_path / "an4" / "etc" / "an4_train.transcription"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["AB 4 (s00-u0)", *lines[1:]]))
    with pytest.raises(ConfigError, match="the transcript of s00-u0 is 'AB 4'"):
        ctc.load(tmp_path)
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError, match="the transcript of s00-u0 is ''"):
        ctc.load(tmp_path)
    path.write_text("\n".join(["AB", *lines[1:]]))
    with pytest.raises(ConfigError, match="line 1: 'AB' does not end in"):
        ctc.load(tmp_path)


def test_an4(data_folder):
    root = an4.find(Path(data_folder))
    assert root is not None
    assert {split: len(found) for split, found in an4.read(root).items()} == {"train": 948, "test": 130}
    data = ctc.load(Path(data_folder))
    counts = {name: (len(s.texts), sum(map(len, s.targets))) for name, s in data.splits.items()}
    assert counts == {"train": (848, 16_989), "dev": (100, 1_813), "test": (130, 2_695)}
    assert sum(len(text.split()) for text in data.splits["test"].texts) == 773
    assert sum(p.numel() for p in ctc.build(data, ctc.WIDTH).parameters() if p.dim() > 1) == 1_301_184
    with torch.no_grad():
        for name, split in data.splits.items():
            assert name == "train" or all(
                ctc.loss(torch.zeros(1, -(-len(f) // 3), 28).log_softmax(2), torch.tensor([-(-len(f) // 3)]), [t]) > 0
                for f, t in zip(split.features, split.targets, strict=True)
            )  # every text fits its recording
