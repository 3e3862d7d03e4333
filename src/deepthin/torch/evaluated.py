"""What evaluation computes once from the state of a weight: floats as its decoder takes them, and decoded tensors.

It counts as current while every entry of the state is the same tensor, with the same memory and the same version, and
no optimiser has taken a step: the time of this check does not depend on sizes. Writes that no version counts, through
``.data`` or NumPy, are seen after the next ``train()`` or ``eval()``. Values are compared instead where the parameters
are what the decoder takes, where an entry has no version or is shared with other processes, and in training mode; but
never on an accelerator, where the host would have to wait: nothing is cached there where versions do not tell.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from deepthin.kernels import products
from deepthin.torch.operators import same_values, short_ways
from deepthin.torch.tracing import is_recorded


class Source(NamedTuple):
    """An entry of the state, as it was. Native code reads these by their order.

    Attributes:
        name: Name of the entry.
        tensor: The parameter or the integers.
        alias: A tensor of the same memory, so that no other gets its address.
        version: How often the tensor had been written to.
        copy: Its values, where these are compared; None where the version is.
        address: Of the alias's memory; 0 where values are compared.
    """

    name: str
    tensor: Tensor
    alias: Tensor
    version: int
    copy: Tensor | None
    address: int


class Evaluated(NamedTuple):
    """What follows from a state. Replaced as a whole, so that no thread sees parts of two states.

    Attributes:
        sources: The entries of the state.
        step: What ``last_step`` returned before they were read.
        floats: The code that the decoder takes.
        dense: Index, or index and type, -> decoded tensor, and its version when it was decoded.
    """

    sources: tuple[Source, ...]
    step: object
    floats: dict[str, Tensor]
    dense: dict[int | tuple[int, torch.dtype], tuple[Tensor, int]]


_last_step: list[object] = [object()]  # native code reads it too


def _stepped(*_: Any) -> None:
    """Fused optimisers write without counting a version."""
    _last_step[0] = object()


register_optimizer_step_post_hook(_stepped)


def last_step() -> object:
    """Identity of the latest step of any optimiser.

    Returns:
        Another object after each step.
    """
    return _last_step[0]


def source(name: str, tensor: Tensor, by_value: bool) -> Source:
    """Note an entry. Its version is read first: a write that is under way raises it when it ends.

    Args:
        name: Name of the entry.
        tensor: The parameter or the integers.
        by_value: Whether to compare values in any case.

    Returns:
        The entry, with a copy where versions do not tell.
    """
    counts = not (by_value or tensor.is_inference() or tensor.is_shared())
    version = tensor._version if counts else 0
    with torch.inference_mode(False), torch.no_grad():
        alias = tensor.detach()
        copy, address = (None, alias.data_ptr()) if counts else (alias.clone(), 0)
        return Source(name, tensor, alias, version, copy, address)


def is_current(held: Evaluated, state: Mapping[str, Tensor], in_training: bool) -> bool:
    """Whether a state is still the one that something was computed from.

    Args:
        held: What was computed.
        state: Entry -> tensor, as now.
        in_training: Whether the weight is in training mode, where values alone tell.

    Returns:
        False where an entry may have changed.
    """
    return held.step is _last_step[0] and all(_same(one, state[one.name], in_training) for one in held.sources)


def _same(old: Source, now: Tensor, in_training: bool) -> bool:
    if old.copy is not None:
        alike = old.copy.dtype == now.dtype and old.copy.device == now.device and not now.is_meta
        return alike and same_values(old.copy, now)
    if in_training or now is not old.tensor or now._version != old.version:
        return False
    return now.data_ptr() == old.address


def _looked_up(attributes: dict[str, Any]) -> Evaluated | None:
    held = attributes.get("_evaluated")
    if held is None or attributes["training"] or held.step is not _last_step[0] or is_recorded():
        return None
    parameters, wanted = attributes["_parameters"], torch.is_grad_enabled()
    for name, tensor, alias, version, copy, _ in held.sources:
        now = parameters.get(name)
        if copy is not None or (attributes.get(name) if now is None else now) is not tensor:
            return None
        if tensor._version != version or (wanted and tensor.requires_grad) or tensor.data_ptr() != alias.data_ptr():
            return None
    return held


current: Callable[[dict[str, Any]], Evaluated | None] = _looked_up
"""What a ThinWeight with these attributes (its ``__dict__``) holds, looked up in native code if there is any; None
where it is not current, in training mode, where a gradient is needed and where someone observes operations. Without
native code it is also None where values have to be compared."""


def _nothing(part: nn.Module, index: int = 0) -> Tensor | None:
    return None


decoded: Callable[..., Tensor | None] = _nothing
"""The decoded tensor of a ThinWeight, by its index, or of a ThinPart, as calling it returns it. None where nothing
current is held, where calling it does more, and where someone observes operations."""

if short_ways:
    products.native().use_steps(_last_step)
    current, decoded = products.native().current, products.native().decoded


def is_trusted(module: nn.Module, name: str) -> bool:
    """Whether versions tell when an entry changes.

    Args:
        module: The weight.
        name: Name of the entry.

    Returns:
        False for what is computed or gathered before each call, in a parameter's place: FSDP writes to such tensors
        without counting a version.
    """
    if getattr(module, "_is_fsdp_managed_module", False):
        return False
    value = module._parameters.get(name)
    return value is not None or not getattr(module, name).is_floating_point()
