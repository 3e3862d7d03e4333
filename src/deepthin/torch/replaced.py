"""Notice an optimiser that trains nothing, or codes far too slowly.

Either it goes on with parameters that the model no longer has; or it has the codes, but at the rate of dense weights;
or codes get gradients, and no optimiser has them.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from deepthin.errors import ConfigError
from deepthin.torch.rates import STEPS, parameter_groups
from deepthin.torch.weight import ThinWeight

_Model = TypeVar("_Model", bound=nn.Module)
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")
_within = ContextVar("within", default=False)
_watches: "list[Watch | Rates]" = []
_FAST = 10.0  # codes that learn at this multiple of the dense rate, or above, are looked at
_ON_PURPOSE = 5e-3  # no dense network is trained at this rate by Adam: it was chosen for codes
_STEPS = 8  # of optimisers without the codes, while these get gradients: an adversarial training takes five in turn
_hooks: list[Any] = []


@dataclass(eq=False)
class Watch:
    """Parameters that took the place of others, until an optimiser has them or nobody has the others."""

    what: str  # the call that replaced them
    old: "Sequence[tuple[ref[Any], tuple[int, int]]]"  # and what gradient each had at that time
    new: "Sequence[ref[Any]]"
    stale: set[int] = field(default_factory=set[int])  # optimisers that stepped the old ones in vain, and nothing new

    def saw(self, optimizer: Optimizer) -> bool:
        """Look at an optimiser that is about to step; whether there is nothing more to watch."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        old = [(p, mark) for reference, mark in self.old if (p := reference()) is not None]
        new = [p for reference in self.new if (p := reference()) is not None]
        if not old or not new or any(id(p) in held for p in new):
            return True
        mine = [(p, mark) for p, mark in old if id(p) in held]
        idle = all(p.grad is None or _mark(p) == mark or not p.grad.any() for p, mark in mine)
        if mine and idle and any(p.grad is not None for p in new):
            if id(optimizer) in self.stale:
                self.refuse(type(optimizer).__name__)
            self.stale.add(id(optimizer))
        return False

    def refuse(self, optimizer: str = "Adam") -> None:
        """ConfigError with the line to write."""
        raise ConfigError(
            f"{self.what} replaced the model's parameters, but the optimizer still has the old ones: it trains "
            f"nothing. Build a new one after {self.what}: optimizer = torch.optim.{optimizer}("
            "deepthin.torch.parameter_groups(model, lr))."
        )


@dataclass(eq=False)
class Rates:
    """Codes that need a larger rate than dense weights, until an optimiser that has some of them is about to step."""

    multipliers: "Sequence[tuple[ref[Any], float]]"  # of the learning rate, for each parameter
    without: "WeakKeyDictionary[Optimizer, int]" = field(default_factory=WeakKeyDictionary)  # and their groups
    steps: int = 0  # of optimisers without any of the codes, although these have new gradients
    last: tuple[int, int] = (0, 0)  # the gradient at the step before
    told: bool = False

    def saw(self, optimizer: Optimizer) -> bool:
        """Look at an optimiser that is about to step, warn; whether there is nothing more to watch."""
        groups = optimizer.param_groups
        if self.without.get(optimizer) != len(groups):
            codes = {id(p): times for reference, times in self.multipliers if (p := reference()) is not None}
            held = [group for group in groups if any(id(p) in codes for p in group["params"])]
            if held or not codes:
                if not self.told:
                    self.told = True
                    _check_rates(optimizer, held, codes)
                return True
            self.without[optimizer] = len(groups)
        first = next((p for reference, _ in self.multipliers if (p := reference()) is not None), None)
        if first is None or self.told:
            return True
        mark, self.last = self.last, _mark(first)
        self.steps += first.requires_grad and first.grad is not None and mark != self.last
        if self.steps > _STEPS:
            self.told = True
            warnings.warn(
                f"The codes of thin layers get gradients, but none of the optimisers that took {self.steps} steps has "
                f"them: they are not trained. Write optimizer = torch.optim.{type(optimizer).__name__}("
                "deepthin.torch.parameter_groups(model, lr)) after compress; or freeze them, requires_grad_(False).",
                stacklevel=5,
            )
        return self.told


