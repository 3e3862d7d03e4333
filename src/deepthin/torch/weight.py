"""A generated weight: the optimiser sees the latent floats, the layer sees the matrix or its product."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepthin.method import Code, Method, Symbols
from deepthin.methods.float_coding import FloatCoding, inner_of
from deepthin.plan.start import Start, drawn, encoded, generator
from deepthin.storage.contents import Part
from deepthin.torch import accelerated, multiply
from deepthin.torch.cache import StateCache
from deepthin.torch.operand import Operand
from deepthin.torch.snapshot import Snapshot

_TORCH = cast(Any, torch)


class ThinWeight(Operand):
    """One matrix in compressed form, and the tensors that are cut from it: one, or those of a group.

    Parameters are the latent floats: those of the code or, where the method trains ``through`` its rounding and the
    weight is not ``frozen``, the floats before rounding. Integers of the code that do not follow from these, and tables
    that follow from the method's fields, are neither parameters nor buffers (``deepthin.torch.state``).

    A state dict holds the parameters, the integers and, of what is rounded, the code too: a loaded code may differ from
    what its floats give when they are encoded again.

    Args:
        name: Name of the method, as files and reports have it.
        method: The method, of the whole matrix's shape.
        parts: Shape and scale of each tensor, in the order in which they are cut from the flattened matrix.
        code: Entry -> tensor, all on one device; used without a copy.
        latents: Floats before rounding; by default those that the code decodes to.
        frozen: For inference: the state is the code itself, also of a method that rounds.

    Attributes:
        direct: Whether the parameters are the floats that ``decoder`` takes.
        rounds: Whether the parameters are rounded at every use, with a straight-through estimator.
        decoder: The method that decodes the floats, however these are stored.
        plans: For each tensor its window in the factors' product; None where it must be decoded.
    """

    # Of a start from scratch: name of the first tensor, seed, and standard deviation (None: a tenth of He's variance)
    origin: tuple[str, int, float | None] = ("", 0, None)
    file_bytes: int | None = None  # the size of the whole file that a rate-aware training is to reach

    def __init__(
        self,
        name: str,
        method: Method,
        parts: Sequence[Part],
        code: Mapping[str, Tensor],
        latents: Mapping[str, Tensor] | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.method, self.parts = name, method, tuple(parts)
        self.rounds = method.trains == "through" and not frozen
        self._prepare()
        state = dict(code)
        if self.rounds:
            floats = latents or self._latents_of({**code, **_placed(method.derived(), code)})
            state = {entry: code[entry] for entry in self.decoder.integers()}
            state |= {entry: floats[entry] for entry in self._coding.latent_shapes()}
        self._register(state, method.integers())
        self._coded_entries = tuple(entry for entry in method.code_shapes() if self.rounds and entry not in state)
        self._prepare_tables()
        if self.rounds and latents is None:
            self._given = self._coded.put(self._copies(), dict(code))

    def _prepare(self) -> None:
        """Compute what follows from the method and the parts, and empty the caches."""
        self._coding = FloatCoding(self.method)
        self._steps = self._coding.steps()
        self.direct = not self.rounds and not inner_of(self.method)  # the parameters are what ``decoder`` takes
        self.decoder = self.method if self.direct else self._coding.decoder  # takes floats, however they are stored
        ends = list(itertools.accumulate(math.prod(part.shape) for part in self.parts))
        self._cuts = tuple(zip([0, *ends], ends, strict=False))
        self._places = tuple(
            accelerated.place_of(self.decoder, part, start)
            for part, (start, _) in zip(self.parts, self._cuts, strict=True)
        )
        self._decoding_pays = {}
        self._windows = tuple(self._window(index) for index in range(len(self.parts)))
        self.plans = tuple(
            None if window is None or part.zero_row is not None or (window.is_rank and window.offset) else window
            for window, part in zip(self._windows, self.parts, strict=True)
        )
        self.kernels = tuple(self._kernel(index) for index in range(len(self.parts)))
        self.chains = tuple(self._chain(index) for index in range(len(self.parts)))
        self._operator_pays = tuple(
            multiply.operator_pays(plan) if plan else multiply.chain_pays(self.decoder) for plan in self.plans
        )
        self._has_symbols = self.direct and isinstance(self.decoder, Symbols)
        self._indices = frozenset(entry for entry in self.method.integers() if not entry.endswith("symbols"))
        self._coded: StateCache[dict[str, Tensor]] = StateCache()
        self._snapshot = Snapshot()
        self._known: dict[Any, multiply.Way] = {}
        self._forget()
        self._sparse: StateCache[tuple[np.ndarray, np.ndarray]] = StateCache()

    @classmethod
    def encode(
        cls,
        name: str,
        method: Method,
        parts: Sequence[Part],
        tensors: Sequence[Tensor],
        importance: Sequence[Tensor] | None = None,
    ) -> "ThinWeight":
        """Encode dense tensors.

        Args:
            name: Name of the method, as files and reports have it.
            method: The method, of the whole matrix's shape.
            parts: Shape and scale of each tensor.
            tensors: The dense tensors, of the parts' shapes; the first gives device and dtype.
            importance: One tensor >= 0 for each dense one, of its shape: the weight of each squared error.

        Returns:
            The weight with the nearest code that the method finds.
        """
        arrays, weigh = (
            None if values is None else [tensor.detach().float().cpu().numpy() for tensor in values]
            for values in (tensors, importance)
        )
        return cls._begun(name, method, parts, tensors[0], encoded(method, parts, arrays or [], weigh))

    @classmethod
    def draw(
        cls, name: str, method: Method, parts: Sequence[Part], like: Tensor, rng: np.random.Generator, std: float
    ) -> "ThinWeight":
        """Draw a start from scratch.

        Args:
            name: Name of the method, as files and reports have it.
            method: The method, of the whole matrix's shape.
            parts: Shape and scale of each tensor.
            like: A tensor that gives device and dtype.
            rng: NumPy's generator, which is advanced.
            std: Standard deviation of the decoded entries, before they are multiplied by the scale of their part.

        Returns:
            The weight.
        """
        return cls._begun(name, method, parts, like, drawn(method, rng, std))

    @classmethod
    def _begun(cls, name: str, method: Method, parts: Sequence[Part], like: Tensor, start: Start) -> "ThinWeight":
        code, latents = start
        return cls(name, method, parts, _tensors(code, like), None if latents is None else _tensors(latents, like))

    def with_floats_stored(self, name: str, method: Method, importance: Mapping[str, Tensor]) -> "ThinWeight":
        """The same weight, whose floats a second method stores.

        Args:
            name: Name of both methods, ``pruned then kmeans`` say.
            method: Both methods: a ``Then`` of this weight's and the second.
            importance: Entry -> importance of its floats, >= 0, of the entry's shape.

        Returns:
            A new weight; it is trainable if this one is.
        """
        like = next(self.parameters())
        code = _arrays(self.code())
        stored = _tensors(FloatCoding(method).encode(code, cast(Any, np), _arrays(importance)), like)
        latents = (
            _tensors(FloatCoding(method).started(code, cast(Any, np)), like) if method.trains == "through" else None
        )
        if latents is not None and FloatCoding(method).steps():
            stored = FloatCoding(method).encode(latents, _TORCH)
        return type(self)(name, method, self.parts, stored, latents).requires_grad_(like.requires_grad)

    def reset_parameters(self) -> None:
        """Draw new values, as torch's layers do; the same numbers for the same tensor name and seed.

        For weights that were allocated without values: a model built on the meta device, then ``to_empty``. A matrix
        has the spread of ``compress(init="scratch")``; a bias is zero, the scale of a normalisation one.
        """
        name, seed, std = self.origin
        if len(self.parts) == 1 and len(self.parts[0].shape) < 2:
            value = np.float32(name.endswith("weight"))  # of a normalisation: ones; biases are zero
            code, latents = encoded(self.method, self.parts, [np.full(self.parts[0].shape, value)])
        else:
            std = math.sqrt(0.2 / max(self.method.shape[1], 1)) if std is None else std
            code, latents = drawn(self.method, generator(name, seed), std)
        shown = code if latents is None or not self.rounds else {**code, **latents}
        with torch.no_grad():
            self._fill({entry: torch.from_numpy(np.ascontiguousarray(array)) for entry, array in shown.items()})
        self._empty = None
        self._forget()

    def extra_repr(self) -> str:
        """The plan, for ``print(model)``.

        Returns:
            Name, shapes and method.
        """
        return f"{self.name}, {' + '.join('x'.join(map(str, part.shape)) for part in self.parts)}, {self.method}"

    def __getstate__(self) -> dict[str, Any]:
        """Without caches and what ``_prepare`` computes; but with a loaded code, which may not be reproducible."""
        derived = (
            "_evaluated",
            "_fast",
            "_table",
            "_known",
            "_sparse",
            "_windows",
            "_coding",
            "_steps",
            "_held_tables",
            "_snapshot",
            "decoder",
            "plans",
            "kernels",
            "direct",
            "_cuts",
            "_places",
            "_decoding_pays",
            "_given_steps",
        )
        return {key: value for key, value in self.__dict__.items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of version 0.1 have the loaded code as a tuple, and integers and tables as buffers."""
        super().__setstate__(state)
        coded = self.__dict__.get("_coded")
        self._prepare()
        if isinstance(coded, StateCache):
            self._coded = coded
        elif coded is not None:
            self._given = self._coded.put(*coded)
        if "_exact" not in self.__dict__:
            self.__dict__.pop("_tables", None)
            held = {entry: self._buffers.pop(entry) for entry in list(self._buffers)}
            floats = {entry: self._parameters.pop(entry) for entry in list(self._parameters)}
            entries = self.decoder.code_shapes() if self.rounds else self.method.code_shapes()
            values = {entry: floats[entry] if entry in floats else held[entry] for entry in entries}
            trainable = {entry for entry, value in floats.items() if value is not None and value.requires_grad}
            self._register({e: cast(Tensor, value).detach() for e, value in values.items()}, self.method.integers())
            for entry, parameter in self._parameters.items():
                cast(Tensor, parameter).requires_grad_(entry in trainable)
            self._coded_entries = tuple(e for e in self.method.code_shapes() if self.rounds and e not in values)
        self._prepare_tables()


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """NumPy arrays of tensors, half precision widened to float32."""
    on_host = {entry: tensor.detach().cpu() for entry, tensor in tensors.items()}
    return {e: (t.float() if t.is_floating_point() else t).numpy() for e, t in on_host.items()}


