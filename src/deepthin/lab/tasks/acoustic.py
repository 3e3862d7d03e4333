"""Frames of speech with a feed-forward net over spliced features, as TFKaldi trains them: frame error in percent.

Two kinds of folder are read. CMU AN4: Sphinx features (``an4/feat/**/*.mfc``), speaker folders, and ``states.npz`` with
a forced alignment (utterance -> state a frame). A Kaldi-style folder: ``train`` and ``test``, each with ``feats.txt``
(``copy-feats scp:feats.scp ark,t:feats.txt``), ``ali.txt`` (``ali-to-pdf final.mdl ark:ali ark,t:ali.txt``) and
``utt2spk``. Features are static: deltas, normalisation and splicing are done here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.lab.tasks import an4
from deepthin.lab.tasks.decoder import (
    WordLoop,
    hybrid_scores,
    log_priors,
    read_dictionary,
    read_unigrams,
    word_error_rate,
)
from deepthin.lab.tasks.task import ModuleTask
from deepthin.lab.tasks.training import Training, error, predict

WIDTH, DEPTH = 1024, 4
BATCH = 128
JUDGMENTS, JUDGED = 6, 4  # evaluations in a training, on every JUDGED-th development frame; the best state stays
CALIBRATION = 1000  # approximate number of frames for second derivatives
CONTEXT = 5  # neighbouring frames on either side

# Settings of the decoder, chosen on the development speakers with the dense network (docs/training.md).
PRIOR_SCALE, ACOUSTIC_SCALE, LM_WEIGHT, WORD_PENALTY = 0.3, 0.3, 1.0, 2.5


@dataclass(frozen=True)
class Utterance:
    """One recording: ``features`` are static, ``states`` count from 0."""

    speaker: str
    features: Float[np.ndarray, "frames dims"]
    states: Int[np.ndarray, "_"]  # one for each frame, as _check verifies
    words: str = ""  # what was said, where that is known


@dataclass(frozen=True)
class Words:
    """The decoder from frame scores to words, and the words that were said.

    Attributes:
        loop: The search.
        priors: Log prior of each state.
        lengths: By split, frames of each utterance.
        said: By split, the words of each utterance, separated by blanks.
    """

    loop: WordLoop
    priors: Float[np.ndarray, "states"]  # log
    lengths: dict[str, list[int]]  # frames of each utterance
    said: dict[str, list[str]]

    def error_rate(self, scores: Tensor, split: str) -> float:
        """Word errors of a split.

        Args:
            scores: Scores of the split's frames, utterance after utterance: frames x states.
            split: ``"dev"`` or ``"test"``.

        Returns:
            Word errors over words, in percent.

        Raises:
            ConfigError: jiwer is not installed.
            NonFiniteError: A score is not finite.
        """
        posteriors = scores.log_softmax(1).numpy()
        hybrid = hybrid_scores(posteriors, self.priors, prior_scale=PRIOR_SCALE, acoustic_scale=ACOUSTIC_SCALE)
        utterances = torch.from_numpy(hybrid).split(self.lengths[split])
        padded = nn.utils.rnn.pad_sequence(list(utterances), batch_first=True).numpy()
        heard = self.loop.decode(padded, self.lengths[split])
        return word_error_rate(self.said[split], [" ".join(words) for words in heard])


@dataclass(frozen=True)
class Data:
    """Spliced frames by split, ``train``, ``dev`` (training speakers held out) and ``test``; states as targets."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    states: int
    about: str
    words: Words | None = None  # where the folder has a dictionary


def load(folder: Path | None) -> Data:
    """Load AN4 or a Kaldi-style folder.

    Of the training speakers, every ninth of the sorted names, eight in all, is held out for development.

    Args:
        folder: The folder.

    Returns:
        Spliced frames and states of all splits.

    Raises:
        ConfigError: There is no folder, or it lacks a part or has alignments that do not fit.
    """
    if folder is None:
        raise ConfigError(
            "The task acoustic needs --data: a folder with AN4, or a Kaldi-style one (docs/comparison.md)."
        )
    parts = next((parts for reader in (_read_an4, _read_kaldi) if (parts := reader(folder)) is not None), None)
    if parts is None:
        raise ConfigError(
            f"{folder} holds neither AN4 (an4/feat, states.npz) nor a Kaldi-style folder (train/feats.txt, "
            "train/ali.txt, train/utt2spk, and the same under test). See docs/comparison.md."
        )
    held_out = an4.held_out(u.speaker for u in parts["train"])
    splits = {
        "train": [u for u in parts["train"] if u.speaker not in held_out],
        "dev": [u for u in parts["train"] if u.speaker in held_out],
        "test": parts["test"],
    }
    states = 1 + max(int(u.states.max()) for split in splits.values() for u in split)
    counts = ", ".join(
        f"{name} {sum(len(u.states) for u in split):,} frames of {len({u.speaker for u in split})} speakers"
        for name, split in splits.items()
    )
    return Data(
        {name: torch.from_numpy(spliced(split)) for name, split in splits.items()},
        {name: torch.from_numpy(np.concatenate([u.states for u in split])) for name, split in splits.items()},
        states,
        f"{'AN4' if _an4_root(folder) else 'Kaldi-style folder'}: {counts}; {states} states",
        _words(_an4_root(folder), splits, states),
    )


