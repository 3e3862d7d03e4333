"""What all thin Keras layers share: weights that are read from what generates them."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, cast

import keras
from keras import ops

from deepthin.keras.layout import Shape, layouts
from deepthin.keras.weight import ThinWeight
from deepthin.method import Array

HELD: ContextVar[Mapping[int, Mapping[str, Array]]] = ContextVar("held")
"""What cells have decoded for all steps of a sequence, by the id of the cell."""


class Generated(property):
    """A weight that is read from what generates it, or, while it is dense, from where Keras keeps it."""


def generated(name: str) -> Any:
    """The property of a thin layer that reads a weight of this name."""

    def read(layer: "ThinLayer") -> Any:
        if name in vars(layer).get("thin", {}):
            return layer.generate(name)
        return vars(layer)[name] if name in vars(layer) else getattr(super(ThinLayer, layer), name)

    def write(layer: "ThinLayer", value: Any) -> None:
        if name not in vars(layer).get("thin", {}):
            layer.__dict__[name] = value
        elif value is not None:  # what ``add_weight`` gives for a thin one
            raise AttributeError(f"{name!r} is generated: train or load the thin code.")

    def remove(layer: "ThinLayer") -> None:
        del layer.__dict__[name]

    return Generated(read, write, remove, f"The {name}, decoded where it is stored thin. Read-only.")


class _Penalty:
    """The regularisers of dense weights, as that of a latent: Keras asks variables for theirs."""

    def __init__(self) -> None:
        self.terms: list[Any] = []

    def __call__(self, _: Any) -> Any:
        return sum(term() for term in self.terms)


class ThinLayer(keras.layers.Layer):
    """What all thin layers share: ``thin`` maps a weight's name to what generates it."""

    thin: dict[str, ThinWeight]
    indices: dict[str, int]  # which of the ThinWeight's tensors
    shapes: dict[str, Shape]  # as Keras has the weight
    penalties: dict[str, Any]  # regularisers of the dense weights

    def generate(self, name: str) -> Array:
        """A dense weight, as Keras keeps it, in the type that the layer computes in."""
        held = HELD.get({}).get(id(self), {})
        return held[name] if name in held else ops.cast(self.decoded(name), self.compute_dtype)

    def decoded(self, name: str) -> Array:
        """The same in the type of the latents."""
        shape, tensor = self.shapes[name], self.thin[name].dense(self.indices[name])
        return layouts(self, name, shape)[name].kept(tensor, shape, ops)

    def attach(self, weights: Mapping[str, tuple[ThinWeight, int]]) -> None:
        """Generate these weights, whose dense variables are gone or not yet made."""
        locked, old = self._tracker.locked, vars(self)
        self._tracker.unlock()
        self.shapes, self.penalties = dict(old.get("shapes", {})), dict(old.get("penalties", {}))
        self.indices = {**old.get("indices", {}), **{name: index for name, (_, index) in weights.items()}}
        self.thin = {**old.get("thin", {}), **{name: weight for name, (weight, _) in weights.items()}}
        if locked:
            self._tracker.lock()
        for variable in self._trainable_variables:
            self._speed(variable)

    def _speed(self, variable: Any) -> None:
        """The biases of a thin layer learn at the rate of its codes (``deepthin.methods.learning_rate_multiplier``)."""
        variable.learning_rate_multiplier = next(iter(self.thin.values())).learning_rate_multiplier

    def penalize(self, name: str, regularizer: Any) -> None:
        """Add the penalty of a dense weight to the losses."""
        if regularizer is None:
            return
        self.penalties[name] = regularizer
        latent = self.thin[name]._trainable_variables[0]
        if latent.regularizer is None:
            latent.regularizer = _Penalty()
        latent.regularizer.terms.append(lambda: regularizer(self.generate(name)))

    def add_weight(self, *args: Any, name: str | None = None, **options: Any) -> Any:
        """As Keras's own; nothing for what is generated."""
        if name is None or name not in vars(self).get("thin", {}):
            variable = super().add_weight(*args, name=name, **options)
            if vars(self).get("thin"):
                self._speed(variable)
            return variable
        self.shapes[name] = tuple(args[0] if args else options["shape"])
        self.penalize(name, keras.regularizers.get(options.get("regularizer")))
        return None

    def save_own_variables(self, store: Any) -> None:
        """Those that are dense: what generates the others is saved by itself."""
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Those that are dense."""
        keras.layers.Layer.load_own_variables(self, store)

    def get_config(self) -> dict[str, Any]:
        """With what generates the weights."""
        return {**super().get_config(), "thin": self.thin_config()}

    def thin_config(self) -> dict[str, Any]:
        """By the weight's name: the ThinWeight, and which of its tensors; Keras knows a shared one by its number."""
        serialize = keras.saving.serialize_keras_object
        return {
            name: [{**serialize(weight), "shared_object_id": id(weight)}, self.indices[name]]
            for name, weight in self.thin.items()
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The layer, not built yet."""
        layer = cast(Any, super()).from_config({key: value for key, value in config.items() if key != "thin"})
        layer.attach(_weights(config["thin"]))
        return layer


def _weights(config: Mapping[str, Any]) -> dict[str, tuple[ThinWeight, int]]:
    made = keras.saving.deserialize_keras_object
    return {name: (made(weight), index) for name, (weight, index) in config.items()}
