"""The base of thin Keras layers: weights are properties that decode a ThinWeight."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, cast

import keras
from keras import ops

from deepthin.errors import ConfigError
from deepthin.keras.layout import Shape, layouts
from deepthin.keras.weight import ThinWeight
from deepthin.method import Array

HELD: ContextVar[Mapping[int, Mapping[str, Array]]] = ContextVar("held")
"""Weights decoded once for all steps of a sequence: id of the cell -> weight name -> dense tensor."""


class Generated(property):
    """A weight decoded from a ThinWeight, or read from the layer's variable while it is dense."""


def generated(name: str) -> Any:
    """Make the property of a thin layer that reads a weight.

    Args:
        name: Name of the weight in the layer.

    Returns:
        A ``Generated`` property. Reading gives the decoded tensor, or the dense variable; writing to a generated weight
        raises AttributeError.
    """

    def read(layer: "ThinLayer") -> Any:
        if name in vars(layer).get("thin", {}):
            return layer.generate(name)
        return vars(layer)[name] if name in vars(layer) else getattr(super(ThinLayer, layer), name)

    def write(layer: "ThinLayer", value: Any) -> None:
        if name not in vars(layer).get("thin", {}):
            layer.__dict__[name] = value
        elif value is not None:  # None is what ``add_weight`` returns for a thin one
            raise AttributeError(f"{name!r} is generated: train or load the thin code.")

    def remove(layer: "ThinLayer") -> None:
        del layer.__dict__[name]

    return Generated(read, write, remove, f"The {name}, decoded where it is stored thin. Read-only.")


class _Penalty:
    """The regularisers of dense weights, attached to a latent, since Keras collects those of variables."""

    def __init__(self) -> None:
        self.terms: list[Any] = []

    def __call__(self, _: Any) -> Any:
        return sum(term() for term in self.terms)


class ThinLayer(keras.layers.Layer):
    """Base of all thin layers.

    Attributes:
        thin: Weight name -> the ThinWeight that generates it.
        indices: Weight name -> the index of the tensor in its ThinWeight.
        shapes: Weight name -> its shape in Keras.
        penalties: Weight name -> regulariser of the dense weight.
    """

    thin: dict[str, ThinWeight]
    indices: dict[str, int]
    shapes: dict[str, Shape]
    penalties: dict[str, Any]

    def generate(self, name: str) -> Array:
        """A dense weight in the layer's compute dtype.

        Args:
            name: Name of the weight.

        Returns:
            A tensor of the backend, in Keras's layout; within a recurrent layer decoded once for all steps.
        """
        held = HELD.get({}).get(id(self), {})
        return held[name] if name in held else ops.cast(self.decoded(name), self.compute_dtype)

    def decoded(self, name: str) -> Array:
        """A dense weight in the dtype of the latents.

        Args:
            name: Name of the weight.

        Returns:
            A tensor of the backend, in Keras's layout, decoded now.
        """
        shape, tensor = self.shapes[name], self.thin[name].dense(self.indices[name])
        return layouts(self, name, shape)[name].restored(tensor, shape, ops)

    def attach(self, weights: Mapping[str, tuple[ThinWeight, int]]) -> None:
        """Generate weights from now on; their dense variables have been removed or were never made.

        Args:
            weights: Weight name -> the ThinWeight and the index of the tensor in it.
        """
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
        """Give a bias the learning-rate multiplier of the layer's codes (``methods.learning_rate_multiplier``)."""
        variable.learning_rate_multiplier = next(iter(self.thin.values())).learning_rate_multiplier

    def penalize(self, name: str, regularizer: Any) -> None:
        """Add the regularisation loss of a generated weight to the layer's losses.

        Args:
            name: Name of the weight.
            regularizer: From a dense weight to a scalar; None adds nothing.
        """
        if regularizer is None:
            return
        self.penalties[name] = regularizer
        latent = self.thin[name]._trainable_variables[0]
        if latent.regularizer is None:
            latent.regularizer = _Penalty()
        latent.regularizer.terms.append(lambda: regularizer(self.generate(name)))

    def add_weight(self, *args: Any, name: str | None = None, **options: Any) -> Any:
        """Keras's method; makes no variable for a generated weight.

        Args:
            args: As Keras has them, the shape first.
            name: Name of the weight.
            options: As Keras has them.

        Returns:
            The variable; None for a generated weight.
        """
        if name is None or name not in vars(self).get("thin", {}):
            variable = super().add_weight(*args, name=name, **options)
            if vars(self).get("thin"):
                self._speed(variable)
            return variable
        self.shapes[name] = tuple(args[0] if args else options["shape"])
        self.penalize(name, keras.regularizers.get(options.get("regularizer")))
        return None

    def enable_lora(self, *args: Any, **options: Any) -> None:
        """Refuse Keras's adapters, which need a dense variable.

        Args:
            args: As Keras has them.
            options: As Keras has them.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{self.name} is thin: its factors train as adapters do. Call deepthin.keras.materialize(model) first, or "
            "leave the layer out with [model] ignore."
        )

    def save_own_variables(self, store: Any) -> None:
        """Save the dense variables; a ThinWeight is a layer and saves its own.

        Args:
            store: Keras's store for this layer.
        """
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Load the dense variables.

        Args:
            store: Keras's store for this layer.
        """
        keras.layers.Layer.load_own_variables(self, store)

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration, with its ThinWeights under ``thin``.

        Returns:
            A mapping that JSON can hold.
        """
        return {**super().get_config(), "thin": self.thin_config()}

    def thin_config(self) -> dict[str, Any]:
        """The ThinWeights of the layer, serialised.

        Returns:
            Weight name -> the ThinWeight's configuration, whose ``shared_object_id`` is equal for shared ones, and the
            index of the tensor in it.
        """
        serialize = keras.saving.serialize_keras_object
        return {
            name: [{**serialize(weight), "shared_object_id": id(weight)}, self.indices[name]]
            for name, weight in self.thin.items()
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Build a layer from its configuration.

        Args:
            config: What ``get_config`` returned.

        Returns:
            A thin layer, not built yet.
        """
        layer = cast(Any, super()).from_config({key: value for key, value in config.items() if key != "thin"})
        layer.attach(_weights(config["thin"]))
        return layer


def _weights(config: Mapping[str, Any]) -> dict[str, tuple[ThinWeight, int]]:
    made = keras.saving.deserialize_keras_object
    return {name: (made(weight), index) for name, (weight, index) in config.items()}