def build(data: Data, width: int, depth: int = DEPTH) -> nn.Module:
    """Hidden ReLU layers between the spliced frame and the states.

    Args:
        data: What ``load`` returned, for the numbers of inputs and states.
        width: Units of each hidden layer, >= 1.
        depth: Number of hidden layers.

    Returns:
        The dense network.
    """
    layers: list[nn.Module] = []
    inputs = data.inputs["train"].shape[1]
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, data.states))


def rules(rule: dict[str, object]) -> dict[str, dict[str, object]]:
    """The table ``rules`` of a configuration that covers every matrix.

    Args:
        rule: Method and options.

    Returns:
        The pattern ``*`` -> ``rule``.
    """
    return {"*": rule}


def fit(model: nn.Module, data: Data, training: Training) -> None:
    """Minimise the cross entropy of the states; the state of the network with the lowest development error stays.

    Args:
        model: The network, dense or thin; changed in place.
        data: What ``load`` returned.
        training: Batches, optimiser and number of steps.

    Raises:
        NonFiniteError: The training diverges.
    """
    inputs, targets = data.inputs["train"], data.targets["train"]
    some, right = data.inputs["dev"][::JUDGED], data.targets["dev"][::JUDGED]
    training.keep_best(lambda: error(predict(model, some), right), JUDGMENTS)
    for chosen in training.batches(len(inputs), BATCH):
        scores = model(inputs[chosen])
        hard = nn.functional.cross_entropy(scores, targets[chosen])
        training.minimise(training.taught(inputs[chosen], scores, hard))


def evaluate(model: nn.Module, data: Data, split: str) -> dict[str, float]:
    """Judge the network by its frame errors, and by word errors where the folder has a dictionary.

    Args:
        model: The network.
        data: What ``load`` returned.
        split: ``"dev"`` or ``"test"``.

    Returns:
        ``frame_error``, frames whose likeliest state is wrong, in percent; ``wer``, word errors over words, in percent.
    """
    scores = predict(model, data.inputs[split])
    values = {"frame_error": error(scores, data.targets[split])}
    if data.words is not None:
        values["wer"] = data.words.error_rate(scores, split)
    return values


def loss(model: nn.Module, data: Data) -> float:
    """The mean cross entropy of every fourth development frame.

    Args:
        model: The network.
        data: What ``load`` returned.

    Returns:
        Nats per frame.
    """
    scores = predict(model, data.inputs["dev"][::JUDGED])
    return nn.functional.cross_entropy(scores, data.targets["dev"][::JUDGED]).item()


