"""deepthin for TensorFlow: the call that declares a variable returns a tensor that small factors generate.

Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, section 4.
"""

from deepthin.keras.tensorflow_product import portable
from deepthin.tensorflow.files import load, save
from deepthin.tensorflow.get_variable import get_variable, getter, variables
from deepthin.tensorflow.variables import Variables

__all__ = ["Variables", "get_variable", "getter", "load", "portable", "save", "variables"]
