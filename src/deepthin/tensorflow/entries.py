"""The state of a factory of variables, and its contents as a file has them."""

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
    """What a name refers to: a tensor of a thin weight, or an ordinary variable.

    Attributes:
        held: The ``Weight`` or ``tf.Variable``.
        index: Which of the weight's tensors.
        shape: Shape in the model.
        layout: The permutation from the model's axes to the file's.
        dtype: Name of the tensor's dtype.
        asked: The rules and the seed that it was made by.
    """

    held: Any
    index: int
    shape: tuple[int, ...]
    layout: Layout
    dtype: str
    asked: "Asked"

    def value(self) -> Any:
        """The tensor, from the present values of its variables.

        Returns:
            A dense tensor in the model's layout.
        """
        if not isinstance(self.held, ThinWeight):
            return tf.convert_to_tensor(self.held)
        return self.layout.restored(self.held.dense(self.index), self.shape, keras.ops)


@dataclass
class State:
    """The state of a factory, kept apart from attributes that TensorFlow tracks.

    Attributes:
        asked: The factory's rules and seed.
        outputs_first: Patterns of names whose shapes are (outputs, inputs).
        entries: Dotted name -> entry.
        planned: Dotted name -> plan, where all shapes were given up front; None for dense tensors.
        stored: Of a loaded file: dotted name -> matrix and index of the tensor in it, for names not asked for yet.
    """

    asked: "Asked"
    outputs_first: tuple[str, ...]
    entries: dict[str, Entry] = field(default_factory=dict)
    planned: "dict[str, Planned | None] | None" = None
    stored: "dict[str, tuple[Thin | Raw, int]]" = field(default_factory=dict)


Asked = tuple[Rules | None, int]
"""The rules and the seed that a variable is made by."""


def contents(state: State) -> Contents:
    """Everything that ``save`` writes, including tensors of a loaded file that were not asked for yet.

    Args:
        state: The factory's state.

    Returns:
        References to the variables, which are read when they are written.
    """
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
    """A variable as a file stores it; its values are read only when they are written."""
    shape = entry.layout.shape(entry.shape)
    return read_late(entry.held.dtype.base_dtype.name, shape, lambda: entry.layout.stored(numpy_of(entry.held)))