def _tensors(arrays: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Tensors of arrays, on the device of ``like``, floats in its dtype."""
    made = {entry: torch.from_numpy(np.ascontiguousarray(array)) for entry, array in arrays.items()}
    return {e: t.to(like.device, like.dtype) if t.is_floating_point() else t.to(like.device) for e, t in made.items()}


def _placed(tables: Code, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables of a method, on the device of its code."""
    device = next(iter(code.values())).device
    return {entry: torch.from_numpy(table).to(device) for entry, table in tables.items()}


class ThinPart(nn.Module):
    """One tensor of a group, used like a ThinWeight of a single tensor.

    Args:
        weight: The weight of the group.
        index: Which of its tensors.
    """

    def __init__(self, weight: ThinWeight, index: int) -> None:
        super().__init__()
        self.group, self.index = weight, index

    def children(self) -> Iterator[nn.Module]:
        """The group; but none if FSDP manages it: ``fully_shard`` of a second layer would shard the shards.

        Yields:
            The group's ThinWeight.
        """
        if not getattr(self.group, "_is_fsdp_managed_module", False):
            yield self.group

    def _apply(self, fn: Any, recurse: bool = True) -> "ThinPart":  # these three reach the group in any case
        if recurse:
            self.group._apply(fn)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> "ThinPart":
        """Call a function with the group's modules, then with this one.

        Args:
            fn: The function.

        Returns:
            This module.
        """
        self.group.apply(fn)
        fn(self)
        return self

    def train(self, mode: bool = True) -> "ThinPart":
        """Set the mode of this module and of the group.

        Args:
            mode: Whether to train; otherwise, to evaluate.

        Returns:
            This module.
        """
        self.training = mode
        self.group.train(mode)
        return self

    def forward(self) -> Float[Tensor, "..."]:
        """Decode the tensor.

        Returns:
            The dense tensor.
        """
        return self.group(self.index)

    def product(
        self, x: Float[Tensor, "*batch cols"], *, bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T + bias``, as ``ThinWeight.product``.

        Args:
            x: Inputs, any number of leading dimensions.
            bias: One number per output, or None.

        Returns:
            The outputs, with the leading dimensions of x.
        """
        return self.group.product(x, self.index, bias)

    def extra_repr(self) -> str:
        """The index, for ``print(model)``.

        Returns:
            Which of the group's tensors it is.
        """
        return f"tensor {self.index} of the group"
