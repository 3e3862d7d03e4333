"""Where the units of each layer go, in the graph that torch.fx traces.

A unit is an output of ``nn.Linear`` or a channel of ``nn.Conv2d``. Network trimming (Hu, Peng, Tai and Tang, 2016,
arXiv:1607.03250) removes whole units with all parameters that belong to them (``deepthin.torch.widths``).
"""

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from deepthin.errors import ConfigError
from deepthin.torch.generated import ThinLayer

_RELU: set[Any] = {nn.ReLU, nn.ReLU6, torch.relu, torch.relu_, F.relu, F.relu6, F.relu_, "relu", "relu_"}
_FLATTEN: set[Any] = {nn.Flatten, torch.flatten, "flatten"}
NORMS: set[Any] = {nn.BatchNorm1d, nn.BatchNorm2d}
_EACH_NUMBER: set[Any] = {nn.Dropout, nn.Identity, F.dropout, "contiguous"}  # act on each number separately
_EACH_CHANNEL: set[Any] = {
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, F.dropout2d, F.max_pool2d,
    torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
}  # fmt: skip


@dataclass
class Path:
    """Where the units of a layer go in the model's graph.

    Attributes:
        layer: The layer whose outputs are the units.
        node: Its node in the graph.
        rectifier: The first ReLU behind it; None if there is none.
        norms: Batch normalisations on the way, which have parameters for each unit.
        next: The layers that take the units as inputs.
        rows_only: Whether something on the way requires the units in the second dimension.
        obstacle: Why the units cannot be removed; empty if they can.
    """

    layer: nn.Module
    node: fx.Node
    rectifier: fx.Node | None = None
    norms: list[nn.Module] = field(default_factory=list[nn.Module])
    next: list[nn.Module] = field(default_factory=list[nn.Module])
    rows_only: bool = False
    obstacle: str = ""


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, Path]]:
    """Trace a model by torch.fx.

    Args:
        model: The network.

    Returns:
        Its graph, and for the name of each linear and convolutional layer the path of its units.

    Raises:
        ConfigError: torch.fx cannot trace the model.
    """
    with at_rest(model):
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # a user's forward may raise anything when it is given a proxy
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise ConfigError(
                f"{type(model).__name__} cannot be traced: {reason}. Trimming must know which layers follow on each "
                "other: trim a part of the model that torch.fx can trace, such as an nn.Sequential."
            ) from None
    modules = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    fixed = _fixed(model, graph, modules)
    paths: dict[str, Path] = {}
    for node, layer in modules.items():
        name = str(node.target)
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in paths:
            path = paths[name] = Path(layer, node)
            obstacle = _follow(node, path, modules, fixed)
            path.obstacle = fixed.get(layer, obstacle)
    return graph, paths


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, as a context; afterwards each module is in its previous mode.

    Args:
        model: The network.

    Yields:
        Nothing.
    """
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was


def units_of(layer: nn.Module) -> int:
    """The number of units of a layer.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d``.

    Returns:
        Its output features or channels.
    """
    return cast(Tensor, layer.weight).shape[0]


def inputs_of(layer: nn.Module) -> int:
    """The number of inputs of a layer.

    Args:
        layer: ``nn.Linear``, ``nn.Conv2d`` or a batch normalisation.

    Returns:
        Its input features or channels.
    """
    return cast(int, layer.num_features if type(layer) in NORMS else cast(Tensor, layer.weight).shape[1])


class _Tracer(fx.Tracer):
    """Traces into the user's modules, but not into torch's or thin layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module stays one node."""
        return isinstance(m, ThinLayer) or super().is_leaf_module(m, module_qualified_name)


def _fixed(model: nn.Module, graph: fx.Graph, modules: Mapping[fx.Node, nn.Module]) -> dict[nn.Module, str]:
    """Why the number of units of some modules cannot change."""
    calls, read = list(modules.values()), [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    holders = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    reasons: dict[nn.Module, str] = {}
    for node, module in modules.items():
        name = str(node.target)
        if isinstance(module, ThinLayer):
            reasons[module] = f"{name} is thin: trim first and compress then, or materialize the model"
        elif isinstance(module, nn.Linear | nn.Conv2d) and type(module) not in (nn.Linear, nn.Conv2d):
            reasons[module] = f"{name} is {type(module).__name__}, neither nn.Linear nor nn.Conv2d itself"
        elif isinstance(module, nn.Linear | nn.Conv2d) and "weight" not in module._parameters:
            reasons[module] = f"the weight of {name} is made from something else"
        elif getattr(module, "groups", 1) != 1:
            reasons[module] = f"the channels of {name} are in groups"
        elif module._parameters and calls.count(module) > 1:
            reasons[module] = f"{name} is called more than once"
        elif any(parameter.startswith(f"{name}.") for parameter in read):
            reasons[module] = f"the model itself reads parameters of {name}"
        elif any(holders.count(id(p)) > 1 for p in module._parameters.values() if p is not None):
            reasons[module] = f"{name} shares a parameter with another layer"
    return reasons


def _follow(
    node: fx.Node, path: Path, modules: Mapping[fx.Node, nn.Module], fixed: Mapping[nn.Module, str], flat: bool = False
) -> str:
    """Follow all users of a node; returns the obstacle to removal. ``flat``: the images have been flattened."""
    users = [user for user in node.users if not _asks_for_items(user)]
    if path.rectifier is None and len(users) != 1:
        return "it is not followed by a ReLU alone"
    obstacles: list[str] = []
    for user in users:
        module = modules.get(user)
        kind, name = (user.target, _word(user)) if module is None else (type(module), str(user.target))
        if path.rectifier is None and kind not in _RELU | NORMS | _EACH_NUMBER | _EACH_CHANNEL | _FLATTEN:
            obstacles.append(f"it is followed by {name}, not by a ReLU")
        elif kind in _RELU | _EACH_NUMBER or (kind in _EACH_CHANNEL and isinstance(path.layer, nn.Conv2d) and not flat):
            path.rectifier = path.rectifier or (user if kind in _RELU else None)
            obstacles.append(_follow(user, path, modules, fixed, flat))
        elif module is not None and kind in NORMS:
            path.norms.append(module)
            path.rows_only = True
            obstacles.append(fixed.get(module, "") or _follow(user, path, modules, fixed, flat))
        elif _flattens(user, module):
            path.rows_only = True
            obstacles.append(_follow(user, path, modules, fixed, True))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            path.next.append(module)
            like = isinstance(path.layer, nn.Conv2d), isinstance(module, nn.Conv2d)
            fits = like == (True, not flat) or like == (False, False)
            whole = (
                fits
                and inputs_of(module) % units_of(path.layer) == 0
                and (flat or inputs_of(module) == units_of(path.layer))
            )
            obstacles.append(fixed.get(module, "") or ("" if whole else f"{name} takes other numbers than its units"))
        else:
            outputs = user.op == "output"
            obstacles.append("its units are outputs of the model" if outputs else f"its units go into {name}")
    return next(filter(None, obstacles), "" if path.next else "nothing takes its units")


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node makes one row of each item."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    given: dict[str, Any] = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    if node.target in _FLATTEN:
        return given.get("start_dim", 0) == 1 and given.get("end_dim", -1) == -1
    if node.target not in ("view", "reshape", torch.reshape) or node.kwargs:
        return False
    shape: Any = node.args[1:]
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    items, *rest = shape
    return rest == [-1] and isinstance(items, fx.Node) and _asks_for_items(items)


def _asks_for_items(node: fx.Node) -> bool:
    """Whether the node only reads the number of items."""
    if node.target == "size" and node.args[1:]:
        return bool(node.args[1] == 0)
    if node.target is operator.getitem and _is_shape(node.args[0]):
        return bool(node.args[1] == 0)
    return _is_shape(node) and all(map(_asks_for_items, node.users))


def _is_shape(node: Any) -> bool:
    return isinstance(node, fx.Node) and (node.target == "size" or (node.target is getattr and node.args[1] == "shape"))


def _word(node: fx.Node) -> str:
    """The name of a node's function, for messages."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
