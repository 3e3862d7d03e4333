"""The task lstm-lm: texts of both kinds, a state that is carried on, and a training that learns a grammar."""

import gzip
import importlib
import json
import math
import os
import random
import struct
import sys
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import deepthin.torch as dt
from deepthin import ConfigError
from deepthin.lab.tasks import austen, lstm_lm
from deepthin.lab.tasks.training import Training
from deepthin.torch.exchange import thin_tensors
from deepthin.torch.layers import ThinEmbedding, ThinLinear
from deepthin.torch.recurrent_layers import ThinLSTM
from tolerance import assert_close, bound, largest, peak

NOUNS, VERBS = ("cat", "dog", "owl", "eel"), ("sees", "likes")


def sentences(count, seed):
    """Of a grammar of 8 words and an end; a sentence has an entropy of 5 bits, which are 5 ln 2 / 6 nats a word."""
    draw = random.Random(seed)
    for _ in range(count):
        yield f" the {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)} \n"


def write_treebank(folder, count=900):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, share) in enumerate((("train", 1), ("valid", 4), ("test", 4))):
        (folder / f"ptb.{name}.txt").write_text("".join(sentences(count // share, seed)))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_treebank(tmp_path_factory.mktemp("text") / "ptb").parent


@pytest.fixture(scope="module")
def data(folder):
    return lstm_lm.load(folder)


def network(data, width=16, depth=2, thin=None):
    torch.manual_seed(0)
    model = lstm_lm.build(data, width, depth)
    if thin:
        dt.compress(model, {"model": {"ratio": 0.4}, "rules": lstm_lm.rules(thin)}, init="scratch")
    return model


# What R writes, item by item: a writer of its own, so that the reader is not its own judge.


def number(*values):
    return struct.pack(f">{len(values)}i", *values)


def chars(text):
    raw = text.encode("latin-1" if "£" in text else "utf-8")
    return number(0x4009 if "£" in text else 0x9, len(raw)) + raw


def strings(texts):
    return number(16, len(texts)) + b"".join(map(chars, texts))


def named(names, items):
    """A list; its attribute's name is a new symbol the first time, later a reference."""
    listed = number(0x213, len(items)) + b"".join(items) + number(0x402)
    return listed + number(1) + chars("names") + strings(names) + number(254)


def serialised(item):
    return b"X\n" + number(3, 0x40201, 0x30500, 5) + b"UTF-8" + item


def write_package(folder, books, serialise=serialised):
    """As ``dpkg -x`` leaves it."""
    root = folder / "usr/lib/R/site-library/janeaustenr"
    (root / "data").mkdir(parents=True)
    raw, places = b"", []
    for lines in books.values():
        item = serialise(strings(lines))
        entry = struct.pack(">I", len(item)) + zlib.compress(item)
        places.append(number(13, 2, len(raw), len(entry)))
        raw += entry
    variables = number(0x213, len(books)) + b"".join(places) + number(0x402, 1) + chars("names")
    variables += strings(list(books)) + number(254)
    index = number(0x213, 2) + variables + number(10, 1, 1)
    index += number(0x402, 0x1FF) + strings(["variables", "compressed"]) + number(254)
    (root / "data" / "Rdata.rdb").write_bytes(raw)
    (root / "data" / "Rdata.rdx").write_bytes(gzip.compress(serialised(index)))
    return root


BOOKS = {"emma": ["EMMA", "", "It cost £5; he--", "didn't!"], "other": ["One_two well-bred", "", "", "(end)"]}


def test_books_come_out_of_the_package_as_r_wrote_them(tmp_path):
    root = write_package(tmp_path, BOOKS)
    assert austen.find(tmp_path) == austen.find(root) == austen.find(root.parent) == root
    assert austen.read(root) == BOOKS


def test_text_becomes_words_marks_and_ends_of_paragraphs():
    assert austen.words(BOOKS["emma"]) == "emma <eos> it cost 5 ; he -- didn't ! <eos>".split()
    assert austen.words(BOOKS["other"]) == "one two well-bred <eos> end <eos>".split()


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (b"A\n" + bytes(20), "not in R's binary form"),
        (b"X\n" + number(4, 0, 0), ""),
        (serialised(number(24, 1)), ""),
        (serialised(number(16, -1)), "emma is not text"),
        (serialised(number(13, 1 << 28)), "emma is not text"),
        (serialised(b""), ""),
        (serialised(number(13, 1, 7)), "emma is not text"),
    ],
)
def test_what_r_did_not_write_is_named(tmp_path, item, reason):
    root = write_package(tmp_path, {"emma": ["x"]}, lambda _: item)
    with pytest.raises(ConfigError, match=rf"Rdata.rdx is not an R database, or is damaged \(.*{reason}.+install"):
        austen.read(root)


def test_damage_anywhere_is_a_configuration_error(tmp_path):
    """Every third byte of index and text: an error of ours, or what zlib's checksum let pass."""
    root = write_package(tmp_path, BOOKS)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rdata's, of names and encodings that it does not know
        for name in ("Rdata.rdx", "Rdata.rdb"):
            path = root / "data" / name
            whole = path.read_bytes()
            for place in range(0, len(whole), 3):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
                try:
                    austen.read(root)
                except ConfigError as error:
                    refused += 1
                    assert "install the package again" in str(error)
            path.write_bytes(whole)
    assert refused > 50


def test_novels_need_rdata(tmp_path, monkeypatch):
    root = write_package(tmp_path, BOOKS)
    monkeypatch.setattr(austen, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"are read by rdata: pip install 'deepthin\[compare\]'"):
        austen.read(root)


def test_novels_are_split_one_by_one(tmp_path):
    books = {name: [" ".join(f"{name}{i}" for i in range(99))] for name in ("a", "b")}
    found = lstm_lm.novels(write_package(tmp_path, books))
    assert {split: len(words) for split, words in found.items()} == {"train": 160, "dev": 20, "test": 20}
    assert found["dev"] == [f"{name}{i}" for name in "ab" for i in range(80, 90)]
    assert found["test"][-1] == austen.END


def test_a_folder_of_novels_is_read_whole(tmp_path):
    write_package(tmp_path, {"a": ["x y x z", ""] * 200})
    data = lstm_lm.load(tmp_path)
    assert sorted(data.words) == sorted(["<unk>", "x", "y", "z", "<eos>"])
    assert data.about == (
        "Jane Austen's novels: 800 words to train, 100 for development, 100 to test; vocabulary 5; "
        "0.0 % unknown in development"
    )


def test_installed_novels_are_cut(tmp_path, monkeypatch):
    root = write_package(tmp_path, {"a": ["x y x z", ""] * 200})
    monkeypatch.setattr(austen, "INSTALLED", root)
    monkeypatch.setattr(lstm_lm, "SUBSET", 400)
    assert {split: len(text) for split, text in lstm_lm.load(None).texts.items()} == {
        "train": 400,
        "dev": 50,
        "test": 50,
    }


def test_the_treebank_as_it_comes(folder, data):
    assert {split: len(text) for split, text in data.texts.items()} == {"train": 5400, "dev": 1350, "test": 1350}
    assert set(data.words) == {"<unk>", "the", *NOUNS, *VERBS, "<eos>"}
    text = (folder / "ptb" / "ptb.test.txt").read_text()
    assert [data.words[i] for i in data.texts["test"]] == text.replace("\n", "<eos> ").split()
    assert torch.equal(lstm_lm.load(folder / "ptb").texts["dev"], data.texts["dev"])


def test_rare_words_are_unknown():
    words = ["a"] * 50 + ["b"] * 3 + ["c"] * 2
    data = lstm_lm.data_of(dict.fromkeys(lstm_lm.SPLITS, words), "x", least=3)
    assert data.words == ["<unk>", "a", "b"]
    assert (data.texts["test"] == 0).sum() == 2
    half = lstm_lm.data_of(dict.fromkeys(lstm_lm.SPLITS, words), "x", most=40)
    assert {len(text) for text in half.texts.values()} == {40}
    assert half.words == ["<unk>", "a"]


def test_steps_cover_the_text_once():
    text = torch.arange(20 * 45 + 7)
    found = list(lstm_lm.steps_of(text))
    assert [inputs.shape for inputs, _ in found] == [(20, 20), (20, 20), (5, 20)]
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in found)
    assert len(found) == lstm_lm.epoch_steps(lstm_lm.Data({"train": text}, [], ""))
    joined = torch.cat([inputs for inputs, _ in found])
    assert torch.equal(joined.T.flatten(), text[: 20 * 45])


