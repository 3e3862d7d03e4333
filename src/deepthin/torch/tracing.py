"""Whether anyone records what is computed now: then nothing cached may be used, since it would become a constant.

All code that caches, calls native kernels directly or looks at values asks here. Recorders are tracers
(torch.jit.trace, torch.export, torch.compile, ``make_fx``), modes that observe operations, and transforms (torch.func).
torch.fx's symbolic tracer gives proxies instead of tensors; for it a thin layer is a leaf, as torch's own layers are.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active, which native code does not support.

    Returns:
        True inside ``torch.autograd.forward_ad.dual_level``.
    """
    return forward_ad._current_level >= 0


RECORDERS = (
    torch._C._get_tracing_state,
    torch._C._len_torch_dispatch_stack,
    torch._C._are_functorch_transforms_active,
    forward_mode,
    partial(torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch),
)
"""Functions whose result is true while someone records; native code asks them too. Compilers are not among them."""


def is_recorded() -> bool:
    """Whether the present computation is recorded as a graph, observed operation by operation, or transformed.

    Returns:
        True in torch.compile, torch.export, torch.jit.trace and ``make_fx``, under modes of dispatch or of functions
        (``with torch.device(...)`` excepted), and inside ``vmap``, ``grad``, ``jvp`` and the like.
    """
    if torch.compiler.is_compiling():
        return True
    for recorder in RECORDERS:
        if recorder():
            return True
    if not torch._C._len_torch_function_stack():
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def is_portable() -> bool:
    """Whether what is recorded must consist of standard operations, since it runs elsewhere or is transformed.

    Returns:
        True in torch.export, torch.jit.trace and inside torch.func; False in torch.compile, under modes, and where
        nothing is recorded.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active() or forward_mode()


def is_plain(*tensors: Tensor) -> bool:
    """Whether the values of tensors may be read: none is a subclass, a fake tensor say.

    Args:
        tensors: Any tensors.

    Returns:
        True if each is a ``Tensor`` or ``nn.Parameter`` itself.
    """
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which products keep their precision: codes are exact, and gradients of factors are float32.

    Args:
        tensor: A tensor on the device in question.

    Returns:
        A context that does nothing where autocast is off.
    """
    device = tensor.device.type
    off = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if off else nullcontext()


def as_leaf(module: nn.Module, *args: Any, **kwargs: Any) -> fx.Proxy | None:
    """Record the call of a module as one node, where torch.fx traces symbolically.

    Args:
        module: The module that is called.
        args: Its arguments.
        kwargs: Its named arguments.

    Returns:
        What stands for the result; None if no argument and no parameter of the module is a proxy, or if the module is
        the root of the trace, whose own forward is recorded.
    """
    if torch.compiler.is_compiling() or not _symbolic_trace._is_fx_tracing_flag:
        return None
    read = (getattr(owner, name) for owner in module.modules() for name in owner._parameters)
    given = chain(args, kwargs.values(), read)
    tracer = cast(Any, next((value.tracer for value in given if isinstance(value, fx.Proxy)), None))
    if tracer is None or module is getattr(tracer, "root", module):
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
