"""The methods of a comparison by name: those of the library, with quantised or coded floats, and their rivals."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepthin.methods import METHODS

DENSE, INT8, SAME_SIZE = "dense", "int8", "same-size"
ALWAYS = (DENSE, INT8)
SCALAR = [name for name, named in METHODS.items() if "bits" in named.options]  # they quantise the weights already
PRUNED_CSR = "pruned-csr"
ROUNDED = re.compile(r"(.+)-(\d+)bit")  # quantised floats: deepthin-8bit
CODED = "-coded"  # floats with learned steps, trained to the size of the file
CODED_OPTIONS: Mapping[str, Mapping[str, Any]] = {"deepthin": {"rank": 4}, "shuffled": {"rank": 4}}
COMPARED = (
    *ALWAYS,
    *(name for name, named in METHODS.items() if not named.learns_step),
    SAME_SIZE,
    PRUNED_CSR,
    *(f"{name}-{bits}bit" for bits in (8, 4) for name in (*METHODS, SAME_SIZE) if name not in SCALAR),
    *(f"{name}{CODED}" for name in (DENSE, *METHODS, SAME_SIZE) if name not in SCALAR),
)


@dataclass(frozen=True)
class Pruning:
    """When pruning happens: between two fractions of the training steps, in some number of rounds.

    Attributes:
        start: Fraction of the steps at which the sparsity begins to rise, 0 to 1.
        end: Fraction at which it is reached; from then on the layers are thin.
        times: Number of pruning rounds.
    """

    start: float
    end: float
    times: int


# pruned: gradual pruning from early in the training. pruned-csr: the paper's iterative pruning of a trained network
# (Han et al., 2015, arXiv:1506.02626, section 3), counted as compressed sparse rows.
PRUNING = {"pruned": Pruning(0.02, 0.15, 24), PRUNED_CSR: Pruning(0.4, 0.7, 6)}


def split(method: str) -> tuple[str, int | None]:
    """Split the name of a compared method.

    Args:
        method: The name, such as ``deepthin-8bit``.

    Returns:
        The method, and the bits of its quantised floats; None without quantisation, or where they are coded.
    """
    rounded = ROUNDED.fullmatch(method)
    return (rounded[1], int(rounded[2])) if rounded else (method.removesuffix(CODED), None)


def is_coded(method: str) -> bool:
    """Whether a compared method is trained to the size of its file.

    Args:
        method: The name, such as ``deepthin-coded``.

    Returns:
        True if it is.
    """
    return method.endswith(CODED)