@pytest.mark.parametrize("thin", [None, {"method": "deepthin"}])
def test_a_state_carries_a_text_on(data, thin):
    model = network(data, thin=thin).eval()
    text = data.texts["dev"][:60].view(30, 2)
    with torch.no_grad():
        whole, last = model(text)
        first, state = model(text[:17])
        second, end = model(text[17:], state)
    terms, sums = 30 * 2 * (16 + 16 + 8) + 16, peak(model, text)  # 30 steps of two layers
    assert_close(torch.cat([first, second]), whole, terms, sums)
    for got, want in zip(end, last, strict=True):
        assert_close(got, want, terms, sums)
    assert not torch.allclose(model(text[17:])[0], second, atol=1e-3)  # without the state it is another text


def test_perplexity_is_that_of_the_carried_state(data):
    """Each of the 20 parts as one piece, without steps: the same number."""
    model = network(data).eval()
    length = (len(data.texts["test"]) - 1) // 20
    total = 0.0
    for part in range(20):
        text = data.texts["test"][part * length :][: length + 1]
        with torch.no_grad():
            scores, _ = model(text[:-1, None])
        total += F.cross_entropy(scores[:, 0].double(), text[1:], reduction="sum").item()
    found = lstm_lm.evaluate(model, data, "test")
    assert tuple(found) == lstm_lm.TASK.metrics
    # The error of a mean is that of a score: of what the gates have not forgotten, some ten steps of two layers.
    lost = bound(10 * 2 * (16 + 16 + 8) + 16, peak(model, data.texts["test"][:60, None]))
    assert found["perplexity"] == pytest.approx(math.exp(total / (20 * length)), rel=2 * lost)


