"""Thin RNN, LSTM and GRU layers, whole sequences in one native call."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.kernels.chains import Layout
from deepthin.kernels.products import native_available
from deepthin.method import Chain
from deepthin.methods.factor import Factor, Window
from deepthin.torch.cudnn import FlatWeights
from deepthin.torch.generated import ThinLayer, handed_out, lost
from deepthin.torch.recurrent import pays, recurrent
from deepthin.torch.tracing import as_leaf, is_portable, is_recorded
from deepthin.torch.weight import ThinPart, ThinWeight

_TYPICAL_BATCH = 8  # of a graph, whose batch may be unknown


def _plan(weight: ThinWeight, index: int) -> Window | Layout | None:
    """Where a matrix lies in a product of two factors, or its chain of cores; None where it must be decoded."""
    return weight.plans[index] or weight.chains[index]


def _method(plan: Window | Layout) -> Factor | Layout:
    return plan if isinstance(plan, Layout) else plan.plan


class ThinRecurrent(ThinLayer, nn.RNNBase):
    """A recurrent layer that multiplies by the codes of its gate matrices where native code can.

    Otherwise they are decoded once a call, and torch's layer runs.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run all steps, as the layer of torch does.

        Args:
            input: steps x batch x inputs; batch first with ``batch_first``; or one sequence without the batch.
            hx: States before the first step, (h, c) of an LSTM; None for zeros.

        Returns:
            The outputs of all steps, and the states after the last step, in torch's layouts.

        Raises:
            RuntimeError: Shapes do not fit; raised by torch's own layer.
        """
        if not isinstance(input, Tensor) and (leaf := as_leaf(self, input, hx)) is not None:
            return leaf
        factors = self._factors(input) if isinstance(input, Tensor) and self._is_plain(input) else None
        return super().forward(input, hx) if factors is None else self._run(input, hx, *factors)

    def _is_plain(self, input: Tensor) -> bool:
        """Whether the operator can take the input. In exported or transformed graphs, weights are decoded instead."""
        if input.dim() not in (2, 3) or not input.numel() or not input.is_floating_point() or input.is_meta:
            return False
        if self.proj_size or is_portable():
            return False
        if input.dtype is not torch.float32 and not torch.is_autocast_enabled("cpu"):
            return False
        like = next(self.parameters(), None)  # None in FullyShardedDataParallel, which sets plain tensors
        if like is None or not native_available:
            return False
        return like.is_cpu and like.dtype is torch.float32

    def _parts(self) -> "list[tuple[ThinWeight, int]]":
        """The ThinWeight of each matrix and the index in it; empty if a matrix is dense or must be decoded."""
        thin = cast(nn.Module, self._modules["thin"])._modules
        parts: list[tuple[ThinWeight, int]] = []
        for name in self._flat_weights_names:
            if name.startswith("weight"):
                part = thin.get(name)
                weight, index = (part.group, part.index) if isinstance(part, ThinPart) else (part, 0)
                if not isinstance(weight, ThinWeight) or _plan(weight, index) is None:
                    return []
                parts.append((weight, index))
        return parts

    def _factors(self, input: Tensor) -> "tuple[list[Tensor], list[Tensor], list[int]] | None":
        """Factors of all matrices, biases, and offsets of the matrices; None where decoded weights are preferred."""
        parts = self._parts()
        plans = [cast(Window | Layout, _plan(weight, index)) for weight, index in parts]
        alone, axis = input.dim() == 2, 0 if self.batch_first else 1
        batch = _TYPICAL_BATCH if is_recorded() else 1 if alone else input.shape[axis]
        training = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        if not parts or not pays(tuple(_method(plan) for plan in plans), batch, training):
            return None
        factors: list[Tensor] = []
        known: dict[int, dict[str, Tensor]] = {}  # a group's floats are taken once
        offsets: list[int] = []
        for (weight, index), plan in zip(parts, plans, strict=True):
            floats = known[id(weight)] = known.get(id(weight)) or weight.floats()
            scale = weight.parts[index].scale
            if isinstance(plan, Layout):
                first, *rest = cast(Chain, weight.decoder).cores(dict(floats), cast(Any, torch))
                offsets.append(-1 - len(rest))
            else:
                first = floats["xf"]
                first = first if len(first) == plan.stop - plan.first else first[plan.first : plan.stop]
                rest = [floats["wf"]]
                offsets.append(plan.offset)
            factors += [first if scale == 1.0 else first * scale, *rest]
        biases = [self._value(name) for name in self._flat_weights_names if name.startswith("bias")]
        return factors, biases, offsets

    def _run(self, input: Tensor, hx: Any, factors: list[Tensor], biases: list[Tensor], offsets: list[int]) -> Any:
        """Run the operator, in single precision also under autocast; with torch's layouts and errors."""
        lstm, alone = self.mode == "LSTM", input.dim() == 2
        places, cell = 2 if self.bidirectional else 1, self.mode.lower().removeprefix("rnn_")
        x = input.unsqueeze(1) if alone else input.transpose(0, 1) if self.batch_first else input
        whole = self.num_layers * places, x.shape[1], self.hidden_size
        if hx is None:
            zeros = x.new_zeros(whole)
            states = [zeros, zeros] if lstm else [zeros]
        else:
            states = [state.unsqueeze(1) if alone else state for state in (hx if lstm else [hx])]
        if x.shape[2] != self.input_size or any(state.shape != whole for state in states):
            return super().forward(input, hx)  # which raises torch's error
        autocast = torch.is_autocast_enabled("cpu")
        kind = torch.get_autocast_dtype("cpu") if autocast else input.dtype
        with torch.autocast("cpu", enabled=False) if autocast else nullcontext():
            if autocast:
                x, states, factors, biases = x.float(), *([t.float() for t in ts] for ts in (states, factors, biases))
            h, c = states[0], states[1] if lstm else None
            # All layers in one call, unless there is dropout between them
            layers = 1 if self.training and self.dropout else self.num_layers
            states_after: list[tuple[Tensor, Tensor | None]] = []
            for first in range(0, self.num_layers, layers):
                x = F.dropout(x, self.dropout) if first else x
                # For each layer and direction there are a state and two matrices
                of_states, of_matrices = (slice(k * places * first, k * places * (first + layers)) for k in (1, 2))
                ends = [sum(2 if n >= 0 else -n for n in offsets[:k]) for k in (of_matrices.start, of_matrices.stop)]
                rest = factors[slice(*ends)], biases[of_matrices], offsets[of_matrices], cell, places
                x, last, last_c = recurrent(x, h[of_states], None if c is None else c[of_states], *rest)
                states_after.append((last, last_c))
        y = (x.squeeze(1) if alone else x.transpose(0, 1) if self.batch_first else x).to(kind)
        last = [
            torch.cat(parts) if len(states_after) > 1 else parts[0]
            for parts in list(zip(*states_after, strict=True))[: len(states)]
        ]
        last = [(state.squeeze(1) if alone else state).to(kind) for state in last]
        return y, tuple(last) if lstm else last[0]

    def _value(self, name: str) -> Tensor:
        """A parameter for the layer's own products, which do not write to it."""
        thin = cast(nn.Module, self._modules["thin"])._modules
        return cast(nn.Module, thin[name])() if name in thin else getattr(self, name)

    def __getattr__(self, name: str) -> Any:
        thin = self.__dict__.get("_modules", {}).get("thin")
        if thin is not None and name in thin:
            return handed_out(self, name, thin[name](), shared=True)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Without the list of weights that torch's layer updates: FSDP exchanges parameters often."""
        thin = self.__dict__.get("_modules", {}).get("thin")
        if thin is not None and name in thin:
            raise ConfigError(lost("An assignment", f"the {name} of a {type(self).__name__}"))
        if isinstance(value, nn.Parameter) and name in self._parameters:
            self._parameters[name] = value
        else:
            nn.Module.__setattr__(self, name, value)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Refuse an input as torch's layer does, without decoding weights for their type.

        Args:
            input: Inputs of all steps.
            batch_sizes: Those of a packed sequence, or None.

        Raises:
            RuntimeError: The type or the shape does not fit.
            ValueError: As above; which of the two depends on torch.
        """
        like = next(self.parameters(), None)
        if like is None or torch.compiler.is_compiling():  # none in FullyShardedDataParallel, which sets plain tensors
            super().check_input(input, batch_sizes)
            return
        known = {"_flat_weights": [torch.empty(0, dtype=like.dtype, device="meta")], "input_size": self.input_size}
        nn.RNNBase.check_input(cast(Any, SimpleNamespace(**known)), input, batch_sizes)

    @property
    def _flat_weights(self) -> list[Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        weights = [self._value(name) for name in self._flat_weights_names]
        return self.__dict__.setdefault("_flat", FlatWeights()).of(self, weights)

    @_flat_weights.setter
    def _flat_weights(self, _: list[Tensor]) -> None:
        """Ignored: torch caches these tensors, whereas this layer reads them at every call."""

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        """Nothing is cached, so nothing can be stale."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_flat"}

    def flatten_parameters(self) -> None:
        """Does nothing: decoded weights are copied to contiguous memory at each call, where cuDNN runs the layer."""


class ThinRNN(ThinRecurrent, nn.RNN):
    """nn.RNN with decoded weights."""


class ThinLSTM(ThinRecurrent, nn.LSTM):
    """nn.LSTM with decoded weights."""


class ThinGRU(ThinRecurrent, nn.GRU):
    """nn.GRU with decoded weights."""
