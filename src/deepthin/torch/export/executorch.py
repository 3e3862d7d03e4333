"""A portable model for ExecuTorch, with XNNPACK where it applies: a ``.pte`` file of fixed shapes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
        example: Its inputs; the file takes inputs of these shapes.
        path: The ``.pte`` file.
        compact: Whether integers are stored once.

    Returns:
        The files that were written.
    """
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports]
        from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

        program = exported(portable(model, compact=compact), example, fixed=True)
        lowered: Any = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)
    return Written.of(path)


def runner(path: Path) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Load a file.

    Args:
        path: The ``.pte`` file.

    Returns:
        A function of the inputs.
    """
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    program = Runtime.get().load_program(path)
    method: Any = program.load_method("forward")

    def run(inputs: Sequence[np.ndarray], program: Any = program) -> list[np.ndarray]:
        return [output.numpy() for output in method.execute([torch.from_numpy(array) for array in inputs])]

    return run


def warm_up() -> None:
    """Load the runtime, so that the memory of a file can be told apart from its own."""
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    Runtime.get()
