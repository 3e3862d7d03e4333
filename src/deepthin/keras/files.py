"""Keras models to ``.thin`` files and back, in torch's layouts: files cross (docs/keras.md)."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import layers, ops

from deepthin.keras.exchange import exchange_recurrent, make_plain, make_thin, why_not
from deepthin.keras.generated import ThinLayer
from deepthin.keras.layout import fresh_std
from deepthin.keras.tree import Held, layer_name, renumbered, tensors, walk
from deepthin.keras.weight import ThinWeight
from deepthin.storage.arrays import Buffer, Raw, dtype_name, pieces_of
from deepthin.storage.budget import model_bytes
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.decoding import check_weights
from deepthin.storage.held import Place, check_places, contents_of, names_of
from deepthin.storage.names import check_names, renamed, shapes_of
from deepthin.storage.read import read
from deepthin.storage.write import Version, write

COUNTER = ".num_batches_tracked"  # of torch's batch normalisation; Keras has no such counter


def save(
    model: keras.Model,
    path: str | Path,
    max_bytes: int | None = None,
    *,
    finite: bool = True,
    format: Version = 2,
) -> int:
    """Write all weights to a ``.thin`` file. Seed generators, optimisers and states of recurrent layers are left out.

    The file is written to a temporary name and renamed, so that an interrupted call leaves no partial file.

    Args:
        model: A built model, dense or thin.
        path: The file to write; an existing one is replaced.
        max_bytes: Upper bound on the size of the file in bytes; None for no bound.
        finite: Whether to refuse NaN and infinity, as ``load`` does.
        format: Version of the file's format. Version 1, which is larger, is for readers that know no other.

    Returns:
        The size of the file in bytes.

    Raises:
        BudgetError: The file would exceed ``max_bytes``. Nothing is written.
        ConfigError: Integers of a code are such that ``load`` would refuse them. Nothing is written.
        NonFiniteError: A tensor holds NaN or infinity, and ``finite``. Nothing is written.
        ValueError: A tensor's name is reserved or ambiguous in the file, or a variable changed during the call.
        OSError: The file cannot be written.
    """
    return write(contents(model), path, max_bytes, finite=finite, version=format)


def load(
    model: keras.Model,
    path: str | Path,
    names: Mapping[str, str] | None = None,
    *,
    max_bytes: int | None = None,
    finite: bool = True,
) -> keras.Model:
    """Load a ``.thin`` file into a model, in place; layers whose matrices are stored compressed become thin.

    Where names differ only in the numbers that Keras appends to unnamed layers, layers are matched in order.

    Args:
        model: A built model with the architecture that was saved, dense or thin.
        path: The file; it may have been saved by torch.
        names: Name in the file -> name in the model, for names that differ. Two biases that are mapped to one, as those
            of torch's LSTM, are added.
        max_bytes: Upper bound on the memory that the file may take beyond a few times its size, in bytes. None: 128
            for each number that the model has, and 64 MiB at least (docs/format.md).
        finite: Whether to refuse NaN and infinity in tensors that are stored as they are. In compressed ones they are
            refused in any case.

    Returns:
        The same model.

    Raises:
        ConfigError: Names, shapes or dtypes of the file and the model do not match. The model is unchanged.
        FormatError: The file is damaged, is not a ``.thin`` file, takes more than ``max_bytes``, or is not finite.
        OSError: The file cannot be read.
    """
    held = tensors(model)
    limit = model_bytes(sum(math.prod(tensor.shape) for tensor in held.values())) if max_bytes is None else max_bytes
    stored = _fitted(read(path, limit, finite=finite, decoded=True), names or {}, held, model, str(path))
    check_names(
        shapes_of(stored), {name: tensor.layout.shape(tensor.shape) for name, tensor in held.items()}, str(path)
    )
    check_places(stored, {name: _place(tensor) for name, tensor in held.items()}, str(path))
    check_weights(stored, str(path), {name: _largest_of(held[next(iter(t.parts))]) for name, t in stored.thin.items()})

    sharing: dict[str, list[str]] = {}
    for alias, target in stored.aliases.items():
        sharing.setdefault(target, []).append(alias)
    wanted = {
        name: (thin, index)
        for thin in stored.thin.values()
        for index, part in enumerate(thin.parts)
        for name in (part, *sharing.get(part, ()))
    }
    if {name for name, tensor in held.items() if tensor.thin} != wanted.keys() or not all(
        _plan_of(held[name].thin) == _plan_of(thin) and held[name].index == index
        for name, (thin, index) in wanted.items()
    ):
        restart = Restart(model)
        for layer in [layer for _, layer in walk(model)]:
            if isinstance(layer, ThinLayer):
                make_plain(layer)
        held = tensors(model)
        made = {first: _thin_weight(thin, held[first]) for first, thin in stored.thin.items()}
        for name, (thin, index) in wanted.items():
            for place in held[name].places:
                if not isinstance(place.layer, ThinLayer) or place.weight not in place.layer.thin:
                    weight = made[next(iter(thin.parts))]
                    make_thin(place.layer, {place.weight: (weight, index)}, {place.weight: held[name].variable})
        restart()
        held = tensors(model)
    for first, thin in stored.thin.items():
        held[first].thin.set_code({entry: raw.numpy() for entry, raw in thin.code.items()})  # pyright: ignore[reportOptionalMemberAccess]
    for name in names_of(stored, stored.dense):
        _put(held[name], stored.dense[stored.aliases.get(name, name)].numpy())
    return model


def contents(model: keras.Model) -> Contents:
    """Everything that ``save`` writes, in the layouts of the file: thin and dense tensors, and shared names.

    Args:
        model: A built model, dense or thin.

    Returns:
        References to the model's variables, which are read when they are written: valid until the model changes.
    """
    held = tensors(model)
    thin = {name: (tensor.thin, tensor.index) for name, tensor in held.items() if tensor.thin is not None}
    dense = {name: (tensor.key, _raw(tensor)) for name, tensor in held.items() if tensor.thin is None}
    return contents_of(thin, dense, as_thin)


def as_thin(weight: ThinWeight, names: Sequence[str]) -> Thin:
    """A thin weight as a file stores it.

    Args:
        weight: The weight of one tensor or of a group.
        names: Names of its tensors, in the order of ``weight.parts``.

    Returns:
        The method, the parts by name, and the code.
    """
    code = {entry: raw_of(array) for entry, array in weight.code().items()}
    return Thin(weight.method_name, weight.method, dict(zip(names, weight.parts, strict=True)), code)


def _raw(held: Held) -> Raw:
    """A variable as a file stores it; its values are read only when they are written."""
    kind = keras.backend.standardize_dtype(held.variable.dtype)
    return read_late(kind, held.layout.shape(held.shape), lambda: held.layout.stored(_array(held.variable)))


def read_late(kind: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> Raw:
    """A stored tensor whose values are read only when they are needed.

    Args:
        kind: Keras' name of the dtype, such as ``"float32"`` or ``"bfloat16"``.
        shape: Shape in the file's layout.
        read: Returns the values, of that dtype and shape; called once for each pass over the tensor.

    Returns:
        The tensor for ``Contents``.
    """
    item_bytes = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind).itemsize

    def pieces() -> Iterator[Buffer]:
        return pieces_of(read(), item_bytes, lambda array: raw_of(array).data)

    return Raw("BF16" if kind == "bfloat16" else dtype_name(np.dtype(kind)), shape, pieces)


class Restart:
    """Restarts what refers to a model's old variables: its optimiser, and its compiled functions.

    Construct it before the variables are replaced, so that an optimiser that cannot be rebuilt fails before the model
    changes; call it afterwards.

    Args:
        model: The model, compiled or not.
    """

    def __init__(self, model: Any) -> None:
        self.model, optimizer = model, getattr(model, "optimizer", None)
        self.optimizer: Any = None
        if optimizer is not None and optimizer.built:
            self.optimizer = type(optimizer).from_config(optimizer.get_config())

    def __call__(self) -> None:
        """Rebuild the optimiser with the new variables, and discard the compiled functions."""
        for _, layer in walk(self.model):
            exchange_recurrent(layer)
            if hasattr(layer, "_torch_params"):  # of the torch backend, whose parameters() uses it
                layer._track_variables()
        if self.optimizer is not None:
            self.optimizer.build(self.model.trainable_variables)
            self.model.optimizer = self.optimizer
        for function in ("train_function", "test_function", "predict_function"):
            if getattr(self.model, function, None) is not None:
                setattr(self.model, function, None)


def _fitted(stored: Contents, names: Mapping[str, str], held: Mapping[str, Held], model: Any, path: str) -> Contents:
    """A file's contents under the names of the model."""
    stored, names = _added(stored, names, held)
    stored = renamed(stored, names, path)
    dense = {name: raw for name, raw in stored.dense.items() if name in held or not name.endswith(COUNTER)}
    thin = {key: dataclasses.replace(t, parts=upright(t.parts)) for key, t in stored.thin.items()}
    stored = Contents(thin, dense, stored.aliases)
    known = shapes_of(stored)
    if known.keys() != held.keys():
        other = renumbered(model, known)
        if {other.get(name, name) for name in known} == held.keys():
            return renamed(stored, other, path)
    return stored


