"""What reading a file may take: counted from its header, before anything is allocated (docs/format.md)."""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from deepthin.coding import huffman
from deepthin.coding.bits import width_of
from deepthin.errors import FormatError
from deepthin.kernels import products
from deepthin.method import Bounded, Integers, Method

BYTES_A_NUMBER = 128  # what loading into a model may take for each number that the model has
LEAST_BYTES = 64 << 20  # what loading into a model may take, however small the model is
WALK_BYTES = 640  # for each byte of a Huffman code, without native code
_ARITHMETIC = ("levels", "tree", "numbers")
_DENSEST = 19  # log2 of the most numbers that a byte of an arithmetic code can hold: a zero takes 2^-15.5 bits or more
_CODED_BYTES = 100  # for each number of an arithmetic code, without native code
_UNKNOWN_BYTES = 128  # for each weight, of a method that does not say what its decode takes


def model_bytes(numbers: int) -> int:
    """What loading a file into a model may take: the default of ``max_bytes`` there.

    Args:
        numbers: How many numbers the model's dense tensors have.

    Returns:
        Bytes: 128 for each number, and 64 MiB at least.
    """
    return max(BYTES_A_NUMBER * numbers, LEAST_BYTES)


class Budget:
    """The memory that reading one file takes beyond a few times the file itself.

    Attributes:
        limit: Upper bound in bytes.
        kept: Bytes of what stays until the file is read.
        passing: The most bytes of what is needed in between, for one tensor at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.kept, self.passing = limit, 0, 0

    def count(self, name: str, kept: int, passing: int = 0) -> None:
        """Count what a tensor takes.

        Args:
            name: The tensor, for the message.
            kept: Bytes that stay.
            passing: Bytes that are needed while it is read or decoded.

        Raises:
            FormatError: All that was counted exceeds the limit.
        """
        self.kept, self.passing = self.kept + kept, max(self.passing, passing)
        if (needed := self.kept + self.passing) > self.limit:
            raise FormatError(
                f"{name} takes {kept + passing} bytes of memory, work space included, and all together {needed}, above "
                f"the limit of {self.limit}. If you trust the file, pass a larger max_bytes."
            )


@contextmanager
def named(name: str) -> Generator[None, None, None]:
    """Within it, too little memory is a FormatError that says for which tensor.

    Args:
        name: The tensor.

    Yields:
        Nothing.

    Raises:
        FormatError: There was a MemoryError or a RecursionError.
    """
    try:
        yield
    except (MemoryError, RecursionError) as error:
        raise FormatError(f"{name} takes more memory than there is ({type(error).__name__}).") from None


def count_integers(budget: Budget, name: str, coding: Any, kind: Integers, numbers: int, stored_bytes: int) -> None:
    """Count an entry of integers.

    Args:
        budget: The budget of the file.
        name: The entry, for the message.
        coding: How the file says that it is coded.
        kind: The range of its values.
        numbers: How many integers it has.
        stored_bytes: Its bytes in the file.

    Raises:
        FormatError: Too many numbers take no bits, or the budget is exceeded.
    """
    if not width_of(kind.count) and numbers > huffman.MOST_FREE:
        raise FormatError(f"{name} declares {numbers} numbers that take no bits; at most {huffman.MOST_FREE} may.")
    way = cast(list[Any], coding)[0] if isinstance(coding, list | tuple) and coding else None
    if way in _ARITHMETIC and numbers > huffman.MOST_FREE + (stored_bytes << _DENSEST):
        raise FormatError(f"{name} declares {numbers} numbers in {stored_bytes} bytes, which cannot be.")
    wide = kind.rising or kind.least + kind.count > 1 << 15
    read = numbers
    if kind.rising and way in ("gaps", "huffman"):  # fillers too: each takes a bit at least
        read = max(numbers, min(numbers + kind.count, 8 * stored_bytes))
    work = 12 * read + (64 if wide else 20) * numbers
    if not products.native_available:
        work += WALK_BYTES * stored_bytes * (way == "huffman") + _CODED_BYTES * numbers * (way in _ARITHMETIC)
    budget.count(name, (8 if wide else 2) * numbers, work)


def decode_bytes(method: Method, item_bytes: int) -> int:
    """What decoding a matrix takes, its result and its derived tables included.

    Args:
        method: Any method.
        item_bytes: Bytes of a float.

    Returns:
        What the method says; 128 bytes for each weight where it says nothing.
    """
    if isinstance(method, Bounded):
        return method.decode_bytes(item_bytes)
    return _UNKNOWN_BYTES * math.prod(method.shape)


def largest_weight(method: Method, largest: Mapping[str, float]) -> float:
    """An upper bound on the magnitude of the weights.

    Args:
        method: Any method.
        largest: Entry of the code -> the largest magnitude of its floats.

    Returns:
        What the method says; infinity where it says nothing.
    """
    return method.largest_weight(largest) if isinstance(method, Bounded) else math.inf
