"""Initial values of variables: planned, then drawn or encoded."""

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
    """Plan tensors that are all known.

    Args:
        rules: The configuration.
        tensors: All tensors, in the file's layout.

    Returns:
        Name -> plan; None for tensors that stay dense.

    Raises:
        BudgetError: The target is smaller than the smallest plan.
        ConfigError: The rules do not fit the tensors.
    """
    if rules.file_bytes is None:
        plans = plan_tensors(rules, tensors)
    else:
        empty = {t.name: Raw.zeros("F32", t.shape) for t in tensors}
        plans = within(rules.file_bytes, rules, tensors, Contents({}, empty))
    by_name: dict[str, Planned | None] = {tensor.name: None for tensor in tensors}
    for planned in plans:
        by_name |= {tensor.name: planned if planned.method is not None else None for tensor in planned.tensors}
    return by_name


def method_of(planned: Planned) -> Method:
    """The method of a plan that has one.

    Args:
        planned: The plan.

    Returns:
        Its method.

    Raises:
        ValueError: The plan leaves its tensor dense.
    """
    if planned.method is None:
        raise ValueError(f"{planned.tensors[0].name} stays dense.")
    return planned.method


def start_of(planned: Planned, seed: int, given: np.ndarray | None) -> Start:
    """The start of a generated variable.

    Args:
        planned: Its plan.
        seed: Seed of the draw; the generator depends on the name too.
        given: Dense values in the file's layout; None to draw.

    Returns:
        Code and latents: encoded values, drawn factors, or encoded zeros for a drawn vector.

    Raises:
        NonFiniteError: ``given`` has a NaN or an infinity.
    """
    first, method = planned.tensors[0], method_of(planned)
    if given is None and len(first.shape) > 1:
        return start.drawn(method, start.generator(first.name, seed), first.std)
    values = np.zeros(first.shape, np.float32) if given is None else given.astype(np.float32)
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise NonFiniteError(f"{first.name} is {values[where]} at index {where}, outputs first: give finite values.")
    return start.encoded(method, parts_of(planned), [values])


def array_of(name: str, initializer: Any, shape: tuple[int, ...], layout: Layout) -> np.ndarray | None:
    """The values of an initializer that is an array.

    Args:
        name: Name of the variable, for the message.
        initializer: An array, a function or None.
        shape: Shape in the model.
        layout: The permutation to the file's layout.

    Returns:
        The values in the file's layout; None for a function or None.

    Raises:
        ConfigError: The array has another shape.
    """
    if initializer is None or callable(initializer):
        return None
    values = np.asarray(initializer)
    if values.shape != shape:
        raise ConfigError(f"The initializer of {name} has shape {values.shape}, not {shape}.")
    return np.ascontiguousarray(layout.stored(values))


def fresh_values(name: str, shape: tuple[int, ...], layout: Layout, seed: int) -> np.ndarray:
    """Initial values of an ordinary variable.

    Args:
        name: Its name.
        shape: Shape in the model.
        layout: The permutation to the file's layout.
        seed: Seed of the draw; the generator depends on the name too.

    Returns:
        Normal numbers of variance ``0.2 / inputs``, a tenth of He's; zeros for a vector.
    """
    if len(shape) < 2:
        return np.zeros(shape, np.float32)
    std = math.sqrt(0.2 / max(math.prod(layout.shape(shape)[1:]), 1))
    return start.generator(name, seed).normal(scale=std, size=shape)
