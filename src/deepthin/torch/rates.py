"""Parameter groups: how fast codes learn beside dense weights."""

from typing import Any

from torch import nn

from deepthin import methods
from deepthin.methods.float_coding import LOG_STEP, STEP_MULTIPLIER
from deepthin.torch.generated import ThinLayer
from deepthin.torch.weight import ThinPart, ThinWeight

STEPS = "learned steps"


def parameter_groups(
    model: nn.Module, lr: float, learning_rate_multiplier: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser; ``lr`` is what suits the dense network.

    Codes, and the biases of thin layers, need a larger rate than dense weights: with the dense rate DeepThin loses to
    every rival.

    Args:
        model: A model with or without thin layers.
        lr: The learning rate that suits the dense network.
        learning_rate_multiplier: One multiplier for all codes. By default that of each method
            (``deepthin.methods.learning_rate_multiplier``, found by experiment: docs/training.md). A pruned, trained
            network needs a smaller one than fresh factors.

    Returns:
        A list of ``{"params", "lr", "name"}``; parameters that need no gradient are left out. Learned steps are a group
        without weight decay, which would draw their logarithms to 0.
    """
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
                groups.setdefault(group, []).append(parameter)
    return [
        {"params": group, "lr": lr * times, "name": name} | ({"weight_decay": 0.0} if name == STEPS else {})
        for (name, times), group in groups.items()
        if group
    ]
