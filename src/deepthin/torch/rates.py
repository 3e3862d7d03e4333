"""Parameter groups: how fast codes learn beside dense weights."""

from typing import Any

from torch import nn

from deepthin import methods
from deepthin.errors import ConfigError
from deepthin.methods.factor import Factor
from deepthin.methods.float_coding import LOG_STEP, STEP_MULTIPLIER, outer_of
from deepthin.torch.generated import ThinLayer
from deepthin.torch.weight import ThinPart, ThinWeight

STEPS = "learned steps"
RECURRENT = "recurrent "  # before the method's name: the factors of gates
RECURRENT_DECAY = 0.3  # docs/training.md, by trainings; a third of it where the steps are learned
_FAST = 10.0  # factors that learn at this multiple of the dense rate, or above, grow


def parameter_groups(
    model: nn.Module,
    lr: float,
    learning_rate_multiplier: float | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser; ``lr`` is what suits the dense network.

    Codes, and the biases of thin layers, need a larger rate than dense weights: with the dense rate DeepThin loses to
    every rival. The factors of recurrent layers need weight decay at that rate: without it they grow until gradients
    explode in backpropagation through time (docs/training.md). It is decoupled (Loshchilov and Hutter, 2019,
    arXiv:1711.05101), in ``torch.optim.Adam`` too; to an optimiser without this option give ``weight_decay=0``.

    Args:
        model: A model with or without thin layers.
        lr: The learning rate that suits the dense network.
        learning_rate_multiplier: One multiplier for all codes. By default that of each method
            (``deepthin.methods.learning_rate_multiplier``, found by experiment: docs/training.md). A pruned, trained
            network needs a smaller one than fresh factors.
        weight_decay: Decoupled weight decay of matrices and codes, >= 0, as ``AdamW`` has it; vectors have none. The
            factors of recurrent layers have at least their default, .3 (.1 where steps are learned). None: nothing but
            this default, so that the optimiser's own decay counts elsewhere. 0: none at all.

    Returns:
        A list of ``{"params", "lr", "name"}``, some with ``weight_decay``; parameters that need no gradient are left
        out. Learned steps are a group without weight decay, which would draw their logarithms to 0.

    Raises:
        ConfigError: ``weight_decay`` is negative.
    """
    if weight_decay is not None and not 0 <= weight_decay < float("inf"):
        raise ConfigError(f"parameter_groups: weight_decay = {weight_decay!r} must be 0 or more.")
    recurrent = _recurrent_factors(model) if weight_decay != 0 else {}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {("dense", 1.0): []}
    seen: set[int] = set()
    leading: dict[ThinWeight, ThinWeight] = {}  # the matrix of a thin bias's layer
    for layer in model.modules():
        if isinstance(layer, ThinLayer):
            weights = [t.group if isinstance(t, ThinPart) else t for t in layer.thin.values()]
            matrix = next((weight for weight in weights if len(weight.parts[0].shape) > 1), None)
            leading |= {weight: matrix or weight for weight in weights if len(weight.parts[0].shape) == 1}
    for module in model.modules():
        weights = [module] if isinstance(module, ThinWeight) else []
        if isinstance(module, ThinLayer):
            weights = [t.group if isinstance(t, ThinPart) else t for t in module.thin.values()]
        name, times = "dense", 1.0
        if weights:
            first = leading.get(weights[0], weights[0])
            name = first.name
            times = learning_rate_multiplier or methods.learning_rate_multiplier(name, first.method)
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                group = (STEPS, STEP_MULTIPLIER) if own.endswith(LOG_STEP) else (name, times)
                if group[0] == name and times >= _FAST and id(parameter) in recurrent:
                    group = (RECURRENT + name, times)
                groups.setdefault(group, []).append(parameter)
    made = [{"params": group, "lr": lr * times, "name": name} for (name, times), group in groups.items() if group]
    codes = {id(p) for module in model.modules() if isinstance(module, ThinWeight) for p in module.parameters()}
    return [part for group in made for part in _decaying(group, weight_decay, recurrent, codes)]


def _recurrent_factors(model: nn.Module) -> dict[int, float]:
    """Factors of gates, by id, and their weight decay."""
    decays: dict[int, float] = {}
    for layer in model.modules():
        if isinstance(layer, ThinLayer) and isinstance(layer, nn.RNNBase):
            for part in layer.thin.values():
                weight = part.group if isinstance(part, ThinPart) else part
                outer = outer_of(weight.method)
                if isinstance(outer, Factor) and not weight.name.startswith("rank") and len(weight.parts[0].shape) > 1:
                    learned = any(own.endswith(LOG_STEP) for own, _ in weight.named_parameters())
                    decay = RECURRENT_DECAY / 3 if learned else RECURRENT_DECAY
                    decays |= {id(p): decay for own, p in weight.named_parameters() if not own.endswith(LOG_STEP)}
    return decays


def _decaying(
    group: dict[str, Any], decay: float | None, recurrent: dict[int, float], codes: set[int]
) -> list[dict[str, Any]]:
    """A group with its weight decay, divided where vectors have none."""
    if group["name"] == STEPS:
        return [{**group, "weight_decay": 0.0}]
    if group["name"].startswith(RECURRENT):
        least = max(recurrent[id(parameter)] for parameter in group["params"])
        return [{**group, "weight_decay": max(least, decay or 0.0), "decoupled_weight_decay": True}]
    if not decay:
        return [group if decay is None else {**group, "weight_decay": 0.0}]
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for parameter in group["params"]:
        parts[parameter.dim() < 2 and id(parameter) not in codes].append(parameter)
    return [
        {**group, "params": part, "weight_decay": own, "decoupled_weight_decay": True}
        for part, own in zip(parts, (decay, 0.0), strict=True)
        if part
    ]
