"""All operators that the C runtime has: importing this module registers their handlers."""

from deepthin.torch.export.native import functions, norms, pools, products, recurrences, views
from deepthin.torch.export.native.graph import program_of

__all__ = ("functions", "norms", "pools", "products", "program_of", "recurrences", "views")