def upright(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Parts whose shapes are (outputs, inputs), also where the saved model kept (inputs, outputs).

    Args:
        parts: Tensor name -> part, as a file stores it.

    Returns:
        The same parts; transposed ones with their shape reversed and ``transposed`` False.
    """
    return {
        n: dataclasses.replace(p, shape=p.shape[::-1], transposed=False) if p.transposed else p
        for n, p in parts.items()
    }


def _added(stored: Contents, names: Mapping[str, str], held: Mapping[str, Held]) -> tuple[Contents, Mapping[str, str]]:
    """Add up the biases of a file that map to one bias of an LSTM or SimpleRNN, which only uses their sum."""
    targets: dict[str, list[str]] = {}
    for name, target in names.items():
        targets.setdefault(target, []).append(name)
    dense, left = dict(stored.dense), dict(names)
    for target, sources in targets.items():
        cell = held[target].places[0].layer if target in held else None
        biases = isinstance(cell, layers.LSTMCell | layers.SimpleRNNCell) and held[target].places[0].weight == "bias"
        if len(sources) > 1 and biases and all(name in dense for name in sources):
            values = [dense[name].numpy() for name in sources]
            if len({(array.shape, array.dtype) for array in values}) == 1:
                for name in sources[1:]:
                    del dense[name], left[name]
                dense[sources[0]] = Raw.of(np.sum(values, axis=0, dtype=values[0].dtype))
    return Contents(stored.thin, dense, stored.aliases), left


def _plan_of(matrix: ThinWeight | Thin | None) -> tuple[object, ...]:
    if matrix is None:
        return ()
    if isinstance(matrix, ThinWeight):
        return matrix.method_name, matrix.method, *matrix.parts
    return matrix.name, matrix.method, *matrix.parts.values()


def _thin_weight(thin: Thin, first: Held) -> ThinWeight:
    """A ThinWeight of zeros, in the dtype of the variable that it replaces."""
    name, parts = layer_name(next(iter(thin.parts))), list(thin.parts.values())
    kind, shape = keras.backend.standardize_dtype(first.variable.dtype), parts[0].shape
    std = fresh_std(first.places[0].layer, shape) if len(shape) > 1 else 1.0
    return ThinWeight(thin.name, thin.method, parts, name=name, dtype=kind, std=std)


def _largest_of(held: Held) -> float:
    """The largest finite number of the type in which the model has a tensor."""
    kind = held.thin.variable_dtype if held.thin is not None else held.variable.dtype
    return float(ml_dtypes.finfo(keras.backend.standardize_dtype(kind)).max)


def _place(held: Held) -> Place:
    """A tensor of the model, as ``check_places`` compares it with the file."""
    if held.thin is not None:
        return Place(held.key, "real")
    real = "float" in keras.backend.standardize_dtype(held.variable.dtype)
    reasons = (why_not(place.layer, place.weight, held.variable) for place in held.places)
    return Place(held.key, "real" if real else "whole", next(filter(None, reasons), ""))


def _put(held: Held, values: np.ndarray) -> None:
    """Assign a tensor of the file to its variable."""
    weight = held.layout.restored(values, held.shape)
    if held.layout.row is not None:
        whole = _array(held.variable).copy()
        whole[held.layout.row] = weight
        weight = whole
    held.variable.assign(weight)


def _array(variable: Any) -> np.ndarray:
    """The values in the variable's own dtype, bfloat16 included."""
    array = np.asarray(ops.convert_to_numpy(variable))
    return array.astype(ml_dtypes.bfloat16) if keras.backend.standardize_dtype(variable.dtype) == "bfloat16" else array


def raw_of(array: np.ndarray) -> Raw:
    """An array as a file stores it.

    Args:
        array: Values of a NumPy dtype, or of ``ml_dtypes.bfloat16``.

    Returns:
        The tensor for ``Contents``.
    """
    if array.dtype == ml_dtypes.bfloat16:
        return Raw("BF16", array.shape, Raw.of(np.ascontiguousarray(array).view(np.uint16)).data)
    return Raw.of(array)
