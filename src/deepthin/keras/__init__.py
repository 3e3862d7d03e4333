"""deepthin for Keras 3, on any of its backends: never imports torch by itself."""

from deepthin.keras.compress import compress, materialize, plan
from deepthin.keras.export import Exported, export
from deepthin.keras.files import load, save
from deepthin.keras.generated import ThinLayer
from deepthin.keras.optimizers import SGD, Adam, AdamW
from deepthin.keras.size_target import SizeTarget
from deepthin.keras.weight import ThinWeight

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Exported",
    "SizeTarget",
    "ThinLayer",
    "ThinWeight",
    "compress",
    "export",
    "load",
    "materialize",
    "plan",
    "save",
]
