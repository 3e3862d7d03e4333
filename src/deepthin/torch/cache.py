"""A cache of what follows from tensors, valid while these compare equal.

Version counters miss changes through ``.data``, and inference tensors have none; comparing values is exact.
"""

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from deepthin.torch.operators import same_values

T = TypeVar("T")


class StateCache(Generic[T]):
    """A cached value, and copies of the tensors that it was computed from.

    The caller copies the tensors first and computes the value from the copies, since another thread may write to the
    originals. Copies and value are replaced together, so that a reader never sees one without the other.
    """

    _held: tuple[Sequence[Tensor], T] | None = None

    def get(self, state: Iterable[Tensor]) -> T | None:
        """Look the value up.

        Args:
            state: The present tensors, as many as were copied.

        Returns:
            The value, if it was computed from tensors of these values, dtypes and devices; otherwise None.
        """
        held = self._held
        if held is None or not _same(held[0], state):
            return None
        return held[1]

    def put(self, copies: Sequence[Tensor], value: T) -> T:
        """Store a value in place of an earlier one.

        Args:
            copies: Copies of the tensors that the value was computed from; they must not be written to.
            value: The value.

        Returns:
            The value.
        """
        self._held = (copies, value)
        return value

    @property
    def held(self) -> tuple[Sequence[Tensor], T] | None:
        """The copies and the value, valid or not; None if nothing is stored."""
        return self._held

    def __bool__(self) -> bool:
        """Whether a value is stored, valid or not."""
        return self._held is not None


def _same(copies: Sequence[Tensor], now: Iterable[Tensor]) -> bool:
    return all(
        old.dtype == new.dtype and old.device == new.device and not new.is_meta and same_values(old, new)
        for old, new in zip(copies, now, strict=True)
    )
