"""Hugging Face's Conv1D: a linear layer that keeps its weight as (inputs, outputs). Loaded only beside transformers."""

from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from deepthin.torch.generated import ThinLayer, generated, value_of
from deepthin.torch.tracing import as_leaf


class ThinConv1D(ThinLayer, Conv1D):
    """``input @ weight + bias``; the code is that of the (outputs, inputs) matrix, multiplied as in ThinLinear."""

    weight, bias = generated("weight"), generated("bias")

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Apply the layer, without building the weight where that is predicted to be faster.

        Args:
            x: Inputs, any number of leading dimensions.

        Returns:
            The outputs, with the leading dimensions of x.
        """
        if not isinstance(x, Tensor) and (leaf := as_leaf(self, x)) is not None:
            return leaf
        return (
            self.thin["weight"].product(x, bias=value_of(self, "bias")) if "weight" in self.thin else super().forward(x)
        )
