"""What a native call of thin linear layers reads: their products and the modules that these belong to."""

from typing import Any, cast

import torch.nn.modules.module as module_globals
from torch import nn

from deepthin.kernels import products
from deepthin.torch.operators import short_ways
from deepthin.torch.weight import ThinPart, ThinWeight

if short_ways:
    products.native().use_modules(nn.Module, vars(module_globals), ThinWeight, ThinPart)


def links(layer: nn.Module) -> tuple[Any, ...] | None:
    """What native code needs to compute a thin linear layer, and to see whether it changed.

    Args:
        layer: A linear layer whose attribute ``thin`` maps names to thin weights.

    Returns:
        (native product, group, part, thin, group of the bias, part of the bias, its index); None where the layer has no
        structured product in native code, or a class of weights that native code does not know.
    """
    thin = cast(Any, layer).thin
    if "weight" not in thin:
        return None
    parts = {name: _owner(part) for name, part in thin.items()}
    if any(type(group) is not ThinWeight for group, _, _ in parts.values()):
        return None
    group, part, index = parts["weight"]
    product = group.short_way(index)
    return None if product is None else (product, group, part, thin, *parts.get("bias", (None, None, 0)))


def single_call(layer: nn.Module) -> Any:
    """A native call that does what calling the layer does.

    Args:
        layer: A linear layer whose attribute ``thin`` maps names to thin weights.

    Returns:
        A callable of the layer and its input. It returns None where it does not apply to this call, and NotImplemented
        where it never will again, since modules have changed. False where there is no such call.
    """
    found = links(layer)
    return found is not None and products.native().Single((None, *found), type(layer))


def _owner(part: nn.Module) -> tuple[Any, nn.Module, int]:
    """The group that a thin parameter belongs to, the parameter's module, and its index."""
    return (part.group, part, part.index) if type(part) is ThinPart else (part, part, 0)
