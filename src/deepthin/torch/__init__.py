"""deepthin for torch: thin layers, compression in place, files, and what belongs to training."""

from deepthin.torch.allocation import allocate
from deepthin.torch.compress import compress, materialize, parameter_groups, plan, same_size
from deepthin.torch.distill import Distillation, Noise
from deepthin.torch.files import load, save
from deepthin.torch.importance import adam_importance, hessian_diagonal, optimal_brain_surgeon
from deepthin.torch.layers import ThinLayer, ThinLinear
from deepthin.torch.recipe import Recipe, share
from deepthin.torch.schemes import prune_by
from deepthin.torch.twist import Rising, Twist
from deepthin.torch.weight import ThinWeight
from deepthin.torch.widths import Trimming, apoz, trim

__all__ = [
    "Distillation",
    "Noise",
    "Recipe",
    "Rising",
    "ThinLayer",
    "ThinLinear",
    "ThinWeight",
    "Trimming",
    "Twist",
    "adam_importance",
    "allocate",
    "apoz",
    "compress",
    "hessian_diagonal",
    "load",
    "materialize",
    "optimal_brain_surgeon",
    "parameter_groups",
    "plan",
    "prune_by",
    "same_size",
    "save",
    "share",
    "trim",
]
