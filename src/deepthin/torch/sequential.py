"""nn.Sequential whose thin linear layers and rectifiers run in one native call, in evaluation.

Calling a module takes about as long as a small thin layer itself. The native call is made only while no module has been
exchanged or has hooks, and no gradient is needed; the result has the same bits.
"""

from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepthin.kernels import products
from deepthin.torch import native_call
from deepthin.torch.layers import ThinLinear
from deepthin.torch.operators import short_ways


class ThinSequential(nn.Sequential):
    """nn.Sequential with thin linear layers among its modules."""

    # All modules when the runs were built; then in order each run's modules and its native call, or None
    _runs: "tuple[tuple[nn.Module, ...], list[tuple[list[nn.Module], Any]]] | None" = None

    def forward(self, input: Any) -> Any:
        """Run the modules in order; in evaluation, thin linear layers and rectifiers in one native call.

        Args:
            input: What the first module takes.

        Returns:
            What the last module returns, with the same bits as module by module.
        """
        if self.training or torch.compiler.is_compiling() or not short_ways:
            return super().forward(input)
        now, runs = tuple(self._modules.values()), self._runs
        if runs is None or runs[0] != now:
            self._runs = runs = now, self._find_runs()
        for modules, chain in runs[1]:
            y = chain(input) if chain is not None and isinstance(input, Tensor) else None
            if y is NotImplemented:  # a module was exchanged: rebuild the runs at the next call
                self._runs = y = None
            if y is None:
                for module in modules:
                    input = module(input)
            else:
                input = y
        return input

    def _find_runs(self) -> list[tuple[list[nn.Module], Any]]:
        """Maximal runs of linear layers, with the rectifiers and inactive dropouts among them, and runs of the rest."""
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
        """A native call for all modules; None for a single module."""
        links: list[tuple[Any, ...]] = []
        for module in modules:
            if isinstance(module, nn.ReLU):
                links.append((module,))
            elif isinstance(module, nn.Dropout):
                links.append((module, None))
            else:
                links.append((module, *cast("tuple[Any, ...]", native_call.links(module))))
        return products.native().Chain(links) if len(modules) > 1 else None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_runs", "_compiled_call_impl")}


def _begins(module: nn.Module) -> bool:
    return type(module) is ThinLinear and native_call.links(module) is not None


def _may_join(module: nn.Module) -> bool:
    return _begins(module) or type(module) is nn.ReLU or (type(module) is nn.Dropout and not module.training)


def make_sequential(model: nn.Module) -> None:
    """Give every nn.Sequential with thin linear layers the class ``ThinSequential``, all others their own, in place.

    Args:
        model: The network.
    """
    for module in model.modules():
        if type(module) in (nn.Sequential, ThinSequential):
            thin = any(type(child) is ThinLinear for child in module.children())
            cast(Any, module).__class__ = ThinSequential if thin else nn.Sequential
            module.__dict__.pop("_runs", None)


def make_plain_sequential(model: nn.Module) -> None:
    """Undo ``make_sequential``, in place.

    Args:
        model: The network.
    """
    for module in model.modules():
        if type(module) is ThinSequential:
            cast(Any, module).__class__ = nn.Sequential
            module.__dict__.pop("_runs", None)
