"""Permutations between Keras's layouts and the file's, which are torch's: outputs first (docs/keras.md)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import layers

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The permutation from a Keras weight to a tensor of the file: row, axes, merging, then gates.

    Keras stores kernels as (inputs, outputs), those of convolutions as (places, inputs, outputs), and a GRU's gates in
    the order z r h; the file has (outputs, inputs), (outputs, inputs, places) and r z h.

    Attributes:
        axes: Keras's axes in the file's order; None leaves them.
        merged: The first two axes of the file's order become one, the outputs of a depthwise kernel.
        gates: The first two thirds of the outputs are swapped.
        row: The file has this row only, as a GRU's two biases are one weight in Keras.
    """

    axes: tuple[int, ...] | None = None
    merged: bool = False
    gates: bool = False
    row: int | None = None

    def stored(self, weight: Any, xp: Any = np) -> Any:
        """From a Keras weight to the tensor of the file.

        Args:
            weight: The weight in Keras's layout.
            xp: NumPy or ``keras.ops``.

        Returns:
            The tensor in the file's layout.
        """
        tensor = weight if self.row is None else weight[self.row]
        if self.axes is not None:
            tensor = xp.transpose(tensor, self.axes)
        if self.merged:
            tensor = xp.reshape(tensor, (-1, 1, *tensor.shape[2:]))
        return _exchanged(tensor, xp) if self.gates else tensor

    def shape(self, shape: Shape) -> Shape:
        """From the shape of a Keras weight to that of the tensor in the file.

        Args:
            shape: In Keras's layout.

        Returns:
            The shape in the file's layout.
        """
        if self.row is not None:
            return shape[1:]
        turned = shape if self.axes is None else tuple(shape[axis] for axis in self.axes)
        return (turned[0] * turned[1], 1, *turned[2:]) if self.merged else turned

    def restored(self, stored: Any, shape: Shape, xp: Any = np) -> Any:
        """From a tensor of the file to the Keras weight: the inverse of ``stored``.

        Args:
            stored: The tensor in the file's layout.
            shape: Shape of the Keras weight.
            xp: NumPy or ``keras.ops``.

        Returns:
            The weight in Keras's layout; with ``row``, that row alone.
        """
        if self.gates:
            stored = _exchanged(stored, xp)
        if self.axes is None:
            return stored
        stored = xp.reshape(stored, tuple(shape[axis] for axis in self.axes))
        return xp.transpose(stored, tuple(np.argsort(self.axes).tolist()))


def layouts(layer: Any, name: str, shape: Shape) -> dict[str, Layout]:
    """The tensors of the file that a layer's weight is stored in.

    Args:
        layer: The Keras layer.
        name: Name of the weight in the layer.
        shape: Its shape in Keras.

    Returns:
        Name in the file -> layout; one, but two for the biases of a GRU.
    """
    if isinstance(layer, layers.GRUCell):
        if name == "bias" and len(shape) == 2:
            return {"bias": Layout(row=0, gates=True), "recurrent_bias": Layout(row=1, gates=True)}
        return {name: Layout((1, 0) if len(shape) == 2 else None, gates=True)}
    if name not in MATRICES:
        return {name: Layout()}
    if isinstance(layer, layers.Dense | layers.LSTMCell | layers.SimpleRNNCell):
        return {name: Layout((1, 0))}
    places = tuple(range(len(shape) - 2))
    if name == "depthwise_kernel" or isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D):
        return {name: Layout((len(places), len(places) + 1, *places), merged=True)}
    if isinstance(layer, CONVOLUTIONS):
        return {name: Layout((len(places) + 1, len(places), *places))}
    return {name: Layout()}


MATRICES = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel")
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
CONVOLUTIONS = (
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    *TRANSPOSED,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
)
CELLS = (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell)


def fresh_std(layer: Any, shape: Shape) -> float:
    """Standard deviation of the weights that ``init="scratch"`` draws.

    Args:
        layer: The layer that has the weight.
        shape: Shape in the file's layout, two or more dimensions.

    Returns:
        The root of a tenth of He's variance ``2 / fan-in`` (He et al., 2015, arXiv:1502.01852); Keras's default for
        embeddings (uniform within 0.05), torch's for gates (uniform within ``1 / sqrt(units)``).
    """
    if 0 in shape:
        return 1.0
    if isinstance(layer, layers.Embedding):
        return 0.05 / math.sqrt(3)  # uniform within 0.05
    if isinstance(layer, CELLS):
        return 1 / math.sqrt(3 * layer.units)
    if isinstance(layer, TRANSPOSED):
        return math.sqrt(0.2 * math.prod(layer.strides) / (shape[0] * math.prod(shape[2:])))
    return math.sqrt(0.2 / math.prod(shape[1:]))


def _exchanged(tensor: Any, xp: Any) -> Any:
    """The tensor with its first two thirds swapped."""
    third = tensor.shape[0] // 3
    return xp.concatenate([tensor[third : 2 * third], tensor[:third], tensor[2 * third :]], axis=0)
