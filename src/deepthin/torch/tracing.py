"""Whether what is computed now is recorded as a graph, or transformed by torch.func."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether torch.func transforms or forward-mode differentiation are active: values must not be cached then.

    Returns:
        True inside ``vmap``, ``grad``, ``jvp`` and the like.
    """
    return torch._C._are_functorch_transforms_active() or forward_mode()


def is_traced(x: Tensor) -> bool:
    """Whether the present computation is recorded as a graph, or transformed.

    Args:
        x: An operand.

    Returns:
        True in torch.compile, torch.export and torch.jit.trace, and where ``is_transformed`` is.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_transformed()


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active, which native code does not support.

    Returns:
        True inside ``torch.autograd.forward_ad.dual_level``.
    """
    return forward_ad._current_level >= 0
