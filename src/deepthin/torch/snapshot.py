"""What an exported graph holds of a weight that rounds: the stored code, instead of the floats before rounding.

Exporters list a model's parameters before they call it, and write all of them, used or not. While one is at work, a
weight in evaluation therefore shows no floats, and its forward pass decodes constants: integers of the smallest type,
and steps.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from threading import Thread

import torch
from torch import Tensor, nn

WARNING = (
    "This export decodes thin weights in its graph, and runtimes compute the dense weights from it once, in the file "
    "or in memory. deepthin.torch.export(model, path), or the command `deepthin export`, writes a file that stays "
    "small."
)
_warned = False


def is_listed() -> bool:
    """Whether an exporter may be listing the parameters of a model.

    Returns:
        True from the first to the last line of torch.export and of a module's torch.jit.trace.
    """
    export, trace = sys.modules.get("torch.export._trace"), sys.modules.get("torch.jit._trace")
    return getattr(export, "_EXPORT_FLAGS", None) is not None or getattr(trace, "_trace_module_map", None) is not None


def is_exported() -> bool:
    """Whether the present computation becomes a graph that runs elsewhere.

    Returns:
        True in torch.export, torch.onnx.export and torch.jit.trace; False in torch.compile and torch.func.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is not None


class Snapshot:
    """The code of one weight in the smallest integer types, made anew when the code is another one."""

    _held: "tuple[Mapping[str, Tensor], dict[str, Tensor]] | None" = None

    def __init__(self) -> None:
        self.latest: dict[str, Tensor] | None = None

    def take(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make a snapshot, or return the last one of the same code.

        Args:
            code: Entry -> tensor, which nobody writes to.

        Returns:
            Entry -> constant: integers in the smallest type that holds their values, floats as they are.
        """
        if self._held is None or self._held[0] is not code:
            self._held = code, {entry: _narrowed(value.detach()) for entry, value in code.items()}
        self.latest = self._held[1]
        return self.latest


def unrecorded(call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Compute something that no tracer and no mode observes: they belong to a thread, so another one calls.

    Args:
        call: What computes it.

    Returns:
        Its result.
    """
    made: list[dict[str, Tensor]] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                made.append(call())
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def are_parameters(*tensors: Tensor) -> bool:
    """Whether tensors are a model's own: none takes the place of a parameter during a call, as in ``functional_call``.

    Args:
        tensors: The floats of a state.

    Returns:
        True if each is an ``nn.Parameter`` itself.
    """
    return all(type(tensor) is nn.Parameter and not tensor.is_meta for tensor in tensors)


def warn_of_dense() -> None:
    """Warn, once a process, that a graph decodes weights, and name what exports a small file."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(WARNING, stacklevel=2)


def _narrowed(value: Tensor) -> Tensor:
    """Integers in the smallest type that holds them, and in which they index if they did so before."""
    if value.is_floating_point() or value.dtype not in (torch.int16, torch.int32, torch.int64) or not value.numel():
        return value
    least, most = int(value.min()), int(value.max())
    for kind in (torch.int8, torch.uint8, torch.int16, torch.int32):
        if torch.iinfo(kind).min <= least and most <= torch.iinfo(kind).max:
            return value.to(kind)
    return value
