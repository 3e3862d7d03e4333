"""The latent floats of a generated weight, the code that they round to, and both in state dicts."""

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor

from deepthin.method import Method
from deepthin.methods.float_coding import FloatCoding
from deepthin.torch.cache import StateCache
from deepthin.torch.evaluated import Evaluated
from deepthin.torch.snapshot import Snapshot, is_listed
from deepthin.torch.state import CodeState, smallest_type
from deepthin.torch.tracing import without_autocast
from deepthin.torch.wrapped import is_sharded

_ROUNDING = 1e-6  # of the largest float: two decodings of one code may differ by that
_TORCH = cast(Any, torch)


class LatentState(CodeState):
    """The state of a weight whose latent floats may be rounded, and the code that follows from it.

    Attributes:
        rounds: Whether the parameters are rounded at every use, with a straight-through estimator.
        decoder: The method that decodes the floats, however these are stored.
    """

    rounds: bool
    decoder: Method
    _coding: FloatCoding
    _coded: StateCache[dict[str, Tensor]]
    _snapshot: Snapshot  # of the code, for exported graphs
    _coded_entries: tuple[str, ...]  # of the code, where the state has latents instead
    _indices: frozenset[str]  # integers that are no symbols
    _given: dict[str, Tensor] | None = None  # a code that was loaded: encoding again may give another
    _evaluated: Evaluated | None = None

    def code(self) -> dict[str, Tensor]:
        """The stored entries. A loaded code does not change until a latent changes in value.

        Returns:
            Entry -> tensor, as a file stores it; where nothing is rounded, the parameters and buffers themselves.
        """
        state = self.state()
        if not self.rounds:
            return state
        code = self._coded.get(state.values())
        if code is None:
            copies = self._copies()
            code = self._coded.put(copies, self._code_of(copies))
        return code

    def set_code(self, code: Mapping[str, Tensor]) -> None:
        """Load another code of the same method, in place; Parameter objects and ``requires_grad`` stay.

        Args:
            code: Entry -> tensor, of the present shapes.
        """
        device = self._device() or next(iter(code.values())).device
        code = {entry: tensor.to(device) for entry, tensor in code.items()}
        with torch.no_grad():
            new = {**code, **self._latents_of({**self._wide(code), **self._derived()})} if self.rounds else code
            self._fill(new)
        if self.rounds:
            self._given = self._coded.put(self._copies(), code)
        self._forget()

    def _all_entries(self) -> set[str]:
        """Entries that a state dict of this weight may have, were it frozen or not."""
        return {*self._entries, *self.method.code_shapes(), *self._coding.latent_shapes()}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_coded_entries", ()):
            return self.code()[name]
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        floats = [value for value in self._parameters.values() if value is not None]
        if (
            self._coded_entries and not floats and is_listed()
        ):  # torch.onnx makes inputs of the graph of these tensors themselves
            code = self._snapshot.latest or {}
            destination.update({prefix + entry: code[entry] for entry in self._coded_entries})
            return
        if not self._coded_entries or any(map(is_sharded, floats)):
            return
        integers, shapes = self.method.integers(), self.method.code_shapes()
        code = self.code() if self.has_values() else None
        for entry in self._coded_entries:
            kind = smallest_type(integers[entry]) if entry in integers else floats[0].dtype
            value = torch.empty(shapes[entry], dtype=kind, device="meta") if code is None else code[entry].to(kind)
            destination[prefix + entry] = value

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {entry: state_dict[prefix + entry] for entry in self._all_entries() if prefix + entry in state_dict}
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)
        known = {prefix + entry for entry in self._all_entries()}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in known]
        code = {entry: given[entry].detach() for entry in self.method.code_shapes() if entry in given}
        if error_msgs or len(code) < len(self.method.code_shapes()) or any(t.is_meta for t in code.values()):
            return
        floats = self.decoder.code_shapes().keys() - self.decoder.integers().keys()
        latents = self._coding.latent_shapes().keys() - self.decoder.integers().keys()
        if self.rounds and floats <= given.keys():  # a code whose floats these are, not one that has changed since
            device = self._device()
            code = {entry: value.to(device) for entry, value in code.items()}
            decoded = self._decode_floats(code)
            if all(_near(decoded[entry], cast(Tensor, self._parameters[entry])) for entry in floats):
                self._given = self._coded.put(self._copies(), code)
        elif self.rounds and not any(value is None or value.is_meta for value in self._parameters.values()):
            missing_keys[:] = [key for key in missing_keys if key.removeprefix(prefix) not in latents]
            self.set_code(code)  # of a frozen weight

    def train(self, mode: bool = True) -> Self:
        """Set the mode. What evaluation has computed is computed anew at the next call.

        Args:
            mode: Whether to train; otherwise, to evaluate.

        Returns:
            This weight.
        """
        super().train(mode)
        self._forget()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _forget(self) -> None:
        self.__dict__.pop("_evaluated", None)

    def _latents_of(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The latents of a code with its tables: decoded floats, and the logarithms of learned steps."""
        return {**self._coding.decode(dict(code), _TORCH), **self._coding.log_steps(dict(code), _TORCH)}

    def _copies(self) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return [entry.detach().clone() for entry in self.state().values()]

    def _code_of(self, copies: list[Tensor]) -> dict[str, Tensor]:
        """The stored entries for a state, without gradients."""
        state = dict(zip(self._entries, copies, strict=True))
        if not self.rounds:
            return state
        code = self._coded.get(copies)
        if code is not None:
            return code
        with torch.inference_mode(False), torch.no_grad(), without_autocast(copies[0]):
            return self._coding.encode(state, _TORCH)

    def _decode_floats(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The decoder's code, from the stored entries."""
        return self._coding.decode({**self._wide(code), **self._derived()}, _TORCH)

    def _wide(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Integers that are no symbols in 64 bits, in which they index; symbols are widened by the methods."""
        return {
            entry: value.long() if entry in self._indices and not value.is_floating_point() else value
            for entry, value in code.items()
        }


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether floats are equal up to the rounding of two devices or processors."""
    scale = other.detach().abs().max() if other.numel() else 0.0
    return one.shape == other.shape and bool(((one - other.detach()).abs() <= _ROUNDING * scale).all())
