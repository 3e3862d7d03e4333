"""A Keras layer becomes thin, and plain again, by exchanging its class in place."""

from collections.abc import Mapping
from typing import Any

from keras import layers

from deepthin.keras.generated import Generated, ThinLayer
from deepthin.keras.layers import RECURRENT, THIN, _cells
from deepthin.keras.layout import layouts
from deepthin.keras.weight import ThinWeight


def why_not(layer: Any, name: str, variable: Any) -> str:
    """Why a weight of a layer cannot be thin.

    Args:
        layer: A Keras layer, dense or thin.
        name: Name of the weight in the layer, ``kernel`` say.
        variable: The dense variable.

    Returns:
        The reason, as part of a sentence; an empty string if the weight can be thin.
    """
    if not isinstance(layer, ThinLayer) and type(layer) not in THIN:
        return f"{type(layer).__name__} has no thin version"
    if not isinstance(vars(THIN.get(type(layer), type(layer))).get(name), Generated):
        return f"{name} is an extra weight of the {type(layer).__name__}, which a thin layer would not use"
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return "the layer is quantised or has adapters, which change how Keras stores its weights"
    if variable.constraint is not None:
        return "it has a constraint, which assigns values, and generated weights cannot be assigned"
    if len(layouts(layer, name, tuple(variable.shape))) > 1:
        return "the two biases of a GRU are one weight in Keras"
    return ""


def make_thin(layer: Any, weights: Mapping[str, tuple[ThinWeight, int]], variables: Mapping[str, Any]) -> None:
    """Replace dense variables of a layer by generated weights, in place.

    Args:
        layer: A layer of a type in ``THIN``, or one that is thin already.
        weights: Weight name -> the ThinWeight and the index of the tensor in it.
        variables: Weight name -> the dense variable; its shape, regulariser and whether it is trainable are kept.
    """
    for variable in variables.values():  # as Keras's ``delattr``, but without its garbage collection for each variable
        layer._untrack_variable(variable)
        for attribute in [key for key, value in vars(layer).items() if value is variable]:
            super(layers.Layer, layer).__delattr__(attribute)
    if not isinstance(layer, ThinLayer):
        layer.__class__ = THIN[type(layer)]
    layer.attach(weights)
    for name, variable in variables.items():
        layer.shapes[name] = tuple(variable.shape)
        layer.penalize(name, variable.regularizer)
        if not variable.trainable:
            weights[name][0].trainable = False


def make_plain(layer: Any) -> None:
    """Undo ``make_thin``, in place: the layer gets Keras's class again, and variables with the decoded values.

    Args:
        layer: A thin layer.
    """
    plain = next(plain for plain, thin in THIN.items() if thin is type(layer))
    thin, shapes, penalties = layer.thin, layer.shapes, layer.penalties
    dense = {name: layer.decoded(name) for name in thin}
    order = [name for name, value in vars(type(layer)).items() if isinstance(value, Generated)]
    for name in ("thin", "indices", "shapes", "penalties"):
        delattr(layer, name)
    layer.__class__ = plain
    locked = layer._tracker.locked
    layer._tracker.unlock()
    for name, values in dense.items():
        layer._tracker.untrack(thin[name])
        kind, trained = thin[name].variable_dtype, bool(thin[name].trainable_variables)
        variable = layer.add_weight(shapes[name], "zeros", kind, name=name, trainable=trained)
        variable.regularizer = penalties.get(name)
        variable.assign(values)
        setattr(layer, f"_{name}" if isinstance(getattr(plain, name, None), property) else name, variable)
    for variables in (layer._trainable_variables, layer._non_trainable_variables):
        variables.sort(key=lambda variable: order.index(variable.name) if variable.name in order else len(order))
    if locked:
        layer._tracker.lock()


def exchange_recurrent(layer: Any) -> None:
    """Give a recurrent layer the class that its cells need, thin or Keras's, in place.

    Args:
        layer: Any layer; others than recurrent ones are left unchanged.
    """
    if not isinstance(layer, layers.RNN):
        return
    thin = any(isinstance(cell, ThinLayer) for cell in _cells(layer))
    if thin and type(layer) in RECURRENT:
        layer.__class__ = RECURRENT[type(layer)]
    elif not thin and type(layer) in RECURRENT.values():
        layer.__class__ = next(plain for plain, kind in RECURRENT.items() if kind is type(layer))
