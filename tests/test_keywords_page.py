"""The example keywords-browser: its network on a stream, its training, and the page in a real browser."""

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import deepthin.torch as dt
from deepthin.lab.tasks.log_mel import RATE, log_mel
from tolerance import UNIT

FOLDER = Path(__file__).parents[1] / "examples" / "keywords-browser"
MODULES = "network", "build", "train"
MOST_BYTES = 60_000  # of all that a browser loads
CLOSE = 1e-4  # of probabilities, in WebAssembly and in torch: features differ where a quiet band is beside a loud one


@pytest.fixture(scope="module")
def example():
    """The example's modules, which it imports by their plain names."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def network(example):
    return dt.load(example.network.Spotter(), FOLDER / "keywords.thin", frozen=True).eval()


@pytest.fixture(scope="module")
def recordings(example):
    """Every eighth recording of the words by split."""
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install 'deepthin[compare]'")
    folder = Path(os.environ.get("DEEPTHIN_DATA", "")) / "wakewords"
    if not folder.is_dir():
        pytest.skip("DEEPTHIN_DATA has no folder wakewords with recordings")
    return example.train.recordings(folder, every=8)


def test_the_file_is_small():
    assert (FOLDER / "keywords.thin").stat().st_size <= 20_000


@torch.inference_mode()
def test_frame_by_frame_is_the_same_as_the_whole(network):
    frames = torch.from_numpy(np.random.default_rng(0).uniform(-12, 4, (1, 60, 40)).astype("f4"))
    state, scores = None, []
    for frame in frames.split(1, 1):
        score, state = network.stream(frame, state)
        scores.append(score)
    whole = network(frames)
    # A step of the GRU is a contraction of its state here; what 60 roundings of each of 128 sums can amount to.
    assert (torch.cat(scores, 1) - whole).abs().max() <= 60 * 128 * UNIT["float32"] * whole.abs().max()


@torch.inference_mode()
def test_smoothing_is_a_running_mean_of_probabilities(example):
    scores = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    means = np.zeros((2, 3))
    for step, probabilities in enumerate(scores.double().softmax(-1).unbind(1)):
        means = 0.9 * means + 0.1 * probabilities.numpy()
        np.testing.assert_allclose(example.network.smoothed(scores)[:, step], means, rtol=20 * UNIT["float32"])


def test_it_knows_words_that_it_was_not_trained_with(example, network, recordings):
    """Chance is five errors of six."""
    chosen = example.train.peaks(network, (samples for samples, _ in recordings["dev"])).argmax(1)
    wrong = (chosen != torch.tensor([number for _, number in recordings["dev"]])).float().mean()
    assert wrong < 0.1


def test_noise_and_silence_are_no_words(example, network):
    generator = np.random.default_rng(0)
    sounds = [np.zeros(RATE, "f4"), *(generator.standard_normal((3, RATE)).astype("f4") * [[0.001], [0.01], [0.1]])]
    assert (example.train.peaks(network, [sound.astype("f4") for sound in sounds]) < example.train.SHOWN).all()


def test_training_ends_within_the_size(example, tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install 'deepthin[compare]'")
    if shutil.which("espeak-ng") is None:
        pytest.skip("there is no espeak-ng: apt-get install espeak-ng")
    monkeypatch.setattr(example.train, "VOICES", dict.fromkeys(("train", "dev", "test"), ("en-us",)))
    monkeypatch.setattr(example.train, "SENTENCES", ("One short sentence.",) * 4)
    monkeypatch.setattr(example.train, "BATCH", 2)
    generator = np.random.default_rng(0)
    for word in example.network.WORDS:
        (tmp_path / word).mkdir()
        for name in "abc":
            soundfile.write(tmp_path / word / f"{name}.wav", generator.uniform(-0.5, 0.5, 20_000), RATE)
    for name, file in (("validation_list.txt", "b"), ("testing_list.txt", "c")):
        (tmp_path / name).write_text("".join(f"{word}/{file}.wav\n" for word in example.network.WORDS))
    out = tmp_path / "words.thin"
    example.train.train(tmp_path, out, steps=3, seed=0, test=True)
    assert out.stat().st_size <= example.train.FILE_BYTES
    dt.load(example.network.Spotter(), out)
    assert out.with_suffix(".json").read_text() == (FOLDER / "keywords.json").read_text()


@pytest.fixture(scope="module")
def built(example, tmp_path_factory):
    """The page as `build.py` makes it, served on localhost; and the address."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed: pip install ziglang")
    folder = tmp_path_factory.mktemp("page")
    total = example.build.build(folder)

    with example.build.server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(folder=folder, bytes=total, url=f"http://localhost:{server.server_port}/index.html")
        server.shutdown()


