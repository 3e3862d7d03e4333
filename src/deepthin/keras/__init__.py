"""deepthin for Keras 3, on any of its backends: never imports torch by itself."""

from deepthin.keras.weight import ThinWeight

__all__ = ["ThinWeight"]
