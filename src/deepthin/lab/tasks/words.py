"""Recordings of single words as features: a folder of audio as Speech Commands has it, or words cut out of CMU AN4.

Speech Commands: Warden, 2018, arXiv:1804.03209.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from deepthin.errors import ConfigError
from deepthin.lab.tasks import an4
from deepthin.lab.tasks.decoder import read_dictionary
from deepthin.lab.tasks.log_mel import WINDOW, log_mel, resampled

SPLITS = ("train", "dev", "test")
LISTS = {"dev": "validation_list.txt", "test": "testing_list.txt"}
ENDINGS = {".wav", ".flac", ".ogg"}
MOST_HASHED = 2**27 - 1  # as Speech Commands' own split
SHARE = 10  # percent of the speakers for development, and as many to test
FITTING = 95  # percent of the training recordings that are not cut
FREQUENT = 30  # words of AN4

Features = Float32[np.ndarray, "channels bins frames"]


@dataclass
class Words:
    """Features and words by split."""

    features: dict[str, list[Features]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    words: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def add(self, split: str, features: Features, word: str) -> None:
        """Add a recording.

        Args:
            split: ``"train"``, ``"dev"`` or ``"test"``.
            features: Its features.
            word: The word.
        """
        self.features[split].append(features)
        self.words[split].append(word)


def read_folder(folder: Path) -> Words | None:
    """Read a folder of audio: a subfolder for each word, apart from those that begin with ``_`` or a dot.

    Recordings may be WAV, FLAC or Ogg of any sample rate; channels are averaged. All get the same length, that of the
    longest but for one in twenty training recordings: zeros are added on both sides, or both ends are cut off.

    Args:
        folder: The folder.

    Returns:
        Log-mel features, 1 x 40 x frames; None if no subfolder has recordings.

    Raises:
        ConfigError: soundfile is not installed, a recording is damaged, or a split has no recordings.
    """
    paths = list(_recordings(folder))
    if not paths:
        return None
    try:
        import soundfile
    except ImportError:
        raise ConfigError("Recordings need soundfile: pip install 'deepthin[compare]'.") from None
    lists = {split: _listed(folder / name) for split, name in LISTS.items()}
    sounds = {split: list[tuple[np.ndarray, str]]() for split in SPLITS}
    for path in paths:
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as audio ({error}): replace or remove it.") from None
        name = f"{path.parent.name}/{path.name}"
        sounds[split_of(name, lists)].append((resampled(samples.mean(1), rate), path.parent.name))
    for split, some in sounds.items():
        if not some:
            listed = lists.get(split)
            reason = f"none is in {LISTS[split]}" if listed is not None else "none is left by the lists and the hash"
            raise ConfigError(
                f"{folder} has no recording for {split!r} ({reason} of {len(paths)}): it needs recordings of more "
                f"speakers, or other lists ({', '.join(LISTS.values())})."
            )
    length = max(_fitting([len(samples) for samples, _ in sounds["train"]]), WINDOW)
    words = Words()
    for split, some in sounds.items():
        for samples, word in some:
            words.add(split, log_mel(centred(samples, length)).T[None], word)
    return words


def split_of(name: str, lists: dict[str, set[str] | None]) -> str:
    """The split of a recording: of the list that names it, else by a hash of its speaker.

    The speaker is the part of the file's name before ``_nohash_``, or the whole name. Of the hashes, as Speech
    Commands computes them, 10 % are for development and 10 % to test, where there is no list.

    Args:
        name: Word and file name, such as ``yes/0a7c2a8d_nohash_0.wav``.
        lists: The names in the list of ``dev`` and of ``test``; None for a list that is missing.

    Returns:
        ``"train"``, ``"dev"`` or ``"test"``.
    """
    for split, listed in lists.items():
        if listed is not None and name in listed:
            return split
    speaker = re.sub(r"_nohash_.*$", "", name.rpartition("/")[2].rpartition(".")[0])
    number = int(hashlib.sha1(speaker.encode(), usedforsecurity=False).hexdigest(), 16) % (MOST_HASHED + 1)
    at = 100 * number / MOST_HASHED
    if at < SHARE and lists.get("dev") is None:
        return "dev"
    if SHARE <= at < 2 * SHARE and lists.get("test") is None:
        return "test"
    return "train"


def centred(samples: np.ndarray, length: int) -> np.ndarray:
    """Give an array another length: zeros on both sides, or the middle.

    Args:
        samples: The array; its first axis gets the length.
        length: The length, >= 1.

    Returns:
        The array of that length.
    """
    missing = length - len(samples)
    if missing <= 0:
        return samples[-missing // 2 :][:length]
    sides = [(missing // 2, missing - missing // 2)] + [(0, 0)] * (samples.ndim - 1)
    return np.pad(samples, sides)


def read_an4(folder: Path) -> Words | None:
    """Read AN4's words: the 30 most frequent of the training data, cut out of the features by ``phones.ctm``.

    Of the training speakers, every ninth of the sorted names, eight in all, is held out for development. All words get
    the same number of frames, as ``read_folder`` says.

    Args:
        folder: A folder with ``phones.ctm`` (a line for each phone: utterance, start and duration in seconds, phone,
            word) and ``an4``, or one that has it as ``an4``.

    Returns:
        Cepstra, deltas and double deltas, normalised per speaker, 3 x 13 x frames; None without such a folder.

    Raises:
        ConfigError: A file is damaged, or a split has no words.
    """
    root = next((base for base in (folder, folder / "an4") if (base / "phones.ctm").exists() and an4.find(base)), None)
    if root is None or (inner := an4.find(root)) is None:
        return None
    spoken = read_ctm(root / "phones.ctm", inner / "etc" / "an4.dic")
    recordings = an4.read(inner)
    held_out = an4.held_out(recording.speaker for recording in recordings["train"])
    counts = Counter(word for r in recordings["train"] for word, _, _ in spoken.get(r.name, ()))
    frequent = {word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]}
    cut = {split: list[tuple[np.ndarray, str]]() for split in SPLITS}
    for given, some in recordings.items():
        full = [an4.with_deltas(r.features) for r in some]
        for recording, frames in zip(some, an4.normalised([r.speaker for r in some], full), strict=True):
            split = "dev" if given == "train" and recording.speaker in held_out else given
            for word, start, end in spoken.get(recording.name, ()):
                if word in frequent and start < min(end, len(frames)):
                    cut[split].append((frames[start:end].astype(np.float32), word))
    if missing := [split for split, some in cut.items() if not some]:
        raise ConfigError(f"{root / 'phones.ctm'} has no words for {missing[0]!r}: it must align AN4's utterances.")
    length = _fitting([len(frames) for frames, _ in cut["train"]])
    words = Words()
    for split, some in cut.items():
        for frames, word in some:
            maps = centred(frames, length).reshape(length, 3, -1)
            words.add(split, np.ascontiguousarray(maps.transpose(1, 2, 0)), word)
    return words


def read_ctm(path: Path, dictionary: Path) -> dict[str, list[tuple[str, int, int]]]:
    """Read the words of an alignment of phones. A word that is said twice in a row is told apart by its phones.

    Args:
        path: The alignment: utterance, start and duration in seconds, phone and word in each line, ``WORD(2)`` for
            another pronunciation; words in angle brackets are silence and noise.
        dictionary: The pronunciations of the words.

    Returns:
        Utterance -> its words, each with its first frame and the one after its last, at 100 frames per second.

    Raises:
        ConfigError: A line has another form, or the dictionary cannot be read.
    """
    pronounced: dict[str, list[tuple[str, ...]]] = {}
    for word, phones in read_dictionary(dictionary):
        pronounced.setdefault(word, []).append(phones)
    words: dict[str, list[tuple[str, int, int]]] = {}
    run: list[tuple[str, float, float]] = []  # phone, start, end of the word under way
    said = ("", "")

    def close() -> None:
        name, word = said
        if not run or word.startswith("<"):
            return
        at = 0
        for count in _repetitions(tuple(phone for phone, _, _ in run), pronounced.get(word, [])):
            start, end = run[at][1], run[at + count - 1][2]
            words.setdefault(name, []).append((word, round(100 * start), round(100 * end)))
            at += count

    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            name, begins, lasts, phone, word = line.split()
            start, end = float(begins), float(begins) + float(lasts)
        except ValueError:
            raise ConfigError(
                f"{path}, line {number}: {line!r} is not utterance, start, duration, phone and word."
            ) from None
        word = re.sub(r"(?<=.)\(\d+\)$", "", word)  # A(2) is a pronunciation of A
        if (name, word) != said:
            close()
            run, said = [], (name, word)
        run.append((phone, start, end))
    close()
    return words


def _repetitions(phones: tuple[str, ...], pronounced: list[tuple[str, ...]]) -> list[int]:
    """The numbers of phones of each repetition of a word; all as one where its pronunciations do not fit."""

    def parts(rest: tuple[str, ...]) -> list[int] | None:
        if not rest:
            return []
        for one in pronounced:
            if rest[: len(one)] == one and (more := parts(rest[len(one) :])) is not None:
                return [len(one), *more]
        return None

    return parts(phones) or [len(phones)]


def _recordings(folder: Path) -> Iterator[Path]:
    """The audio files of all words, sorted."""
    if not folder.is_dir():
        return
    for word in sorted(folder.iterdir()):
        if word.is_dir() and not word.name.startswith(("_", ".")):
            yield from sorted(path for path in word.iterdir() if path.suffix.lower() in ENDINGS)


def _listed(path: Path) -> set[str] | None:
    """The names in a list; None if there is no such file."""
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else None


def _fitting(lengths: Iterable[int]) -> int:
    """The length that 95 % do not exceed."""
    ordered = sorted(lengths)
    return ordered[(len(ordered) - 1) * FITTING // 100]
