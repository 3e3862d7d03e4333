"""Single words, as devices wait for them: error in percent. A folder with a subfolder for each word, or words of AN4.

The networks: ``keyword_networks``; the features: ``log_mel``; how folders are read: ``words``.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.lab.tasks import words
from deepthin.lab.tasks.keyword_networks import CLASSES, NETWORKS, SHAPE, WIDTH
from deepthin.lab.tasks.task import ModuleTask
from deepthin.lab.tasks.training import Training, error, predict

NETWORK = "bc-resnet"
BATCH = 16
SHIFT = 10  # frames by which a training batch is moved at most, to either side
CALIBRATION = 500


@dataclass(frozen=True)
class Data:
    """Features, items x channels x bins x frames, and classes by split: ``train``, ``dev``, ``test``."""

    inputs: dict[str, Float[Tensor, "_ channels bins frames"]]
    targets: dict[str, Int[Tensor, "_"]]
    words: tuple[str, ...]  # by class
    about: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, bins and frames of an item."""
        _, channels, bins, frames = self.inputs["train"].shape
        return channels, bins, frames


def load(folder: Path | None) -> Data:
    """Load a folder of recordings (``words.read_folder``), or AN4's words (``words.read_an4``).

    Args:
        folder: The folder.

    Returns:
        Features and classes of all splits; classes are in alphabetical order.

    Raises:
        ConfigError: There is no folder, or it has no recordings, a single word, or no recordings of a split.
    """
    if folder is None:
        raise ConfigError(
            "The task keywords needs --data: a folder with a subfolder of recordings for each word, as Speech Commands "
            "has it, or AN4 with phones.ctm (docs/keywords.md)."
        )
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: --data must have a subfolder of recordings for each word.")
    name, read = "recordings", words.read_folder(folder)
    if read is None:
        name, read = "AN4", words.read_an4(folder)
    if read is None:
        raise ConfigError(
            f"{folder} has no recordings: it needs a subfolder for each word with {', '.join(sorted(words.ENDINGS))} "
            "files, or AN4 with phones.ctm. See docs/keywords.md."
        )
    classes: tuple[str, ...] = tuple(sorted(set(read.words["train"])))
    if len(classes) < 2:
        raise ConfigError(f"{folder} has recordings of one word only ({', '.join(classes)}): give at least two.")
    for split in ("dev", "test"):
        if unknown := sorted(set(read.words[split]) - set(classes)):
            raise ConfigError(f"{folder}: {unknown[0]!r} has recordings for {split!r}, but none to train.")
    inputs = {split: torch.from_numpy(np.stack(features)) for split, features in read.features.items()}
    numbers = {word: number for number, word in enumerate(classes)}
    targets = {split: torch.tensor([numbers[word] for word in some]) for split, some in read.words.items()}
    counts = ", ".join(f"{split} {len(some):,}" for split, some in targets.items())
    frames = inputs["train"].shape[-1]
    return Data(inputs, targets, classes, f"{name}: {len(classes)} words; {counts}; {frames} frames")


def build(data: Data | None, width: int, network: str = NETWORK) -> nn.Module:
    """Build a network.

    Args:
        data: What ``load`` returned; None: twelve words, of one second.
        width: Thousandths of the published channels, >= 1; of BC-ResNet, a thousand times the scale tau.
        network: A key of ``NETWORKS``.

    Returns:
        The dense network.
    """
    classes, shape = (CLASSES, SHAPE) if data is None else (len(data.words), data.shape)
    return NETWORKS[network](width, classes, shape)


def rules(rule: dict[str, object]) -> dict[str, dict[str, object]]:
    """The table ``rules`` of a configuration that covers every matrix.

    Args:
        rule: Method and options.

    Returns:
        The pattern ``*`` -> ``rule``.
    """
    return {"*": rule}


def fit(model: nn.Module, data: Data, training: Training) -> None:
    """Minimise the cross entropy of the words, each batch moved in time by up to 100 ms; the last state stays.

    Args:
        model: The network, dense or thin; changed in place.
        data: What ``load`` returned.
        training: Batches, optimiser and number of steps.

    Raises:
        NonFiniteError: The training diverges.
    """
    inputs, targets = data.inputs["train"], data.targets["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)  # dropout draws from torch's own generator
        for chosen in training.batches(len(inputs), BATCH):
            frames = int(torch.randint(-SHIFT, SHIFT + 1, (), generator=training.generator))
            moved = inputs[chosen].roll(frames, 3)
            scores = model(moved)
            hard = nn.functional.cross_entropy(scores, targets[chosen])
            training.minimise(training.taught(moved, scores, hard))


def loss(model: nn.Module, data: Data) -> float:
    """The mean cross entropy of the development words.

    Args:
        model: The network.
        data: What ``load`` returned.

    Returns:
        Nats per word.
    """
    return nn.functional.cross_entropy(predict(model, data.inputs["dev"], 100), data.targets["dev"]).item()


def evaluate(model: nn.Module, data: Data, split: str) -> dict[str, float]:
    """Judge the network by the words whose likeliest class is wrong.

    Args:
        model: The network.
        data: What ``load`` returned.
        split: ``"dev"`` or ``"test"``.

    Returns:
        ``error`` in percent.
    """
    return {"error": error(predict(model, data.inputs[split], 100), data.targets[split])}


def calibration(data: Data) -> tuple[Tensor, Tensor]:
    """Development words for second derivatives.

    Args:
        data: What ``load`` returned.

    Returns:
        Inputs and classes of 500 words at most.
    """
    every = max(len(data.targets["dev"]) // CALIBRATION, 1)
    return data.inputs["dev"][::every], data.targets["dev"][::every]


def example(data: Data) -> tuple[Tensor, ...]:
    """One word of the test split.

    Args:
        data: What ``load`` returned.

    Returns:
        The network's only argument, 1 x channels x bins x frames.
    """
    return (data.inputs["test"][:1],)


TASK = ModuleTask(
    name="keywords",
    about="single words with a CNN, DS-CNN, BC-ResNet or GRU (a folder for each word, or AN4's words); needs --data",
    metrics=("error",),  # percent
    width=WIDTH,
    depth=None,
    networks=tuple(NETWORKS),
    network=NETWORK,
    steps=1000,
    load=load,
    build=build,
    rules=rules,
    fit=fit,
    evaluate=evaluate,
    example=example,
    loss=loss,
    calibration=calibration,
    asks_teacher=True,
    # Chosen on the development speakers of AN4 (docs/keywords.md).
    learning_rate=2e-3,
    learning_rates={"same-size": 2e-2, "kronecker-coded": 5e-4},
    network_rates={"bc-resnet": {"dense": 2e-2, "dense-coded": 3e-3}, "gru": {"dense": 6e-3}},
)
