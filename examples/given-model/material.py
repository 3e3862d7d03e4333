"""The frames to learn, to choose and to judge by: no voice, timbre or noise occurs in two of the three."""

from dataclasses import dataclass

import numpy as np
import sound
from crepe import WINDOW
from numpy.random import Generator
from numpy.typing import NDArray


@dataclass(frozen=True)
class Source:
    """What a set is made of."""

    seed: int
    languages: str  # of espeak-ng
    variants: str  # voices of espeak-ng
    timbres: str
    noises: str


SOURCES = {
    "train": Source(
        0, "en-us de fr-fr es it cs fi hi ru el sw id", "m1 m2 m3 m5 m6 f1 f2 f3 klatt", "random", "white pink babble"
    ),
    "dev": Source(1, "nl pl hu", "m4 f4 klatt2", "odd", "brown motor babble"),
    "test": Source(2, "sv pt tr ja ro da", "m7 m8 f5 klatt4 Alicia belinda", "plucked", "wind rain babble"),
}
KINDS = ("tones", "vowels", "speech", "unchanged")  # unchanged: espeak-ng's own pitch, which only the teacher knows
LEVELS = (None, 20, 10, 0)  # signal-to-noise ratios of judged frames in dB; None: no noise


@dataclass
class Frames:
    """Frames without noise, beside what is known of them."""

    sound: NDArray[np.float32]  # frames x WINDOW, of root mean square 1
    hertz: NDArray[np.float32]  # pitch in the middle; 0: unknown
    kind: NDArray[np.uint8]  # index into KINDS

    def __len__(self) -> int:
        return len(self.hertz)


def frames(name: str, counts: dict[str, int], clips: int = 12) -> Frames:
    """Frames of a set.

    Args:
        name: A key of SOURCES.
        counts: Number of frames of each of KINDS.
        clips: Frames taken from one clip of three seconds.

    Returns:
        The frames, kind after kind.
    """
    source, parts = SOURCES[name], []
    for kind, count in counts.items():
        rng, index = np.random.default_rng([source.seed, KINDS.index(kind)]), KINDS.index(kind)
        rows: list[tuple[NDArray[np.float64], float, int]] = []
        while len(rows) < count:
            clip, pitch, known = _clip(rng, source, kind)
            levels = np.sqrt(np.convolve(clip**2, np.ones(WINDOW) / WINDOW, "same"))
            voiced = np.convolve(known, np.ones(WINDOW), "same") > WINDOW - 0.5
            usable = np.flatnonzero(voiced & (levels > 0.03 * levels.max()))
            usable = usable[(usable >= WINDOW // 2) & (usable < len(clip) - WINDOW // 2)]
            for middle in rng.permutation(usable)[:clips]:
                frame = clip[middle - WINDOW // 2 : middle + WINDOW // 2]
                rows.append((frame / levels[middle], pitch[middle], index))
        parts += rows[:count]
    sounds, hertz, kinds = zip(*parts, strict=True)
    return Frames(np.array(sounds, np.float32), np.array(hertz, np.float32), np.array(kinds, np.uint8))


def _clip(rng: Generator, source: Source, kind: str) -> tuple[sound.Signal, sound.Signal, NDArray[np.bool_]]:
    """Three seconds, their pitch, and where they are voiced."""
    moves = rng.choice(["vibrato", "glide", "speech"])
    if kind in ("tones", "vowels"):
        pitch = sound.contour(rng, 3 * sound.RATE, *((45, 1600) if kind == "tones" else (65, 600)), moves)
        clip = sound.tone(rng, pitch, source.timbres) if kind == "tones" else sound.vowels(rng, pitch)
        return clip, pitch, np.ones(len(clip), bool)
    speech = _speech(rng, source)
    if kind == "unchanged":
        return speech, np.zeros(len(speech)), abs(speech) >= 0
    pitch = sound.contour(rng, len(speech), 70, 400, "speech")
    clip, known = sound.revoiced(rng, speech, pitch)
    return clip, pitch, known


def _speech(rng: Generator, source: Source) -> sound.Signal:
    """Three numbers, spoken in some language by some voice."""
    voice = f"{rng.choice(source.languages.split())}+{rng.choice(source.variants.split())}"
    return sound.espeak(voice, " ".join(map(str, rng.integers(1, 99_999, 3))), int(rng.integers(20, 80)))


def noises(name: str, seconds: float) -> dict[str, NDArray[np.float32]]:
    """The noises of a set.

    Args:
        name: A key of SOURCES.
        seconds: How long each is.

    Returns:
        Noise -> samples of root mean square 1.
    """
    source = SOURCES[name]
    rng = np.random.default_rng([source.seed, 99])
    voices = [_speech(rng, source) for _ in range(12)]
    length = int(seconds * sound.RATE)
    return {kind: sound.noise(rng, length, kind, voices).astype(np.float32) for kind in source.noises.split()}


def mixed(clean: Frames, level: float, name: str, seconds: float = 30) -> NDArray[np.float32]:
    """Frames with noise: each frame with a piece of one of the set's noises, taking turns.

    Args:
        clean: The frames.
        level: Signal-to-noise ratio of each frame in dB.
        name: A key of SOURCES.
        seconds: How long each noise is.

    Returns:
        Frames x WINDOW.
    """
    kinds = list(noises(name, seconds).values())
    rng, out = np.random.default_rng([SOURCES[name].seed, 7, int(level)]), clean.sound.copy()
    for i, frame in enumerate(out):
        kind = kinds[i % len(kinds)]
        start = rng.integers(len(kind) - WINDOW)
        piece = kind[start : start + WINDOW]
        frame += piece * (np.float32(10 ** (-level / 20)) * frame.std() / max(piece.std(), 1e-6))
    return out
