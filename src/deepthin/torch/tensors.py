"""The dense parameters of a model as rules see them, and their codes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError, NonFiniteError
from deepthin.method import Method
from deepthin.plan.encoded import EncodedOnce
from deepthin.plan.file_limit import parts_of
from deepthin.plan.shares import Planned
from deepthin.plan.tensor import Tensor as Named
from deepthin.storage.contents import Thin
from deepthin.torch.exchange import fresh_std, is_transposed, padding_row, why_not
from deepthin.torch.files import as_thin
from deepthin.torch.importance import importance_for
from deepthin.torch.update import updates
from deepthin.torch.weight import ThinWeight

Owners = dict[str, list[tuple[nn.Module, str]]]
"""Parameter name -> the layers that have the parameter, and its name in each; several if it is shared."""


class Encoded(EncodedOnce[Tensor, ThinWeight]):
    """Matrices of a model by their plans, each encoded at most once.

    Args:
        owners: Parameter name -> the layers that have it, as ``tensors_of`` returns them.
        importance: Parameter name -> importance, as in ``compress``.
    """

    def __init__(self, owners: Owners, importance: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.owners, self.importance = owners, importance or {}

    def dense(self, planned: Planned) -> list[Tensor]:
        """The dense parameters of a plan's tensors.

        Args:
            planned: A tensor or a group.

        Returns:
            One parameter for each tensor, not a copy.

        Raises:
            ConfigError: Members of a group differ in dtype, device or in being trainable.
        """
        names = [tensor.name for tensor in planned.tensors]
        dense = [_value(self.owners[name]) for name in names]
        if len({(tensor.dtype, tensor.device, tensor.requires_grad) for tensor in dense}) > 1:
            raise ConfigError(
                f"{', '.join(names)} cannot share a code: they differ in type, device or in being frozen."
            )
        return dense

    def encode(self, planned: Planned, method: Method) -> tuple[ThinWeight, Thin]:
        """Encode a plan's tensors.

        Args:
            planned: A tensor or a group.
            method: The method to encode by, of the plan's shape.

        Returns:
            The weight as a layer uses it, and as a file stores it.

        Raises:
            ConfigError: Members of a group cannot share a code, only some have importance, a tensor is on the meta
                device, or a padding row is not zero.
            NonFiniteError: A weight has a NaN or an infinity.
        """
        dense, importance = self.dense(planned), importance_for(planned, self.importance)
        weight = encode(planned, method, dense, importance)
        return weight, as_thin(weight, [tensor.name for tensor in planned.tensors])


def encode(
    planned: Planned, method: Method, dense: Sequence[Tensor], importance: Sequence[Tensor] | None = None
) -> ThinWeight:
    """Encode the dense values of a plan's tensors.

    Args:
        planned: A tensor or a group.
        method: The method to encode by, of the plan's shape.
        dense: The values of each tensor.
        importance: As in ``ThinWeight.encode``.

    Returns:
        The weight with the nearest code that the method finds.

    Raises:
        ConfigError: A tensor is on the meta device, or a padding row is not zero.
        NonFiniteError: A weight has a NaN or an infinity.
    """
    names, parts = [tensor.name for tensor in planned.tensors], parts_of(planned)
    for name, tensor, part in zip(names, dense, parts, strict=True):
        check_finite(name, tensor)
        if part.zero_row is not None and tensor[part.zero_row].any():
            raise ConfigError(
                f"Row {part.zero_row} of {name} is padding, which a thin table keeps at zero, but it is not zero: set "
                "it to zero, or the layer's padding_idx to None."
            )
    return ThinWeight.encode(planned.name, method, parts, dense, importance)


def tensors_of(model: nn.Module) -> tuple[list[Named], Owners]:
    """The dense parameters of a model, as rules see them.

    Args:
        model: The network; parameters of thin weights are left out.

    Returns:
        One tensor for each parameter, under the first of its names, and the layers that have it by that name.
        ``uncovered`` says why a parameter cannot be thin.

    Raises:
        ConfigError: A lazy parameter has no shape yet, or the model has updates.
    """
    if updates(model):
        raise ConfigError("The model has updates (deepthin.torch.delta): deepthin.torch.merge(model) adds them first.")
    names: dict[int, list[str]] = {}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ThinWeight):
            continue
        for name, parameter in module._parameters.items():
            dotted = f"{path}.{name}".lstrip(".")
            if isinstance(parameter, nn.UninitializedParameter):
                raise ConfigError(f"{dotted} has no shape yet: call the model once, then compress it.")
            if parameter is not None:
                parameters[id(parameter)] = parameter
                names.setdefault(id(parameter), []).append(dotted)
                if not any(layer is module and held == name for layer, held in holders.get(id(parameter), [])):
                    holders.setdefault(id(parameter), []).append((module, name))
    tensors: list[Named] = []
    for key, parameter in parameters.items():
        reasons = [reason for layer, name in holders[key] if (reason := why_not(layer, name))]
        turned = {is_transposed(layer) for layer, _ in holders[key]}
        if len(turned) > 1:
            reasons.append("a tensor shared by layers that keep it in different orders is not covered")
        name, *also = sorted(names[key])  # files keep a shared tensor under the first of its names
        shape = tuple(parameter.shape)
        std = fresh_std(holders[key][0][0], shape) if not reasons and len(shape) > 1 else 1.0
        turned_matrix = turned == {True} and len(shape) == 2
        zero_row = next((row for layer, _ in holders[key] if (row := padding_row(layer)) is not None), None)
        tensors.append(Named(name, shape, "; ".join(reasons), tuple(also), turned_matrix, std, zero_row))
    return tensors, {min(names[key]): held for key, held in holders.items()}


def _value(owner: list[tuple[nn.Module, str]]) -> Tensor:
    return owner[0][0]._parameters[owner[0][1]]  # pyright: ignore[reportReturnType] -- _tensors lists no missing ones


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be encoded.

    Args:
        name: Name of the tensor, for the message.
        weight: Its values.

    Raises:
        ConfigError: The weight is on the meta device.
        NonFiniteError: It has a NaN or an infinity; the message has the value and its index.
    """
    if weight.is_meta:
        raise ConfigError(f"{name} is on the meta device and has no values: load weights first, or use init='scratch'.")
    if not torch.isfinite(weight).all():
        where = tuple((~torch.isfinite(weight)).nonzero()[0].tolist())
        raise NonFiniteError(
            f"{name} is {weight[where].item()} at index {where}: nothing was compressed. Load finite weights first."
        )
