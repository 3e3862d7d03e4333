"""A program of the C runtime: calls of operators on tensors whose places in memory are fixed."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from deepthin.torch.export.native.matrix import Matrix, Use

_ALIGNED = 4  # floats: 16 bytes
_TRIES = 200  # orders in which buffers are placed
_MANY = 100  # buffers from which one order must do


def _up(floats: int) -> int:
    return -(-floats // _ALIGNED) * _ALIGNED


class Space(IntEnum):
    """Where a tensor is."""

    ARENA = 0
    INPUT = 1
    OUTPUT = 2
    CONSTANT = 3


@dataclass(eq=False)
class Buffer:
    """Memory of one tensor, or of several that take turns.

    Attributes:
        floats: Its size.
        space: Where it is.
        index: Which input, output or constant.
        at: Its first float in the arena.
        kept: Whether it keeps its values from one run to the next.
        data: The numbers of a constant.
    """

    floats: int
    space: Space = Space.ARENA
    index: int = 0
    at: int = 0
    kept: bool = False
    data: np.ndarray | None = None


@dataclass(frozen=True)
class Place:
    """A tensor's first float: so many floats after the beginning of a buffer."""

    buffer: Buffer
    offset: int = 0


@dataclass
class Call:
    """One call of an operator of runtime/dt.h.

    Attributes:
        name: Its name there, without ``dt_``.
        arguments: In C's order: integers, floats, tuples of integers (an array or a ``dt_window``), matrices, places,
            or None for NULL.
        reads: The buffers that it reads.
        writes: The buffers that it writes.
        over: What it may write over its input, element by element: the place of its input; or None.
    """

    name: str
    arguments: list["Argument"]
    reads: list[Buffer]
    writes: list[Buffer]
    over: Buffer | None = None


Argument = int | float | tuple[int, ...] | Matrix | Place | None


