"""How a file keeps what a Keras layer keeps otherwise: as torch does, outputs first (docs/keras.md)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import layers

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The way from a Keras weight to a tensor of the file: axes, then gates. ``xp`` is NumPy or keras.ops.

    Keras keeps kernels as (inputs, outputs), those of convolutions as (places, inputs, outputs), and a GRU's gates as
    z r h; the file has (outputs, inputs), (outputs, inputs, places) and r z h.
    """

    axes: tuple[int, ...] | None = None  # of Keras, in the file's order
    merged: bool = False  # the first two axes of the file's order become one, a depthwise kernel's outputs
    gates: bool = False  # the first two thirds of the outputs change places
    row: int | None = None  # the file has this row only: a GRU's two biases are one weight in Keras

    def stored(self, weight: Any, xp: Any = np) -> Any:
        """What the file has."""
        tensor = weight if self.row is None else weight[self.row]
        if self.axes is not None:
            tensor = xp.transpose(tensor, self.axes)
        if self.merged:
            tensor = xp.reshape(tensor, (-1, 1, *tensor.shape[2:]))
        return _exchanged(tensor, xp) if self.gates else tensor

    def shape(self, shape: Shape) -> Shape:
        """Of what the file has, from that in Keras."""
        if self.row is not None:
            return shape[1:]
        turned = shape if self.axes is None else tuple(shape[axis] for axis in self.axes)
        return (turned[0] * turned[1], 1, *turned[2:]) if self.merged else turned

    def kept(self, tensor: Any, shape: Shape, xp: Any = np) -> Any:
        """What Keras has, of this shape, from a tensor of the file; of a row, that alone."""
        if self.gates:
            tensor = _exchanged(tensor, xp)
        if self.axes is None:
            return tensor
        tensor = xp.reshape(tensor, tuple(shape[axis] for axis in self.axes))
        return xp.transpose(tensor, tuple(np.argsort(self.axes).tolist()))


def layouts(layer: Any, name: str, shape: Shape) -> dict[str, Layout]:
    """The tensors of the file that hold a layer's weight, by the weight's name there."""
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
    """Standard deviation of a from-scratch start, of the file's shape: that of deepthin.torch, but Keras's for tables.

    A tenth of He's variance, and for gates torch's spread, uniform within 1 / sqrt(units).
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
    """The first third of the rows after the second."""
    third = tensor.shape[0] // 3
    return xp.concatenate([tensor[third : 2 * third], tensor[:third], tensor[2 * third :]], axis=0)