def test_a_perplexity_out_of_reach_is_infinite(data):
    model = network(data)
    with torch.no_grad():
        model.output.bias[0] = 1e4
    assert lstm_lm.evaluate(model, data, "dev") == {"perplexity": math.inf}


def test_a_training_learns_the_grammar(data):
    model = network(data, width=24)
    alone = 3 ** (1 / 3) * 6 ** (1 / 6) * 12 ** (1 / 2)  # of words by their frequency: the, <eos>, nouns and verbs
    assert lstm_lm.evaluate(model, data, "dev")["perplexity"] == pytest.approx(
        alone, rel=0.05
    )  # untrained scores are small
    lstm_lm.fit(model, data, Training(model=model, steps=300, lr=2e-2))
    found = lstm_lm.evaluate(model, data, "dev")["perplexity"]
    best = 2 ** (5 / 6)  # two nouns and a verb in six words
    assert 0.97 * best < found < 1.1 * best  # below: as lucky as 1,350 words may be
    assert math.exp(lstm_lm.loss(model, data)) == found


def test_a_training_follows_from_its_seed(data):
    def trained(seed):
        model = network(data, width=300, depth=1)  # with dropout
        torch.manual_seed(17 + seed)  # is not what counts
        lstm_lm.fit(model, data, Training(model=model, steps=2, lr=1e-2, seed=seed))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    before = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
    torch.set_rng_state(before)


