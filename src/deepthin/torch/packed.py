"""Integers as constants of an exported graph, in few bytes and in operations that every runtime has."""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

# Base of the digits -> how many a word holds, and its bytes
_WORDS = {2: (8, 1), 3: (5, 1), 4: (4, 1), 6: (3, 1), 9: (5, 2), 16: (2, 1), 40: (3, 2), 256: (1, 1)}


class PackedIntegers(nn.Module):
    """Integers as constants of few bytes: several digits in a byte or two, and corrections where these do not suffice.

    Args:
        values: The integers.
        rising: Whether they are strictly increasing, as positions are: then steps are stored.

    Attributes:
        base: Base of the digits; 0: there are corrections only, of zeros.
    """

    def __init__(self, values: Int[Tensor, "..."], rising: bool = False) -> None:
        super().__init__()
        self.shape, self.rising = tuple(values.shape), rising
        flat = values.detach().cpu().long().flatten()
        self.base, self.least, self.corrected = 0, 0, False
        if rising:
            self.steps = PackedIntegers(torch.diff(flat, prepend=flat.new_tensor([-1])))
            return
        whole = _narrow(flat)
        self.kind = torch.int64 if whole.dtype == torch.int64 else torch.int32
        forms = [(0, 0), *((base, _start(flat, base)) for base in _WORDS)]
        self.base, self.least = min(forms, key=self._size(flat))
        if self._size(flat)((self.base, self.least)) > whole.nbytes:
            self.base, self.least = 256, 0
            self.register_buffer("digits", whole)
            return
        digits, rest = _split(flat, self.base, self.least)
        if self.base:
            each, size = _WORDS[self.base]
            words = (F.pad(digits, (0, -len(flat) % each)).view(-1, each) * self.base ** torch.arange(each)).sum(1)
            self.register_buffer("digits", words.to(torch.uint8) if size == 1 else (words - 2**15).to(torch.int16))
        if rest.any():
            self.corrected = True
            gaps, numbers = _sparse(rest)
            self.register_buffer("gaps", gaps)
            self.register_buffer("corrections", _narrow(numbers))

    @staticmethod
    def _size(flat: Int[Tensor, " count"]) -> Callable[[tuple[int, int]], float]:
        """Bytes of integers for the base of digits and the least integer."""

        def size(form: tuple[int, int]) -> float:
            gaps, numbers = _sparse(_split(flat, *form)[1])
            each, size = _WORDS.get(form[0], (1, 0))
            return size * math.ceil(len(flat) / each) + len(gaps) * (1 + _narrow(numbers).element_size())

        return size

    def forward(self) -> Int[Tensor, "..."]:
        """Unpack.

        Returns:
            The integers, int32 (rising or larger ones int64), in their shape.
        """
        count = math.prod(self.shape)
        if self.rising:
            return (torch.cumsum(self.steps().long(), 0) - 1).view(self.shape)
        base = self._digits(count) + self.least if self.base else torch.zeros(count, dtype=self.kind)
        if self.corrected:
            # A gap of 255 may lead to a place without a correction; 0 is added there
            places = torch.cumsum(cast(Tensor, self.gaps).long(), 0) - 1
            corrections = cast(Tensor, self.corrections).to(self.kind)
            base = (
                base + torch.zeros(count, dtype=self.kind).scatter(0, places, corrections)
                if self.base
                else (base.scatter(0, places, corrections))
            )
        return base.view(self.shape)

    def _digits(self, count: int) -> Int[Tensor, " count"]:
        packed = cast(Tensor, self.digits)
        if self.base == 256:
            return packed.to(self.kind)
        rest, digits = packed.float(), list[Tensor]()  # floats, since runtimes rarely divide integers
        rest = rest if packed.dtype == torch.uint8 else rest + 2.0**15
        for _ in range(_WORDS[self.base][0] - 1):
            above = torch.floor((rest + 0.5) / self.base)  # a half, so that rounding cannot reach the next integer
            digits.append(rest - above * self.base)
            rest = above
        return torch.stack([*digits, rest], 1).flatten()[:count].to(self.kind)


def _start(flat: Int[Tensor, " count"], base: int) -> int:
    """The least value of the range of ``base`` integers that holds most of them."""
    if not flat.numel():
        return 0
    values, counts = torch.unique(flat, return_counts=True)
    until = torch.searchsorted(values, values + base)
    summed = F.pad(counts.cumsum(0), (1, 0))
    return int(values[(summed[until] - summed[:-1]).argmax()])


def _split(flat: Int[Tensor, " count"], base: int, least: int) -> tuple[Tensor, Tensor]:
    """Digits of a range of integers, and what is to be added to them."""
    if not base:
        return torch.zeros_like(flat), flat
    digits = (flat - least).clamp(0, base - 1)
    return digits, flat - least - digits


def _narrow(values: Int[Tensor, " count"]) -> Tensor:
    """The same in the smallest of the types that all runtimes have."""
    least, most = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        if torch.iinfo(kind).min <= least and most <= torch.iinfo(kind).max:
            return values.to(kind)
    return values


def _sparse(flat: Int[Tensor, " count"]) -> tuple[Tensor, Tensor]:
    """Steps from one number that is not zero to the next, in bytes, and the numbers; zeros where steps are long."""
    places = torch.nonzero(flat).flatten()
    steps = torch.diff(places, prepend=places.new_tensor([-1]))
    zeros = torch.div(steps - 1, 255, rounding_mode="floor")
    ends = torch.cumsum(zeros + 1, 0) - 1
    count = int(ends[-1]) + 1 if len(ends) else 0
    gaps, numbers = torch.full((count,), 255, dtype=torch.uint8), torch.zeros(count, dtype=torch.long)
    gaps[ends], numbers[ends] = (steps - 255 * zeros).to(torch.uint8), flat[places]
    return gaps, numbers
