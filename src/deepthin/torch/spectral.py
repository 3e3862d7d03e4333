"""Convolutions with large kernels by FFT, in evaluation: the kernel's spectrum is cached.

Mathieu, Henaff and LeCun, 2014, arXiv:1312.5851. A strided convolution is the sum of plain ones between the phases of
the input and of the kernel: every stride-th row and column, from each of the first ones on. Images are cut into
overlapping tiles whose size follows from the kernel alone, so that one spectrum serves images of any size.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

# Nanoseconds on one core (measured): a multiplication of torch's convolution, one of two spectra, a point of a Fourier
# transform and halving, a call of torch.
_DIRECT, _PRODUCT, _POINT, _CALL = 0.0163, 0.68, 0.25, 2000.0
_GAIN = 0.7  # upper bound on the fraction of torch's time; a smaller gain is not worth the memory


class _Axis(NamedTuple):
    """One side of an image: how it is cut into overlapping tiles."""

    stride: int
    before: int  # zeros put before the image
    tile: int  # points of a tile, each ``stride`` apart
    gives: int  # outputs of a tile
    outputs: int

    @property
    def tiles(self) -> int:
        return -(-self.outputs // self.gives)

    @property
    def taken(self) -> int:
        """Points of all tiles of the image."""
        return (self.tiles - 1) * self.gives + self.tile


def axes(layer: nn.Conv2d, height: int, width: int) -> tuple[_Axis, _Axis] | None:
    """How an image is cut into tiles for a layer.

    Args:
        layer: The convolution.
        height: Rows of the image.
        width: Columns of the image.

    Returns:
        The tiles along rows and along columns; None if the layer has groups, dilation or padding other than with
        zeros, or if the image is smaller than the kernel.
    """
    if layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    sides = []
    for points, kernel, stride, padding in zip(
        (height, width), layer.kernel_size, layer.stride, layer.padding, strict=True
    ):
        outputs = (points + 2 * padding - kernel) // stride + 1
        if outputs < 1:
            return None
        taps = -(-kernel // stride)
        tile = _smooth(5 * taps + 5)
        sides.append(_Axis(stride, padding, tile, tile - taps + 1, outputs))
    return sides[0], sides[1]


def pays(layer: nn.Conv2d, shape: torch.Size) -> bool:
    """Whether the product by FFT is predicted to be clearly faster: a pure function, so that reloaded models agree.

    Args:
        layer: The convolution.
        shape: Of the input, batch x channels x height x width.

    Returns:
        Whether it takes at most 0.7 of the predicted time of torch's convolution.
    """
    cut = axes(layer, *shape[2:])
    if cut is None or shape[0] == 0:
        return False
    multiplications = shape[0] * layer.out_channels * layer.in_channels * math.prod(layer.kernel_size)
    return cost(layer, shape) < _GAIN * _DIRECT * multiplications * cut[0].outputs * cut[1].outputs


def cost(layer: nn.Conv2d, shape: torch.Size) -> float:
    """The predicted time of the product by FFT.

    Args:
        layer: The convolution.
        shape: Of the input, batch x channels x height x width.

    Returns:
        Nanoseconds on one core; infinity where ``axes`` is None.
    """
    cut = axes(layer, *shape[2:])
    if cut is None:
        return math.inf
    rows, cols = cut
    images = shape[0] * rows.tiles * cols.tiles
    phases = layer.in_channels * rows.stride * cols.stride
    points, frequencies = rows.tile * cols.tile, rows.tile * (cols.tile // 2 + 1)
    pairs = images * layer.out_channels
    return (
        _PRODUCT * pairs * phases * frequencies
        + _POINT * images * (phases + layer.out_channels) * points * math.log2(points)
        + _CALL * (2 * pairs + 20)
    )


def spectrum(layer: nn.Conv2d, weight: Float[Tensor, "out in h w"]) -> Complex[Tensor, "out phases frequencies"]:
    """The conjugate spectrum of a kernel.

    Args:
        layer: The convolution.
        weight: Its kernel.

    Returns:
        The spectrum of each phase of the kernel, out x phases x frequencies: 10 to 30 times the memory of the kernel.
    """
    down, right = layer.stride
    rows, cols = (-(-kernel // stride) for kernel, stride in zip(layer.kernel_size, layer.stride, strict=True))
    whole = F.pad(weight, (0, cols * right - weight.shape[3], 0, rows * down - weight.shape[2]))
    tiles = _smooth(5 * rows + 5), _smooth(5 * cols + 5)
    return torch.fft.rfft2(_phases(whole, down, right), s=tiles).conj().resolve_conj().flatten(2)


def convolve(
    layer: nn.Conv2d,
    x: Float[Tensor, "batch in h w"],
    transformed: Complex[Tensor, "out phases frequencies"],
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "batch out rows cols"]:
    """Convolve by FFT (Mathieu, Henaff and LeCun, 2014, arXiv:1312.5851).

    Args:
        layer: The convolution.
        x: Images, batch x channels x height x width.
        transformed: The ``spectrum`` of its kernel.
        bias: One number per output channel, or None.

    Returns:
        The outputs of the layer. The error is relative to the largest output of a tile, not to each: about 4e-7 of
        ``norm(kernel) * norm(tile)``.

    Raises:
        ValueError: ``axes`` returns None for the layer and these images.
    """
    cut = axes(layer, *x.shape[2:])
    if cut is None:
        raise ValueError(f"{layer} cannot be computed by FFT for images of {tuple(x.shape[2:])}: use the layer itself.")
    rows, cols = cut
    batch, (height, width) = len(x), x.shape[2:]
    below, behind = (
        axis.taken * axis.stride - axis.before - points for axis, points in zip(cut, (height, width), strict=True)
    )
    whole = _phases(F.pad(x, (cols.before, behind, rows.before, below)), rows.stride, cols.stride)
    tiles = whole.unfold(2, rows.tile, rows.gives).unfold(3, cols.tile, cols.gives).permute(0, 2, 3, 1, 4, 5)
    images = torch.fft.rfft2(tiles).reshape(-1, *transformed.shape[1:])
    products = x.new_empty(len(images), *transformed.shape[::2], dtype=images.dtype)
    room = torch.empty_like(images[0])
    for output, kernel in enumerate(transformed):  # the kernel stays in the processor's cache for all images
        for image, into in zip(images, products, strict=True):
            torch.sum(torch.mul(kernel, image, out=room), 0, out=into[output])
    folded = products.unflatten(2, (rows.tile, -1))
    y = torch.fft.irfft2(folded, s=(rows.tile, cols.tile))[:, :, : rows.gives, : cols.gives]
    y = y.unflatten(0, (batch, rows.tiles, cols.tiles)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    y = y[:, :, : rows.outputs, : cols.outputs]
    return y.contiguous() if bias is None else y + bias[:, None, None]


def _phases(images: Tensor, down: int, right: int) -> Tensor:
    """The phases of (a, b, h, w) for strides ``down`` and ``right``: (a, b * down * right, h / down, w / right)."""
    cut = images.unflatten(3, (-1, right)).unflatten(2, (-1, down)).permute(0, 1, 3, 5, 2, 4)
    return cut.flatten(1, 3)


@lru_cache
def _smooth(least: int) -> int:
    """The smallest number >= ``least`` without prime factors above 5: Fourier transforms of such lengths are fast."""
    number = least
    while True:
        rest = number
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return number
        number += 1
