"""Which tensors a pattern reaches: a glob, or a regular expression, over names of modules and tensors."""

import fnmatch
import itertools
import re
from typing import Any

from deepthin.errors import ConfigError
from deepthin.plan.tensor import Tensor


def reaches(pattern: str, tensor: Tensor) -> bool:
    """Whether a pattern covers a tensor: by one of its names, or for a matrix by that of a module around it."""
    hits, names = matcher(pattern), (tensor.name, *tensor.also)
    if len(tensor.shape) > 1:
        return any(hits(part) for name in names for part in itertools.accumulate(name.split("."), _dotted))
    return pattern in names or (pattern.endswith("bias") and any(map(hits, names)))


def _dotted(path: str, part: str) -> str:
    return f"{path}.{part}"


def matcher(pattern: str) -> Any:
    """A test for names: ``re:`` and a regular expression that must match whole, or a glob whose * crosses dots."""
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}.") from None
