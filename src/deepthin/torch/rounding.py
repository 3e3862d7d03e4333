"""The floats that a weight is decoded from: rounded at every use, with a straight-through gradient."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepthin.method import Method, Stepped
from deepthin.methods.float_coding import LOG_STEP
from deepthin.torch import accelerated
from deepthin.torch.code_length import quantized
from deepthin.torch.evaluated import Evaluated, current, is_current, is_trusted, last_step, source
from deepthin.torch.latents import LatentState
from deepthin.torch.snapshot import are_parameters, is_exported, is_listed, unrecorded
from deepthin.torch.tracing import is_plain, is_recorded, without_autocast

_TORCH = cast(Any, torch)


class RoundedState(LatentState):
    """The state of a weight, and the floats that its decoder takes, with their gradients.

    Attributes:
        direct: Whether the parameters are the floats that ``decoder`` takes.
    """

    direct: bool
    _steps: Mapping[str, tuple[str, Stepped]]  # what ``FloatCoding.steps`` gives
    _given_steps: "tuple[Mapping[str, Tensor], bool] | None" = (
        None  # of a loaded code: whether its latents give its steps
    )

    def floats(self) -> dict[str, Tensor]:
        """The code that ``decoder`` takes: floats, rounded where the method rounds, and integers.

        Gradients pass the rounding unchanged (straight-through estimator; Bengio, Leonard and Courville, 2013,
        arXiv:1308.3432).

        Returns:
            Entry -> tensor; cached while the state is unchanged, if no gradient is needed.
        """
        if not self.direct and not torch.compiler.is_compiling() and (held := self._held()) is not None:
            return held.floats
        if self.training and self._exact:
            self._follow_first_rank()
        state = self.state()
        if self.direct:
            return state
        if self.rounds and not self.training and is_exported() and (code := self._snapshot_of(state)) is not None:
            return self._decode_floats(code)
        may_cache = self._may_cache()
        if may_cache and not self._wants_gradient() and self._may_hold():
            return self._now().floats
        if not self.rounds:
            return self._decode_floats(state)
        by_value = may_cache and not self._is_accelerated()
        with torch.no_grad():
            latents = {entry: t.detach() for entry, t in state.items()}
            # Encoding again may give another code: the present one stays until a latent changes.
            code = self._coded.get(latents.values()) if by_value else None
        if may_cache and (coded := self._unrounded(state)) and self._gives_again(code if by_value else self._given):
            return _entries_of(self.decoder, state) | {e: quantized(*entry) for e, entry in coded.items()}
        with torch.no_grad(), without_autocast(next(iter(latents.values()))):
            rounded = self._decode_floats(self._coding.encode(latents, _TORCH) if code is None else code)
            if not by_value:
                rounded = self._unless_given(latents, rounded)
        through = accelerated.straight_through if may_cache and not by_value else _straight_through
        passed = {
            e: through(state[e], rounded[e]) if state[e].is_floating_point() else state[e]
            for e in self.decoder.code_shapes()
        }
        return passed | {entry: passed[entry] + self._of_step(entry, rounded[entry]) for entry in self._steps}

    def _held(self) -> Evaluated | None:
        """What evaluation holds, where it is current. A CUDA graph must not read it, since it may be freed before."""
        held = current(self.__dict__)
        return None if held is not None and accelerated.is_captured(held.sources[0].tensor) else held

    def _is_accelerated(self) -> bool:
        """Whether the state is in the memory of an accelerator, where the host should not wait for values."""
        floats = (entry for entry in self._entries if entry not in self._exact)  # integers follow at the next use
        return any(accelerated.on_accelerator(getattr(self, entry)) for entry in floats)

    def _may_hold(self) -> bool:
        """Whether what follows from the state, where it may be cached, can be held: on an accelerator by versions."""
        if not self._is_accelerated():
            return True
        if self.training or accelerated.is_captured(getattr(self, self._entries[0])):
            return False
        return all(is_trusted(self, entry) and not getattr(self, entry).is_inference() for entry in self._entries)

    def _now(self) -> Evaluated:
        """What follows from the present state, computed if need be; where it may be cached and needs no gradient."""
        held, state = self._evaluated, self.state()
        if held is not None and is_current(held, state, self.training):
            return held
        step, by_value = last_step(), (self.direct or self.training) and not self._is_accelerated()
        sources = tuple(source(e, t, by_value or not is_trusted(self, e)) for e, t in state.items())
        with torch.inference_mode(False), torch.no_grad():
            floats = self._floats_of([one.alias.clone() if one.copy is None else one.copy for one in sources])
        self.__dict__["_evaluated"] = held = Evaluated(sources, step, floats, {})
        return held

    def _floats_of(self, copies: list[Tensor]) -> dict[str, Tensor]:
        """The decoder's code for a state, without gradients."""
        code = self._code_of(copies)
        if self.direct:
            return code
        with torch.inference_mode(False), torch.no_grad(), without_autocast(copies[0]):
            return self._decode_floats(code)

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        """Those that an exporter may write: no floats of a weight that rounds, whose graph holds the code instead."""
        own = self.__dict__["_parameters"]
        if not own or not is_listed() or self.training or not self.__dict__.get("rounds"):
            return own
        return own if self._snapshot_of(cast("dict[str, Tensor]", own)) is None else {}

    @_parameters.setter
    def _parameters(  # pyright: ignore[reportIncompatibleVariableOverride] -- as nn.Module.__init__ sets it
        self, value: dict[str, nn.Parameter | None]
    ) -> None:
        self.__dict__["_parameters"] = value

    def _snapshot_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The code as constants for an exported graph; None where floats take the place of the parameters."""
        if torch.compiler.is_dynamo_compiling():  # it was taken when the parameters were listed
            return self._snapshot.latest
        if not are_parameters(*(t for t in state.values() if t.is_floating_point())):
            return None
        return unrecorded(lambda: self._snapshot.take(self.code()))

    def _of_step(self, entry: str, rounded: Tensor) -> Tensor:
        """Zero, with the gradient that a learned step has (Esser et al., 2020, arXiv:1902.08153, equation 3)."""
        latent, method = self._steps[entry]
        step = method.step(getattr(self, latent), _TORCH).reshape(())
        with torch.no_grad():
            slope = (rounded - getattr(self, entry)) / step
        return slope * (step - step.detach())

    def unrounded(self) -> dict[str, tuple[Tensor, Tensor, Stepped]]:
        """The floats whose step is learned, before rounding: what a rate-aware training codes.

        Returns:
            Entry -> latents, the logarithm of the step, and the method that rounds; empty for other methods and where
            nothing is rounded.
        """
        return self._unrounded(self.state()) if self.rounds and self._steps else {}

    def _unrounded(self, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Stepped]]:
        return {entry: (state[entry], state[latent], method) for entry, (latent, method) in self._steps.items()}

    def _gives_again(self, code: Mapping[str, Tensor] | None) -> bool:
        """Whether a code is none, or has just the steps that its latents give: then encoding these gives it again.

        The answer for a code that was loaded is noted, since on an accelerator the host waits for it.
        """
        if code is None or any(value.device != self._device() for value in code.values()):
            return True
        if code is not self._given or not self._is_accelerated():
            return self._has_learned_steps(code)
        if self._given_steps is None or self._given_steps[0] is not code:
            self._given_steps = code, self._has_learned_steps(code)
        return self._given_steps[1]

    def _has_learned_steps(self, code: Mapping[str, Tensor]) -> bool:
        return all(
            torch.equal(code[latent.removesuffix(LOG_STEP) + "step"], method.step(getattr(self, latent), _TORCH))
            for latent, method in self._steps.values()
        )

    def log_steps(self) -> list[Tensor]:
        """The logarithms of learned steps.

        Returns:
            Parameters of one entry each; none where nothing is rounded.
        """
        return [getattr(self, latent) for latent, _ in self._steps.values()] if self.rounds else []

    def _unless_given(self, latents: Mapping[str, Tensor], rounded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rounded floats, or those of the loaded code while the latents are as they were loaded.

        For graphs, which cannot look into the cache: encoding again may give another code than the loaded one.
        """
        copies, code = self._coded.held or ((), None)
        if code is None or code is not self._given:
            return rounded
        pairs = [(latents[entry], old) for entry, old in zip(self._entries, copies, strict=True)]
        pairs = [(now, old) for now, old in pairs if old.is_floating_point()]
        if any(now.dtype != old.dtype or now.device != old.device for now, old in pairs):
            return rounded
        same = torch.stack([(now == old).all() for now, old in pairs]).all()
        given = self._decode_floats(code)
        return {e: torch.where(same, given[e], t) if t.is_floating_point() else t for e, t in rounded.items()}

    def is_trained(self) -> bool:
        """Whether any float of the state requires a gradient.

        Returns:
            False for a frozen weight.
        """
        return any(getattr(self, entry).requires_grad for entry in self._entries)

    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and self.is_trained()

    def _may_cache(self) -> bool:
        """Whether values may be looked up and stored: nobody records, and the state is of plain tensors."""
        return not is_recorded() and is_plain(*(getattr(self, entry) for entry in self._entries))


def _straight_through(latents: Tensor, rounded: Tensor) -> Tensor:
    """The difference is 0, so the sum is exactly the rounded value; its gradient is that of the latent."""
    return (latents - latents.detach()) + rounded


def _entries_of(decoder: Method, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state that a decoder takes."""
    return {entry: state[entry] for entry in decoder.code_shapes()}
