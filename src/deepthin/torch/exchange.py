"""A layer becomes thin, and plain again, by exchanging its class in place."""

import math
import re
import sys
from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from deepthin.torch.generated import Generated, ThinLayer
from deepthin.torch.layers import (
    ThinBatchNorm1d,
    ThinBatchNorm2d,
    ThinBatchNorm3d,
    ThinConv1d,
    ThinConv2d,
    ThinConv3d,
    ThinConvTranspose1d,
    ThinConvTranspose2d,
    ThinConvTranspose3d,
    ThinEmbedding,
    ThinEmbeddingBag,
    ThinGroupNorm,
    ThinLayerNorm,
    ThinLinear,
    ThinMultiheadAttention,
    ThinOutProjection,
    ThinRMSNorm,
)
from deepthin.torch.recurrent_layers import ThinGRU, ThinLSTM, ThinRNN
from deepthin.torch.weight import ThinPart, ThinWeight

THIN: dict[type[nn.Module], type[ThinLayer]] = {
    nn.Linear: ThinLinear,
    NonDynamicallyQuantizableLinear: ThinOutProjection,
    nn.Conv1d: ThinConv1d,
    nn.Conv2d: ThinConv2d,
    nn.Conv3d: ThinConv3d,
    nn.ConvTranspose1d: ThinConvTranspose1d,
    nn.ConvTranspose2d: ThinConvTranspose2d,
    nn.ConvTranspose3d: ThinConvTranspose3d,
    nn.Embedding: ThinEmbedding,
    nn.EmbeddingBag: ThinEmbeddingBag,
    nn.BatchNorm1d: ThinBatchNorm1d,
    nn.BatchNorm2d: ThinBatchNorm2d,
    nn.BatchNorm3d: ThinBatchNorm3d,
    nn.GroupNorm: ThinGroupNorm,
    nn.LayerNorm: ThinLayerNorm,
    nn.RMSNorm: ThinRMSNorm,
    nn.MultiheadAttention: ThinMultiheadAttention,
    nn.RNN: ThinRNN,
    nn.LSTM: ThinLSTM,
    nn.GRU: ThinGRU,
}
"""Every layer that can be thin, and its thin class. Hugging Face's Conv1D joins when transformers is imported."""


def why_not(layer: nn.Module, name: str) -> str:
    """Why a parameter of a layer cannot be thin.

    Args:
        layer: A torch layer, dense or thin.
        name: Name of the parameter in the layer, ``weight`` say.

    Returns:
        The reason, as part of a sentence; an empty string if the parameter can be thin.
    """
    if "transformers.pytorch_utils" in sys.modules:
        from deepthin.torch import huggingface

        THIN.setdefault(huggingface.Conv1D, huggingface.ThinConv1D)
    if parametrised := _parametrised(layer):
        return parametrised
    if not isinstance(layer, ThinLayer) and type(layer) not in THIN:
        return f"{type(layer).__name__} has no thin version"
    if added := sorted(layer._parameters.keys() - parameter_names(layer)):
        return f"the {type(layer).__name__} has extra parameters ({', '.join(added)}), which a thin layer would not use"
    parameter = layer._parameters.get(name)
    if parameter is not None and not parameter.is_floating_point():
        return f"it holds {parameter.dtype}, and codes are real numbers"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and (layer.max_norm is not None or layer.sparse):
        return "a table with max_norm or sparse gradients is changed in place, which a generated one cannot be"
    if isinstance(layer, nn.MultiheadAttention) and name in ("bias_k", "bias_v"):
        return "bias_k and bias_v are vectors"
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and len(layer.normalized_shape) > 1:
        return "a scale of several dimensions is no matrix whose values may be drawn anew"
    return ""


