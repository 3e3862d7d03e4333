"""A thin update of a frozen tensor: what a layer of an adapted model adds to its base's weight.

An update is a parametrisation of torch (``torch.nn.utils.parametrize``): the layer's tensor is the frozen one plus the
decoded update, wherever the layer reads it.
"""

import hashlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepthin.torch.exchange import parameter_names
from deepthin.torch.weight import ThinPart, ThinWeight

BASE = "deepthin.base"
"""Name under which a file of updates has the hash of their base."""
HASH_BYTES = 16
_ORIGINAL = ".original"


class Update(nn.Module):
    """Adds a thin weight to a frozen tensor.

    Args:
        thin: What decodes to the update.
        base: Hash of the base, as ``base_hash`` returns it.

    Attributes:
        thin: What decodes to the update.
        base: Hash of the base.
    """

    def __init__(self, thin: ThinWeight | ThinPart, base: bytes) -> None:
        super().__init__()
        self.thin, self.base = thin, base

    def forward(self, original: Tensor) -> Tensor:
        """The adapted tensor.

        Args:
            original: The frozen tensor of the base.

        Returns:
            Its sum with the decoded update, of the same shape.
        """
        return original + self.thin()


def install(layer: nn.Module, name: str, update: Update) -> None:
    """Let a layer add an update to one of its parameters.

    Args:
        layer: A plain layer of torch.
        name: Name of the parameter in it.
        update: The update, of the parameter's shape.
    """
    parametrize.register_parametrization(layer, name, update, unsafe=True)
    if isinstance(layer, nn.RNNBase) and _gather not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_gather)
        layer.register_forward_hook(_release, always_call=True)
        _release(layer)


def uninstall(layer: nn.Module, name: str) -> nn.Parameter:
    """Undo ``install``: the layer has the base's parameter again.

    Args:
        layer: A layer with an update of this parameter.
        name: Name of the parameter.

    Returns:
        The base's parameter.
    """
    parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
    parameter = cast(nn.Parameter, layer._parameters[name])
    if parametrize.is_parametrized(layer):
        return parameter
    for own in parameter_names(layer):  # optimiser states go by the order
        if own in layer._parameters:
            layer._parameters[own] = layer._parameters.pop(own)
    if isinstance(layer, nn.RNNBase):
        for hooks, hook in ((layer._forward_pre_hooks, _gather), (layer._forward_hooks, _release)):
            for key in [key for key, value in hooks.items() if value is hook]:
                del hooks[key]
        layer._init_flat_weights()
    return parameter


def updates(model: nn.Module) -> dict[str, tuple[nn.Module, str, Update]]:
    """The updates of a model.

    Args:
        model: Any model.

    Returns:
        Name of the tensor in the base -> its layer, its name in the layer, and the update. A shared tensor appears
        under each of its names.
    """
    found: dict[str, tuple[nn.Module, str, Update]] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(layer):
            for name, steps in cast(Any, layer).parametrizations.items():
                if (update := next((step for step in steps if isinstance(step, Update)), None)) is not None:
                    found[f"{path}.{name}".lstrip(".")] = (layer, name, update)
    return found


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and saved buffers of the base, with or without updates on it.

    Args:
        model: Any model.

    Returns:
        Name in the plain base's state dict -> tensor.
    """
    held = updates(model)
    inside = {
        f"{name.rpartition('.')[0]}.parametrizations.{own}.".lstrip("."): name for name, (_, own, _) in held.items()
    }
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        prefix = next((prefix for prefix in inside if key.startswith(prefix)), None)
        if prefix is None:
            tensors[key] = tensor
        elif key == prefix.rstrip(".") + _ORIGINAL:
            tensors[inside[prefix]] = tensor
    return tensors


def base_hash(model: nn.Module) -> bytes:
    """What identifies a base: the first 16 bytes of the SHA-256 of names, types, shapes and values.

    Args:
        model: The base, with or without updates on it; all of its tensors have values.

    Returns:
        16 bytes; the same on every device.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model).items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.digest()[:HASH_BYTES]


def _gather(layer: nn.RNNBase, *_: Any) -> None:
    """A recurrent layer's forward pass reads a list of its weights: fill it with the adapted ones."""
    layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]


def _release(layer: nn.RNNBase, *_: Any) -> None:
    """Empty the list again: what it holds belongs to one graph, and a copy of the model could not have it."""
    layer._flat_weights = [None for _ in layer._flat_weights_names]
