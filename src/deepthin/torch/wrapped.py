"""Models inside torch's wrappers: DistributedDataParallel, DataParallel, FSDP and compiled modules.

A wrapper holds the parameters that it found, and renames them. Functions that change a model ask ``check_plain``, which
refuses a wrapped one; ``save`` takes the names and whole tensors of the plain model from here.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from deepthin.errors import ConfigError


def check_plain(model: nn.Module, call: str, replaces: bool = True, sharded: bool = False) -> None:
    """Refuse to change a model that is wrapped, or that a wrapper holds.

    Args:
        model: The model that a function is about to change.
        call: The call as the user should write it, with MODEL for the model: ``compress(MODEL, ...)``.
        replaces: Whether Parameter objects are replaced; if not, a model that DistributedDataParallel holds is accepted
            as long as the wrapper is not part of it.
        sharded: Whether a model sharded by ``fully_shard`` is accepted.

    Raises:
        ConfigError: The model is wrapped; the message has the lines to write.
    """
    for name, module in model.named_modules():
        path, inner = f"model.{name}" if name else "model", _inner(module)
        if isinstance(module, DistributedDataParallel):
            raise ConfigError(_ddp_message("ddp", call, type(module).__name__))
        if _is_fsdp1(module) or (not sharded and _is_managed_by_fsdp(module)):
            raise ConfigError(
                f"{path} is sharded by FSDP: no process has its whole parameters. Change the plain model: write "
                f"{call.replace('MODEL', 'model')} before fully_shard(model) or FullyShardedDataParallel(model)."
            )
        if inner:
            raise ConfigError(
                f"{path} is wrapped in {type(module).__name__}, which renames its parameters. Change the plain model: "
                f"write {call.replace('MODEL', f'{path}.{inner}')}."
            )
    if replaces and (wrapper := _wrapper_around(model)) is not None:
        raise ConfigError(_ddp_message("ddp", call, type(wrapper).__name__))


def plain_name(model: nn.Module) -> Callable[[str], str]:
    """How to turn names of a wrapped model into those of the plain one.

    Args:
        model: A model; it, or any module in it, may be wrapped.

    Returns:
        A function: dotted name of a tensor -> the name without wrappers.
    """
    prefixes = [
        (f"{path}.".lstrip("."), f"{path}.{inner}.".lstrip("."))
        for path, module in model.named_modules(remove_duplicate=False)
        if (inner := _inner(module) or ("_checkpoint_wrapped_module" if _is_a(module, "CheckpointWrapper") else ""))
    ]

    def without(name: str) -> str:
        for outer, wrapped in reversed(prefixes):  # inner wrappers first
            if name.startswith(wrapped):
                name = outer + name[len(wrapped) :]
        return name

    return without


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values, gathered from all processes if it is sharded.

    Args:
        tensor: Any tensor. If it is a DTensor, all processes of its mesh must call.

    Returns:
        The tensor itself, or the gathered one, through which gradients are averaged over the processes, as FSDP does.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    sharded = cast(Any, tensor)
    full = sharded.full_tensor(grad_placements=[Partial()] * sharded.device_mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / sharded.device_mesh.size())
    return full


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, whose values are spread over processes.

    Args:
        tensor: Any tensor.

    Returns:
        Whether its values must be gathered.
    """
    return type(tensor).__name__ == "DTensor"


@contextmanager
def gathered(model: nn.Module) -> "Iterator[Callable[[Callable[[], int]], int]]":
    """Make a sharded model's tensors readable, and let one process write for all.

    Args:
        model: A model. If it is sharded, all processes must enter.

    Yields:
        A function that calls another one and returns its result. For a sharded model only the first process of the mesh
        calls it, and its result, or its exception, is that of every process.
    """
    mesh = next((cast(Any, p).device_mesh for p in model.parameters() if is_sharded(p)), None)
    groups: list[Any] = [] if mesh is None else [mesh.get_group(axis) for axis in range(mesh.ndim)]
    fsdp = cast(Any, next((module for module in model.modules() if _is_fsdp1(module)), None))
    if fsdp is None:
        yield lambda write: _by_first(groups, write)
        return
    with fsdp.summon_full_params(model, writeback=False), _copied(model):
        yield lambda write: _by_first([fsdp.process_group], write)


@contextmanager
def _copied(model: nn.Module) -> Iterator[None]:
    """Exchange parameters for copies: FSDP frees the memory of its own, which NumPy must not hold then."""
    held = [(module._parameters, dict(module._parameters)) for module in model.modules()]
    copies = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in model.parameters()}
    for parameters, own in held:
        parameters.update({name: None if p is None else copies[id(p)] for name, p in own.items()})
    try:
        yield
    finally:
        for parameters, own in held:
            parameters.update(own)


def _by_first(groups: list[Any], call: Callable[[], int]) -> int:
    """Call a function in the process that is the first of all groups; the others get its result or exception."""
    result: list[Any] = [None]
    if all(dist.get_rank(group) == 0 for group in groups):
        try:
            result = [call()]
        except Exception as error:
            result = [error]
    for group in groups:
        dist.broadcast_object_list(result, dist.get_global_rank(group, 0), group)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _inner(module: nn.Module) -> str:
    """The attribute by which a wrapper holds the module that it wraps, as in names of tensors; empty for all others."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return "module"
    if _is_fsdp1(module):
        return "_fsdp_wrapped_module"
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported before something is compiled
    return "_orig_mod" if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else ""


def _is_fsdp1(module: nn.Module) -> bool:
    return _is_a(module, "FullyShardedDataParallel")


def _is_a(module: nn.Module, name: str) -> bool:
    """Whether a module is of a class of torch that need not have been imported."""
    return any(base.__name__ == name and base.__module__.startswith("torch.") for base in type(module).__mro__)


def _is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP shards parameters of a module, by ``fully_shard`` or from a wrapper around it."""
    return bool(getattr(module, "_is_fsdp_managed_module", False)) or any(map(is_sharded, module.parameters(False)))


def _wrapper_around(model: nn.Module) -> nn.Module | None:
    """The DistributedDataParallel that holds a model; None if there is none any more."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    modules = set(model.modules())

    def holds(thing: Any) -> bool:
        return issubclass(type(thing), DistributedDataParallel) and not modules.isdisjoint(thing.module.modules())

    if not any(map(holds, gc.get_objects())):
        return None
    gc.collect()  # a wrapper that was deleted is part of reference cycles
    return next(filter(holds, gc.get_objects()), None)


def _ddp_message(path: str, call: str, kind: str) -> str:
    return (
        f"The model is inside {kind}, which goes on with the parameters that it found, so that replicas would drift "
        f"apart. Change the plain model, then wrap it again: write model = {path}.module; del {path}; "
        f"{call.replace('MODEL', 'model')}; {path} = {kind}(model)."
    )