def _parametrised(layer: nn.Module) -> str:
    """What to write where weight_norm, spectral_norm or another parametrisation computes a weight."""
    kind = type(layer).__name__
    if isinstance(layer, ParametrizationList):
        how = ", ".join(_plain(type(one).__name__) for one in layer)
        return f"{how} computes a weight from it; first call torch.nn.utils.parametrize.remove_parametrizations"
    if is_parametrized(layer):
        kinds = (type(one).__name__ for held in cast(Any, layer).parametrizations.values() for one in held)
        return (
            f"{', '.join(map(_plain, kinds))} of a {kind.removeprefix('Parametrized')}; first call "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    for name, hook in (("weight_norm", "WeightNorm"), ("spectral_norm", "SpectralNorm")):
        if any(type(held).__name__ == hook for held in layer._forward_pre_hooks.values()):
            return f"{name} of a {kind} computes its weight; first call torch.nn.utils.remove_{name}"
    return ""


def _plain(kind: str) -> str:
    """A parametrisation as its function is called: ``weight_norm`` for ``_WeightNorm``."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", kind.lstrip("_")).lower() if kind.startswith("_") else kind


def parameter_names(layer: nn.Module) -> list[str]:
    """The parameters that a layer of this type may have.

    Args:
        layer: A dense or thin layer of a type in ``THIN``.

    Returns:
        Their names in the layer, in torch's order, also of those that are None.
    """
    if isinstance(layer, nn.RNNBase):
        return layer._flat_weights_names
    thin = THIN.get(type(layer), type(layer))
    generated = [name for base in thin.__mro__ for name, value in vars(base).items() if isinstance(value, Generated)]
    return generated + (["bias_k", "bias_v"] if isinstance(layer, nn.MultiheadAttention) else [])


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer stores its matrix as (inputs, outputs).

    Args:
        layer: Any layer.

    Returns:
        True for Hugging Face's Conv1D, dense or thin.
    """
    return type(layer).__name__ in ("Conv1D", "ThinConv1D")


def padding_row(layer: nn.Module) -> int | None:
    """The row of an embedding that is padding: zero, and never trained.

    Args:
        layer: Any layer.

    Returns:
        Its index, or None.
    """
    return layer.padding_idx if isinstance(layer, nn.Embedding) else None


def fresh_std(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Standard deviation of the weights that ``init="scratch"`` draws.

    Args:
        layer: The layer that has the parameter.
        shape: Shape of the parameter, two or more dimensions.

    Returns:
        The root of a tenth of He's variance ``2 / fan-in`` (He et al., 2015, arXiv:1502.01852); torch's default for
        embeddings (1) and for recurrent layers (``1 / sqrt(3 * hidden_size)``).
    """
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) or 0 in shape:
        return 1.0
    if isinstance(layer, nn.RNNBase):
        return 1 / math.sqrt(3 * layer.hidden_size)  # uniform within 1 / sqrt(hidden_size)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return math.sqrt(0.2 * math.prod(layer.stride) * layer.groups / (shape[0] * math.prod(shape[2:])))
    return math.sqrt(0.2 / (shape[0] if is_transposed(layer) else math.prod(shape[1:])))


def make_thin(layer: nn.Module, weights: Mapping[str, ThinWeight | ThinPart]) -> None:
    """Replace parameters of a layer by generated ones, in place.

    Args:
        layer: A layer of a type in ``THIN``, or one that is thin already.
        weights: Parameter name -> what generates it.
    """
    if not isinstance(layer, ThinLayer):
        layer.__class__ = THIN[type(layer)]
        layer.register_module("thin", nn.ModuleDict())
        layer.__dict__.pop("_flat_weights", None)  # a recurrent layer's list would keep the dense weights alive
    layer.__dict__.pop("_native", None)
    thin = cast(ThinLayer, layer).thin
    for name, weight in weights.items():
        layer._parameters.pop(name, None)
        thin[name] = weight.train(layer.training)


def make_plain(layer: nn.Module, dense: Mapping[str, nn.Parameter]) -> None:
    """Undo ``make_thin``, in place: the layer gets torch's class again.

    Args:
        layer: A thin layer.
        dense: Parameter name -> dense parameter, for each generated one.
    """
    layer.__class__ = next(plain for plain, thin in THIN.items() if thin is type(layer))
    del layer.thin
    layer.__dict__.pop("_native", None)
    for name, parameter in dense.items():
        layer.register_parameter(name, parameter)
    for name in parameter_names(layer):  # optimiser states go by the order
        if name in layer._parameters:
            layer._parameters[name] = layer._parameters.pop(name)
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()


def thin_tensors(model: nn.Module) -> dict[str, tuple[ThinWeight, int]]:
    """The compressed tensors of a model.

    Args:
        model: A dense or thin network.

    Returns:
        Dotted name, as the dense model has it -> the ThinWeight and the index of the tensor in it. A shared tensor
        appears under each of its names.
    """
    return {
        f"{path}.{name}".lstrip("."): (thin.group, thin.index) if isinstance(thin, ThinPart) else (thin, 0)
        for path, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, ThinLayer)
        for name, thin in layer.thin.items()
    }
