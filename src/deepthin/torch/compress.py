"""From a dense model to a thin one, in place, and back; and what belongs to training it."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.kernels import costs, products
from deepthin.method import Method
from deepthin.methods.factor import Factor, Factored
from deepthin.methods.float_coding import outer_of
from deepthin.plan import start
from deepthin.plan.file_limit import parts_of, planned_contents, within
from deepthin.plan.parse import parse_rules
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned, plan_tensors
from deepthin.plan.tensor import Tensor as Named
from deepthin.storage.report import Report, report_of
from deepthin.torch.exchange import make_plain, make_thin
from deepthin.torch.files import contents
from deepthin.torch.generated import ThinLayer
from deepthin.torch.importance import check_importance
from deepthin.torch.sequential import make_plain_sequential, make_sequential
from deepthin.torch.tensors import Encoded, Owners, tensors_of
from deepthin.torch.weight import ThinPart, ThinWeight


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
    planned = plan_of(model, parse_rules(rules), found, encoded if init == "trained" else None)
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
    return report_of(contents(model), errors)


def plan(model: nn.Module, rules: Mapping[str, Any] | str | Path | Rules) -> Report:
    """What ``compress`` would make of a model, without touching it; a model on the meta device will do.

    Rows of linear layers also tell ``path``, the way in which 32 items would be multiplied, and ``cost``, its
    predicted time over that of a dense layer.
    """
    found, owners = tensors_of(model)
    planned = plan_of(model, parse_rules(rules), found)
    report = report_of(planned_contents(contents(model), planned))
    layers = {name: type(held[0][0]) for name, held in owners.items()}
    methods = {tensor.name: p.method for p in planned for tensor in p.tensors if len(p.tensors) == 1}
    rows = [
        dataclasses.replace(row, fields={**row.fields, **_expected(plan)})
        if (plan := _factored(methods.get(row.name))) is not None
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


def plan_of(model: nn.Module, rules: Rules, found: list[Named], encoded: Encoded | None = None) -> list[Planned]:
    """What becomes of the tensors that ``tensors_of`` found; with ``encoded``, a file's limit counts on their codes."""
    if rules.file_bytes is None:
        return plan_tensors(rules, found)
    return within(rules.file_bytes, rules, found, contents(model), None if encoded is None else encoded.thin)


def _factored(method: Method | None) -> Factor | None:
    """The plan of a product by factors, where the method has one."""
    outer = None if method is None else outer_of(method)
    window = outer.window(0, outer.shape) if isinstance(outer, Factored) else None
    return None if window is None else window.plan


def _expected(method: Factor) -> dict[str, Any]:
    predicted = costs.costs(method, 32, dense_ready=True)
    path = costs.choose(method, 32, dense_ready=True, native=products.native_available)
    return {"path": path, "cost": round(predicted[path] / predicted["dense"], 3)}
