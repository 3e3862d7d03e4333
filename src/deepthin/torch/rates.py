"""Parameter groups: how fast codes learn beside dense weights."""

from typing import Any

from torch import nn

from deepthin import methods
from deepthin.torch.generated import ThinLayer
from deepthin.torch.weight import ThinPart, ThinWeight


def parameter_groups(
    model: nn.Module, lr: float, learning_rate_multiplier: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser; ``lr`` is what suits the dense network.

    A code wants a larger rate than a dense weight, and so do the biases beside it: with the dense rate DeepThin loses
    to every rival. The multipliers are those of deepthin.methods.learning_rate_multiplier, found by experiment
    (docs/training.md), or ``learning_rate_multiplier`` for all codes: what a trained network was pruned to wants less
    than what begins anew.
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
            times = learning_rate_multiplier or methods.learning_rate_multiplier(name, weights[0].method)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                groups.setdefault((name, times), []).append(parameter)
    return [{"params": found, "lr": lr * times, "name": name} for (name, times), found in groups.items() if found]
