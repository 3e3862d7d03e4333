"""Groups of like matrices in a network: those of one group share their method, floats and rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from deepthin.plan.tensor import Tensor
from deepthin.torch.tensors import tensors_of

AUTOMATIC = ("table", "convolution", "recurrent", "first", "middle", "last")
_KINDS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "table": (nn.Embedding, nn.EmbeddingBag),
    "convolution": (nn.modules.conv._ConvNd,),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
}


@dataclass(frozen=True)
class Matrices:
    """The matrices of a network.

    Attributes:
        tensors: Those that can be thin, in the order of the network.
        groups: Name of a group -> names of its matrices; groups that are empty are left out.
        ignore: Names of matrices that have no thin version.
    """

    tensors: tuple[Tensor, ...]
    groups: Mapping[str, tuple[str, ...]]
    ignore: tuple[str, ...]

    def weights(self) -> int:
        """How many weights the matrices have.

        Returns:
            Their number.
        """
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors)


def matrices_of(model: nn.Module) -> Matrices:
    """Group the matrices of a network by their layers.

    Args:
        model: The dense network.

    Returns:
        Embeddings as ``table``, convolutions, recurrent layers, and of all other matrices, in their order, the
        ``first``, the ``last`` and those in the ``middle``. If there is only one of these, it is the ``last``.
    """
    tensors, owners = tensors_of(model)
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    thin = [tensor for tensor in matrices if not tensor.uncovered]
    groups: dict[str, list[str]] = {name: [] for name in AUTOMATIC}
    others: list[str] = []
    for tensor in thin:
        layer = owners[tensor.name][0][0]
        kind = next((name for name, types in _KINDS.items() if isinstance(layer, types)), None)
        (others if kind is None else groups[kind]).append(tensor.name)
    groups |= {"first": others[:-1][:1], "middle": others[1:-1], "last": others[-1:]}
    ignore = tuple(tensor.name for tensor in matrices if tensor.uncovered)
    return Matrices(tuple(thin), {name: tuple(names) for name, names in groups.items() if names}, ignore)
