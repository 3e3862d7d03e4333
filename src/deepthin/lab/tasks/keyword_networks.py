"""Networks that recognise single words: a plain CNN, DS-CNN, BC-ResNet and a GRU.

Each takes features, items x channels x bins x frames, and gives a score for each class. The number of frames may vary
in all but the CNN. Every factory can be called without arguments: the network then has twelve classes and one second
of 40 log-mel bands, as published for Speech Commands. ``width`` is in thousandths of the published channels.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

WIDTH = 1000  # thousandths of the published channels
CLASSES = 12
SHAPE = (1, 40, 98)  # channels, bins, frames: one second of log-mel features

CNN_CHANNELS, CNN_UNITS = (24, 48, 64), 128
GRU_UNITS = 154  # of the small GRU of Zhang et al., 2017
DROPOUT = 0.1


def cnn(width: int = WIDTH, classes: int = CLASSES, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """Three convolutions, each with half as many frames as its input, and two linear layers.

    Args:
        width: Thousandths of 24, 48 and 64 channels and of 128 units, >= 1.
        classes: Number of classes.
        shape: Channels, bins and frames of the features.

    Returns:
        The dense network.
    """
    layers: list[nn.Module] = [_normalised(shape[0])]
    (inputs, *size), kernel = shape, 5
    for full in CNN_CHANNELS:
        outputs, strides = _channels(full, width), (2 if size[0] > 5 else 1, 2)
        layers += [_convolution(inputs, outputs, kernel, strides, kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs, size = outputs, [-(-length // stride) for length, stride in zip(size, strides, strict=True)]
        kernel = 3
    units = _channels(CNN_UNITS, width)
    hidden = nn.Linear(inputs * size[0] * size[1], units)
    return _ready(nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU(), nn.Linear(units, classes)))


def _ds_cnn(
    channels: int,
    strides: tuple[tuple[int, int], ...],
    width: int = WIDTH,
    classes: int = CLASSES,
    shape: tuple[int, int, int] = SHAPE,
) -> nn.Module:
    """DS-CNN of some size: a convolution of 10 frames by 4 bins, then depthwise separable ones of 3 x 3."""
    bins = max(shape[1] // 10, 1)
    outputs = _channels(channels, width)
    layers: list[nn.Module] = [
        _normalised(shape[0]),
        nn.AvgPool2d((bins, 2), ceil_mode=True),  # 10 bins every 20 ms
        _convolution(shape[0], outputs, (4, 10), strides[0], (2, 5)),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
    for stride in strides[1:]:
        layers += [
            _convolution(outputs, outputs, 3, stride, 1, groups=outputs),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            _convolution(outputs, outputs, 1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return _ready(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, classes)))


def ds_cnn_s(width: int = WIDTH, classes: int = CLASSES, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """DS-CNN S (Zhang et al., 2017, "Hello Edge", arXiv:1711.07128): 64 channels, four separable convolutions.

    Its input there is 10 cepstra every 20 ms; here means of bins and frames give as many numbers.

    Args:
        width: Thousandths of the published channels, >= 1.
        classes: Number of classes.
        shape: Channels, bins and frames of the features.

    Returns:
        The dense network.
    """
    return _ds_cnn(64, ((2, 2), *[(1, 1)] * 4), width, classes, shape)


def ds_cnn_m(width: int = WIDTH, classes: int = CLASSES, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """DS-CNN M (Zhang et al., 2017, arXiv:1711.07128): 172 channels, four separable convolutions.

    Args:
        width: Thousandths of the published channels, >= 1.
        classes: Number of classes.
        shape: Channels, bins and frames of the features.

    Returns:
        The dense network.
    """
    return _ds_cnn(172, ((1, 2), (2, 2), *[(1, 1)] * 3), width, classes, shape)


def ds_cnn_l(width: int = WIDTH, classes: int = CLASSES, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """DS-CNN L (Zhang et al., 2017, arXiv:1711.07128): 276 channels, five separable convolutions.

    Args:
        width: Thousandths of the published channels, >= 1.
        classes: Number of classes.
        shape: Channels, bins and frames of the features.

    Returns:
        The dense network.
    """
    return _ds_cnn(276, ((1, 2), (2, 2), *[(1, 1)] * 4), width, classes, shape)


class SubSpectralNorm(nn.Module):
    """Batch normalisation of each channel in each of several sub-bands (Chang et al., 2021, arXiv:2103.13620).

    Args:
        channels: Number of channels.
        bands: Number of sub-bands, a divisor of the number of bins.
    """

    def __init__(self, channels: int, bands: int) -> None:
        super().__init__()
        self.bands = bands
        self.norm = nn.BatchNorm2d(channels * bands)

    def forward(self, x: Float[Tensor, "items channels bins frames"]) -> Float[Tensor, "items channels bins frames"]:
        """Normalise.

        Args:
            x: Maps.

        Returns:
            The normalised maps.
        """
        items, channels, bins, frames = x.shape
        return self.norm(x.reshape(items, channels * self.bands, bins // self.bands, frames)).view(x.shape)


class BroadcastedBlock(nn.Module):
    """A block of BC-ResNet: a 2-d part, and a part over time of its mean over the bins, added to all bins.

    Kim et al., 2021, arXiv:2106.04140, section 3.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels; another number than ``inputs`` makes a transition block, without a shortcut
            from the input.
        stride: Stride over the bins.
        dilation: Distance of the frames that the convolution over time takes.
        bands: Number of sub-bands of the normalisation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, bands: int, transition: bool) -> None:
        super().__init__()
        self.transition = transition
        first = [_convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU()] if transition else []
        self.frequency = nn.Sequential(
            *first,
            _convolution(outputs, outputs, (3, 1), (stride, 1), (1, 0), groups=outputs),
            SubSpectralNorm(outputs, bands),
        )
        time = nn.Conv2d(
            outputs, outputs, (1, 3), padding=(0, dilation), dilation=(1, dilation), groups=outputs, bias=False
        )
        self.time = nn.Sequential(
            time, nn.BatchNorm2d(outputs), nn.SiLU(), _convolution(outputs, outputs, 1), nn.Dropout2d(DROPOUT)
        )

    def forward(self, x: Float[Tensor, "items inputs bins frames"]) -> Tensor:
        """Compute the block.

        Args:
            x: Maps.

        Returns:
            Maps with ``outputs`` channels, their bins divided by the stride.
        """
        hidden = self.frequency(x)
        y = hidden + self.time(hidden.mean(2, keepdim=True))
        return torch.relu(y if self.transition else y + x)


