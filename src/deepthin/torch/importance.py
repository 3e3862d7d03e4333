"""How sensitive the loss is to each weight: the diagonal of its Hessian, or Adam's second moments.

Both as in Choi, El-Khamy and Lee, 2017, arXiv:1612.01543; the diagonal is LeCun, Denker and Solla's (1990, "Optimal
brain damage") for trained networks, by Gauss and Newton. Optimal brain surgeon (Hassibi, Stork and Wolff, 1993) takes
the whole matrix of one small tensor.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from deepthin.errors import ConfigError, NonFiniteError
from deepthin.plan.file_limit import projecting
from deepthin.plan.shares import Planned

Batches = Iterable[Sequence[Tensor]]
"""Batches of tensors, items first: one or several inputs of the model, and last the targets of the loss."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""From outputs and targets to a scalar, such as ``nn.functional.cross_entropy``."""

MOST_OUTPUTS = 2048  # of an item: its Hessian at the output is a matrix of their square
_ROWS = 256  # gradients that are multiplied at once


def hessian_diagonal(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    passes: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """The diagonal of the Gauss-Newton matrix of the mean loss, by parameter name.

    For each item the Hessian H of the loss at the output is exact. With ``S S^T = H``, the columns of S are
    back-propagated, and the squares of the gradients add up to the diagonal of ``J^T H J``, which is never negative.
    Where S has more columns than ``passes`` (10 classes have 9), random signs estimate the diagonal without bias
    (Hutchinson, 1990): over n items the standard deviation is at most ``sqrt(2 / (n passes))`` of the root mean square
    over items. A thousand items suffice (Choi, El-Khamy and Lee, 2017, arXiv:1612.01543). The cost grows with the cube
    of the output's size: seconds an item at 2,048 numbers, the upper bound.

    Args:
        model: Evaluated in evaluation mode and left as it was; frozen parameters are included.
        batches: Sequences of tensors, items first: the model's inputs, then what ``loss`` compares with.
        loss: From outputs and targets to a mean loss.
        passes: Upper bound on the backward passes for each item.
        seed: Of the random signs.
        progress: Called after each item with the number of items so far.

    Returns:
        For each name (a shared tensor under each of its names) a tensor of the parameter's shape, >= 0.

    Raises:
        ConfigError: No items, or an output that is not one tensor or is too large.
        NonFiniteError: The loss has no finite second derivative.
    """
    generator = torch.Generator().manual_seed(seed)
    with _at_rest(model) as parameters:
        sums = {name: torch.zeros_like(p, dtype=_wide(p), requires_grad=False) for name, p in parameters.items()}
        count = 0
        for count, item in enumerate(_items(batches), 1):
            for gradients in _columns(model, item, loss, passes, generator, list(parameters.values())):
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total.add_(gradient.to(total.dtype).square())
            progress(count)
    return _by_every_name(model, {name: total / _some(count) for name, total in sums.items()})


def adam_importance(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The square root of Adam's second-moment estimate, by parameter name.

    It costs nothing once a network is trained, and replaces the Hessian's diagonal (Choi, El-Khamy and Lee, 2017,
    arXiv:1612.01543).

    Args:
        optimizer: Adam or AdamW, after at least one step.
        model: The model that it trained.

    Returns:
        For each name a tensor of the parameter's shape, >= 0; parameters that the optimiser never updated are left out.

    Raises:
        ConfigError: The optimiser has no second moment (``exp_avg_sq``) of any parameter.
    """
    roots: dict[str, Tensor] = {}
    decays = {id(p): group.get("betas") for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" in state and (betas := decays.get(id(parameter))):
            bias = 1 - float(betas[1]) ** float(state["step"])
            roots[name] = (state["exp_avg_sq"].detach() / bias).sqrt()
    if not roots:
        raise ConfigError(
            f"{type(optimizer).__name__} keeps no second moment (exp_avg_sq) of any parameter of this model: use Adam "
            "or AdamW, for at least one step, or hessian_diagonal."
        )
    return _by_every_name(model, roots)


def check_importance(model: nn.Module, importance: Mapping[str, Tensor]) -> None:
    """Refuse importance that does not fit a model.

    Args:
        model: The dense or thin network.
        importance: Parameter name -> tensor.

    Raises:
        ConfigError: An unknown name, a shape that is not the parameter's, or a negative number.
        NonFiniteError: A NaN or an infinity.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, value in importance.items():
        if name not in shapes:
            raise ConfigError(f"importance: the model has no parameter {name!r}.{_closest(name, shapes)}")
        if tuple(value.shape) != shapes[name]:
            raise ConfigError(
                f"importance: {name} has shape {shapes[name]} in the model, not {tuple(value.shape)}: give a number "
                "for each weight."
            )
        if not (fine := torch.isfinite(value)).all():
            where = tuple((~fine).nonzero()[0].tolist())
            raise NonFiniteError(
                f"importance: {name} is {value[where].item()} at index {where}: give finite numbers, 0 for weights "
                "that do not matter."
            )
        if (value < 0).any():
            where = tuple((value < 0).nonzero()[0].tolist())
            raise ConfigError(
                f"importance: {name} is {value[where].item():g} at index {where}: importance must be >= 0. "
                "Use hessian_diagonal, which has no negative numbers, or clamp yours at 0."
            )


def importance_for(planned: Planned, importance: Mapping[str, Tensor]) -> list[Tensor] | None:
    """The importance of a plan's tensors.

    Args:
        planned: A tensor or a group.
        importance: Parameter name -> importance, as in ``compress``; under any name of a shared tensor.

    Returns:
        One tensor for each of the plan's, of its shape; None if none is given. Where a rule shares the projection of
        one tensor with others: 1 for that tensor, 0 for the others.

    Raises:
        ConfigError: Only some members of a group have importance: no default would be comparable with the others'.
    """
    if (weights := projecting(planned)) is not None:
        return [torch.from_numpy(weight) for weight in weights]
    names = [(tensor.name, *tensor.also) for tensor in planned.tensors]
    values = [next((importance[name] for name in aliases if name in importance), None) for aliases in names]
    given = [value for value in values if value is not None]
    if given and len(given) < len(names):
        missing = next(aliases[0] for aliases, value in zip(names, values, strict=True) if value is None)
        raise ConfigError(
            f"importance: {missing} has none, but shares a code with tensors that have: give it for all of a group, or "
            "for none."
        )
    return given or None


# ---- Gradients of single items --------------------------------------------------------------------------------------


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Evaluation mode with gradients for all floating parameters; modes and flags are restored afterwards."""
    training = {module: module.training for module in model.modules()}
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    wanting = {name: p.requires_grad for name, p in parameters.items()}
    try:
        model.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        # cuDNN cannot differentiate recurrent layers in evaluation mode
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            yield parameters
    finally:
        for module, was in training.items():
            module.training = was
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanting[name])


def _items(batches: Batches) -> Iterator[list[Tensor]]:
    """Single items, as batches of one."""
    for batch in batches:
        if len({len(tensor) for tensor in batch}) != 1 or len(batch) < 2:
            raise ConfigError(
                f"A batch of shapes {', '.join(str(tuple(t.shape)) for t in batch)}: give inputs and targets, items "
                "first, as many of each."
            )
        for index in range(len(batch[0])):
            yield [tensor[index : index + 1] for tensor in batch]


def _some(count: int) -> int:
    if not count:
        raise ConfigError("batches has no items: give some hundred to a thousand.")
    return count


def _columns(
    model: nn.Module,
    item: Sequence[Tensor],
    loss: Loss,
    passes: int,
    generator: torch.Generator,
    wanted: Sequence[Tensor],
) -> Iterator[list[Tensor]]:
    """Gradients whose outer products sum to ``J^T H J`` of one item, exactly or in expectation."""
    *inputs, target = item
    output = model(*inputs)
    if not isinstance(output, Tensor):
        raise ConfigError(f"The model returns {type(output).__name__}: wrap it in a module that returns one tensor.")
    if output.numel() > MOST_OUTPUTS:
        raise ConfigError(
            f"The output has {output.numel()} numbers an item, whose second derivatives are a matrix: at most "
            f"{MOST_OUTPUTS} are covered. Use adam_importance, or a loss of fewer outputs."
        )
    by_output = torch.func.jacrev(torch.func.grad(lambda z: loss(z, target)))(output.detach())
    second = by_output.reshape(output.numel(), -1).detach()
    if not torch.isfinite(second).all():
        raise NonFiniteError("The loss has no finite second derivative at the output of an item: check model and data.")
    factor = _factor(second.double())
    if factor.shape[1] > passes:
        signs = torch.randint(2, (factor.shape[1], passes), generator=generator).to(factor) * 2 - 1
        factor = factor @ signs / math.sqrt(passes)
    for number, column in enumerate(factor.T, 1):
        direction = column.to(output.dtype).view_as(output)
        keep = number < factor.shape[1]  # the graph
        yield list(torch.autograd.grad(output, wanted, direction, keep, materialize_grads=True))


def _factor(matrix: Float64[Tensor, "outputs outputs"]) -> Float64[Tensor, "outputs rank"]:
    """S with ``S S^T`` the matrix, without eigenvalues that are negative or within rounding of 0."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    some = values > len(values) * torch.finfo(torch.float32).eps * values.abs().max()
    return vectors[:, some] * values[some].sqrt()


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _by_every_name(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under all names that share a parameter."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = ((name, first[id(p)]) for name, p in model.named_parameters(remove_duplicate=False))
    return {name: tensors[one] for name, one in names if one in tensors}


def _closest(name: str, names: Iterable[str]) -> str:
    best = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f" Closest: {best[0]!r}." if best else ""
