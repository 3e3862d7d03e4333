"""A Keras layer becomes thin, and plain again, by exchanging its class in place."""

from collections.abc import Mapping
from typing import Any

from keras import layers

from deepthin.keras.generated import Generated, ThinLayer
from deepthin.keras.layers import RECURRENT, THIN, _cells
from deepthin.keras.layout import layouts
from deepthin.keras.weight import ThinWeight


def why_not(layer: Any, name: str, variable: Any) -> str:
    """Why a weight of a layer cannot be thin; an empty string if it can."""
    if not isinstance(layer, ThinLayer) and type(layer) not in THIN:
        return f"{type(layer).__name__} has no thin version"
    if not isinstance(vars(THIN.get(type(layer), type(layer))).get(name), Generated):
        return f"{name} is no weight of a {type(layer).__name__}, which therefore is more than that"
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return "the layer is quantised, or has adapters: Keras keeps its weights in another way"
    if variable.constraint is not None:
        return "it has a constraint, which sets values, as generated ones cannot be set"
    if len(layouts(layer, name, tuple(variable.shape))) > 1:
        return "the two biases of a GRU are one weight in Keras"
    return ""


def make_thin(layer: Any, weights: Mapping[str, tuple[ThinWeight, int]], variables: Mapping[str, Any]) -> None:
    """Exchange dense variables of a layer for generated weights, in place. The layer may be thin already."""
    for variable in variables.values():
        for attribute in [own for own, value in vars(layer).items() if value is variable]:
            delattr(layer, attribute)
    if not isinstance(layer, ThinLayer):
        layer.__class__ = THIN[type(layer)]
    layer.attach(weights)
    for name, variable in variables.items():
        layer.shapes[name] = tuple(variable.shape)
        layer.penalize(name, variable.regularizer)
        if not variable.trainable:
            weights[name][0].trainable = False


def make_plain(layer: Any) -> None:
    """Undo ``make_thin``: a thin layer is Keras's own again, with the variables that its weights decode to."""
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
    """Give a layer, if it is one over cells, the class that its cells need: thin or Keras's own."""
    if not isinstance(layer, layers.RNN):
        return
    thin = any(isinstance(cell, ThinLayer) for cell in _cells(layer))
    if thin and type(layer) in RECURRENT:
        layer.__class__ = RECURRENT[type(layer)]
    elif not thin and type(layer) in RECURRENT.values():
        layer.__class__ = next(plain for plain, own in RECURRENT.items() if own is type(layer))
