"""From a dense Keras model to a thin one, in place, and back."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from deepthin.errors import ConfigError, NonFiniteError
from deepthin.keras.exchange import make_plain, make_thin, why_not
from deepthin.keras.files import Restart, as_thin, contents
from deepthin.keras.generated import ThinLayer
from deepthin.keras.layout import fresh_std
from deepthin.keras.tree import Held, layer_name, steady, tensors, walk
from deepthin.keras.weight import ThinWeight
from deepthin.method import Method
from deepthin.plan.encoded import EncodedOnce
from deepthin.plan.file_limit import parts_of, planned_contents, projecting, within
from deepthin.plan.parse import Source, with_target
from deepthin.plan.rules import Rules, refuse_twice
from deepthin.plan.shares import Planned, plan_tensors
from deepthin.plan.start import generator, pieces_of, relative_error
from deepthin.plan.tensor import Tensor
from deepthin.storage.contents import Thin
from deepthin.storage.report import Report, report_of


class Encoded(EncodedOnce[np.ndarray, ThinWeight]):
    """Matrices of a model by their plans, each encoded at most once.

    Args:
        held: Name -> tensor of the model, as ``tensors`` returns them.
    """

    def __init__(self, held: Mapping[str, Held]) -> None:
        super().__init__()
        self.held = held

    def dense(self, planned: Planned) -> list[np.ndarray]:
        """The dense values of a plan's tensors.

        Args:
            planned: A tensor or a group.

        Returns:
            One float32 array for each tensor, in the file's layout (outputs first).

        Raises:
            ConfigError: Members of a group differ in dtype or in being trainable.
        """
        variables = [self.held[tensor.name].variable for tensor in planned.tensors]
        if len({(str(variable.dtype), variable.trainable) for variable in variables}) > 1:
            names = ", ".join(tensor.name for tensor in planned.tensors)
            raise ConfigError(f"{names} cannot share a code: they differ in type or in being frozen.")
        return [
            self.held[tensor.name].layout.stored(ops.convert_to_numpy(variable).astype(np.float32))
            for tensor, variable in zip(planned.tensors, variables, strict=True)
        ]

    def options(self, planned: Planned) -> dict[str, Any]:
        """Keyword arguments for the ThinWeight of a plan.

        Args:
            planned: A tensor or a group.

        Returns:
            ``name``, ``dtype`` and ``std``, those of its first tensor.
        """
        first = planned.tensors[0]
        kind = keras.backend.standardize_dtype(self.held[first.name].variable.dtype)
        return {"name": layer_name(first.name), "dtype": kind, "std": first.std}

    def encode(self, planned: Planned, method: Method) -> tuple[ThinWeight, Thin]:
        """Encode a plan's tensors.

        Args:
            planned: A tensor or a group.
            method: The method to encode by, of the plan's shape.

        Returns:
            The weight as a layer uses it, and as a file stores it.

        Raises:
            ConfigError: Members of a group differ in dtype or in being trainable.
            NonFiniteError: A weight has a NaN or an infinity.
        """
        names, dense = [tensor.name for tensor in planned.tensors], self.dense(planned)
        for name, values in zip(names, dense, strict=True):
            check_finite(name, values)
        encode, options = ThinWeight.encode, self.options(planned)
        weight = encode(planned.name, method, parts_of(planned), dense, projecting(planned), **options)
        return weight, as_thin(weight, names)


def compress(
    model: keras.Model,
    rules: Source | None = None,
    init: Literal["trained", "scratch"] = "trained",
    seed: int = 0,
    *,
    ratio: float | None = None,
    file_bytes: int | None = None,
) -> Report:
    """Replace the matrices that ``rules`` match by compressed ones, in place.

    Names and shapes in rules, errors and reports are those of the file: ``encoder.fc1.kernel``, (outputs, inputs). A
    compiled model stays compiled; its optimiser starts anew, since its variables are replaced. The model changes only
    if the whole call succeeds. With ``init="trained"``, a warning says when a weight's relative error exceeds 0.5: the
    network then needs fine-tuning.

    Args:
        model: A built dense model.
        rules: The configuration (docs/configuration.md): a mapping, the path of a TOML file, or ``Rules``; or a ratio:
            ``compress(model, 0.02)``. None stores every matrix by ``deepthin``, at ``ratio`` or ``file_bytes``.
        init: ``"trained"`` encodes the present weights. ``"scratch"`` draws new codes for matrices, whose decoded
            weights have mean 0 and a tenth of He's variance (gates: torch's default spread; embeddings: Keras's).
            Biases keep their present values either way.
        seed: Seed of ``"scratch"``; each matrix draws from a generator that depends on this seed and on its name.
        ratio: ``[model] ratio``: all matched matrices together over 32 bits a weight, in (0, 1].
        file_bytes: ``[model] file_bytes``: the whole file, in bytes. Without ``then = { method = "coded" }`` in the
            rules the file keeps it however the model is trained; with it, ``SizeTarget`` trains to it (docs/rate.md).

    Returns:
        One row for each matrix, with its bytes in the file and, if it was encoded, its relative error in the
        Frobenius norm; and the totals of the file.

    Raises:
        ConfigError: ``rules`` or ``init`` do not fit the model, no target or two are given, or the matrices
            are compressed already.
        BudgetError: The target is smaller than the smallest plan.
        NonFiniteError: A weight to be encoded has a NaN or an infinity.
    """
    if init not in ("trained", "scratch"):
        raise ConfigError(f"init = {init!r} is unknown. Valid: trained, scratch.")
    held = tensors(model)
    encoded = Encoded(held)
    parsed = with_target(rules, ratio, file_bytes)
    planned = plan_of(model, parsed, held, encoded if init == "trained" else None)
    weights: list[tuple[Planned, ThinWeight]] = []
    errors: dict[str, float] = {}
    for chosen in planned:
        if chosen.method is None:
            continue
        name, dense = chosen.tensors[0].name, encoded.dense(chosen)
        if init == "scratch" and dense[0].ndim > 1:
            rng = generator(steady(model, name), seed)
            weight = ThinWeight.draw(chosen.name, chosen.method, parts_of(chosen), rng, **encoded.options(chosen))
        else:
            weight = encoded(chosen)
            for index, (tensor, values) in enumerate(zip(chosen.tensors, dense, strict=True)):
                decoded = ops.convert_to_numpy(weight.dense(index)).astype(np.float32)
                errors[tensor.name] = relative_error(tensor.name, pieces_of(values, decoded))
        weights.append((chosen, weight))
    restart = Restart(model)
    for chosen, weight in weights:
        weight.file_bytes = parsed.file_bytes
        for index, tensor in enumerate(chosen.tensors):
            for place in held[tensor.name].places:
                variables = {place.weight: held[tensor.name].variable}
                make_thin(place.layer, {place.weight: (weight, index)}, variables)
    restart()
    worst = max(errors, key=lambda name: errors[name], default="")
    if init == "trained" and errors and errors[worst] > 0.5:
        warnings.warn(
            f"The relative error of {worst} is {errors[worst]:.2f}: at this size the trained weights are lost. "
            "Train on before use, with the learning rates of an optimiser of deepthin.keras; a start from "
            "init='scratch' is as good.",
            stacklevel=2,
        )
    return report_of(contents(model), errors)


def plan(
    model: keras.Model, rules: Source | None = None, *, ratio: float | None = None, file_bytes: int | None = None
) -> Report:
    """Predict what ``compress`` would do, from shapes alone; the model is left unchanged.

    Args:
        model: A built dense model.
        rules: The configuration, as in ``compress``.
        ratio: As in ``compress``.
        file_bytes: As in ``compress``.

    Returns:
        One row for each matrix, without errors. Sizes of entries whose coded size depends on the weights are upper
        bounds.

    Raises:
        ConfigError: ``rules`` do not fit the model, or no target is given.
        BudgetError: The target is smaller than the smallest plan.
    """
    planned = plan_of(model, with_target(rules, ratio, file_bytes), tensors(model))
    return report_of(planned_contents(contents(model), planned))


def materialize(model: keras.Model) -> keras.Model:
    """Turn a thin model back into plain dense layers, in place.

    A compiled model stays compiled; its optimiser starts anew, since its variables are replaced.

    Args:
        model: A model with thin layers; dense layers are left unchanged.

    Returns:
        The same model, in which each thin weight is a dense variable with the decoded values.
    """
    restart = Restart(model)
    for layer in [layer for _, layer in walk(model)]:
        if isinstance(layer, ThinLayer):
            make_plain(layer)
    restart()
    return model


def plan_of(
    model: keras.Model, rules: Rules, held: Mapping[str, Held], encoded: Encoded | None = None
) -> list[Planned]:
    """Plans for the tensors of a model, by ``ratio``, by each rule's target, or by ``file_bytes``.

    Args:
        model: The model; its other tensors count towards a file's limit.
        rules: The parsed configuration.
        held: Name -> tensor of the model, as ``tensors`` returns them.
        encoded: A cache of encoded matrices. With it, ``file_bytes`` is met by measured sizes of the codes; without
            it, by their upper bounds.

    Returns:
        One plan for each matrix, and for each other tensor that a rule names.

    Raises:
        ConfigError: ``rules`` do not fit the tensors, or no target is given.
        BudgetError: The target is smaller than the smallest plan.
    """
    named_tensors = named(held)
    thin = {name: tensor.thin.method_name for name, tensor in held.items() if tensor.thin is not None}
    refuse_twice(rules, named_tensors, thin, "keras")
    if rules.file_bytes is None:
        return plan_tensors(rules, named_tensors)
    return within(rules.file_bytes, rules, named_tensors, contents(model), None if encoded is None else encoded.thin)


def named(held: Mapping[str, Held]) -> list[Tensor]:
    """The dense floating tensors of a model, as rules see them.

    Args:
        held: Name -> tensor of the model, as ``tensors`` returns them.

    Returns:
        One tensor for each variable, under the first of its names; ``uncovered`` says why a variable cannot be thin.
    """
    names: dict[tuple[int, int], list[str]] = {}
    for name, tensor in held.items():
        if tensor.variable is not None and "float" in keras.backend.standardize_dtype(tensor.variable.dtype):
            names.setdefault(tensor.key, []).append(name)
    as_named: list[Tensor] = []
    for aliases in names.values():
        first, *also = sorted(aliases)
        tensor = held[first]
        reasons = [reason for p in tensor.places if (reason := why_not(p.layer, p.weight, tensor.variable))]
        shape = tensor.layout.shape(tensor.shape)
        std = fresh_std(tensor.places[0].layer, shape) if not reasons and len(shape) > 1 else 1.0
        as_named.append(
            Tensor(first, shape, "; ".join(dict.fromkeys(reasons)), tuple(also), std=std, layers="layers of Keras")
        )
    return as_named


def check_finite(name: str, weight: np.ndarray) -> None:
    """Refuse a weight with a NaN or an infinity.

    Args:
        name: Name of the tensor, for the message.
        weight: Its values, in the file's layout.

    Raises:
        NonFiniteError: The message has the value and its index in the file's layout.
    """
    if not np.isfinite(weight).all():
        where = tuple(np.argwhere(~np.isfinite(weight))[0].tolist())
        raise NonFiniteError(
            f"{name} is {weight[where]} at index {where}: nothing was compressed. Load finite weights first."
        )
