"""deepthin for torch: thin layers, compression in place, files, and what belongs to training."""

from deepthin.torch.allocation import allocate
from deepthin.torch.compress import compress, materialize, plan
from deepthin.torch.delta import delta, merge, unmerge
from deepthin.torch.distill import Distillation, Noise
from deepthin.torch.export.run import Exported, export
from deepthin.torch.files import load, save
from deepthin.torch.generated import ThinLayer
from deepthin.torch.importance import adam_importance, hessian_diagonal
from deepthin.torch.initialise import initialise
from deepthin.torch.layers import ThinLinear
from deepthin.torch.portable import portable
from deepthin.torch.rates import parameter_groups
from deepthin.torch.recipe import Recipe, quantize_codes
from deepthin.torch.schemes import allocate_pruning
from deepthin.torch.search import search
from deepthin.torch.size_target import SizeTarget
from deepthin.torch.surgeon import optimal_brain_surgeon
from deepthin.torch.twist import Rising, Twist
from deepthin.torch.weight import ThinWeight
from deepthin.torch.widths import Trimming, apoz, same_size, trim

__all__ = [
    "Distillation",
    "Exported",
    "Noise",
    "Recipe",
    "Rising",
    "SizeTarget",
    "ThinLayer",
    "ThinLinear",
    "ThinWeight",
    "Trimming",
    "Twist",
    "adam_importance",
    "allocate",
    "allocate_pruning",
    "apoz",
    "compress",
    "delta",
    "export",
    "hessian_diagonal",
    "initialise",
    "load",
    "materialize",
    "merge",
    "optimal_brain_surgeon",
    "parameter_groups",
    "plan",
    "portable",
    "quantize_codes",
    "same_size",
    "save",
    "search",
    "trim",
    "unmerge",
]
