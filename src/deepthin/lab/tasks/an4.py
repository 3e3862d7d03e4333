"""CMU AN4 as Sphinx features, and what speech tasks make of features: deltas, normalisation, speakers held out.

A recording's features are static: 13 numbers a frame, 100 frames a second.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from deepthin.errors import ConfigError

SPLITS = ("train", "test")  # as AN4 comes; speakers are disjoint
DEVELOPMENT_SPEAKERS = 8


@dataclass(frozen=True)
class Recording:
    """One utterance of one speaker."""

    name: str  # of the utterance, unique
    speaker: str
    features: Float[np.ndarray, "frames dims"]


def find(folder: Path) -> Path | None:
    """Find AN4's own folder, the one with ``etc`` and ``feat``.

    Args:
        folder: That folder, or one that has it as ``an4`` or ``an4/an4``.

    Returns:
        The folder; None if there is none.
    """
    places = (folder / "an4" / "an4", folder / "an4", folder)
    return next((place for place in places if (place / "etc" / "an4_train.fileids").exists()), None)


def read(root: Path) -> dict[str, list[Recording]]:
    """Read the recordings of both splits.

    Args:
        root: AN4's folder, as ``find`` returns it.

    Returns:
        Split -> recordings, in the order of AN4's lists.

    Raises:
        ConfigError: A feature file is damaged.
        OSError: A file is missing.
    """
    recordings: dict[str, list[Recording]] = {}
    for split in SPLITS:
        names = (root / "etc" / f"an4_{split}.fileids").read_text().split()
        paths = [root / "feat" / f"{name}.mfc" for name in names]
        recordings[split] = [Recording(path.stem, path.parent.name, sphinx(path)) for path in paths]
    return recordings


def transcripts(root: Path, split: str) -> dict[str, str]:
    """Read the transcripts of a split. A line is ``WORD WORD (utterance)``, or has ``<s>`` and ``</s>`` too.

    Args:
        root: AN4's folder.
        split: ``"train"`` or ``"test"``.

    Returns:
        Name of the utterance -> its words, separated by blanks; empty where there is no file.

    Raises:
        ConfigError: A line has another form.
    """
    path = root / "etc" / f"an4_{split}.transcription"
    texts: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        words, bracket, name = line.strip().rpartition("(")
        if not bracket or not name.endswith(")"):
            raise ConfigError(f"{path}, line {number}: {line!r} does not end in (utterance). Download the file again.")
        texts[name[:-1]] = " ".join(word for word in words.split() if word not in ("<s>", "</s>"))
    return texts


def sphinx(path: Path) -> Float[np.ndarray, "frames 13"]:
    """Read a Sphinx feature file: a count, then as many floats, 13 per frame, of either byte order.

    Args:
        path: The file.

    Returns:
        The features.

    Raises:
        ConfigError: The count does not fit the size of the file.
        OSError: The file cannot be read.
    """
    raw = path.read_bytes()
    for order in "<>":
        if len(raw) >= 4 and int(np.frombuffer(raw, f"{order}i4", 1)[0]) == len(raw) // 4 - 1:
            return np.frombuffer(raw, f"{order}f4", offset=4).reshape(-1, 13).astype(np.float64)
    raise ConfigError(f"{path} is not a Sphinx feature file: its first number is not the count of those that follow.")


def held_out(speakers: Iterable[str]) -> set[str]:
    """The training speakers that are held out for development: every ninth of AN4's sorted names, eight in all.

    Args:
        speakers: The training speakers, in any order, with repetitions.

    Returns:
        Names of at most eight speakers.
    """
    names = sorted(set(speakers))
    return set(names[:: max(len(names) // DEVELOPMENT_SPEAKERS, 1)][:DEVELOPMENT_SPEAKERS])


def with_deltas(features: Float[np.ndarray, "frames dims"]) -> Float[np.ndarray, "frames 3*dims"]:
    """Add deltas and double deltas: the slope over two frames to either side, and the slope of the slope.

    Args:
        features: Static features.

    Returns:
        Features, deltas and double deltas side by side.
    """

    def slope(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((2, 2), (0, 0)), mode="edge")
        return (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10

    first = slope(features)
    return np.concatenate([features, first, slope(first)], axis=1)


def normalised(speakers: list[str], features: list[np.ndarray]) -> list[np.ndarray]:
    """Normalise features to mean 0 and standard deviation 1 over all frames of each speaker.

    Args:
        speakers: The speaker of each utterance.
        features: Features of each utterance, frames x dims.

    Returns:
        The normalised features of each utterance.
    """
    by_speaker: dict[str, list[np.ndarray]] = {}
    for speaker, frames in zip(speakers, features, strict=True):
        by_speaker.setdefault(speaker, []).append(frames)
    mean = {speaker: np.concatenate(parts).mean(0) for speaker, parts in by_speaker.items()}
    spread = {speaker: np.concatenate(parts).std(0) + 1e-8 for speaker, parts in by_speaker.items()}
    return [(frames - mean[speaker]) / spread[speaker] for speaker, frames in zip(speakers, features, strict=True)]
