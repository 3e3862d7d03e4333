"""A tensor of a model, as a configuration sees it."""

from dataclasses import dataclass

from deepthin.method import matrix_shape


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a model, as rules see it."""

    name: str  # dotted, as in the state dict: "encoder.fc1.weight"
    shape: tuple[int, ...]
    uncovered: str = ""  # why it cannot be compressed; empty if it can
    also: tuple[str, ...] = ()  # further names under which the model shares this tensor
    transposed: bool = False  # the model holds it as (inputs, outputs)
    std: float = 1.0  # the standard deviation of a from-scratch start
    zero_row: int | None = None  # a row that stays zero: the padding of an embedding
    layers: str = "layers of torch.nn"  # of which the covered kinds are, for messages


def matrix_of(tensor: Tensor) -> tuple[int, int]:
    """The matrix shape under which a tensor is stored.

    Args:
        tensor: The tensor.

    Returns:
        (rows, cols): outputs first.
    """
    return matrix_shape(tensor.shape[::-1] if tensor.transposed else tensor.shape)
