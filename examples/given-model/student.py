"""Networks that hear the same frame as CREPE and answer the same question in fewer products."""

import copy

from crepe import BINS, CHANNELS, Crepe
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SHAPES = {  # output channels, kernel width and stride of each convolution
    "strided": [(48, 256, 8), (64, 16, 2), (64, 16, 2), (96, 8, 2), (128, 8, 2), (128, 4, 2)],
    "small": [(24, 256, 8), (32, 16, 2), (32, 16, 2), (48, 8, 2), (64, 8, 2), (64, 4, 2)],
}


class Strided(nn.Sequential):
    """Convolutions that keep every second output, so that nothing is computed and then dropped by a maximum.

    Args:
        layers: For each convolution its output channels, the width of its kernel and its stride.
    """

    def __init__(self, layers: list[tuple[int, int, int]]) -> None:
        modules: list[nn.Module] = []
        taken, length = 1, 1024
        for given, width, stride in layers:
            modules += [nn.Conv1d(taken, given, width, stride, (width - stride) // 2), nn.BatchNorm1d(given), nn.ReLU()]
            taken, length = given, length // stride
        super().__init__(*modules, nn.Flatten(), nn.Linear(taken * length, BINS))


def student(name: str) -> nn.Sequential:
    """A network with random weights.

    Args:
        name: A key of SHAPES, or ``"tiny"``: the shape of CREPE's own small network.

    Returns:
        The network, without the sigmoid at its end.
    """
    return Crepe(CHANNELS["tiny"]) if name == "tiny" else Strided(SHAPES[name])


def folded(model: nn.Sequential) -> nn.Sequential:
    """The network without normalisations that directly follow a convolution: they become part of its weights.

    Args:
        model: In evaluation mode afterwards; stays as it is.

    Returns:
        A copy that computes the same.
    """
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(model).eval():
        if isinstance(layer, nn.BatchNorm1d) and layers and isinstance(layers[-1], nn.Conv1d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)
