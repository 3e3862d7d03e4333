"""The errors that this library raises by itself, and what their messages recommend."""

import difflib
import math
from collections.abc import Iterable


def did_you_mean(word: object, valid: Iterable[str]) -> str:
    """What to write instead: the closest valid word, and all of them where they are few."""
    words = list(valid)
    best = difflib.get_close_matches(str(word), words, n=1, cutoff=0.0)[0]
    listed = f" Valid: {', '.join(words)}." if len(words) <= 16 else ""
    return f"Did you mean {best!r}?{listed}"


def closest(name: str, names: Iterable[str]) -> str:
    """The end of a message: which of the names is nearest; nothing if there are none."""
    best = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f" Closest: {best[0]!r}." if best else ""


class DeepThinError(Exception):
    """The parent of every error that this library raises by itself."""


class BudgetError(DeepThinError):
    """A size was asked for that cannot be reached; the message and the fields name the smallest that can.

    ``smallest_bits`` is what the smallest possible code takes; ``smallest_ratio`` is the same over 32 bits a weight.
    """

    def __init__(self, message: str, *, smallest_bits: int, smallest_ratio: float) -> None:
        super().__init__(message)
        self.smallest_bits = smallest_bits
        self.smallest_ratio = smallest_ratio


class ConfigError(DeepThinError):
    """A configuration, a layer name or an option that does not fit; the message names the closest valid one."""


class FormatError(DeepThinError):
    """A file that is damaged, hostile, or no ``.thin`` file at all."""


class NonFiniteError(DeepThinError):
    """A NaN or an infinity where there must be none; the message names the tensor and the index."""


class ExportError(DeepThinError):
    """An exported file that is too large, holds a dense weight, or computes other outputs; it was not kept."""


def round_up(ratio: float) -> str:
    """A ratio in two significant digits, rounded up so that what a message recommends can be reached."""
    digits = 1 - math.floor(math.log10(ratio))
    return f"{math.ceil(ratio * 10**digits - 1e-9) / 10**digits:.{max(digits, 0)}f}"
