"""Interleaved timing: medians of calls that take turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from deepthin.lab.bench.networks import Work

_TURNS_BEFORE = 2  # warm-up calls before the timed one, so that caches are as in steady use
_BUSY_SECONDS = 0.005  # until the spinning threads of other libraries have gone to sleep
_FLUSH_BYTES = 96 << 20  # larger than the last-level cache


class Timing(NamedTuple):
    """A competitor: its name, its ratio (None if it has none), and the call that is timed."""

    name: str
    ratio: float | None
    work: Work


Times = dict[tuple[str, float | None], float]


def interleaved(
    timings: Sequence[Timing], repeats: int, cold: bool, progress: Callable[[int, int], None]
) -> tuple[Times, Times]:
    """Median times of calls that take turns: in every round each of them is timed once.

    Args:
        timings: The competitors.
        repeats: Timed rounds, >= 1; one more comes first and is not counted.
        cold: Whether to time each call a second time after flushing the caches.
        progress: Called with the number of finished rounds and of all rounds.

    Returns:
        Median microseconds by name and ratio: warm, and cold (empty if not asked for).
    """
    times_by_cache: list[dict[tuple[str, float | None], list[float]]] = [{}, {}]
    flush = np.zeros(_FLUSH_BYTES // 8) if cold else None
    for turn in range(repeats + 1):  # the first one warms up
        for name, ratio, work in timings:
            for warm, times in zip((True, False), times_by_cache, strict=True):
                if warm:
                    began = time.perf_counter()
                    for _ in range(_TURNS_BEFORE):
                        work()
                    while torch.get_num_threads() > 1 and time.perf_counter() - began < _BUSY_SECONDS:
                        work()
                elif flush is None:
                    continue
                else:
                    flush += 1.0
                start = time.perf_counter_ns()
                work()
                if turn:
                    times.setdefault((name, ratio), []).append((time.perf_counter_ns() - start) / 1000)
        progress(turn + 1, repeats + 1)
    warm, cold_times = ({key: statistics.median(values) for key, values in times.items()} for times in times_by_cache)
    return warm, cold_times
