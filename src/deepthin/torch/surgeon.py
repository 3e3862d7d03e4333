"""Optimal brain surgeon: prunes a small tensor and adjusts the remaining weights (Hassibi, Stork and Wolff, 1993)."""

import math

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.torch.importance import (
    _ROWS,
    Batches,
    Loss,
    _at_rest,
    _closest,
    _columns,
    _items,
    _some,
)
from deepthin.torch.wrapped import check_plain

MOST_WEIGHTS = 8192  # of one tensor: its Hessian takes 512 MiB, and its inverse as much


def optimal_brain_surgeon(
    model: nn.Module,
    name: str,
    keep: int,
    batches: Batches,
    loss: Loss,
    damping: float = 1e-3,
    passes: int = 16,
    seed: int = 0,
) -> float:
    """Set all but ``keep`` weights of a small tensor to zero, in place, and adjust the others.

    Optimal brain surgeon (Hassibi, Stork and Wolff, 1993). Repeatedly, the weight with the least saliency
    ``w^2 / (2 [H^-1]_qq)`` is removed, and the others move to the minimum of the quadratic loss. H is the tensor's
    Gauss-Newton matrix, estimated as in ``hessian_diagonal``. Memory grows with the square of the number of weights,
    time with its cube: a second for 1,000 weights, ten minutes for 8,192, the upper bound, besides the gradients. To
    store the result, ``compress`` with the method ``pruned``.

    Args:
        model: A trained dense model; only the named tensor changes.
        name: The parameter, of at most 8,192 weights.
        keep: How many weights stay, from 0 to all.
        batches: As in ``hessian_diagonal``.
        loss: As in ``hessian_diagonal``.
        damping: Added to H's diagonal, as a fraction of its mean; > 0.
        passes: As in ``hessian_diagonal``.
        seed: As in ``hessian_diagonal``.

    Returns:
        The predicted rise of the loss.

    Raises:
        ConfigError: An unknown name, too many weights, ``keep`` or ``damping`` out of range, a singular H, or a
            wrapped model.
    """
    check_plain(model, "optimal_brain_surgeon(MODEL, ...)")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name not in parameters:
        raise ConfigError(f"The model has no parameter {name!r}.{_closest(name, parameters)}")
    weight = parameters[name]
    count = weight.numel()
    if count > MOST_WEIGHTS:
        raise ConfigError(
            f"{name} has {count} weights: optimal brain surgeon inverts a matrix of their square, so it is limited to "
            f"{MOST_WEIGHTS}. Use the method pruned with importance=hessian_diagonal(...)."
        )
    if not 0 <= keep <= count or not damping > 0:
        raise ConfigError(f"keep = {keep}, damping = {damping:g}: keep is 0 to {count}, damping more than 0.")
    matrix = _gauss_newton(model, weight, batches, loss, passes, seed)
    mean = matrix.diagonal().mean().item()
    matrix.diagonal().add_(damping * mean if mean > 0 else 1.0)
    root, failed = torch.linalg.cholesky_ex(matrix)
    if failed.item():
        raise ConfigError(f"damping = {damping:g}: the matrix of {name} cannot be inverted. Use more, 1e-3 say.")
    del matrix
    adjusted, rise = _without(weight.detach().double().flatten(), torch.cholesky_inverse(root), keep)
    with torch.no_grad():
        weight.copy_(adjusted.view(weight.shape))
    return rise


# ---- Optimal brain surgeon ------------------------------------------------------------------------------------------


def _gauss_newton(
    model: nn.Module, weight: Tensor, batches: Batches, loss: Loss, passes: int, seed: int
) -> Float64[Tensor, "weights weights"]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64, device=weight.device)
    rows: list[Tensor] = []
    count = 0

    def add() -> None:
        if rows:
            stacked = torch.stack(rows)
            matrix.addmm_(stacked.T, stacked)
            rows.clear()

    with _at_rest(model):
        for item in _items(batches):
            count += 1
            for (gradient,) in _columns(model, item, loss, passes, generator, [weight]):
                rows.append(gradient.double().flatten())
            if len(rows) >= _ROWS:
                add()
    add()
    return matrix.div_(_some(count))


def _without(
    weight: Float64[Tensor, " weights"], inverse: Float64[Tensor, "weights weights"], keep: int
) -> tuple[Float64[Tensor, " weights"], float]:
    """The adjusted weights, zeros included, and the sum of the removed weights' saliencies."""
    places, left, rise = torch.arange(len(weight), device=weight.device), weight.clone(), 0.0
    there = torch.ones_like(left, dtype=torch.bool)
    for remaining in range(len(weight) - 1, keep - 1, -1):
        scores = torch.where(there, left.square() / (2 * inverse.diagonal()), math.inf)
        least = int(scores.argmin())
        rise += scores[least].item()
        row = inverse[least].clone()
        column = row / row[least]
        left -= left[least] * column
        inverse.addr_(row, column, alpha=-1)
        there[least] = False
        left[~there] = 0  # exactly
        if remaining <= len(left) // 2:
            places, left, inverse = places[there], left[there], inverse[there][:, there]
            there = there[there]
    return torch.zeros_like(weight).index_copy_(0, places, left), rise