def _check_rates(optimizer: Optimizer, held: list[dict[str, Any]], codes: dict[int, float]) -> None:
    """Warn if an adaptive optimiser trains codes at the rate of dense weights."""
    kind = type(optimizer).__name__
    coupled = "weight_decay" in optimizer.defaults and "decoupled_weight_decay" not in optimizer.defaults
    if coupled and any("decoupled_weight_decay" in group and group["weight_decay"] for group in held):
        warnings.warn(
            f"{kind} adds weight decay to gradients, but that of recurrent factors is meant to be decoupled. Use Adam "
            "or AdamW, or write deepthin.torch.parameter_groups(model, lr, weight_decay=0).",
            stacklevel=6,
        )
        return
    if kind in ("SGD", "ASGD", "LBFGS", "Rprop") or any(group.get("name") for group in held):
        return  # the multipliers were found with Adam; parameter_groups names its groups

    def rate(group: dict[str, Any]) -> float:
        return float(group.get("initial_lr", group.get("lr", _ON_PURPOSE)))  # before a schedule

    dense = [rate(g) for g in optimizer.param_groups if any(id(p) not in codes for p in g["params"])]
    fastest = max(map(rate, held), default=_ON_PURPOSE)
    if fastest < _ON_PURPOSE and fastest < 2 * min(dense, default=fastest):
        times = max(codes[id(p)] for group in held for p in group["params"] if id(p) in codes)
        warnings.warn(
            f"{kind} trains the codes of thin layers at the rate of dense weights, {fastest:g}, but they need "
            f"{times:g} times that. Write optimizer = torch.optim.{kind}(deepthin.torch.parameter_groups(model, "
            f"lr={fastest:g})); the rate given there is that of the dense network.",
            stacklevel=6,
        )


@contextlib.contextmanager
def replacing(model: nn.Module, what: str) -> Iterator[list[Watch]]:
    """While this holds, parameters of the model are replaced; afterwards optimisers are watched that missed it.

    An optimiser that steps twice with the old parameters, which get no gradient any more, while the new ones do and no
    optimiser has them, raises ConfigError. One that has some of the new ones, or whose old parameters another model
    trains, is fine.

    Args:
        model: The network.
        what: The call, as messages name it.

    Yields:
        A list, which has the watch afterwards if there is something to watch.
    """
    made: list[Watch] = []
    if _within.get():
        yield made
        return
    before = [(ref(parameter), _mark(parameter)) for parameter in model.parameters()]
    token = _within.set(True)
    try:
        yield made
    finally:
        _within.reset(token)
    now = {id(parameter): parameter for parameter in model.parameters()}
    alive = [(reference, mark, p) for reference, mark in before if (p := reference()) is not None]
    kept = {id(p) for *_, p in alive if now.get(id(p)) is p}
    old = [(reference, mark) for reference, mark, p in alive if id(p) not in kept]
    new = [ref(parameter) for key, parameter in now.items() if key not in kept]
    del alive, now
    if old and new:
        made.append(Watch(what, old, new))
        _watches.extend(made)
    if new:
        _watch_rates(model)
    if _watches and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))


def _watch_rates(model: nn.Module) -> None:
    """Watch the optimisers of a model whose codes are new."""
    own = {id(p) for module in model.modules() if isinstance(module, ThinWeight) for p in module.parameters()}
    fast = [group for group in parameter_groups(model, 1.0) if group["lr"] >= _FAST and group["name"] != STEPS]
    codes = {id(p): (p, group["lr"]) for group in fast for p in group["params"] if id(p) in own}
    for watch in [watch for watch in _watches if isinstance(watch, Rates)]:  # one warning is enough
        if any(id(reference()) in codes for reference, _ in watch.multipliers):
            _watches.remove(watch)
    if codes:
        _watches.append(Rates([(ref(p), times) for p, times in codes.values()]))


def rates_are_right(model: nn.Module) -> None:
    """Watch no optimiser of a model for the rates of its codes: somebody else sees to them.

    Args:
        model: The network.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for watch in [watch for watch in _watches if isinstance(watch, Rates)]:
        if any(id(reference()) in own for reference, _ in watch.multipliers):
            _watches.remove(watch)


def replaces(
    what: str,
) -> Callable[[Callable[Concatenate[_Model, _Rest], _Result]], Callable[Concatenate[_Model, _Rest], _Result]]:
    """The same around a whole function whose first argument is the model."""

    def around(
        function: Callable[Concatenate[_Model, _Rest], _Result],
    ) -> Callable[Concatenate[_Model, _Rest], _Result]:
        @functools.wraps(function)
        def watched(model: _Model, *arguments: _Rest.args, **named: _Rest.kwargs) -> _Result:
            with replacing(model, what):
                return function(model, *arguments, **named)

        return watched

    return around


def _mark(parameter: Tensor) -> tuple[int, int]:
    return (0, 0) if parameter.grad is None else (id(parameter.grad), parameter.grad._version)


def _look(optimizer: Optimizer, arguments: Any, named: Any) -> None:
    for watch in list(_watches):
        if watch.saw(optimizer):
            with contextlib.suppress(ValueError):  # another thread was first
                _watches.remove(watch)
    while not _watches and _hooks:
        _hooks.pop().remove()
