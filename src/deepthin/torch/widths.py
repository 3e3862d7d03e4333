"""Network trimming: removes whole neurons and channels that are mostly zero; the network stays dense.

Hu, Peng, Tai and Tang, 2016, arXiv:1607.03250. The criterion is a unit's APoZ, the average percentage of zeros after
its rectifier.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from deepthin.errors import BudgetError, ConfigError, NonFiniteError
from deepthin.storage.report import table
from deepthin.torch.replaced import replacing
from deepthin.torch.units import Path, at_rest, inputs_of, trace, units_of

Batches = Iterable[Tensor | Sequence[Tensor]]
"""Batches of inputs of the model, alone or followed by targets: ``(inputs, targets)``."""

_HOW = "Leave it out of layers"


@dataclass(frozen=True)
class Trimmed:
    """What became of one layer.

    Attributes:
        layer: Its name in the model.
        before: Units before.
        after: Units after.
        mean: Mean APoZ of the units before, 0 to 1.
    """

    layer: str
    before: int
    after: int
    mean: float


@dataclass(frozen=True)
class Trimming:
    """What became of each layer, and of the whole model; ``str`` gives a table.

    Attributes:
        rows: One row for each layer that was looked at.
        parameters_before: Parameters of the model before.
        parameters_after: Parameters of the model after.
        skipped: Layer name -> why it cannot be trimmed.
    """

    rows: tuple[Trimmed, ...]
    parameters_before: int
    parameters_after: int
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        body = [(row.layer, f"{row.before:,}", f"{row.after:,}", f"{row.mean:.3f}") for row in self.rows]
        body += [(name, "", "", "", why) for name, why in self.skipped.items()]
        body.append(("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}", ""))
        heads = ("layer", "before", "after", "mean APoZ", "" if not self.skipped else "not trimmed, because")
        return table(heads, [(*line, "")[:5] for line in body], right=(1, 2, 3))


def apoz(model: nn.Module, batches: Batches, layers: Collection[str] | None = None) -> dict[str, Tensor]:
    """The average percentage of zeros (APoZ) of each unit after its ReLU, as a fraction (Hu et al., 2016).

    A unit is an output of ``nn.Linear`` or a channel of ``nn.Conv2d``.

    Args:
        model: A dense network that ``torch.fx`` can trace; evaluated in evaluation mode and left as it was.
        batches: Inputs, or pairs of inputs and targets; about a thousand validation items suffice.
        layers: Names as in ``model.named_modules()``; by default all layers directly followed by a ReLU.

    Returns:
        For each layer's name a float64 tensor, one number from 0 to 1 a unit, over all items and image positions.

    Raises:
        ConfigError: A layer without ReLU, a model that cannot be traced, or no items.
        NonFiniteError: An activation is NaN or infinite.
    """
    graph, paths = trace(model)
    return _apoz(model, graph, _named(model, paths, layers, removable=False), batches)


def trim(
    model: nn.Module,
    batches: Batches,
    layers: Collection[str] | None = None,
    above: float = 1.0,
    most: float = 1.0,
) -> Trimming:
    """Remove the units whose APoZ is more than ``above`` standard deviations over the layer's mean, in place.

    Network trimming (Hu, Peng, Tai and Tang, 2016, arXiv:1607.03250). A unit is removed with its row of weights, its
    bias, its batch-normalisation statistics, and the columns of the next layers. At least one unit of a layer stays.
    Parameter objects are replaced: build a new optimiser, train on, then trim again.

    Args:
        model: A dense network that ``torch.fx`` can trace.
        batches: Inputs, or pairs of inputs and targets; about a thousand items suffice.
        layers: Names as in ``model.named_modules()``; by default all layers that can be trimmed.
        above: Threshold, in standard deviations over the layer's mean APoZ. With 1, at most half of a layer is removed.
        most: Upper bound on the fraction of a layer that is removed, above 0 and at most 1; the highest APoZ first.

    Returns:
        The units before and after in each layer, and why other layers were not trimmed.

    Raises:
        ConfigError: A layer in ``layers`` cannot be trimmed, and why: it must be dense, be followed by a ReLU, and lead
            to ``nn.Linear`` or ``nn.Conv2d`` through only normalisation, dropout, pooling and flattening. Nothing has
            changed then.
        NonFiniteError: An activation is NaN or infinite; nothing has changed.
    """
    if not math.isfinite(above) or not 0 < most <= 1:
        raise ConfigError(f"trim: above = {above}, most = {most}: above is a number, most above 0 and at most 1.")
    graph, paths = trace(model)
    chosen = _named(model, paths, layers, removable=True)
    scores = _apoz(model, graph, chosen, batches)
    before = sum(p.numel() for p in model.parameters())
    rows: list[Trimmed] = []
    with replacing(model, "trim()"):
        for name, score in scores.items():
            stay = _staying(score, above, most)
            _remove(chosen[name], stay)
            rows.append(Trimmed(name, len(score), len(stay), score.mean().item()))
    skipped = {} if layers is not None else {name: path.obstacle for name, path in paths.items() if path.obstacle}
    return Trimming(tuple(rows), before, sum(p.numel() for p in model.parameters()), skipped)


def _staying(score: Tensor, above: float, most: float) -> Tensor:
    """Indices of the units that stay, in their order; equal scores go by the lower index first."""
    limit = score.mean() + above * score.std(correction=0)
    rounding = 4 * len(score) * torch.finfo(score.dtype).eps  # of the mean and the deviation: equals are never above
    high = int((score > limit + rounding).sum())
    removed = score.argsort(descending=True, stable=True)[: min(high, int(most * len(score)), len(score) - 1)]
    stays = torch.ones(len(score), dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero().flatten()


def _remove(path: Path, stay: Tensor) -> None:
    """Remove all units of a layer but those at the indices ``stay``, and what belongs to them."""
    units = units_of(path.layer)
    if len(stay) == units:
        return
    _select(path.layer, ("weight", "bias"), stay, 0)
    _resize(path.layer, ("out_features", "out_channels"), len(stay))
    for norm in path.norms:
        numbers = inputs_of(norm)
        _select(norm, ("weight", "bias", "running_mean", "running_var"), _spread(stay, numbers // units), 0)
        _resize(norm, ("num_features",), numbers // units * len(stay))
    for layer in path.next:
        columns = inputs_of(layer)
        _select(layer, ("weight",), _spread(stay, columns // units), 1)
        _resize(layer, ("in_features", "in_channels"), columns // units * len(stay))


def _spread(units: Tensor, times: int) -> Tensor:
    """Indices of ``times`` consecutive numbers for each unit."""
    return (times * units[:, None] + torch.arange(times)).flatten()


def _select(module: nn.Module, names: Sequence[str], indices: Tensor, axis: int) -> None:
    for name in names:
        old = getattr(module, name)
        if old is None:
            continue
        new = old.detach().index_select(axis, indices.to(old.device)).clone()
        setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _resize(module: nn.Module, names: Sequence[str], number: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, number)


def _named(
    model: nn.Module, paths: dict[str, Path], layers: Collection[str] | None, removable: bool
) -> dict[str, Path]:
    """The layers that were asked for; ConfigError, with the reason, if one is unsuitable."""
    if isinstance(layers, str):
        raise ConfigError(f"layers = {layers!r} is one string: give a list of names, [{layers!r}].")
    able = {n: path for n, path in paths.items() if path.rectifier is not None and not (removable and path.obstacle)}
    if layers is None:
        if not able:
            why = "; ".join(f"{name}: {path.obstacle}" for name, path in paths.items())
            raise ConfigError(f"No layer has units that can be {'trimmed' if removable else 'counted'}. {why}".strip())
        return able
    known = dict(model.named_modules())
    for name in layers:
        if name in able:
            continue
        if name not in known:
            raise ConfigError(f"The model has no layer {name!r}. Layers followed by a ReLU: {', '.join(able)}.")
        if name not in paths:
            raise ConfigError(
                f"{name} is {type(known[name]).__name__}, not an nn.Linear or nn.Conv2d that the model calls. {_HOW}."
            )
        raise ConfigError(f"{name}: {paths[name].obstacle}. {_HOW}.")
    return {name: able[name] for name in dict.fromkeys(layers)}


class _Counter(fx.Interpreter):
    """Runs a model's graph and counts the zeros that rectifiers return."""

    def __init__(self, model: nn.Module, graph: fx.Graph, paths: Mapping[str, Path]) -> None:
        super().__init__(model, graph=graph)
        self.zeros = {name: torch.zeros(units_of(path.layer), dtype=torch.float64) for name, path in paths.items()}
        self.counts = dict.fromkeys(paths, 0)
        self._begins = {path.node: (name, path) for name, path in paths.items()}
        self._ends = {path.rectifier: name for name, path in paths.items()}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and count the zeros of its value.

        Args:
            n: The node.

        Returns:
            Its value.

        Raises:
            ConfigError: The units are not in the dimension that the path requires.
            NonFiniteError: An activation has a NaN or an infinity.
        """
        value = super().run_node(n)
        if n in self._begins:
            name, path = self._begins[n]
            wanted = 4 if isinstance(path.layer, nn.Conv2d) else 2 if path.rows_only else value.dim()
            if value.dim() != wanted:
                raise ConfigError(
                    f"{name} gives {value.dim()} dimensions, but what follows is covered for {wanted}, items first. "
                    f"{_HOW}."
                )
        if n in self._ends:
            name = self._ends[n]
            axis = 1 if value.dim() in (2, 4) else -1
            by_unit = value.movedim(axis, 0).reshape(len(self.zeros[name]), -1)
            if not torch.isfinite(by_unit).all():
                raise NonFiniteError(f"What {name} gives is not finite: nothing was trimmed. Use other inputs.")
            self.zeros[name] += (by_unit == 0).sum(1).cpu()
            self.counts[name] += by_unit.shape[1]
        return value


def _apoz(model: nn.Module, graph: fx.Graph, paths: Mapping[str, Path], batches: Batches) -> dict[str, Tensor]:
    counter = _Counter(model, graph, paths)
    with at_rest(model):
        for batch in batches:
            counter.run(*([batch] if isinstance(batch, Tensor) else batch[:-1]))
    if not all(counter.counts.values()):
        raise ConfigError("batches has no items, so nothing could be counted: give some; an iterator serves only once.")
    return {name: zeros / counter.counts[name] for name, zeros in counter.zeros.items()}


_DOUBLINGS = 16  # of the width, until a size that has not grown since is taken to be constant
_WIDEST = 1 << 48


def same_size(build: Callable[[int], nn.Module], weight_bytes: int) -> int:
    """The largest width at which the matrices of ``build(width)`` take at most ``weight_bytes``.

    It gives the baseline that needs no compression: a smaller dense network of equal size.

    Args:
        build: From a width >= 1 to a model; called on the meta device. The size must grow with the width.
        weight_bytes: Upper bound on the bytes of parameters with two or more dimensions.

    Returns:
        The width.

    Raises:
        BudgetError: Width 1 takes more.
        ConfigError: The size does not grow with the width.
    """

    def taken(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() * p.element_size() for p in build(width).parameters() if p.dim() > 1)

    if (least := taken(1)) > weight_bytes:
        raise BudgetError(
            f"No network of this shape fits {weight_bytes} bytes: the one of width 1 takes {least}.",
            smallest_bits=8 * least,
            smallest_ratio=math.nan,
        )
    high, most, still = 2, least, 0  # ``still``: doublings of the width in a row without a larger size
    while (size := taken(high)) <= weight_bytes:
        most, still = max(most, size), 0 if size > most else still + 1
        if still > _DOUBLINGS or high > _WIDEST:
            raise ConfigError(
                f"same_size: the matrices of build(width) do not grow with the width: they take {size} bytes at width "
                f"{high}, which never exceeds {weight_bytes}. Use the width in build."
            )
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if taken(middle) <= weight_bytes else (low, middle)
    return low
