"""From a dense Keras model to a thin one, in place, and back."""

import warnings
from collections.abc import Mapping
from pathlib import Path
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
from deepthin.plan.parse import parse_rules
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned, plan_tensors
from deepthin.plan.start import generator
from deepthin.plan.tensor import Tensor
from deepthin.storage.contents import Thin
from deepthin.storage.report import Report, report_of


class Encoded(EncodedOnce[np.ndarray, ThinWeight]):
    """Matrices of a model by their plans, each encoded once."""

    def __init__(self, held: Mapping[str, Held]) -> None:
        super().__init__()
        self.held = held

    def dense(self, planned: Planned) -> list[np.ndarray]:
        """The values of its tensors, in the file's layout, as float32; ConfigError if these cannot share a code."""
        variables = [self.held[tensor.name].variable for tensor in planned.tensors]
        if len({(str(variable.dtype), variable.trainable) for variable in variables}) > 1:
            names = ", ".join(tensor.name for tensor in planned.tensors)
            raise ConfigError(f"{names} cannot share a code: they differ in type or in being frozen.")
        return [
            self.held[tensor.name].layout.stored(ops.convert_to_numpy(variable).astype(np.float32))
            for tensor, variable in zip(planned.tensors, variables, strict=True)
        ]

    def options(self, planned: Planned) -> dict[str, Any]:
        """Name and type of the ThinWeight."""
        first = planned.tensors[0].name
        return {"name": layer_name(first), "dtype": keras.backend.standardize_dtype(self.held[first].variable.dtype)}

    def encode(self, planned: Planned, method: Method) -> tuple[ThinWeight, Thin]:
        """The code nearest to its tensors; NonFiniteError for what cannot be encoded."""
        names, dense = [tensor.name for tensor in planned.tensors], self.dense(planned)
        for name, values in zip(names, dense, strict=True):
            check_finite(name, values)
        encode, options = ThinWeight.encode, self.options(planned)
        weight = encode(planned.name, method, parts_of(planned), dense, projecting(planned), **options)
        return weight, as_thin(weight, names)


def compress(
    model: keras.Model,
    rules: Mapping[str, Any] | str | Path | Rules,
    init: Literal["trained", "scratch"] = "trained",
    seed: int = 0,
) -> Report:
    """Store the matrices that ``rules`` name in compressed form, in place, and report what became of each.

    Names and shapes are those of the file: ``encoder.fc1.kernel``, (outputs, inputs). ``init="trained"`` encodes the
    weights as they are; at extreme sizes that loses what the network has learned, and a warning says when fine-tuning
    is needed. ``init="scratch"`` draws fresh factors from ``seed``, whose weights have a tenth of He's variance
    (torch's spread for gates, Keras's for embeddings); biases keep their own start. A compiled model stays compiled;
    its optimiser begins anew, since the variables are others. The model is changed only if all goes well: ConfigError
    and BudgetError come before, and NonFiniteError for a NaN or infinity in a weight that is encoded.
    """
    if init not in ("trained", "scratch"):
        raise ConfigError(f"init = {init!r} is unknown. Valid: trained, scratch.")
    held = tensors(model)
    encoded = Encoded(held)
    planned = plan_of(model, parse_rules(rules), held, encoded if init == "trained" else None)
    weights: list[tuple[Planned, ThinWeight]] = []
    errors: dict[str, float] = {}
    for chosen in planned:
        if chosen.method is None:
            continue
        name, dense = chosen.tensors[0].name, encoded.dense(chosen)
        if init == "scratch" and dense[0].ndim > 1:
            rng = generator(steady(model, name), seed)
            parts, std = parts_of(chosen), chosen.tensors[0].std
            weight = ThinWeight.draw(chosen.name, chosen.method, parts, rng, std, **encoded.options(chosen))
        else:
            weight = encoded(chosen)
            for index, (tensor, values) in enumerate(zip(chosen.tensors, dense, strict=True)):
                norm = float(np.linalg.norm(values))
                error = float(np.linalg.norm(ops.convert_to_numpy(weight.dense(index)).astype(np.float32) - values))
                errors[tensor.name] = error / norm if norm > 0 else 0.0
        weights.append((chosen, weight))
    restart = Restart(model)
    for chosen, weight in weights:
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


def plan(model: keras.Model, rules: Mapping[str, Any] | str | Path | Rules) -> Report:
    """What ``compress`` would make of a model, without touching it."""
    planned = plan_of(model, parse_rules(rules), tensors(model))
    return report_of(planned_contents(contents(model), planned))


def materialize(model: keras.Model) -> keras.Model:
    """Back to plain dense layers, in place: every thin weight becomes the variable that it decodes to."""
    restart = Restart(model)
    for layer in [layer for _, layer in walk(model)]:
        if isinstance(layer, ThinLayer):
            make_plain(layer)
    restart()
    return model


def plan_of(
    model: keras.Model, rules: Rules, held: Mapping[str, Held], encoded: Encoded | None = None
) -> list[Planned]:
    """What becomes of the tensors of a model; with ``encoded``, a file's limit counts on their codes."""
    found = named(held)
    if rules.file_bytes is None:
        return plan_tensors(rules, found)
    return within(rules.file_bytes, rules, found, contents(model), None if encoded is None else encoded.thin)


def named(held: Mapping[str, Held]) -> list[Tensor]:
    """Every dense floating tensor as rules see it."""
    names: dict[tuple[int, int], list[str]] = {}
    for name, tensor in held.items():
        if tensor.variable is not None and "float" in keras.backend.standardize_dtype(tensor.variable.dtype):
            names.setdefault(tensor.key, []).append(name)
    found: list[Tensor] = []
    for own in names.values():
        tensor = held[min(own)]
        reasons = [reason for p in tensor.places if (reason := why_not(p.layer, p.weight, tensor.variable))]
        shape = tensor.layout.shape(tensor.shape)
        std = fresh_std(tensor.places[0].layer, shape) if not reasons and len(shape) > 1 else 1.0
        found.append(Tensor(min(own), shape, "; ".join(dict.fromkeys(reasons)), tuple(sorted(own)[1:]), std=std))
    return found


def check_finite(name: str, weight: np.ndarray) -> None:
    """NonFiniteError, naming the place in the file's layout, for a weight that cannot be encoded."""
    if not np.isfinite(weight).all():
        where = tuple(np.argwhere(~np.isfinite(weight))[0].tolist())
        raise NonFiniteError(
            f"{name} is {weight[where]} at index {where}: nothing was compressed. Load finite weights first."
        )
