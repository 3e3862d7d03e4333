"""A portable model as a package of AOTInductor: compiled for this kind of machine, run by torch's C++ library."""

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from deepthin.torch.export.onnx import exported, quiet
from deepthin.torch.export.written import Written
from deepthin.torch.portable import portable


def write(model: nn.Module, example: Sequence[Tensor], path: Path, compact: bool = False) -> Written:
    """Export a model.

    Args:
        model: A thin or dense network.
        example: Its inputs; batch and lengths may vary later.
        path: The ``.pt2`` file.
        compact: Whether integers are stored once.

    Returns:
        The files that were written.
    """
    with quiet():
        program = exported(portable(model, compact=compact), example)
        inductor = cast(Any, torch)._inductor
        package = io.BytesIO()
        inductor.aoti_compile_and_package(program, package_path=package)
    with zipfile.ZipFile(package) as full, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name in full.namelist():
            if not name.endswith((".cpp", ".o", ".json.tmp")):
                small.writestr(name, full.read(name))
    return Written.of(path)


def runner(path: Path) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Load a file.

    Args:
        path: The ``.pt2`` file.

    Returns:
        A function of the inputs.
    """
    compiled = cast(Any, torch)._inductor.aoti_load_package(str(path))

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            made = compiled(*(torch.from_numpy(array) for array in inputs))
        return [tensor.numpy() for tensor in (made if isinstance(made, tuple | list) else (made,))]

    return run


def warm_up() -> None:
    """Load the runtime, so that the memory of a file can be told apart from its own."""
    torch.randn(1)
