"""deepthin: neural networks at 2 % to 0.1 % of their size. Importing it loads no framework."""

from deepthin.errors import BudgetError, ConfigError, DeepThinError, FormatError, NonFiniteError
from deepthin.kernels.products import native_available
from deepthin.methods import METHODS
from deepthin.storage.read import inspect, load

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "BudgetError",
    "ConfigError",
    "DeepThinError",
    "FormatError",
    "NonFiniteError",
    "__version__",
    "inspect",
    "load",
    "native_available",
]
