"""Notice an optimiser that goes on with parameters which the model no longer has: it would train nothing, silently."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import ref

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from deepthin.errors import ConfigError

_Model = TypeVar("_Model", bound=nn.Module)
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")
_within = ContextVar("within", default=False)
_watches: "list[Watch]" = []
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
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_look))


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
