"""From a dense model to a thin one, in place, and back; and what belongs to training it."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepthin import costs, kernels, start
from deepthin.coding import Raw
from deepthin.method import BudgetError, ConfigError, Method, NonFiniteError, Then
from deepthin.methods import learning_rate
from deepthin.methods.factor import Factor
from deepthin.plans import parts_of, planned_contents, within
from deepthin.report import Report
from deepthin.rules import Planned, Rules
from deepthin.rules import Tensor as Named
from deepthin.torch.files import contents, raw_code
from deepthin.torch.importance import check_importance, importance_for
from deepthin.torch.layers import ThinLayer, fresh_std, is_transposed, make_plain, make_thin, padding_row, why_not
from deepthin.torch.sequential import make_plain_sequential, make_sequential
from deepthin.torch.weight import ThinPart, ThinWeight

Owners = dict[str, list[tuple[nn.Module, str]]]
"""By the name of a parameter the layers that hold it, and as what: more than one where it is shared."""


class Encoded:
    """Matrices of a model by their plans, each encoded once; ``importance`` is that of ``compress``."""

    def __init__(self, owners: Owners, importance: Mapping[str, Tensor] | None = None) -> None:
        self.owners, self.importance = owners, importance or {}
        self._made: dict[tuple[str, Method], ThinWeight] = {}

    def dense(self, planned: Planned) -> list[Tensor]:
        """The values of its tensors; ConfigError if these cannot share a code."""
        names = [tensor.name for tensor in planned.tensors]
        dense = [_value(self.owners[name]) for name in names]
        if len({(tensor.dtype, tensor.device, tensor.requires_grad) for tensor in dense}) > 1:
            raise ConfigError(
                f"{', '.join(names)} cannot share a code: they differ in type, device or in being frozen."
            )
        return dense

    def __call__(self, planned: Planned) -> ThinWeight:
        """The code nearest to its tensors; NonFiniteError, and ConfigError for padding that is not zero."""
        names, method, dense = [t.name for t in planned.tensors], planned.method, self.dense(planned)
        if method is None:
            raise ValueError(f"{names[0]} stays dense.")
        if (names[0], method) not in self._made:
            parts = parts_of(planned)
            for name, tensor, part in zip(names, dense, parts, strict=True):
                check_finite(name, tensor)
                if part.zero_row is not None and tensor[part.zero_row].any():
                    raise ConfigError(
                        f"Row {part.zero_row} of {name} is padding, which a thin table keeps at zero, but it is not "
                        "zero: set it to zero, or the layer's padding_idx to None."
                    )
            weigh = importance_for(planned, self.importance)
            self._made[names[0], method] = ThinWeight.encode(planned.name, method, parts, dense, weigh)
        return self._made[names[0], method]

    def raw(self, planned: Planned) -> dict[str, Raw]:
        """The same code, as a file has it."""
        return raw_code(self(planned))


def compress(
    model: nn.Module,
    rules: Mapping[str, Any] | str | Path | Rules,
    init: Literal["trained", "scratch"] = "trained",
    seed: int = 0,
    importance: Mapping[str, Tensor] | None = None,
) -> Report:
    """Store the matrices that ``rules`` name in compressed form, in place, and report what became of each.

    ``init="trained"`` encodes the weights as they are; at extreme sizes that loses what the network has learned, and a
    warning says when fine-tuning is needed. ``init="scratch"`` draws fresh factors, whose weights have a tenth of He's
    variance (torch's own spread for embeddings and recurrent layers), from ``seed``; on the meta device they have no
    values yet. Biases keep their own start either way. ``importance`` maps names of parameters to tensors of their
    shape, for methods that weigh errors (docs/importance.md); in a matrix without, all weigh alike, and of a group
    either all have it or none. Shared tensors stay shared. The model is changed only if all goes well: ConfigError and
    BudgetError come before, and NonFiniteError for a NaN or infinity in a weight that is encoded, or its importance.
    """
    if init not in ("trained", "scratch"):
        raise ConfigError(f"init = {init!r} is unknown. Valid: trained, scratch.")
    found, owners = tensors_of(model)
    check_importance(model, importance := importance or {})
    contents(model)  # TypeError now, not after the model has changed, for what no file can hold
    encoded = Encoded(owners, importance)
    planned = plan_of(model, Rules.parse(rules), found, encoded if init == "trained" else None)
    return carry_out(model, planned, owners, init, seed, encoded)


def carry_out(
    model: nn.Module,
    plans: Sequence[Planned],
    owners: Owners,
    init: Literal["trained", "scratch"] = "trained",
    seed: int = 0,
    encoded: "Encoded | None" = None,
) -> Report:
    """What ``compress`` does once it is known what becomes of each matrix; ``owners`` as ``tensors_of`` gives them."""
    weights: list[tuple[Planned, ThinWeight]] = []
    errors: dict[str, float] = {}
    encoded = encoded or Encoded(owners)
    for planned in plans:
        method, names = planned.method, [tensor.name for tensor in planned.tensors]
        if method is None:
            continue
        dense = encoded.dense(planned)
        parts = parts_of(planned)
        if init == "scratch" and dense[0].dim() > 1:
            rng = start.generator(names[0], seed)
            weight = ThinWeight.draw(planned.name, method, parts, dense[0], rng, planned.tensors[0].std)
        else:
            weight = encoded(planned)
            with torch.no_grad():
                for index, (name, tensor) in enumerate(zip(names, dense, strict=True)):
                    norm = tensor.norm().item()
                    errors[name] = (weight(index) - tensor).norm().item() / norm if norm > 0 else 0.0
        weights.append((planned, weight.requires_grad_(dense[0].requires_grad)))
    for planned, weight in weights:
        for index, tensor in enumerate(planned.tensors):
            generated = weight if len(planned.tensors) == 1 else ThinPart(weight, index)
            for layer, own in owners[tensor.name]:
                make_thin(layer, {own: generated})
    make_sequential(model)
    worst = max(errors, key=lambda name: errors[name], default="")
    if init == "trained" and errors and errors[worst] > 0.5:
        warnings.warn(
            f"The relative error of {worst} is {errors[worst]:.2f}: at this size the trained weights are lost. "
            "Train on before use, with the learning rates of deepthin.torch.parameter_groups; a start from "
            "init='scratch' is as good.",
            stacklevel=2,
        )
    return contents(model).report(errors)


def plan(model: nn.Module, rules: Mapping[str, Any] | str | Path | Rules) -> Report:
    """What ``compress`` would make of a model, without touching it; a model on the meta device will do.

    Rows of linear layers also tell ``path``, the way in which 32 items would be multiplied, and ``cost``, its
    predicted time over that of a dense layer.
    """
    found, owners = tensors_of(model)
    planned = plan_of(model, Rules.parse(rules), found)
    report = planned_contents(contents(model), planned).report()
    layers = {name: type(held[0][0]) for name, held in owners.items()}
    methods = {tensor.name: p.method for p in planned for tensor in p.tensors if len(p.tensors) == 1}
    rows = [
        dataclasses.replace(row, fields={**row.fields, **_expected(method)})
        if isinstance(method := _decoder(methods.get(row.name)), Factor)
        and len(row.shape) > 1
        and layers[row.name] is nn.Linear
        else row
        for row in report.rows
    ]
    return dataclasses.replace(report, rows=tuple(rows))


def materialize(model: nn.Module) -> nn.Module:
    """Back to plain dense layers, in place: every thin parameter becomes the dense tensor that it decodes to."""
    done: dict[tuple[int, int], nn.Parameter] = {}
    for layer in list(model.modules()):
        if isinstance(layer, ThinLayer):
            dense: dict[str, nn.Parameter] = {}
            for name, thin in layer.thin.items():
                key = (id(thin.group), thin.index) if isinstance(thin, ThinPart) else (id(thin), 0)
                if key not in done:
                    trained = any(parameter.requires_grad for parameter in thin.parameters())
                    with torch.no_grad():
                        done[key] = nn.Parameter(thin().clone(), requires_grad=trained)
                dense[name] = done[key]
            make_plain(layer, dense)
    make_plain_sequential(model)
    return model


def parameter_groups(model: nn.Module, lr: float, rate: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser; ``lr`` is what suits the dense network.

    A code wants a larger rate than a dense weight, and so do the biases beside it: with the dense rate DeepThin loses
    to every rival. The factors are those of deepthin.methods.learning_rate, found by experiment (docs/training.md), or
    ``rate`` for all codes: what a trained network was pruned to wants less than what begins anew.
    """
    groups: dict[tuple[str, float], list[nn.Parameter]] = {("dense", 1.0): []}
    seen: set[int] = set()
    for module in model.modules():
        weights = [module] if isinstance(module, ThinWeight) else []
        if isinstance(module, ThinLayer):
            weights = [t.group if isinstance(t, ThinPart) else t for t in module.thin.values()]
        name = weights[0].name if weights else "dense"
        times = 1.0
        if weights:
            times = learning_rate(name, weights[0].method) if rate is None else rate
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                groups.setdefault((name, times), []).append(parameter)
    return [{"params": found, "lr": lr * times, "name": name} for (name, times), found in groups.items() if found]


def same_size(build: Callable[[int], nn.Module], weight_bytes: int) -> int:
    """The largest width such that the matrices (two or more dimensions) of ``build(width)`` take at most that.

    The rival that needs no library. ``build`` is called on the meta device; the size must grow with the width.
    """

    def taken(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() * p.element_size() for p in build(width).parameters() if p.dim() > 1)

    if (least := taken(1)) > weight_bytes:
        raise BudgetError(
            f"No network of this shape fits {weight_bytes} bytes: the one of width 1 takes {least}.",
            smallest_bits=8 * least,
            smallest_ratio=math.nan,
        )
    high = 2
    while taken(high) <= weight_bytes:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if taken(middle) <= weight_bytes else (low, middle)
    return low


def tensors_of(model: nn.Module) -> tuple[list[Named], Owners]:
    """Every dense parameter as rules see it, and who holds it."""
    names: dict[int, list[str]] = {}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ThinWeight):
            continue
        for own, parameter in module._parameters.items():
            if isinstance(parameter, nn.UninitializedParameter):
                raise ConfigError(f"{path}.{own} has no shape yet: call the model once, then compress it.".lstrip("."))
            if parameter is not None:
                parameters[id(parameter)] = parameter
                names.setdefault(id(parameter), []).append(f"{path}.{own}".lstrip("."))
                if not any(layer is module and held == own for layer, held in holders.get(id(parameter), [])):
                    holders.setdefault(id(parameter), []).append((module, own))
    found: list[Named] = []
    for key, parameter in parameters.items():
        reasons = [reason for layer, own in holders[key] if (reason := why_not(layer, own))]
        turned = {is_transposed(layer) for layer, _ in holders[key]}
        if len(turned) > 1:
            reasons.append("a tensor shared by layers that keep it in different orders is not covered")
        name, *also = sorted(names[key])  # files keep a shared tensor under the first of its names
        shape = tuple(parameter.shape)
        std = fresh_std(holders[key][0][0], shape) if not reasons and len(shape) > 1 else 1.0
        turned_matrix = turned == {True} and len(shape) == 2
        zero_row = next((row for layer, _ in holders[key] if (row := padding_row(layer)) is not None), None)
        found.append(Named(name, shape, "; ".join(reasons), tuple(also), turned_matrix, std, zero_row))
    return found, {min(names[key]): held for key, held in holders.items()}


