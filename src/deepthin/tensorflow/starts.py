"""How a variable begins: planned, then drawn or encoded."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepthin.errors import ConfigError, NonFiniteError
from deepthin.keras.layout import Layout
from deepthin.method import Method
from deepthin.plan import start
from deepthin.plan.file_limit import parts_of, within
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned, plan_tensors
from deepthin.plan.start import Start
from deepthin.plan.tensor import Tensor
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents


def plan_all(rules: Rules, tensors: Sequence[Tensor]) -> "dict[str, Planned | None]":
    """By name, what becomes of tensors that are all known."""
    if rules.file_bytes is None:
        plans = plan_tensors(rules, tensors)
    else:
        empty = {t.name: Raw.zeros("F32", t.shape) for t in tensors}
        plans = within(rules.file_bytes, rules, tensors, Contents({}, empty))
    found: dict[str, Planned | None] = {tensor.name: None for tensor in tensors}
    for planned in plans:
        found |= {tensor.name: planned if planned.method is not None else None for tensor in planned.tensors}
    return found


def method_of(planned: Planned) -> Method:
    """The method of a plan that has one."""
    if planned.method is None:
        raise ValueError(f"{planned.tensors[0].name} stays dense.")
    return planned.method


def start_of(planned: Planned, seed: int, given: np.ndarray | None) -> Start:
    """The start of a code: of a value in the file's order, or drawn; in one dimension, zeros."""
    first, method = planned.tensors[0], method_of(planned)
    if given is None and len(first.shape) > 1:
        return start.drawn(method, start.generator(first.name, seed), first.std)
    values = np.zeros(first.shape, np.float32) if given is None else given.astype(np.float32)
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise NonFiniteError(f"{first.name} is {values[where]} at index {where}, outputs first: give finite values.")
    return start.encoded(method, parts_of(planned), [values])


def array_of(name: str, initializer: Any, shape: tuple[int, ...], layout: Layout) -> np.ndarray | None:
    """The values of an initializer that is no function, in the file's order."""
    if initializer is None or callable(initializer):
        return None
    values = np.asarray(initializer)
    if values.shape != shape:
        raise ConfigError(f"The initializer of {name} has shape {values.shape}, not {shape}.")
    return np.ascontiguousarray(layout.stored(values))


def fresh_values(name: str, shape: tuple[int, ...], layout: Layout, seed: int) -> np.ndarray:
    """A start of what is not generated."""
    if len(shape) < 2:
        return np.zeros(shape, np.float32)
    std = math.sqrt(0.2 / max(math.prod(layout.shape(shape)[1:]), 1))
    return start.generator(name, seed).normal(scale=std, size=shape)
