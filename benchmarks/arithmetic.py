"""Speed and length of the arithmetic coder, on rounded Laplacian numbers of a given entropy.

    python benchmarks/arithmetic.py

One core. Speeds are in millions of integers a second, the best of some rounds, by the processor time that the process
takes; ``stride`` is that of `encode_levels`. Lengths are in bytes, for stride 0: of the stream, of the empirical
entropy of the very integers (a decoder would need their frequencies too), and of the estimator of Krichevsky and
Trofimov for the alphabet from the smallest to the largest one; the stream's excess over each is given in per cent.
Then a matrix whose columns and rows differ, by stride.
"""

import math
import time
from collections.abc import Callable

import numpy as np

from deepthin.coding import arithmetic
from deepthin.coding.arithmetic import MOST_LEVEL
from deepthin.kernels.arithmetic import decode, encode

ROUNDS = 5
ENTROPIES = (0.1, 0.3, 0.6, 1.2, 3.0, 5.0)


def spread_of(entropy: float) -> float:
    """The scale at which a rounded Laplacian number has an entropy, in bits."""
    low, high = 0.01, 100.0
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        edges = np.exp(-(np.arange(20_000) + 0.5) / middle)
        shares = np.append(1 - edges[0], np.repeat((edges[:-1] - edges[1:]) / 2, 2))
        shares = shares[shares > 0]
        low, high = (low, middle) if -(shares * np.log2(shares)).sum() > entropy else (middle, high)
    return low


def entropy_bytes(values: np.ndarray) -> float:
    """The empirical entropy of the integers, in bytes."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / len(values))).sum() / 8)


def estimate_bytes(values: np.ndarray) -> float:
    """The adaptive code length of Krichevsky and Trofimov, in bytes."""
    counts = np.bincount(values - values.min())
    half = math.lgamma(0.5)
    nats = math.lgamma(len(values) + len(counts) / 2) - math.lgamma(len(counts) / 2)
    return (nats - sum(math.lgamma(count + 0.5) - half for count in counts.tolist())) / math.log(2) / 8


def millions(count: int, call: Callable[[], object]) -> float:
    """Integers a microsecond of processor time, in the fastest round."""
    fastest = math.inf
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        fastest = min(fastest, time.process_time() - start)
    return count / fastest / 1e6


def speeds() -> None:
    """A table of speeds."""
    print("| kind | entropy | encode, M/s | decode, M/s |\n|---|---|---|---|")
    rng, count = np.random.default_rng(0), 1_000_000
    for entropy in ENTROPIES:
        values = np.round(rng.laplace(size=count) * spread_of(entropy)).astype(np.int64)
        for kind, integers, parameters in (
            ("levels", values, (0, 1, 1000)),
            ("tree", (values - values.min()) % 256, (8,)),
            ("numbers", abs(values), (0,)),
        ):
            for parameter in parameters:
                data = encode(kind, integers, parameter)
                written = millions(count, lambda: encode(kind, integers, parameter))  # noqa: B023
                read = millions(count, lambda: decode(kind, data, count, parameter, MOST_LEVEL))  # noqa: B023
                name = f"levels, stride {parameter}" if kind == "levels" else kind
                print(f"| {name} | {entropy} | {written:.0f} | {read:.0f} |")


def lengths() -> None:
    """A table of lengths."""
    print("\n| integers | entropy | stream | empirical entropy | estimator |\n|---|---|---|---|---|")
    rng = np.random.default_rng(1)
    for count in (10, 100, 10_000, 1_000_000):
        for entropy in ENTROPIES:
            values = np.round(rng.laplace(size=count) * spread_of(entropy)).astype(np.int64)
            length = len(arithmetic.encode_levels(values, 0, encode))
            shown = [
                f"{value:,.1f}{excess(length, value)}" for value in (entropy_bytes(values), estimate_bytes(values))
            ]
            print(f"| {count:,} | {entropy} | {length:,} | {' | '.join(shown)} |")


def excess(length: float, ideal: float) -> str:
    """How much longer a stream is, in bytes and per cent."""
    return f" ({length - ideal:+,.1f}, {100 * (length / ideal - 1):+.2f} %)" if ideal > 0.05 else ""


def strides() -> None:
    """A table of a matrix of 400 x 300 whose columns and rows have different scales, some of them none."""
    print("\n| matrix | estimator | stride 0 | stride 1 | stride 300 |\n|---|---|---|---|---|")
    for spread in (0.1, 0.3, 1.0):
        rng = np.random.default_rng(2)
        scales = spread * np.exp(rng.normal(size=(400, 1)) * 0.5) * np.exp(rng.normal(size=300) * 0.5)
        scales = scales * (rng.random((400, 1)) < 0.8) * (rng.random(300) < 0.6)
        values = np.round(rng.laplace(size=scales.shape) * scales).astype(np.int64).reshape(-1)
        found = [f"{len(arithmetic.encode_levels(values, stride, encode)):,}" for stride in (0, 1, 300)]
        print(f"| median scale {spread} | {estimate_bytes(values):,.0f} | {' | '.join(found)} |")


if __name__ == "__main__":
    speeds()
    lengths()
    strides()
