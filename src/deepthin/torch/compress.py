"""From a dense model to a thin one, in place, and back; and what belongs to training it."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.kernels import costs, products
from deepthin.method import Method
from deepthin.methods.factor import Factor, Factored
from deepthin.methods.float_coding import outer_of
from deepthin.plan import start
from deepthin.plan.file_limit import parts_of, planned_contents, within
from deepthin.plan.parse import Source, with_target
from deepthin.plan.rules import Rules, refuse_twice
from deepthin.plan.shares import Planned, plan_tensors
from deepthin.plan.tensor import Tensor as Named
from deepthin.storage.report import Report, report_of
from deepthin.torch.exchange import make_plain, make_thin, thin_tensors
from deepthin.torch.files import contents
from deepthin.torch.generated import ThinLayer
from deepthin.torch.importance import check_importance
from deepthin.torch.pretrained import follow, tie_first
from deepthin.torch.replaced import replacing
from deepthin.torch.sequential import make_plain_sequential, make_sequential
from deepthin.torch.tensors import Encoded, Owners, tensors_of
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import check_plain


def compress(
    model: nn.Module,
    rules: Source | None = None,
    init: Literal["trained", "scratch"] = "trained",
    seed: int = 0,
    importance: Mapping[str, Tensor] | None = None,
    *,
    ratio: float | None = None,
    file_bytes: int | None = None,
) -> Report:
    """Replace the matrices that ``rules`` match by compressed ones, in place.

    Shared tensors stay shared. The model changes only if the whole call succeeds. With ``init="trained"``, a warning
    says when a weight's relative error exceeds 0.5: the network then needs fine-tuning.

    Args:
        model: The dense network. It may be on the meta device with ``init="scratch"``; codes then have no values yet.
        rules: The configuration (docs/configuration.md): a mapping, the path of a TOML file, or ``Rules``; or a ratio:
            ``compress(model, 0.02)``. None stores every matrix by ``deepthin``, at ``ratio`` or ``file_bytes``.
        init: ``"trained"`` encodes the present weights. ``"scratch"`` draws new codes for matrices, whose decoded
            weights have mean 0 and a tenth of He's variance (embeddings and recurrent layers: torch's default spread).
            Biases keep their present values either way.
        seed: Seed of ``"scratch"``; each matrix draws from a generator that depends on this seed and on its name.
        importance: Parameter name -> tensor of the parameter's shape, entries >= 0: the weight of each squared error,
            for methods that use it (docs/importance.md). Matrices without an entry weigh all errors equally. In a
            group, either all members have one or none has.
        ratio: ``[model] ratio``: all matched matrices together over 32 bits a weight, in (0, 1].
        file_bytes: ``[model] file_bytes``: the whole file, in bytes. Without ``then = { method = "coded" }`` in the
            rules the file keeps it however the model is trained; with it, ``SizeTarget`` trains to it (docs/rate.md).

    Returns:
        One row for each matrix, with its bytes in the file and, if it was encoded, its relative error in the
        Frobenius norm; and the totals of the file.

    Raises:
        ConfigError: ``rules``, ``init`` or ``importance`` do not fit the model, no target or two are given, the
            matrices are compressed already, or the model is wrapped (DistributedDataParallel, FSDP, DataParallel,
            ``torch.compile``).
        BudgetError: The target is smaller than the smallest plan.
        NonFiniteError: A weight to be encoded, or its importance, has a NaN or an infinity; or so has what would be
            decoded, since weights near the largest float overflow.
        TypeError: The model has a tensor that a ``.thin`` file cannot hold.
    """
    if init not in ("trained", "scratch"):
        raise ConfigError(f"init = {init!r} is unknown. Valid: trained, scratch.")
    check_plain(model, "compress(MODEL, rules)")
    tie_first(model)
    tensors, owners = tensors_of(model)
    check_importance(model, importance := importance or {})
    contents(model)  # raises TypeError for what no file can hold, before the model changes
    encoded, parsed = Encoded(owners, importance), with_target(rules, ratio, file_bytes)
    planned = plan_of(model, parsed, tensors, encoded if init == "trained" else None)
    with replacing(model, "compress()"):
        report = carry_out(model, planned, owners, init, seed, encoded)
    aim(model, parsed.file_bytes)
    return report


def aim(model: nn.Module, file_bytes: int | None) -> None:
    """Tell the weights of a model the size to which ``SizeTarget`` is to train its file.

    Args:
        model: A thin model, changed in place.
        file_bytes: The target in bytes; None: none.
    """
    for module in model.modules():
        if isinstance(module, ThinWeight):
            module.file_bytes = file_bytes


def carry_out(
    model: nn.Module,
    plans: Sequence[Planned],
    owners: Owners,
    init: Literal["trained", "scratch"] = "trained",
    seed: int = 0,
    encoded: "Encoded | None" = None,
) -> Report:
    """Replace the matrices of a model as planned, in place: the second half of ``compress``.

    Args:
        model: The network that the plans were made for.
        plans: What becomes of each tensor or group; a plan whose method is None leaves its tensor dense.
        owners: Tensor name -> the layers that have it, as ``tensors_of`` returns them.
        init: As in ``compress``.
        seed: As in ``compress``.
        encoded: The cache of encoded matrices, with their importance; None starts an empty one.

    Returns:
        The report that ``compress`` returns.

    Raises:
        ConfigError: Members of a group that cannot share a code.
        NonFiniteError: A weight to be encoded, or its importance, has a NaN or an infinity, or what is decoded has.
    """
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
                for name, tensor, decoded in zip(names, dense, weight.decoded(), strict=True):
                    errors[name] = start.relative_error(name, compared(tensor, decoded))
                    del decoded  # before the next is decoded
        weight.origin = (names[0], seed, planned.tensors[0].std)
        weights.append((planned, weight.requires_grad_(dense[0].requires_grad)))
    for planned, weight in weights:
        for index, tensor in enumerate(planned.tensors):
            generated = weight if len(planned.tensors) == 1 else ThinPart(weight, index)
            for layer, parameter in owners[tensor.name]:
                make_thin(layer, {parameter: generated})
    make_sequential(model)
    follow(model)
    worst = max(errors, key=lambda name: errors[name], default="")
    if init == "trained" and errors and errors[worst] > 0.5:
        warnings.warn(
            f"The relative error of {worst} is {errors[worst]:.2f}: at this size the trained weights are lost. "
            "Train on before use, with the learning rates of deepthin.torch.parameter_groups; a start from "
            "init='scratch' is as good.",
            stacklevel=2,
        )
    return report_of(contents(model), errors)


def compared(dense: Tensor, decoded: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ranges of two tensors, as ``plan.start.relative_error`` takes them.

    Args:
        dense: A tensor as it was.
        decoded: The same, decoded: of the same shape.

    Yields:
        Ranges of both, in double precision in main memory.
    """
    flat = dense.detach().reshape(-1), decoded.detach().reshape(-1)
    for first in range(0, dense.numel(), start.PIECE):
        one, other = (tensor[first : first + start.PIECE].double().cpu().numpy() for tensor in flat)
        yield one, other