STAGES = ((8, 2, 1), (12, 2, 2), (16, 4, 2), (20, 4, 1))  # channels, blocks, stride over the bins


def bc_resnet(width: int = WIDTH, classes: int = CLASSES, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """BC-ResNet (Kim et al., 2021, "Broadcasted Residual Learning", arXiv:2106.04140).

    Args:
        width: A thousand times the paper's scale tau: 1000 for BC-ResNet-1, 8000 for BC-ResNet-8.
        classes: Number of classes.
        shape: Channels, bins and frames of the features; 5 sub-bands, or fewer where 5 does not divide the bins.

    Returns:
        The dense network.
    """
    front, last = _channels(16, width), _channels(32, width)
    layers: list[nn.Module] = [
        _normalised(shape[0]),
        _convolution(shape[0], front, 5, (2, 1), 2),
        nn.BatchNorm2d(front),
        nn.ReLU(),
    ]
    inputs, bins = front, -(-shape[1] // 2)
    for number, (full, blocks, stage_stride) in enumerate(STAGES):
        outputs = _channels(full, width)
        for block in range(blocks):
            stride = 1 if block else stage_stride
            bins = -(-bins // stride)
            bands = max(count for count in range(1, 6) if bins % count == 0)
            layers.append(BroadcastedBlock(inputs, outputs, stride, 2**number, bands, transition=block == 0))
            inputs = outputs
    layers += [
        _convolution(inputs, inputs, (min(bins, 5), 5), padding=(0, 2), groups=inputs),
        _convolution(inputs, last, 1),
        nn.BatchNorm2d(last),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(last, classes, 1),
        nn.Flatten(),
    ]
    return _ready(nn.Sequential(*layers))


class Recurrent(nn.Module):
    """A GRU over frames of 20 ms, and a linear layer on the mean of its states.

    Args:
        channels: Channels of the features.
        bins: Bins of the features.
        units: Number of units.
        classes: Number of classes.
    """

    def __init__(self, channels: int, bins: int, units: int, classes: int) -> None:
        super().__init__()
        self.norm = _normalised(channels)
        self.halved = nn.AvgPool2d((1, 2))
        self.gru = nn.GRU(channels * bins, units, batch_first=True)
        self.output = nn.Linear(units, classes)

    def forward(self, features: Float[Tensor, "items channels bins frames"]) -> Float[Tensor, "items classes"]:
        """Compute the scores of the classes.

        Args:
            features: Features.

        Returns:
            Scores.
        """
        x = self.halved(self.norm(features)).flatten(1, 2).transpose(1, 2)
        return self.output(self.gru(x)[0].mean(1))


def gru(width: int = WIDTH, classes: int = CLASSES, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """One GRU layer of 154 units, as the small GRU of Zhang et al., 2017 (arXiv:1711.07128).

    Args:
        width: Thousandths of 154 units, >= 1.
        classes: Number of classes.
        shape: Channels, bins and frames of the features.

    Returns:
        The dense network.
    """
    return _ready(Recurrent(shape[0], shape[1], _channels(GRU_UNITS, width), classes))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "cnn": cnn,
    "ds-cnn-s": ds_cnn_s,
    "ds-cnn-m": ds_cnn_m,
    "ds-cnn-l": ds_cnn_l,
    "bc-resnet": bc_resnet,
    "gru": gru,
}
"""The networks by the names of ``--network``."""

_convolution: Callable[..., nn.Conv2d] = partial(nn.Conv2d, bias=False)


def _normalised(channels: int) -> nn.Module:
    """The first layer: mean 0 and variance 1 of each channel, without parameters."""
    return nn.BatchNorm2d(channels, affine=False)


def _ready(model: nn.Module) -> nn.Module:
    """Without the counters of batches, which only a ``momentum`` of None needs: each would take bytes of the file."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
    return model


def _channels(full: int, width: int) -> int:
    """``width`` thousandths of the channels, rounded, at least one."""
    return max((full * width + 500) // 1000, 1)
