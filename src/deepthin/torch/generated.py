"""The base of thin layers: parameters are properties that decode a ThinWeight."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from deepthin.errors import ConfigError
from deepthin.torch.evaluated import decoded
from deepthin.torch.tracing import as_leaf, is_recorded
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import is_sharded


class GeneratedTensor(Tensor):
    """A decoded weight as a layer hands it out: a tensor that refuses to be written to, since nothing would remember.

    What is computed from it is a plain tensor. A write that cannot be refused, through a view or ``out=``, is told by
    a warning when the tensor is freed.
    """

    __torch_function__ = cast(Any, torch)._C._disabled_torch_function_impl  # as nn.Parameter: no call gets slower
    _is_hf_initialized = True  # transformers leaves it alone
    _described: tuple[str, int] | None = None  # what it is the weight of, and its version when it was handed out

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values, without gradient; as read-only as this tensor."""
        values = cast(Any, Tensor.data).__get__(self)
        values.__class__, values._described = GeneratedTensor, self._described and (self._described[0], values._version)
        return values

    @data.setter
    def data(self, _: Tensor) -> None:
        self._refuse("data = ...")

    def _refuse(self, what: str) -> None:
        raise ConfigError(lost(what, self._described[0] if self._described else "a weight"))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def __del__(self) -> None:
        if self._described is not None and not self.is_inference() and self._version != self._described[1]:
            warnings.warn(lost("A write", self._described[0]), stacklevel=2)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: GeneratedTensor, *_: Any, **__: Any) -> None:
        self._refuse(f"{name}()" if name.endswith("_") and not name.endswith("__") else "A write")

    return refuse


_FINE = {"requires_grad_", "detach_", "share_memory_"}  # these write no values
for _name in dir(Tensor):
    _arithmetic = _name.startswith("__i") and _name.endswith("__") and f"__{_name[3:]}" in dir(Tensor)
    if (_name.endswith("_") and not _name.startswith("_") and _name not in _FINE) or _arithmetic:
        setattr(GeneratedTensor, _name, _refusing(_name))
for _name in ("__setitem__", "set_", "resize_"):
    setattr(GeneratedTensor, _name, _refusing(_name))


def lost(what: str, weight: str) -> str:
    """The message for a write to a generated weight.

    Args:
        what: The write.
        weight: The weight.

    Returns:
        What would be lost, and what to do instead.
    """
    return (
        f"{what} on {weight} is lost: it is generated from its code. Initialise the dense model before compress, or "
        "draw the code anew by the layer's reset_parameters(). To write weights, call deepthin.torch.materialize("
        "model) first, and compress again."
    )


def handed_out(layer: nn.Module, name: str, dense: Tensor, shared: bool = False) -> Tensor:
    """A decoded weight for a layer's user, which refuses writes.

    Args:
        layer: The thin layer.
        name: Name of the parameter in the layer.
        dense: The decoded weight.
        shared: Whether others hold the same tensor, as what evaluation has decoded once.

    Returns:
        The same tensor, whose class is changed; of a shared one an alias. What is no plain tensor, a tracer's say, is
        returned as it is.
    """
    if type(dense) is not Tensor or is_compiling() or is_recorded():
        return dense
    if shared:
        made = dense.as_subclass(GeneratedTensor)
    else:
        dense.__class__, made = GeneratedTensor, cast(GeneratedTensor, dense)
    made._described = f"the {name} of a {type(layer).__name__}", 0 if dense.is_inference() else dense._version
    return made


def value_of(layer: "ThinLayer", name: str) -> Tensor | None:
    """A parameter of a thin layer for its own products: decoded, dense or None.

    Args:
        layer: The layer.
        name: Name of the parameter in the layer.

    Returns:
        A plain tensor, which must not be written to.

    Raises:
        AttributeError: The layer has no such parameter.
    """
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


class Generated(property):
    """A parameter decoded from a ThinWeight, or read from ``_parameters`` while it is dense."""


def generated(name: str) -> Any:
    """Make the property of a thin layer that reads a parameter.

    Args:
        name: Name of the parameter in the layer.

    Returns:
        A ``Generated`` property. Reading gives the decoded tensor; AttributeError if the layer has none of the name.
        Writing to a generated parameter raises ConfigError.
    """

    def read(layer: "ThinLayer") -> Tensor | None:
        dense, thin = value_of(layer, name), layer._modules.get("thin")
        if dense is None or thin is None or name not in thin._modules:
            return dense
        return handed_out(layer, name, dense, shared=True)

    def write(layer: "ThinLayer", value: Tensor | None) -> None:
        if name not in layer._parameters and name in layer.thin:
            raise ConfigError(lost("An assignment", f"the {name} of a {type(layer).__name__}"))
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
            if own in names and not is_sharded(param):
                raise ConfigError(lost("An assignment", f"the {own} of a {type(self).__name__}"))
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
