"""A portable model for LiteRT (TensorFlow Lite): a ``.tflite`` file of fixed shapes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from deepthin.torch.export.onnx import quiet
from deepthin.torch.export.written import Written
from deepthin.torch.portable import portable


def write(model: nn.Module, example: Sequence[Tensor], path: Path, compact: bool = False) -> Written:
    """Export a model.

    Args:
        model: A thin or dense network.
        example: Its inputs; the file takes inputs of these shapes.
        path: The ``.tflite`` file.
        compact: Whether integers are stored once.

    Returns:
        The files that were written.
    """
    import litert_torch  # pyright: ignore[reportMissingImports] -- an environment of its own

    with quiet():
        litert_torch.convert(portable(model, compact=compact), tuple(example)).export(str(path))
    return Written.of(path)


def runner(path: Path) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Load a file.

    Args:
        path: The ``.tflite`` file.

    Returns:
        A function of the inputs, on one thread.
    """
    interpreter = loaded(path)
    given, made = interpreter.get_input_details(), interpreter.get_output_details()

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        for place, array in zip(given, inputs, strict=True):
            interpreter.set_tensor(place["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(place["index"]) for place in made]

    return run


def constants(path: Path) -> list[tuple[str, int, int]]:
    """The constants of a file.

    Args:
        path: The ``.tflite`` file.

    Returns:
        Name, number of entries, and bytes of each.
    """
    interpreter, found = loaded(path), list[tuple[str, int, int]]()
    for place in interpreter.get_tensor_details():
        try:  # results of operations have no values before a run
            value = interpreter.get_tensor(place["index"])
        except ValueError:
            continue
        found.append((place["name"], value.size, value.nbytes))
    return found


def loaded(path: Path) -> Any:
    """An interpreter of the file.

    Args:
        path: The ``.tflite`` file.

    Returns:
        The interpreter, with memory for its tensors.
    """
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def warm_up() -> None:
    """Load the runtime, so that the memory of a file can be told apart from its own."""
    import ai_edge_litert.interpreter  # noqa: F401  # pyright: ignore[reportMissingImports]