def test_all_that_a_browser_loads_is_small(built):
    names = (
        "index.html",
        "page.js",
        "spotter.js",
        "capture.js",
        "keywords.wasm",
        "keywords.dtm",
        "keywords.mjs",
        "keywords.json",
    )
    assert {path.name for path in built.folder.iterdir()} >= set(names)
    assert built.bytes == sum((built.folder / name).stat().st_size for name in names)
    assert built.bytes < MOST_BYTES
    text = "".join((built.folder / name).read_text() for name in names if name.endswith(("html", "js")))
    assert "://" not in text  # nothing is loaded from elsewhere


@contextlib.contextmanager
def browser(*arguments):
    """A page of a headless Chromium; afterwards it has complained about nothing."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    wrong = []
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=[*quiet, *arguments])
        page = opened.new_page(viewport={"width": 640, "height": 620})
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        yield page
        opened.close()
    assert wrong == []


@pytest.fixture(scope="module")
def spoken(example, network, recordings, tmp_path_factory):
    """Recordings of the test split that Python knows, of every second word, as 16-bit wav files."""
    import soundfile

    folder, found = tmp_path_factory.mktemp("spoken"), []
    for number, word in list(enumerate(example.network.WORDS))[::2]:
        some = [samples for samples, label in recordings["test"] if label == number][:10]
        best, chosen = example.train.peaks(network, some).max(1)
        known = [s for s, p, c in zip(some, best, chosen, strict=True) if c == number and p > 0.55]
        path = folder / f"{word}.wav"
        soundfile.write(path, known[0], RATE, subtype="PCM_16")
        found.append((path, word))
    return found


def test_the_page_knows_recorded_words_and_computes_what_python_computes(example, built, network, spoken):
    import soundfile

    with browser() as page:
        for path, word in spoken:
            shutil.copy(path, built.folder)
            page.goto(f"{built.url}?wav={path.name}")
            page.wait_for_function("window.spotted")
            spotted = page.evaluate("window.spotted")
            assert spotted["word"] == word
            assert page.text_content("#word") == word.replace("_", " ")
            assert page.text_content("li.heard .name") == word.replace("_", " ")
            assert page.text_content("#time").endswith(" µs")
            samples, _ = soundfile.read(path, dtype="float32")
            with torch.inference_mode():
                features = torch.from_numpy(log_mel(example.train.heard(samples)))
                expected = example.network.smoothed(network(features[None]))[0].numpy()
            assert np.abs(np.array(spotted["history"]) - expected).max() < CLOSE


def test_the_page_listens_to_the_microphone(built, spoken):
    path, word = spoken[0]
    fake = "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"
    with browser(*fake, f"--use-file-for-fake-audio-capture={path}") as page:
        page.goto(built.url)
        page.click("#listen")
        page.wait_for_function(f"document.querySelector('#word').textContent == {word.replace('_', ' ')!r}")
        assert page.text_content("#listen") == "Stop"
        page.click("#listen")
        page.wait_for_function("document.querySelector('#listen').textContent == 'Listen'")


def test_a_recording_that_is_opened_ends_the_one_before(built, spoken):
    with browser() as page:
        page.goto(built.url)
        for path, _ in spoken[:2]:
            page.wait_for_function("!document.querySelector('#listen').disabled")
            page.set_input_files("#file", path)
            page.wait_for_function(f"document.querySelector('#status').textContent == 'Playing {path.name}'")
        page.wait_for_function("window.spotted")
        last, word = spoken[1]
        assert page.evaluate("window.spotted.word") == word
        assert page.text_content("#status") == f"Heard in {last.name}"


def test_a_page_without_microphone_says_so(built):
    with browser() as page:
        page.add_init_script("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
        page.goto(built.url)
        page.wait_for_function("document.querySelector('#status').textContent.includes('no microphone')")
        assert page.is_disabled("#listen")


def test_what_is_no_recording_is_refused(built):
    (built.folder / "no.wav").write_text("no sound")
    with browser() as page:
        page.goto(f"{built.url}?wav=no.wav")
        page.wait_for_function("document.querySelector('#status').textContent.includes('no.wav is not a recording')")
