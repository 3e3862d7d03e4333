"""Train the keyword network to a file of 16 kB: keywords.thin, and keywords.json with the words, beside this script.

    python examples/keywords-browser/train.py --data DIR [--steps 3000] [--seed 0] [--out keywords.thin] [--test]

DIR has the six wake words of the repository Picovoice/wake-word-benchmark (Apache-2.0), a folder for each word, as
docs/keywords.md says. A page that listens also hears what is none of the words. Such sounds are made here: sentences
that eSpeak NG says in many voices (``espeak-ng`` must be installed), recordings of words backwards, in pieces and cut
off, noise and silence. A batch is the next 2.5 s of 24 streams, with a word or something else in each, at random
loudness, with random noise and filters; the network keeps its state from batch to batch, as it does on the page.

The weights of the GRU are DeepThin factors, trained to the size of the file (docs/rate.md). Development recordings are
shown during training; the test recordings with ``--test``, after it.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
import torch
from network import WORDS, Spotter, smoothed
from torch import nn

import deepthin.torch as dt
from deepthin.lab.tasks.log_mel import HOP, RATE, WINDOW, log_mel, resampled
from deepthin.lab.tasks.words import LISTS, split_of

HERE = Path(__file__).parent
FILE_BYTES = 16_000
RULES = {
    "model": {"file_bytes": FILE_BYTES},
    "rules": {
        "output": {"method": "coded"},
        "*": {"method": "deepthin", "rank": 8, "floats": 0.33, "then": {"method": "coded"}},
    },
}
LEARNING_RATE = 1e-3
BATCH, FRAMES = 24, 250  # a piece of each stream: 2.5 s
SAMPLES = FRAMES * HOP
TRANSFORM = 40_960  # at least as many samples, and quick to transform
BEFORE, AFTER = 5, 25  # frames around the end of a word at which the word is to be said
SHOWN = 0.5  # the mean above which a word counts as heard
SILENCE = 0.4  # seconds, before a recording and after it, where the network may still say the word
VOICES = {
    "train": [
        "en-gb",
        "en-us",
        "en-gb-scotland",
        "en-029",
        "en-gb-x-rp",
        "en-us+f2",
        "en-gb+f4",
        "en-us+m3",
        "en-us+m7",
    ],
    "dev": ["en-gb-x-gbcwmd", "en-us+f5"],
    "test": ["en-gb-x-gbclan", "en-us+f3"],
}
SENTENCES = tuple((HERE / "sentences.txt").read_text().splitlines())  # none has one of the words


def recordings(folder: Path, every: int = 1) -> dict[str, list[tuple[np.ndarray, int]]]:
    """Read the recordings of the words.

    Args:
        folder: A folder for each word.
        every: 1: all; 10: every tenth.

    Returns:
        Split -> samples at 16 kHz, between -1 and 1, and the number of the word.
    """
    lists = {split: set((folder / name).read_text().split()) for split, name in LISTS.items()}
    found: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "dev": [], "test": []}
    for number, word in enumerate(WORDS):
        for path in sorted((folder / word).iterdir())[::every]:
            samples, rate = soundfile.read(path, dtype="float32")
            found[split_of(f"{word}/{path.name}", lists)].append((resampled(samples, rate), number))
    return found


def synthetic(split: str) -> list[np.ndarray]:
    """Say sentences in the voices of a split, and their words in another order. Splits share no sentence and no voice.

    Args:
        split: ``"train"``, ``"dev"`` or ``"test"``.

    Returns:
        Samples of each sentence in each voice.
    """
    own = [text for number, text in enumerate(SENTENCES) if ("train", "train", "dev", "test")[number % 4] == split]
    generator = np.random.default_rng(0)
    own += [" ".join(generator.permutation(text.split())) for text in own]
    found = []
    for number, voice in enumerate(VOICES[split]):
        for text in own:
            speed, pitch = str(130 + (17 * number) % 80), str(35 + (13 * number) % 40)
            command = ["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "--stdout", text]
            sound = subprocess.run(command, check=True, capture_output=True).stdout
            samples, rate = soundfile.read(BytesIO(sound), dtype="float32")
            found.append(resampled(samples, rate))
    return found


def end_of_word(samples: np.ndarray) -> int:
    """The sample where a word ends: the end of the last frame that is loud, beside the loudest and the quietest ones.

    Args:
        samples: A recording of a word, with some quiet around it.

    Returns:
        A position in it.
    """
    power = np.convolve(samples.astype(np.float64) ** 2, np.ones(WINDOW) / WINDOW, "same")[::HOP]
    quiet, loud = np.quantile(power, (0.2, 0.95))
    return int(np.flatnonzero(power > min(max(loud / 50, 3 * quiet), loud / 2))[-1]) * HOP


class Streams:
    """Random pieces of streams: samples, and for each frame its class and what it may be besides.

    Args:
        words: Recordings and their words.
        speech: Speech without these words.
        seed: Of all random numbers.
    """

    def __init__(self, words: list[tuple[np.ndarray, int]], speech: list[np.ndarray], seed: int) -> None:
        self.words, self.speech, self.random = words, speech, np.random.default_rng(seed)
        self.ends = [end_of_word(samples) for samples, _ in words]

    def batch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw the next piece of each stream.

        Returns:
            Features, items x frames x 40; the class of each frame, items x frames; and whether the frame may as well be
            none of the words, which is so while a word is being said.
        """
        made = [self._piece() for _ in range(BATCH)]
        return tuple(np.stack(parts) for parts in zip(*made, strict=True))

    def _piece(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = self.random
        samples = np.zeros(SAMPLES + WINDOW - HOP, np.float32)
        target, either = np.full(FRAMES, len(WORDS)), np.zeros(FRAMES, bool)
        kind = random.random()
        if kind < 0.5:
            number = int(random.integers(len(self.words)))
            word, label = self.words[number]
            at = int(random.integers(len(samples) - len(word) - 4_000)) if len(word) + 4_000 < len(samples) else 0
            if random.random() < 0.3 and at > 8_000:
                self._add(samples, self._other(), 0, at - 2_000)
            last = at + len(word)
            if random.random() < 0.3 and last + 8_000 < len(samples):
                self._add(samples, self._other(), last + 4_000, len(samples))
            self._add(samples, word, at, len(samples))
            end = (at + self.ends[number]) // HOP
            either[at // HOP : end + AFTER + 20] = True
            target[at // HOP : end + AFTER + 20] = label
            either[max(end - BEFORE, 0) : end + AFTER] = False
        elif kind < 0.92:
            at = 0
            while at < len(samples):
                other = self._other()
                self._add(samples, other, at, len(samples))
                at += len(other) + int(random.integers(1, 8_000))
        return log_mel(self._heard(samples)).astype(np.float32), target, either

    def _add(self, samples: np.ndarray, sound: np.ndarray, start: int, stop: int) -> None:
        """Add a sound between two positions."""
        sound = sound[: stop - start]
        samples[start : start + len(sound)] += sound

    def _other(self) -> np.ndarray:
        """Something that is none of the words: a sentence, or a word that was cut up, reversed or overlaid."""
        random, kind = self.random, self.random.random()
        if kind < 0.4:
            sentence = self.speech[int(random.integers(len(self.speech)))]
            start = int(random.integers(max(len(sentence) - 16_000, 1)))
            gain = np.float32(random.uniform(0.3, 1.0))
            return gain * _stretched(sentence[start : start + 40_000], random.uniform(0.8, 1.25))
        word = self.words[int(random.integers(len(self.words)))][0]
        if kind < 0.6:
            return word[::-1]
        if kind < 0.75:  # the first part of a word
            loud = np.flatnonzero(np.abs(word) > np.abs(word).max() / 8)
            middle = (loud[0] + loud[-1]) // 2
            cut = int(loud[0] + random.uniform(0.2, 0.8) * (middle - loud[0]))
            part = word[:cut].copy()
            part[-400:] *= np.linspace(1, 0, len(part[-400:]), dtype=np.float32)
            return part
        pieces = []  # pieces of many words
        for _ in range(int(random.integers(3, 9))):
            other = self.words[int(random.integers(len(self.words)))][0]
            start, length = int(random.integers(len(other) - 4_800)), int(random.integers(1_600, 4_800))
            piece = other[start : start + length].copy()
            fade = np.linspace(0, 1, 240, dtype=np.float32)
            piece[:240] *= fade
            piece[-240:] *= fade[::-1]
            pieces.append(piece)
        return np.concatenate(pieces)

    def _heard(self, samples: np.ndarray) -> np.ndarray:
        """What a microphone makes of sound: another speed, a filter, noise, another loudness."""
        random = self.random
        if random.random() < 0.9:
            spectrum = np.fft.rfft(samples, TRANSFORM)
            frequency = np.linspace(0, 1, len(spectrum))
            tilt = np.exp(
                random.normal(0, 0.6) * (frequency - 0.3)
                + random.normal(0, 0.3) * np.cos(np.pi * frequency * random.uniform(1, 4))
            )
            samples = np.fft.irfft(spectrum * tilt)[: len(samples)].astype(np.float32)
            level = np.exp(random.uniform(np.log(1e-4), np.log(0.03)))
            slope = random.uniform(0, 1.2)  # 0: white, 1: pink
            white = np.fft.rfft(random.standard_normal(TRANSFORM).astype(np.float32))
            white /= np.maximum(np.arange(len(white)), 100.0) ** slope
            noise = np.fft.irfft(white)[: len(samples)]
            noise *= level / (noise.std() + 1e-9)
            if random.random() < 0.2:  # hum of the mains
                noise += level * np.sin(2 * np.pi * random.choice((50, 60, 100, 120)) * np.arange(len(samples)) / RATE)
            samples = samples + noise.astype(np.float32)
        return np.clip(samples * np.float32(np.exp(random.uniform(np.log(0.1), np.log(2.5)))), -1, 1)


def _stretched(samples: np.ndarray, factor: float) -> np.ndarray:
    """Play a sound faster or slower, which changes its pitch too."""
    positions = np.arange(0, len(samples) - 1, factor)
    return np.interp(positions, np.arange(len(samples)), samples).astype(np.float32)


def loss_of(scores: torch.Tensor, target: torch.Tensor, either: torch.Tensor) -> torch.Tensor:
    """Cross entropy over frames; where "none of the words" is right as well, of both together.

    Args:
        scores: items x frames x classes.
        target: Classes, items x frames.
        either: items x frames.

    Returns:
        The mean, nats a frame; frames of words count twice.
    """
    logs = scores.log_softmax(-1)
    right = logs.gather(2, target[..., None])[..., 0]
    both = torch.logaddexp(right, logs[..., -1])
    word = (target < len(WORDS)) & ~either
    weight = 1.0 + word
    return -(torch.where(either, both, right) * weight).sum() / weight.sum()


def heard(samples: np.ndarray) -> np.ndarray:
    """A recording with silence before and after it, as the page hears it.

    Args:
        samples: The recording.

    Returns:
        The longer one.
    """
    return np.pad(samples, round(SILENCE * RATE))


@torch.inference_mode()
def peaks(model: Spotter, sounds: Iterable[np.ndarray]) -> torch.Tensor:
    """The largest smoothed probability of each word, in each recording by itself.

    Args:
        model: The network.
        sounds: Samples of each recording.

    Returns:
        sounds x words.
    """
    found = []
    for samples in sounds:
        scores = model(torch.from_numpy(log_mel(heard(samples)))[None])
        found.append(smoothed(scores)[0, :, : len(WORDS)].amax(0))
    return torch.stack(found)


def judge(model: Spotter, words: list[tuple[np.ndarray, int]], speech: list[np.ndarray]) -> str:
    """Errors, in words.

    Args:
        model: The network.
        words: Recordings and their words.
        speech: Speech without them.

    Returns:
        Words mistaken for another, words not heard, and words heard in other speech.
    """
    model.eval()
    targets = torch.tensor([number for _, number in words])
    best, chosen = peaks(model, (samples for samples, _ in words)).max(1)
    wrong, missed = int((chosen != targets).sum()), int(((best < SHOWN) | (chosen != targets)).sum())
    heard = int((peaks(model, speech) > SHOWN).any(1).sum())
    backwards = int((peaks(model, (samples[::-1].copy() for samples, _ in words)) > SHOWN).any(1).sum())
    model.train()
    return (
        f"{wrong} of {len(words)} words taken for another ({100 * wrong / len(words):.1f} %), {missed} not heard; "
        f"a word heard in {heard} of {len(speech)} other sentences, in {backwards} of {len(words)} words backwards"
    )


def train(folder: Path, out: Path, steps: int, seed: int, test: bool) -> None:
    """Train and save.

    Args:
        folder: The recordings.
        out: The file.
        steps: Number of steps.
        seed: Of all random numbers.
        test: Whether to judge by the test recordings, at the end.
    """
    torch.manual_seed(seed)
    words = recordings(folder)
    streams = Streams(words["train"], synthetic("train"), seed)
    unheard = {split: synthetic(split) for split in ("dev", "test")}
    model = Spotter()
    print(dt.compress(model, RULES, init="scratch", seed=seed))
    target = dt.SizeTarget(model, steps=steps)
    optimizer = torch.optim.Adam(dt.parameter_groups(model, lr=LEARNING_RATE))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], steps, pct_start=0.1, cycle_momentum=False
    )
    state, began = torch.zeros(1, BATCH, model.gru.hidden_size), time.time()
    for step in range(steps):
        features, classes, either = map(torch.from_numpy, streams.batch())
        fresh = torch.from_numpy(streams.random.random(BATCH) < 0.3)
        state = torch.where(fresh[None, :, None], 0, state)
        scores, state = model.stream(features, state)
        state = state.detach()
        loss = loss_of(scores, classes, either)
        (loss + target.penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        target.step()
        if not torch.isfinite(loss):
            raise SystemExit(f"The loss is {loss.item()} after {step + 1} steps: lower LEARNING_RATE.")
        if step % 50 == 49:
            print(
                f"{step + 1}: {loss.item():.3f} nats, {target.bytes:,.0f} bytes, {time.time() - began:.0f} s",
                flush=True,
            )
        if step % 400 == 399:
            print("development:", judge(model, words["dev"], unheard["dev"]), flush=True)
            dt.save(model, out)
    print(f"{dt.save(model, out, max_bytes=FILE_BYTES):,} bytes")
    out.with_suffix(".json").write_text(json.dumps({"words": WORDS, "rate": RATE, "hop": HOP}) + "\n")
    print("development:", judge(model, words["dev"], unheard["dev"]))
    if test:
        print("test:", judge(model, words["test"], unheard["test"]))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with a folder for each word")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "keywords.thin")
    parser.add_argument("--test", action="store_true", help="judge by the test recordings, at the end")
    options = parser.parse_args()
    train(options.data, options.out, options.steps, options.seed, options.test)


if __name__ == "__main__":
    main()