def plan_of(model: nn.Module, rules: Rules, found: list[Named], encoded: Encoded | None = None) -> list[Planned]:
    """What becomes of the tensors that ``tensors_of`` found; a limit for the file is met by writing files."""
    if rules.file_bytes is None:
        return rules.plan(found)
    return within(rules.file_bytes, rules, found, contents(model), None if encoded is None else encoded.raw)


def _decoder(method: Method | None) -> Method | None:
    return method.outer if isinstance(method, Then) else method


def _expected(method: Factor) -> dict[str, Any]:
    predicted = costs.costs(method, 32, dense_ready=True)
    path = costs.choose(method, 32, dense_ready=True, native=kernels.native_available)
    return {"path": path, "cost": round(predicted[path] / predicted["dense"], 3)}


def _value(owner: list[tuple[nn.Module, str]]) -> Tensor:
    return owner[0][0]._parameters[owner[0][1]]  # pyright: ignore[reportReturnType] -- _tensors lists no missing ones


def check_finite(name: str, weight: Tensor) -> None:
    """NonFiniteError, naming the place, for a weight that cannot be encoded."""
    if weight.is_meta:
        raise ConfigError(f"{name} is on the meta device and has no values: load weights first, or use init='scratch'.")
    if not torch.isfinite(weight).all():
        where = tuple((~torch.isfinite(weight)).nonzero()[0].tolist())
        raise NonFiniteError(
            f"{name} is {weight[where].item()} at index {where}: nothing was compressed. Load finite weights first."
        )
