"""nn.Sequential whose thin linear layers and rectifiers run in one native call, in evaluation.

A call of a module takes about as long as a small thin layer itself. The call is made only while every module is what it
was when the chain was put together, has no hooks, and nothing but the result is wanted; the result has the same bits.
"""

from itertools import takewhile
from typing import Any, cast

import torch
import torch.nn.modules.module as module_globals
from torch import Tensor, nn

from deepthin import kernels
from deepthin.torch.layers import ThinLinear
from deepthin.torch.operators import short_ways
from deepthin.torch.weight import ThinPart, ThinWeight

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = [getattr(module_globals, f"_global{name}") for name in _HOOKS]


class ThinSequential(nn.Sequential):
    """nn.Sequential with thin linear layers among its modules."""

    # The modules when the runs were found; then, in their order, some and a chain that takes their place, or none
    _runs: "tuple[tuple[nn.Module, ...], list[tuple[list[nn.Module], Any]]] | None" = None

    def forward(self, input: Any) -> Any:
        """One module after the other."""
        if self.training or torch.compiler.is_compiling() or not short_ways:
            return super().forward(input)
        now = tuple(self._modules.values())
        if self._runs is None or self._runs[0] != now:
            self._runs = now, self._find_runs()
        for modules, chain in self._runs[1]:
            y = chain(input) if chain is not None and isinstance(input, Tensor) else None
            if y is NotImplemented:  # a module was exchanged: find out anew, next time
                self._runs, y = None, None
            if y is None:
                for module in modules:
                    input = module(input)
            else:
                input = y
        return input

    def _find_runs(self) -> list[tuple[list[nn.Module], Any]]:
        """Maximal runs of linear layers, with the rectifiers and idle dropouts among them, and what is between."""
        rest, runs = list(self), []
        while rest:
            linear = list(takewhile(_may_join, rest)) if _begins(rest[0]) else []
            if linear:
                runs.append((linear, self._chain(linear)))
            else:
                linear = list(takewhile(lambda module: not _begins(module), rest))
                runs.append((linear, None))
            rest = rest[len(linear) :]
        return runs

    def _chain(self, modules: list[nn.Module]) -> Any:
        """A native call for all of them, or none where there are too few or where it would not be the same."""
        links: list[tuple[Any, ...]] = []
        kinds = [(module, type(module)) for module in modules]
        same: list[tuple[dict[str, Any], str, Any]] = []
        lacking: list[tuple[dict[str, Any], str]] = []
        for module in modules:
            lacking.append((module.__dict__, "forward"))
            if isinstance(module, nn.ReLU):
                links[-1] = (*links[-1][:3], True)
            elif isinstance(module, nn.Dropout):
                same.append((module.__dict__, "training", False))
            else:
                thin = cast(Any, module).thin
                weight = thin["weight"]
                group, index = (weight.group, weight.index) if isinstance(weight, ThinPart) else (weight, 0)
                product = cast(ThinWeight, group).short_way(index)
                if product is None:
                    return None
                links.append((product, group._parameters, module._parameters, False))
                same += [
                    (module._modules, "thin", thin),
                    (thin._modules, "weight", weight),
                    (group.__dict__, "training", False),
                ]
                lacking.append((thin._modules, "bias"))
        if len(modules) < 2:
            return None
        hooks = [getattr(module, name) for module in modules for name in _HOOKS]
        return kernels.native().Chain(links, same, lacking, hooks + _GLOBAL_HOOKS, kinds)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_runs"}


def _begins(module: nn.Module) -> bool:
    return type(module) is ThinLinear and "weight" in module.thin and "bias" not in module.thin


def _may_join(module: nn.Module) -> bool:
    return _begins(module) or type(module) is nn.ReLU or (type(module) is nn.Dropout and not module.training)


def make_sequential(model: nn.Module) -> None:
    """Exchange the class of every nn.Sequential that holds thin linear layers."""
    for module in model.modules():
        if type(module) is nn.Sequential and any(type(child) is ThinLinear for child in module):
            module.__class__ = ThinSequential


def make_plain_sequential(model: nn.Module) -> None:
    """Undo ``make_sequential``."""
    for module in model.modules():
        if type(module) is ThinSequential:
            cast(Any, module).__class__ = nn.Sequential
            module.__dict__.pop("_runs", None)
