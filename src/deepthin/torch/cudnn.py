"""Decoded weights of a recurrent layer in one buffer, as cuDNN takes them: otherwise it copies them and warns.

torch's own layers lay their parameters out so (``nn.RNNBase.flatten_parameters``); decoded weights are made anew, so
they are copied into such a buffer by one operation. Where each one lies is asked of torch once for every layer.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from deepthin.torch import accelerated
from deepthin.torch.tracing import is_plain, is_recorded


class Layout(NamedTuple):
    """Where the weights of a layer lie in cuDNN's buffer.

    Attributes:
        entries: Length of the buffer.
        offsets: First entry of each weight, in the order of ``_flat_weights_names``.
    """

    entries: int
    offsets: tuple[int, ...]


class FlatWeights:
    """The buffers of one layer: the layout, and in evaluation the last buffer."""

    _layout: "tuple[torch.dtype, torch.device, Layout] | None" = None
    _kept: "tuple[list[Tensor], list[int], list[Tensor]] | None" = None  # weights, their versions, and their copies

    def of(self, layer: nn.RNNBase, weights: list[Tensor]) -> list[Tensor]:
        """The weights in one buffer.

        Args:
            layer: The layer, which has the sizes.
            weights: Its weights and biases in the order of ``_flat_weights_names``.

        Returns:
            Tensors of the same values and gradients; the weights themselves where cuDNN does not take them.
        """
        if not applies(weights):
            return weights
        kept = self._kept
        captured = accelerated.is_captured(weights[0])
        if kept is not None and not captured and _are_same(weights, kept):
            return kept[2]
        like = weights[0]
        known = self._layout
        if known is None or known[0] is not like.dtype or known[1] != like.device:
            self._layout = known = like.dtype, like.device, layout_of(layer, weights)
        wanted = torch.is_grad_enabled()
        lasting = not (layer.training or captured or any(weight.is_inference() for weight in weights))
        with torch.inference_mode(False) if lasting else nullcontext(), torch.set_grad_enabled(wanted):
            flat = list(cast("tuple[Tensor, ...]", _Flat.apply(known[2], *weights)))
        lasting = lasting and not any(weight.requires_grad for weight in flat) and accelerated.may_keep(flat[0])
        self._kept = (weights, [weight._version for weight in weights], flat) if lasting else None
        return flat


def _are_same(weights: list[Tensor], kept: tuple[list[Tensor], list[int], list[Tensor]]) -> bool:
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return False
    return all(now is old and now._version == version for now, old, version in zip(weights, *kept[:2], strict=True))


def applies(weights: Sequence[Tensor]) -> bool:
    """Whether cuDNN would take weights from one buffer, and nobody records.

    Args:
        weights: The weights and biases of a layer.

    Returns:
        False on other devices, for tensors of several types or devices, and where cuDNN is off.
    """
    first = weights[0]
    if not first.is_cuda or is_recorded() or not is_plain(*weights):
        return False
    if any(weight.dtype is not first.dtype or weight.device != first.device for weight in weights):
        return False
    return torch.backends.cudnn.is_acceptable(first) and cast(Any, torch)._use_cudnn_rnn_flatten_weight()


def layout_of(layer: nn.RNNBase, weights: Sequence[Tensor]) -> Layout:
    """Where torch lays the parameters of a layer.

    Args:
        layer: The layer.
        weights: Its weights and biases.

    Returns:
        The layout of ``flatten_parameters``, read from placeholders.
    """
    from torch.backends.cudnn import rnn

    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(weights[0]):
        places = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
        buffer = cast(Any, torch)._cudnn_rnn_flatten_weight(
            places,
            (4 if layer.bias else 2) + (layer.proj_size > 0),
            layer.input_size,
            rnn.get_cudnn_mode(layer.mode),
            layer.hidden_size,
            layer.proj_size,
            layer.num_layers,
            layer.batch_first,
            bool(layer.bidirectional),
        )
        return Layout(buffer.numel(), tuple(int(place.storage_offset()) for place in places))


class _Flat(torch.autograd.Function):
    """Copies in one buffer; the gradient of each copy is that of its weight."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *weights: Tensor) -> tuple[Tensor, ...]:
        buffer = weights[0].new_empty(layout.entries)
        copies = [
            buffer[offset : offset + weight.numel()].view(weight.shape)
            for offset, weight in zip(layout.offsets, weights, strict=True)
        ]
        cast(Any, torch)._foreach_copy_(copies, [weight.detach() for weight in weights])
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *grads
