"""What a factory of variables holds, and what of it goes into a file."""

from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from deepthin.keras.files import raw_code, raw_of
from deepthin.keras.layout import Layout
from deepthin.keras.weight import ThinWeight
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents, Thin
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
    first = dict[object, str]()
    thin: dict[str, Thin] = {}
    dense: dict[str, Raw] = {}
    aliases: dict[str, str] = {}
    for name, entry in sorted(state.entries.items()):
        if (kept := first.setdefault((id(entry.held), entry.index), name)) != name:
            aliases[name] = kept
        elif not isinstance(entry.held, ThinWeight):
            dense[name] = raw_of(entry.layout.stored(numpy_of(entry.held)))
    for weight in {id(e.held): e.held for e in state.entries.values() if isinstance(e.held, ThinWeight)}.values():
        parts = {first[id(weight), index]: part for index, part in enumerate(weight.parts)}
        thin[next(iter(parts))] = Thin(weight.method_name, weight.method, parts, raw_code(weight))
    for name, (matrix, index) in sorted(state.stored.items()):
        if (kept := first.setdefault((id(matrix), index), name)) != name:
            aliases[name] = kept
        elif isinstance(matrix, Raw):
            dense[name] = matrix
        else:
            parts = list(matrix.parts)
            thin[parts[0]] = matrix
    return Contents(thin, dense, aliases)