def test_a_thin_network_is_thin_in_all_of_its_parts(data, tmp_path):
    model = network(data, thin={"method": "deepthin", "rank": "max"})
    assert [type(m) for m in (model.embedding, model.lstm, model.output)] == [ThinEmbedding, ThinLSTM, ThinLinear]
    lstm_lm.fit(model, data, Training(model=model, steps=3, lr=1e-3))
    dt.save(model, tmp_path / "model.thin")
    again = dt.load(network(data), tmp_path / "model.thin").eval()
    for one, other in zip(model.eval()(*lstm_lm.example(data))[1], again(*lstm_lm.example(data))[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("width", "depth", "parameters", "share", "spread"),
    [(200, 2, 4_650_000, 0.0, 0.1), (650, 2, 19_780_000, 0.5, 0.05), (300, 1, 6_730_000, 0.5, 0.1)],
)
def test_the_networks_of_the_papers(width, depth, parameters, share, spread):
    """Zaremba's small and medium network, sections 4.1; DeepTwist's of Table 4. torch has two biases, not one."""
    model = lstm_lm.build(None, width, depth)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.005)  # which the papers round
    assert model.lstm.num_layers == depth
    assert model.dropout.p == share
    assert spread * 0.99 < max(p.abs().max() for p in model.parameters()) <= spread


