"""Files of thin updates: when they may be written, and how they come back to their base."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from deepthin.errors import ConfigError
from deepthin.storage.contents import Contents
from deepthin.storage.held import names_of
from deepthin.storage.names import renamed
from deepthin.torch.raws import tensor_of
from deepthin.torch.update import BASE, Update, base_hash, base_tensors, install, uninstall, updates
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import check_plain


def check_updates(model: nn.Module, only: Literal["delta"] | None) -> None:
    """Refuse to save updates without saying so, those that are not there, and those whose base has changed.

    Args:
        model: The model that is about to be saved.
        only: What ``save`` was asked for.

    Raises:
        ConfigError: One of these.
    """
    held = updates(model)
    if only not in (None, "delta"):
        raise ConfigError(f"only = {only!r} is unknown: leave it out, or write only='delta'.")
    if held and only is None:
        raise ConfigError(
            "The model has updates: save(model, path, only='delta') writes these, merge(model) adds them to the base."
        )
    if only == "delta" and not held:
        raise ConfigError("The model has no updates: deepthin.torch.delta(model, rules) makes them.")
    if held and next(iter(held.values()))[2].base != base_hash(model):
        raise ConfigError(
            "The base has changed since delta(model, rules): the file would fit no base. Layers with running "
            "statistics change in training mode: keep them in eval()."
        )


def put_updates(model: nn.Module, stored: Contents, names: Mapping[str, str], frozen: bool, path: str) -> nn.Module:
    """Put the updates of a file on a model, instead of those that it has.

    Args:
        model: The base, with or without updates; unchanged if those of the file do not fit.
        stored: What the file holds.
        names: Name in the file -> name in the model, for names that differ.
        frozen: As in ``load``.
        path: The file, for messages.

    Returns:
        The same model.

    Raises:
        ConfigError: The file has updates of another base, or of tensors that the model lacks.
    """
    check_plain(model, "load(MODEL, path)")
    base = bytes(stored.dense[BASE].data)
    stored = renamed(replace(stored, dense={}), names, path)
    held = updates(model)
    if base != base_hash(model):
        raise ConfigError(
            f"{path} has updates of another base: load the weights that they were trained on into the model first. "
            "Names, types, shapes and every value must be the same."
        )
    now = base_tensors(model)
    parts = {name: part for thin in stored.thin.values() for name, part in thin.parts.items()}
    for name in names_of(stored, parts):
        part = parts[stored.aliases.get(name, name)]
        if name not in now or tuple(now[name].shape) != part.shape:
            raise ConfigError(f"{path} has an update of {name}, {part.shape}, which does not fit the model.")
    for layer, own, _ in held.values():
        if parametrize.is_parametrized(layer, own):
            uninstall(layer, own)
    model.requires_grad_(False)
    for thin in stored.thin.values():
        like = now[next(iter(thin.parts))]
        code = {entry: tensor_of(raw) for entry, raw in thin.code.items()}
        code = {e: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for e, t in code.items()}
        weight = ThinWeight(thin.name, thin.method, list(thin.parts.values()), code, frozen=frozen)
        weight.requires_grad_(not frozen)
        for index, name in enumerate(thin.parts):
            update = Update(weight if len(thin.parts) == 1 else ThinPart(weight, index), base)
            for alias in (name, *(alias for alias, target in stored.aliases.items() if target == name)):
                place, _, own = alias.rpartition(".")
                layer = model.get_submodule(place)
                if not parametrize.is_parametrized(layer, own):
                    install(layer, own, update)
    return model
