"""Convolutions by the product of two factors, without the decoded kernel: the items are the windows of the images.

The product is that of a linear layer over windows (docs/performance.md); native code reads these where they lie in the
padded image. Where it does not apply, layers convolve with the decoded kernel.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor

from deepthin.kernels import products
from deepthin.kernels.costs import choose_native, convolution_costs
from deepthin.methods.factor import Factor, Window
from deepthin.torch import spectral
from deepthin.torch.operators import takes
from deepthin.torch.tracing import is_recorded
from deepthin.torch.weight import ThinPart, ThinWeight

_KNOWN = "_known"  # attribute of a layer: a shape of images, and whether evaluation takes the factors for it
_GAIN = 0.8  # upper bound on the fraction of the dense time: predictions for convolutions are off by 6 % on average
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """What a convolution is, apart from its weights and the images.

    Attributes:
        kernel: Taps along each spatial dimension.
        stride: Of the outputs, along each dimension.
        dilation: Distance of taps, along each dimension.
        pads: Zeros before and after the image, the last dimension first, as ``F.pad`` takes them.
        groups: Groups of channels.
        outputs: Output channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int
    outputs: int

    def sides(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The outputs along each dimension.

        Args:
            size: Of the image, without channels.

        Returns:
            One number for each dimension; below 1 where the kernel is larger than the padded image.
        """
        before, after = self.pads[-2::-2], self.pads[::-2]
        return tuple(
            (points + low + high - gap * (taps - 1) - 1) // step + 1
            for points, low, high, gap, taps, step in zip(
                size, before, after, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    def numbers(self, batch: int, channels: int, size: tuple[int, ...], window: Window) -> list[int]:
        """The convolution as native code takes it.

        Args:
            batch: Number of images.
            channels: Of the images.
            size: Of the images, without channels.
            window: Where the kernel lies in the factors.

        Returns:
            Its 25 numbers, dimensions that are missing of size 1.
        """
        before, after = self.pads[-2::-2], self.pads[::-2]
        axes = zip(size, self.kernel, self.stride, self.dilation, before, after, strict=True)
        missing = [1, 1, 1, 1, 0, 0] * (3 - len(size))
        head = [batch, channels, self.outputs, self.groups, window.plan.n, window.plan.rank, window.offset]
        return head + missing + [number for axis in axes for number in axis]


def product(layer: nn.Module, images: Tensor, bias: Tensor | None) -> Tensor | None:
    """A layer's convolution by the factors of its kernel, where that is predicted to be faster.

    Args:
        layer: A thin convolution of one to three dimensions.
        images: Its input.
        bias: One number for each output channel, or None.

    Returns:
        The outputs, in the layout of the input; None where native code cannot compute them, or not faster than with
        the decoded kernel.
    """
    part, known = cast(Any, layer)._modules["thin"]._modules.get("weight"), _known(layer, images)
    if known is False or is_recorded() or not isinstance(part, ThinWeight | ThinPart) or not products.native_available:
        return None
    weight, index = (part.group, part.index) if isinstance(part, ThinPart) else (part, 0)
    window = weight.kernels[index]
    if window is None or not takes(images, bias) or torch.is_autocast_enabled("cpu"):
        return None
    made, dims = geometry(layer), len(cast(Any, layer).kernel_size)
    if images.dim() not in (dims + 1, dims + 2) or images.shape[-dims - 1] != cast(Any, layer).in_channels:
        return None
    if not images.is_contiguous() and images.dim() == dims + 2 and _is_channels_last(images):
        return None  # whose outputs have the channels last, too
    is_batch, shape = images.dim() == dims + 2, images.shape
    images = images if is_batch else images[None]
    if cast(Any, layer).padding_mode != "zeros":
        images = F.pad(images, cast(Any, layer)._reversed_padding_repeated_twice, mode=cast(Any, layer).padding_mode)
        made = made._replace(pads=(0,) * 2 * dims)
    sides = made.sides(tuple(images.shape[2:]))
    items = len(images) * math.prod(sides)
    floats = weight.floats()
    if min(sides) < 1 or items == 0 or not takes(floats["xf"], floats["wf"]):
        return None
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (images, bias, floats["xf"], floats["wf"])
    )
    if known is None:
        dense_ready = weight.keeps_dense() and not wanted
        by_spectra = dense_ready and isinstance(layer, nn.Conv2d) and spectral.pays(layer, images.shape)
        by_factors = pays(window, made.groups, items, dense_ready)
        if by_factors and by_spectra:
            by_factors = not _spectra_pay(window, cast(nn.Conv2d, layer), images.shape, items)
        if dense_ready and (by_factors or not by_spectra):
            layer.__dict__[_KNOWN] = shape, by_factors
        if not by_factors:
            return None
    rows = floats["xf"][window.first : window.stop]
    y = cast(Tensor, _Convolve.apply(images, rows, floats["wf"], bias, made, window, weight.parts[index].scale))
    return y if is_batch else y[0]


def is_decoded(layer: nn.Module, images: Tensor) -> bool:
    """Whether the last choice holds, and was torch's convolution with the decoded kernel.

    Args:
        layer: A thin convolution.
        images: Its input.

    Returns:
        True in evaluation without gradients, for images of the last shape.
    """
    return _known(layer, images) is False


def _known(layer: nn.Module, images: Tensor) -> bool | None:
    """Whether the factors were chosen for images of this shape, in evaluation without gradients; None if not known."""
    shape, by_factors = layer.__dict__.get(_KNOWN, (None, False))
    if shape is None or layer.training or torch.is_grad_enabled() or is_recorded():
        return None  # in a graph, a comparison would fix the sizes of the images
    return by_factors if shape == images.shape else None


def geometry(layer: nn.Module) -> Geometry:
    """Read a convolution layer.

    Args:
        layer: A convolution of torch.

    Returns:
        Its geometry.
    """
    of = cast(Any, layer)
    pads = tuple(of._reversed_padding_repeated_twice)
    return Geometry(of.kernel_size, of.stride, of.dilation, pads, of.groups, of.out_channels)


@lru_cache(maxsize=4096)
def pays(window: Window, groups: int, items: int, dense_ready: bool) -> bool:
    """Whether the product is predicted to be faster: a pure function, so that reloaded models agree.

    Args:
        window: Where the kernel lies in the factors.
        groups: Groups of channels.
        items: Positions of all images of outputs.
        dense_ready: Whether the decoded kernel is cached, and no gradient is wanted.

    Returns:
        False for a few outputs in each group, as depthwise convolutions have.
    """
    dense, structured = convolution_costs(_of_group(window, groups), groups, items, dense_ready)
    return structured < _GAIN * dense


def _spectra_pay(window: Window, layer: nn.Conv2d, shape: torch.Size, items: int) -> bool:
    """Whether large kernels are faster still by their spectra."""
    return (
        spectral.cost(layer, shape) < convolution_costs(_of_group(window, layer.groups), layer.groups, items, True)[1]
    )


def _is_channels_last(images: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(images.dim())
    return last is not None and images.is_contiguous(memory_format=last)


class _Convolve(torch.autograd.Function):
    """The convolution in native code; gradients of gradients by way of the decoded kernel."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Float[Tensor, "batch channels ..."],
        xf: Float[Tensor, "m r"],
        wf: Float[Tensor, "r n"],
        bias: Float[Tensor, " outputs"] | None,
        made: Geometry,
        window: Window,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, xf, wf)
        ctx.of, ctx.biased = (made, window, scale), bias is not None
        sides = made.sides(tuple(x.shape[2:]))
        y = torch.empty(len(x), made.outputs, *sides, dtype=torch.float32, device="cpu")
        operands = [None if t is None else t.detach().resolve_neg().contiguous() for t in (x, xf, wf, bias)]
        products.native().convolve(
            made.numbers(len(x), x.shape[1], tuple(x.shape[2:]), window),
            *(0 if t is None else t.data_ptr() for t in (*operands, y)),
            _by_fft(made, window, len(x) * math.prod(sides), training=False),
            scale,
            torch.get_num_threads(),
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, xf, wf = ctx.saved_tensors
        made, window, scale = ctx.of
        wanted, grad = ctx.needs_input_grad, grads[0]
        bias = grad.sum([0, *range(2, grad.dim())]) if ctx.biased and wanted[3] else None
        if torch.is_grad_enabled() or is_recorded() or is_legacy_batchedtensor(grad) or not takes(grad, x, xf, wf):
            found = iter(_gradients_in_torch(grad, x, xf, wf, wanted[:3], *ctx.of))
            return *(next(found) if want else None for want in wanted[:3]), bias, None, None, None
        grad = grad if scale == 1.0 else grad * scale
        operands = [t.detach().resolve_neg().contiguous() for t in (x, xf, wf, grad)]
        made_grads = [torch.empty(t.shape) if want else None for t, want in zip((x, xf, wf), wanted, strict=False)]
        products.native().convolve_backward(
            made.numbers(len(x), x.shape[1], tuple(x.shape[2:]), window),
            *(t.data_ptr() for t in operands),
            *(0 if t is None else t.data_ptr() for t in made_grads),
            _by_fft(made, window, grad.numel() // made.outputs, training=True),
            torch.get_num_threads(),
        )
        return *made_grads, bias, None, None, None


def _by_fft(made: Geometry, window: Window, items: int, training: bool) -> bool:
    return choose_native(_of_group(window, made.groups), items, training) == "native-fft"


def _of_group(window: Window, groups: int) -> Factor:
    """The kernel of one group of channels."""
    return Factor((window.rows // groups, window.cols), window.n, window.rank)


def _gradients_in_torch(
    grad: Tensor,
    x: Tensor,
    xf: Tensor,
    wf: Tensor,
    wanted: tuple[bool, ...],
    made: Geometry,
    window: Window,
    scale: float,
) -> list[Tensor]:
    """Gradients by way of the decoded kernel: any dtype, differentiable again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():  # aliases, since one operand may have been computed from another
        operands = [t.view_as(t) if t.requires_grad else t.detach() for t in (x, xf, wf)]
        rows, cols = window.plan.shape
        flat = (operands[1] @ operands[2]).reshape(-1)[window.offset : window.offset + rows * cols]
        kernel = flat.view(rows, x.shape[1] // made.groups, *made.kernel) * scale
        y = _CONVOLVE[len(made.kernel)](
            F.pad(operands[0], made.pads), kernel, None, made.stride, 0, made.dilation, made.groups
        )
        inputs = [t for t, want in zip(operands, wanted, strict=True) if want]
        return list(torch.autograd.grad(y, inputs, grad, create_graph=again)) if inputs else []
