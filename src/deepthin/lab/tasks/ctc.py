"""From speech to characters, end to end: a small DeepSpeech on CMU AN4, in nats a character and in word errors.

A convolution over time, bidirectional LSTM layers and CTC, as in Amodei et al., 2016 (Deep Speech 2, arXiv:1512.02595),
whose 800 units the paper compresses. Needs AN4 as Sphinx features, its transcripts, dictionary and unigram model.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from deepthin.errors import ConfigError
from deepthin.lab.tasks import an4
from deepthin.lab.tasks.decoder import WordLoop, read_dictionary, read_unigrams, word_error_rate
from deepthin.lab.tasks.task import ModuleTask
from deepthin.lab.tasks.training import Training

WIDTH, DEPTH = 192, 2
BATCH = 16
WARM_UP = 150  # steps
CLIP = 20.0  # of the gradient's norm; with 5, training diverged


INPUTS = 39  # 13 cepstra, their deltas and double deltas
STRIDE = 3  # frames from one output to the next
BLANK, WORD_END = "_", "|"
SYMBOLS = (BLANK, WORD_END, *ascii_uppercase)

# Distortions of a training batch.
SPEED = 0.15  # largest relative change of speed, one for the whole batch
NOISE = 0.15  # standard deviation; features have 1
TIME_MASKS, MASKED_FRAMES = 2, 10  # number of masks, and their largest width
MASKED_CEPSTRA = 2  # largest number of neighbouring cepstra
DROPOUT = 0.2
WHOLE = 24  # frames are padded to a multiple: oneDNN compiles anew for each number of steps

# Settings of the word decoder, chosen for the dense network on the development speakers. AN4's model gives all words
# the same probability: the weight is a penalty for each word.
LM_WEIGHT, WORD_PENALTY = 0.2, 0.0


@dataclass(frozen=True)
class Split:
    """Utterances, the shortest first."""

    features: list[Float[Tensor, "_ inputs"]]  # by frame
    targets: list[Int[Tensor, "_"]]  # by character; each word with its end
    texts: list[str]


@dataclass(frozen=True)
class Data:
    """Utterances by split, ``train``, ``dev`` (training speakers held out) and ``test``; and a loop over all words."""

    splits: dict[str, Split]
    words: WordLoop
    about: str


class Recogniser(nn.Module):
    """Log-probabilities of symbols from features, one output per three frames.

    Each direction of a layer is a module of its own, and the backward one sees each utterance reversed within its own
    length: padding comes last for both and changes nothing. Packed sequences would do the same, in twice the time.

    Args:
        width: Units of each direction.
        depth: Number of bidirectional layers.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        channels = -(-width // 3)
        self.front = nn.Conv1d(INPUTS, channels, 5, stride=STRIDE, padding=2)
        self.norm = nn.BatchNorm1d(channels)
        sizes = [channels, *[2 * width] * (depth - 1)]
        self.ahead = nn.ModuleList(nn.LSTM(inputs, width, batch_first=True) for inputs in sizes)
        self.back = nn.ModuleList(nn.LSTM(inputs, width, batch_first=True) for inputs in sizes)
        self.dropout = nn.Dropout1d(DROPOUT)  # drops a unit for the whole utterance
        self.output = nn.Linear(2 * width, len(SYMBOLS))

    def forward(
        self, features: Float[Tensor, "batch frames inputs"], lengths: Int[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch steps symbols"], Int[Tensor, "batch"]]:
        """Compute log-probabilities of the symbols.

        Args:
            features: Features, zero from each utterance's length on.
            lengths: Frames of each utterance.

        Returns:
            The log-probabilities, arbitrary from each utterance's new length on, and the new lengths in steps.
        """
        x = F.hardtanh(self.norm(self.front(features.transpose(1, 2)))).transpose(1, 2)
        lengths = (lengths + STRIDE - 1) // STRIDE
        step = torch.arange(x.shape[1])
        turned = torch.where(step < lengths[:, None], lengths[:, None] - 1 - step, step)
        turned += x.shape[1] * torch.arange(len(x))[:, None]

        def turn(x: Tensor) -> Tensor:
            return x.flatten(0, 1).index_select(0, turned.flatten()).view(x.shape)

        for ahead, back in zip(self.ahead, self.back, strict=True):
            y, _ = ahead(x)
            z, _ = back(turn(x))
            x = self.dropout(torch.cat([y, turn(z)], 2).transpose(1, 2)).transpose(1, 2)
        return F.log_softmax(self.output(x).float(), 2), lengths


def load(folder: Path | None) -> Data:
    """Load AN4.

    Of the training speakers, every ninth of the sorted names, eight in all, is held out for development.

    Args:
        folder: A folder with AN4.

    Returns:
        Utterances of all splits, and the word decoder.

    Raises:
        ConfigError: There is no folder, or it lacks AN4, a transcript or the language model.
    """
    if folder is None:
        raise ConfigError("The task ctc needs --data: a folder with AN4 (docs/comparison.md).")
    root = an4.find(folder)
    if root is None:
        raise ConfigError(f"{folder} does not hold AN4 (an4/etc/an4_train.fileids). See docs/comparison.md.")
    recordings = an4.read(root)
    texts = {split: an4.transcripts(root, split) for split in an4.SPLITS}
    held_out = an4.held_out(recording.speaker for recording in recordings["train"])
    parts = {
        "train": ([r for r in recordings["train"] if r.speaker not in held_out], texts["train"]),
        "dev": ([r for r in recordings["train"] if r.speaker in held_out], texts["train"]),
        "test": (recordings["test"], texts["test"]),
    }
    splits = {name: _split(name, root, *part) for name, part in parts.items()}
    counts = ", ".join(
        f"{name} {len(recordings):,} utterances of {len({r.speaker for r in recordings})} speakers, "
        f"{sum(map(len, splits[name].targets)):,} characters"
        for name, (recordings, _) in parts.items()
    )
    words = WordLoop.from_characters(
        sorted({word for word, _ in read_dictionary(root / "etc" / "an4.dic")}),
        SYMBOLS,
        read_unigrams(root / "etc" / "an4.ug.lm"),
        blank=BLANK,
        word_end=WORD_END,
        lm_weight=LM_WEIGHT,
        word_penalty=WORD_PENALTY,
    )
    return Data(splits, words, f"AN4: {counts}; {len(SYMBOLS)} symbols")


def build(data: Data | None, width: int, depth: int = DEPTH) -> nn.Module:
    """Build a convolution, bidirectional LSTM layers and a linear output.

    Args:
        data: Not used.
        width: Units of each direction; the convolution has a third as many channels.
        depth: Number of bidirectional layers.

    Returns:
        The dense network.
    """
    return Recogniser(width, depth)


def rules(rule: dict[str, object]) -> dict[str, dict[str, object]]:
    """The table ``rules`` of a configuration that covers every matrix.

    Args:
        rule: Method and options.

    Returns:
        The pattern ``*`` -> ``rule``.
    """
    return {"*": rule}


def fit(model: nn.Module, data: Data, training: Training) -> None:
    """Minimise the CTC loss per character on utterances that are distorted anew each time; the last state stays.

    Matrix products are in bfloat16 where the processor supports it, which is three times as fast; all else is in
    float32.

    Args:
        model: The network, dense or thin; changed in place.
        data: What ``load`` returned.
        training: Batches, optimiser and number of steps.

    Raises:
        NonFiniteError: The training diverges.
    """
    train, generator = data.splits["train"], training.generator
    frames = torch.tensor([len(features) for features in train.features])
    order = partial(_of_like_length, frames, min(BATCH, len(frames)), generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)  # dropout draws from torch's own generator
        for chosen in training.batches(len(frames), BATCH, WARM_UP, order):
            features, lengths = distorted([train.features[i] for i in chosen], generator)
            with precision():
                scores, steps = model(features, lengths)
            training.minimise(loss(scores, steps, [train.targets[i] for i in chosen]), CLIP)


def evaluate(model: nn.Module, data: Data, split: str) -> dict[str, float]:
    """Judge the network by its loss and by word errors.

    Args:
        model: The network.
        data: What ``load`` returned.
        split: ``"dev"`` or ``"test"``.

    Returns:
        ``loss``, nats per character; ``wer``, word errors in percent with the dictionary and the unigram model;
        ``wer_greedy``, word errors in percent of the likeliest symbols.
    """
    utterances = data.splits[split]
    total, decoded, greedy = 0.0, list[str](), list[str]()
    model.eval()
    for start in range(0, len(utterances.features), 4 * BATCH):
        part = slice(start, start + 4 * BATCH)
        features = pad_sequence(utterances.features[part], batch_first=True)
        with torch.no_grad():
            scores, steps = model(features, torch.tensor([len(frames) for frames in utterances.features[part]]))
            total += F.ctc_loss(*_ctc(scores, steps, utterances.targets[part]), reduction="sum").item()
        decoded += map(" ".join, data.words.decode(scores.numpy(), steps.numpy()))
        greedy += [spelled(best[:count]) for best, count in zip(scores.argmax(2), steps, strict=True)]
    return {
        "loss": total / sum(map(len, utterances.targets)),
        "wer": word_error_rate(utterances.texts, decoded),
        "wer_greedy": word_error_rate(utterances.texts, greedy),
    }


def example(data: Data) -> tuple[Tensor, ...]:
    """The test utterance of median length.

    Args:
        data: What ``load`` returned.

    Returns:
        The network's arguments: features, 1 x frames x inputs, and the length.
    """
    features = data.splits["test"].features
    middle = features[len(features) // 2]
    return middle[None], torch.tensor([len(middle)])


def loss(
    scores: Float[Tensor, "batch steps symbols"], steps: Int[Tensor, "batch"], targets: list[Int[Tensor, "_"]]
) -> Float[Tensor, ""]:
    """The CTC loss (Graves et al., 2006, "Connectionist temporal classification"), per character of the batch.

    Args:
        scores: Log-probabilities of the symbols.
        steps: Steps of each utterance.
        targets: Symbols of each utterance.

    Returns:
        Nats per character; an utterance too short for its text counts as zero.
    """
    return F.ctc_loss(*_ctc(scores, steps, targets), reduction="sum", zero_infinity=True) / sum(map(len, targets))


def spelled(best: Int[Tensor, "steps"]) -> str:
    """Words from the likeliest symbol of each step: repeats are merged, then blanks removed.

    Args:
        best: Index of the likeliest symbol of each step.

    Returns:
        The words, separated by blanks.
    """
    symbols = "".join(SYMBOLS[i] for i in best.unique_consecutive().tolist())
    return " ".join(symbols.replace(BLANK, "").replace(WORD_END, " ").split())


def distorted(
    features: list[Float[Tensor, "_ inputs"]], generator: Generator
) -> tuple[Float[Tensor, "batch frames inputs"], Int[Tensor, "batch"]]:
    """Distort a training batch: another speed, added noise, masked frames and cepstra.

    Masking after SpecAugment (Park et al., 2019, arXiv:1904.08779).

    Args:
        features: Features of each utterance.
        generator: The only source of randomness.

    Returns:
        The padded batch, and the new lengths in frames.
    """
    batch, lengths = len(features), torch.tensor([len(frames) for frames in features])

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    speed = 1 + SPEED * (2 * uniform(1) - 1)
    changed = (lengths / speed).round().long().clamp(min=1)
    frame = torch.arange(-(-int(changed.max()) // WHOLE) * WHOLE)
    inside = frame < changed[:, None]
    place = torch.minimum(frame * speed[:, None], lengths[:, None] - 1.0)  # in the recording
    before = place.long()
    after = torch.minimum(before + 1, lengths[:, None] - 1)
    starts = lengths.cumsum(0)[:, None] - lengths[:, None]
    joined = torch.cat(features)
    x = torch.lerp(joined[starts + before], joined[starts + after], (place - before)[:, :, None])
    x += NOISE * torch.randn(x.shape, generator=generator)
    width = (uniform(batch, TIME_MASKS, 1) * (MASKED_FRAMES + 1)).long()
    first = (uniform(batch, TIME_MASKS, 1) * (changed[:, None, None] - width + 1).clamp(min=1)).long()
    inside &= ~((frame >= first) & (frame < first + width)).any(1)
    cepstrum = torch.arange(INPUTS) % (INPUTS // 3)
    width = (uniform(batch, 1) * (MASKED_CEPSTRA + 1)).long()
    first = (uniform(batch, 1) * (INPUTS // 3 - width + 1)).long()
    hidden = (cepstrum >= first) & (cepstrum < first + width)
    return x * inside[:, :, None] * ~hidden[:, None], changed


def _split(name: str, root: Path, recordings: list[an4.Recording], texts: dict[str, str]) -> Split:
    if not recordings:
        raise ConfigError(f"{root} has no utterance for {name!r}. AN4 has 948 to train and 130 to test.")
    full = [an4.with_deltas(r.features) for r in recordings]
    features = an4.normalised([r.speaker for r in recordings], full)
    order = sorted(range(len(recordings)), key=lambda i: len(features[i]))
    spoken: list[str] = []
    for i in order:
        text = texts.get(recordings[i].name, "")
        if not text or not set(text) <= {" ", *ascii_uppercase}:
            raise ConfigError(
                f"{root}, {name}: the transcript of {recordings[i].name} is {text!r}. Every utterance needs one, of "
                "the letters A to Z and blanks."
            )
        spoken.append(text)
    return Split(
        [torch.from_numpy(features[i].astype(np.float32)) for i in order], [_symbols(t) for t in spoken], spoken
    )


def _symbols(text: str) -> Int[Tensor, "characters"]:
    return torch.tensor([SYMBOLS.index(letter) for word in text.split() for letter in (*word, WORD_END)])


def _ctc(scores: Tensor, steps: Tensor, targets: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of torch's CTC loss, whose blank is our first symbol."""
    return scores.transpose(0, 1), torch.cat(targets), steps, torch.tensor([len(text) for text in targets])


def _of_like_length(frames: Tensor, batch: int, generator: Generator) -> Tensor:
    """A pass over utterances in batches of similar lengths; the few that fill no batch differ from pass to pass."""
    order = torch.randperm(len(frames), generator=generator)[: len(frames) // batch * batch]
    rows = order[frames[order].argsort(stable=True)].view(-1, batch)
    return rows[torch.randperm(len(rows), generator=generator)].flatten()


def precision() -> torch.autocast:
    """The precision of training: matrix products in bfloat16 where the processor supports it.

    Returns:
        A context manager; it does nothing on other processors.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=cast(bool, torch.cpu._is_avx512_bf16_supported()))


TASK = ModuleTask(
    name="ctc",
    about="characters of speech (AN4) by a bidirectional LSTM and CTC: nats a character, word errors; needs --data",
    metrics=("loss", "wer", "wer_greedy"),  # nats a character; percent with a dictionary, and without
    width=WIDTH,
    depth=DEPTH,
    steps=3180,  # 60 passes
    load=load,
    build=build,
    rules=rules,
    fit=fit,
    evaluate=evaluate,
    example=example,
    # Chosen for each method on the development speakers (docs/training.md).
    learning_rate=1.5e-3,
    learning_rates={
        "same-size": 1.2e-2,
        "hashed": 3.9e-3,
        "hashed-8bit": 3.1e-3,
        "pruned-csr": 4.3e-3,
        "pruned-8bit": 6.5e-3,
    },
    # Without decay DeepThin's recurrent factors grow until gradients through time explode.
    decays={"deepthin": 0.3, "deepthin-coded": 0.1, "same-size": 0.3, "same-size-8bit": 0.0, "same-size-4bit": 0.0},
    allocations={
        "deepthin-8bit": 0.5,
        "deepthin-4bit": 0.5,
        "hashed-8bit": 0.5,
        "pruned-csr": 0.5,
    },
    options={
        "deepthin-8bit": {"rank": 4},  # recurrent layers need more rank than the frame classifier
        "deepthin-4bit": {"rank": 4},
        "tensor-train": {"order": 2},
    },
)