@dataclass
class Program:
    """What a model's C code does.

    Attributes:
        calls: The operators, in order.
        inputs: Buffers that the caller fills.
        outputs: Buffers that the caller reads.
        integers: Whether each input consists of integers.
        arena: Floats of memory that a run needs.
        kept: Floats at the beginning of the arena that keep their values from one run to the next.
        forms: Name of each thin tensor -> how it is stored.
    """

    calls: list[Call] = field(default_factory=list)
    inputs: list[Buffer] = field(default_factory=list)
    outputs: list[Buffer] = field(default_factory=list)
    integers: list[bool] = field(default_factory=list)
    arena: int = 0
    kept: int = 0
    forms: dict[str, str] = field(default_factory=dict)

    def call(
        self, name: str, arguments: Sequence[Argument], scratch: int | None = None, over: Place | None = None
    ) -> None:
        """Append a call.

        Args:
            name: The operator.
            arguments: Its arguments; the last place is written, and those of ``recurrent`` that hold states.
            scratch: Floats of memory of its own, whose place is then its last argument.
            over: The place of an input that the output may take.
        """
        buffers = [argument.buffer for argument in arguments if isinstance(argument, Place)]
        writes = buffers[-1:]
        if name == "recurrent":
            writes = [place.buffer for place in arguments[-4:] if isinstance(place, Place)]
        extra: list[Argument] = []
        if scratch is not None:
            own = Buffer(scratch)
            extra.append(Place(own))
            writes = [*writes, own]
        self.calls.append(Call(name, [*arguments, *extra], buffers, writes, over.buffer if over else None))

    def matrices(self) -> Iterator[Matrix]:
        """The matrices of all calls, in order, each once.

        Yields:
            A matrix.
        """
        seen: set[int] = set()
        for call in self.calls:
            for argument in call.arguments:
                if isinstance(argument, Matrix) and id(argument) not in seen:
                    seen.add(id(argument))
                    yield argument

    def constants(self) -> Iterator[Buffer]:
        """The constant tensors of all calls, in order, each once.

        Yields:
            A buffer with ``data``.
        """
        seen: set[int] = set()
        for call in self.calls:
            for argument in call.arguments:
                if isinstance(argument, Place) and argument.buffer.data is not None and id(argument.buffer) not in seen:
                    seen.add(id(argument.buffer))
                    yield argument.buffer

    def place(self) -> None:
        """Give every buffer its place in the arena: what is not needed at the same time may overlap."""
        last: dict[int, int] = {}
        for at, call in enumerate(self.calls):
            for buffer in (*call.reads, *call.writes):
                last[id(buffer)] = at
        self._share(last)
        spans: dict[int, tuple[Buffer, int, int]] = {}
        for at, call in enumerate(self.calls):
            for buffer in (*call.reads, *call.writes):
                if buffer.space is Space.ARENA:
                    first = spans[id(buffer)][1] if id(buffer) in spans else at
                    spans[id(buffer)] = (buffer, first, at)
        kept = [buffer for buffer, *_ in spans.values() if buffer.kept]
        for buffer in kept:
            buffer.at = self.kept
            self.kept += _up(buffer.floats)
        others = [span for span in spans.values() if not span[0].kept]
        peak = max(
            (sum(_up(b.floats) for b, f, e in others if f <= at <= e) for at in range(len(self.calls))), default=0
        )
        chance, best = random.Random(0), self._packed(sorted(others, key=lambda span: -span[0].floats))
        tries = _TRIES if len(others) <= _MANY else 0
        while max(best[0], self.kept) > self.kept + peak and tries:
            order = sorted(others, key=lambda span: -span[0].floats * chance.uniform(0.3, 1))
            best, tries = min(best, self._packed(order), key=lambda one: one[0]), tries - 1
        self.arena = best[0]
        for (buffer, *_), at in zip(others, (best[1][id(buffer)] for buffer, *_ in others), strict=True):
            buffer.at = at

    def _packed(self, order: Sequence[tuple[Buffer, int, int]]) -> tuple[int, dict[int, int]]:
        """Give each buffer in turn the lowest place that is free: floats of the arena, and the places."""
        placed: list[tuple[int, int, int, int]] = []
        end_of_arena, places = self.kept, dict[int, int]()
        for buffer, first, end in order:
            at = self.kept
            for low, high in sorted((low, high) for low, high, f, e in placed if f <= end and first <= e):
                if low - at >= buffer.floats:
                    break
                at = max(at, high)
            placed.append((at, at + _up(buffer.floats), first, end))
            places[id(buffer)] = at
            end_of_arena = max(end_of_arena, at + _up(buffer.floats))
        return end_of_arena, places

    def _share(self, last: dict[int, int]) -> None:
        """Let an operator write over its input, if nothing reads that later."""
        merged: dict[int, Buffer] = {}

        def final(buffer: Buffer) -> Buffer:
            while id(buffer) in merged:
                buffer = merged[id(buffer)]
            return buffer

        for at, call in enumerate(self.calls):
            call.arguments = [
                Place(final(argument.buffer), argument.offset) if isinstance(argument, Place) else argument
                for argument in call.arguments
            ]
            call.reads, call.writes = [final(b) for b in call.reads], [final(b) for b in call.writes]
            if call.over is None:
                continue
            source, target = final(call.over), call.writes[0]
            fits = source.space is Space.ARENA and target.space is Space.ARENA and source.floats == target.floats
            if fits and not source.kept and source is not target and last[id(source)] == at:
                merged[id(target)] = source
                last[id(source)] = last[id(target)]
                call.arguments = [
                    Place(source, argument.offset)
                    if isinstance(argument, Place) and argument.buffer is target
                    else argument
                    for argument in call.arguments
                ]
                call.writes = [source if buffer is target else buffer for buffer in call.writes]


@dataclass(frozen=True)
class View:
    """A tensor: a place, a shape, and strides in floats."""

    place: Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def floats(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether entries follow one another."""
        expected, fine = 1, True
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            fine &= size == 1 or stride == expected
            expected *= size
        return fine


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor.

    Args:
        shape: Its shape.

    Returns:
        Floats from one index to the next, for each dimension.
    """
    strides: list[int] = []
    each = 1
    for size in reversed(shape):
        strides.insert(0, each)
        each *= size
    return tuple(strides)


def scratch_of(matrix: Matrix, use: Use) -> int:
    """Floats of scratch of a product; at least one, so that its place exists.

    Args:
        matrix: The matrix.
        use: How it is used.

    Returns:
        Floats.
    """
    return max(matrix.scratch(use), 1)


def merged(first: View, second: View) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Join neighbouring dimensions where the strides of both tensors allow.

    Args:
        first: A tensor.
        second: Another of the same shape.

    Returns:
        Sizes, the first one's strides, and the second one's.
    """
    made: list[list[int]] = []
    for size, a, b in zip(first.shape, first.strides, second.strides, strict=True):
        if size == 1:
            continue
        if made and made[-1][1] == a * size and made[-1][2] == b * size:
            made[-1] = [made[-1][0] * size, a, b]
        else:
            made.append([size, a, b])
    return tuple(m[0] for m in made), tuple(m[1] for m in made), tuple(m[2] for m in made)
