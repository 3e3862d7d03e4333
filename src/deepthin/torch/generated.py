"""The base of thin layers: parameters are properties that decode a ThinWeight."""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from deepthin.errors import ConfigError
from deepthin.torch.evaluated import decoded
from deepthin.torch.tracing import as_leaf
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import is_sharded


class Generated(property):
    """A parameter decoded from a ThinWeight, or read from ``_parameters`` while it is dense."""


def generated(name: str) -> Any:
    """Make the property of a thin layer that reads a parameter.

    Args:
        name: Name of the parameter in the layer.

    Returns:
        A ``Generated`` property. Reading gives the decoded tensor; AttributeError if the layer has none of the name.
        Writing to a generated parameter raises AttributeError.
    """

    def read(layer: "ThinLayer") -> Tensor | None:
        thin = layer._modules.get("thin")
        part = None if thin is None else thin._modules.get(name)
        if part is not None:
            dense = None if is_compiling() else decoded(part)
            return part() if dense is None else dense
        if name in layer._parameters:
            return layer._parameters[name]
        if name in layer.__dict__:
            return layer.__dict__[name]
        raise AttributeError(f"{type(layer).__name__} has no {name!r}.")

    def write(layer: "ThinLayer", value: Tensor | None) -> None:
        if name not in layer._parameters and name in layer.thin:
            raise AttributeError(f"{name!r} is generated: train or load the thin code.")
        if value is None:
            layer._parameters[name] = None
        else:  # a plain tensor, as DataParallel and FSDP set it; Parameters are registered instead
            layer.__dict__[name] = value

    def delete(layer: "ThinLayer") -> None:
        if name not in layer.__dict__:
            raise AttributeError(f"{type(layer).__name__} has no {name!r} that can be deleted.")
        del layer.__dict__[name]

    return Generated(
        read, write, delete, doc=f"The {name}, decoded where it is stored thin. Read-only: train or load the thin code."
    )


class ThinLayer(nn.Module):
    """Base of all thin layers.

    Attributes:
        thin: An ``nn.ModuleDict``: parameter name -> the ThinWeight or ThinPart that generates it.
    """

    thin: dict[str, ThinWeight | ThinPart]  # an nn.ModuleDict, which cannot be annotated with the type of its values

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse to replace a generated parameter, as fusion with batch normalisation and tensor parallelism do.

        Args:
            name: Name in the layer.
            param: The parameter.

        Raises:
            ConfigError: The parameter of this name is generated, or tensor parallelism begins to divide the layer.
        """
        thin = self._modules.get("thin")
        names = [] if thin is None else list(thin._modules)
        own = name.removeprefix("thin.").partition(".")[0]
        if names and param is not None and (own in names or is_sharded(param)):
            raise ConfigError(
                f"{own if own in names else names[0]} of the {type(self).__name__} is generated from its code, and a "
                "dense or sharded parameter cannot replace it. Call deepthin.torch.materialize(model) first."
            )
        super().register_parameter(name, param)

    def __init_subclass__(cls) -> None:
        """Make layers that run torch's code leaves for torch.fx, as torch's own layers are."""
        super().__init_subclass__()
        if "forward" in vars(cls):
            return
        plain = cls.forward

        @functools.wraps(plain)
        def forward(self: ThinLayer, *args: Any, **kwargs: Any) -> Any:
            leaf = as_leaf(self, *args, **kwargs)
            return plain(self, *args, **kwargs) if leaf is None else leaf

        cls.forward = forward

    def reset_parameters(self) -> None:
        """Draw all values anew: codes as ``ThinWeight.reset_parameters`` does, dense tensors as torch's layer does."""
        for weight in self.thin.values():
            (weight.group if isinstance(weight, ThinPart) else weight).reset_parameters()
        thin_class, thin = type(self), self._modules.pop("thin")
        plain = next(base for base in thin_class.__mro__ if not issubclass(base, ThinLayer))
        reset = getattr(plain, "reset_parameters", None) or getattr(plain, "_reset_parameters", None)
        try:
            self.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue] -- a class of the same layout
            for name, weight in cast("dict[str, ThinWeight | ThinPart]", thin).items():
                shape = (
                    weight.group.parts[weight.index].shape if isinstance(weight, ThinPart) else weight.parts[0].shape
                )
                self._parameters[name] = nn.Parameter(torch.empty(shape, device="meta"))  # nothing is written to it
            if reset is not None:
                reset(self)
            elif self._parameters.get("bias") is not None:  # Hugging Face's Conv1D
                nn.init.zeros_(cast(Tensor, self._parameters["bias"]))
        finally:
            for name in cast(Any, thin):
                self._parameters.pop(name, None)
            self.__class__ = thin_class
            self._modules["thin"] = thin
