"""Thin deltas: a frozen base network, and for every matrix a thin update that starts at zero.

Many small files then adapt one base: to a speaker, a room, a device. LoRA (Hu et al., 2021, arXiv:2106.09685) is the
case of rank factors in linear layers; here any method of any layer may hold the update.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.plan import start
from deepthin.plan.file_limit import parts_of, planned_contents, within
from deepthin.plan.parse import parse_rules
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned, plan_tensors
from deepthin.plan.tensor import Tensor as Named
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents
from deepthin.storage.report import Report, report_of
from deepthin.torch.compress import aim
from deepthin.torch.files import contents
from deepthin.torch.generated import ThinLayer
from deepthin.torch.tensors import tensors_of
from deepthin.torch.update import Update, base_hash, install, uninstall, updates
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import check_plain

_VECTOR_STD = 0.02  # spread from which the learned step of a vector's update follows
_MERGED = "_deepthin_merged"


def delta(model: nn.Module, rules: Mapping[str, Any] | str | Path | Rules, seed: int = 0) -> Report:
    """Freeze a network, and add a thin update to every matrix that ``rules`` match, in place.

    The updates decode to zero, so that the network computes what it did. Train them with
    ``parameter_groups(model, lr)``; with ``[model] file_bytes`` and methods that learn their step, ``SizeTarget``
    brings the file of the updates to that size. ``save(model, path, only="delta")`` writes this file, and ``load`` puts
    it on the same base again.

    Args:
        model: The base: a plain network with its trained weights, of any of the layers that can be thin. A thin one has
            to be materialised first.
        rules: The configuration, as for ``compress``: ``ratio`` and ``file_bytes`` are of the updates. Biases, and the
            scales of normalisation, get an update where a rule names them, or where ``file_bytes`` is trained for.
        seed: Seed of the numbers that do not begin at zero; each matrix draws from a generator that depends on this
            seed and on its name.

    Returns:
        One row for each update; the totals are of their file. Sizes are upper bounds where they depend on the training.

    Raises:
        ConfigError: ``rules`` do not fit the model, no target is given, a method cannot begin at zero, or the model is
            thin, wrapped, has updates already, or is on the meta device.
        BudgetError: The target is smaller than the smallest plan.
    """
    check_plain(model, "delta(MODEL, rules)")
    _check_base(model)
    tensors, owners = tensors_of(model)
    base, empty = base_hash(model), _without_values(contents(model))
    planned = _planned(parsed := parse_rules(rules), tensors, empty)
    made = [(plan, _started(plan, owners[plan.tensors[0].name][0], seed)) for plan in planned if plan.method]
    model.requires_grad_(False)
    for plan, weight in made:
        for index, tensor in enumerate(plan.tensors):
            update = Update(weight if len(plan.tensors) == 1 else ThinPart(weight, index), base)
            for layer, name in owners[tensor.name]:
                install(layer, name, update)
    aim(model, parsed.file_bytes)
    return report_of(Contents(planned_contents(empty, planned).thin, contents(model).dense))


def merge(model: nn.Module) -> nn.Module:
    """Add the updates to the weights of their base, in place: the network is as fast as the base alone.

    Args:
        model: A network with updates.

    Returns:
        The same model, which has plain layers. It keeps the base's weights beside the merged ones, for ``unmerge``.

    Raises:
        ConfigError: The model has no updates.
    """
    held = updates(model)
    if not held:
        raise ConfigError("The model has no updates to merge: deepthin.torch.delta or load makes them.")
    placed = {(layer, name): update for layer, name, update in held.values()}  # layers with several names once
    with torch.no_grad():
        merged = {place: getattr(*place).detach().clone() for place in placed}
        for (layer, name), update in placed.items():
            parameter = uninstall(layer, name)
            layer.__dict__.setdefault(_MERGED, {})[name] = (parameter.detach().clone(), update)
        for (layer, name), value in merged.items():  # after all are apart: shared parameters have one base
            cast(nn.Parameter, layer._parameters[name]).copy_(value)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo ``merge``: base and updates are apart again, with the values that they had.

    Args:
        model: A network whose updates were merged.

    Returns:
        The same model.

    Raises:
        ConfigError: No updates of the model were merged.
    """
    layers = [layer for layer in model.modules() if layer.__dict__.get(_MERGED)]
    if not layers:
        raise ConfigError("No updates of the model are merged.")
    for layer in layers:
        for name, (original, update) in layer.__dict__.pop(_MERGED).items():
            with torch.no_grad():
                cast(nn.Parameter, layer._parameters[name]).copy_(original)
            install(layer, name, update)  # of a shared parameter: both layers add the update to the same base
    return model


def _check_base(model: nn.Module) -> None:
    """Refuse a model that cannot be a base."""
    if updates(model):
        raise ConfigError("The model has updates already: save or merge them, and load the base anew.")
    if thin := next((path for path, layer in model.named_modules() if isinstance(layer, ThinLayer)), None):
        raise ConfigError(
            f"{thin or 'The model'} is thin: a base has plain weights. Write deepthin.torch.materialize(model) first; "
            "the updates then fit every model that is loaded from the same file and materialised."
        )
    if left := [name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta]:
        raise ConfigError(f"{', '.join(left[:3])} on the meta device: a base needs its trained weights.")


def _without_values(held: Contents) -> Contents:
    """The base's tensors as planning needs them: a file of updates has none of them, so they are empty."""
    return Contents({}, {name: Raw.zeros(raw.dtype, (0,)) for name, raw in held.dense.items()})


def _planned(rules: Rules, tensors: list[Named], empty: Contents) -> list[Planned]:
    """Plans of the updates; vectors have one only where a rule names them, or training finds their size."""
    if rules.biases == "default" and not any(rule.learns_step for rule in rules.rules):
        rules = replace(rules, biases=None)
    return plan_tensors(rules, tensors) if rules.file_bytes is None else within(rules.file_bytes, rules, tensors, empty)


def _started(plan: Planned, owner: tuple[nn.Module, str], seed: int) -> ThinWeight:
    """An update that decodes to zero, and through which a gradient reaches its floats.

    Every method decodes to sums of products with one float of each entry, so an entry of zeros suffices: the largest,
    whose symbols take the most bits of a coded file.
    """
    method, first = plan.method, plan.tensors[0]
    assert method is not None
    like = cast(nn.Parameter, owner[0]._parameters[owner[1]])
    std = first.std if len(first.shape) > 1 else _VECTOR_STD
    weight = ThinWeight.draw(plan.name, method, parts_of(plan), like, start.generator(first.name, seed), std)
    weight.origin = (first.name, seed, first.std)
    shapes = {
        entry: value
        for entry, value in weight.decoder.code_shapes().items()
        if entry not in weight.decoder.integers() and isinstance(getattr(weight, entry, None), nn.Parameter)
    }
    largest = max(shapes, key=lambda entry: getattr(weight, entry).numel(), default=None)
    with torch.no_grad():
        if largest is not None:
            getattr(weight, largest).zero_()
        if largest is None or any(bool(tensor.any()) for tensor in weight.decoded()):
            raise ConfigError(
                f"An update of {first.name} by {plan.name!r} cannot begin at zero: use deepthin, kronecker, "
                "tensor-train, rank, hashed, or then = { method = 'coded' }."
            )
    return weight
