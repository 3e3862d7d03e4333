"""Whether what is computed now is recorded as a graph, or transformed by torch.func."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether values have more to them than what is in memory: nothing of them may be kept."""
    return torch._C._are_functorch_transforms_active() or forward_mode()


def is_traced(x: Tensor) -> bool:
    """Whether what is computed now is recorded as a graph or transformed by torch.func."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_transformed()


def forward_mode() -> bool:
    """Whether tangents may go along with tensors: derivatives in forward mode, which the native code has not."""
    return forward_ad._current_level >= 0
