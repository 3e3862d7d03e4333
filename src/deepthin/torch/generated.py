"""Parameters that are read from what generates them: what all thin layers share."""

from typing import Any, cast

from torch import Tensor, nn

from deepthin.torch.weight import ThinPart, ThinWeight


class Generated(property):
    """A parameter that is read from what generates it, or, while it is dense, from where torch keeps it."""


def generated(name: str) -> Any:
    """The property of a thin layer that reads a weight of this name."""

    def read(layer: "ThinLayer") -> Tensor | None:
        thin = layer._modules.get("thin")
        if thin is not None and name in thin._modules:
            return layer.thin[name]()
        if name in layer._parameters:
            return layer._parameters[name]
        raise AttributeError(f"{type(layer).__name__} has no {name!r}.")

    def write(
        layer: "ThinLayer", value: Tensor | None
    ) -> None:  # DataParallel's replicas, whose tensors are no parameters
        if name not in layer._parameters and name in layer.thin:
            raise AttributeError(f"{name!r} is generated: train or load the thin code.")
        layer._parameters[name] = cast(nn.Parameter, value)

    return Generated(
        read, write, doc=f"The {name}, decoded where it is stored thin. Read-only: train or load the thin code."
    )


class ThinLayer(nn.Module):
    """What all thin layers share: ``thin`` maps a parameter's name to what generates it."""

    thin: dict[str, ThinWeight | ThinPart]  # in truth an nn.ModuleDict, whose annotations forget what it holds
