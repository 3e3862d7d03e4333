"""Integer arithmetic that is part of the file format: hashes and permutations drawn from a seed.

The generator is SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators"). What it
yields for a seed never changes, because saved files store the seed and not the table; so no library generator is used.
"""

import numpy as np
from jaxtyping import Int64, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 1 << 64


def splitmix(seed: int, count: int) -> UInt64[np.ndarray, "count"]:
    """The first ``count`` 64-bit words that SplitMix64 yields from ``seed``, of which the low 64 bits matter."""
    step = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(seed % _WORD)
    step = (step ^ (step >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    step = (step ^ (step >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return step ^ (step >> np.uint64(31))


def permutation(seed: int, count: int) -> Int64[np.ndarray, "count"]:
    """The permutation of ``range(count)`` that sorts the seed's words (ties, if any, by position)."""
    return np.argsort(splitmix(seed, count), kind="stable").astype(np.int64)
