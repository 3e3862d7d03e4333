"""The training recipe that all tasks share: Adam, a short warm-up, a cosine to zero (docs/training.md)."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepthin.method import NonFiniteError
from deepthin.torch import Twist, parameter_groups

WARM_UP = 50  # steps


def train(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: Callable[[int], None],
    judge: Callable[[], float] | None = None,
    judgments: int = 0,
    twist: Twist | None = None,
    thin_from: float = 1.0,
) -> None:
    """Minimise the cross entropy of ``model(inputs)``; ``lr`` is the dense rate, codes get their multiple of it.

    Batches are drawn in reshuffled passes from ``seed``. ``judge`` is asked ``judgments`` times, evenly and at the end,
    and the state that it gave the lowest value is the one that stays. ``twist`` distorts the dense weights of ``model``
    until, after the share ``thin_from`` of the steps, it makes them thin; judged is what comes then. NonFiniteError
    names the step if the loss is no number.
    """

    def prepare(first: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.Adam(parameter_groups(model, lr))

        def rate(step: int) -> float:
            return min((first + step + 1) / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * (first + step) / steps))

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    optimizer, schedule = prepare(0)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    order = torch.randperm(len(inputs), generator=generator)
    at = 0
    best, best_state = math.inf, None
    for step in range(steps):
        if at + batch > len(order):
            order, at = torch.randperm(len(inputs), generator=generator), 0
        chosen = order[at : at + batch]
        at += batch
        loss = nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
        if not torch.isfinite(loss):
            raise NonFiniteError(f"The loss is {loss.item()} at step {step}: use a smaller learning rate than {lr}.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if twist is not None:
            twist.step()
            if step + 1 >= thin_from * steps:
                twist.finish()
                twist = None
                optimizer, schedule = prepare(step + 1)
        if (
            twist is None
            and judge is not None
            and judgments
            and (step + 1) * judgments // steps > step * judgments // steps
        ):
            if (value := judge()) < best:
                best, best_state = value, copy.deepcopy(model.state_dict())
            model.train()
        progress(step + 1)
    if best_state is not None:
        model.load_state_dict(best_state)


def predict(model: nn.Module, inputs: Tensor, batch: int = 1000) -> Tensor:
    """The model's outputs in evaluation, items first."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(batch)])