def test_folders_without_a_text(tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as error:
        lstm_lm.load(tmp_path)
    assert str(error.value) == (
        f"There is no text in {tmp_path}. Either give --data a folder with the Penn Treebank (ptb.train.txt, "
        "ptb.valid.txt, ptb.test.txt), or install Debian's r-cran-janeaustenr, or unpack it (dpkg -x) and give --data "
        "the folder: see docs/language.md."
    )
    monkeypatch.setattr(austen, "INSTALLED", tmp_path / "janeaustenr")
    with pytest.raises(ConfigError, match="There is no text in .*janeaustenr"):
        lstm_lm.load(None)
    write_treebank(tmp_path, 8)
    with pytest.raises(ConfigError, match="dev has 12 words; 40 are needed"):
        lstm_lm.load(tmp_path)
    (tmp_path / "ptb.valid.txt").unlink()
    with pytest.raises(ConfigError, match="ptb.valid.txt cannot be read"):
        lstm_lm.load(tmp_path)


def test_compare_works_end_to_end(folder, tmp_path, command_line):
    words = f"compare lstm-lm --data {folder} --methods deepthin,rank,same-size --ratios 0.3 --steps 20 --width 16"
    code, _, said = command_line(*words.split(), "--out", str(tmp_path))
    assert code == 0, said
    page = (tmp_path / "report.html").read_text()
    assert "perplexity" in page
    assert (tmp_path / "models" / "deepthin-0.3-seed0.thin").exists()


@pytest.fixture
def language(monkeypatch):
    """benchmarks/language.py, called with words."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    module = importlib.import_module("language")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["language.py", *map(str, words)])
        module.main()
        return json.loads((Path(words[words.index("--out") + 1]) / "language.json").read_text())["rows"]

    return call


def test_the_benchmark_twists_and_prunes(folder, tmp_path, language, capsys):
    words = ("--data", folder, "--out", tmp_path, "--epochs", 1, "--every", 3, "--width", 12, "--lr", 5)
    rows = language("pruning", *words)
    assert [(row["setting"], row["way"]) for row in rows if row["section"] == "pruning"] == [
        (f"{rate} %", way) for rate in (80, 85, 90) for way in ("twist", "once")
    ]
    assert [(row["section"], row["way"]) for row in rows[:2]] == [("dense", ""), ("dense", "again")]
    for row in rows[2:]:
        file = tmp_path / f"pruning-{row['setting'].replace(' %', '-percent')}-{row['way']}.thin"
        assert file.stat().st_size == row["bytes"] < rows[0]["bytes"]
        loaded = dt.load(lstm_lm.build(lstm_lm.load(folder), 12), file)
        left = 1 - int(row["setting"][:2]) / 100
        for name, (thin, index) in thin_tensors(loaded).items():
            matrix = thin(index)
            assert (matrix != 0).sum() == round(left * matrix.numel()), name
        assert row["test"] == lstm_lm.evaluate(loaded, lstm_lm.load(folder), "test")["perplexity"]
        assert sum(row["histogram"]) == sum(
            (getattr(loaded.lstm, f"weight_{of}_l0") != 0).sum().item() for of in ("ih", "hh")
        )
        assert ("before" in row) is (row["way"] == "once")
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:5] for line in table if line[:3] == ["pruning", "80", "%"]] == [
        ["pruning", "80", "%", way, f"{rows[i]['bytes']:,}"] for i, way in ((2, "twist"), (3, "once"))
    ]
    assert (tmp_path / "histogram.png").exists()
    kept = [(tmp_path / "language.json").read_bytes(), (tmp_path / "dense.pt").stat().st_mtime_ns]
    language("pruning", *words)  # nothing is trained again
    assert kept == [(tmp_path / "language.json").read_bytes(), (tmp_path / "dense.pt").stat().st_mtime_ns]
    with pytest.raises(ConfigError, match="choose another --out"):
        language("pruning", *words[:-1], 4)


def test_the_benchmark_truncates_signs_and_relays(folder, tmp_path, language):
    rows = language("--data", folder, "--out", tmp_path, "--words", 900, "--epochs", 2, "--every", 2, "--width", 20)
    by = {(row["section"], row["setting"], row["way"]): row for row in rows}
    assert len([key for key in by if key[0] == "rank"]) == 10
    for share, rank in ((".39", 8), (".20", 4), (".15", 3), (".10", 2)):
        for way in ("twist", "once"):
            model = dt.load(lstm_lm.build(lstm_lm.load(folder), 20), tmp_path / f"rank-{share}-{way}.thin")
            # What rounding leaves of removed singular values: some 80 + 20 roundings of the largest.
            assert torch.linalg.matrix_rank(model.lstm.weight_hh_l0.detach(), rtol=bound(100, 1.0)) == rank
            assert not isinstance(model.output, ThinLinear)
        assert list(by["rank", share, "twist"]["spectra"]) == ["0", "1", "2"]
    for way in ("twist", "once"):
        lstm = dt.load(lstm_lm.build(lstm_lm.load(folder), 20), tmp_path / f"rank-.15-shared-{way}.thin").lstm
        both = torch.cat([lstm.weight_ih_l0, lstm.weight_hh_l0]).detach()
        assert torch.linalg.matrix_rank(both, rtol=bound(180, 1.0)) == 3  # one projection for both
    settings = [key[1] for key in by if key[0] == "bits"]
    assert settings == ["1 greedy", "2 greedy", "2 alternating", "3 greedy", "3 alternating"]
    model = dt.load(lstm_lm.build(lstm_lm.load(folder), 20), tmp_path / "bits-2-greedy-twist.thin")
    assert max(len(row.unique()) for row in model.embedding.weight.detach()) <= 4
    deepthin = [by["deepthin", "0.1", way]["bytes"] for way in ("twist", "once", "scratch")]
    assert len(set(deepthin)) == 1
    assert ("deepthin", "0.02", "twist") not in by  # out of reach for so small a network
    assert all((tmp_path / f"{name}.png").exists() for name in ("rank", "singular-values", "histogram"))


def test_jane_austen():
    """The package itself, where it is installed, or unpacked in DEEPTHIN_DATA."""
    folder = os.environ.get("DEEPTHIN_DATA")
    root = austen.find(Path(folder) if folder else austen.INSTALLED) or austen.find(austen.INSTALLED)
    if root is None:
        pytest.skip("Debian's r-cran-janeaustenr is neither installed nor in DEEPTHIN_DATA")
    books = austen.read(root)
    assert {name: len(lines) for name, lines in books.items()} == {
        "emma": 16_235,
        "mansfieldpark": 15_349,
        "northangerabbey": 7_856,
        "persuasion": 8_328,
        "prideprejudice": 13_030,
        "sensesensibility": 12_624,
    }
    assert sum(len(austen.words(lines)) for lines in books.values()) == 845_503
    assert lstm_lm.data_of(lstm_lm.novels(root), "x", 3, 200_000).words[:4] == ["<unk>", ",", ".", "the"]


def test_the_output_begins_with_what_is_frequent(data):
    """The share of each word in the training text, one added to each count; on the meta device there are no values."""
    bias = lstm_lm.build(data, 8).output.bias.detach()
    counts = torch.bincount(data.texts["train"]).double() + 1
    assert_close(bias.exp(), counts / counts.sum(), 4 + largest(bias))  # the rounding of a logarithm is its share's
    with torch.device("meta"):
        assert lstm_lm.build(data, 8).output.bias.is_meta
