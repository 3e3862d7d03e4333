"""What a factory of variables holds, and what of it goes into a file."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from deepthin.keras.files import as_thin, read_late
from deepthin.keras.layout import Layout
from deepthin.keras.weight import ThinWeight
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents, Thin
from deepthin.storage.held import contents_of
from deepthin.tensorflow.host import numpy_of


@dataclass(frozen=True)
class Entry:
    """What a name stands for: a tensor of a thin weight, or a variable as TensorFlow has it."""

    held: Any  # _Weight or tf.Variable
    index: int
    shape: tuple[int, ...]  # as the model has it
    layout: Layout
    dtype: str
    asked: "Asked"

    def value(self) -> Any:
        """The tensor, as it is now."""
        if not isinstance(self.held, ThinWeight):
            return tf.convert_to_tensor(self.held)
        return self.layout.kept(self.held.dense(self.index), self.shape, keras.ops)


@dataclass
class State:
    """What a factory knows, where TensorFlow's tracking does not look."""

    asked: "Asked"
    outputs_first: tuple[str, ...]
    entries: dict[str, Entry] = field(default_factory=dict)
    planned: "dict[str, Planned | None] | None" = None  # by name, where all shapes were given
    stored: "dict[str, tuple[Thin | Raw, int]]" = field(default_factory=dict)  # of a file, what nobody asked for yet


Asked = tuple[Rules | None, int]
"""The rules and the seed by which something is made."""


def contents(state: State) -> Contents:
    """All that a factory would save, and what of a file nobody asked for yet."""
    thin: dict[str, tuple[ThinWeight | Thin, int]] = {}
    dense: dict[str, tuple[int, Raw]] = {}
    for name, entry in state.entries.items():
        if isinstance(entry.held, ThinWeight):
            thin[name] = (entry.held, entry.index)
        else:
            dense[name] = (id(entry.held), _raw(entry))
    for name, (matrix, index) in state.stored.items():
        if isinstance(matrix, Raw):
            dense[name] = (id(matrix), matrix)
        else:
            thin[name] = (matrix, index)
    return contents_of(thin, dense, _as_thin)


def _as_thin(matrix: ThinWeight | Thin, names: Sequence[str]) -> Thin:
    if isinstance(matrix, ThinWeight):
        return as_thin(matrix, names)
    return dataclasses.replace(matrix, parts=dict(zip(names, matrix.parts.values(), strict=True)))


def _raw(entry: Entry) -> Raw:
    """A variable as a file has it, which is read when it is written."""
    shape = entry.layout.shape(entry.shape)
    return read_late(entry.held.dtype.base_dtype.name, shape, lambda: entry.layout.stored(numpy_of(entry.held)))
