"""Which tensors a pattern reaches: an exact name, or a glob or regular expression over names of modules and tensors."""

import fnmatch
import itertools
import re
from collections.abc import Sequence
from typing import Any

from deepthin.errors import ConfigError
from deepthin.plan.tensor import Tensor

_BIAS = re.compile("(?<![A-Za-z])bias")
EVERYTHING = "*"  # this pattern reaches every matrix, even in a model with a layer of that name


class Names:
    """The names of a model's tensors and modules, in which patterns are looked up: an exact name wins over a pattern.

    A name that the model has means itself only, whatever characters it contains: ``fc[0]`` is the layer of that name,
    not the glob that matches ``fc0``; ``re:fc`` likewise.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._exact: dict[str, dict[str, Tensor]] = {}  # name of a module or tensor -> what it covers, by name
        for tensor in tensors:
            for name in names_of(tensor):
                for path in itertools.accumulate(name.split("."), _dotted):
                    covered = self._exact.setdefault(path, {})
                    if path == name or len(tensor.shape) > 1:
                        covered[tensor.name] = tensor

    @property
    def modules(self) -> set[str]:
        """Names of the modules that contain a tensor, at every level."""
        return set(self._exact) - self.tensors

    @property
    def tensors(self) -> set[str]:
        """All names of all tensors."""
        return {name for tensor in self._tensors for name in names_of(tensor)}

    def reached(self, pattern: str) -> list[Tensor]:
        """The tensors that a pattern covers.

        Args:
            pattern: The exact name of a module or tensor; otherwise a glob or a regular expression. A matrix is
                matched by its name or by that of a module around it, a vector by its name, and by a glob or regular
                expression only if that ends in ``bias``, or names ``bias`` within and the vector does too
                (``*bias*`` for ``lstm.bias_ih_l0``).

        Returns:
            The tensors, in the model's order.

        Raises:
            ConfigError: An invalid regular expression.
        """
        if pattern != EVERYTHING and pattern in self._exact:
            return list(self._exact[pattern].values())
        hits = matcher(pattern)
        return [tensor for tensor in self._tensors if _matched(hits, pattern, tensor)]

    def named(self, pattern: str) -> bool:
        """Whether a pattern matches the name of any module or tensor, of vectors too."""
        return pattern in self._exact or any(map(matcher(pattern), self._exact))


def names_of(tensor: Tensor) -> tuple[str, ...]:
    """All names under which a model has a tensor."""
    return (tensor.name, *tensor.also)


def reaches(pattern: str, tensor: Tensor) -> bool:
    """Whether a pattern covers a tensor whose model is not known."""
    return bool(Names([tensor]).reached(pattern))


def matcher(pattern: str) -> Any:
    """A test for names: ``re:`` and a regular expression that must match whole, or a glob whose * crosses dots."""
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}.") from None


def _matched(hits: Any, pattern: str, tensor: Tensor) -> bool:
    if len(tensor.shape) > 1:
        return any(hits(p) for name in names_of(tensor) for p in itertools.accumulate(name.split("."), _dotted))
    if not pattern.endswith("bias") and not (_BIAS.search(pattern) and _BIAS.search(tensor.name.rpartition(".")[2])):
        return False
    return any(map(hits, names_of(tensor)))


def _dotted(path: str, part: str) -> str:
    return f"{path}.{part}"
