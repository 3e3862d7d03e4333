"""The state of a generated weight: floats are parameters; integers and tables are neither parameters nor buffers.

Integers of a code are exact: as buffers they would be truncated by averaging (EMA with buffers) and broadcast at every
step (DDP). They are plain tensors instead, in the smallest type, which follow the parameters from device to device and
stand in state dicts. Tables follow from the method's fields: they are computed on the device that needs them and are
never saved.
"""

import weakref
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepthin.errors import ConfigError
from deepthin.method import Integers, Method
from deepthin.torch.tracing import is_recorded
from deepthin.torch.wrapped import is_sharded, whole

NO_VALUES = "has no values. Load a file or a state dict, or call deepthin.torch.initialise(model, seed)"

_followed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # wrappers whose processes have the same integers


class CodeState(nn.Module):
    """Floats, integers and tables of one generated weight, and their way through state dicts and devices."""

    method: Method
    _empty: "dict[str, tuple[Tensor, int]] | None" = None  # parameters that ``to_empty`` allocated, with their versions
    _held_tables: "tuple[torch.device, dict[str, Tensor]] | None" = None

    def _register(self, state: Mapping[str, Tensor], integers: Mapping[str, Integers]) -> None:
        """Take over the entries of the state: floats as parameters, integers as plain tensors in the smallest type.

        Args:
            state: Entry -> tensor.
            integers: The range of each integer entry.

        Raises:
            ValueError: The method names an entry like an attribute of the weight.
        """
        taken = [entry for entry in state if hasattr(self, entry)]
        if taken:
            raise ValueError(
                f"{type(self).__name__} has an attribute {taken[0]!r} already: the method must call this entry of its "
                "code something else."
            )
        self._entries = tuple(state)
        self._kinds = {entry: integers[entry] for entry in state if entry in integers}
        self._exact = tuple(entry for entry, value in state.items() if not value.is_floating_point())
        for entry, value in state.items():
            if value.is_floating_point():
                self.register_parameter(entry, nn.Parameter(value))
            else:
                setattr(self, entry, value.to(smallest_type(integers[entry])) if entry in integers else value)

    def state(self) -> dict[str, Tensor]:
        """The stored floats and integers, from which all else follows.

        Floats that FSDP holds sharded at this time are gathered: then all its processes must call.

        Returns:
            Entry -> parameter or integer tensor, on one device.

        Raises:
            ConfigError: The weight was allocated by ``to_empty`` and has no values yet.
        """
        if self._empty is not None:
            self._check_filled()
        state = {entry: getattr(self, entry) for entry in self._entries}
        for entry, value in state.items():
            if is_sharded(value):
                state[entry] = whole(value)
        if self._exact and (device := self._device()) is not None:
            for entry in self._exact:
                if state[entry].device != device:
                    state[entry] = self._moved(entry, device)
        return state

    def has_values(self) -> bool:
        """Whether every entry has values: none is on the meta device or freshly allocated by ``to_empty``."""
        try:
            if self._empty is not None:
                self._check_filled()
        except ConfigError:
            return False
        return not any(getattr(self, entry).is_meta for entry in self._entries)

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        """Set every entry of the state: parameters in place, integers in their type and on the floats' device."""
        device = self._device()
        for entry in self._entries:
            now, value = getattr(self, entry), values[entry].detach()
            if entry in self._exact:
                setattr(self, entry, value.to(now.device if device is None else device, now.dtype, copy=True))
            elif is_sharded(now):
                from torch.distributed.tensor import distribute_tensor

                now.copy_(distribute_tensor(value.to(now.device, now.dtype), now.device_mesh, now.placements))
            else:
                now.copy_(value)

    def _device(self) -> torch.device | None:
        """The device of the floats; None for a method without floats."""
        floats = (getattr(self, entry) for entry in self._entries if entry not in self._exact)
        return next((value.device for value in floats), None)

    def _follow_first_rank(self) -> None:
        """In the first training pass of a DistributedDataParallel model, take over the integers of its first process.

        The wrapper does so with parameters when it is made. Codes of different weights also differ in their integers.
        """
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is None or ddp in _followed or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        _followed.add(ddp)
        held = [(m, entry) for m in ddp.module.modules() if isinstance(m, CodeState) for entry in m._exact]
        values = [module._moved(entry, cast(torch.device, module._device())) for module, entry in held]
        joined = torch.cat([value.contiguous().view(-1).view(torch.uint8) for value in values])
        dist.broadcast(joined, group=ddp.process_group, group_src=0)
        for (module, entry), value, sent in zip(held, values, joined.split([v.nbytes for v in values]), strict=True):
            setattr(module, entry, sent.clone().view(value.dtype).view(value.shape))

    def _moved(self, entry: str, device: torch.device) -> Tensor:
        """An integer entry on another device; values are kept while the floats are on the meta device."""
        value = getattr(self, entry)
        if device.type == "meta":
            return value.to(device)
        if value.is_meta:
            raise ConfigError(f"{entry} of {self.extra_repr()} {NO_VALUES}.")
        value = value.to(device)
        if not is_recorded():
            setattr(self, entry, value)
        return value

    def _check_filled(self) -> None:
        """Raise ConfigError while a parameter is as ``to_empty`` allocated it."""
        for entry, (parameter, version) in (self._empty or {}).items():
            if self._parameters.get(entry) is parameter and parameter._version == version:
                raise ConfigError(f"{entry} of {self.extra_repr()} {NO_VALUES}.")
        self._empty = None

    def _apply(self, fn: Any, recurse: bool = True) -> "CodeState":
        was_meta = {entry for entry, value in self._parameters.items() if value is not None and value.is_meta}
        super()._apply(fn, recurse)
        empty: dict[str, tuple[Tensor, int]] = {
            entry: (value, value._version)
            for entry, value in self._parameters.items()
            if entry in was_meta and value is not None and not value.is_meta
        }
        if empty:
            self._empty = empty
        self._prepare_tables()
        return self

    def _derived(self) -> dict[str, Tensor]:
        """The tables, on the device of the floats."""
        device = self._device() or torch.device("cpu")
        held = self._held_tables
        if held is None or held[0] != device:
            tables = {e: torch.from_numpy(np.asarray(t)).to(device) for e, t in self.method.derived().items()}
            held = device, tables
            if not is_recorded():  # what a tracer makes is no table
                self._held_tables = held
        return held[1]

    def _prepare_tables(self) -> None:
        """Compute the tables now, so that no graph records how."""
        device = self._device()
        if device is None or device.type != "meta":
            self._derived()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for entry in self._exact:
            destination[prefix + entry] = getattr(self, entry)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)
        known = {prefix + entry for entry in (*self._exact, *self._derived())}  # 0.1 saved some tables
        unexpected_keys[:] = [key for key in unexpected_keys if key not in known]
        for entry in self._exact:
            if prefix + entry in state_dict:
                self._load_integers(entry, state_dict[prefix + entry], prefix, error_msgs)
            elif strict:
                missing_keys.append(prefix + entry)
        self._prepare_tables()

    def _load_integers(self, entry: str, given: Tensor, prefix: str, error_msgs: list[str]) -> None:
        """Take over an integer entry, or say why the method cannot have it: other weights would be read from it."""
        now, kind = getattr(self, entry), self._kinds.get(entry)
        if tuple(given.shape) != tuple(now.shape) or given.is_floating_point():
            error_msgs.append(
                f"{prefix}{entry} is {tuple(given.shape)}, {given.dtype} in the state dict, but {tuple(now.shape)}, "
                f"{now.dtype} in the model."
            )
            return
        if kind is not None and given.numel() and not given.is_meta:
            least, most = int(given.min()), int(given.max())
            if not kind.least <= least <= most < kind.least + kind.count:
                error_msgs.append(
                    f"{prefix}{entry} holds integers from {least} to {most}; here they are from {kind.least} to "
                    f"{kind.least + kind.count - 1}."
                )
                return
            if kind.rising and bool((given.reshape(-1).long().diff() <= 0).any()):
                error_msgs.append(f"{prefix}{entry} must rise: these are positions.")
                return
        device = self._device()
        value = given.detach().to(now.dtype)
        place = value.device if device is None or device.type == "meta" else device
        setattr(self, entry, value.to(place, copy=True))


def smallest_type(integers: Integers) -> torch.dtype:
    """The smallest integer type that holds every value of a range; of positions, the smallest in which torch indexes.

    Args:
        integers: The range.

    Returns:
        A type of 1, 2, 4 or 8 bytes; unsigned only for one byte, which native code reads. Of positions, 4 or 8 bytes.
    """
    least, most = integers.least, integers.least + integers.count - 1
    for kind in (torch.int32,) if integers.rising else (torch.uint8, torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(kind)
        if info.min <= least and most <= info.max:
            return kind
    return torch.int64