def calibration(data: Data) -> tuple[Tensor, Tensor]:
    """Evenly spaced development frames for second derivatives.

    Args:
        data: What ``load`` returned.

    Returns:
        Inputs and states of about 1,000 frames.
    """
    every = max(len(data.targets["dev"]) // CALIBRATION, 1)
    return data.inputs["dev"][::every], data.targets["dev"][::every]


def example(data: Data) -> tuple[Tensor, ...]:
    """One frame of the test split.

    Args:
        data: What ``load`` returned.

    Returns:
        The network's only argument, 1 x inputs.
    """
    return (data.inputs["test"][:1],)


def spliced(utterances: list[Utterance]) -> Float[np.ndarray, "frames inputs"]:
    """Features with deltas and double deltas, normalised per speaker, each frame with its neighbours.

    Args:
        utterances: The utterances of one split.

    Returns:
        The frames of all utterances, in float32; each has ``2 * CONTEXT + 1`` frames side by side.
    """
    full = [an4.with_deltas(u.features) for u in utterances]
    rows: list[np.ndarray] = []
    for normal in an4.normalised([u.speaker for u in utterances], full):
        padded = np.pad(normal, ((CONTEXT, CONTEXT), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * CONTEXT + 1, axis=0)  # frames, dims, window
        rows.append(windows.transpose(0, 2, 1).reshape(len(normal), -1).astype(np.float32))
    return np.concatenate(rows)


def _an4_root(folder: Path) -> Path | None:
    """The folder that holds ``states.npz`` and ``an4``: the one given, or its subfolder ``an4``."""
    return next((base for base in (folder / "an4", folder) if (base / "states.npz").exists()), None)


def _read_an4(folder: Path) -> dict[str, list[Utterance]] | None:
    root = _an4_root(folder)
    if root is None:
        return None
    states = np.load(root / "states.npz")
    utterances: dict[str, list[Utterance]] = {}
    for split, recordings in an4.read(root / "an4").items():
        said = an4.transcripts(root / "an4", split)
        if missing := [r.name for r in recordings if r.name not in states]:
            raise ConfigError(
                f"{root / 'states.npz'} has no alignment of {missing[0]}, which an4_{split}.fileids names."
            )
        utterances[split] = [
            Utterance(r.speaker, r.features, states[r.name].astype(np.int64), said.get(r.name, "")) for r in recordings
        ]
    _check(utterances, root)
    return utterances


def _words(root: Path | None, splits: dict[str, list[Utterance]], states: int) -> Words | None:
    """The decoder of AN4's own dictionary and unigram model, where these and all transcripts are."""
    said = all(u.words for split in splits.values() for u in split)
    if root is None or not said or not (root / "an4" / "etc" / "an4.dic").exists():
        return None
    etc = root / "an4" / "etc"
    phones = (etc / "an4.phone").read_text().split()
    if states > 3 * len(phones):
        raise ConfigError(
            f"{root}: the alignments have {states} states, but {len(phones)} phones have only three each."
        )
    loop = WordLoop.from_phones(
        read_dictionary(etc / "an4.dic"),
        phones,
        read_unigrams(etc / "an4.ug.lm"),
        lm_weight=LM_WEIGHT,
        word_penalty=WORD_PENALTY,
    )
    priors = log_priors(np.concatenate([u.states for u in splits["train"]]), 3 * len(phones))[:states]
    lengths = {name: [len(u.states) for u in split] for name, split in splits.items()}
    return Words(loop, priors, lengths, {name: [u.words for u in split] for name, split in splits.items()})


def _read_kaldi(folder: Path) -> dict[str, list[Utterance]] | None:
    if not (folder / "train" / "feats.txt").exists():
        return None
    utterances: dict[str, list[Utterance]] = {}
    for split in ("train", "test"):
        base = folder / split
        speakers = dict(line.split() for line in (base / "utt2spk").read_text().splitlines())
        lines = (line.split() for line in (base / "ali.txt").read_text().splitlines())
        states = {name: np.array(rest, dtype=np.int64) for name, *rest in lines}
        aligned = [(n, f) for n, f in _text_archive(base / "feats.txt") if n in states]
        if missing := [n for n, _ in aligned if n not in speakers]:
            raise ConfigError(f"{base / 'utt2spk'} has no speaker for {missing[0]}.")
        utterances[split] = [Utterance(speakers[n], f, states[n]) for n, f in aligned]
    _check(utterances, folder)
    return utterances


def _text_archive(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Kaldi's text form of matrices: a name, ``[``, a line a frame, and ``]`` after the last."""
    name, rows = "", list[list[str]]()
    with path.open() as file:
        for line in file:
            words = line.split()
            if "[" in words:
                name, rows, words = words[0], [], words[2:]
            closing = "]" in words
            if numbers := [word for word in words if word != "]"]:
                rows.append(numbers)
            if closing:
                yield name, np.array(rows, dtype=np.float64)


def _check(parts: dict[str, list[Utterance]], folder: Path) -> None:
    for split, utterances in parts.items():
        if not utterances:
            raise ConfigError(f"{folder} has no utterance with features and an alignment for {split!r}.")
        for u in utterances:
            if len(u.features) != len(u.states):
                raise ConfigError(
                    f"{folder}, {split}: an utterance of {u.speaker} has {len(u.features)} frames, but its alignment "
                    f"{len(u.states)}."
                )


TASK = ModuleTask(
    name="acoustic",
    about="phone states of speech frames (AN4, or a Kaldi-style folder): spliced MFCC, ReLU layers; needs --data",
    metrics=("frame_error", "wer"),  # percent; words need a dictionary, which AN4 has
    width=WIDTH,
    depth=DEPTH,
    steps=1800,
    load=load,
    build=build,
    rules=rules,
    fit=fit,
    evaluate=evaluate,
    example=example,
    loss=loss,
    calibration=calibration,
    asks_teacher=True,  # the training calls training.taught
    # Chosen for each method on the development speakers (docs/training.md).
    learning_rate=1e-3,
    learning_rates={"same-size": 8e-3, "same-size-coded": 4e-3, "rank-8bit": 5e-4, "rank-4bit": 5e-4},
    options={"tensor-train": {"order": 2}},
)