def plan(
    model: nn.Module, rules: Source | None = None, *, ratio: float | None = None, file_bytes: int | None = None
) -> Report:
    """Predict what ``compress`` would do, from shapes alone; the model is left unchanged.

    Args:
        model: The dense network. It may be on the meta device, where no memory is allocated.
        rules: The configuration, as in ``compress``.
        ratio: As in ``compress``.
        file_bytes: As in ``compress``.

    Returns:
        One row for each matrix, without errors. Rows of linear layers that are stored by factors also have the fields
        ``path``, the way chosen to multiply a batch of 32 items, and ``cost``, its predicted time divided by that of
        the dense layer. Sizes of entries whose coded size depends on the weights are upper bounds.

    Raises:
        ConfigError: ``rules`` do not fit the model, or no target is given.
        BudgetError: The target is smaller than the smallest plan.
        TypeError: The model has a tensor that a ``.thin`` file cannot hold.
    """
    tensors, owners = tensors_of(model)
    planned = plan_of(model, with_target(rules, ratio, file_bytes), tensors)
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
    """Turn a thin model back into plain dense layers, in place.

    Parameter objects are replaced: build a new optimiser. Shared tensors stay shared.

    Args:
        model: A network with thin layers; dense layers are left unchanged.

    Returns:
        The same model. Each thin parameter is now a dense ``nn.Parameter`` with the decoded values; it requires a
        gradient if any float of its code did.

    Raises:
        ConfigError: The model is wrapped, as in ``compress``.
    """
    check_plain(model, "materialize(MODEL)")
    with replacing(model, "materialize()"):
        _materialize(model)
    return model


def _materialize(model: nn.Module) -> None:
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
    follow(model)


def plan_of(model: nn.Module, rules: Rules, tensors: list[Named], encoded: Encoded | None = None) -> list[Planned]:
    """Plans for the tensors of a model, by ``ratio``, by each rule's target, or by ``file_bytes``.

    Args:
        model: The network; its other tensors count towards a file's limit.
        rules: The parsed configuration.
        tensors: The tensors of the model, as ``tensors_of`` returns them.
        encoded: A cache of encoded matrices. With it, ``file_bytes`` is met by measured sizes of the codes; without
            it, by their upper bounds.

    Returns:
        The plans, in the order of ``tensors``.

    Raises:
        ConfigError: ``rules`` do not fit the tensors, or no target is given.
        BudgetError: The target is smaller than the smallest plan.
    """
    refuse_twice(rules, tensors, {name: weight.name for name, (weight, _) in thin_tensors(model).items()}, "torch")
    if rules.file_bytes is None:
        return plan_tensors(rules, tensors)
    return within(rules.file_bytes, rules, tensors, contents(model), None if encoded is None else encoded.thin)


def _factored(method: Method | None) -> Factor | None:
    """The factors by which a layer multiplies; None if the method has none."""
    outer = None if method is None else outer_of(method)
    window = outer.window(0, outer.shape) if isinstance(outer, Factored) else None
    return None if window is None else window.plan


def _expected(method: Factor) -> dict[str, Any]:
    predicted = costs.costs(method, 32, dense_ready=True)
    path = costs.choose(method, 32, dense_ready=True, native=products.native_available)
    return {"path": path, "cost": round(predicted[path] / predicted["dense"], 3)}
